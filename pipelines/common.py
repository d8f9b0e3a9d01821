"""What every pipeline module needs: the root folder, the profiles, one error type, one JSON style, the end of a command.
Imports no torch."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from eplib import settings
from eplib.files import ROOT, read_yaml
from eplib.files import write_atomically as write_text  # noqa: F401  (for the modules of this package)

P = ParamSpec("P")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "150000 100000": microseconds in each period, or "max 100000"


class PipelineError(Exception):
    """Something a reader can put right; the message names it, what is allowed and what to do."""


def dumps(value: Any) -> str:
    """JSON as this repository writes it: indented by one space, UTF-8, a newline at the end; refuses NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> Any:
    """Parse a JSON file; raises PipelineError that names it if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PipelineError(f"{path} is not JSON ({error}); it is generated: delete it and run `dvc repro`") from error


def load_yaml(path: Path) -> Any:
    """Parse a YAML file; raises PipelineError with file, line and what is wrong."""
    return read_yaml(path, PipelineError)


def load_profile(profile: str, root: Path = ROOT) -> dict[str, Any]:
    """What pipelines/profiles/<profile>.yaml says, or the file of that path; raises PipelineError if there is none."""
    return settings.load(profile, root, PipelineError)


def processors() -> int:
    """How many processors this process may use: those of its affinity, fewer where its control group has a quota of time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if QUOTA.is_file():
        granted, period = QUOTA.read_text().split()
        if granted != "max":
            count = min(count, max(1, round(int(granted) / int(period))))
    return count


def notebook_format() -> Any:
    """The package nbformat. To be called before papermill, nbclient or nbconvert are imported, which import it as well:
    it brings jsonschema, which at import builds 38 grammars (seconds, in every stage) to check links with characters
    beyond ASCII if it finds rfc3987_syntax. No notebook schema asks for that check, so here it does not find it."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # what makes an import fail
    import nbformat

    return nbformat


def notebook_names(root: Path = ROOT) -> list[str]:
    """The names of the notebooks in notebooks/, sorted."""
    return sorted(path.stem for path in (root / "notebooks").glob("*.ipynb"))


def planned(settings: dict[str, Any], root: Path = ROOT) -> list[str]:
    """The notebooks that a profile runs: those it has parameters or runs for. Others in notebooks/ are the reader's own."""
    named = {*(settings.get("runs") or {}), *(settings.get("notebooks") or {})}
    return [name for name in notebook_names(root) if name in named]


def for_profile(module: str, text: str, action: Callable[[str], int | None], arguments: list[str] | None = None) -> int:
    """Entry point of `python -m pipelines.<module> --profile P`: calls action(P) and returns the exit code, 1 with the message
    for a PipelineError. `text` is the module's docstring."""
    parser = argparse.ArgumentParser(
        prog=f"python -m pipelines.{module}", description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--profile", required=True)
    return reported(lambda: action(parser.parse_args(arguments).profile))()


def reported(main: Callable[P, int | None]) -> Callable[P, int]:
    """An entry point that ends with exit code 1 and the message where it raised PipelineError."""
    @wraps(main)
    def said(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except PipelineError as error:
            print(error, file=sys.stderr)
            return 1

    return said


def command(main: Callable[[], int]) -> NoReturn:
    """Ends this process with main()'s exit code; in silence where nobody reads what it prints any more (`| head`) or Ctrl-C
    stopped it."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print is not tried again at exit
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)
