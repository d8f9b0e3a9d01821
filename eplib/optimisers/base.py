"""The family of update rules, and AdamW."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..config import configuration
from ..families import Family

Fraction = Annotated[float, Field(ge=0, le=1)]


class UpdateRule(Family, default="Optimiser"):
    """How gradients become updates. One of your own is a `@configuration` that inherits from `Optimiser`, its schedule and its
    clipping, and overrides `build`."""

    by_sample = True  # it sees the gradient of the whole batch


@configuration
class Optimiser(UpdateRule):
    """AdamW under a warm-up, stable, decay (WSD) schedule.

    lr: peak rate. warmup: share of the steps that rise linearly to it. decay: share at the end that falls linearly to zero,
    which the update after the last would have. clip: largest gradient norm. clipping: what the clip cuts, the sum of the task's
    and the penalties' gradients ("together"), or the task's alone ("apart"); then the penalties' is cut to the norm that the
    task's has after that, or to the clip where there is none of the task, so that neither drowns the other. ema: decay per step
    of the parameter average that is evaluated, less in the first steps, (1 + step) / (10 + step) at step 0, 1 ..; 0 evaluates
    the weights.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-3
    warmup: Fraction = 0.05
    decay: Fraction = 0.25
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    clipping: Literal["together", "apart"] = "together"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> "Optimiser":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} overlap: the peak rate would not be reached; "
                             "give shares that sum to at most 1")
        return self

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update `step` (from 0) of `steps`."""
        rise = (step + 1) / max(1.0, self.warmup * steps)
        fall = (steps - step) / max(1.0, self.decay * steps)
        return self.lr * min(1.0, rise, fall)

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """What takes the updates, at the peak rate: the trainer sets the rate of each."""
        return torch.optim.AdamW(parameters, **self.settings)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of AdamW."""
        return {"lr": self.lr, "betas": (0.9, 0.95), "weight_decay": self.weight_decay}
