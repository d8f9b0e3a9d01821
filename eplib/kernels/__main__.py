"""Builds the compiled kernel: `python -m eplib.kernels`. The exit code is 0 if it is there, 1 if it could not be built."""

import sys

from . import KernelError, build

try:
    print(f"compiled kernel: {build().name}")
except KernelError as error:
    sys.exit(f"compiled kernel: not built, {error}")
