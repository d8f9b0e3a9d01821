"""The contraction-rate penalty against finite differences, and spectra against dense eigenvalues."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import eplib
from eplib import blocks, diagnostics, estimators, models, spectra
from eplib.controllers import (
    KEPT,
    ContractionRate,
    Homeostasis,
    Integral,
    JacobianNorm,
    LeadingMode,
    NumericalAbscissa,
    ResidualDriven,
    ResidualPenalty,
)
from eplib.estimators import Problem
from eplib.solvers import Relaxation, norm
from systems import linear_batch, linear_system, transformer

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
    outcome = controller(at(model, inputs, z), STEP, {})
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
    rate = ContractionRate()(at(model, inputs, z), STEP, {}).measured["rate_probe"]
    assert 0 < rate < 0.99
    quiet = ContractionRate(target=rate + 1e-3)(at(model, inputs, z), STEP, {})
    assert quiet.measured["penalty"] == 0.0 and all(not grad.any() for grad in quiet.grads.values())
    assert quiet.measured["rate_probe"] == pytest.approx(rate)
    acting = ContractionRate(target=rate - 1e-3)(at(model, inputs, z), STEP, {})
    assert acting.measured["penalty"] > 0 and acting.evaluations > quiet.evaluations
    settled = torch.zeros_like(z)  # a state at which the force, and so the probe, is exactly zero
    model.block.forward = lambda z, x: torch.zeros_like(z)
    zero = ContractionRate()(at(model, inputs, settled), STEP, {})
    assert zero.measured["rate_probe"] == 0.0 and all(grad.isfinite().all() for grad in zero.grads.values())


def test_the_penalty_is_a_mean_over_the_batch_and_only_samples_above_the_target_enter():
    model, inputs, z = small()
    rates = torch.tensor([ContractionRate()(at(model, inputs[i:i + 1], z[i:i + 1]), STEP, {}).measured["rate_probe"]
                          for i in range(4)], dtype=torch.float64)
    worst, second = rates.argsort(descending=True)[:2]
    controller = ContractionRate(target=float(rates[worst] + rates[second]) / 2)
    alone = controller(at(model, inputs[worst][None], z[worst][None]), STEP, {})
    among = controller(at(model, inputs, z), STEP, {})
    assert alone.measured["penalty"] > 0
    assert among.measured["penalty"] == pytest.approx(alone.measured["penalty"] / 4, rel=1e-9)
    assert among.measured["rate_probe_mean"] == pytest.approx(rates.mean().item(), rel=1e-9)
    for name, grad in alone.grads.items():
        assert torch.allclose(among.grads[name], grad / 4, rtol=1e-7, atol=1e-12), name
    both = controller(at(model, inputs.repeat(2, 1), z.repeat(2, 1, 1)), STEP, {})
    assert both.measured["penalty"] == pytest.approx(among.measured["penalty"], rel=1e-9)


@pytest.mark.parametrize("step", [0.3, 0.9])  # the mode nearest to 0 leads, then the one that overshoots
def test_the_probe_finds_the_dominant_real_eigenvalue_of_a_linear_system(step):
    model, (inputs, _) = linear_system(symmetric=True), linear_batch()
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = 1 + step * torch.linalg.eigvalsh(model.block.matrix.detach())
    rate = ContractionRate(products=300)(at(model, inputs, z), step, {}).measured
    assert rate["rate_probe"] == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert rate["rate_probe_mean"] == pytest.approx(values.abs().max().item(), rel=1e-6)
    assert spectra.contraction_rate(model, inputs, z, step) == pytest.approx(values.abs().max().item(), rel=1e-9)


def test_descending_the_penalty_lowers_the_rate():
    model, inputs, z = small()
    controller = ContractionRate(target=0.3)
    rates = []
    for _ in range(5):
        outcome = controller(at(model, inputs, z), STEP, {})
        rates.append(outcome.measured["rate_probe_mean"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in outcome.grads:
                    parameter -= 1e-4 * outcome.grads[name]
    assert all(b < a for a, b in pairwise(rates))


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
    seen = [ContractionRate(products=n)(at(model, inputs, z), STEP, {}).measured["rate_probe"] for n in (20, 21)]
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


# --- every penalty is the formula of its docstring, with the state and its directions held

def pieces(model, z):
    """J of each sample as a function of the weights, (B, n, n), by autograd of the force with a graph in the weights."""
    x = model.block.start(z)  # any clamp: J does not depend on it
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        return _pieces(model, z, x)


def _pieces(model, z, x):
    return torch.stack([torch.autograd.functional.jacobian(lambda s, i=i: model.block(s, x[i:i + 1]).flatten(), z[i:i + 1],
                                                           create_graph=True).flatten(1) for i in range(len(z))])


def unit_draw(z, seed):
    v = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (v / norm(v).view(-1, 1, 1)).flatten(1)


def krylov(model, z, force, step, products, size):
    js = pieces(model, z).detach()
    iterates = [force.flatten(1)]
    for _ in range(products + size - 1):
        iterates.append(torch.stack([v + step * j @ v for v, j in zip(iterates[-1], js, strict=True)]))
        iterates[-1] = iterates[-1] / iterates[-1].norm(dim=1, keepdim=True)
    return torch.linalg.qr(torch.stack(iterates[-size:], -1))[0]  # (B, n, size)


def norm_formula(model, z, force):
    v, eye = unit_draw(z, 0), torch.eye(z[0].numel(), dtype=z.dtype)
    return 3.0 * ((pieces(model, z) + 1.25 * eye) @ v.unsqueeze(-1)).square().sum((1, 2)).mean()


def homeostasis_formula(model, z, force):
    j, v = pieces(model, z), unit_draw(z, 0)
    return 1.5 * ((j - j.mT) @ v.unsqueeze(-1)).square().sum((1, 2)).mean()


def mode_formula(model, z, force):
    q = krylov(model, z, force, 0.3, 4, 2)
    alpha = torch.linalg.eigvals(q.mT @ pieces(model, z) @ q).real.amax(-1)
    return 50.0 * (alpha + 0.9).clamp_min(0).square().mean()


def pair_formula(model, z, force):
    q = krylov(model, z, force, STEP, 2, 2)
    small = q.mT @ (torch.eye(z[0].numel(), dtype=z.dtype) + STEP * pieces(model, z)) @ q
    return 20.0 * (torch.linalg.eigvals(small).abs().amax(-1) - 0.3).clamp_min(0).square().mean()


def token_rates(model, z, force, step=STEP):
    tokens, width = z.shape[1:]
    blocks_ = pieces(model, z).unflatten(1, (tokens, width)).unflatten(3, (tokens, width))
    own = torch.stack([blocks_[:, t, :, t] for t in range(tokens)], 1)  # (B, T, C, C)
    move = torch.eye(width, dtype=z.dtype) + step * own
    v = force
    for _ in range(2):
        v = (move.detach() @ v.unsqueeze(-1)).squeeze(-1)
        v = v / v.norm(dim=-1, keepdim=True)
    return (move @ v.unsqueeze(-1)).squeeze(-1).norm(dim=-1)  # (B, T)


def token_formula(model, z, force):
    return 20.0 * (token_rates(model, z, force).amax(-1) - 0.3).clamp_min(0).square().mean()


def residual_formula(model, z, force):
    return 100.0 * (norm(model.block(z, model.held)) / norm(z)).square().mean()


def numerical_formula(model, z, force):
    j, v = pieces(model, z), force.flatten(1).unsqueeze(-1)
    s, columns = (j + j.mT).detach() / 2, []
    for _ in range(4):
        columns.append(v / v.norm(dim=1, keepdim=True))
        v = s @ columns[-1]
    q = torch.linalg.qr(torch.cat(columns, -1))[0]  # (B, n, 4)
    top = q @ torch.linalg.eigh(q.mT @ s @ q)[1][..., -1:]
    return 3.0 * ((top.mT @ j @ top).flatten() + 0.5).clamp_min(0).square().mean()


PENALTIES = {
    "numerical": (NumericalAbscissa(bound=-0.5, strength=3.0), numerical_formula),
    "norm": (JacobianNorm(strength=3.0), norm_formula), "homeostasis": (Homeostasis(strength=1.5), homeostasis_formula),
    "mode": (LeadingMode(margin=0.9), mode_formula), "residual": (ResidualPenalty(), residual_formula),
    "pair": (ContractionRate(target=0.3, strength=20.0, probes=2), pair_formula),
    "token": (ContractionRate(target=0.3, strength=20.0, per="token"), token_formula)}


@pytest.mark.parametrize("name", PENALTIES)
def test_value_and_gradient_are_those_of_the_formula(name):
    controller, formula = PENALTIES[name]
    model, inputs, _ = transformer(damping=0.25)
    z = model.settle(inputs, SETTLE).value
    model.held = model.clamp(inputs).detach()
    outcome = controller(at(model, inputs, z), STEP, {})
    value = formula(model, z, model.block(z, model.held).detach())
    assert value > 0 and outcome.measured["penalty"] == pytest.approx(value.item(), rel=1e-7)
    parameters = {f"block.{k}": p for k, p in model.block.named_parameters()}
    truth = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, materialize_grads=True)
    assert set(outcome.grads) == set(parameters)
    for key, grad in zip(parameters, truth, strict=True):
        assert torch.allclose(outcome.grads[key], grad, rtol=1e-6, atol=1e-9 * value.item()), key


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_states_what_it_costs(name, monkeypatch):
    """Every force, linearisation and product, without a graph once and with one three times, and a contraction twice: a
    backward pass is two."""
    controller, _ = PENALTIES[name]
    model, inputs, _ = transformer(damping=0.25)
    z = model.settle(inputs, SETTLE).value
    spent = {"plain": 0, "graph": 0.0, "contracted": 0.0}

    def counting(cls, method):
        original = getattr(cls, method)

        def counted(self, *arguments):
            kind = "contracted" if method == "contract" else "graph" if torch.is_grad_enabled() else "plain"
            spent[kind] += len(arguments[0]) / len(z)
            return original(self, *arguments)

        monkeypatch.setattr(cls, method, counted)

    problem = at(model, inputs, z)
    assert problem.jacobian  # which all share, so no penalty counts it
    for method in ("product", "transposed", "token_product", "contract"):
        counting(blocks.Jacobian, method)
    for method in ("forward", "linearise"):
        counting(blocks.EquilibriumBlock, method)
    outcome = controller(problem, STEP, {})
    assert spent["graph"] + spent["contracted"] > 0
    assert outcome.evaluations == math.ceil(spent["plain"] + 3 * spent["graph"] + 2 * spent["contracted"])


def test_two_probes_resolve_a_complex_pair_that_one_does_not():
    model, (inputs, _) = linear_system(symmetric=False), linear_batch()
    turn = torch.tensor([[-0.2, 1.5], [-0.3, -0.2]], dtype=torch.float64)  # eigenvalues -0.2 +- 0.67 i, far from normal
    with torch.no_grad():
        model.block.matrix.copy_(torch.block_diag(turn, -torch.eye(4, dtype=torch.float64)))
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    radius = (1 + 0.5 * torch.linalg.eigvals(turn)).abs().max().item()
    pair = ContractionRate(products=40, probes=2)(at(model, inputs, z), 0.5, {}).measured
    assert pair["rate_probe"] == pytest.approx(radius, rel=1e-6)
    one = [ContractionRate(products=40 + i)(at(model, inputs, z), 0.5, {}).measured["rate_probe_mean"] for i in range(8)]
    assert max(one) - min(one) > 0.02  # it turns on and on
    mode = LeadingMode(products=40, margin=0.1)(at(model, inputs, z), 0.5, {}).measured
    assert mode["abscissa_probe"] == pytest.approx(-0.2, abs=1e-6)


def test_the_driven_coefficient_follows_the_residual_between_floor_and_ceiling():
    driven, carried = ResidualDriven(target=1e-2, floor=0.5, ceiling=4.0, gain=0.5, smoothing=0.0), {}
    assert driven(1e-2, carried, 1.0) == pytest.approx(1.0)
    assert driven(4e-2, carried, 1.0) == pytest.approx(2.0)
    assert driven(float("nan"), carried, 1.0) == 4.0  # an exploded phase drives it up, to the ceiling
    values = [driven(1e-6, carried, 1.0) for _ in range(3)]
    assert values[-1] == 0.5 and driven(0.0, carried, 1.0) == 0.5  # never to zero
    with pytest.raises(ValueError, match="floor"):
        ResidualDriven(floor=2.0, ceiling=1.0)
    model, inputs, z = small()
    problem, driven = at(model, inputs, z), ResidualDriven(target=1e-9, ceiling=1e6)
    first = JacobianNorm(strength=1.0, driven=driven)(problem, STEP, carried := {}).measured["coefficient"]
    assert JacobianNorm(strength=1.0, driven=driven)(problem, STEP, carried).measured["coefficient"] > first > 1


def test_the_numerical_abscissa_is_found_to_its_last_digit_where_the_span_is_whole():
    model, inputs, _ = transformer(damping=0.25)
    z = model.settle(inputs, SETTLE).value
    seen = NumericalAbscissa(size=z[0].numel(), bound=-9.0)(at(model, inputs, z), STEP, {}).measured["numerical_probe"]
    j = pieces(model, z).detach()
    assert seen == pytest.approx(torch.linalg.eigvalsh((j + j.mT) / 2).amax().item(), rel=1e-8)


def test_the_integral_strength_rises_while_too_many_are_above_and_never_leaves_its_bounds():
    control, carried = Integral(quantile=0.9, gain=0.1, floor=1.0, ceiling=40.0), {}
    above = control(0.25, carried, 10.0)
    assert above == pytest.approx(10.0 * math.exp(0.15))  # two and a half times what is allowed
    assert control(0.1, carried, 10.0) == pytest.approx(above) == float(carried["coefficient"])  # at the target it stands
    for share, end in ((1.0, 40.0), (0.0, 1.0)):
        for _ in range(50):
            last = control(share, carried, 10.0)
        assert last == end
    assert control(0.2, carried, 10.0) == pytest.approx(math.exp(0.1))  # it has not wound up
    carried[KEPT] = torch.tensor(0.5)  # the trainer cut the last gradient
    assert control(1.0, carried, 10.0) == pytest.approx(math.exp(0.1))
    assert control(0.0, carried, 10.0) == pytest.approx(1.0)
    surge = Integral(quantile=0.9999, gain=0.1)(1.0, {}, 100.0)
    assert surge == pytest.approx(100.0 * math.e)  # a whole batch above is no explosion
    with pytest.raises(ValueError, match=r"ceiling 1.0 is below floor 2.0"):
        Integral(floor=2.0, ceiling=1.0)


def test_a_driven_rate_is_the_chosen_quantile_of_all_tokens():
    model, inputs, _ = transformer(damping=0.25)
    z = model.settle(inputs, SETTLE).value
    model.held = model.clamp(inputs).detach()
    rates = token_rates(model, z, model.block(z, model.held).detach(), 0.25).detach()
    target = (rates.flatten().sort().values[-3:-1].mean()).item()  # two tokens are above
    fixed = ContractionRate(target=target, strength=20.0, per="token", step=0.25)
    driven = ContractionRate(target=target, strength=20.0, per="token", step=0.25, driven=Integral(quantile=0.8, floor=0.1))
    assert torch.allclose(driven.rates(at(model, inputs, z), STEP), rates, rtol=1e-9)
    carried: dict = {}
    found, plain = driven(at(model, inputs, z), STEP, carried), fixed(at(model, inputs, z), STEP, {})
    assert found.measured["rate_quantile"] == pytest.approx(rates.flatten().quantile(0.8).item(), rel=1e-9)
    assert found.measured["rate_above"] == pytest.approx(2 / rates.numel())
    strength = 20.0 * math.exp(0.02 * (2 / rates.numel() / 0.2 - 1))
    assert found.measured["rate_coefficient"] == pytest.approx(strength) == float(carried["coefficient"])
    assert found.measured["penalty"] == pytest.approx(plain.measured["penalty"] * strength / 20.0) and plain.grads
    for name, grad in plain.grads.items():
        assert torch.allclose(found.grads[name], grad * (strength / 20.0), rtol=1e-6, atol=1e-12), name
    assert found.evaluations == plain.evaluations


def test_the_loop_closes_at_the_target_where_a_fixed_strength_gives_way():
    """Against weights that grow at every step, which pushes the rates up without end."""
    def last(controller):
        model, inputs, _ = transformer(damping=0.25)
        carried, seen = {}, []
        for _ in range(120):
            outcome = controller(at(model, inputs, model.settle(inputs, SETTLE).value), STEP, carried)
            seen.append(outcome.measured["rate_probe"])
            with torch.no_grad():
                for name, value in model.named_parameters():
                    if name in outcome.grads:
                        value.add_(outcome.grads[name], alpha=-1e-3)
                    if name.startswith("block.") and value.dim() > 1:
                        value.mul_(1.005)
        return seen[-20:]

    assert min(last(ContractionRate(target=0.7, strength=0.5, per="token"))) > 0.9
    held = last(ContractionRate(target=0.7, strength=0.5, per="token", driven=Integral(quantile=0.9, floor=0.1)))
    assert min(held) > 0.65 and max(held) < 0.8


def test_penalties_add_up_and_are_the_same_with_every_estimator():
    model, inputs, targets = transformer()
    both = (JacobianNorm(strength=2.0), ContractionRate(target=0.3))
    solver = Relaxation(step=0.3, max_steps=400, tol=1e-10)
    found = [eplib.gradient(model, inputs, targets, estimator=kind, solver=solver, penalties=both)
             for kind in (estimators.DyadicEP(), estimators.OneStep(), estimators.BPTT(steps=400))]
    assert found[0].measured["penalty"] > max(
        eplib.gradient(model, inputs, targets, estimator=estimators.OneStep(), solver=solver,
                       penalties=(one,)).measured["penalty"] for one in both)
    alone = eplib.gradient(model, inputs, targets, estimator=estimators.OneStep(), solver=solver, penalties=both[:1])
    assert alone.penalty_grads and alone.penalty_grads.keys() == found[1].penalty_grads.keys()
    for name, grad in alone.penalty_grads.items():
        assert not torch.allclose(grad, found[1].penalty_grads[name]), name
        assert torch.equal(found[0].penalty_grads[name], found[1].penalty_grads[name]), name


def test_per_token_needs_a_causal_block_and_one_probe():
    model, inputs, _ = transformer("image")
    z = model.settle(inputs, SETTLE).value
    with pytest.raises(TypeError, match="causal"):
        ContractionRate(per="token")(at(model, inputs, z), STEP, {})
    with pytest.raises(ValueError, match="one probe"):
        ContractionRate(per="token", probes=2)
    model, inputs, z = small()
    model.block.layers.w1.register_forward_hook(lambda *rest: None)
    with pytest.raises(TypeError, match="not altered since it was built"):
        ContractionRate(per="token")(at(model, inputs, z), STEP, {})


@pytest.mark.parametrize("config", [blocks.Thin(init=1.0), blocks.Attractor(init=1.0)], ids=lambda config: config.kind)
def test_per_token_is_for_every_causal_block_with_a_derivative_by_hand(config):
    model, inputs, _ = transformer()
    model.block = config.build(16, 4, 6).double()
    z = model.settle(inputs, Relaxation(step=0.3, max_steps=30, tol=1e-10)).value
    found = ContractionRate(target=0.1, products=0, per="token")(at(model, inputs, z), STEP, {})
    push, rates = model.block(z, model.clamp(inputs)).detach(), []
    for sample, matrix in enumerate(dense(model, inputs, z)):
        for t in range(6):
            v, own = push[sample, t], matrix.view(6, 16, 6, 16)[t, :, t]
            rates.append(((v + STEP * own @ v).norm() / v.norm()).item())
    assert found.measured["rate_probe"] == pytest.approx(max(rates), rel=1e-9)
    assert any(grad.abs().max() > 1e-6 for grad in found.grads.values())


@pytest.mark.parametrize("part", ["model", "block"])
def test_a_penalty_of_a_compiled_model_has_the_models_own_names(part):
    model, inputs, z = small()
    plain = ContractionRate(target=0.3)(at(model, inputs, z), STEP, {}).grads
    if part == "model":
        model = torch.compile(model, backend="eager")
    else:
        model.block = torch.compile(model.block, backend="eager")
    found = ContractionRate(target=0.3)(at(model, inputs, z), STEP, {}).grads
    assert found.keys() <= dict(model.named_parameters()).keys()
    assert {name.replace("_orig_mod.", "") for name in found} == plain.keys()
    assert all(torch.allclose(grad, plain[name.replace("_orig_mod.", "")]) for name, grad in found.items())


# --- spectra of a causal block, token by token, and what else a fingerprint holds

def settled(kind="language"):
    model, inputs, targets = transformer(kind)
    z = model.settle(inputs, Relaxation(step=0.3, max_steps=400, tol=1e-10)).value
    return model, inputs, targets, z, model.block.linearise(z, model.clamp(inputs).detach()), dense(model, inputs, z)


def test_the_spectrum_of_a_causal_block_is_that_of_its_tokens():
    _, _, _, z, jacobian, matrices = settled()
    found = spectra.token_spectra(jacobian, z)
    for values, matrix in zip(found, matrices, strict=True):
        truth = list(torch.linalg.eigvals(matrix))
        for value in values.flatten():  # as sets: each is one of the dense ones, which is then used up
            nearest = min(range(len(truth)), key=lambda i: (truth[i] - value).abs().item())
            assert (truth.pop(nearest) - value).abs() < 1e-6
        assert not truth


@pytest.mark.parametrize("kind", ["language", "image"])
def test_matrix_free_measures_equal_the_dense_ones(kind):
    _, _, _, z, jacobian, matrices = settled(kind)
    size = z[0].numel()
    leading = spectra.eigenvalues(jacobian, z, size)
    abscissa = spectra.numerical_abscissa(jacobian, z)
    growth = spectra.transient_growth(jacobian, z, STEP, counts=(1, 4), rounds=200)
    rho, residual = spectra.asymmetry_radius(jacobian, z, size=size, tol=1e-12)
    assert residual.max() < 1e-8
    for b, matrix in enumerate(matrices):
        s, a = (matrix + matrix.mT) / 2, (matrix - matrix.mT) / 2
        assert leading[b][0].real.item() == pytest.approx(torch.linalg.eigvals(matrix).real.max().item(), abs=1e-6)
        assert abscissa[b].item() == pytest.approx(torch.linalg.eigvalsh(s)[-1].item(), rel=1e-4)
        move = torch.eye(size, dtype=z.dtype) + STEP * matrix
        for k, found in zip((1, 4), growth[b], strict=True):
            largest = torch.linalg.matrix_norm(torch.linalg.matrix_power(move, k), 2).item()
            assert 0.998 * largest < found.item() < largest * (1 + 1e-9)  # a lower bound, tight to what the gap allows
        assert rho[b].item() == pytest.approx(torch.linalg.eigvals(torch.linalg.solve(s, a)).abs().max().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["language", "image"])
def test_a_fingerprint_is_one_call_on_a_model(kind):
    model, inputs, targets, z, jacobian, matrices = settled(kind)
    solver = Relaxation(step=0.3, max_steps=400, tol=1e-10)
    found = diagnostics.fingerprint(model, inputs, targets, solver, step=STEP)
    values = [torch.linalg.eigvals(matrix) for matrix in matrices]
    assert found["abscissa"] == pytest.approx(max(v.real.max().item() for v in values), abs=1e-4)
    assert found["rate_arnoldi"] == pytest.approx(max((1 + STEP * v).abs().max().item() for v in values), rel=1e-3)
    assert -1 <= found["cosine_uncorrected"] < 0.999 and found["asymmetry"] > 0.1
    weights = jacobian.inner.branches[0].branch.weights
    by_hand = sum(weights[:, :, t, s].mean().item() * abs(t - s) for t in range(z.shape[1]) for s in range(z.shape[1]))
    assert found["attention_distance"] == pytest.approx(by_hand / z.shape[1], rel=1e-9)
    with torch.no_grad():
        model.block.layers.w2.weight.fill_(math.nan)
    broken = diagnostics.fingerprint(model, inputs, targets, solver)
    assert set(broken) == set(found) and all(math.isnan(value) for name, value in broken.items() if name != "residual")


def test_the_rate_penalty_has_a_local_form_without_a_second_derivative():
    """With r = |(I + s J) v| / |v|, v and the state held, dr = (s / |v|) <w, dJ v>, w the unit vector along (I + s J) v; and
    <w, dJ v> is the contrast of two read-outs <w, dF>, at the states z + eps v and z - eps v: outer products of local
    quantities, as in the read-out of the gradient itself. The error is of second order in eps."""
    model, inputs, z = small()
    penalty = ContractionRate(target=0.3, products=2)
    asked = penalty(at(model, inputs, z), STEP, {}).grads
    problem = at(model, inputs, z)
    errors = []
    with torch.no_grad():
        v = penalty._probe(problem, STEP)[0]
        moved = v + STEP * problem.jacobian.product(v)
        size, grown = (norm(part).view(-1, 1, 1) for part in (v, moved))
        excess = grown / size - penalty.target
        assert (excess > 0).all()
        w = 2 * penalty.strength / len(z) * excess * STEP / size * moved / grown
        for eps in (1e-2, 1e-3):
            ahead, behind = (problem.linearise(z + side * eps * v / size).contract(w * size)[0] for side in (1, -1))
            local = {f"block.{name}": (value - behind[name]) / (2 * eps) for name, value in ahead.items()}
            assert set(local) <= set(asked)
            errors.append(max((value - asked[name]).norm().item() / asked[name].norm().item() for name, value in local.items()))
    assert errors[1] < 1e-4 and 50 < errors[0] / errors[1] < 200, errors


@pytest.mark.usefixtures("compiled_kernel")
def test_single_tokens_are_held_in_the_kernel_as_in_pytorch():
    """Probe and gradient, in float32: the contrast of two contractions is right to the square root of what a token is moved
    by."""
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Thick(init=0.6))
    inputs = torch.randint(0, 11, (5, 6))
    x, solver = model.clamp(inputs).detach(), Relaxation(step=0.5, max_steps=200, tol=1e-4)
    z, controller = solver.settle(model.block, x).value, ContractionRate(target=0.3, per="token")
    plain, fast = (controller(Problem(model, inputs, inputs, x, z, dynamics=model.dynamics(backend)), STEP, {})
                   for backend in ("torch", "compiled"))
    assert fast.measured["rate_probe"] == pytest.approx(plain.measured["rate_probe"], rel=1e-3)
    for agreed in diagnostics.agreement(fast.grads, plain.grads).values():
        assert agreed.cosine > 0.999 and agreed.ratio == pytest.approx(1, abs=1e-2)
