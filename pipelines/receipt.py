"""The receipt of a check: every value with its reference, tolerance class and verdict, every claim, hardware, versions, source.

`pipelines.verify` makes it; pipelines/receipt.html is its template.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from pipelines import claims, close, estimate
from pipelines.common import ROOT, dumps, read_json, write_text
from pipelines.expected import Reference
from pipelines.tolerance import DIFFERS, MISSING, NEW, WORDS, compare, kind

AGREES, RERUN, HERE, ABSENT = "agrees", "run again", "as its last run left it", "not here"
ABSENCE = object()  # of a value, which None is not


def values_of(stage: str, known: Reference, ours: Reference) -> list[dict[str, Any]]:
    """Every value of a stage: place, class, expected, found, verdict."""
    theirs, found = known.leaves(stage), ours.leaves(stage)
    rows = []
    for place in [*theirs, *(place for place in found if place not in theirs)]:
        tolerance = known.tolerance(place)
        expected, value = theirs.get(place, ABSENCE), found.get(place, ABSENCE)
        word = NEW if expected is ABSENCE else MISSING if value is ABSENCE else compare(expected, value, tolerance)
        rows.append({"place": place, "class": kind(tolerance), "tolerance": tolerance, "verdict": word,
                     "expected": None if expected is ABSENCE else expected, "found": None if value is ABSENCE else value})
    return rows


def claim_row(claim: dict[str, Any], how: str, known: Reference, ours: Reference) -> dict[str, Any]:
    """A claim as the reference and as the values at hand decide it; `word` says of its value, and of another verdict, how they
    compare."""
    file, key = claim["value"]["file"], claim["value"]["key"]
    before, now = known.claim(claim), ours.claim(claim)
    theirs, found = (claims.inside(one.values.get(file, {}), key) for one in (known, ours))
    word = compare(theirs, found, known.tolerance(f"{file}: {key}")) if how != ABSENT else ABSENT
    if how != ABSENT and before["verdict"] != now["verdict"]:
        word = DIFFERS
    return {"id": claim["id"], "text": claim["text"], "asked": before["asked"], "from": before["from"], "word": word,
            "expected": claims.measured(before), "verdict_expected": before["verdict"],
            "found": claims.measured(now) if how != ABSENT else "", "verdict": now["verdict"] if how != ABSENT else ""}


def since(rows: list[dict[str, Any]], path: Path) -> dict[str, Any] | None:
    """What changed since the last receipt that lies here: its date, and the places of values that were others."""
    if not path.is_file():
        return None
    before = read_json(path)
    old = {row["place"]: row["found"] for row in before["values"]}
    both = [row for row in rows if row["place"] in old]
    return {"made": before["made"], "compared": len(both),
            "changed": [row["place"] for row in both if row["found"] != old[row["place"]]]}


def made(known: Reference, ours: Reference, here: Reference, again: Sequence[str], failed: dict[str, str],
         root: Path = ROOT) -> dict[str, Any]:
    """The receipt. ours: what was run `again`; here: what earlier runs left; failed: stage -> why."""
    stages, rows, mixed, how_of = [], list[dict[str, Any]](), dict[str, Any](), dict[str, str]()
    for stage in dict.fromkeys(file.split("/")[0] for file in [*known.values, *here.values, *ours.values]):
        how = how_of[stage] = RERUN if stage in again else HERE if here.leaves(stage) else ABSENT
        source = ours if how == RERUN else here
        found = [{"stage": stage, **row} for row in values_of(stage, known, source)] if how != ABSENT else []
        rows += found
        mixed |= {file: content for file, content in source.values.items() if file.startswith(f"{stage}/")}
        name = f"notebook-{stage}"
        stages.append({"stage": stage, "how": how, "failed": failed.get(stage),
                       "counts": Counter(row["verdict"] for row in found),
                       "seconds": source.seconds.get(stage), "seconds_expected": known.seconds.get(stage),
                       "source": source.sources.get(name), "source_expected": known.sources.get(name)})
    whole = Reference(known.profile, values=mixed)
    decided = [claim_row(claim, how_of.get(claim["value"]["file"].split("/")[0], ABSENT), known, whole)
               for claim in claims.load(root)]
    counts = Counter(row["verdict"] for row in rows)
    wrong = counts[DIFFERS] + counts[MISSING] + sum(row["word"] == DIFFERS for row in decided) + len(failed)
    return {"profile": known.profile, "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "agrees": wrong == 0, "counts": {word: counts[word] for word in WORDS if counts[word]}, "failed": failed,
            "machine": estimate.facts(), "commit": close.commit(root),
            "reference": {"machine": known.machine, "commit": known.commit},
            "stages": stages, "claims": decided, "values": rows}


def write(found: dict[str, Any], target: Path) -> None:
    """Write a receipt as HTML at `target` and as JSON beside it; what lies there already is compared first."""
    found["since"] = since(found["values"], target.with_suffix(".json"))
    places = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                                lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    places.filters["shown"] = shown
    write_text(target.with_suffix(".json"), dumps(found))
    write_text(target, places.get_template("receipt.html").render(**found, words=WORDS, first=(DIFFERS, MISSING)))


def shown(value: Any) -> str:
    """A value in words: six digits of a number, a mean with its interval."""
    if isinstance(value, dict) and "mean" in value:
        ends = "" if value.get("low") is None else f" [{shown(value['low'])}, {shown(value['high'])}]"
        return f"{shown(value['mean'])}{ends}, n = {value['n']}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:.6g}".replace("-", "−")


def lines(found: dict[str, Any]) -> list[str]:
    """A receipt in a few lines of text."""
    counts = ", ".join(f"{number} {word}" for word, number in found["counts"].items())
    told = [f"values   {counts or 'none'}"]
    told += [f"  {word}: {row['place']}: expected {shown(row['expected'])} ({row['tolerance']}), found {shown(row['found'])}"
             for word in (DIFFERS, MISSING) for row in found["values"] if row["verdict"] == word][:20]
    told += [f"claim    {row['id']}: {row['found']} ({row['verdict']}), expected {row['expected']} ({row['verdict_expected']})"
             for row in found["claims"] if row["word"] == DIFFERS]
    told += [f"failed   {stage}: {why}" for stage, why in found["failed"].items()]
    if last := found["since"]:
        told.append(f"since    the receipt of {last['made']}: {len(last['changed'])} of {last['compared']} values changed")
    return [*told, f"verdict  {AGREES if found['agrees'] else DIFFERS}"]
