"""The same fixed point in fewer evaluations, by Anderson acceleration."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..config import configuration
from .base import Count, Solver, Step, Tolerance
from .solution import norm

DAMPING = 0.75  # of the normal equations, as a power of the float spacing
STALL = 10.0  # an accelerated sample whose residual is this many times its lowest falls back to plain relaxation


@configuration
class Anderson(Solver):
    """Anderson acceleration of the same iteration, sample by sample (Walker & Ni 2011, type II).

    The next state combines the last `memory` differences so that the extrapolated force is smallest in norm; on a linear phase
    this is GMRES. Elsewhere differences tell the Jacobian only near the fixed point (Toth & Kelley 2015): where the force is
    longer than the state, a step moves the state by its own size, and a sample relaxes plainly and forgets what it has: a
    delayed start (Walker & Ni 2011), for the time constant of the leak -z and two steps in all. A sample whose residual rises
    to ten times its lowest falls back: to its best state, and on from there by plain relaxation to the end.
    `Solution.fallbacks` counts them.
    """

    step: Step = 0.7
    max_steps: Count = 64
    tol: Tolerance = 1e-4
    memory: Count = 5

    in_kernel = True

    def history(self, linear: bool) -> "Differences":
        return Differences(self.memory, self.step, linear)

    def next(self, state: Tensor, push: Tensor, residual: Tensor, best: Tensor, history: "Differences") -> Tensor:
        return _like(history.next(_flat(state), _flat(push), residual, _flat(best)), state)


@configuration
class MixedPrecision(Anderson):
    """Anderson's method with the first evaluations of a free or adjoint phase in bfloat16, until half of the samples have a
    residual of at most `coarse`; from there on, and for every sample's last evaluation, in the state's own precision.

    bfloat16 has eight binary digits, so `coarse` is to be above 2^-8 = 4e-3. It pays where the processor multiplies bfloat16
    faster than float32, costs time where it does not, and is for float32 states in PyTorch: float64 states and the compiled
    kernel are refused. Contrasted trajectories, whose difference the rounding would drown, are never rounded.
    """

    coarse: Annotated[float, Field(gt=0)] = 1e-2


def _flat(a: Tensor) -> Tensor:
    return (torch.view_as_real(a) if a.is_complex() else a).flatten(1)  # (B, ...) -> (B, n), real


def _like(flat: Tensor, a: Tensor) -> Tensor:
    return torch.view_as_complex(flat.view(*a.shape, 2)) if a.is_complex() else flat.view(a.shape)


class Differences:
    """Anderson's memory: the last differences of each sample's forces, and what they say of the moves, (B, memory, n) each, in
    a ring."""

    def __init__(self, memory: int, step: float, linear: bool = False):
        self.memory, self.plain, self.length, self.slot, self.fallbacks = memory, step, 0, 0, 0
        self.patience = 0 if linear else 2 + math.ceil(1 / step)  # iterations without memory, at most
        self.last: tuple[Tensor, Tensor] | None = None

    def next(self, state: Tensor, push: Tensor, residual: Tensor, best: Tensor) -> Tensor:
        """Takes in one iterate (B, n) and its force; returns the next: z + step f - sum_i gamma_i (dz_i + step df_i), gamma
        minimising |f - sum_i gamma_i df_i|. Far from the fixed point of a force that is not linear there is no memory. A sample
        that stalls goes back to its best state and on without memory, its step halved each time."""
        if self.last is None:
            self.pushes, self.moves = (push.new_empty(push.shape[0], self.memory, push.shape[1]) for _ in range(2))
            self.gram = push.new_zeros(push.shape[0], self.memory, self.memory, dtype=torch.float64)
            self.halvings, self.waits = (torch.zeros_like(residual, dtype=torch.int) for _ in range(2))
            self.lowest = residual
        else:
            df = torch.sub(push, self.last[1], out=self.pushes[:, self.slot])
            torch.sub(state, self.last[0], out=self.moves[:, self.slot]).add_(df, alpha=self.plain)
            self.length = min(self.length + 1, self.memory)
            self.gram[:, self.slot, :self.length] = self.gram[:, :self.length, self.slot] = self._along(df)
            self.slot = (self.slot + 1) % self.memory
        self.last = state, push
        if self.patience:
            far = (norm(push) > norm(state)) & (self.waits < self.patience)
            self.waits = self.waits + far
            for kept in (self.pushes, self.moves, self.gram) if far.any() else ():
                kept[far] = 0
        stalled = residual > STALL * self.lowest
        self.lowest = torch.minimum(self.lowest, residual)
        self.fallbacks += int((stalled & (self.halvings == 0)).sum())
        self.halvings = self.halvings + stalled
        step = torch.ldexp(torch.full_like(self.lowest, self.plain), -self.halvings)
        moved = torch.addcmul(state, push, step.unsqueeze(1))
        if self.length:
            moved = torch.baddbmm(moved.unsqueeze(1), self._weights(push).unsqueeze(1), self.moves[:, :self.length],
                                  alpha=-1).squeeze(1)
        return torch.where(stalled.unsqueeze(1), best, moved) if stalled.any() else moved

    def keep(self, samples: Tensor) -> None:
        """Goes on with these samples only."""
        if self.last:
            self.last = self.last[0][samples], self.last[1][samples]
        for name in ("pushes", "moves", "gram", "halvings", "waits", "lowest"):
            setattr(self, name, getattr(self, name)[samples])

    def _along(self, a: Tensor) -> Tensor:
        """<df_i, a> of the differences, (B, length)."""
        return (a.unsqueeze(1) @ self.pushes[:, :self.length].mT).squeeze(1).double()  # a row times columns: the fast order

    def _weights(self, push: Tensor) -> Tensor:
        """gamma (B, length), by the normal equations in units of each difference: they shrink."""
        gram = self.gram[:, :self.length, :self.length]
        unit = gram.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()  # (B, length)
        damping = torch.finfo(push.dtype).eps ** DAMPING * torch.eye(self.length, dtype=gram.dtype, device=gram.device)
        scaled = gram * unit.unsqueeze(1) * unit.unsqueeze(2) + damping
        gamma = torch.linalg.solve_ex(scaled, (self._along(push) * unit).unsqueeze(-1))[0].squeeze(-1) * unit
        return torch.where((self.halvings > 0).unsqueeze(1) | ~gamma.isfinite(), 0, gamma).to(push.dtype)
