"""Run every stage at toy size in a scratch folder: a copy of the working tree, with the stages of the profile smoke.

    python -m pipelines.smoke

The copy holds what git tracks and what it does not ignore, and the raw data that are already here. Exit code 0 if
every figure, table and text of the paper came out; then the scratch folder is removed. Otherwise it is kept and named.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipelines.common import ROOT, PipelineError, command


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files git tracks or would add, and link the raw data; raises PipelineError outside a git checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=source, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        raise PipelineError(
            f"the smoke run copies the files git knows, but {source} is no git checkout: {listed.stderr.strip()}"
        )
    for name in filter(None, listed.stdout.split("\0")):
        if (source / name).is_file():  # a tracked file may have been deleted
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
    raw = source / "data" / "raw"
    if raw.is_dir():

        def link(a: str, b: str) -> None:
            try:
                os.link(a, b)
            except OSError:  # another file system
                shutil.copy(a, b)

        shutil.copytree(raw, target / "data" / "raw", copy_function=link, dirs_exist_ok=True)
    built = source / "eplib" / "kernels" / "build"  # git ignores the compiled kernel
    if built.exists():
        shutil.copytree(built, target / "eplib" / "kernels" / "build", dirs_exist_ok=True)


def steps(scratch: Path) -> list[list[str]]:
    """The commands of the smoke run, in order."""
    for path in ("dvc.yaml", "dvc.lock", "pipelines/paper/dvc.yaml", "pipelines/paper/dvc.lock"):
        (scratch / path).unlink(missing_ok=True)
    python = sys.executable
    return [
        ["git", "init", "--quiet"],
        [python, "-m", "pipelines.stages", "--write", "--profile", "smoke"],
        [python, "-m", "dvc", "repro"],
        [python, "-m", "pipelines.close", "--profile", "smoke"],
    ]


def environment() -> dict[str, str]:
    """The environment of the commands: this interpreter's folder first on the PATH, the data mirror as an absolute
    path."""
    values = dict(os.environ)
    values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", "")])
    if mirror := values.get("EPLIB_DATA_MIRROR"):
        values["EPLIB_DATA_MIRROR"] = str((ROOT / mirror).resolve())
    return values


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argparse.ArgumentParser(
        prog="python -m pipelines.smoke", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args(arguments)
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="eplib-smoke-"))
    print(
        f"== smoke profile in {scratch}: every stage at toy size, about 8 minutes with set-up; it proves nothing",
        flush=True,
    )
    try:
        copy_tree(ROOT, scratch)
        for command in steps(scratch):
            code = subprocess.run(command, cwd=scratch, env=environment(), check=False).returncode
            if code:
                print(
                    f"smoke: `{' '.join(command)}` ended with exit code {code}; everything is kept in {scratch}",
                    file=sys.stderr,
                )
                return 1
    except PipelineError as error:
        shutil.rmtree(scratch)
        print(f"smoke: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(scratch)
        return 130
    shutil.rmtree(scratch)
    print(f"== smoke profile: every stage ran, every figure and table came out, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    command(main)
