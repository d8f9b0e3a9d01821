"""Reading the data sets: MNIST and tokenised text, as NumPy arrays, each file checked against its SHA-256.

Getting and preparing them is the job of `python -m pipelines.data`; this module only reads, and needs NumPy alone
(`tokenizers` for `encode` and `decode` of BPE text).
"""

import functools
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


class DataError(Exception):
    """Data is missing or damaged; the message names the file and says what to do."""


@dataclass(frozen=True)
class RawFile:
    """A file known by its size and the SHA-256 of its decompressed content."""

    name: str
    size: int
    sha256: str


MNIST_FILES = {
    "train_images": RawFile("train-images-idx3-ubyte", 47_040_016,
                            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train_labels": RawFile("train-labels-idx1-ubyte", 60_008,
                            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "test_images": RawFile("t10k-images-idx3-ubyte", 7_840_016,
                           "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "test_labels": RawFile("t10k-labels-idx1-ubyte", 10_008,
                           "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
CORPORA = {
    "plays": RawFile("plays.txt", 4_845_497, "bc4da7121d6636d829a26203694403ab3e7c8ede88bf12218298d02633731cc2"),
    "tinyshakespeare": RawFile("tinyshakespeare.txt", 1_115_394,
                               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "tinystories": RawFile("tinystories_4726.txt", 3_873_128,
                           "b1171eda41ce078b8f7c7bc7162d8ddfec429f8d72ae454d48905bfe688c16a6"),
}
DATA = Path(__file__).resolve().parent.parent / "data"  # wherever a notebook or a command is started
TOKENS = re.compile(r"chars|bpe([1-9][0-9]*)")
BPE_SHARE = 0.9  # of a text, from its start, from which byte pairs are learned: a run holds out at most what comes after it


@dataclass(frozen=True)
class Mnist:
    """MNIST as stored: images uint8 (N, 28, 28) with 0 for background, labels uint8 (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Text:
    """A tokenised corpus: its ids in order, int64 (N,), and its vocabulary. What of it is held out is a run's own choice
    (`training.TextTask`)."""

    corpus: str
    tokens: str
    ids: np.ndarray
    vocab: int
    codec: "Chars | Bpe"

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; raises DataError on a character that the vocabulary lacks."""
        return self.codec.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self.codec.decode(ids)


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


def check(content: bytes, file: RawFile) -> str | None:
    """Return what is wrong with the content of a file, or None if its size and SHA-256 are right."""
    if len(content) != file.size:
        return f"has {len(content):,} bytes, expected {file.size:,}"
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        return f"has SHA-256 {found}, expected {file.sha256}"
    return None


def mnist(root: str | Path = DATA) -> Mnist:
    """Return MNIST from `<root>/raw/mnist`; raises DataError if a file is missing or damaged."""
    arrays = {}
    for part, file in MNIST_FILES.items():
        content = _read(Path(root) / "raw" / "mnist" / file.name, root, "mnist")
        problem = check(content, file)
        if problem:
            raise _damaged(Path(root) / "raw" / "mnist" / file.name, problem, root, "mnist")
        arrays[part] = _idx(content)
    return Mnist(**arrays)


def text(corpus: str, tokens: str, root: str | Path = DATA) -> Text:
    """Return the corpus in `<root>/prepared/<corpus>-<tokens>`; raises DataError if missing, damaged or outdated."""
    if corpus not in CORPORA:
        raise DataError(f"unknown corpus {corpus!r}; allowed: {', '.join(CORPORA)}")
    if not TOKENS.fullmatch(tokens):
        raise DataError(f"unknown tokens {tokens!r}; allowed: chars, or bpeN with N tokens, for instance bpe1024")
    name = f"{corpus}-{tokens}"
    folder = Path(root) / "prepared" / name
    vocabulary, ids_file = _read(folder / "vocab.json", root, name), _read(folder / "ids.npy", root, name)
    try:
        meta = json.loads(vocabulary)
        codec = Chars(tuple(meta["symbols"])) if meta["kind"] == "chars" else Bpe(json.dumps(meta["tokenizer"]))
        source, digest = meta["source_sha256"], meta["ids_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"is not a vocabulary ({type(error).__name__}: {error})"
        raise _damaged(folder / "vocab.json", problem, root, name) from error
    if source != CORPORA[corpus].sha256:
        raise _damaged(folder, f"was made from another version of {corpus}", root, name)
    if hashlib.sha256(ids_file).hexdigest() != digest:
        raise _damaged(folder / "ids.npy", "does not belong to the vocab.json beside it", root, name)
    ids = np.load(io.BytesIO(ids_file), allow_pickle=False).astype(np.int64)
    return Text(corpus, tokens, ids, codec.vocab, codec)


def _idx(content: bytes) -> np.ndarray:
    """Return the array in an IDX file of bytes: magic 0, 0, 8, rank; big-endian int32 sizes; data."""
    rank = content[3]
    shape = np.frombuffer(content, ">i4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _read(path: Path, root: str | Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path.resolve()} ({error.strerror}). {_remedy(root, name)}") from error


def _damaged(path: Path, problem: str, root: str | Path, name: str) -> DataError:
    return DataError(f"{path.resolve()} {problem}. {_remedy(root, name)}")


def _remedy(root: str | Path, name: str) -> str:
    place = "" if Path(root) == DATA else f"--root {root} "
    return f"Get it with: python -m pipelines.data {place}{name}"
