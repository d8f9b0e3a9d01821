"""The reference values of paper/literature.yaml beside what this repository measured: table R1 of the paper and the report.

A row is
    claim: what the reference says, with its value
    origin: where it says so
    ours: {file: mnist/summary.json, key: ep_accuracy}    a key of a results file, as of a claim
          {file: mnist/T2b.json, row: start of a row}      or a row of a table of claims: its evidence and its verdict
    holds: {max: -3}                                      the reference's claim as a test of ours; absent where none can be
    seeds: true                                           optional: ours is a mean over seeds, and its interval decides
    comparable: in which respects the two are alike, and in which not
    what: lowest cosine                                   optional, what our value is, printed before it
    unit: " %"                                            optional, printed behind our value
    see: T1_operator                                      in place of ours: a figure or table that has it, without one value
`ours` is absent where nothing here measures it. Nothing is tuned to a value of this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eplib.settings import name_of
from eplib.verdicts import TESTS, UNDECIDED
from pipelines.claims import look_up, verdict
from pipelines.common import ROOT, PipelineError, load_yaml

COLUMNS = ["claim of the reference", "origin", "our evidence", "verdict", "comparability"]
REQUIRED, OPTIONAL = {"claim", "origin", "comparable"}, {"ours", "see", "holds", "seeds", "unit", "what"}
NOWHERE, APART = "not measured", "not comparable"


def load(root: Path = ROOT) -> list[dict[str, Any]]:
    """The rows; raises PipelineError that names the row and what is wrong with it."""
    rows = load_yaml(root / "paper" / "literature.yaml") or []
    for row in rows:
        where = f"paper/literature.yaml, {str(row.get('claim', '?'))[:40]!r}"
        if wrong := (REQUIRED - row.keys()) | (row.keys() - REQUIRED - OPTIONAL):
            raise PipelineError(f"{where}: missing or unknown {', '.join(sorted(wrong))}; needed: "
                                f"{', '.join(sorted(REQUIRED))}")
        if "ours" in row and set(row["ours"]) not in ({"file", "key"}, {"file", "row"}):
            raise PipelineError(f"{where}: ours = {row['ours']!r}; it must be {{file: ..., key: ...}} or "
                                "{file: ..., row: ...}")
        if unknown := row.get("holds", {}).keys() - TESTS:
            raise PipelineError(f"{where}: unknown test {', '.join(unknown)}; there is {', '.join(TESTS)}")
    return rows


def evidence(row: dict[str, Any], profile: str, root: Path = ROOT) -> tuple[str, str]:
    """What was measured here, in words, and the verdict on what the reference says."""
    results, ours = root / "results" / name_of(profile), row.get("ours")
    if ours is None:
        return (row["see"], APART) if "see" in row else (NOWHERE, UNDECIDED)
    if "row" in ours:
        known = [found for found in look_up(results, ours["file"], "rows") or () if found[0].startswith(ours["row"])]
        return (known[0][1], known[0][2]) if known else (NOWHERE, UNDECIDED)
    found = look_up(results, ours["file"], ours["key"])
    shown = words(found, row.get("unit", ""))
    if shown != NOWHERE and "what" in row:
        shown = f"{row['what']} {shown}"
    if shown == NOWHERE or "holds" not in row:
        return shown, UNDECIDED if shown == NOWHERE else APART
    word, why = verdict({"decided_at": [profile], "holds": row["holds"], "seeds": row.get("seeds")}, found, profile)
    return shown, f"{word}: {why}" if why else word


def words(found: Any, unit: str = "") -> str:
    """A value of a results file, with its interval over seeds where it has one."""
    value = found.get("mean", found.get("value")) if isinstance(found, dict) else found
    if value is None:
        return NOWHERE
    several = found if isinstance(found, dict) else {}
    ends = f" [{several['low']:.4g}, {several['high']:.4g}]" if several.get("low") is not None else ""
    count = f", n = {several['n']}" if "n" in several else ""
    return f"{value:.4g}{unit}{ends}{count}".replace("-", "−")


def table(profile: str, root: Path = ROOT) -> dict[str, Any]:
    """Table R1."""
    rows = [[row["claim"], row["origin"], *evidence(row, profile, root), row["comparable"]] for row in load(root)]
    note = ("A verdict is on what the reference says, decided by our number; over seeds by the 95 % interval. Residuals of the "
            "reference are of a step of 0.1, ten times smaller than ours.")
    return {"title": "The reference's values and what was measured here", "columns": COLUMNS, "rows": rows, "note": note,
            "notebook": "claims"}
