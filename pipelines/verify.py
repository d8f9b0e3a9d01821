"""Close a run: rebuild the PDF and the report if they are absent or old, say where everything is, what is missing and
what the claims say.

    python -m pipelines.verify --profile P

Exit code 1 if the paper shows anything as missing or a notebook has not been run; the paper profile, which is filled
piece by piece, may lack results. A claim that fails is a result, not an error.
"""

from __future__ import annotations

from pathlib import Path

from eplib.settings import name_of
from pipelines import claims, paper, report
from pipelines.common import ROOT, command, for_profile, load_profile, planned


def missing_notebooks(profile: str, root: Path = ROOT) -> list[str]:
    """The notebooks of a profile without results, in words."""
    results = root / "results" / name_of(profile)
    return [f"results of notebook {name}" for name in planned(load_profile(profile, root), root)
            if not (results / name / "index.json").is_file()]


def verify(profile: str, root: Path = ROOT) -> int:
    """Do and print what the module says; returns the exit code."""
    load_profile(profile, root)
    content = paper.collect(profile, root)
    fresh = paper.up_to_date(profile, root)
    pdf = root / "paper" / "build" / name_of(profile) / "paper.pdf"
    index = report.folder_of(profile, root) / "index.html"
    if not fresh:
        paper.build(profile, root)
    if not fresh or not index.is_file():
        report.build(profile, root)
    lacking = paper.missing(profile, root) + missing_notebooks(profile, root)
    print(f"\nprofile  {profile}")
    for name, path in (
        ("paper", pdf),
        ("report", index),
        ("figures", root / "figures" / name_of(profile)),
        ("results", root / "results" / name_of(profile)),
    ):
        print(f"{name:8} {path.relative_to(root)}")
    print(f"made     {len(content['figures'])} figures, {len(content['tables'])} tables")
    print(f"missing  {', '.join(lacking) or 'nothing'}")
    print("claims")
    for claim in content["claims"].values():
        print(f"  {claims.line(claim)}")
    return int(bool(lacking) and profile != "paper")


if __name__ == "__main__":
    command(lambda: for_profile("verify", __doc__, verify))
