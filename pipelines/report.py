"""The HTML report: what is claimed and what holds, every figure, table, run and notebook, the paper as a page, with a search.
It reads without a network, from a file: nothing is fetched.

    python -m pipelines.report --profile P      write paper/build/P/report/index.html, stamp results/P/report.json

The pages are jinja2's and nbconvert's templates in pipelines/site/.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from eplib.settings import name_of
from pipelines import paper
from pipelines.common import ROOT, command, dumps, for_profile, load_profile, write_text
from pipelines.site import build as site


def folder_of(profile: str, root: Path = ROOT) -> Path:
    """Where the report lies."""
    return root / "paper" / "build" / name_of(profile) / "report"


def build(profile: str, root: Path = ROOT) -> Path:
    """Write the report beside its place, move it there as a whole, and return its first page."""
    load_profile(profile, root)
    final = folder_of(profile, root)
    draft = final.with_name("report.part")
    shutil.rmtree(draft, ignore_errors=True)
    site.write(profile, draft, root)
    shutil.rmtree(final, ignore_errors=True)
    draft.rename(final)
    return final / "index.html"


def write(profile: str, root: Path = ROOT) -> Path:
    """Write the report, then the stamp results/<profile>/report.json: what it was made of; returns the first page."""
    index = build(profile, root)
    content = paper.collect(profile, root)
    folder = root / "results" / name_of(profile) / "notebooks"
    executed = sorted(folder.glob("*.ipynb")) if name_of(profile) != "paper" else []  # whose are not in git
    stamp = {
        "claims": {key: value["verdict"] for key, value in content["claims"].items()},
        "figures": {key: value["sha256"] for key, value in content["figures"].items()},
        "tables": sorted(content["tables"]),
        "notebooks": {
            p.stem: hashlib.sha256(p.read_bytes()).hexdigest() for p in executed if not p.stem.endswith(".failed")
        },
    }
    write_text(root / "results" / name_of(profile) / "report.json", dumps(stamp))
    return index


def show(profile: str) -> None:
    """Write, and say what was written."""
    print(f"report: {write(profile).relative_to(ROOT)}")


if __name__ == "__main__":
    command(lambda: for_profile("report", __doc__, show))
