"""A model and a batch: what a gradient is asked of."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..dynamics import Dynamics
from ..models import Model
from ..parallel import Part
from ..solvers import Solution, Solver
from ..starts import LinearStart
from .entry import first_state
from .problem import Problem
from .whole import agreed


@dataclass
class Batch:
    """dynamics: what computes the block. part: which part of a larger batch it is. start: where the free phase starts, or how
    that is predicted, by default at the block's own. carried: what the last call left, which may be changed."""

    model: Model
    inputs: Tensor
    targets: Tensor
    dynamics: Dynamics
    part: Part
    start: Tensor | LinearStart | None = None
    carried: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def x(self) -> Tensor:
        """What clamps the block, (B, ...), without a graph."""
        with torch.no_grad():
            return self.model.clamp(self.inputs)

    def settle(self, solver: Solver) -> Solution:
        """The free phase."""
        with torch.no_grad():
            first = first_state(self.start, self.model.block, self.x, self.carried)
            free = agreed(solver.settle(self.dynamics, self.x, first, self.part), self.part)
            if isinstance(self.start, LinearStart) and free.status.usable:
                self.start.learn(self.x, free.value, self.carried, self.part)
        return free

    def at(self, state: Tensor) -> Problem:
        """The batch at a state: one and the same problem while asked for one tensor, so that what it computes is shared."""
        known: Problem | None = vars(self).get("_at")
        if known is None or known.state is not state:
            known = self._at = Problem(self.model, self.inputs, self.targets, self.x, state, self.carried, self.dynamics,
                                             self.part)
        return known
