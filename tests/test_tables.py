"""What tables and claims say of runs: samples that settled, costs, intervals over seeds."""

import math
from types import SimpleNamespace

import pytest

from eplib import plotting
from eplib.blocks import Block
from eplib.models import Transformer
from eplib.store import tables


def run(seed=0, kind="Thick", loss=1.0, metrics=None, start=None, settled=1.0, excursions=0):
    """A run as the store gives it, as far as a table reads it."""
    config = SimpleNamespace(seed=seed, arm="ep", start=start, steps=150, first=50,
                             model=Transformer(width=8, heads=2, block=Block.find(kind)()))
    final = {"loss": loss, "settled": settled, "excursions": excursions}
    return SimpleNamespace(config=config, metrics={"final": final} | (metrics or {}))


@pytest.mark.parametrize(("spent", "mean"), [([300, 100], 2.0), ([300, None], None), ([], None)])
def test_the_cost_of_a_step_is_known_only_if_that_of_every_run_is(spent, mean):
    runs = [run(metrics={"force_evaluations": count}) for count in spent]
    assert tables.evaluations_a_step(runs) == mean


def test_excursions_of_an_evaluation_are_counted_or_at_least_one():
    assert tables.evaluated_excursions([run(), run(excursions=4)]) == "4"
    assert tables.evaluated_excursions([run(), run(excursions=None), run(excursions=4)]) == "≥ 5"
    assert tables.evaluated_excursions([run(kind="Feedforward")]) is None


@pytest.mark.parametrize(("settled", "share", "shown"), [
    (0.9996, (0.9996, 0.9996), "99.9"), (1, (1, 1), "100"),
    ([0.5, 1.0], (0.5, 1.0), "≥ 50"), ([0.0, 0.5], (0.0, 0.5), "< 50"), ([0.0, 1.0], (0.0, 1.0), "?"),
])
def test_the_share_that_settled_is_what_was_measured_or_lies_between_what_is_known(settled, share, shown):
    assert tables.settled({"settled": settled}) == share and tables.percent(share) == shown


def test_a_loss_at_the_fixed_point_is_empty_unless_the_phases_are_known_to_settle():
    def converged(settled):
        return run(metrics={"converged": {"loss": 2.0, "settled": settled}})

    assert tables.at_fixed_point(converged(1.0)) == tables.at_fixed_point(converged(0.99)) == 2.0
    assert tables.at_fixed_point(converged(0.98)) is None and tables.at_fixed_point(converged([0.5, 1.0])) is None
    assert tables.at_fixed_point(run(kind="Feedforward")) is None


def test_a_predicted_start_is_another_one_than_the_evaluations():
    predicted = run(start=object())
    assert tables.settled_cold(predicted) == (1.0, 1.0) and tables.settled_as_trained(predicted) == (0.0, 1.0)
    assert tables.settled_as_trained(run(settled=[0.5, 1.0])) == (0.5, 1.0)
    measured = run(start=object(), metrics={"training_start": {"settled": 0.875}})
    assert tables.settled_as_trained(measured) == (0.875, 0.875)
    assert tables.settled_cell([measured, predicted], tables.settled_as_trained) == "?"
    assert tables.settled_cell([run(kind="Feedforward", settled=0.0)]) is None


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
    backprop = [run(seed, "Feedforward", seed**2, settled=0.0) for seed in range(3)]
    assert "undecided" not in tables.paired({"ep": settled, "backprop": backprop}, "ep", "backprop")
    short = [*settled[:2], run(2, settled=[0.5, 1.0])]
    found = tables.paired({"ep": settled, "bptt": short}, "ep", "bptt")
    assert found["undecided"] == f"samples that settled: {plotting.label('bptt')} ≥ 50 %" and found["n"] == 3


def test_the_interval_of_an_accuracy_ends_where_accuracies_do():
    arms = {"ep": [run(seed, metrics=None) for seed in range(3)]}
    for one, accuracy in zip(arms["ep"], (99.9, 99.0, 90.0), strict=True):
        one.metrics["final"]["accuracy"] = accuracy
    found = tables.final(arms, "ep", "accuracy")
    assert found["high"] == 100.0 and 0 < found["low"] < 90 and found["mean"] == pytest.approx(96.3)
