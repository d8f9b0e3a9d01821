"""How a phase ended, and in what its residual is counted."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


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


def worst(statuses: Iterable[Status]) -> Status:
    """The last of them in the order of `Status`."""
    return max(statuses, key=list(Status).index)


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
