"""Tokens settled in the order in which they depend on each other."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import configuration
from ..dynamics import InKernel
from ..parallel import Part
from .anderson import Anderson
from .base import Count
from .solution import Solution, norm, worst


@configuration
class Substitution(Anderson):
    """Substitution by tokens, `chunk` of them at a time: each chunk is settled by Anderson with those before it held.

    In a causal block F_t depends on z_1 .. z_t only, so J is block lower-triangular over tokens: the free phase solves by
    forward substitution, J^T by backward substitution. The tolerance holds for every chunk, so it holds for the sample. `steps`
    and `evaluations` count force evaluations of the whole sequence. A phase without that order, of a block that is not causal
    or of nudged trajectories, is one chunk. By default a chunk is what suits the backend: 2 tokens in the compiled kernel; the
    whole sequence in PyTorch, where a chunk costs nearly as much as everything (E7).
    """

    chunk: Count | None = None

    @torch.no_grad()
    def settle(self, block: Any, x: Tensor, start: Tensor | None = None, part: Part | None = None) -> Solution:
        start = block.start(x) if start is None else start
        past, parts = None if isinstance(block, InKernel) else block.prefix(), []
        if past is None or self.chunk is None:
            return super().settle(block, x, start, part)

        def force(drive: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda z: past.force(z, drive)

        for z, drive in zip(start.split(self.chunk, -2), x.split(self.chunk, -2), strict=True):
            parts.append(self.solve(force(drive), z))
            past.extend(parts[-1].value)
        return self._joined(parts)

    @staticmethod
    def _joined(parts: list[Solution]) -> Solution:
        """The solution of a sequence from those of its chunks (B, n, C), in order."""
        squares = torch.stack([(part.residual * norm(part.value)).square() for part in parts]).sum(0)
        value = torch.cat([part.value for part in parts], -2)
        share = [part.value.shape[-2] / value.shape[-2] for part in parts]
        steps = torch.stack([part.steps * s for part, s in zip(parts, share, strict=True)]).sum(0).ceil().long()
        evaluations = math.ceil(sum(part.evaluations * s for part, s in zip(parts, share, strict=True)))
        return Solution(value, squares.sqrt() / norm(value), steps, torch.stack([part.rate for part in parts]).amax(0),
                        evaluations, worst(part.status for part in parts),
                        sum(part.fallbacks for part in parts))
