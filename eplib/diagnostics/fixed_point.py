"""What the fixed point of a checkpoint is like."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import spectra
from ..blocks import Jacobian
from ..estimators import DyadicEP, VectorField, asymmetry, gradient
from ..models import Model
from ..solvers import Anderson, Solver
from .gradients import agreement


def attention_distance(jacobian: Any) -> Tensor:
    """Effective attention distance: sum_s w_ts |t - s| of attention weights w, mean over tokens and heads, (B,), in tokens.

    Raises TypeError for a derivative without attention weights of its own: that of a stack or an automatic one.
    """
    if not isinstance(jacobian, Jacobian):
        raise TypeError(f"{type(jacobian).__name__} holds no attention weights; attention_distance is for the derivative by "
                        "hand of blocks.Thick, Attractor, Thin and LinearAttention")
    weights = jacobian.attention.weights  # (B, H, T, T)
    places = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
    return (weights * (places[:, None] - places).abs()).sum(-1).mean((-2, -1))


def fingerprint(model: Model, inputs: Tensor, targets: Tensor, solver: Solver,
                step: float = 0.5) -> dict[str, float]:
    """Operator fingerprint (Hao 2026): what a stored checkpoint's free phase and Jacobian are like on one batch, in one call.

    residual: of the free phase, the largest. abscissa: largest real part of the eigenvalues of J, and frequency: the imaginary
    part of that eigenvalue; rate_arnoldi: spectral radius of I + step J, the step being `rate_step`; all exact and over all
    tokens, or with `abscissa_residual` (`spectra.edges`). numerical_abscissa, transient_growth (the largest of 1 .. 16 steps),
    asymmetry_radius (rho(S^-1 A)) and its residual, asymmetry ||J a - J^T a|| / ||J a|| along the adjoint state, cosine of
    uncorrected EP's gradient with the exact one over block and embeddings, attention_distance in tokens. Every number is the
    worst of the batch; cosine and distance are of the batch as a whole. NaN where the free phase diverged, and for what the
    block does not have: attention_distance without the derivative by hand of one attention layer, the radius and its residual
    where S is singular. Raises TypeError for blocks.Feedforward, which has no dynamics.
    """
    if model.block.explicit:
        raise TypeError(f"{type(model.block).__name__} is no equilibrium block: it has no fixed point and no Jacobian there")
    names = ("abscissa", "frequency", "abscissa_residual", "rate_arnoldi", "rate_step", "numerical_abscissa",
             "transient_growth", "asymmetry_radius", "asymmetry_radius_residual", "asymmetry", "cosine_uncorrected",
             "attention_distance")
    solution = model.settle(inputs, solver)
    found = {"residual": solution.residual.max().item()} | dict.fromkeys(names, math.nan)
    if not solution.status.usable:
        return found
    with torch.no_grad():
        z, jacobian = solution.value, model.block.linearise(solution.value, model.clamp(inputs))
    rho, residual = spectra.asymmetry_radius(jacobian, z)
    exact, plain = (gradient(model, inputs, targets, estimator=kind, solver=solver, start=z, nudged=Anderson(tol=1e-3))
                    for kind in (DyadicEP(), VectorField(beta=1e-2)))
    found |= spectra.edges(model.block, z, model.clamp(inputs), step) | {
        "numerical_abscissa": spectra.numerical_abscissa(jacobian, z).max().item(),
        "transient_growth": spectra.transient_growth(jacobian, z, step).max().item(),
        "asymmetry_radius": rho.max().item(), "asymmetry_radius_residual": residual.max().item()}
    if exact.grads is not None and exact.adjoint is not None:
        found["asymmetry"] = asymmetry(jacobian, exact.adjoint)
        if plain.grads is not None:
            found["cosine_uncorrected"] = agreement(*map(model.without_readout, (plain.grads, exact.grads)))["total"].cosine
    if isinstance(jacobian, Jacobian):
        found["attention_distance"] = attention_distance(jacobian).mean().item()
    return found
