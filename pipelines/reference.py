"""The reference values of a profile: its results as they were last made and reviewed, with machine, times and source.

    python -m pipelines.reference --profile quick              write results/reference/quick.json from results/quick
    python -m pipelines.reference --profile quick --measure    first run its cheap stages once more without vector instructions,
                                                               and note of each of their values which digits survive

The paper profile's results are in git themselves: they are its reference, and only what --measure finds is written for it.
Digits measured before are kept. `make verify` compares with these values; ARTIFACT.md is written again from them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from pipelines import artifact, close, estimate, verify
from pipelines.common import ROOT, PipelineError, command, read_json, reported, write_text
from pipelines.expected import Reference, gather, path_of, places, results_of, text_of
from pipelines.plan import Plan
from pipelines.tolerance import surviving


def write(profile: str, root: Path = ROOT, digits: dict[str, str] | None = None) -> Reference:
    """Write the reference of a finished profile; raises PipelineError where a notebook has no results."""
    found, path = gather(profile, root), path_of(profile, root)
    if lacking := close.missing_notebooks(profile, root):
        raise PipelineError(f"profile {profile} is not finished: no {', '.join(lacking)}; run them first")
    before = read_json(path).get("digits", {}) if path.is_file() else {}
    there = places(found.values)
    digits = {place: text for place, text in sorted((before | (digits or {})).items()) if place in there}
    reference = replace(found, machine=estimate.facts(), calibration=estimate.calibrate(), commit=close.commit(root),
                        digits=digits)
    if found.profile == "paper":  # the rest is in git already
        reference = replace(reference, values={}, runs={}, sources={})
    write_text(path, text_of(reference))
    return reference


def measured(profile: str, root: Path = ROOT) -> dict[str, str]:
    """Place -> what of it survives without vector instructions, for the cheap stages of a finished profile, run again so."""
    own = gather(profile, root)
    names = list(verify.cheap(own, Plan(profile, root)))
    with verify.scratch_tree(root) as scratch:
        verify.rerun(own.profile, names, scratch, verify.OTHER)
        others = places(results_of(profile, scratch))
    return {place: surviving(value, others.get(place)) for name in names for place, value in own.leaves(name).items()}


@reported
def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.reference", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", required=True)
    parser.add_argument("--measure", action="store_true", help="find which digits of the cheap stages' values survive")
    options = parser.parse_args(arguments)
    digits = measured(options.profile) if options.measure else None
    reference = write(options.profile, digits=digits)
    artifact.write()
    print(f"{path_of(options.profile).relative_to(ROOT)}: {len(reference.values)} results files, digits of "
          f"{len(reference.digits)} values; ARTIFACT.md")
    return 0


if __name__ == "__main__":
    command(main)
