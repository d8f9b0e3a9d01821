"""The loss of class ids and tokens, and what a model may be given: checked where that costs nothing.

Ids out of range are found by the look-ups themselves and named here. On a GPU these end with a device-side assertion, as
elsewhere in PyTorch; nothing here waits for it.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

IGNORED = -100  # a target that does not count, PyTorch's own default
NEVER = torch.iinfo(torch.long).min  # for `ignore_index`, where every target counts


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int = NEVER) -> Tensor:
    """-log softmax(logits)[target], (..., V), (...) -> (...); for complex logits its holomorphic extension. Zero where a
    target is `ignored`. Raises TypeError or ValueError for targets of another type or shape, or out of range."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"logits {tuple(logits.shape)} need targets {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}; "
                         "block.output is to give (B, T, C)")
    check_integer("targets", targets)
    targets = targets.long()
    try:
        if not logits.is_complex():
            return functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none",
                                            ignore_index=ignored).view(targets.shape)
        raised, left_out = logits - logits.real.amax(-1, keepdim=True).detach(), targets == ignored
        chosen = raised.gather(-1, targets.masked_fill(left_out, 0).unsqueeze(-1)).squeeze(-1)
        return torch.where(left_out, 0, raised.exp().sum(-1).log() - chosen)
    except (IndexError, RuntimeError):
        check_range("target", targets, logits.shape[-1], ignored)
        raise


def check_integer(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.long, torch.int, torch.uint8):
        raise TypeError(f"{name} must be ids, int64 (or int32, uint8), got {ids.dtype}; convert them with .long()")


def check_range(name: str, ids: Tensor, count: int, ignored: int = NEVER) -> None:
    """Raises ValueError that names the first id outside 0 .. count - 1."""
    wrong = ((ids < 0) | (ids >= count)) & (ids != ignored)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        padding = f"; {IGNORED} marks a target that does not count" if ignored == IGNORED else \
            f"; {IGNORED} has no meaning here, leave the sample out" if int(ids[place]) == IGNORED else ""
        raise ValueError(f"{name} {int(ids[place])} at {place} is not one of the {count} ids 0 .. {count - 1}{padding}")


def check_batch(inputs: Tensor, shape: str, dims: int) -> None:
    if inputs.dim() != dims or 0 in inputs.shape:
        raise ValueError(f"expected inputs {shape} with at least one sample and one token, got {tuple(inputs.shape)}")
