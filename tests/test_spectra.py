"""The right edge of a spectrum, against dense eigenvalues."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from eplib import blocks, models, spectra
from eplib.diagnostics import dense_jacobian
from eplib.solvers import Anderson
from systems import linear_batch, linear_system, transformer


def dense(matrices: torch.Tensor) -> SimpleNamespace:
    """A Jacobian of which everything is known: (B, n, n)."""
    return SimpleNamespace(product=lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1))


@cache
def long_left_edge(skewed: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices (2, n, n) with eigenvalues in a disc from -10.35 to -0.35 and further right a pair, -0.2 +- 0.3 i or
    -0.2 +- 0.5 i; and all eigenvalues. `skewed` makes the eigenvectors far from orthogonal."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(250, dtype=torch.float64) + 0.5
    radius, angle = 5 * (places / 250).sqrt(), math.pi * (places * (math.sqrt(5) - 1) / 2 % 1)  # evenly over the half disc
    found = []
    for last in ((-0.2, 0.3), (-0.2, 0.5)):
        pairs = torch.stack([radius * angle.cos() - 5.35, radius * angle.sin()], 1)
        pairs[0] = torch.tensor(last)
        inner = torch.block_diag(*(torch.tensor([[a, b], [-b, a]]) for a, b in pairs.tolist())).double()
        inner += skewed * torch.randn(inner.shape, generator=generator, dtype=torch.float64).triu(2)
        frame = torch.linalg.qr(torch.randn(inner.shape, generator=generator, dtype=torch.float64))[0]
        found.append(frame @ inner @ frame.T)
    matrices = torch.stack(found)
    return matrices, torch.linalg.eigvals(matrices)


@pytest.mark.parametrize("skewed", [0.0, 0.02])
def test_the_rightmost_mode_is_found_where_the_left_edge_is_long(skewed):
    matrices, truth = long_left_edge(skewed)
    z = torch.zeros(2, len(matrices[0]), dtype=torch.float64)
    found = spectra.rightmost(dense(matrices), z)
    short = spectra.eigenvalues(dense(matrices), z)
    for (values, residual), few, exact in zip(found, short, truth, strict=True):
        last = exact[exact.real.argmax()]
        assert values[0].real == pytest.approx(last.real.item(), abs=1e-3)
        assert values[0].imag.abs() == pytest.approx(last.imag.abs().item(), abs=1e-3)
        assert residual <= spectra.CONVERGED
        assert few[0].real < last.real - 0.02  # forty vectors call it more stable


def test_a_right_edge_that_was_not_reached_says_so():
    matrices, _ = long_left_edge(0.0)
    z = torch.zeros(2, len(matrices[0]), dtype=torch.float64)
    for (values, residual), few in zip(spectra.rightmost(dense(matrices), z, most=spectra.SIZE),
                                       spectra.eigenvalues(dense(matrices), z), strict=True):
        assert torch.equal(values, few) and residual > 0.01


def test_the_residual_is_that_of_the_ritz_vector_however_the_space_was_grown():
    matrices, _ = long_left_edge(0.02)
    space = spectra.Krylov(dense(matrices).product, torch.ones(matrices.shape[:2], dtype=torch.float64))
    for size in (25, 60):
        space.grow(size)
    parts = zip(matrices, space.basis[:, :60], space.hessenberg[:, :60], space.ritz(), strict=True)
    for matrix, basis, small, (values, left) in parts:
        assert torch.allclose(basis @ basis.T, torch.eye(60, dtype=torch.float64), atol=1e-10)
        full = torch.linalg.eig(small)
        first = full.eigenvalues.real.argmax()
        y = basis.T.to(torch.complex128) @ full.eigenvectors[:, first]
        assert values[0].real.item() == pytest.approx(full.eigenvalues[first].real.item())
        expected = (matrix.to(y) @ y - full.eigenvalues[first] * y).norm() / y.norm()
        assert left[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_whole_space_has_all_eigenvalues_and_no_residual():
    matrices = long_left_edge(0.0)[0][:, :30, :30]
    z = torch.zeros(2, 30, dtype=torch.float64)
    for (values, residual), exact in zip(spectra.rightmost(dense(matrices), z), torch.linalg.eigvals(matrices), strict=True):
        assert torch.allclose(values.real, exact.real.sort(descending=True).values, atol=1e-8) and residual < 1e-8


def ends(model: models.Model, inputs: torch.Tensor) -> tuple[dict, torch.Tensor]:
    """`spectra.edges` of the model at its fixed point, and all eigenvalues there."""
    x = model.clamp(inputs).detach()
    z = Anderson(step=0.5, max_steps=400, tol=1e-6).settle(model.block, x).value
    return spectra.edges(model.block, z, x, 0.4), torch.linalg.eigvals(torch.stack(
        [dense_jacobian(model, x[b:b + 1], z[b:b + 1]) for b in range(len(x))]))


@pytest.mark.parametrize("kind", ["language", "image"])
def test_value_and_frequency_are_those_of_one_mode_and_the_rate_has_its_step(kind):
    model, inputs, _ = transformer(kind)
    found, truth = ends(model, inputs)
    first = truth.flatten()[truth.real.argmax()]
    assert found["abscissa"] == pytest.approx(first.real.item(), abs=1e-6)
    assert found["frequency"] == pytest.approx(abs(first.imag.item()), abs=1e-5)
    assert found["rate_arnoldi"] == pytest.approx((1 + 0.4 * truth).abs().max().item(), abs=1e-6) and found["rate_step"] == 0.4
    assert found["abscissa_residual"] == 0 if kind == "language" else 0 < found["abscissa_residual"] < 1e-6


@pytest.mark.parametrize("block", [blocks.Thin(), blocks.Energy(), blocks.Monotone()], ids=lambda block: block.kind)
def test_blocks_in_float32_are_measured_in_float64(block):
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=16, heads=4, context=8, block=block)
    found, truth = ends(model, torch.randint(0, 11, (2, 8)))
    assert found["abscissa"] == pytest.approx(truth.real.max().item(), abs=1e-4)
    assert found["abscissa_residual"] <= spectra.CONVERGED


def test_a_causal_block_s_spectrum_is_that_of_its_tokens_and_no_krylov_space_is_grown_for_it(monkeypatch):
    model, inputs, _ = transformer("language")
    grown = []
    rightmost = spectra.rightmost
    monkeypatch.setattr(spectra, "rightmost", lambda *given: grown.append(given) or rightmost(*given))
    ends(model, inputs)
    assert not grown
    ends(*transformer("image")[:2])
    assert len(grown) == 1


def test_the_finite_time_exponent_of_a_linear_system_is_that_of_the_power_of_its_map():
    model, (inputs, _) = linear_system(symmetric=False), linear_batch()
    x = model.clamp(inputs).detach()
    first, matrix = spectra._start(x), model.block.matrix.detach()
    moved = first @ torch.linalg.matrix_power(torch.eye(len(matrix)) + 0.2 * matrix, 30).T
    exact = (moved.norm(dim=1) / first.norm(dim=1)).log() / (0.2 * 30)
    assert torch.allclose(spectra.lyapunov(model.block, x, 0.2, 30), exact) and (exact < 0).all()
