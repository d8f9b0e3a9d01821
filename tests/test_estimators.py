"""Every estimator against truth that does not use it: dense solves, closed forms, autograd, symmetric systems."""

from dataclasses import replace

import pytest
import torch

import eplib
from eplib import blocks, controllers, estimators, models
from eplib.blocks import Jacobian
from eplib.diagnostics import GROUPS, LiveBytes, adjoint_gradient, agreement
from eplib.solvers import Relaxation, Status
from systems import TIGHT, LinearModel, linear_batch, transformer

NUDGED = Relaxation(step=0.3, max_steps=2000, tol=1e-8)
EXACT = [estimators.DyadicEP(beta=0.1), estimators.DyadicEP(beta=1e-3, held=False), estimators.Implicit()]
CONTRAST = [estimators.AsymEP(beta=1e-4), estimators.Tracking(beta=1e-4)]


def name(estimator):
    return repr(estimator)


@pytest.mark.parametrize("kind", ["language", "image"])
@pytest.mark.parametrize("estimator", EXACT + CONTRAST + [estimators.BPTT(steps=600)], ids=name)
def test_gradient_equals_the_dense_adjoint_in_every_group(estimator, kind):
    model, inputs, targets = transformer(kind, qk_norm=True)
    report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT, nudged=NUDGED)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    found = agreement(report.grads, truth)
    assert set(GROUPS) <= set(found)
    for group, value in found.items():
        assert value.cosine > 0.99999, (group, value)
        assert abs(value.ratio - 1) < 1e-4, (group, value)


def test_the_uncorrected_field_is_biased_here():
    model, inputs, targets = transformer()
    report = eplib.gradient(model, inputs, targets, estimator=estimators.VectorField(beta=1e-4), solver=TIGHT, nudged=NUDGED)
    truth = adjoint_gradient(model, inputs, targets, report.free.value)
    assert agreement(report.grads, truth)["Wv"].cosine < 0.95


class Flipped(Jacobian):
    """The correction with its sign flipped: J and J^T change places."""

    product, transposed = Jacobian.transposed, Jacobian.product


@pytest.mark.parametrize("estimator", [estimators.DyadicEP(beta=0.1), estimators.AsymEP(beta=1e-4),
                                       estimators.Tracking(beta=1e-4)], ids=name)
def test_negative_control_flipped_correction_fails_the_proof(estimator, monkeypatch):
    model, inputs, targets = transformer()
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    monkeypatch.setattr(blocks, "Jacobian", Flipped)
    report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT,
                            nudged=replace(NUDGED, max_steps=300))
    if report.grads is not None:  # a flipped correction may also diverge, which the report says
        assert agreement(report.grads, truth)["Wv"].cosine < 0.95


@pytest.mark.parametrize("estimator", EXACT[:1] + CONTRAST, ids=name)
def test_negative_control_shuffled_nudge_fails_the_proof(estimator):
    model, inputs, targets = transformer("image")
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    report = eplib.gradient(model, inputs, targets.roll(1), estimator=estimator, solver=TIGHT, nudged=NUDGED)
    assert agreement(report.grads, truth)["Wv"].cosine < 0.95


def test_closed_form_linear_system():
    model, (inputs, targets) = LinearModel(symmetric=False), linear_batch()
    truth = model.closed_form(inputs, targets)
    for estimator, rtol in [(e, 1e-10) for e in EXACT] + [(e, 1e-6) for e in CONTRAST]:
        report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT,
                                nudged=replace(NUDGED, tol=1e-13))
        for key, expected in truth.items():
            assert torch.allclose(report.grads[key], expected, rtol=rtol, atol=rtol), (estimator, key)
    plain = eplib.gradient(model, inputs, targets, estimator=estimators.VectorField(beta=1e-4), solver=TIGHT, nudged=NUDGED)
    assert not torch.allclose(plain.grads["inflow"], truth["inflow"], rtol=1e-2)


def test_on_a_symmetric_system_all_estimators_agree():
    model, (inputs, targets) = LinearModel(symmetric=True), linear_batch()
    truth = model.closed_form(inputs, targets)
    for estimator in [*EXACT, *CONTRAST, estimators.VectorField(beta=1e-4), estimators.BPTT(steps=2000)]:
        report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT, nudged=NUDGED)
        for key, expected in truth.items():
            assert torch.allclose(report.grads[key], expected, rtol=1e-6, atol=1e-8), (estimator, key)


def test_bias_of_the_two_trajectory_forms_is_second_order_in_beta():
    model, inputs, targets = transformer()
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    for kind in (estimators.AsymEP, estimators.Tracking):
        errors = [agreement(eplib.gradient(model, inputs, targets, estimator=kind(beta=beta), solver=TIGHT,
                                           nudged=NUDGED).grads, truth)["total"].error for beta in (1e-3, 2e-3)]
        slope = torch.tensor(errors[1] / errors[0]).log2().item()
        assert 1.8 < slope < 2.2, (kind, errors)


def test_sign_scale_and_reduction_are_those_of_autograd():
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Feedforward(layers=2)).double()
    inputs, targets = torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6))
    report = eplib.gradient(model, inputs, targets, estimator=estimators.Backprop(), solver=TIGHT)
    logits = model.logits(model.block.start(model.clamp(inputs)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    for key, parameter in model.named_parameters():
        assert torch.allclose(report.grads[key], parameter.grad, atol=1e-13), key


def test_a_mean_over_samples_does_not_depend_on_the_batch_size():
    model, inputs, targets = transformer()
    kwargs = {"estimator": estimators.AsymEP(beta=1e-3), "solver": TIGHT, "nudged": NUDGED}
    once = eplib.gradient(model, inputs, targets, **kwargs)
    twice = eplib.gradient(model, inputs.repeat(2, 1), targets.repeat(2, 1), **kwargs)
    assert once.measured["displacement"] == pytest.approx(twice.measured["displacement"], rel=1e-9)
    for key in once.grads:
        assert torch.allclose(once.grads[key], twice.grads[key], atol=1e-9)


@pytest.mark.parametrize("estimator", [estimators.VectorField, estimators.AsymEP, estimators.Tracking, estimators.DyadicEP,
                                       lambda steps: estimators.DyadicEP(steps=steps, held=False), estimators.Implicit])
def test_peak_memory_is_flat_in_the_number_of_steps(estimator):
    peaks = {}
    model, inputs, targets = transformer()
    for steps in (3, 40):
        with LiveBytes() as memory:
            eplib.gradient(model, inputs, targets, estimator=estimator(steps=steps),
                           solver=Relaxation(step=0.3, max_steps=steps, tol=0.0),
                           penalties=(controllers.ContractionRate(target=0.5),))
        peaks[steps] = memory.peak
    assert peaks[3] == peaks[40] > 0


def test_the_memory_of_bptt_grows_so_the_test_above_can_fail():
    model, inputs, targets = transformer()
    peaks = []
    for steps in (3, 40):
        with LiveBytes() as memory:
            eplib.gradient(model, inputs, targets, estimator=estimators.BPTT(steps=steps), solver=TIGHT)
        peaks.append(memory.peak)
    assert peaks[1] > 8 * peaks[0]


def test_a_diverged_phase_gives_no_gradient():
    model, inputs, targets = transformer()
    wild = eplib.gradient(model, inputs, targets, estimator=estimators.AsymEP(beta=1e-3),
                          solver=TIGHT, nudged=Relaxation(step=2.0, max_steps=400, tol=1e-9))
    assert wild.grads is None and wild.status is Status.DIVERGED and wild.free.status is Status.CONVERGED
    with torch.no_grad():
        model.embedding.weight[inputs[0, 0]] = torch.nan
    broken = eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT,
                            penalties=(controllers.ContractionRate(),))
    assert broken.grads is None and broken.penalty_grads == {} and broken.status is Status.NONFINITE


def test_estimator_and_block_must_fit():
    model, inputs, targets = transformer()
    with pytest.raises(TypeError, match="use BPTT"):
        eplib.gradient(model, inputs, targets, estimator=estimators.Backprop(), solver=TIGHT)
    plain = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Feedforward())
    with pytest.raises(TypeError, match="needs an equilibrium block"):
        eplib.gradient(plain, inputs, targets, estimator=estimators.AsymEP(), solver=TIGHT)


def test_the_reported_cost_counts_every_product(monkeypatch):
    """Every evaluation of F, J v and J^T u, per sample of the batch, is in `force_evaluations`."""
    model, inputs, targets = transformer()
    counted = {"n": 0}

    def count(owner, method, lanes):
        original = getattr(owner, method)

        def counting(self, z, *rest):
            counted["n"] += z.shape[0] * (z.shape[1] if z.dim() == 4 else 1) // lanes
            return original(self, z, *rest)

        monkeypatch.setattr(owner, method, counting)

    count(blocks.EquilibriumBlock, "forward", 4)
    count(Jacobian, "product", 4)
    count(Jacobian, "transposed", 4)
    solver = Relaxation(step=0.3, max_steps=9, tol=0.0)
    for estimator, expected in [(estimators.AsymEP(beta=0.01, steps=5), 10 + 6 * 6), (estimators.DyadicEP(steps=5), 10 + 6),
                                (estimators.VectorField(beta=0.01, steps=5), 10 + 2 * 6),
                                (estimators.DyadicEP(steps=5, held=False), 10 + 2 * 6)]:
        counted["n"] = 0
        report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=solver)
        readout = 1  # one force with a graph, outside both phases
        assert counted["n"] - readout == expected
        linearisations = 6 if estimator == estimators.DyadicEP(steps=5, held=False) else 0  # cost a force each, call none
        assert report.measured["force_evaluations"] == expected + linearisations
