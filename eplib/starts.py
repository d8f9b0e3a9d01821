"""Where the free phase starts."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .config import configuration

RIDGE = 1e-6  # of the normal equations, in units of their mean diagonal


@configuration
class LinearStart:
    """z_0 = A (x, 1): the fixed point as a linear function of the clamp, fitted every `refresh` gradients to the last batch
    that did not diverge.

    A (C + 1, C), by ridge regression over all tokens, is carried in the report's state. It changes where the phase starts,
    never where it ends: the solver's residual is what it was. Only for states of the shape of the clamp.
    """

    refresh: Annotated[int, Field(ge=1)] = 10

    def __call__(self, x: Tensor, carried: dict[str, Tensor]) -> Tensor | None:
        """The start state for the clamp x (B, T, C), or None before anything was fitted."""
        if "start" not in carried or carried["start"].shape[-1] != x.shape[-1]:
            return None
        return torch.addmm(carried["start"][-1], x.flatten(0, -2), carried["start"][:-1]).view_as(x)

    def learn(self, x: Tensor, z: Tensor, carried: dict[str, Tensor]) -> None:
        """Takes a settled batch in, if the last fit is `refresh` batches old."""
        age = int(carried.get("start_age", 0))
        carried["start_age"] = torch.tensor((age + 1) % self.refresh)
        if age:
            return
        rows = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, -2)
        gram, mixed = (rows.mT @ rows).double(), (rows.mT @ z.flatten(0, -2)).double()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        carried["start"] = torch.linalg.solve(gram, mixed).to(z.dtype)
