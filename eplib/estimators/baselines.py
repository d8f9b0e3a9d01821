"""Gradients at a settled free phase that are no equilibrium propagation: what it is compared with there."""

import math

import torch
from torch import Tensor

from ..config import configuration
from ..solvers import Solver, norm
from .base import FORCE, PRODUCT, Adjoint, ByAdjoint, Steps
from .problem import Problem


@configuration
class Implicit(ByAdjoint):
    """Implicit differentiation: solves J^T a = -g with any solver, J^T by autograd (Bai et al. 2019).

    `nudged=solvers.Anderson()` makes it GMRES-like. Independent of the hand-written linearisation, so it checks it.
    """

    steps: Steps | None = None

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        with torch.enable_grad():
            state = problem.state.detach().requires_grad_()
            push = problem.model.block(state, problem.x)  # with a graph, whatever computes the phases

        def force(a: Tensor) -> Tensor:
            return torch.autograd.grad(push, state, a, retain_graph=True)[0] + problem.slope

        phase = solver.solve(force, torch.zeros_like(problem.slope), lambda f, _: norm(f) / problem.scale, linear=True)
        return Adjoint(phase.value, phase, evaluations=FORCE + PRODUCT * phase.evaluations)


@configuration
class OneStep(ByAdjoint):
    """One-step gradient: J^-T taken as -1, a = g; backpropagation through the last application of the block only (Fung et al.
    2022)."""

    second_phase = False

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        return Adjoint(problem.slope)


@configuration
class FeedbackAlignment(ByAdjoint):
    """Direct feedback alignment: a = e R, the error e = dl/dlogits through a fixed random matrix (Nokland 2016).

    R, one for each layer of the state, has entries of variance 1 / C, is drawn from seed 0 at the first call and carried in the
    report's state.
    """

    second_phase = False

    def adjoint(self, problem: Problem, solver: Solver) -> Adjoint:
        model, z = problem.model, problem.state
        with torch.enable_grad():
            logits = model.predict(model.block.output(z)).detach().requires_grad_()
            error, = torch.autograd.grad(model.loss_of(logits, problem.targets).sum(), logits)  # (B, T, V) or (B, V)
        if "feedback" not in problem.carried:
            shape = (*z.shape[1:-2], error.shape[-1], z.shape[-1])  # (V, C), for a stack (L, V, C)
            draw = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / math.sqrt(z.shape[-1])
            problem.carried["feedback"] = draw.to(z)
        if error.dim() == 2 < z.dim():  # one error for the image, shared by its tokens
            error = error.unsqueeze(1) / z.shape[-2]
        error = error.view(error.shape[0], *(1,) * (z.dim() - 3), *error.shape[1:])
        return Adjoint((error @ problem.carried["feedback"]).expand_as(z))
