"""Spectra of the Jacobian at a state, matrix-free: products with J and J^T only.

Every function takes a Jacobian as the blocks' `linearise` gives it and answers for each sample apart. In a causal block token
t's force depends on z_1 .. z_t only, so J is block lower-triangular over tokens: det(J - lambda I) is the product of the
det(J_tt - lambda I), and the spectrum is exactly that of the C x C diagonal blocks, `token_spectra`. For other blocks the whole
operator counts.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .blocks import Dynamical
from .models import Model
from .solvers import norm

SIZE = 40  # vectors of a Krylov space, at first
MOST = 320  # at most, where the right edge asks for more
CONVERGED = 1e-4  # residual of the rightmost Ritz pair at which it counts as an eigenvalue


class Krylov:
    """An orthonormal basis of v, A v, A^2 v .. for each sample, and what A is on it (Arnoldi), grown as far as it is asked to.

    product maps (B, ...) to (B, ...) sample by sample; start (B, ...) is the first vector. The small matrices are float64.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], start: Tensor):
        self.product, self.shape, self.size = product, start.shape, 0
        self.basis = (start / norm(start).view((-1,) + (1,) * (start.dim() - 1))).flatten(1).unsqueeze(1)  # (B, 1, n)
        self.hessenberg = torch.zeros(start.shape[0], 1, 0, dtype=torch.float64)

    def grow(self, size: int) -> None:
        """Up to `size` vectors, of as many as there are."""
        first, size = self.size, min(size, self.basis.shape[2])
        if size <= first:
            return
        batch, tiny = len(self.basis), torch.finfo(self.basis.dtype).tiny
        self.basis = torch.cat([self.basis, self.basis.new_empty(batch, size - first, self.basis.shape[2])], 1)
        grown = torch.zeros(batch, size + 1, size, dtype=torch.float64)
        grown[:, :first + 1, :first] = self.hessenberg
        for k in range(first, size):
            w, known = self.product(self.basis[:, k].view(self.shape)).flatten(1), self.basis[:, :k + 1]
            for _ in range(2):  # twice is enough: plain Gram-Schmidt loses orthogonality in float32
                overlap = torch.bmm(known, w.unsqueeze(2))  # (B, k + 1, 1)
                grown[:, :k + 1, k] += overlap.squeeze(2).double().cpu()
                w = w - torch.bmm(overlap.mT, known).squeeze(1)
            length = w.norm(dim=1)
            grown[:, k + 1, k] = length.double().cpu()
            self.basis[:, k + 1] = w / length.clamp_min(tiny).unsqueeze(1)
        self.hessenberg, self.size = grown, size

    def ritz(self) -> list[tuple[Tensor, Tensor]]:
        """For each sample the Ritz values, rightmost first, complex, and the residual ||A y - lambda y|| of each, y its Ritz
        vector of norm 1."""
        found = []
        for h in self.hessenberg:
            small = (h.diagonal(-1) < 1e-12).nonzero()  # an invariant subspace ends the factorisation early
            stop = int(small[0]) + 1 if len(small) else self.size
            values, vectors = torch.linalg.eig(h[:stop, :stop])
            left = h[stop, stop - 1] * vectors[-1].abs() / vectors.norm(dim=0)
            order = values.real.argsort(descending=True)
            found.append((values[order], left[order]))
        return found


@torch.no_grad()
def spectrum(product: Callable[[Tensor], Tensor], start: Tensor, size: int = SIZE) -> list[Tensor]:
    """Ritz values of a linear map on a Krylov space of `size` vectors, rightmost first, one complex tensor a sample; the outer
    eigenvalues converge first. All of them where size reaches the number of units."""
    space = Krylov(product, start)
    space.grow(size)
    return [values for values, _ in space.ritz()]


def _start(z: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(z)


@torch.no_grad()
def eigenvalues(jacobian: Any, z: Tensor, size: int = SIZE) -> list[Tensor]:
    """Ritz values of J at z (B, ...), rightmost first, one complex tensor a sample. How far they are from eigenvalues is not
    known: `rightmost` says it."""
    return spectrum(jacobian.product, _start(z), size)


@torch.no_grad()
def rightmost(jacobian: Any, z: Tensor, tol: float = CONVERGED, most: int = MOST) -> list[tuple[Tensor, float]]:
    """For each sample the Ritz values of J at z (B, ...), rightmost first, complex, and the residual ||J y - lambda y|| of the
    first, y of norm 1.

    Arnoldi converges at the ends of a spectrum, and first at the further one: where the left edge is long, few vectors call a
    state more stable than it is. The space is grown until each sample's rightmost pair has a residual of at most tol twice
    running, or to `most` vectors; the residual says which.
    """
    space, settled = Krylov(jacobian.product, _start(z)), 0
    while True:
        space.grow(space.size + SIZE)
        found = [(values, float(left[0])) for values, left in space.ritz()]
        settled = settled + 1 if all(left <= tol for _, left in found) else 0
        if settled == 2 or space.size >= min(most, space.basis.shape[2]):
            return found


def contraction_rate(model: Model, inputs: Tensor, z: Tensor, step: float, size: int = SIZE) -> Tensor:
    """rate_arnoldi: spectral radius of I + step * J at the states z (B, ...), per sample (B,)."""
    with torch.no_grad():
        jacobian = model.block.linearise(z, model.clamp(inputs))
    return torch.stack([(1 + step * values).abs().max() for values in eigenvalues(jacobian, z, size)])


@torch.no_grad()
def edges(block: Dynamical, z: Tensor, x: Tensor, step: float, held_step: float | None = None) -> dict[str, float]:
    """Where the spectrum of J at z (B, ...) under the clamp x ends, the worst of the batch.

    abscissa: largest real part of the eigenvalues, and frequency: the imaginary part of that very one, zero for a real mode;
    abscissa_residual: ||J y - lambda y|| of its unit vector. rate_arnoldi: spectral radius of I + rate_step J, and rate_step.
    rate_held: that of I + held_step J, where a step is given for it.
    Exact, with a residual of zero, from the tokens' own blocks where those have all of J's eigenvalues (`token_spectra`); else
    by `rightmost`, in float64.
    """
    jacobian = block.linearise(z, x)
    if getattr(jacobian, "by_token", False):  # a block of the user's own need not say it
        found = [(values, 0.0) for values in token_spectra(jacobian, z).flatten(1)]
    else:
        z = z.double()
        found = rightmost(deepcopy(block).double().linearise(z, x.double()), z)
    first, residual = max(((values[values.real.argmax()], left) for values, left in found), key=lambda one: float(one[0].real))

    def radius(step: float) -> float:
        return max((1 + step * values).abs().max().item() for values, _ in found)

    return {"abscissa": first.real.item(), "frequency": abs(first.imag.item()), "abscissa_residual": residual,
            "rate_arnoldi": radius(step), "rate_step": step} | ({"rate_held": radius(held_step)} if held_step else {})


@torch.no_grad()
def token_spectra(jacobian: Any, z: Tensor) -> Tensor:
    """All eigenvalues of a causal block's J at z (B, T, C), token by token: complex (B, T, C). C products with its diagonal
    blocks and one dense eigenvalue problem a token."""
    columns = [jacobian.token_product(one.expand_as(z)) for one in torch.eye(z.shape[-1]).to(z)]
    return torch.linalg.eigvals(torch.stack(columns, -1).double())  # blocks (B, T, C, C)


@torch.no_grad()
def numerical_abscissa(jacobian: Any, z: Tensor, size: int = SIZE) -> Tensor:
    """Largest eigenvalue of S = (J + J^T) / 2 at z (B, ...), (B,), by Lanczos: the fastest growth that any deviation has at
    first. Above zero, some grow before they decay, if the abscissa is below."""
    found = spectrum(lambda v: (jacobian.product(v) + jacobian.transposed(v)) / 2, _start(z), size)
    return torch.stack([ritz.real.max() for ritz in found])


@torch.no_grad()
def transient_growth(jacobian: Any, z: Tensor, step: float, counts: tuple[int, ...] = (1, 2, 4, 8, 16),
                     rounds: int = 12) -> Tensor:
    """||(I + step J)^k|| for each k of counts at z (B, ...), (B, len(counts)): how much k steps of the relaxation can enlarge a
    deviation. By power iteration on M^T M, M = (I + step J)^k, so a lower bound that `rounds` tighten."""
    lanes, found = (-1,) + (1,) * (z.dim() - 1), []
    for count in counts:
        v = _start(z)
        for _ in range(rounds):
            v = v / norm(v).view(lanes)
            for _ in range(count):
                v = v + step * jacobian.product(v)
            size = norm(v)
            for _ in range(count):
                v = v + step * jacobian.transposed(v)
        found.append(size)
    return torch.stack(found, 1)


@torch.no_grad()
def lyapunov(block: Dynamical, x: Tensor, step: float, steps: int) -> Tensor:
    """Finite-time Lyapunov exponent of the relaxation under the clamp x (B, ...), (B,): by how much the logarithm of a
    deviation grows in a unit of time, in the mean over so many Euler steps from the block's own start. J is that of the state
    where each step begins, so it is of the whole way to the fixed point and no quantity of that."""
    z = block.start(x)
    v, total = _start(z), torch.zeros_like(norm(z))
    for _ in range(steps):
        jacobian: Any = block.linearise(z, x)
        v = v / norm(v).view((-1,) + (1,) * (z.dim() - 1))
        v = v + step * jacobian.product(v)
        total, z = total + norm(v).log(), z + step * block(z, x)
    return total / (step * steps)


@torch.no_grad()
def asymmetry_radius(jacobian: Any, z: Tensor, size: int = 30, most: int = 400, tol: float = 1e-7) -> tuple[Tensor, Tensor]:
    """rho(S^-1 A) at z (B, ...), S and A the symmetric and antisymmetric parts of J: (B,), and the worst relative residual (B,)
    of the inner solves.

    Arnoldi on v -> S^-1 A v; S, which need not be definite, is inverted by conjugate residuals, at most `most` iterations to
    `tol`. Where the returned residual is large S is nearly singular and rho has no digits.
    """
    lanes = (-1,) + (1,) * (z.dim() - 1)

    def symmetric(v: Tensor) -> Tensor:
        return (jacobian.product(v) + jacobian.transposed(v)) / 2

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    worst = torch.zeros_like(norm(z))

    def product(v: Tensor) -> Tensor:
        nonlocal worst
        residual = (jacobian.product(v) - jacobian.transposed(v)) / 2
        scale, tiny = norm(residual), torch.finfo(v.dtype).tiny
        solution, moved = torch.zeros_like(v), symmetric(residual)
        direction, along = residual, moved
        for _ in range(most):
            if (norm(residual) <= tol * scale).all():
                break
            before = dot(residual, moved)
            alpha = (before / dot(along, along).clamp_min(tiny)).view(lanes)
            solution, residual = solution + alpha * direction, residual - alpha * along
            moved = symmetric(residual)
            beta = (dot(residual, moved) / torch.where(before == 0, tiny, before)).view(lanes)
            direction, along = residual + beta * direction, moved + beta * along
        worst = torch.maximum(worst, norm(residual) / scale.clamp_min(tiny))
        return solution

    found = spectrum(product, _start(z), size)
    return torch.stack([ritz.abs().max() for ritz in found]), worst
