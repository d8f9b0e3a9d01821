"""Spectra of the Jacobian at a state, matrix-free."""

from collections.abc import Callable

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


def contraction_rate(model: EquilibriumModel, inputs: Tensor, z: Tensor, step: float, size: int = 40) -> Tensor:
    """rate_arnoldi: spectral radius of I + step * J at the states z (B, ...), per sample (B,)."""
    with torch.no_grad():
        jacobian = model.block.linearise(z, model.clamp(inputs))
    start = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype).to(z.device)
    values = spectrum(lambda v: v + step * jacobian.product(v), start, size)
    return torch.stack([ritz.abs().max() for ritz in values])
