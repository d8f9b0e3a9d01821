"""Who trains a run: one process at a time, whatever commands, notebooks and machines work on one store.

A lease is a lock of flufl.lock, a hard link to a file of its holder's: that works on a folder shared between machines, too. It
ends at its time of change, which its holder moves on; who asks for one that has ended, or whose holder was a process of this
host that is gone, takes it over. The machines' clocks may differ by CLOCKS.
"""

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from ..files import HOST, alive

LIFETIME, RENEW = 60.0, 15.0  # seconds
CLOCKS = 10.0  # seconds, as flufl.lock allows


class Held(RuntimeError):
    """Another process holds the lease; the message says which."""


class Lost(RuntimeError):
    """This process held the lease, did not renew it for LIFETIME seconds, and another has taken it over."""


@contextmanager
def lease(path: Path) -> Iterator[Callable[[], None]]:
    """Holds the lease at `path` while the body runs. Gives a function that raises `Lost` if it is held no longer; in the main
    thread the body is interrupted by `Lost` when that is noticed, but where SIGINT is ignored, as in a shell's background job.

    Raises `Held` if another process, or another thread of this one, has it.
    """
    from flufl.lock import NotLockedError  # here, as below: a store can be read without it

    lock, over, lost = _acquired(path), threading.Event(), threading.Event()
    interrupts = threading.current_thread() is threading.main_thread()

    def check() -> None:
        if lost.is_set() or not lock.is_locked:
            raise Lost(f"{path.stem}: not renewed for {LIFETIME:.0f} s, so {holder(path) or 'another process'} took it over")

    def renew() -> None:
        while not over.wait(RENEW):
            try:
                lock.refresh()
            except NotLockedError:
                lost.set()
                if interrupts and not over.is_set():
                    _thread.interrupt_main()
                return
            except OSError:  # the folder does not answer now; the lease lasts for a while
                continue

    renewal = threading.Thread(target=renew, daemon=True)
    renewal.start()
    try:
        yield check
    except KeyboardInterrupt:
        check()
        raise
    finally:
        over.set()
        renewal.join()
        lock.unlock(unconditionally=True)


def _acquired(path: Path) -> Any:
    from flufl.lock import AlreadyLockedError, Lock, TimeOutError

    class Named(Lock):
        hostname = HOST  # containers may share a host's name

    path.parent.mkdir(parents=True, exist_ok=True)
    if other := holder(path):
        raise Held(other)
    _clear(path)
    patience = timedelta(seconds=3 if _ended(path) else 0)  # in which one that has ended is broken
    lock = Named(str(path), lifetime=timedelta(seconds=LIFETIME))
    with suppress(AlreadyLockedError):  # made, but the answer was lost on the network
        try:
            lock.lock(timeout=patience)
        except TimeOutError:
            raise Held(holder(path) or "another process") from None
    return lock


def holder(path: Path) -> str | None:
    """Who holds the lease at `path`, in words; None if nobody does, or if it has ended."""
    try:
        _, host, pid = _claim(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return f"an unreadable lock; if nobody trains the run, remove {path}"
    return None if _ended(path) or (host == HOST and not alive(pid)) else f"process {pid} on {host}"


def _ended(path: Path) -> bool:
    try:
        return path.stat().st_mtime + CLOCKS < time.time()
    except FileNotFoundError:
        return False


def _claim(path: Path) -> tuple[Path, str, int]:
    """The holder's own file that the lock is a link to, its host and its process."""
    text = path.read_text(encoding="utf-8")
    _, host, pid, _ = text.rsplit("|", 3)
    return path.with_name(Path(text).name), host, int(pid)


def _clear(path: Path) -> None:
    """Removes the lock of a process of this host that is gone. Of several that find it one does: who can rename its claim."""
    with suppress(FileNotFoundError, ValueError):
        claim, host, pid = _claim(path)
        if host == HOST and not alive(pid):
            won = claim.with_name(f"{claim.name}.gone")
            claim.rename(won)
            if _claim(path)[0] == claim:
                path.unlink()
            won.unlink()
