"""Language model and image classifier around one equilibrium block.

A model clamps inputs to x, holds the block, and gives one loss per sample of what is read out of the state:

    x = model.clamp(inputs)          # (B, T, C), what clamps the block
    h = model.block.output(z)        # (B, T, C)
    loss = model.loss(h, targets)    # (B,)

What a model is given is checked where that costs nothing: ids out of range are found by the look-ups themselves and named here.
On a GPU these end with a device-side assertion, as elsewhere in PyTorch; nothing here waits for it.
"""

import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ..blocks import Block, Dynamical, EquilibriumBlock
from ..calculus import EPS, linear, normalise
from ..intact import refuse_hooked_wrapper
from ..solvers import Solution, Solver, Status

if TYPE_CHECKING:
    from ..kernels import CompiledBlock

Backend = Literal["torch", "compiled"]
IGNORED = -100  # a target that does not count, PyTorch's own default
NEVER = torch.iinfo(torch.long).min  # for `ignore_index`, where every target counts


class UnsettledWarning(UserWarning):
    """Tokens were drawn from states that had not settled."""


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int = NEVER) -> Tensor:
    """-log softmax(logits)[target], (..., V), (...) -> (...); for complex logits its holomorphic extension. Zero where a
    target is `ignored`. Raises TypeError or ValueError for targets of another type or shape, or out of range."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}; "
                         "block.output is to give (B, T, C)")
    _check_integer("targets", targets)
    targets = targets.long()
    try:
        if not logits.is_complex():
            return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none",
                                            ignore_index=ignored).view(targets.shape)
        raised, left_out = logits - logits.real.amax(-1, keepdim=True).detach(), targets == ignored
        chosen = raised.gather(-1, targets.masked_fill(left_out, 0).unsqueeze(-1)).squeeze(-1)
        return torch.where(left_out, 0, raised.exp().sum(-1).log() - chosen)
    except (IndexError, RuntimeError):
        _check_range("target", targets, logits.shape[-1], ignored)
        raise


def _check_integer(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.long, torch.int, torch.uint8):
        raise TypeError(f"{name} must be ids, int64 (or int32, uint8), got {ids.dtype}; convert them with .long()")


def _check_range(name: str, ids: Tensor, count: int, ignored: int = NEVER) -> None:
    """Raises ValueError that names the first id outside 0 .. count - 1."""
    wrong = ((ids < 0) | (ids >= count)) & (ids != ignored)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        padding = f"; {IGNORED} marks a target that does not count" if ignored == IGNORED else \
            f"; {IGNORED} has no meaning here, leave the sample out" if int(ids[place]) == IGNORED else ""
        raise ValueError(f"{name} {int(ids[place])} at {place} is not one of the {count} ids 0 .. {count - 1}{padding}")


def _check_batch(inputs: Tensor, shape: str, dims: int) -> None:
    if inputs.dim() != dims or 0 in inputs.shape:
        raise ValueError(f"expected inputs {shape} with at least one sample and one token, got {tuple(inputs.shape)}")


class EquilibriumModel(nn.Module):
    """A block with a readout: final LayerNorm and a linear layer."""

    def __init__(self, width: int, heads: int, context: int, outputs: int, block: Block):
        super().__init__()
        self.context = context
        self.position = nn.Parameter(0.1 * torch.randn(context, width))
        self.block: Dynamical = block.build(width, heads, context)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.readout = nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.readout.weight, std=0.1 / math.sqrt(width))  # near-uniform predictions, yet a gradient for z

    def clamp(self, inputs: Tensor) -> Tensor:
        """What clamps the block, x (B, T, C). Raises TypeError or ValueError for inputs that the model does not take."""
        raise NotImplementedError

    def logits(self, h: Tensor) -> Tensor:
        """Of what is read out, (B, T, C): one for each class or symbol, (..., V)."""
        raise NotImplementedError

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        """One loss for each sample, in nats: (B,)."""
        raise NotImplementedError

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """One loss for each sample, in nats: (B,)."""
        return self.loss_of(self.logits(h), targets)

    def counted(self, targets: Tensor) -> Tensor:
        """How many targets of each sample count: (B,)."""
        return (targets != IGNORED).view(len(targets), -1).sum(1)

    def correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """How many targets of each sample have the largest logit; one that does not count is none of them: (B,)."""
        return (logits.argmax(-1) == targets).view(len(targets), -1).sum(1)

    def dynamics(self, backend: Backend = "torch") -> "Dynamical | CompiledBlock":
        """What computes the block: the block itself, or the compiled kernel at its present weights. Raises
        `kernels.KernelError` where the kernel is not built or does not know the block."""
        refuse_hooked_wrapper(self.block)
        if backend == "torch":
            return self.block
        if backend != "compiled":
            raise ValueError(f"backend {backend!r} is not one of torch, compiled")
        from ..kernels import CompiledBlock  # loads the library

        return CompiledBlock(cast(EquilibriumBlock, self.block))  # which refuses any other

    @torch.no_grad()
    def settle(self, inputs: Tensor, solver: Solver, start: Tensor | None = None, backend: Backend = "torch") -> Solution:
        """The free phase: takes the clamped block to its fixed point, without a graph, from `start` (by default the
        block's)."""
        return solver.settle(self.dynamics(backend), self.clamp(inputs), start)


class LanguageModel(EquilibriumModel):
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
        _check_batch(inputs, "(B, T)", 2)
        _check_integer("inputs", inputs)
        if inputs.shape[-1] > self.context:
            raise ValueError(f"{inputs.shape[-1]} tokens do not fit a context of {self.context}; crop the sequence")
        try:
            embedded = self.embedding(inputs.long())
        except IndexError:
            _check_range("input", inputs, self.embedding.num_embeddings)
            raise
        return self.block.drive(embedded + self.position[: inputs.shape[-1]])

    def logits(self, h: Tensor) -> Tensor:
        return linear(self.readout, normalise(self.norm, h))  # (B, T, C) -> (B, T, vocab)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets, IGNORED).sum(-1) / self.counted(targets).clamp_min(1)  # (B, T) -> (B,)

    @torch.no_grad()
    def generate(self, prompt: Tensor, tokens: int, solver: Solver, temperature: float = 0.8,
                 generator: torch.Generator | None = None, *, top_k: int | None = None) -> Tensor:
        """Samples `tokens` ids after `prompt` (T,); returns (T + tokens,).

        Each is drawn from softmax(logits / temperature), of the `top_k` likeliest where that is given; temperature 0 is greedy,
        the likeliest each time.

        In a causal block the states of the past do not depend on what follows, so each step settles the new token alone, under
        the keys and values of those before it: exactly the state it has in the whole sequence. A window that has reached
        `context` tokens goes on with its last half, whose positions move, so that it is settled anew. Blocks without such a
        past settle the window for every token. Warns (`UnsettledWarning`) with the number of tokens that were drawn from states
        that had not settled. Raises TypeError or ValueError for a prompt that is empty or not of the vocabulary, for a `top_k`
        that is not of it or would do nothing, and for weights that are not finite.
        """
        self._check_request(prompt, tokens, temperature, top_k)
        ids, first, settled, past, unsettled = prompt.long(), max(0, len(prompt) - self.context), 0, None, 0
        for _ in range(tokens):
            if len(ids) - first > self.context:
                first, past = len(ids) - self.context // 2, None
            if past is None:
                settled, past = first, self.block.prefix()
            x = self.clamp(ids[None, first:])[..., settled - first:, :]
            if past is None:
                solution = solver.settle(self.block, x)
            else:
                solution = solver.solve(partial(past.force, x=x), self.block.start(x))
                past.extend(solution.value)
                settled = len(ids)
            # without a tolerance the horizon is what was asked for
            unsettled += solution.status is not Status.CONVERGED and (solver.tol > 0 or not solution.status.usable)
            logits = self.logits(self.block.output(solution.value))[0, -1]
            ids = torch.cat([ids, _chosen(logits, temperature, top_k, generator)])
        if unsettled:
            warnings.warn(f"{unsettled} of {tokens} tokens were drawn from states that had not settled to {solver.tol:g} in "
                          f"{solver.max_steps} steps", UnsettledWarning, stacklevel=3)  # of who called through no_grad
        return ids

    def _check_request(self, prompt: Tensor, tokens: int, temperature: float, top_k: int | None) -> None:
        """Raises TypeError or ValueError for what `generate` cannot do."""
        refuse_hooked_wrapper(self.block)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, which takes the likeliest token, got {temperature}; a finite "
                             "number")
        vocab = self.embedding.num_embeddings
        if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= vocab):
            raise ValueError(f"top_k must be one of 1 .. {vocab}, the size of the vocabulary, or None for all, got {top_k!r}")
        if top_k is not None and not temperature:
            raise ValueError(f"temperature 0 takes the likeliest token, so top_k={top_k} would do nothing; leave it out")
        if tokens < 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        if prompt.dim() != 1 or not len(prompt):
            raise ValueError(f"expected a prompt (T,) of at least one token, got {tuple(prompt.shape)}")
        _check_integer("prompt", prompt)
        _check_range("prompt", prompt, vocab)
        for name, value in self.named_parameters():
            if not value.isfinite().all():
                raise ValueError(f"weights are not finite: {name}; nothing can be drawn from them, load an earlier checkpoint")


def _chosen(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """An id (1,) drawn by its logits (V,)."""
    if not temperature:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        highest, kept = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, highest)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


class Classifier(EquilibriumModel):
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
        _check_batch(inputs, "(B, tokens, patch)", 3)
        if inputs.dtype != self.embedding.weight.dtype:
            raise TypeError(f"expected patches of {self.embedding.weight.dtype}, as the weights, got {inputs.dtype}; scale "
                            "them to unit variance and convert them with .to()")
        # a sum is quick and finite wherever the pixels are, unless they are near the end of the type's range
        if not torch.compiler.is_compiling() and not inputs.sum().isfinite():
            broken = (~inputs.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if broken:
                raise ValueError(f"the patches of sample {broken[0]} are not finite ({len(broken)} such samples); leave it out")
        return self.block.drive(self.embedding(inputs) + self.position)

    def logits(self, h: Tensor) -> Tensor:
        return linear(self.readout, normalise(self.norm, h).mean(-2))  # (B, T, C) -> (B, classes)

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(logits, targets)
