"""Reading the data sets: MNIST, tokenised text and files of your own, as NumPy arrays, each file checked against its SHA-256.

Getting and preparing the known ones is the job of `python -m pipelines.data`. Needs no torch.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .codecs import BPE_SHARE, TOKENS, Bpe, Chars, Codec, DataError, Vocabulary, learned, restored
from .files import ROOT

__all__ = ["BPE_SHARE", "CORPORA", "DATA", "MNIST_FILES", "TOKENS", "Bpe", "Chars", "DataError", "Mnist", "RawFile", "Text",
           "Vocabulary", "check", "content_digest", "files_in", "located", "mnist", "own_text", "text", "tokenised",
           "unchanged"]


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
    "tinystories_full": RawFile("TinyStoriesV2-GPT4-train.txt", 2_227_753_162,
                                "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443"),
}
DATA = ROOT / "data"
LINES = 200_000  # of a text that are encoded at a time: a list of all ids of a large one does not fit into memory


@dataclass(frozen=True)
class Mnist:
    """MNIST as stored: images uint8 (N, 28, 28) with 0 for background, labels uint8 (N,)."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@dataclass(frozen=True)
class Text:
    """A tokenised text: its ids in order, int64 (N,), and what makes a text of ids. What of it is held out is a task's own
    choice."""

    ids: np.ndarray
    codec: Codec

    @property
    def vocab(self) -> int:
        return self.codec.vocab


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
        codec, source, digest = restored(meta), meta["source_sha256"], meta["ids_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"is not a vocabulary ({type(error).__name__}: {error})"
        raise _damaged(folder / "vocab.json", problem, root, name) from error
    if source != CORPORA[corpus].sha256:
        raise _damaged(folder, f"was made from another version of {corpus}", root, name)
    if hashlib.sha256(ids_file).hexdigest() != digest:
        raise _damaged(folder / "ids.npy", "does not belong to the vocab.json beside it", root, name)
    return Text(np.load(io.BytesIO(ids_file), allow_pickle=False).astype(np.int64), codec)


def tokenised(source: str, sha256: str, tokens: str) -> tuple[dict[str, bytes], str]:
    """The files of a token set, {name: content}, of a text and its digest; and what they hold, in words."""
    codec, lines, buffer = learned(source, tokens), source.splitlines(keepends=True), io.BytesIO()
    ids = np.concatenate([np.array(codec.encode("".join(lines[at:at + LINES])), dtype=np.uint16)
                          for at in range(0, max(1, len(lines)), LINES)])
    np.save(buffer, ids, allow_pickle=False)
    meta = codec.to_json() | {"source_sha256": sha256, "ids_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    return {"ids.npy": buffer.getvalue(), "vocab.json": (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode()}, \
        f"{len(ids):,} tokens, vocabulary {codec.vocab}"


def own_text(path: str, sha256: str, tokens: str) -> Text:
    """Return a text of your own, UTF-8. Raises DataError if it is not there, or not what it was (`content_digest`)."""
    unchanged(path, sha256)
    try:
        source = located(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    codec = _learned_once(source, tokens)
    return Text(np.array(codec.encode(source), dtype=np.int64), codec)


_learned_once = cache(learned)  # byte pairs of a text take seconds, and several runs of a process read it


def located(path: str) -> Path:
    """Where a file or folder of your own is: seen from the working directory, or from the repository's folder. Raises DataError
    if it is at neither."""
    places = list(dict.fromkeys((base / Path(path).expanduser()).resolve() for base in (Path.cwd(), ROOT)))
    for place in places:
        if place.exists():
            return place
    raise DataError(f"there is no {' or '.join(map(str, places))}; give a path seen from the working directory or from the "
                    "repository's folder")


def files_in(place: Path, suffix: str) -> list[Path]:
    """A file itself, or all files of a suffix, in small letters or capitals, in a folder, sorted."""
    return sorted(one for one in place.rglob("*") if one.name.lower().endswith(suffix)) if place.is_dir() else [place]


def content_digest(path: str, suffix: str = "") -> str:
    """SHA-256 of a file's content, or of the names and contents of a folder's files of a suffix. Raises DataError if there is
    nothing."""
    place = located(path)
    found = tuple((one, one.stat().st_mtime_ns, one.stat().st_size) for one in files_in(place, suffix))
    if not found:
        raise DataError(f"{place} holds no {suffix} file")
    return _content_digest(place, found)


@cache
def _content_digest(place: Path, found: tuple[tuple[Path, int, int], ...]) -> str:
    if not place.is_dir():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    listed = [f"{one.relative_to(place).as_posix()} {hashlib.sha256(one.read_bytes()).hexdigest()}" for one, *_ in found]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def unchanged(path: str, sha256: str, suffix: str = "") -> None:
    """Raises DataError unless files of your own are what they were."""
    if (found := content_digest(path, suffix)) != sha256:
        raise DataError(f"{path} has SHA-256 {found} and the run was configured with {sha256}: it has changed since. Put it "
                        "back as it was, or leave sha256 out, for a run on what it holds now")


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
