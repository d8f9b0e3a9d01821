"""What tables and claims say of runs: steps without a gradient, samples that settled, intervals over seeds."""

import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eplib import blocks, models, solvers
from eplib.controllers import ContractionRate
from eplib.estimators import BPTT, AsymEP, Backprop, DyadicEP, OneStep, VectorField, gradient
from eplib.store import tables


def run(seed=0, kind="Thick", loss=1.0, metrics=None, log=None, start=None, median=5e-4, largest=1e-3, estimator=None,
        penalties=(), audit_every=None):
    """A run as the store gives it, as far as a table reads it; phases to a tolerance of 1e-3."""
    config = SimpleNamespace(seed=seed, arm="ep", start=start, solver=SimpleNamespace(tol=1e-3), estimator=estimator,
                             penalties=penalties, audit_every=audit_every,
                             model=SimpleNamespace(block=SimpleNamespace(kind=kind)))
    final = {"loss": loss, "residual_median": median, "residual_max": largest}
    return SimpleNamespace(config=config, metrics={"final": final} | (metrics or {}), log=log)


def log(**columns):
    return {"gated": np.zeros(4), "skipped": np.zeros(4), "status": np.array(["converged", "max_steps"] * 2),
            "force_evaluations": np.full(4, 10.0), "rate_probe": np.full(4, np.nan), "audit_cosine": np.full(4, np.nan),
            "nudged_iterations_max": np.full(4, 3)} | columns


@pytest.mark.parametrize(("columns", "steps"), [
    ({}, 0),
    ({"gated": np.array([1.0, 0, 0, 1])}, 2),
    ({"skipped": np.array([0.0, 1, 0, 0])}, 1),  # a gradient that was not finite
    ({"status": np.array(["converged", "diverged", "nonfinite", "max_steps"])}, 2),  # its penalties were applied: not skipped
    ({"gated": np.array([1.0, 0, 0, 0]), "skipped": np.array([1.0, 0, 0, 1]),
      "status": np.array(["diverged", "converged", "diverged", "converged"])}, 3),  # each step once
])
def test_steps_without_a_gradient_are_counted_from_an_older_log_each_once(columns, steps):
    assert tables.without_gradient(run(log=log(**columns))) == steps


def test_what_a_run_counted_itself_is_not_counted_again():
    assert tables.without_gradient(run(metrics={"without_gradient": 7})) == 7
    newer = run(log=log(task_gradient=np.array([1, 0, 1, 1]), gated=np.array([1, 0, 0, 0])))
    assert tables.lost_steps(newer).tolist() == [False, True, False, False]


PROBED = np.array([0.9, np.nan, 0.9, np.nan])  # a penalty that acts at every other step


@pytest.mark.parametrize(("estimator", "columns", "spent"), [
    (Backprop(), {"force_evaluations": np.ones(4)}, [3, 3, 3, 3]),
    (BPTT(steps=32), {"force_evaluations": np.full(4, 32.0)}, [96] * 4),
    (BPTT(steps=32, window=8), {"force_evaluations": np.full(4, 32.0)}, [48] * 4),
    (BPTT(steps=32), {"force_evaluations": 32 + 11 * np.isfinite(PROBED), "rate_probe": PROBED}, [108, 96, 108, 96]),
    # J at z*, by which the response is solved, and the contraction; the former also where the adjoint phase diverged
    (DyadicEP(), {"status": np.array(["converged", "diverged", "max_steps", "diverged"]),
                  "nudged_iterations_max": np.array([3, 3, 3, 0])}, [13, 11, 13, 10]),
    (AsymEP(), {"status": np.array(["converged", "diverged", "max_steps", "diverged"]),
                "nudged_iterations_max": np.array([3, 3, 3, 0])}, [14, 11, 14, 10]),
    (VectorField(), {}, [13] * 4),
])
def test_an_older_log_is_brought_to_the_unit_that_counts_backward_passes(estimator, columns, spent):
    older = run(log=log(**columns), estimator=estimator)
    assert tables.force_evaluations(older).tolist() == spent
    assert tables.evaluations_a_step([older, older]) == np.mean(spent)


def test_an_audit_is_no_part_of_a_steps_cost():
    audited = run(log=log(force_evaluations=np.array([10.0, 60, 12, 70])), estimator=DyadicEP(), audit_every=2)
    assert tables.force_evaluations(audited).tolist() == [13, 13, 15, 15]


def test_costs_that_an_older_log_does_not_hold_are_left_out():
    plane = run(log=log(), estimator=DyadicEP(), penalties=(ContractionRate(probes=2),))
    assert tables.force_evaluations(plane) is None and tables.evaluations_a_step([plane]) is None
    assert tables.evaluations_a_step([]) is None
    counted = run(log=log(), estimator=DyadicEP(), penalties=(ContractionRate(probes=2),), metrics={"without_gradient": 0})
    assert tables.force_evaluations(counted).tolist() == [10] * 4


def test_excursions_of_an_evaluation_are_counted_or_bounded():
    assert tables.evaluated_excursions([run(), run(largest=0.1)]) == "0"
    assert tables.evaluated_excursions([run(), run(largest=0.11)]) == "≥ 1"
    counted = run(largest=0.2)
    counted.metrics["final"]["excursions"] = 4
    assert tables.evaluated_excursions([run(), counted]) == "4"
    assert tables.evaluated_excursions([run(largest=None)]) == "?"
    counted.metrics["final"]["residual_max"] = None  # of a sample that is not finite
    assert tables.evaluated_excursions([run(), counted]) == "4"
    assert tables.evaluated_excursions([run(kind="Feedforward")]) is None


@pytest.mark.parametrize(("evaluation", "share", "shown"), [
    ({"settled": 0.9996, "residual_median": 1.0, "residual_max": 1.0}, (0.9996, 0.9996), "99.9"),
    ({"residual_median": 9e-4, "residual_max": 1e-3}, (1.0, 1.0), "100"),
    ({"residual_median": 9e-4, "residual_max": 2e-3}, (0.5, 1.0), "≥ 50"),
    ({"residual_median": 2e-3, "residual_max": 3e-3}, (0.0, 0.5), "< 50"),
    ({"residual_median": None, "residual_max": None}, (0.0, 1.0), "?"),
])
def test_the_share_that_settled_is_what_was_measured_or_what_the_residuals_imply(evaluation, share, shown):
    assert tables.settled(evaluation, 1e-3) == share
    assert tables.percent(share) == shown


@pytest.mark.parametrize("samples", [1, 2, 7, 8])
def test_what_the_residuals_imply_is_true_of_any_residuals(samples):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        residual = 10 ** (torch.randn(samples, generator=generator) - 3)
        low, high = tables.settled({"residual_median": residual.median().item(), "residual_max": residual.max().item()}, 1e-3)
        assert low <= (residual <= 1e-3).double().mean().item() <= high


def test_a_loss_at_the_fixed_point_is_empty_unless_the_phases_are_known_to_settle():
    def converged(**residuals):
        return run(metrics={"converged": {"loss": 2.0} | residuals})

    assert tables.at_fixed_point(converged(residual_median=9e-5, residual_max=1e-4)) == 2.0
    assert tables.at_fixed_point(converged(settled=0.99, residual_median=9e-5, residual_max=1e-2)) == 2.0
    assert tables.at_fixed_point(converged(settled=0.98, residual_median=9e-5, residual_max=1e-2)) is None
    assert tables.at_fixed_point(converged(residual_median=9e-5, residual_max=1e-2)) is None
    assert tables.at_fixed_point(converged(residual_median=0.12, residual_max=0.23)) is None  # to 2e-4, which is its tolerance
    assert tables.at_fixed_point(run(kind="Feedforward")) is None


def test_a_predicted_start_is_another_one_than_the_evaluations():
    predicted = run(start=object())
    assert tables.settled_cold(predicted) == (1.0, 1.0) and tables.settled_as_trained(predicted) == (0.0, 1.0)
    assert tables.settled_as_trained(run(largest=2e-3)) == (0.5, 1.0)
    measured = run(start=object(), metrics={"training_start": {"settled": 0.875, "residual_median": 0.0, "residual_max": 1.0}})
    assert tables.settled_as_trained(measured) == (0.875, 0.875)
    assert tables.settled_cell([measured, predicted], tables.settled_as_trained) == "?"
    assert tables.settled_cell([run(kind="Feedforward", largest=1.0)]) is None


def test_an_interval_is_students():
    found = tables.interval([1.0, 2.0, 4.0])
    half = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)  # t of two degrees of freedom; the sample's variance is 7/3
    assert found["n"] == 3 and found["mean"] == pytest.approx(7 / 3)
    assert (found["low"], found["high"]) == (pytest.approx(7 / 3 - half, rel=1e-6), pytest.approx(7 / 3 + half, rel=1e-6))
    assert tables.interval([1.0]) == {"mean": 1.0, "low": None, "high": None, "n": 1}
    assert tables.interval([]) == {"mean": None, "low": None, "high": None, "n": 0}


def test_a_seed_that_ended_without_a_finite_loss_is_named_and_decides_nothing():
    arms = {"ep": [run(seed, loss=loss) for seed, loss in enumerate((1.0, None, 3.0))]}
    found = tables.final(arms, "ep")
    assert (found["mean"], found["n"]) == (2.0, 2) and "1 of 3 runs" in found["undecided"]
    assert "1 of 6 runs" in tables.paired(arms | {"bptt": [run(seed) for seed in range(3)]}, "ep", "bptt")["undecided"]


def test_a_difference_decides_nothing_unless_both_arms_are_known_to_settle():
    settled = [run(seed, loss=1 + seed) for seed in range(3)]
    backprop = [run(seed, "Feedforward", seed**2, largest=1.0) for seed in range(3)]
    assert "undecided" not in tables.paired({"ep": settled, "backprop": backprop}, "ep", "backprop")
    short = [*settled[:2], run(2, largest=1.0)]
    found = tables.paired({"ep": settled, "bptt": short}, "ep", "bptt")
    assert found["undecided"] == "samples that settled: BPTT ≥ 50 %" and found["n"] == 3


RELAXED = (DyadicEP(), AsymEP(beta=0.1), VectorField(beta=0.1), OneStep(), BPTT(steps=7))


@pytest.mark.parametrize(("estimator", "penalised"), [(Backprop(), False), *product(RELAXED, (False, True))])
def test_the_unit_of_older_logs_is_that_of_the_library(estimator, penalised):
    torch.manual_seed(0)
    block = blocks.Feedforward() if estimator.kind == "Backprop" else blocks.Thick()
    model = models.LanguageModel(vocab=7, width=8, heads=2, context=5, block=block)
    inputs, solver = torch.randint(7, (3, 5)), solvers.Relaxation(step=0.5, max_steps=200, tol=1e-4)
    penalties = (ContractionRate(target=0.01, products=2),) if penalised else ()  # of every sample
    report = gradient(model, inputs, inputs.roll(1, 1), estimator=estimator, solver=solver, penalties=penalties)
    # all that older logs have: the phases, a force, two products and the measurement, and the last with a graph and back
    counted = report.free.evaluations + (report.nudged.evaluations if report.nudged else 0) + 10 * penalised
    recorded = log(force_evaluations=np.full(4, float(counted)), rate_probe=np.full(4, 0.9 if penalised else np.nan),
                   nudged_iterations_max=np.full(4, report.nudged.steps.max().item() if report.nudged else 0))
    older = run(log=recorded, estimator=estimator, penalties=penalties)
    assert tables.force_evaluations(older).tolist() == [report.measured["force_evaluations"]] * 4
