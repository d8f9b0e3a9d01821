import pytest
import torch

from eplib.solvers import Relaxation, Status, norm, relative_force
from systems import LinearModel, TIGHT, linear_batch, transformer


def test_the_closed_form_fixed_point_of_a_linear_system():
    model, (inputs, _) = LinearModel(symmetric=False), linear_batch()
    solution = model.settle(inputs, TIGHT)
    exact = -torch.linalg.solve(model.block.matrix, model.clamp(inputs).T).T
    assert solution.status is Status.CONVERGED
    assert torch.allclose(solution.value, exact, rtol=1e-10)


def test_every_sample_stops_by_itself_whatever_its_company():
    model, inputs, _ = transformer()
    solver = Relaxation(step=0.4, max_steps=500, tol=1e-6)
    together = model.settle(inputs, solver)
    assert together.steps.unique().numel() > 1  # else this shows nothing
    assert (together.residual <= 1e-6).all()
    order = torch.tensor([2, 0, 3, 1])
    permuted = model.settle(inputs[order], solver)
    assert torch.equal(permuted.steps, together.steps[order])
    assert torch.allclose(permuted.value, together.value[order], atol=1e-12)
    for b in range(4):
        alone = model.settle(inputs[b:b + 1], solver)
        assert alone.steps.item() == together.steps[b].item()
        assert torch.allclose(alone.value[0], together.value[b], atol=1e-12)


def test_steps_and_evaluations_are_counted_exactly():
    calls = []

    def force(z):
        calls.append(1)
        return -z

    solution = Relaxation(step=0.5, max_steps=7, tol=0.0).solve(force, torch.ones(2, 3))
    assert solution.steps.tolist() == [7, 7]
    assert solution.evaluations == len(calls) == 8
    assert solution.status is Status.MAX_STEPS


def test_the_residual_is_force_over_state_not_times_the_step():
    z, f = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = torch.stack([f[b].norm() / z[b].norm() for b in range(3)])
    assert torch.allclose(relative_force(f, z), expected)
    for step in (0.1, 0.5):
        solution = Relaxation(step=step, max_steps=1, tol=10.0).solve(lambda _: f, z)
        assert torch.allclose(solution.residual, expected)


def test_the_lowest_residual_iterate_is_returned():
    target = torch.zeros(1, 4)
    pushes = iter([torch.full((1, 4), 1.0), torch.full((1, 4), 0.01), torch.full((1, 4), 5.0)])
    solution = Relaxation(step=0.5, max_steps=2, tol=0.0).solve(lambda _: next(pushes), target + 1)
    assert torch.allclose(solution.value, torch.full((1, 4), 1.5))  # the state after the first step


def test_an_explosion_that_looks_converged_is_caught():
    """Each step adds a bounded push to a state that a kick has made so large that step * F is below its float spacing."""
    solver = Relaxation(step=0.5, max_steps=200, tol=1e-6)

    def force(z):
        return torch.where(norm(z)[:, None] < 1e8, 40 * z, torch.ones_like(z))

    solution = solver.solve(force, torch.ones(1, 4))
    last = torch.full((1, 4), 1e9)
    assert torch.equal(last + 0.5 * force(last), last) and relative_force(force(last), last) < 1e-6  # it looks converged
    assert solution.status is Status.DIVERGED


def test_one_bad_sample_spoils_neither_the_others_nor_the_status():
    def force(z):
        rate = torch.tensor([[-1.0], [30.0], [float("nan")]])[: len(z)]
        return rate * z

    solution = Relaxation(step=0.5, max_steps=60, tol=1e-4).solve(force, torch.ones(3, 4))
    assert solution.status is Status.NONFINITE
    # F/z of the first is constant: it runs to the end like it would alone, and its state decays as it should
    assert torch.isfinite(solution.value[:2]).all()
    assert Relaxation(step=0.5, max_steps=60, tol=1e-4).solve(force, torch.ones(2, 4)).status is Status.DIVERGED


def test_no_graph_is_kept():
    model, inputs, _ = transformer()
    assert not model.settle(inputs, Relaxation(max_steps=3, tol=0.0)).value.requires_grad


@pytest.mark.parametrize("values", [{"step": 0.0}, {"step": 3.0}, {"max_steps": 0}, {"tol": -1e-3}, {"tolerance": 1e-3}])
def test_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Relaxation(**values)
