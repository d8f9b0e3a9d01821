"""Table R1: the reference's values beside ours, decided by our number alone."""

import json

import pytest

from eplib.verdicts import FAILS, HOLDS, UNDECIDED
from pipelines import literature
from pipelines.common import PipelineError

ROW = {"claim": "EP loses 3 points", "origin": "001", "comparable": "a gap"}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "paper" / "mnist"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({
        "gap": {"mean": -4.0, "low": -4.5, "high": -3.5, "n": 3}, "few": {"mean": -4.0, "low": None, "high": None, "n": 1},
        "open": {"value": 2.0, "undecided": "too short"}, "plain": 0.5, "absent": None}))
    (folder / "T2b.json").write_text(json.dumps({"rows": [["EP loses", "loses +0.32", "fails"]]}))
    return tmp_path


@pytest.mark.parametrize(("more", "shown", "verdict"), [
    ({"ours": {"file": "mnist/summary.json", "key": "gap"}, "holds": {"max": -3}, "seeds": True, "unit": " points"},
     "−4 points [−4.5, −3.5], n = 3", HOLDS),
    ({"ours": {"file": "mnist/summary.json", "key": "gap"}, "holds": {"max": -5}, "seeds": True},
     "−4 [−4.5, −3.5], n = 3", FAILS),
    ({"ours": {"file": "mnist/summary.json", "key": "few"}, "holds": {"max": -3}, "seeds": True},
     "−4, n = 1", f"{UNDECIDED}: n = 1"),
    ({"ours": {"file": "mnist/summary.json", "key": "open"}, "holds": {"max": 3}}, "2", f"{UNDECIDED}: too short"),
    ({"ours": {"file": "mnist/summary.json", "key": "plain"}, "what": "cosine"}, "cosine 0.5", literature.APART),
    ({"ours": {"file": "mnist/summary.json", "key": "absent"}, "holds": {"max": 3}, "what": "cosine"}, literature.NOWHERE,
     UNDECIDED),
    ({"ours": {"file": "mnist/T2b.json", "row": "EP"}}, "loses +0.32", "fails"),
    ({"ours": {"file": "mnist/T2b.json", "row": "BP"}}, literature.NOWHERE, UNDECIDED), ({}, literature.NOWHERE, UNDECIDED),
    ({"see": "T1"}, "T1", literature.APART),
])
def test_a_claim_of_the_reference_is_decided_by_our_number_where_the_two_can_be_compared(results, more, shown, verdict):
    assert literature.evidence(ROW | more, "paper", results) == (shown, verdict)


@pytest.mark.parametrize(("more", "says"), [
    ({"ours": {"file": "a.json"}}, "ours = "), ({"holds": {"most": 1}}, "unknown test most"), ({"extra": 1}, "unknown extra")])
def test_a_row_that_says_too_little_or_too_much_is_refused(tmp_path, more, says):
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "literature.yaml").write_text(json.dumps([ROW | more]))
    with pytest.raises(PipelineError, match=says):
        literature.load(tmp_path)


def test_every_row_of_the_paper_s_table_says_in_what_it_can_be_compared():
    found = literature.table("paper")
    assert len(found["rows"]) > 30 and all(len(row) == len(found["columns"]) and all(row) for row in found["rows"])
