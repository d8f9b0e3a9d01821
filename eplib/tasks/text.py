"""Text: a corpus that `pipelines.data` prepares, or a file of your own."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .. import data
from ..codecs import END_OF_STORY
from ..config import configuration
from ..data import BPE_SHARE, DATA, Vocabulary
from .base import EPOCH, Dataset, Task
from .signals import Tokens

if TYPE_CHECKING:
    from ..models import Architecture


@configuration
class Text(Task):
    """A text in tokens; the last `validation` share of it is the validation split.

    corpus: one that `python -m pipelines.data` knows. path: a UTF-8 file of your own instead, seen from the working directory
    or from the repository's folder. sha256: of that file's content, filled in where it is left out, so that a run is named by
    what it read and not read anew once the file has changed. whole: stories, told apart by `codecs.END_OF_STORY`, stay
    whole: the split falls between two of them, so that none is in both parts, and every training window begins with one.
    """

    corpus: Literal["plays", "tinyshakespeare", "tinystories", "tinystories_full"] | None = None
    path: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    tokens: Annotated[str, Field(pattern=f"^({data.TOKENS.pattern})$")] = "chars"
    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    whole: bool = False

    @model_validator(mode="after")
    def _complete(self) -> "Text":
        if (self.corpus is None) == (self.path is None):
            raise ValueError(f"give one of corpus ({', '.join(data.CORPORA)}) and path, a file of your own")
        if self.corpus and self.sha256:
            raise ValueError("sha256 is that of a file at path; a corpus has one, known by its name: leave it out")
        if self.tokens != "chars" and self.validation + BPE_SHARE > 1 + 1e-9:
            raise ValueError(f"{self.tokens} was learned on the first {BPE_SHARE:.0%} of the text, so "
                             f"validation={self.validation} would hold out what it has seen; choose at most "
                             f"{1 - BPE_SHARE:.2g}")
        if self.path and self.sha256 is None:
            object.__setattr__(self, "sha256", data.content_digest(self.path))
        return self

    def fits(self, model: "Architecture") -> None:
        if model.causal is False:
            raise ValueError("block.causal must be true for Text and false for Mnist")
        if model.context is None:
            raise ValueError("model.context is the length of a text sequence: Text needs one, got context=None")

    def load(self, root: Path = DATA, *, batch: int, seed: int = 0, context: int | None = None) -> "TextDataset":
        if context is None:
            raise ValueError("a text is learned in windows; give context, their length in tokens")
        text = data.text(self.corpus, self.tokens, root) if self.corpus else \
            data.own_text(str(self.path), str(self.sha256), self.tokens)
        return TextDataset(text, self.validation, batch, seed, context, self.whole)


class TextDataset(Dataset):
    """Random windows of the training split, consecutive windows of the validation split, which is the last `validation` share:
    `train` and `held_out` are the ids (N,) of the two. whole: as of `Text`."""

    def __init__(self, text: data.Text, validation: float, batch: int, seed: int, context: int, whole: bool = False):
        ids = torch.from_numpy(text.ids)
        cut = int((1 - validation) * len(ids))
        if whole:
            first = _beginnings(ids, text.codec)
            cut = int(first[torch.searchsorted(first, cut).clamp_max(len(first) - 1)])
        self.train, self.held_out = ids[:cut], ids[cut:]
        self.size, self.seed, self.context, self.text = batch, seed, context, text
        for part, name in ((self.train, "training"), (self.held_out, "validation")):
            if len(part) <= context:
                raise ValueError(f"model.context {context} does not fit the {name} split of {len(part)} tokens: a window "
                                 "is one token longer; choose a shorter context or another data.validation")
        if batch > len(self.train) - context:
            raise ValueError(f"batch {batch} exceeds the {len(self.train) - context} windows of the training split")
        self.first = first[first < len(self.train) - context] if whole else None  # where a window may begin; None: anywhere
        self.signal = Tokens(vocab=text.vocab, context=context)
        unseen = (torch.bincount(self.train, minlength=text.vocab) == 0).nonzero().flatten().tolist()
        self.vocabulary = Vocabulary(text.codec, tuple(unseen))

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(EPOCH * self.seed + step)
        count = len(self.train) - self.context if self.first is None else len(self.first)
        starts = torch.randint(count, (self.size,), generator=generator)
        starts = starts if self.first is None else self.first[starts]
        windows = self.train[starts[:, None] + torch.arange(self.context + 1)]  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = (len(self.held_out) - 1) // self.context
        inputs = self.held_out[: count * self.context].view(count, self.context)
        targets = self.held_out[1: count * self.context + 1].view(count, self.context)
        yield from zip(inputs.split(32), targets.split(32), strict=True)

    def baselines(self) -> dict[str, float]:
        counts = torch.bincount(self.train, minlength=self.text.vocab).double() + 1  # the split may hold what training lacks
        targets = torch.cat([part.flatten() for _, part in self.validation()])
        return {"frequencies of single symbols": -(counts / counts.sum()).log()[targets].mean().item(),
                "random guess": math.log(self.text.vocab)}


def _beginnings(ids: Tensor, codec: data.Codec) -> Tensor:
    """Where the stories of a text begin, (N,). Raises ValueError for a text or tokens without an end of story."""
    end = codec.encode(END_OF_STORY) if isinstance(codec, data.Bpe) else []
    found = (ids[:-1] == end[0]).nonzero().flatten() + 1 if len(end) == 1 else ids[:0]
    if not len(found):
        raise ValueError(f"whole stories end with {END_OF_STORY!r} as one token, and this text has none; give tokens bpeN and "
                         "a corpus of stories, or whole: false")
    return torch.cat([found.new_zeros(1), found])
