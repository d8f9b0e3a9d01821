"""Language model and image classifier around one equilibrium block.

A model clamps inputs to x, holds the block, and gives one loss per sample of what is read out of the state:

    x = model.clamp(inputs)          # (B, T, C), what clamps the block
    h = model.block.output(z)        # (B, T, C)
    loss = model.loss(h, targets)    # (B,)
"""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .blocks import Block
from .calculus import EPS, linear, normalise
from .solvers import Solution, Solver


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

    def settle(self, inputs: Tensor, solver: Solver, start: Tensor | None = None) -> Solution:
        """The free phase: takes the clamped block to its fixed point, without a graph, from `start` (by default the
        block's)."""
        with torch.no_grad():
            x = self.clamp(inputs)
            return solver.solve(lambda z: self.block(z, x), self.block.start(x) if start is None else start)


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
        """Samples `tokens` ids after `prompt` (T,), settling the last `context` tokens for each; returns (T + tokens,).

        Until the window is full each settles from the states that its predecessor ended in.
        """
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        ids, state = prompt, None
        for _ in range(tokens):
            window = ids[None, -self.context:]
            start = None
            if state is not None and window.shape[1] > state.shape[-2]:
                start = torch.cat([state, self.block.start(self.clamp(window))[..., -1:, :]], -2)
            state = self.settle(window, solver, start).value
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
