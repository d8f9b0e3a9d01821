"""Decide every claim of paper/claims.yaml from the results files: holds, fails, or not decided at this profile.

    python -m pipelines.claims --profile P      write results/P/claims.json and print the verdicts

A claim is
    id: short-name
    text: the sentence, true if the claim holds
    value: {file: mnist/summary.json, key: ep_accuracy}   a key of a results file; a.b.0 goes into mappings and lists
    holds: {min: 94.0}                                    one or more of the tests below, all must be met
    decided_at: [quick, paper]                            elsewhere the verdict is `not decided`
    unit: "%"                                             optional, printed behind the value
Tests: min, max (inclusive), above, below (strict), equals, max_abs.
"""

from __future__ import annotations

import math
import operator
import sys
from pathlib import Path
from typing import Any

from pipelines.common import ROOT, PipelineError, dumps, for_profile, load_profile, load_yaml, read_json, write_text

HOLDS, FAILS, UNDECIDED, MISSING = "holds", "fails", "not decided", "not decided (missing)"
TESTS = {
    "min": (operator.ge, "≥"),
    "max": (operator.le, "≤"),
    "above": (operator.gt, ">"),
    "below": (operator.lt, "<"),
    "equals": (operator.eq, "="),
    "max_abs": (lambda value, bound: abs(value) <= bound, "|·| ≤"),
}
REQUIRED, OPTIONAL = {"id", "text", "value", "holds", "decided_at"}, {"unit"}


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
        if not claim["holds"]:
            raise PipelineError(f"{where}: `holds` is empty; it needs one of {', '.join(TESTS)}")
        for profile in claim["decided_at"]:
            load_profile(profile, root)
    return claims


def look_up(results: Path, file: str, key: str) -> Any:
    """The value at `key` of results/<profile>/<file>, or None if the file or the key is absent."""
    path = results / file
    if not path.is_file():
        return None
    value = read_json(path)
    for part in key.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return None
    return value


def decide(claim: dict[str, Any], profile: str, root: Path = ROOT) -> dict[str, Any]:
    """One claim with its measured value, what was asked of it, and its verdict. A value that is no finite number
    fails."""
    value = look_up(root / "results" / profile, claim["value"]["file"], claim["value"]["key"])
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if value is None:
        verdict = MISSING
    elif profile not in claim["decided_at"]:
        verdict = UNDECIDED
    else:
        met = number and all(TESTS[test][0](value, bound) for test, bound in claim["holds"].items())
        verdict = HOLDS if met else FAILS
    asked = ", ".join(f"{TESTS[test][1]} {bound:g}".replace("-", "−") for test, bound in claim["holds"].items())
    place = f"{claim['value']['file']}: {claim['value']['key']}"
    return {
        "id": claim["id"],
        "text": claim["text"],
        "value": value,
        "unit": claim.get("unit", ""),
        "asked": asked,
        "verdict": verdict,
        "from": place,
        "decided_at": claim["decided_at"],
    }


def write(profile: str, root: Path = ROOT) -> list[dict[str, Any]]:
    """Decide all claims, write results/<profile>/claims.json and return what was written."""
    load_profile(profile, root)
    decided = [decide(claim, profile, root) for claim in load(root)]
    write_text(root / "results" / profile / "claims.json", dumps(decided))
    return decided


def line(claim: dict[str, Any]) -> str:
    """One claim as one line of text."""
    value = claim["value"]
    shown = "missing" if value is None else f"{value:.5g}" if isinstance(value, (int, float)) else str(value)
    return f"{claim['verdict']:22} {claim['id']:32} {shown}{claim['unit']} (asked: {claim['asked']})"


def show(profile: str) -> None:
    """Write, and say what was written."""
    print("\n".join(line(claim) for claim in write(profile)))


if __name__ == "__main__":
    sys.exit(for_profile("claims", __doc__, show))
