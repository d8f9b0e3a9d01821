"""The values that a profile's results are expected to have: the reference that `make verify` compares with.

results/reference/P.json holds the results as they were last made and reviewed, with machine, times and source; it is written by
`pipelines.reference`. The paper profile's results are in git themselves and are its reference.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from eplib.settings import name_of
from pipelines import claims, estimate
from pipelines.common import ROOT, PipelineError, load_profile, load_yaml, planned, read_json
from pipelines.estimate import path_of
from pipelines.stages import pipeline_path
from pipelines.tolerance import class_of, leaves

RECORDED = "9 digits"  # what tables and means of recorded runs keep, where nothing is trained again


@dataclass(frozen=True)
class Reference:
    """What a profile's results were.

    sources: stage -> digest of its code and settings. seconds: of each notebook. runs: experiment/folder -> seconds on one
    processor, and which. digits: place -> what was measured of it. values: results file -> content.
    """

    profile: str
    machine: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)
    commit: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[Any]] = field(default_factory=dict)
    digits: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def tolerance(self, place: str) -> str:
        """The class of the value at `notebook/file.json: key`."""
        otherwise = {"otherwise": RECORDED} if self.profile == "paper" else {}
        return class_of(place.split(": ", 1)[1], self.digits.get(place), **otherwise)

    def leaves(self, stage: str) -> dict[str, Any]:
        """Place -> value of everything that a notebook wrote."""
        return places({file: value for file, value in self.values.items() if file.startswith(f"{stage}/")})

    def claim(self, claim: dict[str, Any]) -> dict[str, Any]:
        """A claim of paper/claims.yaml as these values decide it."""
        file, key = claim["value"]["file"], claim["value"]["key"]
        return claims.decided(claim, claims.inside(self.values.get(file, {}), key), self.profile)


def places(values: dict[str, Any]) -> dict[str, Any]:
    """`notebook/file.json: key` -> value of every leaf of some results files."""
    return {f"{file}: {key}": value for file, content in values.items() for key, value in leaves(content)}


def results_of(profile: str, root: Path = ROOT) -> dict[str, Any]:
    """Results file -> content of every notebook of a profile that has run."""
    folder = root / "results" / name_of(profile)
    files = [path for name in planned(load_profile(profile, root), root) for path in sorted((folder / name).glob("*.json"))]
    return {f"{path.parent.name}/{path.name}": read_json(path) for path in files if path.name != "index.json"}


def sources_of(profile: str, root: Path = ROOT) -> dict[str, str]:
    """Stage -> digest of what decides it, as its last run wrote that; where none has run here, as DVC's lock file has it."""
    folder = root / "results" / name_of(profile) / "sources" / "stages"
    if found := {path.stem: hashlib.md5(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.json"))}:
        return found
    lock = (root / pipeline_path(profile)).with_suffix(".lock")
    stages = load_yaml(lock)["stages"].values() if lock.is_file() else ()
    deps = (dep for stage in stages for dep in stage.get("deps") or () if "/sources/stages/" in dep["path"])
    return {Path(dep["path"]).stem: dep["md5"] for dep in deps}


def gather(profile: str, root: Path = ROOT) -> Reference:
    """What lies in a profile's results now."""
    stages = root / "results" / name_of(profile) / "machine" / "stages"
    return Reference(name_of(profile), sources=sources_of(profile, root), values=results_of(profile, root),
                     seconds={path.stem: read_json(path)["seconds"] for path in sorted(stages.glob("*.json"))},
                     runs=estimate.recorded(profile, root))


def load(profile: str, root: Path = ROOT) -> Reference:
    """The reference of a profile; raises PipelineError if there is none, or its file is of another form."""
    path, own = path_of(profile, root), gather(profile, root) if name_of(profile) == "paper" else None
    if not path.is_file():
        if own:
            return replace(own, seconds={})  # how long its notebooks took is not in git
        raise PipelineError(f"there are no reference values of profile {profile!r} ({path.relative_to(root)}); write them from "
                            f"finished results: python -m pipelines.reference --profile {profile}")
    kept = read_json(path)
    if unknown := kept.keys() - {one.name for one in fields(Reference)}:
        raise PipelineError(f"{path.relative_to(root)}: unknown {', '.join(sorted(unknown))}; write it again from finished "
                            f"results: python -m pipelines.reference --profile {profile}")
    if own:
        kept |= {"values": own.values, "runs": own.runs, "sources": own.sources}
    return Reference(**kept)


def text_of(reference: Reference) -> str:
    """The file of a reference: one line for each run, each measured value and each results file."""
    parts = []
    for name, value in vars(reference).items():
        if isinstance(value, dict):
            lines = (f"  {json.dumps(key, ensure_ascii=False)}: {json.dumps(item, ensure_ascii=False, allow_nan=False)}"
                     for key, item in value.items())
            parts.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
        else:
            parts.append(f' "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
