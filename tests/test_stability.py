"""What is said of a crossing: one mode's value and frequency, every run, and no verdict from what was not measured."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from eplib.experiments import stability


def config(seed=0, lr=8e-3, width=64, context=64, steps=600, step=0.5):
    return SimpleNamespace(seed=seed, steps=steps, optimiser=SimpleNamespace(lr=lr), solver=SimpleNamespace(step=step),
                           model=SimpleNamespace(width=width, context=context))


SETTING = config()


def run(abscissa, frequency, residual=None, *, config=SETTING, **curve):
    columns = {"step": 10 * np.arange(1, len(abscissa) + 1), "abscissa": np.array(abscissa), "frequency": np.array(frequency)}
    if residual is not None:
        columns["abscissa_residual"] = np.array(residual)
    return SimpleNamespace(curve=columns | {key: np.array(value) for key, value in curve.items()},
                           config=config)


def test_value_and_frequency_are_those_of_one_mode_of_one_run():
    runs = [run([-0.4, 0.2, -0.1], [0.0, 0.0, 2.1], [0, 0, 0]), run([-0.4, 0.9, 0.7], [0.0, 2.46, 0.0], [0, 0, 0]),
            run([-0.4, -0.3, -0.2], [3.0, 0.0, 1.0], [0, 0, 0])]
    assert stability.rightmost(runs[1]) == stability.Mode(0.9, 2.46, 20)
    assert stability.crossing(runs) == {"value": 0.9, "frequency": 2.46, "n": 3, "crossed": 2, "oscillating": 1}
    assert stability.listed(runs) == "0.200, 0.900 (±2.46i), -0.200 (±1.00i)"


def test_a_mode_of_the_first_half_says_nothing_of_the_second():
    late = run([0.9, 0.5, -0.2, -0.3], [1.0, 0.0, 2.0, 0.0], [0] * 4, config=config(steps=40))
    assert stability.rightmost(late, since=0.5) == stability.Mode(-0.2, 2.0, 30)
    assert np.isnan(stability.rightmost(late, since=1.0).abscissa)


def test_one_run_that_crosses_is_seen_among_many_that_do_not():
    found = stability.crossing([run([-0.1], [0.0], [0])] * 20 + [run([0.01], [1.0], [0])])
    assert found["value"] == 0.01 and found["crossed"] == found["oscillating"] == 1 and found["n"] == 21


@pytest.mark.parametrize("residual", [None, [0.0, 0.5], [0.0, np.nan]])
def test_ritz_values_that_have_not_converged_decide_nothing(residual):
    found = stability.crossing([run([-0.4, -0.2], [0.0, 0.0], [0, 0]), run([-0.4, -0.1], [0.0, 0.0], residual)])
    assert "1 of 2 runs" in found["undecided"]
    assert "undecided" not in stability.crossing([run([-0.4], [0.0], [1e-5])])


def test_the_interval_of_a_crossing_is_over_the_seeds_of_one_setting():
    at_default = [run([-1.0, value], [0.0, 0.0], [0, 0], config=config(seed))
                  for seed, value in ((0, 1.0), (0, 3.0), (1, 4.0), (2, 6.0))]
    elsewhere = [run([9.0], [0.0], config=config(seed=3, **other))
                 for other in ({"lr": 4e-3}, {"width": 32}, {"context": 128}, {"steps": 3000})]
    found = stability.over_seeds([*elsewhere, *at_default], config(seed=7))
    half = 4.302652729911275 * 2 / 3**0.5  # Student's t of 2 degrees of freedom; 2, 4 and 6 have the deviation 2
    assert found == {"mean": 4.0, "low": pytest.approx(4 - half), "high": pytest.approx(4 + half), "n": 3}


def test_seeds_whose_abscissas_are_no_measurement_decide_no_crossing():
    runs = [run([0.1 + seed], [0.0], residual, config=config(seed)) for seed, residual in enumerate(([0], None, [0.5]))]
    assert "2 of 3 runs" in stability.over_seeds(runs, config())["undecided"]
    assert stability.over_seeds([], config()) == {"mean": None, "low": None, "high": None, "n": 0}


def test_without_a_run_nothing_is_known():
    assert stability.crossing([]) is None


def test_a_rate_belongs_to_the_step_that_it_was_measured_at():
    assert stability.rate_step(run([0.0], [0.0])) == 0.5
    assert stability.rate_step(run([0.0], [0.0], rate_step=[0.8])) == 0.8


def test_an_evaluation_whose_phase_diverged_has_no_spectrum_and_is_said():
    whole, broken = run([-0.4, -0.2], [0.0, 0.0], [0, 0]), run([-0.4, np.nan], [0.0, np.nan], [0, np.nan])
    gone = SimpleNamespace(curve={"step": np.array([1, 2])}, config=SETTING)
    assert stability.measured(broken) and stability.rightmost(broken) == stability.Mode(-0.4, 0.0, 10)
    assert np.isnan(stability.rightmost(gone).abscissa)
    found = stability.crossing([whole, broken, gone])
    assert found["value"] == -0.2 and "in 2 of 3 runs the phase diverged" in found["undecided"]


def trained(arm, penalties=("rate",), *, lr=1e-3, seed=0, block="Thick", loss=1.0, excursions=0):
    settings = SimpleNamespace(arm=arm, seed=seed, steps=100, penalties=penalties, optimiser=SimpleNamespace(lr=lr),
                               model=SimpleNamespace(block=block), solver=SimpleNamespace(step=0.5))
    return SimpleNamespace(config=settings, metrics={"final": {"loss": loss}, "excursions": excursions, "without_gradient": 0})


def test_an_arm_appears_in_each_group_and_among_the_runs_of_e3_that_are_held_in_the_same_way():
    mine, other = trained("rate_pair"), trained("norm", ("norm",))
    same, elsewhere, free = trained("ep_plane"), trained("ep_plane", block="Thin"), trained("ep", ())
    groups = stability.Groups([mine, other, trained("uncontrolled", ())], [other], [mine], [same, elsewhere, free])
    assert groups.appearances("rate_pair") == {"stability": [mine], "robustness": [], "tuning": [mine], "shakespeare": [same]}
    assert groups.everywhere("norm") == [other, other]
    assert groups.appearances("uncontrolled")["shakespeare"] == []  # what holds nothing is not held in the same way


def test_the_gap_is_taken_at_the_best_learning_rate_without_an_excursion():
    runs = [trained("rate_pair", lr=rate, seed=seed, loss=loss, excursions=lost) for seed in (0, 1)
            for rate, loss, lost in ((1e-3, 2.0, 0), (2e-3, 1.8, 0), (4e-3, 1.5, seed))]
    rivals = [*runs, trained("backprop", (), loss=1.9)]
    groups = stability.Groups([], [], [*rivals, trained("norm")], [])
    assert groups.rivals == rivals
    assert {arm: some[0].config.optimiser.lr for arm, some in groups.tuned.items()} == {"rate_pair": 2e-3, "backprop": 1e-3}


def test_an_excursion_at_another_strength_counts_where_a_rate_or_the_leading_mode_is_held():
    others = [trained("leading", excursions=1), trained("norm", ("norm",), excursions=5)]
    found = stability._shares(stability.Groups([trained("leading")], [], [], [], others))
    assert found["excursions_rate"] == 1 and found["runs_rate"] == 2 and found["leading_excursions"] == 0


def test_a_standard_error_leaves_out_what_is_not_finite():
    assert stability.standard_error([1.0, 3.0, None, math.nan]) == pytest.approx(1.0)  # a deviation of sqrt(2), of two values
    assert stability.standard_error([1.0, None]) is None


def test_the_summary_does_not_depend_on_the_order_of_what_diverged_and_needs_no_run():
    for rates in ([math.nan, 0.9, 0.7], [0.9, math.nan, 0.7], [0.7, 0.9, math.nan]):
        one = run([-0.4] * 3, [0.0] * 3, [0] * 3, rate_arnoldi=rates, numerical_abscissa=rates)
        one.config.arm, one.config.penalties, one.metrics = "rate_pair", (), {"final": {"loss": 1.0}, "excursions": 0}
        found = stability._spectra(stability.Groups([one], [], [], []), config())
        assert found["controlled_rate"] == 0.9 and found["leading_rate"] is None
    nothing = stability.summary(stability.Groups([], [], [], []), config())
    assert nothing["steps"] is nothing["share_controlled_everywhere"] is nothing["controlled_rate"] is None


def test_a_setting_without_a_recorded_run_stands_among_the_others_without_numbers():
    def planned(arm, strength, seed=0):
        penalty = SimpleNamespace(strength=strength)
        return SimpleNamespace(arm=arm, seed=seed, steps=600, first=0, penalties=(penalty,), start=None,
                               model=SimpleNamespace(explicit=False))

    weak, strong, other, alone = planned("norm", 0.3), planned("norm", 3.0), planned("norm", 3.0, seed=1), planned("rate", 1.0)
    done = run([-0.4, -0.2], [0.0, 0.0], config=strong)
    done.metrics = {"final": {"loss": 2.1, "settled": 1.0}, "excursions": 1, "without_gradient": 2, "force_evaluations": 6000}
    rows = stability.strengths([strong, other, alone, weak], [done])
    assert [row[1:] for row in rows] == [[0.3, False, None, None, None, None, None, None],
                                         [3.0, True, 2.1, "100", 1, 2, -0.2, 10.0]]
