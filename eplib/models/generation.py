"""Text drawn from a language model, token by token."""

import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..intact import refuse_hooked_wrapper
from ..solvers import Solver, Status
from .losses import check_integer, check_range


class UnsettledWarning(UserWarning):
    """Tokens were drawn from states that had not settled."""


@torch.no_grad()
def generate(model: Any, prompt: Tensor, tokens: int, solver: Solver, temperature: float,
             generator: torch.Generator | None, top_k: int | None) -> Tensor:
    """Samples `tokens` ids after `prompt` (T,) from a language model; returns (T + tokens,).

    Each is drawn from softmax(logits / temperature), of the `top_k` likeliest where that is given; temperature 0 is greedy,
    the likeliest each time.

    In a causal block the states of the past do not depend on what follows, so each step settles the new token alone, under
    the keys and values of those before it: exactly the state it has in the whole sequence. A window that has reached
    `context` tokens goes on with its last half, whose positions move, so that it is settled anew. Blocks without such a
    past settle the window for every token. Warns (`UnsettledWarning`) with the number of tokens that were drawn from states
    that had not settled. Raises TypeError or ValueError for a prompt that is empty or not of the vocabulary, for a `top_k`
    that is not of it or would do nothing, and for weights that are not finite.
    """
    _check_request(model, prompt, tokens, temperature, top_k)
    ids, first, settled, past, unsettled = prompt.long(), max(0, len(prompt) - model.context), 0, None, 0
    for _ in range(tokens):
        if len(ids) - first > model.context:
            first, past = len(ids) - model.context // 2, None
        if past is None:
            settled, past = first, model.block.prefix()
        x = model.clamp(ids[None, first:])[..., settled - first:, :]
        if past is None:
            solution = solver.settle(model.block, x)
        else:
            solution = solver.solve(partial(past.force, x=x), model.block.start(x))
            past.extend(solution.value)
            settled = len(ids)
        # without a tolerance the horizon is what was asked for
        unsettled += solution.status is not Status.CONVERGED and (solver.tol > 0 or not solution.status.usable)
        logits = model.predict(model.block.output(solution.value))[0, -1]
        ids = torch.cat([ids, _chosen(logits, temperature, top_k, generator)])
    if unsettled:
        warnings.warn(f"{unsettled} of {tokens} tokens were drawn from states that had not settled to {solver.tol:g} in "
                      f"{solver.max_steps} steps", UnsettledWarning, stacklevel=4)  # of who called through no_grad
    return ids


def _check_request(model: Any, prompt: Tensor, tokens: int, temperature: float, top_k: int | None) -> None:
    """Raises TypeError or ValueError for what `generate` cannot do."""
    refuse_hooked_wrapper(model.block)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0, which takes the likeliest token, got {temperature}; a finite "
                         "number")
    vocab = model.embedding.num_embeddings
    if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= vocab):
        raise ValueError(f"top_k must be one of 1 .. {vocab}, the size of the vocabulary, or None for all, got {top_k!r}")
    if top_k is not None and not temperature:
        raise ValueError(f"temperature 0 takes the likeliest token, so top_k={top_k} would do nothing; leave it out")
    if tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    if prompt.dim() != 1 or not len(prompt):
        raise ValueError(f"expected a prompt (T,) of at least one token, got {tuple(prompt.shape)}")
    check_integer("prompt", prompt)
    check_range("prompt", prompt, vocab)
    for name, value in model.named_parameters():
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
