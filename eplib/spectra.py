"""Spectra of the Jacobian at a state, matrix-free: products with J and J^T only.

Every function takes a Jacobian as the blocks' `linearise` gives it and answers for each sample apart. In a causal block token
t's force depends on z_1 .. z_t only, so J is block lower-triangular over tokens: det(J - lambda I) is the product of the
det(J_tt - lambda I), and the spectrum is exactly that of the C x C diagonal blocks, `token_spectra`. For other blocks the whole
operator counts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .models import EquilibriumModel
from .solvers import norm


@torch.no_grad()
def spectrum(product: Callable[[Tensor], Tensor], start: Tensor, size: int = 40) -> list[Tensor]:
    """Ritz values of a linear map by Arnoldi, one complex tensor per sample, in float64.

    product maps (B, ...) to (B, ...) sample by sample; start (B, ...) is the first vector. Leading eigenvalues converge first.
    """
    lanes = (-1,) + (1,) * (start.dim() - 1)
    size = min(size, start[0].numel())
    basis = [start / norm(start).view(lanes)]
    hessenberg = torch.zeros(start.shape[0], size + 1, size, dtype=torch.float64)
    for k in range(size):
        w = product(basis[k])
        for _ in range(2):  # twice is enough: plain Gram-Schmidt loses orthogonality in float32
            for j, q in enumerate(basis):
                overlap = (q * w).flatten(1).sum(1)
                hessenberg[:, j, k] += overlap.double().cpu()
                w = w - overlap.view(lanes) * q
        length = norm(w)
        hessenberg[:, k + 1, k] = length.double().cpu()
        basis.append(w / length.clamp_min(torch.finfo(w.dtype).tiny).view(lanes))
    found = []
    for b in range(start.shape[0]):
        small = (hessenberg[b].diagonal(-1) < 1e-12).nonzero()  # an invariant subspace ends the factorisation early
        stop = int(small[0]) + 1 if len(small) else size
        found.append(torch.linalg.eigvals(hessenberg[b, :stop, :stop]))
    return found


def _start(z: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(z)


@torch.no_grad()
def eigenvalues(jacobian: Any, z: Tensor, step: float, size: int = 40) -> list[Tensor]:
    """Ritz values of J at z (B, ...), rightmost first, one complex tensor a sample: Arnoldi on I + step J, which finds the
    edges of the spectrum first. All eigenvalues where size reaches the number of units."""
    found = spectrum(lambda v: v + step * jacobian.product(v), _start(z), size)
    values = [(ritz - 1) / step for ritz in found]
    return [ritz[ritz.real.argsort(descending=True)] for ritz in values]


def contraction_rate(model: EquilibriumModel, inputs: Tensor, z: Tensor, step: float, size: int = 40) -> Tensor:
    """rate_arnoldi: spectral radius of I + step * J at the states z (B, ...), per sample (B,)."""
    with torch.no_grad():
        jacobian = model.block.linearise(z, model.clamp(inputs))
    return torch.stack([(1 + step * values).abs().max() for values in eigenvalues(jacobian, z, step, size)])


def edges(values: list[Tensor], step: float) -> dict[str, float]:
    """Of eigenvalues of J, one tensor a sample, the worst of the batch: rate_arnoldi, the spectral radius of I + step J;
    abscissa, the largest real part; frequency, the imaginary part there, zero for a real mode."""
    first = max((some[some.real.argmax()] for some in values), key=lambda value: value.real.item())
    return {"rate_arnoldi": max((1 + step * some).abs().max().item() for some in values), "abscissa": first.real.item(),
            "frequency": abs(first.imag.item())}


@torch.no_grad()
def token_spectra(jacobian: Any, z: Tensor) -> Tensor:
    """All eigenvalues of a causal block's J at z (B, T, C), token by token: complex (B, T, C). C products with its diagonal
    blocks and one dense eigenvalue problem a token."""
    columns = [jacobian.token_product(one.expand_as(z)) for one in torch.eye(z.shape[-1]).to(z)]
    return torch.linalg.eigvals(torch.stack(columns, -1).double())  # blocks (B, T, C, C)


@torch.no_grad()
def numerical_abscissa(jacobian: Any, z: Tensor, size: int = 40) -> Tensor:
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
