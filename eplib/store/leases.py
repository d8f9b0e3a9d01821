"""Who trains a run: one process at a time, whatever commands and notebooks work on one store.

A lease is a file that names its holder's host and process; the holder touches it every RENEW seconds. A lease is stale, and the
next who asks takes it over, if its process is gone (seen on the same host) or if nobody touched it for STALE seconds (seen
anywhere). Making, taking over, renewing and giving back each happen under a lock of the folder (flock, which the system lifts
from a process that dies), so a lease never has two holders.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ..files import HOST, alive

RENEW, STALE = 20.0, 180.0  # seconds


class Held(RuntimeError):
    """Another process holds the lease; the message says which."""


class Lost(RuntimeError):
    """This process held the lease, was not seen for STALE seconds, and another has taken it over."""


@contextmanager
def lease(path: Path) -> Iterator[Callable[[], None]]:
    """Holds the lease at `path` while the body runs. Gives a function that raises `Lost` if it is held no longer.

    Raises `Held` if another process, or another thread of this one, has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = json.dumps({"host": HOST, "pid": os.getpid(), "since": time.time(), "token": uuid4().hex})
    with _alone(path.parent):
        if other := holder(path):
            raise Held(other)
        path.unlink(missing_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(mine)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, mine, ended), daemon=True)
    renewal.start()

    def check() -> None:
        if not path.exists():
            raise Lost(f"{path.stem}: its lease at {path} was removed while the run was at work")
        if not _is(path, mine):
            raise Lost(f"{path.stem}: not renewed for {STALE:.0f} s, so {holder(path) or 'another process'} took it over")

    try:
        yield check
    finally:
        ended.set()
        renewal.join()
        with _alone(path.parent):
            if _is(path, mine):
                path.unlink()


def holder(path: Path) -> str | None:
    """Who holds the lease at `path`, in words; None if nobody does or it is stale."""
    try:
        age, text = time.time() - path.stat().st_mtime, path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(text)
    except ValueError:  # its writer died before a word was written
        owner = {"host": "an unknown host", "pid": None}
    if age > STALE or (owner["host"] == HOST and not alive(owner["pid"])):
        return None
    return f"process {owner['pid']} on {owner['host']}"


def _renew(path: Path, mine: str, ended: threading.Event) -> None:
    while not ended.wait(RENEW):
        with _alone(path.parent):
            if not _is(path, mine):
                return
            os.utime(path)


def _is(path: Path, mine: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == mine
    except FileNotFoundError:
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    import fcntl  # here, so that a store can be read where there is none

    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
