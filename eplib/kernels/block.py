"""The block's force and its phases, by the kernel."""

from typing import Any

import torch
from torch import Tensor

from ..blocks import Dynamical, EquilibriumBlock
from ..calculus import Sublayers, matrix, writes
from ..dynamics import projection
from ..intact import bare
from ..solvers import Solution, Solver
from .compile import KernelError, library
from .jacobian import CompiledJacobian
from .storage import OUTCOME, Held, Storage, plain, pointer, settings, shared, solution

MULTIPLE, HEAD = 16, 4  # of which the width, and the width of a head, are multiples


def unknown(block: Any) -> str | None:
    """Why the kernel does not compute a block, in words; None if it does."""
    if not isinstance(block, EquilibriumBlock):
        return "it knows blocks.Thick, blocks.Attractor, and blocks.LinearAttention, asymmetric"
    if reason := block.altered():
        return reason
    if type(block).start is not Dynamical.start or "start" in vars(block):
        return "it has its own start"
    if projection(block):
        return "it holds its states in a set, by `project`"
    layers = block.layers
    hidden, width = layers.w1.weight.shape
    if width % MULTIPLE or hidden % MULTIPLE or width // layers.heads % HEAD:
        return f"width and hidden units are to be a multiple of {MULTIPLE}, the width of each head of {HEAD}; they are " \
               f"{width}, {hidden} and {width // layers.heads}"
    return None


def knows(block: Any, width: int, heads: int) -> bool:
    """Whether the kernel computes the block of this configuration, not of one derived from it, at this width and number of
    heads."""
    known = block.kind in ("Thick", "Attractor") or (
        block.kind == "LinearAttention" and not block.symmetric)  # names that only eplib's own have
    return known and width % MULTIPLE == 0 and width // heads % HEAD == 0


def weights_of(layers: Sublayers) -> list[Tensor]:
    """What the kernel packs, in its order."""
    weights = [matrix(getattr(layers, name)) for name in ("qkv", "wo", "w1", "w2")]
    weights += [value for norm in (layers.ln1, layers.ln2) for value in (norm.weight, norm.bias)]
    return weights


class CompiledBlock:
    """An `EquilibriumBlock` at its present weights, computed by the kernel; graphs are not recorded.

    It has the block's interface: force, `start`, `linearise`, and `relax` for a whole phase. Raises `KernelError` for a
    block that the kernel does not know, and once the weights are others than those that it was made of.
    """

    def __init__(self, block: Dynamical):
        self.block: EquilibriumBlock = bare(block)
        if reason := unknown(self.block):
            raise KernelError(f"the compiled kernel does not compute this {type(self.block).__name__}: {reason}. Use "
                              "backend=\"torch\"")
        # last free state, with what J is made of, F and the clamp there; not J itself, which holds this block: a cycle would
        # keep the storage until Python looks for cycles, and every step would take new memory
        self.settled: tuple[Held, Storage, Tensor, Held] | None = None
        layers = self.block.layers
        self.library, self.width, self.hidden = library(), layers.width, layers.w1.out_features
        self.held = self.block.weights()  # so that no other tensor takes their place in memory
        self.written = writes(self.held)
        weights = [plain(value.detach()) for value in weights_of(layers)]
        self.decay = plain((self.block.state_decay + torch.zeros(self.width)).detach())
        self.packed = torch.empty(self.library.eplib_packed(self.width, self.hidden))
        self.library.eplib_pack(self.width, self.hidden, *map(pointer, weights), pointer(self.packed))

    def check(self, *states: Tensor) -> None:
        """Raises `KernelError` where the weights are others than those that were packed, or states do not fit them."""
        if writes(self.block.weights()) != self.written:
            raise KernelError("the block's weights have changed since the kernel took them; ask for the model's dynamics again")
        for z in states:
            if z.dim() < 2 or z.shape[-1] != self.width or z.shape[-2:] != states[0].shape[-2:]:
                raise KernelError(f"states and clamps are to be (..., T, {self.width}), got "
                                  f"{', '.join(str(tuple(one.shape)) for one in states)}")

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.check(z, x)
        if self.settled and self.settled[0].holds(z) and self.settled[3].holds(x):
            return self.settled[2].view_as(z)
        return self._evaluate(z, x, linearise=False)[0]

    def force_and_jacobian(self, z: Tensor, x: Tensor) -> tuple[Tensor, "CompiledJacobian"]:
        """F and J at a state, in one pass."""
        self.check(z, x)
        push, cache = self._evaluate(z, x, linearise=True)
        return push, CompiledJacobian(self, cache, z)

    def linearise(self, z: Tensor, x: Tensor) -> "CompiledJacobian":
        if self.settled and self.settled[0].holds(z):
            self.check()
            return CompiledJacobian(self, self.settled[1], z)
        return self.force_and_jacobian(z, x)[1]

    def start(self, x: Tensor) -> Tensor:
        return self.block.start(x)

    def relax(self, solver: Solver, x: Tensor, start: Tensor, scale: Tensor | None = None) -> Solution:
        """A phase under the clamp x by the solver's method, in the kernel's own loop; residuals count in units of ||z||, or of
        scale (N,). Without a scale it is the free phase, whose J and F are then at hand."""
        self.check(start, x)
        if start.shape != x.shape or x.dim() != 3:
            raise KernelError(f"the start {tuple(start.shape)} and the clamp {tuple(x.shape)} are to be (B, T, {self.width})")
        z, x, outcome = plain(start).clone(), plain(x), torch.zeros(x.shape[0], OUTCOME, dtype=torch.int32)
        cache, rest = Storage(self, z), torch.empty_like(z)
        self.library.eplib_settle(cache.shape, pointer(self.packed), cache.pointers, settings(solver, z), z.shape[0],
                                  pointer(x), pointer(None if scale is None else plain(scale)), pointer(z),
                                  pointer(rest), pointer(outcome), torch.get_num_threads())
        found = solution(z, outcome, z.flatten(1).norm(dim=1) if scale is None else scale, solver)
        if scale is None and found.status.usable:  # of a sample that diverged the tokens after it were not computed
            self.settled = Held(z), cache, rest, Held(x)
        return found

    def _evaluate(self, z: Tensor, x: Tensor, linearise: bool) -> tuple[Tensor, "Storage"]:
        z, samples = plain(z), z.shape[:-2].numel()
        clamps = (1,) * (z.dim() - x.dim()) + x.shape[:-2]
        if not shared(clamps, z.shape[:-2]):
            x = x.expand_as(z)
        repeat = samples // x.shape[:-2].numel()
        cache, push = Storage(self, z), torch.empty_like(z)
        self.library.eplib_force(cache.shape, pointer(self.packed), cache.pointers, samples, repeat, int(linearise),
                                 pointer(z), pointer(plain(x)), pointer(push), torch.get_num_threads())
        return push, cache
