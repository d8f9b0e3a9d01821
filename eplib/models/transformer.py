"""Language model and image classifier around one transformer block that relaxes, or is stacked."""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from ..blocks import Block
from ..calculus import EPS, linear, normalise
from ..config import configuration
from ..solvers import Solver
from ..tasks import Patches, Signal, Tokens
from .base import Architecture, Model
from .generation import generate
from .losses import IGNORED, check_batch, check_integer, check_range, cross_entropy

Positive = Annotated[int, Field(ge=1)]


@configuration
class Transformer(Architecture):
    """`LanguageModel` or `Classifier`, by what its task gives. `context` is the length of a text sequence; images have as many
    tokens as patches and none of it."""

    width: Positive = 64
    heads: Positive = 4
    context: Positive | None = None
    block: Block

    @property
    def described(self) -> str:
        return f"block {self.block.kind}"

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.block.causal

    @property
    def explicit(self) -> bool:  # type: ignore[override]
        return self.block.explicit

    @property
    def clamp_shaped(self) -> bool:  # type: ignore[override]
        return self.block.clamp_shaped

    @property
    def in_kernel(self) -> bool:  # type: ignore[override]
        from ..kernels import knows  # not where only a configuration is read

        return knows(self.block, self.width, self.heads)

    def build(self, signal: Signal) -> "TransformerModel":
        """The model for Tokens or Patches. Raises TypeError for another signal, `ShapeError` if heads do not divide the
        width."""
        if isinstance(signal, Tokens):
            return LanguageModel(signal.vocab, self.width, self.heads, signal.context, self.block)
        if isinstance(signal, Patches):
            return Classifier(signal.size, signal.tokens, signal.classes, self.width, self.heads, self.block)
        raise TypeError(f"a Transformer takes Tokens or Patches, and the task gives {signal}; write an Architecture that "
                        "builds a model for it")


class TransformerModel(Model):
    """A block with a readout: final LayerNorm and a linear layer."""

    def __init__(self, width: int, heads: int, context: int, outputs: int, block: Block):
        super().__init__()
        self.context = context
        self.position = nn.Parameter(0.1 * torch.randn(context, width))
        self.block = block.build(width, heads, context)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.readout = nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.readout.weight, std=0.1 / math.sqrt(width))  # near-uniform predictions, yet a gradient for z


class LanguageModel(TransformerModel):
    """Next-token prediction: inputs and targets are token ids (B, T <= context); the loss is the mean cross-entropy over the
    sample's own tokens that count, in nats.

    A target of -100 does not count. A sample of which no target counts has the loss 0, without a gradient; it stays a sample of
    the batch, over which gradients are averaged.
    """

    def __init__(self, vocab: int, width: int, heads: int, context: int, block: Block):
        super().__init__(width, heads, context, vocab, block)
        self.embedding = nn.Embedding(vocab, width)  # unit variance: F starts well inside the contractive region

    def clamp(self, inputs: Tensor) -> Tensor:
        """x (B, T, C) = token embedding + position. Raises TypeError or ValueError for what is not a batch of ids of the
        vocabulary, at most `context` a sample."""
        check_batch(inputs, "(B, T)", 2)
        check_integer("inputs", inputs)
        if inputs.shape[-1] > self.context:
            raise ValueError(f"{inputs.shape[-1]} tokens do not fit a context of {self.context}; crop the sequence")
        try:
            embedded = self.embedding(inputs.long())
        except IndexError:
            check_range("input", inputs, self.embedding.num_embeddings)
            raise
        return self.block.drive(embedded + self.position[: inputs.shape[-1]])

    def fitting(self, inputs: Tensor) -> tuple[int, ...]:
        return tuple(inputs.shape)

    def predict(self, h: Tensor) -> Tensor:
        return linear(self.readout, normalise(self.norm, h))  # (B, T, C) -> (B, T, vocab)

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(predictions, targets, IGNORED).sum(-1) / self.counted(targets).clamp_min(1)  # (B, T) -> (B,)

    def generate(self, prompt: Tensor, tokens: int, solver: Solver, temperature: float = 0.8,
                 generator: torch.Generator | None = None, *, top_k: int | None = None) -> Tensor:
        """Samples `tokens` ids after `prompt` (T,), as `generation.generate` says; returns (T + tokens,)."""
        return generate(self, prompt, tokens, solver, temperature, generator, top_k)


class Classifier(TransformerModel):
    """Image classification: inputs are patches (B, tokens, patch) of unit variance, targets class ids (B,); the state's
    tokens are averaged and read out."""

    def __init__(self, patch: int, tokens: int, classes: int, width: int, heads: int, block: Block):
        super().__init__(width, heads, tokens, classes, block)
        self.patch_size = patch
        self.embedding = nn.Linear(patch, width)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(patch))

    def clamp(self, inputs: Tensor) -> Tensor:
        """x (B, tokens, C). Raises TypeError or ValueError for patches of another shape or type, or that are not finite."""
        if inputs.shape[-2:] != (self.context, self.patch_size):
            raise ValueError(f"expected patches (B, {self.context}, {self.patch_size}), got {tuple(inputs.shape)}")
        check_batch(inputs, "(B, tokens, patch)", 3)
        if inputs.dtype != self.embedding.weight.dtype:
            raise TypeError(f"expected patches of {self.embedding.weight.dtype}, as the weights, got {inputs.dtype}; scale "
                            "them to unit variance and convert them with .to()")
        # a sum is quick and finite wherever the pixels are, unless they are near the end of the type's range
        if not torch.compiler.is_compiling() and not inputs.sum().isfinite():
            broken = (~inputs.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if broken:
                raise ValueError(f"the patches of sample {broken[0]} are not finite ({len(broken)} such samples); leave it out")
        return self.block.drive(self.embedding(inputs) + self.position)

    def fitting(self, inputs: Tensor) -> tuple[int, ...]:
        return tuple(inputs.shape[:1])

    def predict(self, h: Tensor) -> Tensor:
        return linear(self.readout, normalise(self.norm, h).mean(-2))  # (B, T, C) -> (B, classes)

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(predictions, targets)
