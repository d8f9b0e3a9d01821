"""Language model and image classifier around one equilibrium block.

A model clamps inputs to x, holds the block, and gives one loss per sample of what is read out of the state:

    x = model.clamp(inputs)          # (B, T, C), what clamps the block
    h = model.block.output(z)        # (B, T, C)
    loss = model.loss(h, targets)    # (B,)
"""

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .blocks import Block, Dynamical
from .calculus import EPS, linear, normalise
from .solvers import Solution, Solver

if TYPE_CHECKING:
    from .kernels import CompiledBlock

Backend = Literal["torch", "compiled"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target], (..., V), (...) -> (...); for complex logits its holomorphic extension."""
    if not logits.is_complex():
        return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    raised = logits - logits.real.amax(-1, keepdim=True).detach()
    return raised.exp().sum(-1).log() - raised.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


class EquilibriumModel(nn.Module):
    """A block with a readout: final LayerNorm and a linear layer."""

    def __init__(self, width: int, heads: int, context: int, outputs: int, block: Block):
        super().__init__()
        self.context = context
        self.position = nn.Parameter(0.1 * torch.randn(context, width))
        self.block = block.build(width, heads, context)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.readout = nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.readout.weight, std=0.1 / math.sqrt(width))  # near-uniform predictions, yet a gradient for z

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """One loss for each sample, in nats: (B,)."""
        return self.loss_of(self.logits(h), targets)

    def dynamics(self, backend: Backend = "torch") -> "Dynamical | CompiledBlock":
        """What computes the block: the block itself, or the compiled kernel at its present weights. Raises
        `kernels.KernelError` where the kernel is not built or does not know the block."""
        if backend == "torch":
            return self.block
        if backend != "compiled":
            raise ValueError(f"backend {backend!r} is not one of torch, compiled")
        from .kernels import CompiledBlock  # loads the library

        return CompiledBlock(self.block)

    @torch.no_grad()
    def settle(self, inputs: Tensor, solver: Solver, start: Tensor | None = None, backend: Backend = "torch") -> Solution:
        """The free phase: takes the clamped block to its fixed point, without a graph, from `start` (by default the
        block's)."""
        return solver.settle(self.dynamics(backend), self.clamp(inputs), start)


class LanguageModel(EquilibriumModel):
    """Next-token prediction: inputs and targets are token ids (B, T <= context); the loss is the mean cross-entropy over the
    sample's own tokens, in nats."""

    def __init__(self, vocab: int, width: int, heads: int, context: int, block: Block):
        super().__init__(width, heads, context, vocab, block)
        self.embedding = nn.Embedding(vocab, width)  # unit variance: F starts well inside the contractive region

    def clamp(self, inputs: Tensor) -> Tensor:
        """x (B, T, C) = token embedding + position. Raises ValueError if T exceeds the context."""
        if inputs.shape[-1] > self.context:
            raise ValueError(f"{inputs.shape[-1]} tokens do not fit a context of {self.context}; crop the sequence")
        return self.block.drive(self.embedding(inputs) + self.position[: inputs.shape[-1]])

    def logits(self, h: Tensor) -> Tensor:
        return linear(self.readout, normalise(self.norm, h))  # (B, T, C) -> (B, T, vocab)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets).mean(-1)  # (B, T) -> (B,)

    @torch.no_grad()
    def generate(self, prompt: Tensor, tokens: int, solver: Solver, temperature: float = 0.8,
                 generator: torch.Generator | None = None) -> Tensor:
        """Samples `tokens` ids after `prompt` (T,); returns (T + tokens,).

        In a causal block the states of the past do not depend on what follows, so each step settles the new token alone, under
        the keys and values of those before it: exactly the state it has in the whole sequence. A window that has reached
        `context` tokens goes on with its last half, whose positions move, so that it is settled anew. Blocks without such a
        past settle the window for every token.
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        ids, first, settled, past = prompt, max(0, len(prompt) - self.context), 0, None
        for _ in range(tokens):
            if len(ids) - first > self.context:
                first, past = len(ids) - self.context // 2, None
            if past is None:
                settled, past = first, self.block.prefix()
            x = self.clamp(ids[None, first:])[..., settled - first:, :]
            if past is None:
                state = solver.settle(self.block, x).value
            else:
                state = solver.solve(lambda z, x=x, past=past: past.force(z, x), self.block.start(x)).value
                past.extend(state)
                settled = len(ids)
            logits = self.logits(self.block.output(state))[0, -1]
            ids = torch.cat([ids, torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)])
        return ids


class Classifier(EquilibriumModel):
    """Image classification: inputs are patches (B, tokens, patch) of unit variance, targets class ids (B,); the state's
    tokens are averaged and read out."""

    def __init__(self, patch: int, tokens: int, classes: int, width: int, heads: int, block: Block):
        super().__init__(width, heads, tokens, classes, block)
        self.patch_size = patch
        self.embedding = nn.Linear(patch, width)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(patch))

    def clamp(self, inputs: Tensor) -> Tensor:
        """x (B, tokens, C). Raises ValueError if the patches have another shape."""
        if inputs.shape[-2:] != (self.context, self.patch_size):
            raise ValueError(f"expected patches (B, {self.context}, {self.patch_size}), got {tuple(inputs.shape)}")
        return self.block.drive(self.embedding(inputs) + self.position)

    def logits(self, h: Tensor) -> Tensor:
        return linear(self.readout, normalise(self.norm, h).mean(-2))  # (B, T, C) -> (B, classes)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets)
