"""Write what decides each stage beside its data into small files that the stages depend on.

    python -m pipelines.sources --profile P

results/P/sources/NAME.json is the normalised copy of a notebook, results/P/sources/stages/STAGE.json the digests of the code
that a stage runs and the settings that it reads. It runs after every edit of code, notebooks or the profile; where an edit
changes no digest (a comment, a docstring, a saved output), no other stage runs. It fails, with the remedy, where the pipeline
file is older than a new notebook or group of runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from pipelines import stages
from pipelines.cells import source_path
from pipelines.common import ROOT, PipelineError, command, dumps, for_profile, write_text
from pipelines.plan import Plan


def write(profile: str, root: Path = ROOT) -> None:
    """Write the files; raises PipelineError if the pipeline file is not what the profile and the notebooks make."""
    plan = Plan(profile, root)
    if stages.out_of_date([profile], root):
        raise PipelineError(f"{stages.pipeline_path(profile)} is older than the notebooks or the profile (a new notebook, a "
                            f"new group of runs)\nrun `{stages.remedy(profile)}`, then the same command again")
    shutil.rmtree(root / "results" / plan.name / "sources", ignore_errors=True)
    for name, source in plan.notebooks.items():
        write_text(source_path(name, profile, root), dumps(source))
    for stage, decides in plan.decides().items():
        write_text(stages.decided_by(stage, profile, root), dumps(decides))


if __name__ == "__main__":
    command(lambda: for_profile("sources", __doc__, write))
