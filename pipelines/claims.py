"""Decide every claim of paper/claims.yaml from the results files: holds, fails, or not decided, and then why.

    python -m pipelines.claims --profile P      write results/P/claims.json and print the verdicts

A claim is
    id: short-name
    text: the sentence, true if the claim holds
    value: {file: mnist/summary.json, key: ep_accuracy}   a key of a results file; a.b.0 goes into mappings and lists
    holds: {min: 94.0}                                    one or more of the tests below, all must be met
    decided_at: [quick, paper]                            elsewhere the verdict is `not decided`
    written: 2026-11-21                                   when the claim with this bound was written
    after_result: true                                    optional: its value was known then; tables mark it
    seeds: true                                           optional: the value is a mean over seeds (below)
    replaces: "..."                                       optional: what stood here before, and its date
    unit: "%"                                             optional, printed behind the value
Tests: min, max (inclusive), above, below (strict), equals, max_abs.

Over seeds the results file holds {mean, low, high, n}, the 95 % interval of the mean over n seeds or paired seeds
(`eplib.store.tables.interval`). The claim holds if the whole interval meets the tests, fails if the whole interval breaks one
of them, and is not decided where the interval does neither or n < 3. Any value may be {value or mean, ..., undecided:
reason}: a measurement that the notebook does not trust decides nothing.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from eplib.settings import name_of
from eplib.verdicts import FEWEST, TESTS, UNDECIDED, by_interval, by_value, number
from pipelines.common import ROOT, PipelineError, command, dumps, for_profile, load_profile, load_yaml, read_json, write_text

REQUIRED = {"id", "text", "value", "holds", "decided_at", "written"}
HEADLINES = ("gradient-direction", "gradient-vector-field", "gradient-rho", "mnist-rule", "mnist-not-worse", "shakespeare-rule",
             "shakespeare-total", "screen-gap-two", "screen-abscissa", "architectures-controlled", "stability-controlled",
             "cost-memory-bptt")  # first in README and on the report's first page
OPTIONAL = {"unit", "seeds", "replaces", "after_result"}


def load(root: Path = ROOT) -> list[dict[str, Any]]:
    """The claims of paper/claims.yaml; raises PipelineError that names the claim and the key for anything not
    described above."""
    claims = load_yaml(root / "paper" / "claims.yaml") or []
    seen: set[str] = set()
    for claim in claims:
        where = f"paper/claims.yaml, claim {claim.get('id', '?')!r}"
        if wrong := (REQUIRED - claim.keys()) | (claim.keys() - REQUIRED - OPTIONAL):
            raise PipelineError(
                f"{where}: missing or unknown {', '.join(sorted(wrong))}; needed: {', '.join(sorted(REQUIRED))}"
            )
        if claim["id"] in seen:
            raise PipelineError(f"{where}: the id is used twice")
        seen.add(claim["id"])
        if set(claim["value"]) != {"file", "key"}:
            raise PipelineError(f"{where}: value = {claim['value']!r}; it must be {{file: ..., key: ...}}")
        for test, bound in claim["holds"].items():
            if test not in TESTS:
                raise PipelineError(f"{where}: unknown test {test!r}; there is {', '.join(TESTS)}")
            if not isinstance(bound, (int, float)):
                raise PipelineError(f"{where}: {test}: {bound!r} is not a number (YAML needs a point: write 1.0e-3)")
        if type(claim["written"]) is not datetime.date:
            raise PipelineError(f"{where}: written: {claim['written']!r} is no date; write it as 2026-11-21, without quotes")
        if claim.get("seeds") not in (None, True):
            raise PipelineError(f"{where}: seeds: {claim['seeds']!r}; write `seeds: true` where the value is a mean over seeds")
        if claim.get("after_result") not in (None, True):
            raise PipelineError(f"{where}: after_result: {claim['after_result']!r}; write `after_result: true` or leave it out")
        if not claim["holds"]:
            raise PipelineError(f"{where}: `holds` is empty; it needs one of {', '.join(TESTS)}")
    for profile in {profile for claim in claims for profile in claim["decided_at"]}:
        load_profile(profile, root)
    return claims


def look_up(results: Path, file: str, key: str) -> Any:
    """The value at `key` of results/<profile>/<file>, or None if the file or the key is absent."""
    path = results / file
    return inside(read_json(path), key) if path.is_file() else None


def inside(value: Any, key: str) -> Any:
    """The value at `key` of a results file's content; a.b.0 goes into mappings and lists; None where there is none."""
    for part in key.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return None
    return value


def verdict(claim: dict[str, Any], found: Any, profile: str) -> tuple[str, str]:
    """The verdict on what the results file holds, and why, where it is not decided."""
    several = isinstance(found, dict)
    shown = found.get("mean", found.get("value")) if several else found
    if profile not in claim["decided_at"]:
        return UNDECIDED, "not at this profile"
    if several and found.get("undecided"):
        return UNDECIDED, found["undecided"]
    if shown is None:
        return UNDECIDED, "missing"
    if not claim.get("seeds"):
        return by_value(claim["holds"], shown), ""
    if not several or not {"n", "low", "high"} <= found.keys():
        return UNDECIDED, "no interval over seeds"
    if found["n"] < FEWEST:
        return UNDECIDED, f"n = {found['n']}"
    if not (number(found["low"]) and number(found["high"])):
        return UNDECIDED, "a seed ended without a finite value"
    decided = by_interval(claim["holds"], found["low"], found["high"])
    return decided, "the interval spans the bound" if decided == UNDECIDED else ""


def reason(why: str) -> str:
    """What the reasons of several undecided claims have in common, without their numbers."""
    words = {"missing": "what it is read from is not recorded at this profile", "n": "fewer than three seeds",
             "samples that settled": "not known to have settled", "not at this profile": "not to be decided at this profile"}
    head = re.split(": | = ", why)[0]
    return words.get(head, re.sub(r"^\d+ of \d+ ", "", why))


def decide(claim: dict[str, Any], profile: str, root: Path = ROOT) -> dict[str, Any]:
    """One claim with its measured value (over seeds their number and the interval), what was asked of it, and its
    verdict."""
    return decided(claim, look_up(root / "results" / name_of(profile), claim["value"]["file"], claim["value"]["key"]), profile)


def decided(claim: dict[str, Any], found: Any, profile: str) -> dict[str, Any]:
    """`decide` for what the results file holds."""
    several = found if isinstance(found, dict) else {}
    word, why = verdict(claim, found, profile)
    asked = ", ".join(f"{TESTS[test][1]} {bound:g}".replace("-", "−") for test, bound in claim["holds"].items())
    return {
        "id": claim["id"],
        "text": claim["text"],
        "value": several.get("mean", several.get("value")) if several else found,
        **{key: several.get(key) for key in ("low", "high", "n")},
        "unit": claim.get("unit", ""),
        "asked": asked,
        "verdict": word,
        "why": why,
        "from": f"{claim['value']['file']}: {claim['value']['key']}",
        "decided_at": claim["decided_at"],
        "written": str(claim["written"]),
        "after_result": claim.get("after_result", False),
        "replaces": claim.get("replaces", ""),
    }


def write(profile: str, root: Path = ROOT) -> list[dict[str, Any]]:
    """Decide all claims, write results/<profile>/claims.json and return what was written."""
    load_profile(profile, root)
    decided = [decide(claim, profile, root) for claim in load(root)]
    write_text(root / "results" / name_of(profile) / "claims.json", dumps(decided))
    return decided


def again(profile: str, notebook: str) -> str:
    """The command that runs a notebook again and compares each value with the recorded one."""
    return f"make verify PROFILE={profile} WHICH='--stage {notebook}'"


def measured(claim: dict[str, Any]) -> str:
    """The value of a decided claim in words, over seeds with the interval and their number."""
    value = claim["value"]
    if value is None:
        return "missing"
    shown = f"{value:.5g}" if isinstance(value, (int, float)) else str(value)
    ends = "" if claim["low"] is None else f" [{claim['low']:.5g}, {claim['high']:.5g}]"
    count = "" if claim["n"] is None else f", n = {claim['n']}"
    return f"{shown}{claim['unit']}{ends}{count}".replace("-", "−")


def line(claim: dict[str, Any]) -> str:
    """One claim as one line of text."""
    why = f"; {claim['why']}" if claim["why"] else ""
    return f"{claim['verdict']:12} {claim['id']:32} {measured(claim)} (asked: {claim['asked']}{why})"


def show(profile: str) -> None:
    """Write, and say what was written."""
    print("\n".join(line(claim) for claim in write(profile)))


if __name__ == "__main__":
    command(lambda: for_profile("claims", __doc__, show))
