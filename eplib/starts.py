"""Where the free phase starts."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration
from .parallel import ALONE, Part

RIDGE = 1e-6  # of the normal equations, in units of their mean diagonal


@configuration
class LinearStart:
    """z_0 = A (x, 1): the fixed point as a linear function of the clamp, fitted every `refresh` gradients to the last batch
    that did not diverge.

    A (C + 1, C), by ridge regression over all tokens, is carried in the report's state. It changes where the phase starts,
    never where it ends: the solver's residual is what it was. Only for states of the shape of the clamp. cold: share of the
    gradients whose phase starts at the block's own state all the same, so that training sees what evaluation settles from
    (path independence: Anil et al. 2022).
    """

    refresh: Annotated[int, Field(ge=1)] = 10
    cold: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __call__(self, x: Tensor, carried: dict[str, Tensor]) -> Tensor | None:
        """The start state for the clamp x (B, T, C), or None before anything was fitted."""
        if "start" not in carried or carried["start"].shape[-1] != x.shape[-1]:
            return None
        return torch.addmm(carried["start"][-1], x.flatten(0, -2), carried["start"][:-1]).view_as(x)

    def next(self, x: Tensor, carried: dict[str, Tensor]) -> Tensor | None:
        """The start state of the next gradient, whose turn is counted: None as well where it starts cold."""
        if self.cold:
            turn = int(carried.get("start_turn", 0))
            carried["start_turn"] = torch.tensor(turn + 1)
            if int((turn + 1) * self.cold) > int(turn * self.cold):  # evenly, with no draw
                return None
        return self(x, carried)

    def learn(self, x: Tensor, z: Tensor, carried: dict[str, Tensor], part: Part = ALONE) -> None:
        """Takes a settled batch in, of which this is a part, if the last fit is `refresh` batches old."""
        age = int(carried.get("start_age", 0))
        carried["start_age"] = torch.tensor((age + 1) % self.refresh)
        if age:
            return
        rows = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, -2)
        gram, mixed = part.total((rows.mT @ rows).double(), (rows.mT @ z.flatten(0, -2)).double())
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        carried["start"] = torch.linalg.solve(gram, mixed).to(z.dtype)
