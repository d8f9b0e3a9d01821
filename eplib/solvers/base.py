"""What a solver is."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import core_schema
from torch import Tensor

from ..dynamics import InKernel, LinearInKernel, projection
from ..families import Family
from ..parallel import Part
from .loop import Force, Loop, Measure
from .solution import Solution, norm, refuse_rounding, relative_force

Step = Annotated[float, Field(gt=0, le=2)]
Count = Annotated[int, Field(ge=1)]
Tolerance = Annotated[float, Field(ge=0)]
LOOP = ("next", "history", "solve", "latest", "hindsight", "coarse")  # what the kernel's loops have of their own


class Solver(Family):
    """A family: one of your own says how it moves (`next`), or how it settles a force (`solve`).

    A member has `step`, `max_steps` and `tol`, as fields or fixed, of its own or by inheriting from `Relaxation`; TypeError
    names one that it lacks. The compiled kernel's loops know nothing of what a subclass overrides: its phases are solved by
    `solve`, unless it says `in_kernel` itself.
    """

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

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        said = next(one for one in cls.__mro__ if "in_kernel" in vars(one))
        if any(getattr(cls, name) is not getattr(said, name, None) for name in LOOP):
            cls.in_kernel = False

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        fields = vars(cls).get("__dataclass_fields__")
        if fields is not None:
            missing = [name for name in ("step", "max_steps", "tol") if name not in fields and not hasattr(cls, name)]
            if missing:
                raise TypeError(f"{cls.__qualname__} is a Solver without {', '.join(missing)}; a solver has step, max_steps "
                                "and tol: declare each as a field (tol: float = 1e-4), or inherit from solvers.Relaxation")
        return super().__get_pydantic_core_schema__(source, handler)

    def limited(self, steps: int) -> "Solver":
        """This solver with a horizon of `steps`."""
        return replace(cast(Any, self), max_steps=steps)

    def next(self, state: Tensor, push: Tensor, residual: Tensor, best: Tensor, history: Any) -> Tensor:
        """The next states (B, ...) from these, their forces and residuals (B,), the best so far, and what `history` made."""
        return state + self.step * push

    def history(self, linear: bool) -> Any:
        """What one solve remembers; it has `fallbacks` and `keep(samples)`."""
        return None

    def _refuse_kernel(self, computed: Any) -> None:
        if self.coarse is not None and isinstance(computed, InKernel | LinearInKernel):
            raise ValueError(f"{self.kind} rounds PyTorch's evaluations and would do nothing to the compiled kernel's; use "
                             "solvers.Anderson, or backend=\"torch\"")

    @torch.no_grad()
    def settle(self, block: Any, x: Tensor, start: Tensor | None = None, part: Part | None = None) -> Solution:
        """The free phase of a block under the clamp x, from `start` (by default the block's). part: which part of a larger
        batch it is, by default all of it."""
        refuse_rounding(x)
        start = block.start(x) if start is None else start
        if self.in_kernel and isinstance(block, InKernel):
            return block.relax(self, x, start)
        self._refuse_kernel(block)

        def among(samples: Tensor) -> Callable[[Tensor], Tensor]:
            some = x[samples]
            return lambda z: block(z, some)

        return self.solve(lambda z: block(z, x), start, rough=self._rough(x, part), among=among, project=projection(block))

    @torch.no_grad()
    def adjoint(self, jacobian: Any, slope: Tensor, scale: Tensor, part: Part | None = None) -> Solution:
        """The adjoint state of J^T a = -slope, (B, ...), from a = slope, which it is for J = -1; residuals relative to scale
        (B,). part: as of `settle`."""
        refuse_rounding(slope)
        if self.in_kernel and isinstance(jacobian, LinearInKernel):
            return jacobian.relax(self, slope, scale)
        self._refuse_kernel(jacobian)
        return self.solve(lambda a: jacobian.transposed(a) + slope, slope, lambda push, _: norm(push) / scale,
                          rough=self._rough(slope, part), linear=True)

    def _rough(self, batch: Tensor, part: Part | None) -> Part | None:
        return (part or Part.alone(len(batch))) if self.coarse is not None else None

    @torch.no_grad()
    def solve(self, force: Force, start: Tensor, measure: Measure = relative_force, rough: Part | None = None,
              linear: bool = False, among: Callable[[Tensor], Force] | None = None,
              project: Callable[[Tensor], Tensor] | None = None) -> Solution:
        """Takes `force` from `start` (B, ...) to its zero without storing a graph; `measure(force, state)` gives the residual
        (B,). rough: where the first evaluations may be in bfloat16, until half of the batch of which this is that part has a
        residual of at most `coarse`; no sample ends with one of those. linear: whether the force is linear but for a constant,
        so that differences tell its slope at any distance.

        A sample whose state norm or residual grows a thousandfold is frozen as diverged: an explosion otherwise looks
        converged once step * F falls below the float spacing of z. A non-finite residual freezes the sample as well.
        among(samples): the force of these samples alone, where there is one: the others leave the batch once half of it has
        ended, so that it is not computed for the slowest sample's sake. project: what holds a state in its set, put to the
        start and to every state that a step leads to; the force is to be zero at the fixed points that this leaves.
        """
        refuse_rounding(start)
        if self.coarse is not None and start.dtype not in (torch.float32, torch.complex64):
            raise ValueError(f"{self.kind} is for float32 states and would do nothing to {start.dtype}; use solvers.Anderson")
        return Loop(self, force, start, measure, rough, linear, among, project).run()
