"""Building the kernel and loading it."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from ..files import partial

SOURCE = Path(__file__).with_name("thick.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread")


class KernelError(RuntimeError):
    """The compiled kernel is not there, or cannot do what was asked of it; the message says what to do."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the PATH."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def path() -> Path:
    """Where the library for this source, these flags and this processor lies, built or not."""
    cpu = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features"))][:1] if cpu.exists() \
        else [platform.processor()]
    identity = "\n".join([SOURCE.read_text(), *FLAGS, platform.machine(), *features])
    return SOURCE.parent / "build" / f"thick-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.so"


def available() -> bool:
    """Whether the kernel is built."""
    return path().exists()


def build() -> Path:
    """Compiles the kernel (seconds). Raises `KernelError` without a compiler or with what the compiler said."""
    target, program = path(), compiler()
    if target.exists():
        return target
    if program is None:
        raise KernelError("no C++ compiler found (c++, g++ or clang++; CXX names another); backend=\"torch\" needs none")
    target.parent.mkdir(exist_ok=True)
    for old in target.parent.glob("thick-*"):
        old.unlink()
    unfinished = partial(target)
    for threads in (["-fopenmp"], []):  # without OpenMP the kernel starts threads of its own
        done = subprocess.run([program, *FLAGS, *threads, str(SOURCE), "-o", str(unfinished)], capture_output=True, text=True)
        if not done.returncode:
            break
    else:
        unfinished.unlink(missing_ok=True)
        raise KernelError(f"{program} could not compile {SOURCE.name}: {done.stderr.strip()[-2000:]}")
    os.replace(unfinished, target)
    return target


@cache
def library() -> ctypes.CDLL:
    """The loaded kernel. Raises `KernelError` if it is not built."""
    if not available():
        raise KernelError("the compiled kernel is not built; run: python -m eplib.kernels, or choose backend=\"torch\"")
    loaded = ctypes.CDLL(str(path()))
    loaded.eplib_packed.restype = ctypes.c_long
    return loaded
