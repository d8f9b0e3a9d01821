"""Updates as a crossbar of imperfect devices takes them in."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..config import configuration
from .base import Fraction, Optimiser

Bits = Annotated[int, Field(ge=2, le=16)]
PRIME = 1_000_003  # draws of (step, parameter) do not meet


def span(a: Tensor) -> Tensor:
    """The range r of a tensor: the power of two at or above its largest entry, 0 of zeros."""
    largest = a.abs().max()
    return torch.where(largest > 0, torch.exp2(largest.log2().ceil()), 0.0)


def quantised(a: Tensor, bits: int, draw: Tensor | None = None) -> Tensor:
    """a rounded to 2^bits - 1 levels in [-r, r], r its `span`: to the nearest, or up or down by numbers uniform in [0, 1) such
    that the mean is a."""
    step = (span(a) / (2 ** (bits - 1) - 1)).clamp_min(torch.finfo(a.dtype).tiny)
    levels = a / step
    return step * (levels.round() if draw is None else (levels + draw).floor())


@configuration
class Device(Optimiser):
    """AdamW whose updates go to matrices stored in analog devices; vectors (biases, gains) are stored digitally.

    An update d of a weight w in [-r, r] (`span` of its matrix) is rounded to `update_bits`, scaled by 1 + asymmetry if it is
    positive and by 1 - asymmetry if not, and by 1 - saturation sign(d) w / r, so that devices near their bound take up less of
    what leads to it; the new weight is rounded to `weight_bits`. rounding: of both. An evaluated average of weights (`ema`)
    would have more bits than the devices, so it is refused.
    """

    weight_bits: Bits | None = None
    update_bits: Bits | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    asymmetry: Fraction = 0.0
    saturation: Fraction = 0.0

    @model_validator(mode="after")
    def _does_something(self) -> "Device":
        rounded = self.weight_bits or self.update_bits
        if not (rounded or self.asymmetry or self.saturation):
            raise ValueError("a Device without bits, asymmetry or saturation would do nothing; leave its kind out")
        if self.rounding == "stochastic" and not rounded:
            raise ValueError("rounding stochastic rounds nothing; give weight_bits or update_bits")
        if self.ema:
            raise ValueError(f"ema {self.ema} evaluates an average that the devices do not hold; give ema: 0")
        return self

    def build(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return _Written(parameters, self)

    def written(self, old: Tensor, update: Tensor, draws: torch.Generator) -> Tensor:
        """What the devices hold after an update of the weights `old`."""
        def rounded(a: Tensor, bits: int | None) -> Tensor:
            if bits is None:
                return a
            return quantised(a, bits, torch.rand(a.shape, generator=draws).to(a) if self.rounding == "stochastic" else None)

        update = rounded(update, self.update_bits)
        sign = update.sign()
        full = (old / span(old).clamp_min(torch.finfo(old.dtype).tiny)).clamp(-1, 1)
        return rounded(old + update * (1 + self.asymmetry * sign) * (1 - self.saturation * sign * full), self.weight_bits)


class _Written(torch.optim.AdamW):
    """AdamW, and what becomes of its updates. The draws are a function of a parameter's place and number of updates, so that a
    run that goes on is the run that was not stopped."""

    def __init__(self, parameters: Iterable[Tensor], rule: Device):
        super().__init__(parameters, **rule.settings)
        self.rule = rule

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        matrices = [(index, value) for group in self.param_groups for index, value in enumerate(group["params"])
                    if value.grad is not None and value.dim() > 1]
        before = [value.clone() for _, value in matrices]
        loss = super().step(closure)
        for (index, value), old in zip(matrices, before, strict=True):
            draws = torch.Generator().manual_seed(PRIME * int(self.state[value]["step"]) + index)
            value.copy_(self.rule.written(old, value - old, draws))
        return loss
