"""Files that are there as a whole or not at all, whoever writes and is killed, and YAML that says what is wrong with it.

Imports neither torch nor NumPy: every command starts with it.
"""

import errno
import itertools
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
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


def partial(path: Path) -> Path:
    """A name beside `path` for what is not whole yet, which says whose it is."""
    return path.with_name(f".{path.name}.{HOST}.{os.getpid()}-{next(_COUNT)}.partial")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all: a temporary file beside it, then a rename. Text becomes UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish(folder: Path, files: dict[str, bytes | str], stands: Callable[[], bool]) -> None:
    """Puts a folder of files in its place whole, by one rename. A folder that is there gives way, unless it `stands`: who comes
    second leaves what the first has put there."""
    staged = partial(folder)
    staged.mkdir(parents=True)
    try:
        for name, content in files.items():
            (staged / name).write_bytes(content.encode() if isinstance(content, str) else content)
        while not stands():
            try:
                staged.rename(folder)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                with suppress(FileNotFoundError):  # another has moved it
                    shutil.rmtree(folder.rename(partial(folder)))
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def leftovers(folder: Path) -> Iterator[Path]:
    """What is not whole in a folder, at any depth, and was a process's of this host that is gone."""
    for path in sorted(folder.rglob(".*.partial")):
        owner = re.search(rf"\.{re.escape(HOST)}\.(\d+)-\d+\.partial$", path.name)
        if owner and not alive(int(owner[1])):
            yield path


def remove(path: Path) -> None:
    """Removes a file or a folder; what is not there is gone already."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
