"""The predicted start of the free phase."""

import torch

import eplib
from eplib import blocks, estimators, models
from eplib.solvers import Relaxation
from eplib.starts import LinearStart

SOLVER = Relaxation(step=0.8, max_steps=100, tol=1e-5)


def gradients(start, count):
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=16, heads=2, context=12, block=blocks.Thick(init=0.5))
    state, reports = {}, []
    for seed in range(count):
        inputs = torch.randint(11, (16, 12), generator=torch.Generator().manual_seed(seed))
        reports.append(eplib.gradient(model, inputs, inputs.roll(-1, 1), estimator=estimators.DyadicEP(), solver=SOLVER,
                                      start=start, state=state))
        state = reports[-1].state
    return reports


def test_it_saves_steps_and_changes_no_fixed_point():
    cold, warm = gradients(None, 3), gradients(LinearStart(), 3)
    assert torch.equal(cold[0].free.steps, warm[0].free.steps)  # nothing is fitted yet
    for with_start, without in zip(warm[1:], cold[1:], strict=True):
        assert with_start.free.steps.sum() < without.free.steps.sum()
        apart = (with_start.free.value - without.free.value).norm() / without.free.value.norm()
        assert apart < 20 * SOLVER.tol  # residual over 1 - rate
        assert (with_start.free.residual <= 1e-5).all()


def test_it_is_fitted_every_so_many_gradients():
    fits = [report.state["start"] for report in gradients(LinearStart(refresh=2), 4)]
    assert fits[0] is fits[1] and fits[2] is fits[3] and not torch.equal(fits[0], fits[2])


def test_a_linear_map_is_found_and_another_width_is_not_predicted():
    torch.manual_seed(0)
    x, matrix, shift, carried = torch.randn(4, 9, 5), torch.randn(5, 5), torch.randn(5), {}
    start = LinearStart()
    assert start(x, carried) is None
    start.learn(x, x @ matrix + shift, carried)
    other = torch.randn(2, 3, 5)
    assert torch.allclose(start(other, carried), other @ matrix + shift, atol=1e-4)
    assert start(torch.randn(2, 3, 6), carried) is None


def test_a_clamp_that_leaves_the_map_undetermined_gives_a_finite_prediction():
    """A channel that is always zero makes the normal equations singular; the ridge gives it the weight zero."""
    torch.manual_seed(0)
    x, z, carried = torch.randn(2, 3, 5), torch.randn(2, 3, 5), {}
    x[..., 1] = 0
    LinearStart().learn(x, z, carried)
    assert carried["start"].isfinite().all() and carried["start"][1].abs().max() < 1e-6


def test_a_share_of_the_gradients_starts_cold():
    reports = gradients(LinearStart(cold=0.4), 10)
    cold = gradients(None, 10)
    alike = [torch.equal(a.free.steps, b.free.steps) for a, b in zip(reports, cold, strict=True)]
    assert alike == [True, False, True, False, True, False, False, True, False, True]  # the first: nothing is fitted yet
    state = reports[-1].state
    assert LinearStart(cold=0.4)(torch.ones(1, 12, 16), state) is not None  # an evaluation from there is not one of them
