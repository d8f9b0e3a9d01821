"""Begin an experiment of your own: a notebook, a group of runs in the profiles smoke and quick, and their stages.

    python -m pipelines.new NAME

writes notebooks/NAME.ipynb (question, method, runs, figure, table, reading, limits), appends the group NAME to
pipelines/profiles/smoke.yaml and quick.yaml, and writes dvc.yaml anew. Then edit the notebook and the groups:
`dvc repro notebook-NAME` trains what is not trained yet and runs the notebook, `make smoke` tries everything at toy size.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from string import Template

import yaml

from pipelines import cells, stages
from pipelines.common import ROOT, PipelineError, command, load_profile, notebook_names, write_text

TEMPLATE = Path(__file__).with_name("template.ipynb")
RUNS = Template("""\

  $name:  # made by pipelines.new: two arms that differ in one thing
    - common:
        data: {kind: Text, corpus: plays, validation: $validation}
        model: {width: $width, heads: 4, context: $context, block: {kind: Thick}}
        solver: {kind: Relaxation, step: 0.8, max_steps: 64, tol: 1.0e-3}
        nudged: {kind: Relaxation, step: 0.8, max_steps: 40, tol: 1.0e-2}
        penalties: [{kind: ContractionRate, target: 0.75}]
        optimiser: {lr: 6.0e-3}
        batch: $batch
        steps: $steps
        evaluate_every: $every
        evaluation_batches: 2
      arms:  # an arm of another name may have its own label and colour: {label: my rule, colour: "#0173b2", ...}
        ep_linear: {estimator: {kind: DyadicEP}}
        vector_field: {estimator: {kind: VectorField, beta: 0.2}}
      over: {seed: [0, 1, 2]}
""")
RESERVED = {"machine", "notebooks", "runs", "sources", "weights"}  # folders that stand beside an experiment's own in results
SIZES = {
    "smoke": {"validation": "0.001", "width": 16, "context": 8, "batch": 4, "steps": 6, "every": 3},
    "quick": {"validation": "0.01", "width": 32, "context": 32, "batch": 16, "steps": 200, "every": 50},
}


def create(name: str, root: Path = ROOT) -> list[str]:
    """Write notebook, groups and stages, and return the paths.

    Raises PipelineError, and writes nothing, for a name that cannot be one or is taken, and for a profile whose file does not
    end with its runs.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise PipelineError(f"{name!r} is no name for an experiment: lower-case letters, digits and _, a letter first")
    groups = {group for profile in SIZES for group in load_profile(profile, root).get("runs") or {}}
    taken = {*RESERVED, *notebook_names(root), *groups}
    if name in taken:
        raise PipelineError(f"there is an experiment, or a folder of results, {name!r} already; taken are "
                            f"{', '.join(sorted(taken))}")
    made = {}
    for profile, sizes in SIZES.items():
        path = root / "pipelines" / "profiles" / f"{profile}.yaml"
        made[path] = path.read_text(encoding="utf-8").rstrip("\n") + "\n" + RUNS.substitute(sizes, name=name)
        if name not in (yaml.safe_load(made[path]).get("runs") or {}):
            raise PipelineError(f"{path.name} does not end with its `runs`, where the group would be appended: move them there")
    made[root / "notebooks" / f"{name}.ipynb"] = TEMPLATE.read_text(encoding="utf-8").replace("NAME", name)
    for path, text in made.items():
        write_text(path, text)
    cells.strip(name, root)
    for profile in ("quick", "paper"):
        stages.write(profile, root)
    return [str(path.relative_to(root)) for path in made] + ["dvc.yaml"]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.new", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", metavar="NAME")
    try:
        name = parser.parse_args(arguments).name
        print("\n".join(create(name)))
    except PipelineError as error:
        print(f"new: {error}", file=sys.stderr)
        return 1
    print(f"now edit them; then: dvc repro notebook-{name}")
    return 0


if __name__ == "__main__":
    command(main)
