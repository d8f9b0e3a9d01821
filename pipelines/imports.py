"""Which modules of this repository a piece of code imports, found by reading it: DVC does not see imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.common import PipelineError

PACKAGES = ("benchmarks", "eplib", "pipelines")


def code_of(source: dict[str, Any]) -> ast.Module:
    """The syntax tree of a notebook's code cells, without lines for IPython (% and !)."""
    lines = [line for cell in source["cells"] if cell["cell_type"] == "code" for line in cell["source"].splitlines()]
    try:
        return ast.parse("\n".join(line for line in lines if not line.lstrip().startswith(("%", "!"))))
    except SyntaxError as error:
        raise PipelineError(f"notebooks/{source['notebook']}.ipynb does not parse: {error}") from error


def lazy_names(package: str, root: Path) -> dict[str, str]:
    """The literal `_LAZY` of a package's __init__.py: public name -> module that holds it."""
    for node in ast.parse((root / package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_LAZY":
            return ast.literal_eval(node.value)
    return {}


def module_file(dotted: str, root: Path) -> Path | None:
    """The file of a module of this repository, or None for anything else."""
    base = root.joinpath(*dotted.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imports(tree: ast.Module, package: str | None, root: Path) -> set[str]:
    """Dotted names of the modules of this repository that `tree` imports; `package` is what relative imports start
    from."""
    found: set[str] = set()
    aliases: dict[str, str] = {}

    def add(module: str, name: str) -> None:
        target = f"{module}.{lazy_names(module, root).get(name, name)}" if module in PACKAGES else f"{module}.{name}"
        found.add(target if module_file(target, root) else module)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PACKAGES:
                    found.add(alias.name)
                    aliases[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parent = (package or "").split(".")
                module = ".".join([*parent[: len(parent) - node.level + 1], *filter(None, [module])])
            if module.split(".")[0] in PACKAGES:
                for alias in node.names:
                    add(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            add(aliases[node.value.id], node.attr)
    return found


def closure(start: Iterable[str], root: Path, read: dict[Path, set[str]] | None = None) -> list[str]:
    """Paths of the given modules, of all modules of this repository they import, directly or not, and of the C++ sources that
    lie in a package among them, sorted. `read` keeps what each file imports for the next call."""
    read = {} if read is None else read
    todo, files = set(start), {}
    while todo:
        dotted = todo.pop()
        path = module_file(dotted, root)
        if path is None or path in files:
            continue
        package = dotted if path.name == "__init__.py" else dotted.rpartition(".")[0]
        files[path] = dotted
        if path not in read:
            read[path] = imports(ast.parse(path.read_text(encoding="utf-8")), package, root)
        todo |= read[path]
        todo |= {dotted.rpartition(".")[0]} - {""}
    compiled = [source for path in files if path.name == "__init__.py" for source in path.parent.glob("*.cpp")]
    return sorted(str(path.relative_to(root)) for path in [*files, *compiled])
