"""The optional compiled CPU kernel of `blocks.Thick` and `blocks.LinearAttention`: the same dynamics, several times faster.

`python -m eplib.kernels` builds it where a C++ compiler is at hand (set-up does so); `backend="compiled"` uses it. The PyTorch
path is the reference: forces and products agree with it to float32 rounding, settled states to the solver's tolerance. The
kernel is float32, on CPU, for real states and without qk_norm; anything else is refused, never computed in another way.
"""

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import weakref
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blocks import Attractor, Dynamical, EquilibriumBlock, LinearAttention, Thick
from ..calculus import Sublayers, version, writes
from ..intact import bare
from ..solvers import Anderson, Solution, Solver, Status, Substitution

SOURCE = Path(__file__).with_name("thick.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")
MULTIPLE, HEAD = 16, 4  # of which the width, and the width of a head, are multiples


class KernelError(RuntimeError):
    """The compiled kernel is not there, or cannot do what was asked of it; the message says what to do."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the PATH."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def path() -> Path:
    """Where the library for this source, these flags and this processor lies, built or not."""
    cpu = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))][:1] if cpu.exists() \
        else [platform.processor()]
    identity = "\n".join([SOURCE.read_text(), *FLAGS, platform.machine(), *features])
    return SOURCE.parent / "build" / f"thick-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.so"


def unknown(block: Any) -> str | None:
    """Why the kernel does not compute a block, in words; None if it does."""
    if not isinstance(block, EquilibriumBlock):
        return "it knows blocks.Thick without qk_norm, blocks.Attractor, and blocks.LinearAttention, asymmetric"
    if reason := block.altered():
        return reason
    if type(block).start is not Dynamical.start or "start" in vars(block):
        return "it has its own start"
    layers = block.layers
    if layers.qk_norm:
        return "qk_norm"
    hidden, width = layers.w1.weight.shape
    if width % MULTIPLE or hidden % MULTIPLE or width // layers.heads % HEAD:
        return f"width and hidden units are to be a multiple of {MULTIPLE}, the width of each head of {HEAD}; they are " \
               f"{width}, {hidden} and {width // layers.heads}"
    return None


def knows(block: Any, width: int, heads: int) -> bool:
    """Whether the kernel computes the block of this configuration at this width and number of heads."""
    known = not block.symmetric if isinstance(block, LinearAttention) else \
        isinstance(block, Thick | Attractor) and not block.qk_norm
    return known and width % MULTIPLE == 0 and width // heads % HEAD == 0


def available() -> bool:
    """Whether the kernel is built."""
    return path().exists()


def build() -> Path:
    """Compiles the kernel (seconds). Raises `KernelError` without a compiler or with what the compiler said."""
    target, program = path(), compiler()
    if target.exists():
        return target
    if program is None:
        raise KernelError("no C++ compiler found (c++, g++ or clang++; CXX names another); backend=\"torch\" needs none")
    target.parent.mkdir(exist_ok=True)
    for old in target.parent.glob("thick-*"):
        old.unlink()
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    for threads in (["-fopenmp"], []):  # without OpenMP the kernel starts threads of its own
        done = subprocess.run([program, *FLAGS, *threads, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
        if not done.returncode:
            break
    else:
        partial.unlink(missing_ok=True)
        raise KernelError(f"{program} could not compile {SOURCE.name}: {done.stderr.strip()[-2000:]}")
    os.replace(partial, target)
    return target


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("tokens", "width", "heads", "hidden", "causal", "linear")] + [
        ("decay", ctypes.c_float)]


class _Cache(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("n", "inverse", "q", "k", "v", "k_tiles", "v_tiles", "weights", "share",
                                                     "out", "slope")]


class _Solver(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("chunk", "max_steps", "memory")] + [
        (name, ctypes.c_float) for name in ("step", "tol")]


MEMORY = 16  # of Anderson, at most
CHUNK = 2  # tokens that are settled together, where the solver leaves it open
OUTCOME = 6  # of each sample: squares, allowed, rate (float), evaluations, fallbacks, diverged (int)


@cache
def library() -> ctypes.CDLL:
    """The loaded kernel. Raises `KernelError` if it is not built."""
    if not available():
        raise KernelError("the compiled kernel is not built; run: python -m eplib.kernels, or choose backend=\"torch\"")
    loaded = ctypes.CDLL(str(path()))
    loaded.eplib_packed.restype = ctypes.c_long
    return loaded


def _pointer(a: Tensor | None) -> ctypes.c_void_p:
    pointer: Any = ctypes.c_void_p(None if a is None else a.data_ptr())
    pointer.tensor = a  # which lives as long as the pointer: it may be a copy that nobody else holds
    return pointer


def _plain(a: Tensor) -> Tensor:
    if a.dtype != torch.float32 or a.device.type != "cpu":
        raise KernelError(f"the compiled kernel is for float32 on a CPU, got {a.dtype} on {a.device}; use backend=\"torch\"")
    return a.contiguous()


class _Held:
    """A tensor, told from any other and from itself after it was written to, whatever view of it comes back."""

    def __init__(self, value: Tensor):
        self.value, self.version = value, version(value)  # held, so that its memory is nobody else's

    def holds(self, a: Tensor) -> bool:
        kept = self.value
        return a.data_ptr() == kept.data_ptr() and a.shape[-2:] == kept.shape[-2:] and a.numel() == kept.numel() \
            and a.is_contiguous() and version(a) == self.version


def _weights(layers: Sublayers) -> list[Tensor]:
    """The weights in the kernel's order."""
    weights = [getattr(layers, name).weight for name in ("qkv", "wo", "w1", "w2")]
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
        self.settled: tuple[_Held, _Storage, Tensor, _Held] | None = None
        layers = self.block.layers
        self.library, self.width, self.hidden = library(), layers.width, layers.w1.out_features
        self.weights = _weights(layers)
        self.written = writes(self.weights)
        weights = [_plain(value.detach()) for value in self.weights]
        self.packed = torch.empty(self.library.eplib_packed(self.width, self.hidden))
        self.library.eplib_pack(self.width, self.hidden, *map(_pointer, weights), _pointer(self.packed))

    def check(self, *states: Tensor) -> None:
        """Raises `KernelError` where the weights are others than those that were packed, or states do not fit them."""
        if writes(_weights(self.block.layers)) != self.written:
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
        z, x, outcome = _plain(start).clone(), _plain(x), torch.zeros(x.shape[0], OUTCOME, dtype=torch.int32)
        cache, rest = _Storage(self, z), torch.empty_like(z)
        self.library.eplib_settle(cache.shape, _pointer(self.packed), cache.pointers, _settings(solver, z), z.shape[0],
                                  _pointer(x), _pointer(None if scale is None else _plain(scale)), _pointer(z),
                                  _pointer(rest), _pointer(outcome), torch.get_num_threads())
        found = _solution(z, outcome, z.flatten(1).norm(dim=1) if scale is None else scale, solver)
        if scale is None and found.status.usable:  # of a sample that diverged the tokens after it were not computed
            self.settled = _Held(z), cache, rest, _Held(x)
        return found

    def _evaluate(self, z: Tensor, x: Tensor, linearise: bool) -> tuple[Tensor, "_Storage"]:
        z, samples = _plain(z), z.shape[:-2].numel()
        clamps = (1,) * (z.dim() - x.dim()) + x.shape[:-2]
        if not _shared(clamps, z.shape[:-2]):
            x = x.expand_as(z)
        repeat = samples // x.shape[:-2].numel()
        cache, push = _Storage(self, z), torch.empty_like(z)
        self.library.eplib_force(cache.shape, _pointer(self.packed), cache.pointers, samples, repeat, int(linearise),
                                 _pointer(z), _pointer(_plain(x)), _pointer(push), torch.get_num_threads())
        return push, cache


def _shared(few: tuple[int, ...], many: tuple[int, ...]) -> bool:
    """Whether each of the samples `few` (B, 1 ..) is that of consecutive ones of `many` (B, K ..)."""
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(few, many, strict=False)))
    return all(n == 1 for n in few[len(same):])


class _Storage:
    """What the kernel keeps at states (..., T, C). Memory goes back to `spare` and is used again by the next of the same shape:
    fresh pages would cost as much as the force."""

    spare: ClassVar[dict[tuple, list[list[Tensor]]]] = {}

    def __init__(self, compiled: CompiledBlock, z: Tensor):
        layers, tokens = compiled.block.layers, z.shape[-2]
        self.samples, padded = z.shape[:-2].numel(), compiled.library.eplib_padded(tokens)
        heads, width, hidden, rows = layers.heads, compiled.width, compiled.hidden, self.samples * tokens
        sizes = (rows * width, rows, *[rows * width] * 3, *[self.samples * width * padded] * 2, rows * heads * padded,
                 rows * heads, rows * (width + hidden), rows * hidden)
        kept = self.spare.setdefault(sizes, [])
        self.parts = kept.pop() if kept else [torch.empty(size) for size in sizes]
        weakref.finalize(self, kept.append, self.parts).atexit = False
        self.n, self.out = self.parts[0].view(rows, width), self.parts[9].view(rows, width + hidden)
        self.pointers = ctypes.byref(_Cache(*(part.data_ptr() for part in self.parts)))
        self.shape = ctypes.byref(_Shape(tokens, width, heads, hidden, int(layers.causal),
                                         int(layers.linear), 1 + compiled.block.damping))


class CompiledJacobian:
    """J at a state, as `blocks.Jacobian`; products take several directions per sample, (B, K, T, C)."""

    def __init__(self, compiled: CompiledBlock, cache: _Storage, z: Tensor):
        self.compiled, self.cache, self.columns = compiled, cache, 3 * compiled.width + compiled.hidden
        self.at, self.by_token = z.shape, compiled.block.layers.causal
        self.solved: tuple[_Held, Tensor] | None = None  # an adjoint state, and the derivatives behind its last product

    def _along(self, v: Tensor, several: bool = True) -> tuple[Tensor, int]:
        """The direction as the kernel takes it, and how many of them a sample has."""
        self.compiled.check()
        samples = v.shape[:-2].numel()
        fits = v.shape[-2:] == self.at[-2:] and _shared(self.at[:-2], v.shape[:-2])
        if not fits or not (several or samples == self.cache.samples):
            raise KernelError(f"a direction {tuple(v.shape)} does not fit J at states {tuple(self.at)}; several of a sample "
                              "are (B, K, T, C), to be contracted one at a time")
        return _plain(v), samples

    def product(self, v: Tensor, own: bool = False) -> Tensor:
        v, samples = self._along(v)
        to = torch.empty_like(v)
        self.compiled.library.eplib_product(
            self.cache.shape, _pointer(self.compiled.packed), self.cache.pointers, samples, samples // self.cache.samples,
            int(own), _pointer(v), _pointer(to), torch.get_num_threads())
        return to

    def token_product(self, v: Tensor) -> Tensor:
        return self.product(v, own=True)

    def transposed(self, u: Tensor) -> Tensor:
        return self._back(u)[0]

    def _back(self, u: Tensor) -> tuple[Tensor, Tensor]:
        u, samples = self._along(u)
        to, back = torch.empty_like(u), torch.zeros(*u.shape[:-1], self.columns)
        self.compiled.library.eplib_transposed(
            self.cache.shape, _pointer(self.compiled.packed), self.cache.pointers, samples, samples // self.cache.samples,
            _pointer(u), _pointer(back), _pointer(to), torch.get_num_threads())
        return to, back

    def relax(self, solver: Solver, slope: Tensor, scale: Tensor) -> Solution:
        """Solves J^T a = -slope from a = slope, residual relative to scale (B,), by the solver's method in the kernel's own
        loop; substitution goes from the last token to the first."""
        a = self._along(slope, several=False)[0].clone()
        outcome, back = torch.zeros(a.shape[0], OUTCOME, dtype=torch.int32), torch.empty(*a.shape[:-1], self.columns)
        sent = torch.zeros(*a.shape[:-1], 2 * self.compiled.width)
        self.compiled.library.eplib_adjoint(
            self.cache.shape, _pointer(self.compiled.packed), self.cache.pointers, _settings(solver, a), a.shape[0],
            _pointer(_plain(slope)), _pointer(_plain(scale)), _pointer(a), _pointer(back), _pointer(sent), _pointer(outcome),
            torch.get_num_threads())
        self.solved = _Held(a), back
        return _solution(a, outcome, scale, solver)

    def transposed_and_contracted(self, u: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """J^T u, and what `contract` gives for u, by one transposed pass."""
        moved, back = self._back(u)
        self.solved = _Held(u), back
        return moved, *self.contract(u)

    def contract(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        self._along(u, several=False)
        back = self.solved[1] if self.solved and self.solved[0].holds(u) else self._back(u)[1]
        layers, width = self.compiled.block.layers, self.compiled.width
        back = back.flatten(0, -2)
        into, sums = self._outer(back, self.cache.n), back.sum(0)  # (3 C + E, C): of the folded weights; and of the bias
        found: dict[str, Tensor] = {}
        for norm, layer, part in (("ln1", "qkv", slice(None, 3 * width)), ("ln2", "w1", slice(3 * width, None))):
            weight, gain, bias = getattr(layers, layer).weight, getattr(layers, norm).weight, getattr(layers, norm).bias
            found |= {f"layers.{norm}.weight": (weight * into[part]).sum(0), f"layers.{norm}.bias": sums[part] @ weight,
                      f"layers.{layer}.weight": into[part] * gain + torch.outer(sums[part], bias)}
        out = self._outer(_plain(u).flatten(0, -2), self.cache.out)
        return found | {"layers.wo.weight": out[:, :width], "layers.w2.weight": out[:, width:]}, u

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum over all positions of a b^T: (N, n), (N, m) -> (n, m)."""
        to = torch.empty(a.shape[1], self.compiled.library.eplib_padded(b.shape[1]))
        self.compiled.library.eplib_outer(len(a), a.shape[1], b.shape[1], _pointer(a), _pointer(b), _pointer(to),
                                          torch.get_num_threads())
        return to[:, :b.shape[1]]


def _settings(solver: Solver, z: Tensor) -> Any:
    """The solver for states (N, T, C): Anderson's method on a few tokens or on all, without memory plain relaxation."""
    memory = solver.memory if isinstance(solver, Anderson) else 0
    if memory > MEMORY:
        raise KernelError(f"the compiled kernel keeps at most {MEMORY} differences, got memory={memory}; choose fewer")
    chunk = solver.chunk or CHUNK if isinstance(solver, Substitution) else z.shape[-2]
    return ctypes.byref(_Solver(chunk, solver.max_steps, memory, solver.step, solver.tol))


def _solution(value: Tensor, outcome: Tensor, unit: Tensor, solver: Solver) -> Solution:
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
