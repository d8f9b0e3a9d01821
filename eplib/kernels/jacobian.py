"""J at a state, by the kernel."""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..calculus import contracted, positions
from ..solvers import Solution, Solver
from .compile import KernelError
from .storage import OUTCOME, Held, Storage, plain, pointer, settings, shared, solution

if TYPE_CHECKING:
    from .block import CompiledBlock


class CompiledJacobian:
    """J at a state, as `blocks.Jacobian`; products take several directions per sample, (B, K, T, C)."""

    def __init__(self, compiled: "CompiledBlock", cache: Storage, z: Tensor):
        self.compiled, self.cache, self.columns = compiled, cache, 3 * compiled.width + compiled.hidden
        self.at, self.by_token = z.shape, compiled.block.layers.causal
        self.z = None if compiled.block.log_damping is None else z  # in which the decay's gradient is
        self.solved: tuple[Held, Tensor] | None = None  # an adjoint state, and the derivatives behind its last product

    def _along(self, v: Tensor, several: bool = True) -> tuple[Tensor, int]:
        """The direction as the kernel takes it, and how many of them a sample has."""
        self.compiled.check()
        samples = v.shape[:-2].numel()
        fits = v.shape[-2:] == self.at[-2:] and shared(self.at[:-2], v.shape[:-2])
        if not fits or not (several or samples == self.cache.samples):
            raise KernelError(f"a direction {tuple(v.shape)} does not fit J at states {tuple(self.at)}; several of a sample "
                              "are (B, K, T, C), to be contracted one at a time")
        return plain(v), samples

    def product(self, v: Tensor, own: bool = False) -> Tensor:
        v, samples = self._along(v)
        to = torch.empty_like(v)
        self.compiled.library.eplib_product(
            self.cache.shape, pointer(self.compiled.packed), self.cache.pointers, samples, samples // self.cache.samples,
            int(own), pointer(v), pointer(to), torch.get_num_threads())
        return to

    def token_product(self, v: Tensor) -> Tensor:
        return self.product(v, own=True)

    def token_probe(self, v: Tensor, step: float, products: int) -> tuple[Tensor, Tensor]:
        probe = self._along(v, several=False)[0].clone()
        moved = torch.empty_like(probe)
        self.compiled.library.eplib_probe(
            self.cache.shape, pointer(self.compiled.packed), self.cache.pointers, self.cache.samples, ctypes.c_float(step),
            products, pointer(probe), pointer(moved), torch.get_num_threads())
        return probe, moved

    def transposed(self, u: Tensor) -> Tensor:
        return self._back(u)[0]

    def _back(self, u: Tensor) -> tuple[Tensor, Tensor]:
        u, samples = self._along(u)
        to, back = torch.empty_like(u), torch.zeros(*u.shape[:-1], self.columns)
        self.compiled.library.eplib_transposed(
            self.cache.shape, pointer(self.compiled.packed), self.cache.pointers, samples, samples // self.cache.samples,
            pointer(u), pointer(back), pointer(to), torch.get_num_threads())
        return to, back

    def relax(self, solver: Solver, slope: Tensor, scale: Tensor) -> Solution:
        """Solves J^T a = -slope from a = slope, residual relative to scale (B,), by the solver's method in the kernel's own
        loop; substitution goes from the last token to the first."""
        a = self._along(slope, several=False)[0].clone()
        outcome, back = torch.zeros(a.shape[0], OUTCOME, dtype=torch.int32), torch.empty(*a.shape[:-1], self.columns)
        sent = torch.zeros(*a.shape[:-1], 2 * self.compiled.width)
        self.compiled.library.eplib_adjoint(
            self.cache.shape, pointer(self.compiled.packed), self.cache.pointers, settings(solver, a), a.shape[0],
            pointer(plain(slope)), pointer(plain(scale)), pointer(a), pointer(back), pointer(sent), pointer(outcome),
            torch.get_num_threads())
        self.solved = Held(a), back
        return solution(a, outcome, scale, solver)

    def transposed_and_contracted(self, u: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """J^T u, and what `contract` gives for u, by one transposed pass."""
        moved, back = self._back(u)
        self.solved = Held(u), back
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
        out = self._outer(plain(u).flatten(0, -2), self.cache.out)
        found |= contracted("layers.wo", layers.wo, out[:, :width]) | contracted("layers.w2", layers.w2, out[:, width:])
        if self.z is not None:
            found["log_damping"] = (1 - self.compiled.decay) * positions(u * self.z)
        return found, u

    def _outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum over all positions of a b^T: (N, n), (N, m) -> (n, m)."""
        to = torch.empty(a.shape[1], self.compiled.library.eplib_padded(b.shape[1]))
        self.compiled.library.eplib_outer(len(a), a.shape[1], b.shape[1], pointer(a), pointer(b), pointer(to),
                                          torch.get_num_threads())
        return to[:, :b.shape[1]]
