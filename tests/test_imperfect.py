"""Imperfect hardware: each disturbance is none at strength zero, and what it says it is otherwise."""


import pytest
import torch
from pydantic import ValidationError
from torch import nn

import eplib
from eplib import blocks, estimators
from eplib.classics import Completion, Masked
from eplib.classics.completion import GREY, HiddenPatches, MaskedImages
from eplib.config import parse, plain
from eplib.diagnostics import adjoint_gradient, agreement, check, dense_jacobian
from eplib.models import IGNORED, Transformer
from eplib.optimisers import Device, Optimiser, UpdateRule, quantised
from eplib.optimisers.device import span
from eplib.runconfig import build_model
from eplib.solvers import Anderson, norm
from eplib.tasks import ImageDataset
from systems import TIGHT, transformer

CLOSE = Anderson(step=0.3, max_steps=500, tol=1e-9)


def gradient_of(estimator, state=None, init=0.3):
    model, inputs, targets = transformer(init=init)
    return model, inputs, targets, eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT, nudged=CLOSE,
                                                  state=state)


def test_a_twin_without_mismatch_has_the_dense_adjoints_gradient():
    model, inputs, targets, report = gradient_of(estimators.MismatchedTwin(mismatch=0.0))
    exact = adjoint_gradient(model, inputs, targets, report.free.value)
    assert all(one.error < 1e-7 for one in agreement(report.grads, exact).values())
    assert report.measured["twin_error"] == 0


def test_a_twins_gradient_is_the_adjoint_of_the_circuit_with_the_other_weights():
    """Dense linear algebra on a copy whose weights are multiplied by the same draws."""
    model, inputs, targets, report = gradient_of(estimators.MismatchedTwin(mismatch=0.2))
    other, _, _ = transformer(init=0.3)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in other.block.parameters():
            value.mul_(1 + 0.2 * torch.randn(value.shape, generator=draws, dtype=torch.float64))
    z, x = report.free.value, model.clamp(inputs).detach()
    probe = z.clone().requires_grad_()
    slope, = torch.autograd.grad(model.loss(probe, targets).sum(), probe)
    for b in range(len(z)):
        dense = dense_jacobian(other, x[b:b + 1], z[b:b + 1])
        expected = torch.linalg.solve(dense.mT, -slope[b].flatten())
        assert torch.allclose(report.adjoint[b].flatten(), expected, atol=1e-8)
    assert 0.02 < report.measured["twin_error"] < 2


def test_a_twin_is_the_same_for_ever_and_fluctuating_weights_are_not():
    twice = [gradient_of(estimators.MismatchedTwin(mismatch=0.1))[3].adjoint for _ in range(2)]
    assert torch.equal(*twice)
    kind = estimators.MismatchedTwin(mismatch=0.1, redrawn=True)
    first = gradient_of(kind)[3]
    second = gradient_of(kind, state=first.state)[3]
    assert not torch.allclose(first.adjoint, second.adjoint)
    assert torch.equal(second.adjoint, gradient_of(kind, state=first.state)[3].adjoint)  # carried, so a resumed run goes on


def test_the_noise_of_reading_two_states_is_that_of_their_difference_over_twice_the_nudge():
    exact = gradient_of(estimators.AsymEP(beta=1e-2))[3]
    report = gradient_of(estimators.NoisyEP(beta=1e-2, state=1e-3))[3]
    z, noise = report.free.value, report.adjoint - exact.adjoint
    expected = 1e-3 / (2**0.5 * 1e-2) * norm(z)  # of a sample of 96 units: within 4 deviations of its length, 1 / sqrt(2 n)
    assert torch.allclose(norm(noise), expected, rtol=0.3)
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.4


def test_the_noise_of_the_nudge_comes_back_through_the_adjoint():
    """a = -J^-T (g + e): what J^T makes of the change of a is an error of the size asked for, by dense linear algebra."""
    model, inputs, _, report = gradient_of(estimators.NoisyEP(beta=1e-4, nudge=0.5))
    exact = gradient_of(estimators.AsymEP(beta=1e-4))[3]
    x = model.clamp(inputs).detach()
    for b in range(len(x)):
        dense = dense_jacobian(model, x[b:b + 1], report.free.value[b:b + 1])
        g, error = (-dense.mT @ one[b].flatten() for one in (exact.adjoint, report.adjoint - exact.adjoint))
        assert error.norm() == pytest.approx(0.5 * g.norm().item(), rel=0.3)


def test_noise_free_hardware_is_refused_with_what_to_take():
    with pytest.raises(ValidationError, match="AsymEP"):
        estimators.NoisyEP()
    with pytest.raises(ValidationError, match="do nothing"):
        Device()
    with pytest.raises(ValidationError, match="ema"):
        Device(weight_bits=4, ema=0.9)
    with pytest.raises(ValidationError, match="rounds nothing"):
        Device(asymmetry=0.1, rounding="stochastic")


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_a_quantised_tensor_has_so_many_levels_stays_as_it_is_and_is_near(bits):
    a = torch.randn(400, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    b = quantised(a, bits)
    levels = 2 ** (bits - 1) - 1
    step = span(a) / levels
    assert len(b.unique()) <= 2 * levels + 1 and (b / step - (b / step).round()).abs().max() < 1e-9
    assert torch.equal(quantised(b, bits), b) and (b - a).abs().max() <= step / 2 + 1e-12
    assert span(a) >= a.abs().max() > span(a) / 2 and not quantised(torch.zeros(3), bits).any()


def test_stochastic_rounding_has_the_right_mean():
    a = torch.tensor([0.9, 0.3, -0.17, 0.02], dtype=torch.float64)
    draws = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rounded = torch.stack([quantised(a, 3, draw) for draw in draws])
    assert (rounded.mean(0) - a).abs().max() < 4 * (1 / 3) / 2 / 20_000**0.5  # four standard errors; a level is 1/3


def taken(rule: Device, updates: int = 1):
    """A matrix and a vector before and after some updates by a rule, from the same gradients."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(5))]
    before = [value.detach().clone() for value in parameters]
    optimiser = rule.build(parameters)
    for _ in range(updates):
        for value in parameters:
            value.grad = torch.randn(value.shape)
        optimiser.step()
    return before, [value.detach() for value in parameters], optimiser


def test_only_matrices_are_stored_in_devices():
    _, (plain_matrix, plain_vector), _ = taken(Optimiser(lr=0.1))
    _, (matrix, vector), _ = taken(Device(lr=0.1, weight_bits=3))
    assert torch.equal(vector, plain_vector) and torch.equal(matrix, quantised(plain_matrix, 3))


def test_uneven_updates_are_scaled_by_their_sign_and_by_how_full_the_device_is():
    (before, _), (plain_after, _), _ = taken(Optimiser(lr=0.1))
    update = plain_after - before
    (_, _), (uneven, _), _ = taken(Device(lr=0.1, asymmetry=0.3))
    assert torch.allclose(uneven - before, update * torch.where(update > 0, 1.3, 0.7), atol=1e-6)
    (_, _), (bound, _), _ = taken(Device(lr=0.1, saturation=1.0))
    assert torch.allclose(bound - before, update * (1 - update.sign() * before / span(before)), atol=1e-6)


def test_a_stored_device_goes_on_as_if_it_had_not_stopped():
    rule = Device(lr=0.1, weight_bits=3, rounding="stochastic")
    _, (whole, _), _ = taken(rule, 3)
    _, parts, optimiser = taken(rule, 2)
    parameters = [nn.Parameter(part.clone()) for part in parts]
    resumed = rule.build(parameters)
    resumed.load_state_dict(optimiser.state_dict())
    torch.manual_seed(0)
    torch.randn(4, 5), torch.randn(5)  # the draws of `taken`, so that the third gradient is the same
    for _ in range(3):
        gradients = [torch.randn(value.shape) for value in parameters]
    for value, grad in zip(parameters, gradients, strict=True):
        value.grad = grad
    resumed.step()
    assert torch.equal(parameters[0], whole)


def test_an_optimiser_is_chosen_by_its_kind_and_left_out_where_it_is_the_usual():
    assert "kind" not in plain(Optimiser(lr=1e-2)) and plain(Device(weight_bits=4))["kind"] == "Device"
    assert parse(UpdateRule, {"lr": 1e-2}, "here") == Optimiser(lr=1e-2)
    assert parse(UpdateRule, {"kind": "Device", "weight_bits": 4}, "here") == Device(weight_bits=4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_mixed_block_is_antisymmetric_by_the_share_of_the_free_one(share):
    model, inputs, _ = transformer(init=0.3)
    torch.manual_seed(2)
    model.block = blocks.Mixed(share=share, init=0.3).build(16, 4, 6).double()
    z = torch.randn(1, 6, 16, dtype=torch.float64)
    x = model.clamp(inputs[:1]).detach()
    mixed = dense_jacobian(model, x, z)
    model.block = model.block.free
    free = dense_jacobian(model, x, z)
    assert torch.allclose(mixed - mixed.mT, share * (free - free.mT), atol=1e-10)


def test_the_mixed_block_is_what_it_is_taken_for():
    model, inputs, targets = transformer(init=0.3)
    model.block = blocks.Mixed(share=0.5).build(16, 4, 6).double()
    found = check(model, inputs, targets)
    assert found.ok, str(found)


def completion(hidden=0.5):
    model = build_model(SHAPE, HiddenPatches(tokens=4, size=9))
    torch.manual_seed(0)
    patches = torch.randn(5, 4, 9)
    order = torch.rand(5, 4).argsort(1)
    covered = (order < round(hidden * 4)).unsqueeze(-1)
    return model, torch.cat([patches.masked_fill(covered, 0), covered.float()], -1), patches.where(covered, float(IGNORED))


class SHAPE:
    """As much of a run's configuration as `build_model` asks for."""

    seed, model = 0, Completion(width=8, heads=2, block=blocks.Energy(causal=False))


def test_the_loss_of_a_completion_is_the_mean_squared_error_of_the_hidden_pixels():
    model, inputs, targets = completion()
    predictions = torch.randn(5, 4, 9)
    hidden = inputs[..., -1].bool()
    expected = torch.stack([(predictions[b] - targets[b])[hidden[b]].square().mean() for b in range(5)])
    assert torch.allclose(model.loss_of(predictions, targets), expected) and model.counted(targets).tolist() == [18] * 5
    right = torch.stack([((predictions[b] > GREY) == (targets[b] > GREY))[hidden[b]].sum() for b in range(5)])
    assert torch.equal(model.correct(predictions, targets), right)


def test_plain_ep_on_gradient_dynamics_completes_images_by_the_adjoints_gradient():
    model, inputs, targets = completion()
    model, inputs, targets = model.double(), inputs.double(), targets.double()
    report = eplib.gradient(model, inputs, targets, estimator=estimators.VectorField(beta=1e-3), solver=TIGHT, nudged=CLOSE)
    exact = adjoint_gradient(model, inputs, targets, report.free.value)
    assert all(one.error < 1e-4 for one in agreement(report.grads, exact).values())


def test_the_same_patches_are_hidden_each_time_and_others_in_each_image():
    train, test = ((torch.randn(count, 28, 28), torch.zeros(count).long()) for count in (40, 30))
    images = ImageDataset(train, test, classes=10, patch=7, batch=8, seed=0)
    data = MaskedImages(images, Masked(hidden=0.25, tested=20), 0)
    (inputs, targets), (again, _) = data.batch(3), data.batch(3)
    assert torch.equal(inputs, again) and inputs.shape == (8, 16, 50) and targets.shape == (8, 16, 49)
    hidden = inputs[..., -1].bool()
    assert hidden.sum(1).tolist() == [4] * 8 and len({tuple(row.tolist()) for row in hidden}) > 1
    assert not inputs[..., :-1][hidden].any() and (targets[~hidden] == IGNORED).all()
    assert sum(len(part) for part, _ in data.validation()) == 20 and 0.9 < data.baselines()["mean pixel"] < 1.2


def test_masked_images_are_not_for_another_model():
    with pytest.raises(ValueError, match="Completion"):
        Masked().fits(Transformer(width=8, heads=2, block=blocks.Thick(causal=False)))
    with pytest.raises(TypeError, match="HiddenPatches"):
        SHAPE.model.build(object())
