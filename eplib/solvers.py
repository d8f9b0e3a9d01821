"""Solvers that take a force to its fixed point, per sample.

A solver knows the force only as a function of the state (B, ...), real or complex. Samples never influence each other: each
stops, diverges or runs on by its own residual, so a permuted batch gives permuted results. Free, nudged and adjoint phases
take any of them:

    Relaxation     explicit Euler to a residual; the lowest-residual iterate
    Anderson       the same fixed point in fewer evaluations, falling back to Euler where it stalls
    FixedHorizon   exactly so many Euler steps, the last iterate: the state of a finite-horizon objective
    MixedPrecision Anderson whose first evaluations are in bfloat16
    Substitution   Anderson on a few tokens at a time, in the order in which a causal block's tokens depend on each other
    Snapshot       Euler through the whole horizon, the most settled iterate in hindsight
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration
from .dynamics import InKernel, LinearInKernel
from .families import Family

GROWTH = 1e3  # a state or residual this many times its scale has diverged
DAMPING = 0.75  # of the normal equations, as a power of the float spacing
STALL = 10.0  # an accelerated sample whose residual is this many times its lowest falls back to plain relaxation


class Status(Enum):
    """How a phase ended, for the worst sample of the batch."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    NONFINITE = "nonfinite"

    @property
    def usable(self) -> bool:
        """Whether a gradient may be read from the phase (its residual says how good it is)."""
        return self in (Status.CONVERGED, Status.MAX_STEPS)


@dataclass(frozen=True)
class Solution:
    """End of a phase: the lowest-residual iterate of each sample (of `FixedHorizon`, the last).

    value (B, ...); residual (B,) in the units of the solver's measure (||F|| / ||z|| unless said otherwise); steps (B,) taken
    by each sample; rate (B,) the last measured ratio of successive residuals (`rate_tail`); evaluations: force evaluations
    of the whole batch; status of the worst sample; fallbacks: samples on which an acceleration was given up.
    """

    value: Tensor
    residual: Tensor
    steps: Tensor
    rate: Tensor
    evaluations: int
    status: Status
    fallbacks: int = 0


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of each sample: (B, ...) -> (B,)."""
    return a.flatten(1).norm(dim=1)


def relative_force(force: Tensor, state: Tensor) -> Tensor:
    """The residual ||F(z)|| / ||z|| of each sample, not multiplied by a step: (B,). Of a state at zero it is finite still, and
    zero only where the force is."""
    size, push = norm(state), norm(force)
    limits = torch.finfo(state.dtype)
    return push / torch.maximum(size, limits.eps * push).clamp_min(limits.tiny)


def refuse_rounding(a: Tensor) -> None:
    """Raises ValueError where numbers are rounded to half precision: a residual of 1e-4 and the difference of two nudged
    states are below it."""
    if a.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"a phase does not settle in {a.dtype}, got weights or states of it; call model.float(), and for "
                         "speed take solvers.MixedPrecision")
    if torch.is_autocast_enabled(a.device.type):
        raise ValueError(f"torch.autocast is active and would round every force to {torch.get_autocast_dtype(a.device.type)}; "
                         "leave it, and for speed take solvers.MixedPrecision")


Step = Annotated[float, Field(gt=0, le=2)]
Count = Annotated[int, Field(ge=1)]
Tolerance = Annotated[float, Field(ge=0)]


class _Samples:
    """What a solve knows of each sample of its batch: states (B, ...), all else (B,)."""

    def __init__(self, start: Tensor):
        size = norm(start)
        self.state = self.best = start
        self.bound = GROWTH * size.clamp_min(start[0].numel() ** 0.5)
        self.lowest = torch.full_like(size, torch.inf)
        self.first = self.residual = self.rate = torch.full_like(size, torch.nan)
        self.steps = torch.zeros_like(size, dtype=torch.long)
        self.active = torch.ones_like(size, dtype=torch.bool)
        self.exploded = self.broken = ~self.active

    def take(self, samples: Tensor) -> "_Samples":
        """Of these samples only."""
        return self._each(lambda name: getattr(self, name)[samples])

    def updated(self, samples: Tensor, part: "_Samples") -> "_Samples":
        """With these samples as `part` has them."""
        return self._each(lambda name: getattr(self, name).index_copy(0, samples, getattr(part, name)))

    def _each(self, value: Callable[[str], Tensor]) -> "_Samples":
        other = copy(self)
        vars(other).update({name: value(name) for name in vars(self)})
        return other


class Solver(Family):
    """What the solvers share: the loop, per-sample stopping, and the detection of divergence."""

    in_kernel = False  # whether the compiled kernel has this solver's loop
    latest = False  # whether the last iterate is returned instead of the lowest-residual one
    hindsight = False  # whether an explosion after the best iterate is forgiven
    coarse: float | None = None  # residual down to which a free or adjoint phase is iterated in bfloat16

    if TYPE_CHECKING:  # what a solver has as a field, or fixed

        @property
        def step(self) -> float: ...

        @property
        def max_steps(self) -> int: ...

        @property
        def tol(self) -> float: ...

    def limited(self, steps: int) -> "Solver":
        """This solver with a horizon of `steps`."""
        return replace(cast(Any, self), max_steps=steps)

    def _move(self, state: Tensor, push: Tensor, residual: Tensor, best: Tensor, history: Any) -> Tensor:
        return state + self.step * push

    def _history(self, linear: bool) -> Any:
        return None

    def _refuse_kernel(self, computed: Any) -> None:
        if self.coarse is not None and isinstance(computed, InKernel | LinearInKernel):
            raise ValueError(f"{self.kind} rounds PyTorch's evaluations and would do nothing to the compiled kernel's; use "
                             "solvers.Anderson, or backend=\"torch\"")

    @torch.no_grad()
    def settle(self, block: Any, x: Tensor, start: Tensor | None = None) -> Solution:
        """The free phase of a block under the clamp x, from `start` (by default the block's)."""
        refuse_rounding(x)
        start = block.start(x) if start is None else start
        if self.in_kernel and isinstance(block, InKernel):
            return block.relax(self, x, start)
        self._refuse_kernel(block)

        def among(samples: Tensor) -> Callable[[Tensor], Tensor]:
            some = x[samples]
            return lambda z: block(z, some)

        return self.solve(lambda z: block(z, x), start, rough=self.coarse is not None, among=among)

    @torch.no_grad()
    def adjoint(self, jacobian: Any, slope: Tensor, scale: Tensor) -> Solution:
        """The adjoint state of J^T a = -slope, (B, ...), from a = slope, which it is for J = -1; residuals relative to scale
        (B,)."""
        refuse_rounding(slope)
        if self.in_kernel and isinstance(jacobian, LinearInKernel):
            return jacobian.relax(self, slope, scale)
        self._refuse_kernel(jacobian)
        return self.solve(lambda a: jacobian.transposed(a) + slope, slope, lambda push, _: norm(push) / scale,
                          rough=self.coarse is not None, linear=True)

    @torch.no_grad()
    def solve(self, force: Callable[[Tensor], Tensor], start: Tensor,
              measure: Callable[[Tensor, Tensor], Tensor] = relative_force, rough: bool = False,
              among: Callable[[Tensor], Callable[[Tensor], Tensor]] | None = None, linear: bool = False) -> Solution:
        """Takes `force` from `start` (B, ...) to its zero without storing a graph; `measure(force, state)` gives the residual
        (B,). rough: whether the first evaluations may be in bfloat16, down to `coarse`; no sample ends with one of those.
        linear: whether the force is linear but for a constant, so that differences tell its slope at any distance.

        A sample whose state norm or residual grows a thousandfold is frozen as diverged: an explosion otherwise looks
        converged once step * F falls below the float spacing of z. A non-finite residual freezes the sample as well.
        among(samples): the force of these samples alone, where there is one: the others leave the batch once half of it has
        ended, so that it is not computed for the slowest sample's sake.
        """
        refuse_rounding(start)
        if self.coarse is not None and start.dtype not in (torch.float32, torch.complex64):
            raise ValueError(f"{self.kind} is for float32 states and would do nothing to {start.dtype}; use solvers.Anderson")
        whole = now = _Samples(start)
        lanes = (-1,) + (1,) * (start.dim() - 1)
        left = None  # which samples are left, where some have gone
        history, evaluated = self._history(linear), 0
        for count in range(self.max_steps + 1):
            if rough and (count == self.max_steps or now.residual.nanmedian() <= (self.coarse or 0)):
                rough = False
                now.lowest = torch.full_like(now.lowest, torch.inf)  # until here it was that of a rounded force
            with torch.autocast(start.device.type, torch.bfloat16) if rough else nullcontext():
                push = force(now.state).to(start.dtype)
            residual = measure(push, now.state)
            evaluated += len(residual)
            now.first = residual if count == 0 else now.first
            now.rate = torch.where(now.active & (now.residual > 0), residual / now.residual, now.rate)
            now.residual = torch.where(now.active, residual, now.residual)
            improved = now.active & ((residual < now.lowest) | self.latest)
            now.best = now.state if improved.all() else torch.where(improved.view(lanes), now.state, now.best)
            now.lowest = torch.where(improved, residual, now.lowest)
            now.broken = now.broken | (now.active & ~residual.isfinite())
            now.exploded = now.exploded | (now.active & (
                (norm(now.state) > now.bound) | (residual > GROWTH * now.first.clamp_min(1))))
            now.active = now.active & ((residual > self.tol) | rough) & ~now.broken & ~now.exploded
            going = int(now.active.sum())
            if count == self.max_steps or not going:
                break
            now.steps = now.steps + now.active
            moved = self._move(now.state, push, residual, now.best, history)
            now.state = moved if going == len(residual) else torch.where(now.active.view(lanes), moved, now.state)
            if among and 2 * going <= len(residual):
                whole = now if left is None else whole.updated(left, now)
                some = now.active.nonzero().squeeze(1)
                left = some if left is None else left[some]
                now, force = now.take(some), among(left)
                if history:
                    history.keep(some)
        end = now if left is None else whole.updated(left, now)
        exploded, broken = end.exploded, end.broken
        if self.hindsight:  # what came after the most settled iterate does not count, if there was one
            exploded, broken = exploded & ~(end.lowest < end.first), broken & ~(end.lowest < end.first)
        if broken.any():
            status = Status.NONFINITE
        elif exploded.any():
            status = Status.DIVERGED
        else:
            status = Status.MAX_STEPS if (end.lowest > self.tol).any() else Status.CONVERGED
        best = end.best
        if status is Status.CONVERGED:
            best = end.state  # the same numbers, and the very tensor of the last evaluation, whose passes may be kept
        return Solution(best, end.lowest, end.steps, end.rate, math.ceil(evaluated / len(start)), status,
                        0 if history is None else history.fallbacks)


@configuration
class Relaxation(Solver):
    """Damped fixed-point iteration z <- z + step * F(z) (explicit Euler).

    step: Euler step. max_steps: most steps of a sample. tol: residual at which a sample stops and is frozen.
    """

    step: Step = 0.5
    max_steps: Count = 64
    tol: Tolerance = 1e-4

    in_kernel = True


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

    def _history(self, linear: bool) -> "Differences":
        return Differences(self.memory, self.step, linear)

    def _move(self, state: Tensor, push: Tensor, residual: Tensor, best: Tensor, history: "Differences") -> Tensor:
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

    in_kernel = False


@configuration
class FixedHorizon(Solver):
    """Exactly `steps` Euler steps for every sample, no early stop; the last iterate, settled or not. Zero steps evaluate the
    start state, the solver removed."""

    step: Step = 0.5
    steps: Annotated[int, Field(ge=0)] = 64

    tol, latest = 0.0, True

    @property
    def max_steps(self) -> int:
        return self.steps

    def limited(self, steps: int) -> "FixedHorizon":
        return replace(self, steps=steps)


@configuration
class Snapshot(Solver):
    """Euler through all `max_steps`, and the most settled iterate in hindsight (002, "adaptive T2 by hindsight snapshot
    selection").

    In a nudged phase the residual is that of the contrast, which is its increment over the step, not the size of a step. A
    sample that explodes later keeps its snapshot; one that never settled below its first residual has diverged.
    """

    step: Step = 0.5
    max_steps: Count = 64

    tol, hindsight = 0.0, True


@configuration
class Substitution(Anderson):
    """Substitution by tokens, `chunk` of them at a time: each chunk is settled by Anderson with those before it held.

    In a causal block F_t depends on z_1 .. z_t only, so J is block lower-triangular over tokens: the free phase solves by
    forward substitution, J^T by backward substitution. The tolerance holds for every chunk, so it holds for the sample. `steps`
    and `evaluations` count force evaluations of the whole sequence. A phase without that order, of a block that is not causal
    or of nudged trajectories, is one chunk. By default a chunk is what suits the backend: 2 tokens in the compiled kernel; the
    whole sequence in PyTorch, where a chunk costs nearly as much as everything (E7).
    """

    chunk: Count | None = None

    @torch.no_grad()
    def settle(self, block: Any, x: Tensor, start: Tensor | None = None) -> Solution:
        start = block.start(x) if start is None else start
        past, parts = None if isinstance(block, InKernel) else block.prefix(), []
        if past is None or self.chunk is None:
            return super().settle(block, x, start)

        def force(drive: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda z: past.force(z, drive)

        for z, drive in zip(start.split(self.chunk, -2), x.split(self.chunk, -2), strict=True):
            parts.append(self.solve(force(drive), z))
            past.extend(parts[-1].value)
        return self._joined(parts)

    @staticmethod
    def _joined(parts: list[Solution]) -> Solution:
        """The solution of a sequence from those of its chunks (B, n, C), in order."""
        squares = torch.stack([(part.residual * norm(part.value)).square() for part in parts]).sum(0)
        value = torch.cat([part.value for part in parts], -2)
        share = [part.value.shape[-2] / value.shape[-2] for part in parts]
        steps = torch.stack([part.steps * s for part, s in zip(parts, share, strict=True)]).sum(0).ceil().long()
        evaluations = math.ceil(sum(part.evaluations * s for part, s in zip(parts, share, strict=True)))
        return Solution(value, squares.sqrt() / norm(value), steps, torch.stack([part.rate for part in parts]).amax(0),
                        evaluations, max((part.status for part in parts), key=list(Status).index),
                        sum(part.fallbacks for part in parts))


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
