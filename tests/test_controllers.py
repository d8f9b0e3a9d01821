"""The contraction-rate penalty against finite differences, and spectra against dense eigenvalues."""

import pytest
import torch

import eplib
from eplib import blocks, estimators, models, spectra
from eplib.controllers import ContractionRate
from eplib.estimators import Problem
from eplib.solvers import Relaxation, norm
from systems import linear_system, linear_batch, transformer

STEP = 0.5
SETTLE = Relaxation(step=0.3, max_steps=12, tol=0.0)  # not settled: the last push is still large enough to be a probe


def small():
    """A float64 model with its inputs and free state."""
    model, inputs, _ = transformer()
    return model, inputs, model.settle(inputs, SETTLE).value


def at(model, inputs, z) -> Problem:
    return Problem(model, inputs, None, model.clamp(inputs).detach(), z)  # targets: none, a penalty has none to look at


def dense(model, inputs, z) -> list[torch.Tensor]:
    """J of each sample by autograd of the force, which the hand-written linearisation does not enter."""
    x = model.clamp(inputs).detach()
    jacobian = torch.autograd.functional.jacobian
    return [jacobian(lambda s, i=i: model.block(s, x[i:i + 1]).flatten(), z[i:i + 1]).flatten(1) for i in range(len(z))]


def refined_probe(model, inputs, z, products: int) -> torch.Tensor:
    x = model.clamp(inputs).detach()
    probe = model.block(z, x).detach().flatten(1)
    for _ in range(products):
        probe = torch.stack([v + STEP * j @ v for v, j in zip(probe, dense(model, inputs, z), strict=True)])
    return (probe / probe.norm(dim=1, keepdim=True)).view_as(z)


def penalty(model, inputs, z, probe, target: float, strength: float) -> tuple[float, torch.Tensor]:
    """The documented formula at the weights at hand, z and probe fixed; J v by a central difference of the force."""
    x, h = model.clamp(inputs).detach(), 1e-4
    with torch.no_grad():
        moved = probe + STEP * (model.block(z + h * probe, x) - model.block(z - h * probe, x)) / (2 * h)
    excess = (norm(moved) / norm(probe) - target).clamp_min(0)
    return strength * excess.square().mean().item(), excess


@pytest.mark.parametrize("products", [0, 2])
def test_gradient_is_the_finite_difference_with_state_and_probe_held(products):
    model, inputs, z = small()
    controller = ContractionRate(target=0.5, strength=3.0, products=products)
    outcome = controller(at(model, inputs, z), STEP)
    probe = refined_probe(model, inputs, z, products)
    value, excess = penalty(model, inputs, z, probe, 0.5, 3.0)
    assert (excess > 0).any()
    assert outcome.measured["penalty"] == pytest.approx(value, rel=1e-6)
    assert outcome.measured["rate_probe"] == pytest.approx(excess.max().item() + 0.5, rel=1e-6)
    assert set(outcome.grads) == {name for name, _ in model.named_parameters() if name.startswith("block.")}
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name not in outcome.grads:
            continue
        direction = torch.randn_like(parameter)
        values = []
        for h in (1e-4, -1e-4):
            with torch.no_grad():
                parameter.add_(h * direction)
                values.append(penalty(model, inputs, z, probe, 0.5, 3.0)[0])
                parameter.sub_(h * direction)
        slope = (values[0] - values[1]) / 2e-4
        assert (outcome.grads[name] * direction).sum().item() == pytest.approx(slope, rel=1e-3, abs=1e-5), name
    assert any(grad.abs().max() > 1e-3 for grad in outcome.grads.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_is_asked_of_samples_below_the_target():
    model, inputs, z = small()
    rate = ContractionRate()(at(model, inputs, z), STEP).measured["rate_probe"]
    assert 0 < rate < 0.99
    quiet = ContractionRate(target=rate + 1e-3)(at(model, inputs, z), STEP)
    assert quiet.measured["penalty"] == 0.0 and all(not grad.any() for grad in quiet.grads.values())
    assert quiet.measured["rate_probe"] == pytest.approx(rate)
    acting = ContractionRate(target=rate - 1e-3)(at(model, inputs, z), STEP)
    assert acting.measured["penalty"] > 0 and acting.evaluations > quiet.evaluations
    settled = torch.zeros_like(z)  # a state at which the force, and so the probe, is exactly zero
    model.block.forward = lambda z, x: torch.zeros_like(z)
    zero = ContractionRate()(at(model, inputs, settled), STEP)
    assert zero.measured["rate_probe"] == 0.0 and all(grad.isfinite().all() for grad in zero.grads.values())


def test_the_penalty_is_a_mean_over_the_batch_and_only_samples_above_the_target_enter():
    model, inputs, z = small()
    rates = torch.tensor([ContractionRate()(at(model, inputs[i:i + 1], z[i:i + 1]), STEP).measured["rate_probe"]
                          for i in range(4)], dtype=torch.float64)
    worst, second = rates.argsort(descending=True)[:2]
    controller = ContractionRate(target=float(rates[worst] + rates[second]) / 2)
    alone = controller(at(model, inputs[worst][None], z[worst][None]), STEP)
    among = controller(at(model, inputs, z), STEP)
    assert alone.measured["penalty"] > 0
    assert among.measured["penalty"] == pytest.approx(alone.measured["penalty"] / 4, rel=1e-9)
    assert among.measured["rate_probe_mean"] == pytest.approx(rates.mean().item(), rel=1e-9)
    for name, grad in alone.grads.items():
        assert torch.allclose(among.grads[name], grad / 4, rtol=1e-7, atol=1e-12), name
    both = controller(at(model, inputs.repeat(2, 1), z.repeat(2, 1, 1)), STEP)
    assert both.measured["penalty"] == pytest.approx(among.measured["penalty"], rel=1e-9)


@pytest.mark.parametrize("step", [0.3, 0.9])  # the mode nearest to 0 leads, then the one that overshoots
def test_the_probe_finds_the_dominant_real_eigenvalue_of_a_linear_system(step):
    model, (inputs, _) = linear_system(symmetric=True), linear_batch()
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = 1 + step * torch.linalg.eigvalsh(model.block.matrix.detach())
    rate = ContractionRate(products=300)(at(model, inputs, z), step).measured
    assert rate["rate_probe"] == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert rate["rate_probe_mean"] == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert spectra.contraction_rate(model, inputs, z, step) == pytest.approx(values.abs().max().item(), rel=1e-9)


def test_descending_the_penalty_lowers_the_rate():
    model, inputs, z = small()
    controller = ContractionRate(target=0.3)
    rates = []
    for _ in range(5):
        outcome = controller(at(model, inputs, z), STEP)
        rates.append(outcome.measured["rate_probe_mean"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in outcome.grads:
                    parameter -= 1e-4 * outcome.grads[name]
    assert all(b < a for a, b in zip(rates, rates[1:], strict=False))


# --- spectra

@pytest.mark.parametrize("kind", ["language", "image"])
def test_spectral_radius_of_a_transformer_equals_the_dense_one(kind):
    model, inputs, _ = transformer(kind)
    z = model.settle(inputs, Relaxation(step=0.3, max_steps=300, tol=1e-9)).value
    truth = [torch.linalg.eigvals(torch.eye(len(j), dtype=torch.float64) + STEP * j) for j in dense(model, inputs, z)]
    leading = torch.stack([values.abs().max() for values in truth])
    assert spectra.contraction_rate(model, inputs, z, STEP, size=z[0].numel()) == pytest.approx(leading, rel=1e-8)
    assert spectra.contraction_rate(model, inputs, z, STEP) == pytest.approx(leading, rel=1e-2)
    jacobian = model.block.linearise(z, model.clamp(inputs).detach())
    start = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    found = spectra.spectrum(lambda v: v + STEP * jacobian.product(v), start, size=z[0].numel())
    for ritz, values in zip(found, truth, strict=True):
        order = values.abs().argsort(descending=True)[:6]
        assert any(value.imag.abs() > 1e-3 for value in values[order])  # complex pairs are among the leading ones
        for value in values[order]:
            assert (ritz - value).abs().min() < 1e-6, value


def test_ritz_values_of_a_map_with_a_complex_pair_and_an_early_end():
    """Eigenvalues 0.9 exp(+-i) and 0.5, 0.2 twice: Arnoldi ends after four vectors (minimal polynomial)."""
    pair = 0.9 * torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / 2**0.5
    matrix = torch.block_diag(pair, torch.diag(torch.tensor([0.5, 0.2, 0.2], dtype=torch.float64)))
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    matrix = basis @ matrix @ basis.T
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for ritz in spectra.spectrum(lambda v: v @ matrix.T, start):
        assert len(ritz) == 4
        for value in (complex(0.9 / 2**0.5, 0.9 / 2**0.5), complex(0.9 / 2**0.5, -0.9 / 2**0.5), 0.5, 0.2):
            assert (ritz - value).abs().min() < 1e-10, value


def test_the_real_probe_does_not_resolve_a_rotation_and_the_spectrum_does():
    """Why rate_probe and rate_arnoldi are logged apart: a shear turns a rotating mode's growth up and down."""
    model = linear_system(symmetric=False)
    turn = torch.tensor([[0.0, -4.0], [0.25, 0.0]], dtype=torch.float64)  # eigenvalues +-i, far from normal
    with torch.no_grad():
        model.block.matrix.copy_((torch.block_diag(0.9 * turn, 0.1 * torch.eye(4)) - torch.eye(6)) / STEP)
    (inputs, _), z = linear_batch(), torch.zeros(5, 6, dtype=torch.float64)
    assert spectra.contraction_rate(model, inputs, z, STEP) == pytest.approx(torch.full_like(z[:, 0], 0.9), rel=1e-9)
    seen = [ContractionRate(products=n)(at(model, inputs, z), STEP).measured["rate_probe"] for n in (20, 21)]
    assert max(seen) > 1.5


def test_a_penalty_at_a_cadence_costs_nothing_in_between():
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=7, width=8, heads=2, context=6, block=blocks.Thick(init=1.0))
    inputs, state, seen = torch.randint(7, (3, 6)), {}, []
    for _ in range(5):
        report = eplib.gradient(model, inputs, inputs, estimator=estimators.DyadicEP(), solver=SETTLE, state=state,
                                penalties=(ContractionRate(target=0.1, every=2),))
        state = report.state
        seen.append(bool(report.penalty_grads))
        assert ("rate_probe" in report.measured) == seen[-1]
    assert seen == [True, False, True, False, True]
