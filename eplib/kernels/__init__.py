"""The optional compiled CPU kernel of `blocks.Thick` and `blocks.LinearAttention`: the same dynamics, several times faster.

`python -m eplib.kernels` builds it where a C++ compiler is at hand (set-up does so); `backend="compiled"` uses it. The PyTorch
path is the reference: forces and products agree with it to float32 rounding, settled states to the solver's tolerance. The
kernel is float32, on CPU, for real states; anything else is refused, never computed in another way.
"""

from .block import CompiledBlock, knows, unknown
from .compile import KernelError, available, build, compiler, library
from .jacobian import CompiledJacobian

__all__ = ["CompiledBlock", "CompiledJacobian", "KernelError", "available", "build", "compiler", "knows", "library", "unknown"]
