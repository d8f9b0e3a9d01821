"""The gradient-descending updates: EP's nudged relaxation step by step against BPTT's last steps, in float64."""

from dataclasses import replace

import pytest
import torch

from eplib import blocks, estimators, models
from eplib.diagnostics import dense_jacobian, gdu
from eplib.solvers import Relaxation
from systems import linear_batch, linear_system, transformer

COUNTS = (1, 2, 4, 9)
SETTLED = Relaxation(step=0.6, max_steps=2000, tol=1e-11)


def errors(system, *chosen):
    """Relative differences of the sums, for each estimator one a number of steps."""
    bptt = gdu.bptt_sums(*system, COUNTS, SETTLED)
    sums = [gdu.nudged_sums(*system, one, COUNTS, SETTLED) for one in chosen]
    return [[row["error"] for row in gdu.step_by_step(system[0], one, bptt)] for one in sums]


def energy():
    torch.manual_seed(3)
    model = models.LanguageModel(vocab=11, width=16, heads=4, context=6, block=blocks.Energy(init=0.3)).double()
    return model, torch.randint(0, 11, (4, 6)), torch.randint(0, 11, (4, 6))


@pytest.mark.parametrize("kind", ["language", "image"])
def test_every_step_of_the_linear_response_is_one_more_step_of_bptt(kind):
    found = errors(transformer(kind, init=0.3), estimators.DyadicEP(beta=1e-3, held=False), estimators.Implicit())
    assert max(map(max, found)) < 1e-8


@pytest.mark.parametrize("kind", ["language", "image"])
def test_every_step_of_corrected_ep_is_one_more_step_of_bptt_up_to_the_square_of_the_nudge(kind):
    makes = (estimators.AsymEP, estimators.Tracking)
    found = errors(transformer(kind, init=0.3), *(make(beta=beta) for beta in (1e-2, 1e-3) for make in makes))
    for large, small in zip(found[:2], found[2:], strict=True):
        assert max(small) < 1e-4
        assert all(50 < a / b < 200 for a, b in zip(large[1:], small[1:], strict=True)), (large, small)  # 100, a tenth squared


def test_plain_ep_departs_from_bptt_after_the_first_step_where_j_is_not_symmetric():
    found, = errors(transformer(init=0.5), estimators.VectorField(beta=1e-3))
    assert found[0] < 1e-8  # s g in either: J enters with the second
    assert min(found[1:]) > 0.02 and found[-1] > 0.2


def test_plain_ep_steps_with_bptt_where_j_is_symmetric():
    system = energy()
    model, inputs, _ = system
    z = model.settle(inputs, SETTLED).value[:1]
    jacobian = dense_jacobian(model, model.clamp(inputs[:1]), z)
    assert (jacobian - jacobian.mT).norm() < 1e-10 * jacobian.norm()  # what Ernoult et al. assume
    found, = errors(system, estimators.VectorField(beta=1e-3))
    assert max(found) < 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
def test_in_a_linear_system_the_sums_are_the_partial_neumann_series(symmetric):
    system, (drive, goal) = linear_system(symmetric), linear_batch()
    a = system.block.matrix.detach()
    z = -torch.linalg.solve(a, (drive @ system.inflow.detach().mT).mT).mT
    total, term = torch.zeros_like(z), z - goal  # g of the quadratic loss
    exact = {}
    for count in range(1, max(COUNTS) + 1):
        total, term = total + SETTLED.step * term, term + SETTLED.step * term @ a
        exact[count] = total.mT @ drive / len(drive)
    bptt = gdu.bptt_sums(system, drive, goal, COUNTS, SETTLED)
    ep = gdu.nudged_sums(system, drive, goal, estimators.DyadicEP(beta=0.2, held=False), COUNTS, SETTLED)
    for count, ours, theirs in zip(COUNTS, ep, bptt, strict=True):
        for found in (ours, theirs):
            assert torch.allclose(found["inflow"], exact[count], rtol=1e-8, atol=1e-8)


def test_bptt_whose_forward_has_not_settled_is_refused():
    model, inputs, targets = transformer()
    with pytest.raises(ValueError, match=r"after 5 steps.*allow more"):
        gdu.bptt_sums(model, inputs, targets, COUNTS, replace(SETTLED, max_steps=5))


def test_updates_are_what_each_step_adds_and_a_diverged_phase_has_none():
    model, inputs, targets = transformer(init=0.3)
    sums = gdu.bptt_sums(model, inputs, targets, (1, 2), SETTLED)
    rows = gdu.step_by_step(model, [None, sums[1]], sums)
    assert rows[0] is None and rows[1]["error"] == 0
    rows = gdu.step_by_step(model, sums, sums)
    moved = [torch.cat([(grads[name] - before[name]).flatten() for name in grads if not name.startswith(("norm", "readout"))])
             for before, grads in (({name: 0 * value for name, value in sums[0].items()}, sums[0]), (sums[0], sums[1]))]
    assert [row["update"] for row in rows] == pytest.approx([one.norm().item() for one in moved])
