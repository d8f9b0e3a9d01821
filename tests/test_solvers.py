import pytest
import torch

import eplib
from eplib import estimators
from eplib.blocks import Jacobian
from eplib.config import configuration
from eplib.diagnostics import agreement
from eplib.solvers import (
    Anderson,
    FixedHorizon,
    Homotopy,
    MixedPrecision,
    Relaxation,
    Snapshot,
    Solver,
    Status,
    Substitution,
    norm,
    relative_force,
)
from systems import TIGHT, hurried, linear_batch, linear_system, transformer


def test_the_closed_form_fixed_point_of_a_linear_system():
    model, (inputs, _) = linear_system(symmetric=False), linear_batch()
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


def test_a_residual_at_the_tolerance_has_settled_and_one_above_it_has_not():
    for tol, steps, status in ((0.5, 0, Status.CONVERGED), (0.499, 3, Status.MAX_STEPS)):
        solution = Relaxation(step=0.5, max_steps=3, tol=tol).solve(lambda z: -z / 2, torch.ones(2, 4))
        assert solution.residual.tolist() == [0.5, 0.5]  # powers of two: exactly
        assert solution.steps.tolist() == [steps] * 2 and solution.status is status


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


def test_anderson_finds_the_same_fixed_point_in_fewer_evaluations():
    model, inputs, _ = transformer(init=0.5)
    plain = model.settle(inputs, Relaxation(step=0.5, max_steps=500, tol=1e-9))
    fast = model.settle(inputs, Anderson(step=0.5, max_steps=500, tol=1e-9))
    assert fast.status is plain.status is Status.CONVERGED
    assert torch.allclose(fast.value, plain.value, atol=1e-7)
    assert fast.evaluations < 0.5 * plain.evaluations


def test_anderson_is_exact_on_a_linear_system_after_as_many_steps_as_unknowns():
    """With a full memory it is GMRES (Walker & Ni 2011): six unknowns, a residual at round-off after seven differences."""
    model, (inputs, _) = linear_system(symmetric=False), linear_batch()
    solution = model.settle(inputs, Anderson(step=0.5, max_steps=50, tol=1e-9, memory=8))
    assert solution.status is Status.CONVERGED and solution.steps.max() <= 8
    assert model.settle(inputs, Relaxation(step=0.5, max_steps=50, tol=1e-9)).steps.max() > 25


def test_anderson_treats_every_sample_alone():
    model, inputs, _ = transformer(init=0.5, damping=0.5)
    solver = Anderson(step=0.4, max_steps=300, tol=1e-6)
    together = model.settle(inputs, solver)
    for b in range(4):
        alone = model.settle(inputs[b:b + 1], solver)
        assert alone.steps.item() == together.steps[b].item()
        assert torch.allclose(alone.value[0], together.value[b], atol=1e-9)


@pytest.mark.parametrize("solver", [Anderson(step=0.5), Anderson(), Substitution(chunk=2)], ids=["0.5", "0.7", "tokens"])
@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_acceleration_begins_near_the_fixed_point(solver, backend, request):
    """Differences taken on the way there kept half of these samples from settling in 64 steps."""
    if backend == "compiled":
        request.getfixturevalue("compiled_kernel")
    model, inputs = hurried()
    with torch.no_grad():
        x, dynamics = model.clamp(inputs), model.dynamics(backend)
        assert (relative_force(model.block(x, x), x) > 3).all()  # else this shows nothing
        found = solver.settle(dynamics, x)
        plain = Relaxation(step=solver.step).settle(dynamics, x)
    assert found.status is Status.CONVERGED and found.fallbacks == 0
    assert found.evaluations <= 10 and found.evaluations < plain.evaluations


def test_where_plain_relaxation_never_comes_near_acceleration_begins_all_the_same():
    """-z - 6 tanh(z): at step 0.7 Euler ends in a cycle of two states, along which the force is three times as long as they."""
    def force(z):
        return -z - 6 * torch.tanh(z)

    start = torch.tensor([[3.0, 2.0], [-4.0, 1.0], [0.5, 5.0]], dtype=torch.float64)
    plain = Relaxation(step=0.7).solve(force, start)
    assert plain.status is Status.MAX_STEPS and (plain.residual > 1).all()
    found = Anderson(step=0.7).solve(force, start, lambda push, _: norm(push))
    assert found.status is Status.CONVERGED and found.value.norm() < 1e-3


def test_an_adjoint_phase_is_accelerated_at_any_distance():
    """It is linear, so differences tell its slope everywhere: six unknowns take seven steps although a first step leaves more
    than it found."""
    generator = torch.Generator().manual_seed(0)
    matrix = -3 * torch.eye(6, dtype=torch.float64) + torch.randn(6, 6, generator=generator, dtype=torch.float64)
    slope = torch.randn(3, 6, generator=generator, dtype=torch.float64)

    class Linear:
        def transposed(self, a):
            return a @ matrix

    assert (norm(slope @ matrix + slope) > norm(slope)).all()  # else this shows nothing
    found = Anderson(step=0.7, tol=1e-7, memory=8).adjoint(Linear(), slope, norm(slope))
    assert found.status is Status.CONVERGED and (found.steps <= 8).all()
    assert torch.allclose(found.value @ matrix, -slope, atol=1e-6)


def test_a_stalled_acceleration_falls_back_to_relaxation_and_is_counted():
    """A force with slope 1 up to a kink and 0.01 beyond it: from there the extrapolated zero lies near -10, where the force is
    some ninety times as large; plain relaxation contracts everywhere."""
    def force(z):
        return -torch.minimum(z, 0.1 + 0.01 * z)

    start = torch.tensor([[1.0, 0.6, 0.3], [0.5, 0.8, 0.9], [0.08, 0.05, 0.02], [-1.0, -0.6, -0.3]], dtype=torch.float64)
    solve = {"start": start, "measure": lambda push, _: norm(push)}
    wild = Anderson(step=0.5, max_steps=300, tol=1e-9, memory=3).solve(force, **solve)
    assert wild.fallbacks == 2  # the samples beyond the kink, once each
    assert wild.status is Status.CONVERGED and wild.value.abs().max() < 1e-8
    assert (wild.steps[2:] == 2).all() and (wild.steps[:2] > 50).all()  # on one slope the extrapolation is exact
    assert Relaxation(step=0.5, max_steps=300, tol=1e-9).solve(force, **solve).status is Status.CONVERGED


def test_a_stalled_acceleration_halves_its_step_until_relaxation_contracts():
    """Eigenvalues down to -30: at step 0.8 plain relaxation multiplies by 23; it contracts from step 0.05 on."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    matrix = vectors @ torch.diag(-torch.linspace(1, 30, 40, dtype=torch.float64)) @ vectors.mT
    drive = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    solver = Anderson(step=0.8, max_steps=400, tol=1e-6, memory=1)
    found = solver.solve(lambda z: z @ matrix.mT + drive, drive, lambda push, _: norm(push))
    assert found.fallbacks == 3 and found.status is Status.CONVERGED  # each sample once
    exact = -torch.linalg.solve(matrix, drive.mT).mT
    assert torch.allclose(found.value, exact, atol=1e-6)
    plain = Relaxation(step=0.8, max_steps=400, tol=1e-6).solve(lambda z: z @ matrix.mT + drive, drive)
    assert plain.status is Status.DIVERGED  # else halving shows nothing


def test_samples_that_have_settled_leave_the_batch():
    """Half of it and more at a time; what they have reached and the caller's start stay as they were."""
    model, inputs, _ = transformer(init=0.5)
    inputs = torch.cat([inputs, inputs.flip(1)])
    solver = Anderson(step=0.5, max_steps=100, tol=1e-8)
    truth = model.settle(inputs, solver)
    start = truth.value.clone()
    start[2], start[5], start[6] = 0.1, model.clamp(inputs)[5].detach(), truth.value[6] + 1e-6
    kept, rows, force = start.clone(), [], model.block.forward

    def counting(z, x):
        rows.append(len(z))
        return force(z, x)

    model.block.forward = counting
    found = model.settle(inputs, solver, start=start)
    assert rows[0] == 8 and rows[1] == 3 and rows[-1] < 3 and sorted(rows, reverse=True) == rows
    assert found.evaluations == -(-sum(rows) // 8) < len(rows)
    assert (found.steps == 0).tolist() == [True, True, False, True, True, False, False, True]
    assert len(rows) == found.steps.max() + 1
    assert torch.equal(start, kept) and found.status is Status.CONVERGED and (found.residual <= 1e-8).all()
    assert torch.allclose(found.value, truth.value, atol=1e-6) and torch.equal(found.value[0], truth.value[0])
    assert torch.allclose(relative_force(force(found.value, model.clamp(inputs)), found.value), found.residual, rtol=1e-4)


class Precisions:
    """Remembers for every force of a block, or transposed product of its Jacobian, whether it was in bfloat16."""

    def __init__(self, monkeypatch, kind, name):
        self.seen, inner = [], getattr(kind, name)

        def watched(this, *args):
            self.seen.append(torch.is_autocast_enabled("cpu"))
            return inner(this, *args)

        monkeypatch.setattr(kind, name, watched)


def test_mixed_precision_ends_in_the_states_own_precision(monkeypatch):
    model, inputs, _ = transformer(init=0.5)
    model = model.float()
    truth = model.settle(inputs, Anderson(step=0.5, max_steps=200, tol=1e-6))
    forces = Precisions(monkeypatch, type(model.block), "forward")
    found = model.settle(inputs, MixedPrecision(step=0.5, max_steps=200, tol=1e-5))
    rounded = sum(forces.seen)
    assert 1 < rounded < len(forces.seen) and forces.seen == [True] * rounded + [False] * (len(forces.seen) - rounded)
    assert found.status is Status.CONVERGED and torch.allclose(found.value, truth.value, atol=1e-3)
    with torch.no_grad():
        left = relative_force(model.block(found.value, model.clamp(inputs)), found.value)
    assert (left <= 1.01e-5).all() and torch.allclose(left, found.residual, rtol=1e-2)
    short = model.settle(inputs, MixedPrecision(step=0.5, max_steps=2, tol=1e-5))
    with torch.no_grad():
        left = relative_force(model.block(short.value, model.clamp(inputs)), short.value)
    assert short.status is Status.MAX_STEPS and torch.allclose(left, short.residual, rtol=1e-2)  # of a last, exact evaluation
    easy = model.settle(inputs, MixedPrecision(step=0.5, tol=0.5))
    assert (easy.residual <= 0.5).all() and easy.evaluations > 1 and forces.seen[-1] is False


def test_mixed_precision_gives_the_same_gradient_and_never_rounds_a_contrast(monkeypatch):
    model, inputs, targets = transformer(init=0.5)
    model = model.float()
    kinds = [kind(step=0.5, max_steps=200, tol=1e-5) for kind in (Anderson, MixedPrecision)]
    back = Precisions(monkeypatch, Jacobian, "transposed")
    for estimator in (estimators.DyadicEP(), estimators.AsymEP(beta=0.01)):  # the nudged phase is solved as the free one is
        exact, ours = (eplib.gradient(model, inputs, targets, estimator=estimator, solver=solver) for solver in kinds)
        assert any(back.seen) == isinstance(estimator, estimators.DyadicEP)
        assert agreement(ours.grads, exact.grads)["total"].cosine > 0.9999 and (ours.nudged.residual <= 1e-3).all()
        back.seen.clear()


def test_mixed_precision_is_refused_where_it_would_do_nothing(compiled_kernel):
    model, inputs, targets = transformer(init=0.5)
    with pytest.raises(ValueError, match=r"MixedPrecision is for float32 states and would do nothing to torch.float64"):
        eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=Anderson(), nudged=MixedPrecision())
    with pytest.raises(ValueError, match=r"nothing may be rounded, so the half precision of nudged=MixedPrecision"):
        eplib.gradient(model, inputs, targets, estimator=estimators.AsymEP(), solver=Anderson(), nudged=MixedPrecision())
    model = model.float()
    for phases in ({"solver": MixedPrecision()}, {"solver": Anderson(), "nudged": MixedPrecision()}):
        with pytest.raises(ValueError, match=r"MixedPrecision .* would do nothing to the compiled kernel"):
            eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), backend="compiled", **phases)


@configuration
class Watched(Relaxation):
    """Plain relaxation that counts its moves."""

    def next(self, state, push, residual, best, history):
        MOVES.append(len(state))
        return super().next(state, push, residual, best, history)


MOVES: list[int] = []


@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), estimators.AsymEP(beta=0.01)], ids=lambda one: one.kind)
def test_a_solver_of_ones_own_makes_every_move_whatever_computes_the_forces(compiled_kernel, estimator):
    model, inputs, targets = transformer(init=0.5)
    model, phase = model.float(), {"step": 0.5, "max_steps": 200, "tol": 1e-5}
    truth = eplib.gradient(model, inputs, targets, estimator=estimator, solver=Relaxation(**phase))
    for backend in ("torch", "compiled"):
        MOVES.clear()
        found = eplib.gradient(model, inputs, targets, estimator=estimator, solver=Watched(**phase), backend=backend)
        assert len(MOVES) == int(found.free.steps.max() + found.nudged.steps.max()) > 20
        assert agreement(found.grads, truth.grads)["total"].cosine > 0.9999


def test_the_kernel_has_no_loop_for_a_solver_that_overrides_one_unless_it_says_so():
    class Own:
        def next(self, state, push, residual, best, history):
            return state

    class Alone(Own, Solver):
        pass

    def of(*bases, **named):
        return type("Mine", bases, named).in_kernel

    assert of(Relaxation) and of(Anderson, patience=3) and Substitution.in_kernel
    assert not (of(Own, Relaxation) or of(Relaxation, Alone) or of(Watched) or MixedPrecision.in_kernel)
    for name in ("next", "history", "solve"):
        assert not of(Anderson, **{name: lambda *_: None})
        assert of(Anderson, **{name: lambda *_: None, "in_kernel": True})
    assert not (of(Relaxation, latest=True) or of(Relaxation, hindsight=True))


@pytest.mark.parametrize("missing", ["step", "max_steps", "tol"])
def test_a_solver_without_a_step_a_horizon_or_a_tolerance_is_refused_when_it_is_defined(missing):
    given = {"step": float, "max_steps": int, "tol": float}
    with pytest.raises(TypeError, match=f"Mine is a Solver without {missing}; .*solvers.Relaxation"):
        configuration(type("Mine", (Solver,), {"__annotations__": {name: given[name] for name in given if name != missing}}))
    mine = configuration(type("Mine", (Solver,), {"__annotations__": given}))
    fixed = configuration(type("Mine", (Solver,), {"step": 0.5, "max_steps": 9, "tol": 0.0}))
    for solver in (mine(step=0.5, max_steps=9, tol=0.0), fixed()):
        assert solver.solve(torch.neg, torch.ones(1, 2)).steps.tolist() == [9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision_are_refused_by_every_phase(dtype):
    """Where the bound on a diverging state overflowed to infinity and a residual of 1e-4 is below the type's spacing."""
    model, inputs, targets = transformer()
    model = model.to(dtype)
    asked = {"estimator": estimators.DyadicEP(), "solver": Anderson()}
    for call in (lambda: model.settle(inputs, Relaxation()), lambda: model.generate(inputs[0, :3], 1, Relaxation()),
                 lambda: eplib.gradient(model, inputs, targets, **asked),
                 lambda: Anderson().solve(torch.neg, torch.ones(1, 2).to(dtype)),
                 lambda: eplib.gradient(model, inputs, targets, estimator=estimators.BPTT(steps=2), solver=Anderson())):
        with pytest.raises(ValueError, match=r"float16.*call model.float\(\).*MixedPrecision"):
            call()


def test_an_active_autocast_is_refused_by_every_phase():
    model, inputs, targets = transformer()
    model = model.float()
    asked = {"estimator": estimators.AsymEP(), "solver": Anderson()}
    for call in (lambda: model.settle(inputs, Relaxation()), lambda: model.generate(inputs[0, :3], 1, Relaxation()),
                 lambda: eplib.gradient(model, inputs, targets, **asked),
                 lambda: Anderson().solve(torch.neg, torch.ones(1, 2))):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"autocast|bfloat16"):
            call()
        with torch.autocast("cpu", enabled=False):
            call()


def test_a_fixed_horizon_takes_its_steps_whatever_the_residual():
    model, inputs, _ = transformer()
    x = model.clamp(inputs).detach()
    z = x
    with torch.no_grad():
        for _ in range(7):
            z = z + 0.4 * model.block(z, x)
    solution = model.settle(inputs, FixedHorizon(step=0.4, steps=7))
    assert torch.equal(solution.value, z) and solution.steps.tolist() == [7] * 4
    pushes = iter([torch.full((1, 4), 1.0), torch.full((1, 4), 0.01), torch.full((1, 4), 5.0)])
    last = FixedHorizon(step=0.5, steps=2).solve(lambda _: next(pushes), torch.ones(1, 4))
    assert torch.allclose(last.value, torch.full((1, 4), 1.505))  # the last iterate, although an earlier one was more settled


def test_a_snapshot_is_the_most_settled_iterate_even_of_a_phase_that_explodes_later():
    """A slow unstable mode under a fast stable one: the residual falls first, then grows without bound."""
    def force(z):
        return torch.stack([-z[:, 0], 0.5 * z[:, 1]], 1)

    start, size = torch.tensor([[1.0, 1e-6]], dtype=torch.float64), lambda push, _: norm(push)
    plain = Relaxation(step=0.5, max_steps=200, tol=0.0).solve(force, start, size)
    taken = Snapshot(step=0.5, max_steps=200).solve(force, start, size)
    assert plain.status is Status.DIVERGED and taken.status is Status.MAX_STEPS
    assert taken.residual < 1e-4 and torch.equal(taken.value, plain.value)
    hopeless = Snapshot(step=0.5, max_steps=200).solve(lambda z: 0.5 * z, start, size)
    assert hopeless.status is Status.DIVERGED


def test_a_warm_start_costs_no_step_where_the_state_is_already_settled():
    model, inputs, _ = transformer()
    solver = Relaxation(step=0.3, max_steps=500, tol=1e-6)
    cold = model.settle(inputs, solver)
    assert model.settle(inputs, solver, start=cold.value).steps.tolist() == [0] * 4
    near = model.settle(inputs, solver, start=cold.value + 1e-3)
    assert near.steps.max() < cold.steps.min()


@pytest.mark.parametrize("kind", [Relaxation, Anderson, Snapshot, FixedHorizon])
def test_complex_states_are_solved_like_pairs_of_real_ones(kind):
    torch.manual_seed(0)
    matrix = torch.randn(4, 4, dtype=torch.float64) * 0.2 - torch.eye(4)
    drive = torch.randn(3, 4, dtype=torch.complex128)
    solver = kind(step=0.5).limited(40)
    both = solver.solve(lambda z: z @ matrix.T.to(z.dtype) + drive, torch.zeros_like(drive))
    exact = -torch.linalg.solve(matrix.to(drive.dtype), drive.T).T
    assert torch.allclose(both.value, exact, atol=1e-3) and not both.residual.is_complex()


def test_a_homotopy_passes_the_zeros_of_every_share_of_the_force():
    """share (A z + b) - (1 - share)(z - z_0) = 0 in closed form; A has an eigenvalue of 0.6: plain relaxation diverges."""
    generator = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    matrix = turned @ torch.diag(torch.tensor([0.6, -0.4, -1.0, -2.0], dtype=torch.float64)) @ turned.T
    push, start = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    asked = []

    def force(z):
        asked.append(z)
        return z @ matrix + push

    solver = Homotopy(step=0.5, max_steps=80, tol=1e-9, stages=3, corrections=15, memory=6)
    found = solver.solve(force, start)
    one = torch.eye(4, dtype=torch.float64)
    for stage, share in enumerate((1 / 3, 2 / 3), 1):
        zero = torch.linalg.solve((share * matrix - (1 - share) * one).T, (-share * push - (1 - share) * start).T).T
        assert torch.allclose(asked[stage * 15 - 1], zero, atol=1e-6)
    assert found.status is Status.CONVERGED and torch.allclose(found.value @ matrix, -push, atol=1e-7)
    assert Relaxation(step=0.5, max_steps=300).solve(force, start).status is Status.DIVERGED


def test_a_homotopy_treats_every_sample_alone_also_when_the_batch_shrinks():
    model, inputs, _ = transformer(init=0.5, damping=0.5)
    solver = Homotopy(step=0.4, max_steps=300, tol=1e-6)
    together = model.settle(inputs, solver)
    assert together.status is Status.CONVERGED and together.steps.unique().numel() > 1
    for b in range(4):
        alone = model.settle(inputs[b:b + 1], solver)
        assert alone.steps.item() == together.steps[b].item() and torch.allclose(alone.value[0], together.value[b], atol=1e-9)


def test_a_homotopy_that_cannot_arrive_is_refused():
    with pytest.raises(ValueError, match="the path takes 18 steps before its last stage, and max_steps is 18"):
        Homotopy(max_steps=18)


@pytest.mark.parametrize("values", [{"step": 0.0}, {"step": 3.0}, {"max_steps": 0}, {"tol": -1e-3}, {"tolerance": 1e-3}])
def test_out_of_range_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Relaxation(**values)


@pytest.mark.parametrize("solver", [Relaxation(step=0.5), Anderson(step=0.5), Homotopy(step=0.5), Snapshot(step=0.5)])
def test_a_phase_may_start_at_zero(solver):
    """Where the residual, relative to the state, has no unit of its own."""
    target = torch.full((3, 4), 2.0)
    solution = solver.solve(lambda z: target - z, torch.zeros(3, 4))
    assert solution.status.usable and torch.allclose(solution.value, target, atol=1e-3)
    rest = solver.solve(lambda z: -z, torch.zeros(3, 4))
    assert (rest.residual == 0).all() and (rest.value == 0).all()
