"""What notebooks conclude from their runs, on runs made up so that the conclusion is known."""

import importlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from eplib import files, plotting, verdicts
from eplib.experiments import architectures, branches, mnist, screen, seeds, shakespeare, words
from eplib.store import records
from eplib.store.comparisons import compare


def run(arm: str, accuracy: float, seed: int = 0, *, curve=(), audit=(), beta=0.22, settled=1.0, limit=None, excursions=0):
    """A run as the store gives it, as far as the functions look at it."""
    some = SimpleNamespace
    config = some(arm=arm, seed=seed, steps=100, penalties=["rate"], start=None, audit_every=1, optimiser=some(lr=1e-3),
                  estimator=some(kind="VectorField", beta=beta, steps=10), data=some(limit=limit), solver=some(tol=1e-3),
                  model=some(width=32, block=some(kind="Thick"), explicit=False), branch=None)
    final = {"accuracy": accuracy, "loss": 1.0, "settled": settled, "residual_max": 1e-3, "residual_median": 1e-3}
    metrics = {"final": final, "converged": final | {"accuracy": accuracy + 1}, "excursions": excursions,
               "without_gradient": 0, "rate_arnoldi": 0.9, "training": {"displacement": 0.2}}
    log = {"step": np.arange(1, len(audit) + 1), "audit_cosine": np.array(audit, dtype=float),
           "nudged_residual_max": np.array([1e-3])}
    return some(config=config, metrics=metrics, log=log, curve={"accuracy": np.array(curve or [accuracy])})


def arm(name: str, *accuracies: float, **more) -> list:
    return [run(name, accuracy, seed, **more) for seed, accuracy in enumerate(accuracies)]


def evidence(**parts) -> mnist.Evidence:
    made = {"arms": {}, "wide": {}, "swept": [], "annealed": {}, "grid": {}, "counted": {}, "epochs": 1.0, "phase_steps": 15,
            "memory": [["", *[0] * 6, 0.4, 1.1, 0.05]]}
    return mnist.Evidence(**(made | parts))


def verdict_on(claim: str, found: mnist.Evidence) -> str:
    [row] = [row for row in mnist.reference_claims(found) if claim in row[0]]
    return row[2]


def test_a_mean_decides_from_three_seeds_whose_samples_settled():
    below = compare([-4.0, -4.1, -3.9])  # the 95 % interval reaches 0.25 to either side: t(2) = 4.30, times 0.1 / sqrt(3)
    assert below.low == pytest.approx(-4.248, abs=1e-3)
    settled, unsettled = arm("a", 1.0), arm("a", 1.0, settled=0.5)
    assert seeds.judge(below, settled, max=-3) == verdicts.HOLDS and seeds.judge(below, settled, min=-3) == verdicts.FAILS
    assert seeds.judge(below, settled, max=-4) == seeds.judge(below, unsettled, max=-3) == verdicts.UNDECIDED
    assert seeds.judge(compare([-4.0, -4.1]), settled, max=-3) == verdicts.UNDECIDED
    assert seeds.interval(below) == "-4.00 [-4.25, -3.75]" and seeds.interval(compare([])) == "-"


@pytest.mark.parametrize(("gaps", "words"), [((0.1, 0.12, 0.08), "equivalent and different"), ((0.1, -0.1, 0.0), "equivalent"),
                                             ((1.0, 1.1, 0.9), "different"), ((1.0, -1.0, 0.0), "neither"),
                                             ((0.0,), "not decided")])
def test_two_arms_are_equivalent_within_a_margin_different_both_or_neither(gaps, words):
    assert seeds.relation(compare(list(gaps)), arm("a", 1.0), 0.3) == words


def test_an_annealed_run_that_diverged_leaves_the_largest_rate_of_the_others():
    some = arm("reference_annealed", 60.0, 70.0, audit=[0.5])
    some[1].metrics["rate_arnoldi"] = None
    assert mnist.annealing_rows({"reference_annealed": some})[0][6] == 0.9
    assert mnist.annealing_rows({"reference_annealed": some[1:]})[0][6] is None


def test_a_row_of_accuracies_is_the_mean_its_deviation_and_the_difference_to_backprop():
    arms = {"backprop": arm("backprop", 90.1, 91.0, 91.9), "ep_linear": arm("ep_linear", 86.0, 87.0, 88.0)}
    rows = mnist.accuracy_rows(arms)
    assert [len(row) for row in rows] == [len(mnist.ACCURACY)] * 2
    assert rows[1][2:5] == [3, 87.0, 1.0] and rows[1][6] == 88.0
    assert rows[1][-2:] == ["-4.00 [-4.25, -3.75]", "different"]
    assert rows[0][-2:] == [None, None]


@pytest.mark.parametrize(("ours", "verdict"), [((86.0, 87.1, 88.0), "holds"), ((91.0, 91.9, 93.0), "fails"),
                                               ((86.0, 90.0, 90.0), "not decided"), ((86.0, 87.1), "not decided")])
def test_the_reference_says_that_ep_ends_three_points_below_backprop(ours, verdict):
    arms = {"backprop": arm("backprop", 90.0, 91.0, 92.0), "ep_linear": arm("ep_linear", *ours)}
    assert verdict_on("3 to 5 points below", evidence(arms=arms)) == verdict


@pytest.mark.parametrize(("at_022", "verdict"), [((90.0, 91.1, 92.0), "holds"), ((80.0, 81.1, 82.0), "fails"),
                                                 ((88.0, 89.0, 90.1), "fails")])
def test_the_reference_says_that_0_22_is_the_best_nudge_of_its_interval(at_022, verdict):
    swept = [one for beta, values in ((0.2, (88.0, 89.0, 90.0)), (0.22, at_022), (0.26, (88.0, 89.0, 90.0)))
             for one in arm("vector_field", *values, beta=beta)]
    assert verdict_on("best nudge", evidence(swept=swept)) == verdict
    assert [row[1] for row in mnist.beta_rows(swept, "vector_field")] == [0.2, 0.22, 0.26]
    assert mnist.beta_rows(swept, "vector_field")[1][-2:] == [None, None]


@pytest.mark.parametrize(("annealed", "fixed", "limit", "verdict"), [
    ((90, 95, 60), (90, 95, 94), None, "holds"), ((90, 95, 94), (90, 95, 94), None, "fails"),
    ((90, 95, 60), (90, 95, 60), None, "fails"), ((90, 95, 60), (90, 95, 94), 5000, "not decided")])
def test_the_reference_says_that_annealing_collapses_and_a_fixed_nudge_does_not(annealed, fixed, limit, verdict):
    found = {name: arm(name, 90.0, 90.0, 90.0, curve=curve, audit=(0.9, 0.5), limit=limit)
             for name, curve in (("reference_annealed", annealed), ("reference_fixed", fixed))}
    assert verdict_on("collapses", evidence(annealed=found)) == verdict
    assert [row[3] for row in mnist.annealing_rows(found)] == [95 - annealed[-1], 95 - fixed[-1]]
    assert mnist.annealing_rows(found)[0][-1] == 0.5


def test_audits_leave_out_steps_without_one_and_line_up_over_runs():
    first, second = run("a", 1.0, audit=(np.nan, 0.9, 0.8)), run("a", 1.0, audit=(np.nan, np.nan, 0.7))
    assert mnist.audits(first, "cosine")[0].tolist() == [2, 3]
    steps, values = mnist.audits_of([first, second], "cosine")
    assert steps.tolist() == [2, 3] and np.array_equal(values, [[0.9, 0.8], [np.nan, 0.7]], equal_nan=True)


def test_the_summary_counts_excursions_of_runs_that_follow_the_gradient_and_verdicts_by_word():
    runs = [*arm("ep_linear", 90.0, 91.0, 92.0, excursions=1), *arm("shuffled", 10.0, excursions=5)]
    claims = [["", "", "holds"], ["", "", "not decided"], ["", "", "holds"]]
    found = mnist.summary(evidence(arms={"ep_linear": runs[:3]}), runs, runs, [], claims)
    assert (found["excursions"], found["excursions_controls"]) == (3, 5)
    assert (found["claims_held"], found["claims_failed"], found["claims_open"]) == (2, 0, 1)
    assert found["ep_accuracy"]["mean"] == 91.0 and found["ep_minus_bp"]["n"] == 0


def layered(arm: str, losses: list[float], seed: int = 0):
    """A run of E3's architectures whose log has windows of two steps."""
    config = SimpleNamespace(arm=arm, seed=seed)
    return SimpleNamespace(config=config, log={"step": 2 * np.arange(1, len(losses) + 1), "loss_last": np.array(losses)})


@pytest.mark.parametrize(("losses", "steps"), [([2.0, 1.0, 0.5], 6), ([2.0, 1.1, 0.5], 2), ([2.1, 1.0, 0.5], 0)])
def test_two_runs_are_the_same_up_to_the_first_window_in_which_their_losses_differ(losses, steps):
    arms = {"layered_backprop": [layered("layered_backprop", [2.0, 1.0, 0.5])],
            "layered": [layered("layered", losses), layered("layered", [9.0, 9.0, 9.0], seed=1)]}
    [gap] = architectures.apart(arms, "layered")  # the run of seed 1 has no twin
    assert architectures.same_steps(gap, architectures.logged(arms)) == steps
    assert architectures.apart({"layered": arms["layered"]}, "layered") == [] and not len(architectures.logged({}))


def test_a_run_of_empty_lines_is_said_and_a_paragraph_is_left():
    assert words.compact("a\n\nb\n\n\nc") == "a\n\nb\n\n\nc"
    assert words.compact("The king" + 200 * "\n") == "The king\n[200 line breaks]\n"


@pytest.mark.parametrize(("found", "expected"), [
    ({"mean": 0.5, "low": 0.2, "high": 0.8, "n": 3}, "A: +0.50 nats [+0.20, +0.80], n = 3. The interval is above zero."),
    ({"mean": -0.5, "low": -0.8, "high": -0.2, "n": 3}, "A: -0.50 nats [-0.80, -0.20], n = 3. The interval is below zero."),
    ({"mean": 0.5, "low": -0.2, "high": 1.2, "n": 4}, "A: +0.50 nats [-0.20, +1.20], n = 4. The interval does not tell it from "
     "zero."),
    ({"mean": 0.5, "low": None, "high": None, "n": 1}, "A: +0.50 nats, n = 1. Fewer than 3 seeds decide nothing."),
    ({"mean": 0.5, "low": 0.2, "high": 0.8, "n": 3, "undecided": "half settled"},
     "A: +0.50 nats [+0.20, +0.80], n = 3. It decides nothing: half settled."),
    ({"mean": None, "low": None, "high": None, "n": 0}, "A: no run recorded.")])
def test_a_difference_is_read_by_its_interval(found, expected):
    assert words.difference("A", found, "nats") == expected


@pytest.mark.parametrize("notebook", ["mnist", "shakespeare", "stability", "architectures", "screen"])
def test_a_notebook_ends_in_sentences(notebook):
    """Of what is recorded: a reading is a text, not a dictionary."""
    path = files.ROOT / "results" / "paper" / notebook / "summary.json"
    said = importlib.import_module(f"eplib.experiments.{notebook}").reading(json.loads(path.read_text()))
    assert said and all(line.endswith(".") and not re.search(r"None|nan|[{}]", line) for line in said), said


def branch(arm, loss, seed, step):
    found = run(arm, 50.0, seed)
    found.config.branch = SimpleNamespace(step=step) if step else None
    found.metrics["final"]["loss"] = loss
    found.metrics["converged"] = {"loss": loss + 1, "settled": 1.0, "residual_median": 0.0}
    return found


def test_branches_are_compared_seed_by_seed_from_the_same_update():
    noise, rule = (0.3, -0.2, 0.1), (0.001, 0.002, 0.003)  # what seeds move both by, and what the rule does
    runs = [branch("origin", 9.0, 0, 0)]
    runs += [branch("linear", 2.0 + noise[s], s, 100) for s in range(3)] + [branch("linear", 1.0, 0, 200)]
    runs += [branch("two", 2.0 + noise[s] + rule[s], s, 100) for s in range(3)] + [branch("two", 1.5, 0, 200)]
    assert list(branches.by_step(runs)) == [100, 200] and set(branches.by_step(runs)[100]) == {"linear", "two"}
    half = 4.302652729911275 * 0.001 / 3**0.5  # Student's t of 2 degrees of freedom
    runs[5].metrics["without_gradient"] = 4
    early, late = branches.rows(runs, "linear", margin=0.01)
    gap = f"+0.0020 [{0.002 - half:+.4f}, {0.002 + half:+.4f}]"
    assert early[:2] + early[3:] == [32, 100, 3, gap, "equivalent", "100", gap, 4]
    assert late[:2] + late[3:6] == [32, 200, 1, "+0.5000", seeds.UNDECIDED]
    runs[6].metrics["converged"]["settled"] = 0.98  # the two of one seed have no fixed point to compare
    assert branches.rows(runs, "linear", margin=0.01)[0][7] == "+0.0020 [-0.0107, +0.0147]"
    found = branches.summary(runs, "linear")
    assert found["two_minus_linear_100"] == {"mean": pytest.approx(0.002), "low": pytest.approx(0.002 - half),
                                             "high": pytest.approx(0.002 + half), "n": 3}
    assert found["two_minus_linear_100_fixed"]["n"] == 2 and found["two_minus_linear_200_fixed"]["mean"] == pytest.approx(0.5)
    assert len(found) == 4 and found["two_minus_linear_200"]["n"] == 1
    first, fixed, third, _ = branches.reading(found, "linear")
    name = f"After 100 updates, {plotting.label('two')} minus {plotting.label('linear')}"
    assert first.startswith(f"{name}: +0.0020 nats") and "n = 1" in third
    assert fixed.startswith(f"{name}, at the converged fixed points: +0.0020 nats")


def screened(arm: str, loss: float | None, abscissas: list[float], rate: float | None, seed: int = 0, settled: float = 1.0):
    """A run of the screen with an evaluation each 50 of its 100 updates; NaN where the phase diverged."""
    found = run(arm, 50.0, seed, settled=settled)
    found.config.model.explicit = arm == "backprop"
    found.config.first = 0
    found.metrics |= {"rate_arnoldi": rate, "force_evaluations": 300}
    found.metrics["final"] |= {"loss": loss, "excursions": 0}
    seen = np.array(abscissas)
    found.curve = {"step": np.array([50, 100]), "abscissa": seen, "frequency": 0 * seen, "abscissa_residual": 0 * seen,
                   "rate_held": seen + 1, "rate_seen": np.full(2, 0.5)}
    return found


@pytest.mark.parametrize("turned", [False, True])
def test_a_diverged_run_of_the_screen_is_shown_as_not_measured_whatever_its_place(turned):
    """One seed diverges along the way, one arm altogether: neither hides what the others measured."""
    lost = float("nan")
    both = [screened("token", 1.8, [-0.9, -0.2], 1.4), screened("token", None, [-0.5, lost], None, seed=1)]
    arms = {"gone": [screened("gone", None, [lost, lost], None)], "token": both[::-1] if turned else both,
            "plane": [screened("plane", 1.7, [-0.3, -0.4], 1.2)], "backprop": [screened("backprop", 1.6, [lost, lost], None)]}
    table = screen.rows(arms)
    assert [row[3] for row in table] == [1.6, 1.7, None, None]  # what has no finite loss is last
    assert [row[5:8] for row in table] == [[None] * 3, [-0.4, 0.0, 1.2], [None] * 3, [-0.2, 0.0, 1.4]]
    found = screen.summary(arms, {})
    assert found["token_abscissa"]["value"] == -0.2
    assert "in 1 of 2 runs the phase diverged" in found["token_abscissa"]["undecided"]
    assert found["gone_abscissa"]["value"] is None and found["gone_missed"] is None
    assert found["token_missed"] == pytest.approx(0.3) and "backprop_abscissa" not in found


def test_the_claims_on_the_screen_are_decided_by_seeds_that_were_not_known():
    arms = {"token": [screened("token", 1.8, [-0.9, -0.01], 1.4, settled=0.5),
                      screened("token", 1.7, [-0.4, -0.3], 1.4, seed=1)],
            "token_two": [screened("token_two", 1.75, [-0.15, -0.6], 1.4, seed=1, settled=0.995)],
            "backprop": [screened("backprop", 1.9, [0, 0], None, seed) for seed in (0, 1)]}
    found = screen.summary(arms, {})
    assert found["later_settled"]["value"] == 99.5
    assert found["later_abscissa"]["value"] == -0.15  # at any evaluation, also an early one
    assert found["later_token_minus_backprop"]["mean"] == pytest.approx(-0.2) and found["later_token_minus_backprop"]["n"] == 1
    assert found["token_abscissa"]["value"] == -0.01 and found["token_minus_backprop"]["n"] == 2
    known = screen.summary({arm: arms[arm][:1] for arm in ("token", "backprop")}, {})
    assert known["later_settled"] is known["later_abscissa"] is None and known["later_token_minus_backprop"]["n"] == 0
    assert "-0.010" in " ".join(screen.reading(found)) and "decides nothing" in screen.reading(found)[0]


def test_the_claims_on_whole_runs_ask_for_three_seeds_of_both_arms_and_count_what_evaluation_saw():
    whole = {arm: [screened(arm, 1.7 + 0.001 * seed, [-0.2, -0.3], 1.4, seed, settled=0.995) for seed in range(3)]
             for arm in ("token", "token_two")}
    whole["backprop"] = [screened("backprop", 1.75, [0, 0], None, seed) for seed in range(3)]
    for some in whole.values():
        for one in some:
            one.metrics["excursions"] = 0
    whole["token_two"][2].metrics["final"]["excursions"] = 2  # samples of an evaluation, none in training
    found = screen.summary({}, whole)
    assert found["whole_settled"] == {"value": 99.5} and found["whole_excursions"] == {"value": 2}
    assert found["whole_abscissa"]["value"] == -0.2 and "undecided" not in found["whole_abscissa"]
    assert found["whole_two_minus_backprop"]["mean"] == pytest.approx(-0.049) and found["whole_two_minus_backprop"]["n"] == 3
    whole["token_two"].pop()
    few = screen.summary({}, whole)
    for key in ("whole_settled", "whole_abscissa", "whole_excursions"):
        assert few[key]["undecided"] == "2 of 3 seeds of both arms", key
    nothing = screen.summary({}, {})
    assert nothing["whole_settled"] is nothing["whole_abscissa"] is nothing["whole_excursions"] is None


def test_the_settings_of_the_screen_tell_apart_arms_that_differ_in_more_than_their_labels():
    configs = {config.arm: SimpleNamespace(config=config) for config in records.configurations("paper", "screen")}
    table = {row[0]: row[1:] for row in screen.settings({arm: [one] for arm, one in configs.items()})}
    labels = {arm: plotting.label(arm) for arm in configs}
    assert labels["backprop"] not in table
    assert table[labels["token"]][1:5] == ["0.975", "0.25", "integrated", "apart"]
    assert table[labels["token_fixed"]][1:5] == ["0.975", "0.25", "200", "together"]
    assert table[labels["token_bptt"]][5] == 0.25 and configs["token_bptt"].config.solver == configs["token"].config.solver
    assert table[labels["plane"]][1:5] == ["0.95", "0.5", "200", "together"]
    assert table[labels["uncontrolled"]] == ["none", "-", "-", "-", "-", 0.5, 32, None, "-"]
    assert table[labels["decayed"]][-1] == "damping 0.3, learned_damping" and table[labels["token_gated"]][-1] == "gated 1"
    assert table[labels["token_bptt"]][5] == 0.25 and table[labels["leading"]][1:3] == ["-0.3", "0.3"]


def test_an_audit_is_near_where_its_phase_settled_and_its_trajectories_stayed_close():
    log = {"audit_cosine": np.array([0.9, np.nan, 0.5, 0.4, 0.8]),
           "audit_displacement": np.array([1e-3, 1e-3, 1e-2, 1e-3, np.nan]),
           "audit_residual": np.array([1e-3, 1e-3, 1e-3, 2e-3, 1e-3])}
    one = SimpleNamespace(log=log, config=SimpleNamespace(solver=SimpleNamespace(tol=1e-3), audit_every=1), notes={})
    assert shakespeare.near(one).tolist() == [True, False, False, False, True]
    found = shakespeare._audits([one])
    assert (found["audits"], found["audits_near"]) == (4, 2)
    assert (found["audit_cosine_min"], found["audit_cosine_near"]) == (0.4, 0.8)
    older = SimpleNamespace(**(vars(one) | {"notes": {"audits": "elsewhere"}}))
    assert shakespeare._audits([one, older])["audit_cosine_min"]["undecided"]
