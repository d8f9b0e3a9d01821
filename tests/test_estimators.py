"""Every estimator against truth that does not use it: dense solves, closed forms, autograd, symmetric systems."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import eplib
from eplib import blocks, calculus, controllers, estimators, models
from eplib.blocks import Jacobian
from eplib.config import configuration
from eplib.controllers import Homeostasis
from eplib.diagnostics import GROUPS, LinearSystem, LiveBytes, adjoint_gradient, agreement, non_reciprocity
from eplib.estimators.entry import second_phase
from eplib.solvers import Anderson, FixedHorizon, MixedPrecision, Relaxation, Snapshot, Status
from eplib.starts import LinearStart
from systems import TIGHT, linear_batch, linear_system, transformer

NUDGED = Relaxation(step=0.3, max_steps=2000, tol=1e-8)
EXACT = [estimators.DyadicEP(), estimators.DyadicEP(beta=1e-3, held=False), estimators.Implicit()]
CONTRAST = [estimators.AsymEP(beta=1e-4), estimators.Tracking(beta=1e-4), estimators.HolomorphicEP(beta=5e-3, points=4),
            estimators.HolomorphicEP(beta=1e-4, points=2)]
ONE_SIDED = estimators.AsymEP(beta=1e-6, nudging="one-sided")
INEXACT = [estimators.VectorField(), estimators.ShuffledNudge(), estimators.OneStep(), estimators.FeedbackAlignment(),
           estimators.BPTT(steps=900, window=1)]


def name(estimator):
    return repr(estimator)


def phases(estimator, solver=TIGHT, nudged=NUDGED) -> dict:
    """The arguments of a gradient, with a solver for the second phase where there is one."""
    return {"estimator": estimator, "solver": solver, "nudged": nudged if estimator.second_phase else None}


@pytest.mark.parametrize("kind", ["language", "image"])
@pytest.mark.parametrize("estimator", [*EXACT, *CONTRAST, ONE_SIDED, estimators.BPTT(steps=600)], ids=name)
def test_gradient_equals_the_dense_adjoint_in_every_group(estimator, kind):
    model, inputs, targets = transformer(kind, qk_norm=True)
    report = eplib.gradient(model, inputs, targets, **phases(estimator))
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    found = agreement(report.grads, truth)
    assert set(GROUPS) <= set(found)
    for group, value in found.items():
        assert value.cosine > 0.99999, (group, value)
        assert abs(value.ratio - 1) < 1e-4, (group, value)


@pytest.mark.parametrize("estimator", INEXACT, ids=name)
def test_the_inexact_estimators_fail_that_proof(estimator):
    model, inputs, targets = transformer()
    report = eplib.gradient(model, inputs, targets, **phases(estimator))
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    found = agreement(report.grads, truth)
    assert found["Wv"].cosine < 0.95
    assert found["readout"].cosine > 0.99999  # which ignores the adjoint state: why one cosine over everything proves nothing


def test_a_flipped_correction_is_further_from_the_adjoint_than_none():
    model, inputs, targets = transformer(init=0.3)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)

    def error(kind):
        found = eplib.gradient(model, inputs, targets, estimator=kind, solver=TIGHT, nudged=NUDGED).grads
        return agreement(found, truth)["Wv"].error

    right, none, flipped = (error(kind(beta=1e-3)) for kind in (estimators.AsymEP, estimators.VectorField,
                                                                estimators.FlippedCorrection))
    assert right < 1e-3 and flipped > none > 0.1


@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), estimators.AsymEP(), estimators.BPTT(steps=50)], ids=name)
@pytest.mark.parametrize("kept", [("readout",), ("block.layers.wo", "position"), ("embedding",)], ids=str)
def test_frozen_parameters_get_no_gradient_and_change_no_other(estimator, kept):
    model, inputs, targets = transformer()
    asked = phases(estimator)
    full = eplib.gradient(model, inputs, targets, **asked).grads
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(kept))
    part = eplib.gradient(model, inputs, targets, **asked).grads
    assert set(part) == {key for key in full if key.startswith(kept)} and part
    for key, value in part.items():
        assert torch.allclose(value, full[key], rtol=1e-9, atol=1e-12), key


def test_a_model_without_anything_to_train_is_refused():
    model, inputs, targets = transformer()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT)


@pytest.mark.parametrize("nudged", [Anderson(step=0.5, max_steps=60, tol=1e-8), Snapshot(step=0.3, max_steps=300)], ids=name)
@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), estimators.Implicit(), estimators.AsymEP(beta=1e-4),
                                       estimators.HolomorphicEP(beta=1e-2)], ids=name)
def test_any_solver_serves_any_nudged_phase(estimator, nudged):
    model, inputs, targets = transformer(init=0.5)
    report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=Anderson(max_steps=200, tol=1e-12),
                            nudged=nudged)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    for group, value in agreement(report.grads, truth).items():
        assert value.cosine > 0.99999 and abs(value.ratio - 1) < 1e-4, (group, value)


class Flipped(Jacobian):
    """The correction with its sign flipped: J and J^T change places."""

    product, transposed = Jacobian.transposed, Jacobian.product


@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), *CONTRAST, ONE_SIDED], ids=name)
def test_negative_control_flipped_correction_fails_the_proof(estimator, monkeypatch):
    """At weights at which every flipped phase settles: that it diverges elsewhere would prove nothing of its gradient."""
    model, inputs, targets = transformer(init=0.3)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    monkeypatch.setattr(blocks.thick, "Jacobian", Flipped)
    report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT,
                            nudged=replace(NUDGED, max_steps=300))
    assert report.status is Status.CONVERGED
    assert 0 < agreement(report.grads, truth)["Wv"].cosine < 0.95


@pytest.mark.parametrize("estimator", [*EXACT, *CONTRAST, ONE_SIDED], ids=name)
def test_negative_control_shuffled_nudge_fails_the_proof(estimator):
    model, inputs, targets = transformer("image")
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    report = eplib.gradient(model, inputs, targets.roll(1), estimator=estimator, solver=TIGHT, nudged=NUDGED)
    assert agreement(report.grads, truth)["Wv"].cosine < 0.95


def test_closed_form_linear_system():
    model, (inputs, targets) = linear_system(symmetric=False), linear_batch()
    truth = model.closed_form(inputs, targets)
    contrasts = [e for e in CONTRAST if not isinstance(e, estimators.HolomorphicEP)]  # for a block with a complex extension
    for estimator, rtol in [(e, 1e-10) for e in EXACT] + [(e, 1e-6) for e in contrasts] + [(ONE_SIDED, 1e-4)]:
        report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT,
                                nudged=replace(NUDGED, tol=max(rtol / 100, 1e-12)))
        for key, expected in truth.items():
            assert torch.allclose(report.grads[key], expected, rtol=rtol, atol=rtol), (estimator, key)
    plain = eplib.gradient(model, inputs, targets, estimator=estimators.VectorField(beta=1e-4), solver=TIGHT, nudged=NUDGED)
    assert not torch.allclose(plain.grads["inflow"], truth["inflow"], rtol=1e-2)


CONSERVATIVE = [blocks.Energy(), blocks.Energy(causal=False), blocks.LinearAttention(symmetric=True)]


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, *CONSERVATIVE], ids=name)
def test_conservative_reduction_where_j_is_symmetric_all_estimators_agree(config):
    if config is None:
        model, (inputs, targets) = linear_system(symmetric=True), linear_batch()
        truth = model.closed_form(inputs, targets)
    else:
        torch.manual_seed(4)
        model = models.LanguageModel(vocab=7, width=8, heads=2, context=4, block=config).double()
        torch.nn.init.normal_(model.readout.weight)
        inputs, targets = torch.randint(7, (3, 4)), torch.randint(7, (3, 4))
        free = model.settle(inputs, TIGHT)
        assert free.status is Status.CONVERGED
        truth = adjoint_gradient(model, inputs, targets, free.value)
    nudged = replace(NUDGED, tol=1e-9)
    for estimator in [*EXACT, estimators.AsymEP(beta=1e-4), estimators.Tracking(beta=1e-4), estimators.VectorField(beta=1e-4),
                      estimators.BPTT(steps=2000)]:
        report = eplib.gradient(model, inputs, targets, **phases(estimator, nudged=nudged))
        assert (report.adjoint is None) == isinstance(estimator, estimators.BPTT)
        if report.adjoint is not None:
            assert estimators.asymmetry(model.block.linearise(report.free.value, model.clamp(inputs)), report.adjoint) < 1e-10
        for key, expected in truth.items():
            assert torch.allclose(report.grads[key], expected, rtol=1e-5, atol=1e-7), (estimator, key)


@pytest.mark.parametrize(("make", "order", "betas"), [
    (lambda beta: estimators.AsymEP(beta=beta, nudging="one-sided"), 1, (1e-3, 2e-3)),
    (lambda beta: estimators.AsymEP(beta=beta), 2, (1e-3, 2e-3)),
    pytest.param(lambda beta: estimators.Tracking(beta=beta), 2, (1e-3, 2e-3), marks=pytest.mark.slow),
    pytest.param(lambda beta: estimators.HolomorphicEP(beta=beta, points=2), 2, (1e-3, 2e-3), marks=pytest.mark.slow),
    (lambda beta: estimators.HolomorphicEP(beta=beta, points=4), 4, (1e-2, 2e-2)),
    pytest.param(lambda beta: estimators.HolomorphicEP(beta=beta, points=6), 6, (3e-2, 5e-2), marks=pytest.mark.slow)])
def test_order_of_the_bias_in_the_nudge(make, order, betas):
    model, inputs, targets = transformer()
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    errors = [agreement(eplib.gradient(model, inputs, targets, estimator=make(beta), solver=TIGHT,
                                       nudged=replace(NUDGED, tol=1e-10)).grads, truth)["total"].error for beta in betas]
    slope = torch.tensor(errors[1] / errors[0]).log().item() / torch.tensor(betas[1] / betas[0]).log().item()
    assert order - 0.25 < slope < order + 0.25, errors


@pytest.mark.parametrize("nudging", ["one-sided", "random-sign"])
def test_a_single_trajectory_does_not_contrast_what_the_free_phase_left(nudging):
    """The free phase ends at a residual of 1e-3, ten times what a nudge of 1e-4 is: its own drift is no response."""
    model, inputs, targets = transformer(init=0.3)
    free = model.settle(inputs, Relaxation(step=0.3, max_steps=400, tol=1e-3))
    pair, one = (estimators.at_state(model, inputs, targets, free.value, kind, NUDGED)
                 for kind in (estimators.DyadicEP(), estimators.AsymEP(beta=1e-4, nudging=nudging)))
    assert (free.residual > 1e-4).all() and one.nudged.status is Status.CONVERGED
    for key, value in pair.grads.items():
        assert (one.grads[key] - value).norm() < 1e-2 * value.norm(), key


@pytest.mark.slow
def test_two_points_on_the_circle_are_symmetric_nudging():
    model, inputs, targets = transformer(qk_norm=True)
    kwargs = {"solver": TIGHT, "nudged": replace(NUDGED, tol=1e-11)}
    two = eplib.gradient(model, inputs, targets, estimator=estimators.HolomorphicEP(beta=0.02, points=2), **kwargs)
    pair = eplib.gradient(model, inputs, targets, estimator=estimators.AsymEP(beta=0.02), **kwargs)
    for key in pair.grads:
        assert torch.allclose(two.grads[key], pair.grads[key], rtol=1e-8, atol=1e-10), key
    assert two.measured["imaginary_leakage"] == 0.0


@pytest.mark.slow
def test_conjugate_nudges_give_conjugate_states_and_aliasing_tells_the_radius():
    """The half of the circle that is not computed, computed; and the mean state, which leaves z* as the radius grows."""
    model, inputs, targets = transformer()
    problem = estimators.Problem(model, inputs, targets, model.clamp(inputs).detach(), model.settle(inputs, TIGHT).value)
    nudges = 0.05 * torch.exp(2j * torch.pi * torch.arange(4, dtype=torch.float64) / 4)[None]
    with torch.no_grad():
        states = estimators.contrast(problem, nudges, nudges.conj(), NUDGED, None, 1).phase.value
    assert torch.allclose(states[:, 1], states[:, 3].conj(), atol=1e-10) and states[:, 1].imag.abs().max() > 1e-4
    aliasing = []
    for radius in (0.02, 0.04):
        report = eplib.gradient(model, inputs, targets, estimator=estimators.HolomorphicEP(beta=radius, points=4), solver=TIGHT,
                                nudged=replace(NUDGED, tol=1e-10))
        aliasing.append(report.measured["aliasing"])
    assert 7 < aliasing[1] / aliasing[0] < 9  # z_4 r^4 over a displacement of order r


def test_holomorphic_nudging_needs_a_complex_extension():
    model, inputs, targets = transformer()
    model.block.layers.w1.register_forward_hook(lambda module, inputs, out: 2 * out)  # of a complex state it sees the parts
    with pytest.raises(TypeError, match="no complex extension"):
        eplib.gradient(model, inputs, targets, estimator=estimators.HolomorphicEP(), solver=TIGHT)


@pytest.mark.slow
def test_random_signs_are_one_sided_contrasts_whose_first_order_biases_cancel():
    model, inputs, targets = transformer()
    model_batch = inputs.repeat(8, 1), targets.repeat(8, 1)
    kwargs = {"solver": replace(TIGHT, tol=1e-10), "nudged": NUDGED}
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)

    def error(report):
        return agreement(report.grads, truth)["total"].error

    one = eplib.gradient(model, *model_batch, estimator=estimators.AsymEP(beta=5e-3, nudging="one-sided"), **kwargs)
    random = estimators.AsymEP(beta=5e-3, nudging="random-sign")
    first = eplib.gradient(model, *model_batch, estimator=random, **kwargs)
    again = eplib.gradient(model, *model_batch, estimator=random, **kwargs)
    second = eplib.gradient(model, *model_batch, estimator=random, state=first.state, **kwargs)
    key = "block.layers.w1.weight"
    assert torch.equal(first.grads[key], again.grads[key])  # reproducible from the same state
    assert not torch.equal(first.grads[key], second.grads[key])  # and new signs from the next
    assert max(error(first), error(second)) < 0.6 * error(one)  # 32 samples: the bias shrinks to its fluctuation


@pytest.mark.parametrize("layers", [1, 3])
def test_layered_gradients_are_those_of_the_ordinary_transformer(layers):
    torch.manual_seed(0)
    stack = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Layered(layers=layers, init=1.0)).double()
    torch.nn.init.normal_(stack.readout.weight, std=0.5)
    plain = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Feedforward(layers=layers)).double()
    plain.load_state_dict(stack.state_dict())
    inputs, targets = torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6))
    truth = eplib.gradient(plain, inputs, targets, estimator=estimators.Backprop(), solver=TIGHT).grads
    sweeps, nudged = FixedHorizon(step=1.0, steps=layers), Relaxation(step=1.0, max_steps=40, tol=1e-10)

    def found(estimator):
        report = eplib.gradient(stack, inputs, targets, estimator=estimator, solver=sweeps, nudged=nudged)
        return {key: (report.grads[key] - truth[key]).norm() / truth[key].norm() for key in truth}

    assert max(found(estimators.DyadicEP()).values()) < 1e-8
    assert max(found(estimators.Implicit()).values()) < 1e-8
    assert max(found(estimators.AsymEP(beta=1e-4)).values()) < 1e-6
    slope = torch.log2(max(found(estimators.AsymEP(beta=2e-2)).values()) / max(found(estimators.AsymEP(beta=1e-2)).values()))
    assert 1.8 < slope < 2.2


def test_forward_mode_is_bptt_without_its_memory():
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=5, width=4, heads=2, context=3, block=blocks.Thick(init=1.0)).double()
    inputs, targets = torch.randint(5, (2, 3)), torch.randint(5, (2, 3))
    kwargs = {"solver": Relaxation(step=0.5)}
    forward = eplib.gradient(model, inputs, targets, estimator=estimators.ForwardMode(steps=6), **kwargs)
    backward = eplib.gradient(model, inputs, targets, estimator=estimators.BPTT(steps=6), **kwargs)
    assert forward.loss == pytest.approx(backward.loss, rel=1e-12)
    assert forward.grads.keys() == backward.grads.keys() == dict(model.named_parameters()).keys()
    for key in backward.grads:
        assert torch.allclose(forward.grads[key], backward.grads[key], rtol=1e-9, atol=1e-12), key


def test_truncated_bptt_between_one_step_and_the_whole_horizon():
    model, inputs, targets = transformer()

    def grads(estimator, solver):
        return eplib.gradient(model, inputs, targets, estimator=estimator, solver=solver).grads

    whole, all_of_it = (grads(e, TIGHT) for e in (estimators.BPTT(steps=8), estimators.BPTT(steps=8, window=8)))
    key = "block.layers.wo.weight"
    assert torch.equal(whole[key], all_of_it[key])
    settled = eplib.gradient(model, inputs, targets, estimator=estimators.OneStep(), solver=TIGHT).grads
    last = grads(estimators.BPTT(steps=900, window=1), TIGHT)  # the last step of 0.3 alone: 0.3 times the one-step gradient
    assert torch.allclose(last[key], TIGHT.step * settled[key], rtol=1e-6, atol=1e-10)
    assert not torch.allclose(last[key], whole[key], rtol=0.1)


@pytest.mark.parametrize("window", [None, 3])
def test_bptt_in_steps_of_its_own_is_bptt_in_the_solvers(window):
    """The solver's size counts only where the estimator has none."""
    model, inputs, targets = transformer()
    ours, theirs, other = (
        eplib.gradient(model, inputs, targets, estimator=estimators.BPTT(steps=6, window=window, step=step),
                       solver=Relaxation(step=size, tol=1e-4))
        for step, size in ((0.25, 0.5), (None, 0.25), (None, 0.5)))
    assert ours.loss == theirs.loss != other.loss and torch.equal(ours.free.value, theirs.free.value)
    assert all(torch.equal(ours.grads[name], value) for name, value in theirs.grads.items())
    with pytest.raises(ValueError, match="greater than 0"):
        estimators.BPTT(step=0.0)


def test_feedback_alignment_projects_the_error_by_a_matrix_that_stays():
    for kind in ("language", "image"):
        model, inputs, targets = transformer(kind)
        first = eplib.gradient(model, inputs, targets, estimator=estimators.FeedbackAlignment(), solver=TIGHT)
        matrix = first.state["feedback"]
        outputs = model.readout.out_features
        assert matrix.shape == (outputs, 16)
        second = eplib.gradient(model, inputs, targets, estimator=estimators.FeedbackAlignment(), solver=TIGHT,
                                state={"feedback": 2 * matrix})
        key = "block.layers.w2.weight"
        assert torch.allclose(second.grads[key], 2 * first.grads[key])
        z = first.free.value
        error = model.predict(z).softmax(-1) - torch.nn.functional.one_hot(targets, outputs)
        a = error @ matrix / 6 if kind == "language" else ((error @ matrix) / 4).unsqueeze(1).expand_as(z)
        with torch.no_grad():
            expected = model.block.linearise(z, z).contract(a / 4)[0]["layers.w2.weight"]
        assert torch.allclose(first.grads[key], expected, atol=1e-12)


def test_the_reported_asymmetry_and_displacement_are_those_of_the_dense_system():
    model, (inputs, targets) = linear_system(symmetric=False), linear_batch()
    report = eplib.gradient(model, inputs, targets, estimator=estimators.AsymEP(beta=1e-4), solver=TIGHT,
                            nudged=replace(NUDGED, tol=1e-9))
    matrix, z = model.block.matrix.detach(), report.free.value
    a = -torch.linalg.solve(matrix.T, (z - targets).T).T
    odd = ((a @ matrix.T - a @ matrix).norm(dim=1) / (a @ matrix.T).norm(dim=1)).max().item()
    assert torch.allclose(report.adjoint, a, rtol=1e-6)
    jacobian = model.block.linearise(z, model.clamp(inputs))
    assert estimators.asymmetry(jacobian, report.adjoint) == pytest.approx(odd, rel=1e-6) and odd > 0.1
    assert report.measured["displacement"] == pytest.approx((1e-4 * a.norm(dim=1) / z.norm(dim=1)).max().item(), rel=1e-3)


def test_the_correction_does_not_need_rho_below_one():
    """A triangle t above a fixed diagonal: rho(S^-1 A) passes 1 at a fixed spectrum, and only the vector field minds."""
    (inputs, targets), found = linear_batch(), {}
    for t in (0.0, 1.0, 4.0):
        spectrum, triangle = torch.linspace(-1.5, -0.8, 6, dtype=torch.float64), torch.ones(6, 6, dtype=torch.float64).triu(1)
        matrix = torch.diag(spectrum) + t * triangle
        model = LinearSystem(matrix, torch.eye(6, 4, dtype=torch.float64))
        truth = model.closed_form(inputs, targets)
        reports = [eplib.gradient(model, inputs, targets, estimator=e, solver=Relaxation(step=0.5, max_steps=4000, tol=1e-12),
                                  nudged=Relaxation(step=0.5, max_steps=4000, tol=1e-10))
                   for e in (estimators.AsymEP(beta=1e-3), estimators.VectorField(beta=1e-3))]
        cosines = [torch.cosine_similarity(r.grads["inflow"].flatten(), truth["inflow"].flatten(), 0).item() for r in reports]
        found[t] = (non_reciprocity(matrix).rho, *cosines)
    assert found[0.0][0] == 0 and found[1.0][0] > 1 and found[4.0][0] > 1
    assert all(corrected > 1 - 1e-9 for _, corrected, _ in found.values())
    assert found[0.0][2] > 1 - 1e-9 and found[4.0][2] < 0.9


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 2]), st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_any_shape_and_precision_gives_the_implicit_gradient(samples, tokens, heads, causal, dtype, seed):
    """The hand-written path against autograd's J^T and autograd's read-out, batch of one and context of one included."""
    torch.manual_seed(seed)
    block = blocks.Thick(causal=causal)
    model = models.LanguageModel(vocab=5, width=8, heads=heads, context=tokens, block=block).to(dtype)
    inputs, targets = (torch.randint(5, (tokens, samples)).T for _ in range(2))  # not contiguous
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    solver = Relaxation(step=0.5, max_steps=200, tol=tol)
    ours, theirs = (eplib.gradient(model, inputs, targets, estimator=e, solver=solver, nudged=solver)
                    for e in (estimators.DyadicEP(), estimators.Implicit()))
    assume(ours.status is Status.CONVERGED)  # a token of tiny variance, which LayerNorm makes stiff, is rare but drawn
    assert ours.grads.keys() == dict(model.named_parameters()).keys()
    for key in ours.grads:
        assert torch.allclose(ours.grads[key], theirs.grads[key], rtol=1e3 * tol, atol=1e2 * tol), key


@pytest.mark.parametrize("kind", ["language", "image"])
def test_the_local_readout_is_that_of_autograd(kind):
    """<a, dF/dtheta> by hand, weight for weight, against autograd through the force."""
    model, inputs, targets = transformer(kind, qk_norm=True)
    report = eplib.gradient(model, inputs, targets, estimator=estimators.FeedbackAlignment(), solver=TIGHT)
    problem = estimators.Problem(model, inputs, targets, model.clamp(inputs).detach(), report.free.value, dict(report.state))
    a = estimators.FeedbackAlignment().adjoint(problem, TIGHT).value  # any a will do
    push = model.block(problem.state, model.clamp(inputs))
    total = (a * push).sum() / 4 + model.loss(model.block.output(problem.state), targets).mean()
    expected = torch.autograd.grad(total, list(model.parameters()))
    for (key, _), value in zip(model.named_parameters(), expected, strict=True):
        assert (report.grads[key] - value).norm() <= 1e-6 * value.norm(), key


def test_sign_scale_and_reduction_are_those_of_autograd():
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Feedforward(layers=2)).double()
    inputs, targets = torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6))
    report = eplib.gradient(model, inputs, targets, estimator=estimators.Backprop(), solver=TIGHT)
    logits = model.predict(model.block.start(model.clamp(inputs)))
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
    assert once.grads.keys() == dict(model.named_parameters()).keys()
    assert once.measured["displacement"] == pytest.approx(twice.measured["displacement"], rel=1e-9)
    for key in once.grads:
        assert torch.allclose(once.grads[key], twice.grads[key], atol=1e-9)


@pytest.mark.parametrize("estimator", [estimators.VectorField, estimators.AsymEP, estimators.Tracking, estimators.DyadicEP,
                                       lambda steps: estimators.DyadicEP(beta=0.2, held=False), estimators.Implicit,
                                       estimators.HolomorphicEP,
                                       lambda steps: estimators.AsymEP(steps=steps, nudging="random-sign"),
                                       lambda steps: estimators.OneStep(), lambda steps: estimators.FeedbackAlignment(),
                                       lambda steps: estimators.BPTT(steps=steps, window=2)])
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


def test_the_reported_cost_counts_every_force_linearisation_product_and_backward_pass(monkeypatch):
    """Every F, J, J v and J^T u, per sample of the batch, is in `force_evaluations`, and two for the contraction."""
    model, inputs, targets = transformer()
    counted = {"n": 0}

    def count(owner, method, lanes):
        original = getattr(owner, method)

        def counting(self, z, *rest):
            counted["n"] += z.shape[0] * (z.shape[1] if z.dim() == 4 else 1) // lanes
            return original(self, z, *rest)

        monkeypatch.setattr(owner, method, counting)

    count(blocks.EquilibriumBlock, "forward", 4)
    count(blocks.EquilibriumBlock, "linearise", 4)
    count(Jacobian, "product", 4)
    count(Jacobian, "transposed", 4)
    solver = Relaxation(step=0.3, max_steps=9, tol=0.0)
    state = 1 + 2  # J at z* and the contraction with dF/dtheta
    kinds = [(estimators.AsymEP(beta=0.01, steps=5), 1 + 6 * 6), (estimators.DyadicEP(steps=5), 6), (estimators.OneStep(), 0),
             (estimators.VectorField(beta=0.01, steps=5), 2 * 6), (estimators.FeedbackAlignment(), 0),
             (estimators.AsymEP(beta=0.01, steps=5, nudging="one-sided"), 1 + 1 + 3 * 6),
             (estimators.ShuffledNudge(steps=5), 6),
             (estimators.Tracking(beta=0.01, steps=5), 5 * 6), (estimators.Tracking(beta=0.01, steps=5, held=True), 4 * 6),
             (estimators.Tracking(beta=0.01, steps=5, held=True, warm=True), 6 + 4 * 6),
             (estimators.FlippedCorrection(beta=0.01, steps=5), 1 + 6 * 6),
             (estimators.DyadicEP(beta=0.01, steps=5, held=False), 3 * 6)]
    for estimator, expected in kinds:
        counted["n"] = 0
        report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=solver)
        assert counted["n"] + 2 == report.measured["force_evaluations"] == 10 + expected + state, estimator
    monkeypatch.undo()

    def cost(estimator, of=model):
        return eplib.gradient(of, inputs, targets, estimator=estimator, solver=solver).measured["force_evaluations"]

    assert cost(estimators.Implicit(steps=5)) == 10 + 1 + 6 + state  # whose J^T is PyTorch's
    assert cost(estimators.BPTT(steps=7)) == 3 * 7 and cost(estimators.BPTT(steps=7, window=2)) == 7 + 2 * 2
    with pytest.raises(ValueError, match="window=9 goes back further than the 7 steps"):
        estimators.BPTT(steps=7, window=9)
    flat = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Feedforward()).double()
    assert cost(estimators.Backprop(), flat) == 3
    driven = (controllers.Homeostasis(), controllers.Homeostasis())
    alone = eplib.gradient(model, inputs, targets, estimator=estimators.BPTT(steps=7), solver=solver, penalties=driven)
    assert alone.measured["force_evaluations"] == 3 * 7 + 2 * 9


def test_the_read_out_reuses_the_last_transposed_pass(monkeypatch):
    """Contracting the adjoint state that a settled solve returned costs no pass beyond the solve's own."""
    model, inputs, targets = transformer("language")
    passes, backward = [], calculus.NetworkSlope._backward
    monkeypatch.setattr(calculus.NetworkSlope, "_backward", lambda self, u: passes.append(1) or backward(self, u))
    settled = Anderson(step=0.5, tol=1e-6, max_steps=200)
    report = eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=settled, nudged=settled)
    assert report.nudged.status is Status.CONVERGED and len(passes) == report.nudged.evaluations


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_whether_a_gradient_is_finite_is_seen_without_a_copy_of_it(odd):
    grads = {"weight": torch.ones(500, 500), "empty": torch.ones(0)}
    with LiveBytes() as counter:
        assert estimators.finite(grads) is grads
    assert counter.peak < 100
    grads["weight"][3, 5] = odd
    assert estimators.finite(grads) is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"inputs": torch.zeros(0, 6, dtype=torch.long), "targets": torch.zeros(0, 6, dtype=torch.long)}, "batch is empty"),
    ({"targets": torch.zeros(4, 5, dtype=torch.long)}, r"targets of shape \(4, 5\) do not fit inputs of shape \(4, 6\)"),
    ({"targets": torch.zeros(6, 4, dtype=torch.long)}, r"targets of shape \(6, 4\) do not fit"),
    ({"inputs": torch.zeros(4, 6, dtype=torch.long, device="meta")}, "inputs are on meta and the model is on cpu"),
    ({"start": torch.zeros(4, 6, 8, dtype=torch.float64)}, "start is .* and states of EquilibriumBlock are"),
    ({"estimator": estimators.OneStep(), "nudged": NUDGED}, "OneStep .* nudged=Relaxation would do nothing"),
    ({"estimator": estimators.BPTT(steps=2), "start": LinearStart()}, "BPTT .* start=LinearStart would do nothing"),
    ({"estimator": estimators.AsymEP(steps=3), "nudged": NUDGED}, "AsymEP has steps=3.*nudged=Relaxation has its own"),
    ({"solver": FixedHorizon(steps=0)}, "FixedHorizon of no steps")], ids=str)
def test_what_does_not_fit_is_refused_before_anything_is_computed(changes, message):
    model, inputs, targets = transformer()
    call = {"inputs": inputs, "targets": targets, "estimator": estimators.DyadicEP(), "solver": TIGHT} | changes
    with pytest.raises(ValueError, match=message):
        eplib.gradient(model, **call)


def test_a_held_linear_response_has_no_beta_and_a_moving_one_needs_it():
    with pytest.raises(ValueError, match=r"beta=0\.2 would do nothing"):
        estimators.DyadicEP(beta=0.2)
    with pytest.raises(ValueError, match="give its beta"):
        estimators.DyadicEP(held=False)


@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), estimators.AsymEP(), estimators.BPTT(steps=5),
                                       estimators.Implicit()], ids=name)
def test_a_gradient_is_the_same_under_no_grad_and_refused_in_inference_mode(estimator):
    model, inputs, targets = transformer(init=0.3)
    call = phases(estimator)
    plain = eplib.gradient(model, inputs, targets, **call)
    with torch.no_grad():
        again = eplib.gradient(model, inputs, targets, **call)
    assert all(torch.equal(again.grads[key], value) for key, value in plain.grads.items())
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        eplib.gradient(model, inputs, targets, **call)


@pytest.mark.parametrize("kept", [("readout",), ("embedding",), ("block.layers.wo",)], ids=str)
def test_frozen_weights_get_no_gradient_of_a_penalty(kept):
    model, inputs, targets = transformer(init=0.3)
    kinds = (controllers.ContractionRate(target=0.1), controllers.LeadingMode(margin=0.95), controllers.Homeostasis(),
             controllers.JacobianNorm(), controllers.ResidualPenalty())
    call = {"estimator": estimators.OneStep(), "solver": Relaxation(step=0.3, max_steps=5), "penalties": kinds}
    full = eplib.gradient(model, inputs, targets, **call)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key.startswith(kept))
    part = eplib.gradient(model, inputs, targets, **call)
    assert set(part.penalty_grads) == {key for key in full.penalty_grads if key.startswith(kept)}
    assert part.measured["penalty"] == pytest.approx(full.measured["penalty"], rel=1e-9)
    for key, value in part.penalty_grads.items():
        assert torch.allclose(value, full.penalty_grads[key]), key


@pytest.mark.parametrize("solver", [FixedHorizon(step=0.3, steps=60), Snapshot(step=0.3, max_steps=60)], ids=name)
def test_a_warm_tracking_takes_a_solver_without_a_tolerance(solver):
    model, inputs, targets = transformer(init=0.3)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    report = eplib.gradient(model, inputs, targets, estimator=estimators.Tracking(beta=1e-3, warm=True), solver=TIGHT,
                            nudged=solver)
    assert agreement(report.grads, truth)["total"].error < 1e-3


def test_what_left_no_gradient_is_said():
    """A free phase, a warm start's linear phase, and a gradient that is not finite although its phases are."""
    model, inputs, targets = transformer()
    wild = Relaxation(step=2.0, max_steps=400, tol=1e-9)
    penalised = {"penalties": (controllers.ResidualPenalty(),)}
    found = eplib.gradient(model, inputs, targets, estimator=estimators.Tracking(beta=1e-3, warm=True), solver=TIGHT,
                           nudged=wild, **penalised)
    assert found.grads is None and found.failed == "nudged" and found.nudged.status is Status.DIVERGED and found.penalty_grads
    shuffled = eplib.gradient(model, inputs, targets, estimator=estimators.ShuffledNudge(), solver=TIGHT, nudged=wild)
    assert shuffled.grads is None and shuffled.failed == "nudged"
    with torch.no_grad():
        model.readout.weight[0] = torch.inf
    broken = eplib.gradient(model, inputs, targets, estimator=estimators.OneStep(), solver=TIGHT)
    assert broken.free.status is Status.CONVERGED and broken.grads is None
    assert broken.failed == "gradient" and broken.status is Status.NONFINITE
    with torch.no_grad():
        model.block.layers.w2.weight[0] = torch.nan
    free = eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT, **penalised)
    assert free.grads is None and free.failed == "free" and free.penalty_grads == {}


def test_the_gradient_at_a_given_state_is_that_of_the_call_that_reached_it():
    model, inputs, targets = transformer(init=0.3)
    whole = eplib.gradient(model, inputs, targets, estimator=estimators.AsymEP(beta=0.1), solver=TIGHT, nudged=NUDGED)
    at = estimators.at_state(model, inputs, targets, whole.free.value, estimators.AsymEP(beta=0.1), NUDGED)
    assert all(torch.equal(at.grads[key], value) for key, value in whole.grads.items())
    spent = [report.measured["force_evaluations"] for report in (whole, at)]
    assert spent[1] == spent[0] - whole.free.evaluations + 1 and at.loss == whole.loss
    with pytest.raises(TypeError, match="BPTT differentiates a finite number"):
        estimators.at_state(model, inputs, targets, whole.free.value, estimators.BPTT())
    with pytest.raises(ValueError, match="AsymEP has a second phase; give nudged"):
        estimators.at_state(model, inputs, targets, whole.free.value, estimators.AsymEP())


def test_half_precision_of_a_phase_that_rounds_nothing_is_refused():
    model, inputs, targets = transformer()
    model = model.float()
    for estimator in (estimators.AsymEP(), estimators.Implicit(), estimators.VectorField(), estimators.Tracking()):
        with pytest.raises(ValueError, match=f"{estimator.kind} has a second phase of which nothing may be rounded"):
            eplib.gradient(model, inputs, targets, estimator=estimator, solver=Relaxation(), nudged=MixedPrecision())
    for estimator in (estimators.DyadicEP(), estimators.ShuffledNudge(), estimators.Tracking(warm=True)):
        assert second_phase(estimator, None, MixedPrecision()) == MixedPrecision()


def test_penalties_of_a_block_without_dynamics_and_states_of_inference_mode_are_refused():
    model, inputs, targets = transformer()
    with torch.inference_mode():
        state = model.settle(inputs, Relaxation()).value
    with pytest.raises(ValueError, match=r"state made under torch\.inference_mode"):
        estimators.at_state(model, inputs, targets, state, estimators.DyadicEP(), Relaxation())
    plain = models.LanguageModel(11, 16, 4, 6, blocks.Feedforward()).double()
    with pytest.raises(ValueError, match="no dynamics that Homeostasis could act on"):
        eplib.gradient(plain, inputs, targets, estimator=estimators.Backprop(), solver=Relaxation(), penalties=(Homeostasis(),))


@configuration
class Neumann(estimators.ByAdjoint):
    """An adjoint state of one's own: a = s sum_k (1 + s J^T)^k g."""

    terms: int = 300

    second_phase = False

    def adjoint(self, problem, solver):
        total = term = solver.step * problem.slope
        for _ in range(self.terms):
            term = term + solver.step * problem.jacobian.transposed(term)
            total = total + term
        return estimators.Adjoint(total, evaluations=self.terms)


@configuration
class Unrolled(estimators.Estimator):
    """A gradient of one's own: PyTorch's through three steps."""

    equilibrium = second_phase = False

    def gradient(self, batch, solver, nudged):
        model = batch.model
        with torch.enable_grad():
            x = model.clamp(batch.inputs)
            z = model.block.start(x)
            for _ in range(3):
                z = z + solver.step * model.block(z, x)
            loss = model.loss(model.block.output(z), batch.targets).mean()
            grads = torch.autograd.grad(loss, list(model.parameters()))
        free = FixedHorizon(step=solver.step, steps=0).settle(batch.dynamics, batch.x, z.detach())
        return estimators.Report(loss.item(), dict(zip(dict(model.named_parameters()), grads, strict=True)), free, None,
                                 {"force_evaluations": 9})


def test_feedback_alignment_takes_states_without_tokens():
    """a = e R, by the gradient a inputs^T of B in a linear system, whose error is z* - target."""
    model, (inputs, targets) = linear_system(symmetric=False), linear_batch()
    report = eplib.gradient(model, inputs, targets, estimator=estimators.FeedbackAlignment(), solver=TIGHT)
    a = (report.free.value - targets) @ report.state["feedback"]
    assert report.state["feedback"].shape == (targets.shape[1], report.free.value.shape[1])
    assert torch.allclose(report.grads["inflow"], a.mT @ inputs / len(inputs), rtol=1e-9, atol=1e-12)


def test_an_estimator_of_ones_own_overrides_adjoint_or_gradient():
    model, inputs, targets = transformer(init=0.3)
    report = eplib.gradient(model, inputs, targets, estimator=Neumann(), solver=TIGHT)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    assert agreement(report.grads, truth)["total"].error < 1e-6
    assert report.measured["force_evaluations"] == report.free.evaluations + 300 + 1 + 2
    penalties = (controllers.ContractionRate(target=0.1),)
    ours, theirs = (eplib.gradient(model, inputs, targets, estimator=one, solver=TIGHT, penalties=penalties)
                    for one in (Unrolled(), estimators.BPTT(steps=3)))
    assert agreement(ours.grads, theirs.grads)["total"].error < 1e-12
    assert ours.measured == theirs.measured and ours.state.keys() == theirs.state.keys() != set()
    assert agreement(ours.penalty_grads, theirs.penalty_grads)["total"].error < 1e-12


@pytest.mark.parametrize("kind", [estimators.Estimator, estimators.ByAdjoint])
def test_an_estimator_without_its_method_says_which_is_missing(kind):
    own = configuration(type("Empty", (kind,), {"second_phase": False}))()
    model, inputs, targets = transformer(init=0.3)
    with pytest.raises(NotImplementedError, match=r"Empty does not define (gradient|adjoint)\(.*override"):
        eplib.gradient(model, inputs, targets, estimator=own, solver=TIGHT)
