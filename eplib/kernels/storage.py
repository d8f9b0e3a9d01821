"""What goes between PyTorch and the kernel: tensors, settings, outcomes."""

import ctypes
import itertools
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..calculus import version
from ..calculus.attention import ROWS
from ..solvers import Anderson, Solution, Solver, Status, Substitution
from .compile import KernelError

if TYPE_CHECKING:
    from .block import CompiledBlock

MEMORY = 16  # of Anderson, at most
SHAPES = 8  # of states of which memory is kept
CHUNK = 2  # tokens that are settled together, where the solver leaves it open
OUTCOME = 6  # of each sample: squares, allowed, rate (float), evaluations, fallbacks, diverged (int)


class Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tokens", "width", "heads", "hidden", "causal", "linear", "qk_norm")] + [
        ("decay", ctypes.c_void_p)]


class Cache(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("n", "inverse", "q", "k", "v", "k_tiles", "v_tiles", "weights", "share",
                                                     "out", "slope", "rms")]


class Settings(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("chunk", "max_steps", "memory")] + [
        (name, ctypes.c_float) for name in ("step", "tol")]


def pointer(a: Tensor | None) -> ctypes.c_void_p:
    address: Any = ctypes.c_void_p(None if a is None else a.data_ptr())
    address.tensor = a  # which lives as long as the address: it may be a copy that nobody else holds
    return address


def plain(a: Tensor) -> Tensor:
    if a.dtype != torch.float32 or a.device.type != "cpu":
        raise KernelError(f"the compiled kernel is for float32 on a CPU, got {a.dtype} on {a.device}; use backend=\"torch\"")
    return a.contiguous()


class Held:
    """A tensor, told from any other and from itself after it was written to, whatever view of it comes back."""

    def __init__(self, value: Tensor):
        self.value, self.version = value, version(value)  # held, so that its memory is nobody else's

    def holds(self, a: Tensor) -> bool:
        kept = self.value
        return a.data_ptr() == kept.data_ptr() and a.shape[-2:] == kept.shape[-2:] and a.numel() == kept.numel() \
            and a.is_contiguous() and version(a) == self.version


def shared(few: tuple[int, ...], many: tuple[int, ...]) -> bool:
    """Whether each of the samples `few` (B, 1 ..) is that of consecutive ones of `many` (B, K ..)."""
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(few, many, strict=False)))
    return all(n == 1 for n in few[len(same):])


class Storage:
    """What the kernel keeps at states (..., T, C). Memory goes back to `spare` and is used again by the next of the same shape,
    of the `SHAPES` that were used last: fresh pages would cost as much as the force."""

    spare: ClassVar[dict[tuple, list[list[Tensor]]]] = {}

    def __init__(self, compiled: "CompiledBlock", z: Tensor):
        layers, tokens = compiled.block.layers, z.shape[-2]
        self.samples, padded = z.shape[:-2].numel(), compiled.library.eplib_padded(tokens)
        heads, width, hidden, rows = layers.heads, compiled.width, compiled.hidden, self.samples * tokens
        weights = rows * heads * padded if tokens <= ROWS else 0  # of more tokens they are made anew
        sizes = (rows * width, rows, *[rows * width] * 3, *[self.samples * width * padded] * 2, weights, 2 * rows * heads,
                 rows * (width + hidden), rows * hidden, 2 * rows * heads * layers.qk_norm)
        kept = self.spare[sizes] = self.spare.pop(sizes, [])
        if len(self.spare) > SHAPES:
            del self.spare[next(iter(self.spare))]
        self.parts = kept.pop() if kept else [torch.empty(size) for size in sizes]
        weakref.finalize(self, kept.append, self.parts).atexit = False
        self.n, self.out = self.parts[0].view(rows, width), self.parts[9].view(rows, width + hidden)
        self.pointers = ctypes.byref(Cache(*(part.data_ptr() for part in self.parts)))
        self.shape = ctypes.byref(Shape(tokens, width, heads, hidden, int(layers.causal),
                                         int(layers.linear), int(layers.qk_norm), compiled.decay.data_ptr()))


def settings(solver: Solver, z: Tensor) -> Any:
    """The solver for states (N, T, C): Anderson's method on a few tokens or on all, without memory plain relaxation."""
    memory = solver.memory if isinstance(solver, Anderson) else 0
    if memory > MEMORY:
        raise KernelError(f"the compiled kernel keeps at most {MEMORY} differences, got memory={memory}; choose fewer")
    chunk = solver.chunk or CHUNK if isinstance(solver, Substitution) else z.shape[-2]
    return ctypes.byref(Settings(chunk, solver.max_steps, memory, solver.step, solver.tol))


def solution(value: Tensor, outcome: Tensor, unit: Tensor, solver: Solver) -> Solution:
    squares, _, rate = outcome[:, :3].view(torch.float32).unbind(1)
    taken, fallbacks, diverged = outcome[:, 3:].unbind(1)
    residual = squares.sqrt() / unit
    status = {1: Status.DIVERGED, 2: Status.NONFINITE}.get(int(diverged.max())) or (
        Status.MAX_STEPS if (residual > solver.tol).any() else Status.CONVERGED)
    tokens = value.shape[-2]
    steps = (-(-taken // tokens) - 1).clamp(0, solver.max_steps)  # of the whole sample, rounded up; the last is the check
    evaluations = -(-int(taken.sum()) // (tokens * len(taken)))
    return Solution(value, residual, steps.long(), torch.where(rate > 0, rate, torch.nan), evaluations, status,
                    int((fallbacks > 0).sum()))
