"""Files that are there as a whole or not at all, whoever writes and is killed, and YAML that says what is wrong with it.

Imports neither torch nor NumPy: every command starts with it.
"""

import itertools
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def _host() -> str:
    """This machine, and within it the processes that a process number is one of: containers may share a host's name."""
    name, namespace = re.sub(r"[^\w-]", "_", platform.node()) or "unnamed", Path("/proc/self/ns/pid")
    return f"{name}-{namespace.stat().st_ino}" if namespace.exists() else name


def _root() -> Path:
    """The repository's folder: at or above the working directory, whatever is installed; else the one this package is in."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "pipelines" / "profiles").is_dir()),
                Path(__file__).resolve().parent.parent)


HOST, ROOT = _host(), _root()
_COUNT = itertools.count()  # of the temporary files of this process: two threads may write one file


def alive(pid: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all: a temporary file beside it, then a rename. Text becomes UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}-{next(_COUNT)}.partial")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> Iterator[Path]:
    """The temporary files in a folder, at any depth, of processes of this host that are gone."""
    for path in sorted(folder.rglob(".*.partial")):
        owner = re.search(rf"\.{re.escape(HOST)}\.(\d+)-\d+\.partial$", path.name)
        if owner and not alive(int(owner[1])):
            yield path


def read_yaml(path: Path, refused: type[Exception]) -> Any:
    """Parses a YAML file; raises `refused` with file, line and what is wrong. By the compiled loader where PyYAML has it: ten
    times as fast, and every command, worker and notebook reads a profile."""
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise refused(f"{path}{line}: this is not YAML: {problem or error}") from None
    except UnicodeDecodeError as error:
        raise refused(f"{path}: this is not UTF-8 text: {error}") from None
