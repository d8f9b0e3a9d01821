"""E6 and E8: what is measured against closed forms, and verdicts on evidence made up so that they are known."""

import math
from types import SimpleNamespace

import pytest
import torch

from eplib import estimators
from eplib.controllers import ContractionRate
from eplib.diagnostics import adjoint_gradient, dense_jacobian
from eplib.experiments import echo, hardware, physics
from eplib.experiments.hardware import Point
from eplib.optimisers import Device, Optimiser
from eplib.solvers import Anderson
from systems import TIGHT, linear_batch, linear_system, transformer

SOLVER = Anderson(step=0.3, max_steps=300, tol=1e-6)


def chain(damping: float = 0.0) -> tuple[echo.Chain, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    raw = 0.2 * torch.randn(4, 4, dtype=torch.float64)
    return (echo.Chain(torch.eye(4, dtype=torch.float64) + (raw + raw.mT) / 2, damping, 0.05, 40),
            torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64))


def test_an_echo_without_friction_is_backpropagation_through_the_motion():
    system, start, goal = chain()
    exact, found = echo.backprop(system, start, goal), echo.echo(system, start, goal)
    assert (found - exact).norm() < 1e-6 * exact.norm()
    back, _ = system.run(*(sign * part for sign, part in zip((1, -1), system.run(start, 0 * start), strict=True)))
    assert torch.allclose(back, start, atol=1e-12)  # time reversal


def test_friction_takes_the_echo_away():
    errors = []
    for damping in (0.0, 0.1, 1.0):
        system, start, goal = chain(damping)
        exact = echo.backprop(system, start, goal)
        errors.append(((echo.echo(system, start, goal) - exact).norm() / exact.norm()).item())
    assert errors[0] < 1e-6 < errors[1] < errors[2]


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_construction_has_the_ratio_asked_for_at_one_spectrum(ratio):
    point, matrix = physics.routes(ratio), physics.skewed(ratio)
    assert point["rho"] == pytest.approx(ratio) and torch.allclose(
        torch.linalg.eigvals(matrix).real, -torch.ones(6, dtype=torch.float64))
    assert all(point[route] > 1 - 1e-8 for route in physics.FORWARD) and point["vector_field"] < 0.9


def test_growth_and_kreiss_of_a_shear_and_of_a_normal_matrix():
    shear = torch.tensor([[-1.0, 8.0], [0.0, -1.0]], dtype=torch.float64)  # exp(tJ) = exp(-t) (1, 8t; 0, 1)
    norms = [torch.linalg.matrix_norm(math.exp(-t) * torch.tensor([[1.0, 8 * t], [0.0, 1.0]]), 2).item()
             for t in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)]
    assert physics.growth(shear) == pytest.approx(max(norms), rel=1e-6)
    assert 1.2 < physics.kreiss(shear) <= max(norms)
    normal = torch.diag(torch.tensor([-1.0, -3.0], dtype=torch.float64))
    assert physics.growth(normal) == physics.kreiss(normal) == 1.0


def test_the_operator_of_a_checkpoint_is_that_of_its_dense_jacobian():
    model, inputs, targets = transformer(init=0.3)
    found = physics.operator(model, inputs[:1], targets[:1], 0.5)
    z = model.settle(inputs[:1], TIGHT).value
    j = dense_jacobian(model, model.clamp(inputs[:1]).detach(), z)
    assert found["numerical_abscissa"] == pytest.approx(torch.linalg.eigvalsh((j + j.mT) / 2)[-1].item(), abs=1e-6)
    assert found["asymmetry"] == pytest.approx(((j - j.mT).norm() / (j + j.mT).norm()).item(), abs=1e-6)
    assert all(found[route] > 1 - 1e-6 for route in physics.FORWARD) and found["vector_field"] < found["twin"]
    assert found["growth"] >= 1 and found["kreiss"] <= found["growth"] * math.e * len(j)


def test_bptts_error_falls_as_the_rate_to_the_power_of_the_horizon():
    system, (inputs, targets) = linear_system(symmetric=True), linear_batch()
    found = physics.horizons(system, inputs[:1], targets[:1], 0.5, (8, 12, 16, 20, 24))
    rate = (1 + 0.5 * torch.linalg.eigvals(system.block.matrix.detach())).abs().max().item()
    assert found["radius"] == pytest.approx(rate) and physics.decay(found) == pytest.approx(1.0, abs=0.15)
    made_up = {"radius": 0.5, "errors": [{"steps": k, "error": 0.7**k} for k in (5, 10, 20)]}
    assert physics.decay(made_up) == pytest.approx(math.log(0.7) / math.log(0.5))
    assert physics.decay({"radius": None, "errors": []}) is None
    assert physics.norm_slope([{"radius": 1 - 1 / k, "norm": k**2} for k in (2, 4, 8)]) == pytest.approx(2.0)


def run(arm, loss, seed=0, **config):
    made = SimpleNamespace(arm=arm, seed=seed, model=SimpleNamespace(explicit=False), **config)
    return SimpleNamespace(config=made, metrics={"final": {"loss": loss, "settled": 1.0}})


def arms(**losses):
    return {arm: [run(arm, loss, seed) for seed, loss in enumerate(some)] for arm, some in losses.items()}


def test_the_adjoint_is_within_reach_where_every_forward_route_is_exact():
    exact = {"rho": 3.0, "twin": 1.0, "pair": 1.0, "contrast": 1.0, "vector_field": 0.2}
    assert physics.q1([exact], {"free": exact}).verdict == physics.ENGINEERING
    assert physics.q1([exact], {"free": exact | {"pair": 0.99}}).verdict == physics.UNDECIDED
    assert physics.q1([exact], {"free": exact | {"pair": None}}).number == -1.0
    assert physics.q1([exact], {}).verdict == physics.UNDECIDED


@pytest.mark.parametrize(("damped", "verdict"), [((1.002, 1.004, 1.003), "engineering"),
                                                 ((1.1, 1.11, 1.12), "undecided at this scale"),
                                                 ((1.0, 1.01), "undecided at this scale")])
def test_a_small_rho_is_cheap_where_the_cheapest_arm_that_has_one_costs_nothing(damped, verdict):
    some = arms(free=(1.0, 1.0, 1.0), damped_1=damped, homeostatic=(1.5, 1.5, 1.5))
    rho = {"free": {"rho": 4.0}, "damped_1": {"rho": 0.8}, "homeostatic": {"rho": 0.2}}
    assert physics.q2(some, rho).verdict == verdict
    assert physics.q2(some, rho | {"free": {"rho": 0.9}}).number == 0.9
    assert physics.q2(some, {"free": {"rho": 4.0}}).verdict == physics.UNDECIDED


def test_a_twin_decides_by_its_cosine_at_one_per_cent():
    points = [{"mismatch": 0.001, "cosine": 1.0}, {"mismatch": 0.01, "cosine": 0.995}, {"mismatch": 0.1, "cosine": 0.5}]
    found = physics.q3(points, [{"lost": 0.0, "cosine": 1.0}, {"lost": 1.0, "cosine": 0.6}])
    assert (found.number, found.verdict) == (0.995, physics.ENGINEERING) and "0.60" in found.measured
    assert physics.q3([points[1] | {"cosine": None}], []).verdict == physics.UNDECIDED


def test_the_other_verdicts_follow_their_numbers():
    assert physics.q4([1.02, 0.95]).verdict == physics.ENGINEERING and physics.q4([1.02, 0.8]).number == 0.8
    assert physics.q4([1.0]).verdict == physics.UNDECIDED
    some = arms(free=(1.0, 1.1, 1.2), passive=(1.0, 1.1, 1.21))
    assert physics.q5(some, {"passive": {"numerical_abscissa": -0.1}}).verdict == physics.ENGINEERING
    assert physics.q5(some, {"passive": {"numerical_abscissa": 0.9}}).verdict == physics.UNDECIDED
    wide = arms(free=(1.0, 1.1, 1.2), passive=(0.99, 1.12, 1.21))  # 0.007 in the mean, and up to 0.045 by the interval
    assert physics.q5(wide, {"passive": {"numerical_abscissa": -0.1}}).verdict == physics.UNDECIDED
    gap = {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 3}
    assert physics.price(gap, 3.8, 5.3) == gap and "undecided" in physics.price(gap, None, 5.3)  # of an operator not measured
    assert "undecided" not in physics.price({"mean": None, "low": None, "high": None, "n": 0}, None, None)
    assert "not reached" in physics.price(gap, 5.4, 5.3)["undecided"]
    exact = {"contrast": 1.0, "vector_field": 0.5}
    shares = {0.0: arms(e=(1.3, 1.4, 1.5))["e"], 1.0: arms(f=(1.0, 1.1, 1.2))["f"]}
    found = physics.q6(shares, {0.0: exact, 1.0: exact})
    assert found.verdict == physics.UNDECIDED and found.number == pytest.approx(0.3)


def test_width_buys_margin_where_every_seed_says_so():
    losses = {16: {0.1: 2.0, 0.4: 2.1}, 64: {0.1: 1.8, 0.4: 1.95}}
    assert physics.reached(losses) == {16: 0.1, 64: 0.4} and physics.reached({}) == {}
    assert physics.q7([losses] * 3).verdict == physics.ENGINEERING and physics.q7([losses] * 3).number == pytest.approx(0.3)
    assert physics.q7([losses] * 2).verdict == physics.UNDECIDED and physics.q7([]).number is None


def test_a_disturbance_is_harmless_up_to_a_strength_and_fails_from_another():
    points = [Point(0.1, 1.01), Point(0.3, 1.04, 0.9), Point(1.0, 1.2, 0.5), Point(3.0, None, 0.1)]
    assert hardware.harmless(points, 1.0).strength == 0.3 and hardware.failing(points, 1.5).strength == 3.0
    assert hardware.failing(points, 1.2).strength == 1.0 and hardware.harmless(points[2:], 1.0) is None
    [row] = hardware.rows({"twin": points}, 1.0, 1.2)
    assert len(row) == len(hardware.COLUMNS) and row[1:] == ["0.1 … 3", "0.3", pytest.approx(0.2), "1", 0.5]


def test_disturbances_are_ordered_from_mild_to_severe():
    runs = [run("bits_4", 1.2, optimiser=Device(weight_bits=4)), run("bits_8", 1.0, optimiser=Device(weight_bits=8)),
            run("bits_8", 1.1, 1, optimiser=Device(weight_bits=8)), run("free", 1.0, optimiser=Optimiser())]
    [(kind, points)] = hardware.by_strength(runs, {"bits_4": 0.7}).items()
    assert kind == "bits" and [(one.strength, one.cosine) for one in points] == [(8, None), (4, 0.7)]
    assert points[0].loss == pytest.approx(1.05)


def test_what_a_rule_asks_for_is_counted():
    model, inputs, targets = transformer(init=0.3)
    ask = lambda rule: hardware.asked(model, inputs, targets, rule, SOLVER)  # noqa: E731
    plain, corrected, twin = (ask(kind) for kind in (estimators.VectorField(beta=1e-2), estimators.AsymEP(beta=1e-2),
                                                     estimators.DyadicEP()))
    assert plain["Jᵀ"] == plain["J"] == 0 < plain["F"] and plain["∂F/∂θ"] == 1
    assert corrected["J"] == corrected["Jᵀ"] == corrected["F"] > 0
    assert twin["F"] == twin["J"] == 0 < twin["Jᵀ"]
    assert ask(ContractionRate(target=0.1, per="token", step=0.25)) == {"F": 1, "J": 3, "∂F/∂θ": 1}  # two products, one more


def test_devices_that_store_everything_take_up_the_whole_update_and_coarse_ones_a_part():
    model, inputs, targets = transformer(init=0.3)
    grads = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    fine, coarse = (hardware.written(model, grads, Device(lr=0.05, weight_bits=bits)) for bits in (16, 2))
    assert fine > 0.999 > coarse


def test_the_fidelity_of_an_exact_rule_is_one():
    model, inputs, targets = transformer(init=0.3)
    found = hardware.fidelity(model, inputs, targets, {"exact": estimators.MismatchedTwin(mismatch=0.0),
                                                       "one step": estimators.OneStep()})
    assert found["exact"] == pytest.approx(1.0, abs=1e-8) and found["one step"] < 1


def test_settling_times_are_those_of_the_slowest_mode():
    """A linear system whose state and adjoint start along its slowest mode settle after ln(1/tol) / |alpha|."""
    system, (inputs, targets) = linear_system(symmetric=True), linear_batch()
    slowest = -torch.linalg.eigvalsh(system.block.matrix.detach())[-1].item()
    first, last = hardware.settling(system, inputs, targets, (1e-3, 1e-6), step=0.02)
    for column in (1, 2):
        assert last[column] - first[column] == pytest.approx(math.log(1e3) / slowest, rel=0.15)


def test_scaling_the_outputs_scales_the_jacobian_of_the_branches():
    model, inputs, _ = transformer(init=0.3)
    z, x = torch.randn(1, 6, 16, dtype=torch.float64), model.clamp(inputs[:1]).detach()
    before = dense_jacobian(model, x, z)
    after = dense_jacobian(physics.scaled(model, 2.0), x, z)
    eye = torch.eye(len(before), dtype=torch.float64)
    assert torch.allclose(after + eye, 2 * (before + eye))
