"""Close a run: rebuild the PDF and the report if they are absent or old, say where everything is, what is missing, what the
claims say, and what git shows as changed and why.

    python -m pipelines.close --profile P

Exit code 1 if the paper shows anything as missing or a notebook has not been run; the paper profile, which is filled
piece by piece, may lack results. A claim that fails is a result, not an error, and so is a lock file that changed.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from eplib.settings import name_of
from pipelines import claims, paper, report
from pipelines.common import ROOT, command, for_profile, load_profile, load_yaml, planned
from pipelines.stages import pipeline_path

CODE = "its code or its settings are not those of the commit"
BYTES = "other bytes from the same code and settings: another processor or other versions"
UPSTREAM = "what it reads has changed"


def missing_notebooks(profile: str, root: Path = ROOT) -> list[str]:
    """The notebooks of a profile without results, in words."""
    results = root / "results" / name_of(profile)
    return [f"results of notebook {name}" for name in planned(load_profile(profile, root), root)
            if not (results / name / "index.json").is_file()]


# --- what git shows ---


def said_by_git(root: Path, *arguments: str) -> str | None:
    """The output of a git command, None where it fails: no git, no checkout, no commit yet."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def commit(root: Path = ROOT) -> str | None:
    """The commit that is checked out, with "+" where files differ from it; None outside one."""
    found, status = said_by_git(root, "rev-parse", "HEAD"), said_by_git(root, "status", "--porcelain")
    return found and f"{found.strip()[:12]}{'+' if status else ''}"


def moved(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
    """Stage -> why its entry in a lock file is not the committed one; both as DVC writes them."""

    def digests(stage: dict[str, Any], kind: str) -> dict[str, str]:
        return {item["path"]: item.get("md5", "") for item in stage.get(kind) or []}

    found = {}
    for name, stage in ours["stages"].items():
        before = theirs["stages"].get(name)
        if before is None:
            found[name] = "a new stage"
        elif stage != before:
            deps, old = digests(stage, "deps"), digests(before, "deps")
            changed = {path for path in deps.keys() | old.keys() if deps.get(path) != old.get(path)}
            code = name == "sources" or stage["cmd"] != before["cmd"] or any("/sources/" in path for path in changed)
            found[name] = CODE if code else UPSTREAM if changed else BYTES
    return found


def git_lines(profile: str, root: Path = ROOT) -> list[str]:
    """What `git status` shows after a run, with the stages of a changed lock file and what that means; none before a commit."""
    status = said_by_git(root, "status", "--porcelain", "--no-renames")
    if said_by_git(root, "rev-parse", "HEAD") is None or status is None:
        return []
    paths = [line[3:].strip('"') for line in status.splitlines()]
    if not paths:
        return ["git      nothing has changed"]
    shown = f"{', '.join(paths[:6])}{f' and {len(paths) - 6} more' if len(paths) > 6 else ''}"
    lock = str(Path(pipeline_path(profile)).with_suffix(".lock"))
    committed = said_by_git(root, "show", f"HEAD:{lock}")
    if lock not in paths or committed is None:
        return [f"git      changed: {shown}"]
    why = moved(load_yaml(root / lock), yaml.safe_load(committed))
    reasons = [f"  {reason}: {', '.join(name for name, cause in why.items() if cause == reason)}"
               for reason in dict.fromkeys(why.values())]
    return [f"git      changed: {shown}", f"{lock} is not the committed one:", *reasons,
            f"  Whether the numbers agree says `make verify`. Commit {lock} with a change of code of yours; "
            f"`git checkout {lock}` drops it, and no result with it."]


def close(profile: str, root: Path = ROOT) -> int:
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
    for line in git_lines(profile, root):
        print(line)
    return int(bool(lacking) and profile != "paper")


if __name__ == "__main__":
    command(lambda: for_profile("close", __doc__, close))
