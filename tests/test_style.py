"""ruff and mypy find nothing, in the versions that the lock names; modules and functions are small, imports go one way."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE, FUNCTION = 300, 45  # lines, at most


def said(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_the_tools_are_the_locked_ones(tool):
    [locked] = re.findall(rf"^{tool}==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert said(tool, "--version").stdout.split()[1] == locked


def test_ruff_finds_nothing():
    done = said("ruff", "check", "--output-format", "concise")
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_finds_nothing():
    done = said("mypy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checkers_check_something(tmp_path):
    """Each finds the fault of its kind under this repository's settings."""
    (tmp_path / "faulty.py").write_text('import os\n\n\ndef half(count: int) -> int:\n    return str(count)\n')
    settings = ("--config", str(ROOT / "pyproject.toml"))
    assert "F401" in said("ruff", "check", *settings, str(tmp_path / "faulty.py")).stdout
    assert "[return-value]" in said("mypy", "--config-file", settings[1], str(tmp_path / "faulty.py")).stdout


def modules() -> dict[str, Path]:
    """The library's modules by name."""
    paths = sorted((ROOT / "eplib").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def test_modules_and_functions_are_small():
    found = {}
    for name, path in modules().items():
        text = path.read_text()
        found[str(path.relative_to(ROOT))] = len(text.splitlines()) - MODULE
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{name}.{node.name}"] = (node.end_lineno or 0) - node.lineno + 1 - FUNCTION
    large = {name: over for name, over in found.items() if over > 0}
    assert not large, f"lines above what is allowed: {large}"


def at_import(body: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that are carried out when a module is: not those inside functions, or for the type checker alone."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_import(ast.iter_child_nodes(node))


def imported(name: str, source: str, package: bool, known: Iterable[str]) -> set[str]:
    """Those of the modules `known` that importing the module `name` of this source imports first. That of a package's part
    carries out the package as well, unless it is the importing module's own, from which only names that are no modules ask for
    it."""
    own, found = (name if package else name.rpartition(".")[0]).split("."), set()
    for node in at_import(ast.parse(source).body):
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        else:
            base = ".".join([*(own[: len(own) - node.level + 1] if node.level else []), *filter(None, [node.module])])
            asked = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        parts = [one.split(".") for one in asked]
        above = {".".join(part[:end]) for part in parts for end in range(1, len(part))}
        found |= {*asked, *(one for one in above if not f"{name}.".startswith(f"{one}."))} & set(known)
    return found - {name}


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that import themselves in the end."""
    found = set()
    for name in graph:
        reached, left = set(), list(graph[name])
        while left:
            if (one := left.pop()) not in reached:
                reached.add(one)
                left += graph[one]
        found |= {name} & reached
    return found


def test_imports_form_no_circle():
    known = modules()
    graph = {name: imported(name, path.read_text(), path.name == "__init__.py", known) for name, path in known.items()}
    assert not circles(graph)


def test_a_circle_of_imports_is_seen():
    sources = {"p": "from .a import A", "p.a": "from .b import B", "p.b": "def f():\n    from .a import A", "p.c": "import q"}
    late = {name: imported(name, text, name == "p", sources) for name, text in sources.items()}
    assert late == {"p": {"p.a"}, "p.a": {"p.b"}, "p.b": set(), "p.c": set()} and not circles(late)
    for text in ("from .a import A", "from . import a", "from . import A", "import p.a"):
        graph = {name: imported(name, {**sources, "p.b": text}[name], name == "p", sources) for name in sources}
        assert circles(graph) >= {"p.a", "p.b"}, text
