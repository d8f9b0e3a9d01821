"""Run, normalise and strip notebooks: a small, strict wrapper around papermill's Python API.

    python -m pipelines.notebook source NAME --profile P    write results/P/sources/NAME.json: types, sources and tags
    python -m pipelines.notebook run NAME --profile P       execute it with the parameters of pipelines/profiles/P.yaml
    python -m pipelines.notebook strip [NAME ...]           drop outputs and metadata from notebooks/ (all by default)
    python -m pipelines.notebook check                      say which notebooks are not as git should hold them

The stage that runs a notebook executes the normalised copy, so what ran is what the lock file says ran. Outputs saved
by JupyterLab are not part of that copy: saving them is no change. Two runs of one notebook on one machine give the
same bytes.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.common import (
    ROOT,
    PipelineError,
    dumps,
    load_profile,
    notebook_format,
    notebook_names,
    read_json,
    write_text,
)

ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SOCKET, SOCKET_PATH = "kernel-ipc-5", 103  # name of a kernel's last socket; bytes that a socket's path may have on any system
CELL_FILE = re.compile(r"\S*ipykernel_\d+/\d+\.py")


def load_notebook(name: str, root: Path = ROOT) -> dict[str, Any]:
    """The notebook notebooks/<name>.ipynb as parsed JSON; raises PipelineError if it is absent or not JSON."""
    path = root / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        raise PipelineError(f"no notebook {name!r}: there is {', '.join(notebook_names(root)) or 'none'} in notebooks/")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PipelineError(f"notebooks/{name}.ipynb is not a notebook: {error}") from error


# --- the normalised copy ---


def normalise(name: str, notebook: dict[str, Any]) -> dict[str, Any]:
    """What of a notebook decides its results: type, source and tags of each cell up to the last that is not empty."""
    cells = []
    for cell in notebook["cells"]:
        source = cell["source"]
        kept: dict[str, Any] = {
            "cell_type": cell["cell_type"],
            "source": source if isinstance(source, str) else "".join(source),
        }
        if tags := cell.get("metadata", {}).get("tags"):
            kept["tags"] = sorted(tags)
        cells.append(kept)
    while cells and not cells[-1]["source"].strip():
        cells.pop()
    return {"notebook": name, "cells": cells}


def source_path(name: str, profile: str, root: Path = ROOT) -> Path:
    """Where the normalised copy lies."""
    return root / "results" / profile / "sources" / f"{name}.json"


def write_source(name: str, profile: str, root: Path = ROOT) -> Path:
    """Write the normalised copy of notebooks/<name>.ipynb and return its path."""
    path = source_path(name, profile, root)
    write_text(path, dumps(normalise(name, load_notebook(name, root))))
    return path


def stripped(notebook: dict[str, Any]) -> str:
    """The notebook as git should hold it: no outputs, no execution counts, only tags as metadata, cells numbered."""
    cells = []
    for number, cell in enumerate(notebook["cells"], start=1):
        source = cell["source"]
        tags = cell.get("metadata", {}).get("tags")
        kept = {
            "cell_type": cell["cell_type"],
            "id": f"cell-{number:02d}",
            "metadata": {"tags": tags} if tags else {},
            "source": (source if isinstance(source, str) else "".join(source)).splitlines(keepends=True),
        }
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        cells.append(dict(sorted(kept.items())))
    return dumps({"cells": cells, "metadata": METADATA, "nbformat": 4, "nbformat_minor": 5})


def drop_empty_end(model: dict[str, Any], **_: Any) -> None:
    """A `pre_save_hook` for Jupyter: drop empty cells at the end, which JupyterLab adds when the last cell is run with
    Shift-Enter."""
    if model["type"] == "notebook":
        cells = model["content"]["cells"]
        while len(cells) > 1 and not "".join(cells[-1]["source"]).strip():
            cells.pop()


def strip(name: str, root: Path = ROOT) -> bool:
    """Rewrite notebooks/<name>.ipynb as git should hold it and say whether that changed it."""
    path = root / "notebooks" / f"{name}.ipynb"
    text = stripped(load_notebook(name, root))
    if path.read_text(encoding="utf-8") == text:
        return False
    write_text(path, text)
    return True


def problems(name: str, root: Path = ROOT) -> list[str]:
    """Why notebooks/<name>.ipynb is not as git should hold it: outputs, counts, formatting, no single `parameters`
    cell."""
    notebook = load_notebook(name, root)
    found = []
    if any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"]):
        found.append("it holds outputs or execution counts")
    elif stripped(notebook) != (root / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"):
        found.append("its metadata or formatting is not the canonical one")
    if found:
        found[0] += f" (run: python -m pipelines.notebook strip {name})"
    try:
        declared(normalise(name, notebook))
    except PipelineError as error:
        found.append(str(error))
    return found


# --- parameters ---


def declared(source: dict[str, Any]) -> dict[str, Any]:
    """Name -> default of the `parameters` cell; raises PipelineError unless there is one such cell and it holds
    literals only."""
    name = source["notebook"]
    tagged = [cell for cell in source["cells"] if "parameters" in cell.get("tags", ()) and cell["cell_type"] == "code"]
    if len(tagged) != 1:
        raise PipelineError(
            f"notebooks/{name}.ipynb has {len(tagged)} code cells tagged `parameters`: it needs exactly one"
        )
    found: dict[str, Any] = {}
    for node in ast.parse(tagged[0]["source"]).body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign) and len(node.targets) == 1
            else getattr(node, "target", None)
        )
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if not isinstance(target, ast.Name) or getattr(node, "value", None) is None:
            raise PipelineError(
                f"notebooks/{name}.ipynb, parameters cell, line {node.lineno}: "
                "only lines `name = value` may stand there"
            )
        try:
            found[target.id] = ast.literal_eval(node.value)
        except ValueError:
            raise PipelineError(
                f"notebooks/{name}.ipynb, parameters cell: the default of {target.id!r} is not a literal "
                "(a number, string, truth value, None, or a list or dictionary of these)"
            ) from None
    return found


def type_name(value: Any) -> str:
    """The type of a parameter in words."""
    if isinstance(value, (list, tuple)) and value:
        kinds = sorted({type_name(item) for item in value})
        return f"list of {' and '.join(kinds)}"
    return {
        bool: "bool",
        int: "int",
        float: "float",
        str: "string",
        list: "list",
        tuple: "list",
        dict: "mapping",
        type(None): "null",
    }.get(type(value), type(value).__name__)


def fits(value: Any, default: Any) -> bool:
    """Whether `value` may take the place of `default`: same type; an int may stand for a float; a list's items like
    the default's."""
    if default is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple)) and (
            not default or all(any(fits(item, d) for d in default) for item in value)
        )
    return isinstance(value, type(default))


def validated(source: dict[str, Any], values: dict[str, Any], profile: str) -> dict[str, Any]:
    """The parameters to inject; raises PipelineError that names key, value and what is allowed for the first one that
    does not fit."""
    name = source["notebook"]
    defaults = declared(source)
    where = f"pipelines/profiles/{profile}.yaml, notebooks.{name}"
    if "profile" not in defaults:
        raise PipelineError(
            f'notebooks/{name}.ipynb, parameters cell: it must set `profile` (for instance profile = "quick")'
        )
    if "profile" in values:
        raise PipelineError(f"{where}: `profile` is set by the runner and may not stand there")
    for key, value in values.items():
        if key not in defaults:
            allowed = ", ".join(sorted(set(defaults) - {"profile"})) or "none"
            raise PipelineError(
                f"{where}: unknown parameter {key!r} (value {value!r}); the notebook's parameters cell has: {allowed}"
            )
        if not fits(value, defaults[key]):
            hint = ""
            if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
                hint = "; YAML reads this number as text, write it with a point and a signed exponent, as 1.0e-3"
            raise PipelineError(
                f"{where}: {key} = {value!r} is of type {type_name(value)}; allowed is {type_name(defaults[key])}, "
                f"as its default {defaults[key]!r} in the parameters cell{hint}"
            )
    return {"profile": profile, **values}


# --- execution ---


def kernel_manager(runtime: Path, root: Path, made: list[Any]) -> type:
    """A kernel manager whose only kernel is this interpreter, spoken to over ipc sockets in `runtime`; instances are
    added to `made`."""
    python_path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {"PYTHONPATH": python_path, "PYTHONHASHSEED": "0", "IPYTHONDIR": str(runtime), "TQDM_DISABLE": "1"}
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        def __init__(self, **traits: Any) -> None:
            super().__init__(**traits)
            self.transport = "ipc"
            self.connection_file = str(runtime / "kernel.json")
            made.append(self)

        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [
                sys.executable,
                "-Xfrozen_modules=off",
                "-m",
                "ipykernel_launcher",
                "-f",
                "{connection_file}",
                "--log-level=CRITICAL",
            ]
            return KernelSpec(argv=argv, env=environ, display_name="Python 3 (ipykernel)", language="python")

    return ThisInterpreter


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


def to_nbformat(source: dict[str, Any]) -> Any:
    """A fresh notebook made of the normalised copy."""
    v4 = notebook_format().v4
    new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell, "raw": v4.new_raw_cell}
    cells = [
        new[cell["cell_type"]](cell["source"], metadata={"tags": cell.get("tags", [])}) for cell in source["cells"]
    ]
    return v4.new_notebook(cells=cells, metadata=METADATA)


def settle(notebook: Any) -> str:
    """The executed notebook without what varies from run to run: times, ids, addresses, versions, the interleaving of
    streams."""

    def clean(text: str) -> str:
        return CELL_FILE.sub("cell", ADDRESS.sub("0x0", text)).replace(f"{ROOT}/", "")  # a warning names its file

    for number, cell in enumerate(notebook["cells"], start=1):
        cell["id"] = f"cell-{number:02d}"
        tags = cell["metadata"].get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
        outputs: list[dict[str, Any]] = []
        for is_stream, group in groupby(cell.get("outputs", []), key=lambda output: output["output_type"] == "stream"):
            if is_stream:  # standard output first, standard error after it: which came first is a race
                texts = {"stdout": "", "stderr": ""}
                for output in group:
                    texts[output["name"]] += "".join(output["text"])
                outputs += [
                    {"name": n, "output_type": "stream", "text": clean(t).splitlines(keepends=True)}
                    for n, t in texts.items()
                    if t
                ]
                continue
            for output in group:
                for kind, value in output.get("data", {}).items():
                    if kind.startswith("text/"):
                        output["data"][kind] = clean("".join(value)).splitlines(keepends=True)
                outputs.append(output)
        if cell["cell_type"] == "code":
            cell["outputs"] = outputs
    notebook["metadata"] = METADATA
    return dumps(notebook)


def short_folder() -> Path:
    """A new temporary folder whose path leaves room for the name of a socket; raises PipelineError if there is none.

    TMPDIR may be too deep for that: then it is one in /tmp or /var/tmp.
    """
    places = list(dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp"]))
    for place in places:
        try:
            made = Path(tempfile.mkdtemp(prefix="ep-", dir=place))
        except OSError:
            continue
        if len(os.fsencode(made / SOCKET)) <= SOCKET_PATH:
            return made
        made.rmdir()
    raise PipelineError(
        "no temporary folder for the notebook kernel's sockets: the path of one may have "
        f"{SOCKET_PATH - len(SOCKET) - len('/ep-12345678/')} characters and must be writable, tried {', '.join(places)}; "
        "set TMPDIR to a short path"
    )


def execute(source: dict[str, Any], parameters: dict[str, Any], root: Path) -> tuple[dict[str, Any], str | None]:
    """Execute the normalised copy in a kernel of this interpreter; returns the executed notebook and, if a cell
    failed, which and how."""
    fresh = to_nbformat(source)
    from nbclient.exceptions import DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillExecutionError

    runtime = short_folder()
    output = runtime / "executed.ipynb"
    managers: list[Any] = []
    failure = None
    try:
        execute_notebook(
            fresh,
            str(output),
            parameters,
            kernel_name="python3",
            progress_bar={"desc": f"notebook {source['notebook']}"},
            cwd=str(root),
            kernel_manager_class=kernel_manager(runtime, root, managers),
        )
    except PapermillExecutionError as error:
        failure = f"In [{error.exec_count}]: {error.ename}: {(error.evalue.splitlines() or [''])[0]}"
    except DeadKernelError:
        failure = "a cell that ended its kernel (was it killed for memory?)"
    finally:
        for manager in managers:  # after Ctrl-C papermill leaves its kernel running
            process = getattr(manager.provisioner, "process", None)
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        executed = (
            json.loads(output.read_text(encoding="utf-8"))
            if output.is_file()
            else {"cells": [], "nbformat": 4, "nbformat_minor": 5}
        )
        shutil.rmtree(runtime, ignore_errors=True)
    return executed, failure


def run(name: str, profile: str, root: Path = ROOT) -> Path:
    """Execute a notebook with its profile's parameters and return the path of the executed copy.

    Its own folders results/<profile>/<name> and figures/<profile>/<name> start empty. On failure they are put back as
    they were, the failed notebook is kept beside the last good one as NAME.failed.ipynb, and PipelineError is raised.
    """
    path = source_path(name, profile, root)
    if not path.is_file():
        raise PipelineError(
            f"{path.relative_to(root)} is missing; "
            f"write it with: python -m pipelines.notebook source {name} --profile {profile}"
        )
    source = read_json(path)
    parameters = validated(source, (load_profile(profile, root).get("notebooks") or {}).get(name) or {}, profile)
    target = root / "results" / profile / "notebooks" / f"{name}.ipynb"
    failed = target.with_name(f"{name}.failed.ipynb")
    results, figures = root / "results" / profile / name, root / "figures" / profile / name
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
    failed.unlink(missing_ok=True)
    return target


# --- command line ---


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.notebook", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("source", "run"):
        sub = commands.add_parser(command)
        sub.add_argument("name")
        sub.add_argument("--profile", required=True)
    commands.add_parser("strip").add_argument("name", nargs="*")
    commands.add_parser("check")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminated run cleans up as an interrupted one does
        signal.signal(number, signal.default_int_handler)
    try:
        if options.command == "source":
            write_source(options.name, options.profile)
        elif options.command == "run":
            run(options.name, options.profile)
        elif options.command == "strip":
            for name in options.name or notebook_names():
                print(f"notebooks/{name}.ipynb: {'stripped' if strip(name) else 'unchanged'}")
        else:
            found = [f"notebooks/{name}.ipynb: {problem}" for name in notebook_names() for problem in problems(name)]
            print("\n".join(found) or "all notebooks are as git should hold them")
            return bool(found)
    except PipelineError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was changed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
