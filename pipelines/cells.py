"""Notebooks as files: read, normalised, stripped, and what their parameters cell declares.

The normalised copy of a notebook holds what decides its results: type, source and tags of each cell. Outputs saved by
JupyterLab are not part of it: saving them is no change.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

from eplib.settings import name_of
from pipelines.common import ROOT, PipelineError, dumps, notebook_names, write_text

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


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
    return root / "results" / name_of(profile) / "sources" / f"{name}.json"


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
