"""Executes a notebook's normalised copy in a kernel of this interpreter, and takes out of what came back whatever varies
from run to run: two executions on one machine give the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.cells import METADATA
from pipelines.common import ROOT, PipelineError, dumps, notebook_format

ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}")
SOCKET, SOCKET_PATH = "kernel-ipc-5", 103  # name of a kernel's last socket; bytes that a socket's path may have on any system
CELL_FILE = re.compile(r"\S*ipykernel_\d+/\d+\.py")


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
