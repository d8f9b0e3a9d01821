"""A report's gradient in PyTorch's hands: `.grad` for a plain loop, and a loss that autograd differentiates.

The truth is autograd's own gradient where the block has one (`Feedforward`), and a dense float64 adjoint where it has none.
"""

import pytest
import torch
from torch import nn

import eplib
from eplib import blocks, estimators, models
from eplib.controllers import JacobianNorm, ResidualPenalty
from eplib.diagnostics import adjoint_gradient
from eplib.estimators import GradientError
from eplib.solvers import Relaxation
from systems import TIGHT, transformer

NUDGED = Relaxation(step=0.3, max_steps=2000, tol=1e-8)
WILD = Relaxation(step=2.0, max_steps=400, tol=1e-9)
EXACT = {"estimator": estimators.DyadicEP(), "solver": TIGHT, "nudged": NUDGED}
BACKPROP = {"estimator": estimators.Backprop(), "solver": TIGHT}
PENALTIES = (JacobianNorm(strength=0.1), ResidualPenalty())


def feedforward():
    torch.manual_seed(2)
    model = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Feedforward()).double()
    return model, torch.randint(11, (4, 6)), torch.randint(11, (4, 6))


def autograd_loss(model, inputs, targets):
    """PyTorch's own, through the block's graph."""
    return model.loss(model.block.output(model.block.start(model.clamp(inputs))), targets).mean()


def assigned(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(found, truth, tolerance=1e-12):
    """The same names, None for the same, and values that differ by rounding alone."""
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert (found[name] is None) == (value is None), name
        assert value is None or (found[name] - value).norm() <= tolerance * (1 + value.norm()), name


# --- .grad for a plain loop

@pytest.mark.parametrize("optimiser", [lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
                                       lambda p: torch.optim.AdamW(p, lr=1e-2)], ids=["SGD", "AdamW"])
def test_a_plain_loop_trains_as_pytorch_s_own_does(optimiser):
    model, inputs, targets = feedforward()
    other = feedforward()[0]
    ours, theirs = optimiser(model.parameters()), optimiser(other.parameters())
    for _ in range(5):
        eplib.gradient(model, inputs, targets, **BACKPROP).assign(model)
        ours.step()
        theirs.zero_grad()
        autograd_loss(other, inputs, targets).backward()
        theirs.step()
    same(dict(model.named_parameters()), dict(other.named_parameters()))


def test_what_is_assigned_is_the_task_s_gradient_plus_the_penalties_and_replaces_what_was_there():
    model, inputs, targets = transformer(init=0.5)
    report = eplib.gradient(model, inputs, targets, penalties=PENALTIES, **EXACT)
    alone = [eplib.gradient(model, inputs, targets, penalties=(penalty,), **EXACT).penalty_grads for penalty in PENALTIES]
    task = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    for _ in range(2):
        report.assign(model)
    same(assigned(model), {name: sum((part[name] for part in alone if name in part), value) for name, value in task.items()},
         1e-6)
    report.assign(model, task=False)
    same(assigned(model), {name: alone[0][name] + alone[1][name] if name in alone[0] else None for name in task})
    assert any(value is not None and value.any() for value in assigned(model).values()) and model.readout.weight.grad is None


def test_a_frozen_parameter_gets_none_and_clipping_leaves_the_report_as_it_is():
    model, inputs, targets = transformer(init=0.5)
    model.embedding.weight.grad = torch.ones_like(model.embedding.weight)  # of an earlier step, which an optimiser would take
    model.embedding.requires_grad_(False)
    report = eplib.gradient(model, inputs, targets, **EXACT)
    kept = {name: value.clone() for name, value in report.grads.items()}
    report.assign(model)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert model.embedding.weight.grad is None
    assert all(torch.equal(report.grads[name], value) for name, value in kept.items())
    assert sum(value.square().sum() for value in assigned(model).values() if value is not None).sqrt() < 1.01e-3


def no_such(model):
    model.block = blocks.Energy().build(16, 4, 6).double()


def wider(model):
    model.readout = nn.Linear(16, 12, bias=False)


def frozen(model):
    model.readout.requires_grad_(False)


def extended(model):
    model.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("change, said", [
    (no_such, r"gradient \(\d+.*\) of 'block\.layers\..*the model has no such parameter"),
    (wider, r"gradient \(11, 16\) of 'readout\.weight', and the model trains \(12, 16\) there"),
    (frozen, r"of 'readout\.weight', and the model does not train it"),
    (extended, r"the model trains extra\.weight, extra\.bias, of which the report has no gradient")],
    ids=lambda part: getattr(part, "__name__", ""))
def test_another_model_than_the_report_s_is_refused_and_nothing_of_it_is_set(change, said):
    model, inputs, targets = transformer(init=0.5)
    report = eplib.gradient(model, inputs, targets, **EXACT)
    change(model)
    with pytest.raises(ValueError, match=said):
        report.assign(model)
    assert not any(value is not None for value in assigned(model).values())


# --- what failed

def broken(model):
    with torch.no_grad():
        model.readout.weight[0] = torch.inf


def overdamped(model):
    model.block.damping = 1.0  # a step of 2 takes z to z - 2 * 2 z


def exploding(model):
    with torch.no_grad():
        model.block.layers.w2.weight[0] = torch.nan


FAILED = {"nudged phase diverged": (None, EXACT | {"nudged": WILD}),
          "free phase diverged": (overdamped, EXACT | {"solver": WILD}),
          "gradient is not finite": (broken, {"estimator": estimators.OneStep(), "solver": TIGHT}),
          "free phase is not finite": (exploding, EXACT)}


@pytest.mark.parametrize("said", FAILED)
def test_a_failed_phase_is_named_and_the_penalties_can_be_had_without_the_task(said):
    change, asked = FAILED[said]
    model, inputs, targets = transformer()
    if change:
        change(model)
    report = eplib.gradient(model, inputs, targets, penalties=(ResidualPenalty(),), **asked)
    with pytest.raises(GradientError, match=f"the {said}, .*task=False") as caught:
        report.assign(model)
    assert caught.value.report is report and not any(value is not None for value in assigned(model).values())
    with pytest.raises(GradientError, match=f"the {said}") as caught:
        eplib.ep_loss(model, inputs, targets, penalties=(ResidualPenalty(),), **asked)
    caught.value.report.assign(model, task=False)
    assert {name for name, value in assigned(model).items() if value is not None} == set(report.penalty_grads)
    assert bool(report.penalty_grads) == ("free" not in said)


def test_a_penalty_that_is_not_finite_is_refused():
    model, inputs, targets = transformer(init=0.5)
    report = eplib.gradient(model, inputs, targets, penalties=(ResidualPenalty(),), **EXACT)
    next(iter(report.penalty_grads.values())).fill_(torch.nan)
    for task in (True, False):
        with pytest.raises(GradientError, match="the gradient of the penalties is not finite"):
            report.assign(model, task=task)


# --- a loss that autograd differentiates

def test_the_loss_and_its_gradient_are_autograd_s_where_the_block_has_one():
    model, inputs, targets = feedforward()
    loss, _ = eplib.ep_loss(model, inputs, targets, **BACKPROP)
    truth = autograd_loss(model, inputs, targets)
    assert loss.shape == () and loss.dtype is torch.float64 and abs(loss - truth) < 1e-12
    for found, value in zip(torch.autograd.grad(loss, list(model.parameters())),
                            torch.autograd.grad(truth, list(model.parameters())), strict=True):
        assert torch.allclose(found, value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("asked", [
    EXACT, EXACT | {"penalties": PENALTIES}, {"estimator": estimators.BPTT(steps=9), "solver": TIGHT},
    EXACT | {"estimator": estimators.AsymEP(beta=1e-3, nudging="random-sign"), "state": {"sign_draws": torch.tensor([3])}}],
    ids=["DyadicEP", "penalties", "BPTT", "random-sign"])
def test_backward_gives_what_gradient_gives_to_the_last_bit_and_the_report_beside_it(asked):
    model, inputs, targets = transformer(init=0.5)
    model.embedding.requires_grad_(False)
    truth = eplib.gradient(model, inputs, targets, **asked)
    loss, report = eplib.ep_loss(model, inputs, targets, **asked)
    assert loss.item() == report.loss == truth.loss and report.measured == truth.measured
    assert report.state.keys() == truth.state.keys()
    assert all(torch.equal(report.state[key], value) for key, value in truth.state.items())
    loss.backward()
    for name, parameter in model.named_parameters():
        if name == "embedding.weight":
            assert parameter.grad is None
        else:
            whole = truth.grads[name] + truth.penalty_grads[name] if name in truth.penalty_grads else truth.grads[name]
            assert torch.equal(parameter.grad, whole), name


def test_micro_batches_accumulate_to_the_gradient_of_the_whole_batch():
    model, inputs, targets = transformer(init=0.5)
    for one, target in zip(inputs.split(1), targets.split(1), strict=True):
        loss, _ = eplib.ep_loss(model, one, target, **EXACT)
        (loss / 4).backward()
    same(assigned(model), adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value), 1e-6)


def test_the_loss_adds_to_other_losses_of_the_same_weights():
    model, inputs, targets = transformer(init=0.5)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    loss, _ = eplib.ep_loss(model, inputs, targets, **EXACT)
    (-2 * loss + 0.5 * sum(parameter.square().sum() for parameter in model.parameters())).backward()
    same(assigned(model), {name: parameter.detach() - 2 * truth[name] for name, parameter in model.named_parameters()}, 1e-6)


def test_loss_scaling_a_schedule_and_an_optimiser_with_a_closure_work_as_with_any_loss():
    model, inputs, targets = feedforward()
    other = feedforward()[0]

    def trained(model, loss_of):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
        for _ in range(3):
            optimiser.zero_grad()
            scaler.scale(loss_of(model)).backward()
            scaler.step(optimiser)
            scaler.update()
            schedule.step()
        newton = torch.optim.LBFGS(model.parameters(), max_iter=4)

        def closure():
            newton.zero_grad()
            loss = loss_of(model)
            loss.backward()
            return loss

        newton.step(closure)
        return dict(model.named_parameters())

    same(trained(model, lambda model: eplib.ep_loss(model, inputs, targets, **BACKPROP)[0]),
         trained(other, lambda model: autograd_loss(model, inputs, targets)), 1e-9)


def test_the_loss_is_differentiated_once_and_under_no_grad_not_at_all():
    model, inputs, targets = transformer(init=0.5)
    loss, report = eplib.ep_loss(model, inputs, targets, **EXACT)
    weight = model.block.layers.wo.weight
    for _ in range(2):
        kept, = torch.autograd.grad(loss, weight, retain_graph=True)
        assert torch.equal(kept, report.grads["block.layers.wo.weight"])
    with pytest.raises(RuntimeError, match="no derivative of its own; differentiate without create_graph"):
        torch.autograd.grad(loss, weight, create_graph=True, retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    with torch.no_grad():
        assert not eplib.ep_loss(model, inputs, targets, **EXACT)[0].requires_grad


def test_the_gradient_is_that_of_the_weights_at_the_call():
    model, inputs, targets = transformer(init=0.5)
    loss, report = eplib.ep_loss(model, inputs, targets, **EXACT)
    with torch.no_grad():
        model.readout.weight.mul_(2)
    loss.backward()
    assert torch.equal(model.readout.weight.grad, report.grads["readout.weight"])
