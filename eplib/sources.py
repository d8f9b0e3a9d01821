"""Which source a run's numbers depend on, found by reading imports: that of what trains, and of the classes that the run's
configuration is made of, yours as well as eplib's. Another block, estimator or controller is none of it."""

import ast
import inspect
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from textwrap import dedent
from typing import Any

PACKAGE = __name__.split(".")[0]
FOLDER = Path(__file__).parent
TRAINING = f"{PACKAGE}.training"  # what every run is computed by
SUMMARY = f"{PACKAGE}.store.summary"  # and its metrics
ADAPTIVE = f"{PACKAGE}.diagnostics.adaptive"  # and those that a run may ask for


def source_digest(config: Any) -> str:
    """Digest of the source that the numbers of a run of this configuration depend on; comments and docstrings do not count."""
    texts = [*map(_text, modules_of(config)), *map(without_comments, _foreign_texts(config))]
    kernels = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.rglob("*.cpp"))]
    return sha256("\n".join(texts + kernels).encode()).hexdigest()[:12]


def modules_of(config: Any) -> list[str]:
    """The modules of eplib that a run of this configuration depends on, sorted."""
    ours = {one.__module__ for one in _classes(config) if _is_ours(one.__module__)}
    named = {name for text in _foreign_texts(config) for name in names(ast.parse(text), "")}
    return closure({TRAINING, SUMMARY, *ours, *named} | ({ADAPTIVE} if config.adaptive else set()))


def closure(start: Iterable[str]) -> list[str]:
    """The modules of eplib that hold what the dotted names `start` stand for, and all that these import, sorted. A package that
    lists what its modules offer is seen through: a name from it leads to the module that holds the name."""
    todo, found = set(start), set[str]()
    while todo:
        module = _module_of(todo.pop())
        if module and module not in found:
            found.add(module)
            todo |= _imports(module)
    return sorted(found)


def names(tree: ast.AST, package: str) -> set[str]:
    """The dotted names of eplib's that a syntax tree imports or, of what it imports, uses; `package` is what relative imports
    start from. What is imported for the type checker alone computes nothing."""
    bound, found = dict[str, str](), set[str]()
    nodes = list(_computing(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for one in node.names:
                bound[one.asname or one.name.split(".")[0]] = one.name if one.asname else one.name.split(".")[0]
                found.add(one.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            for one in node.names:
                bound[one.asname or one.name] = ".".join([*above, *filter(None, [node.module]), one.name])
    found |= set(bound.values())
    for node in nodes:
        chain = list[str]()
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id in bound:
            found.add(".".join([bound[node.id], *chain]))
    return {name for name in found if _is_ours(name)}


def without_comments(text: str) -> str:
    """Source text without comments, docstrings and blank lines: what results depend on."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) \
                and isinstance(body[0].value.value, str):
            first, last = body[0].lineno - 1, (body[0].end_lineno or body[0].lineno) - 1
            if not (lines[first].encode()[:body[0].col_offset] + lines[last].encode()[body[0].end_col_offset:]).strip():
                lines[first:last + 1] = [""] * (last + 1 - first)  # but a line that holds code as well stays
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1][column:column + 1] == "#":
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _classes(value: Any) -> Iterator[type]:
    """The classes of a configuration and of all in it, and what they inherit from."""
    if is_dataclass(value):
        yield from (one for one in inspect.getmro(type(value)) if one.__module__.split(".")[0] not in sys.stdlib_module_names)
        for field in fields(value):
            yield from _classes(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _classes(item)


def _foreign_texts(config: Any) -> list[str]:
    return sorted({_foreign(one) for one in _classes(config) if not _is_ours(one.__module__)})


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


@cache
def _foreign(one: type) -> str:
    """The source of a class that is not eplib's, with its file where it has one: what is in it may compute for the class."""
    try:
        return inspect.getsource(sys.modules[one.__module__])
    except (OSError, TypeError):  # of a notebook's cell
        pass
    try:
        return dedent(inspect.getsource(one))
    except (OSError, TypeError) as error:
        raise ValueError(f"the source of {one.__name__} is not to be had, and a run is named by it: a class from `python -c` "
                         "or a prompt goes into a file or a notebook's cell") from error


def _file(module: str) -> Path | None:
    base = FOLDER.joinpath(*module.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


# a process computes with the source it has loaded, and a store asks for every run
@cache
def _tree(module: str) -> ast.Module:
    path = _file(module)
    return ast.parse(path.read_text(encoding="utf-8") if path else "")


@cache
def _text(module: str) -> str:
    path = _file(module)
    return without_comments(path.read_text(encoding="utf-8") if path else "")


@cache
def _imports(module: str) -> set[str]:
    path = _file(module)
    return names(_tree(module), module if path and path.stem == "__init__" else module.rpartition(".")[0])


@cache
def _listed(package: str) -> dict[str, str]:
    """What the __init__.py of a package imports: {name: where it is from}."""
    return {one.asname or one.name: f"{package}.{node.module}.{one.name}" for node in _tree(package).body
            if isinstance(node, ast.ImportFrom) and node.level == 1 for one in node.names}


def _module_of(dotted: str) -> str | None:
    """The module that holds what a dotted name stands for; None for a package as such, of which what is used is asked for."""
    module, parts = PACKAGE, dotted.split(".")[1:]
    for place, part in enumerate(parts):
        if _file(f"{module}.{part}"):
            module = f"{module}.{part}"
        elif part in _listed(module):
            return _module_of(".".join([_listed(module)[part], *parts[place + 1:]]))
        else:
            return module
    path = _file(module)
    return None if path is None or path.stem == "__init__" else module


def _computing(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a syntax tree that are more than the type checker's."""
    for child in ast.iter_child_nodes(node):
        checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not checked:
            yield child
            yield from _computing(child)
