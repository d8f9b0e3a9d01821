"""Run, normalise and strip notebooks: a small, strict wrapper around papermill's Python API.

    python -m pipelines.notebook source NAME --profile P    write results/P/sources/NAME.json: types, sources and tags
    python -m pipelines.notebook run NAME --profile P       execute it with the parameters of pipelines/profiles/P.yaml
    python -m pipelines.notebook strip [NAME ...]           drop outputs and metadata from notebooks/ (all by default)
    python -m pipelines.notebook check                      say which notebooks are not as git should hold them

The stage that runs a notebook executes the normalised copy, so what ran is what the lock file says ran; by hand the copy is
written first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eplib.settings import name_of
from pipelines.cells import problems, source_path, strip, validated, write_source
from pipelines.common import ROOT, PipelineError, command, dumps, load_profile, notebook_names, read_json, reported, write_text
from pipelines.kernel import execute, settle


@contextmanager
def set_aside(folders: list[Path]) -> Iterator[None]:
    """Give a run empty `folders`; on failure, or after a killed run, what they held before is put back."""
    kept = [(folder, folder.with_name(f".{folder.name}.previous")) for folder in folders]

    def restore() -> None:
        for folder, before in kept:
            if before.exists():
                shutil.rmtree(folder, ignore_errors=True)
                before.rename(folder)

    restore()
    for folder, before in kept:
        if folder.exists():
            folder.rename(before)
        folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        for folder, before in kept:
            if not before.exists():
                shutil.rmtree(folder)
        restore()
        raise
    for _, before in kept:
        shutil.rmtree(before, ignore_errors=True)


def run(name: str, profile: str, root: Path = ROOT) -> Path:
    """Execute a notebook with its profile's parameters and return the path of the executed copy.

    Its own folders results/<profile>/<name> and figures/<profile>/<name> start empty. On failure they are put back as
    they were, the failed notebook is kept beside the last good one as NAME.failed.ipynb, and PipelineError is raised.
    """
    given = (load_profile(profile, root).get("notebooks") or {}).get(name) or {}
    path = source_path(name, profile, root)
    if not path.is_file():
        raise PipelineError(
            f"{path.relative_to(root)} is missing; "
            f"write it with: python -m pipelines.notebook source {name} --profile {profile}"
        )
    source = read_json(path)
    parameters = validated(source, given, profile)
    target = root / "results" / name_of(profile) / "notebooks" / f"{name}.ipynb"
    failed, began = target.with_name(f"{name}.failed.ipynb"), time.monotonic()
    results, figures = root / "results" / name_of(profile) / name, root / "figures" / name_of(profile) / name
    with set_aside([results, figures]):
        executed, failure = execute(source, parameters, root)
        text = settle(executed)
        if failure:
            write_text(failed, text)
            raise PipelineError(
                f"notebook {name}, profile {profile}, failed in {failure}\n"
                f"see {failed.relative_to(root)}; the results of its last good run are as they were"
            )
        for folder in (results, figures):  # also tells git and DVC that a notebook without figures did run
            made = sorted(p.name for p in folder.iterdir())
            write_text(folder / "index.json", dumps({"notebook": name, "files": made}))
        write_text(target, text)
    took = results.parent / "machine" / "stages" / f"{name}.json"  # no stage's output, and in no profile in git
    write_text(took, dumps({"seconds": round(time.monotonic() - began, 1)}))
    failed.unlink(missing_ok=True)
    return target


def drop_empty_end(model: dict[str, Any], **_: Any) -> None:
    """A `pre_save_hook` for Jupyter: drop empty cells at the end, which JupyterLab adds when the last cell is run with
    Shift-Enter."""
    if model["type"] == "notebook":
        cells = model["content"]["cells"]
        while len(cells) > 1 and not "".join(cells[-1]["source"]).strip():
            cells.pop()


# --- command line ---


@reported
def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.notebook", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for action in ("source", "run"):
        sub = commands.add_parser(action)
        sub.add_argument("name")
        sub.add_argument("--profile", required=True)
    commands.add_parser("strip").add_argument("name", nargs="*")
    commands.add_parser("check")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminated run cleans up as an interrupted one does
        signal.signal(number, signal.default_int_handler)
    if options.command == "source":
        write_source(options.name, options.profile)
    elif options.command == "run":
        if "DVC_STAGE" not in os.environ:  # by hand the notebook as it is now; a stage runs what it depends on
            write_source(options.name, options.profile)
        run(options.name, options.profile)
    elif options.command == "strip":
        for name in options.name or notebook_names():
            print(f"notebooks/{name}.ipynb: {'stripped' if strip(name) else 'unchanged'}")
    else:
        found = [f"notebooks/{name}.ipynb: {problem}" for name in notebook_names() for problem in problems(name)]
        print("\n".join(found) or "all notebooks are as git should hold them")
        return bool(found)
    return 0


if __name__ == "__main__":
    command(main)
