"""Text as token ids and back: characters, or byte pairs learned from the text itself.

Needs neither torch nor NumPy (`tokenizers` to learn, encode and decode byte pairs).
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TOKENS = re.compile(r"chars|bpe([1-9][0-9]*)")
BPE_SHARE = 0.9  # of a text, from its start, from which byte pairs are learned: a run holds out at most what comes after it
END_OF_STORY = "<|endoftext|>"
SMALLEST_BPE, LARGEST_VOCAB = 300, 2**16  # 256 bytes, special tokens and some merges; ids are uint16


class DataError(ValueError):
    """Data is missing or damaged; the message names the file and says what to do."""


@dataclass(frozen=True)
class Chars:
    """One token per character; the id is the position in `symbols`."""

    symbols: tuple[str, ...]

    @property
    def vocab(self) -> int:
        return len(self.symbols)

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> list[int]:
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:
            raise DataError(f"cannot encode {''.join(unknown)!r}: the vocabulary has only {''.join(self.symbols)!r}")
        return [self.ids[symbol] for symbol in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[int(i)] for i in ids)

    def to_json(self) -> dict:
        return {"kind": "chars", "symbols": list(self.symbols)}


@dataclass(frozen=True)
class Bpe:
    """Byte-level BPE, kept as the JSON text of the `tokenizers` library."""

    tokenizer: str

    @functools.cached_property
    def vocab(self) -> int:
        model = json.loads(self.tokenizer)
        return len(set(model["model"]["vocab"]) | {token["content"] for token in model["added_tokens"]})

    @functools.cached_property
    def library(self) -> Any:
        from tokenizers import Tokenizer  # here, because training on prepared ids needs no tokenizers

        return Tokenizer.from_str(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        lines = self.library.encode_batch(text.splitlines(keepends=True))  # in parallel; tokens do not cross lines
        return [i for line in lines for i in line.ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def to_json(self) -> dict:
        return {"kind": "bpe", "tokenizer": json.loads(self.tokenizer)}


Codec = Chars | Bpe


def restored(meta: dict) -> Codec:
    """The codec that `to_json` described."""
    return Chars(tuple(meta["symbols"])) if meta["kind"] == "chars" else Bpe(json.dumps(meta["tokenizer"]))


def learned(text: str, tokens: str) -> Codec:
    """The codec of a text: "chars", or "bpeN" with N tokens. Raises DataError if the text does not yield as many."""
    return Chars(tuple(sorted(set(text)))) if tokens == "chars" else train_bpe(text, int(tokens.removeprefix("bpe")))


def train_bpe(source: str, size: int) -> Bpe:
    """Return byte-level BPE of `size` tokens, learned from the first `BPE_SHARE` of a text; `<|endoftext|>` is one if it
    occurs."""
    if not SMALLEST_BPE <= size <= LARGEST_VOCAB:
        raise DataError(f"bpe{size}: the number of tokens must lie between {SMALLEST_BPE} and {LARGEST_VOCAB}")
    # here, because fetching needs no tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END_OF_STORY] if END_OF_STORY in source else []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(source[:int(BPE_SHARE * len(source))].splitlines(keepends=True), trainer)
    codec = Bpe(tokenizer.to_str())
    if codec.vocab != size:
        raise DataError(f"bpe{size}: this text yields only {codec.vocab} tokens; ask for fewer")
    return codec


@dataclass(frozen=True)
class Vocabulary:
    """What a model of a text reads and writes: a codec, of whose ids the model has learned nothing of those `unseen`."""

    codec: Codec
    unseen: tuple[int, ...] = ()

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt. Raises DataError for what the codec lacks, or the training split: a model has learned nothing of
        it."""
        ids = self.codec.encode(prompt)
        if strange := sorted(set(ids) & set(self.unseen)):
            raise DataError(f"the training split never has {self.decode(strange)!r}, so that the model knows nothing of it; "
                            "choose a prompt without it, or a smaller data.validation")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.codec.decode(ids)

    def to_json(self) -> dict:
        return {"codec": self.codec.to_json(), "unseen": list(self.unseen)}

    @classmethod
    def from_json(cls, value: dict) -> "Vocabulary":
        return cls(restored(value["codec"]), tuple(value["unseen"]))
