"""Builds the compiled kernel: `python -m eplib.kernels`."""

from . import KernelError, build

try:
    print(f"compiled kernel: {build().name}")
except KernelError as error:
    print(f"compiled kernel: not built, {error}")
