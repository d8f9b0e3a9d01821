"""Tasks: own text and own images, their split and batches, and what a model is told of them."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from eplib import blocks, diagnostics, estimators, models
from eplib.config import ConfigurationError, configuration, parse, plain
from eplib.tasks import DataError, Dataset, Images, Mnist, Patches, Signal, Task, Text, Tokens
from eplib.trained import load
from eplib.training import RunConfig, Trainer, Transformer, build_model, build_task

WORDS = "".join(f"a tale of {number} foxes and a tall oak.\n" for number in range(60, 200))


@pytest.fixture
def tale(tmp_path, monkeypatch):
    (tmp_path / "tale.txt").write_text(WORDS)
    monkeypatch.chdir(tmp_path)
    return "tale.txt"


def test_own_text_is_known_by_its_content_and_refused_once_that_has_changed(tale):
    task = Text(path=tale)
    assert task.sha256 == hashlib.sha256(WORDS.encode()).hexdigest()
    assert parse(Task, plain(task), "x") == task == parse(Task, {"kind": "Text", "path": tale}, "x")
    data = task.load(batch=3, context=5)
    assert data.vocabulary.decode(torch.cat([data.train, data.held_out]).tolist()) == WORDS
    with open(tale, "a") as file:
        file.write("more")
    with pytest.raises(DataError, match=rf"tale.txt has SHA-256 {Text(path=tale).sha256}.*changed since.*sha256"):
        task.load(batch=3, context=5)
    again = parse(Task, json.loads(json.dumps(plain(task))) | {"path": "gone.txt"}, "x")  # a recorded run is read without it
    with pytest.raises(DataError, match=r"there is no .*gone.txt"):
        again.load(batch=3, context=5)


def test_own_text_in_byte_pairs(tale):
    data = Text(path=tale, tokens="bpe300").load(batch=2, context=4)
    assert data.signal == Tokens(vocab=300, context=4)
    assert data.vocabulary.decode(torch.cat([data.train, data.held_out]).tolist()) == WORDS
    with pytest.raises(DataError, match="yields only"):
        Text(path=tale, tokens="bpe4096").load(batch=2, context=4)


def test_whole_stories_are_in_one_split_and_begin_every_window(tmp_path):
    stories = [f"A tale of {number} foxes and a tall oak." for number in range(60, 200)]
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(stories) + "<|endoftext|>")
    task = Text(path=str(tmp_path / "stories.txt"), tokens="bpe300", whole=True)
    data = task.load(batch=64, context=8)
    train, held_out = (data.vocabulary.decode(part.tolist()).split("<|endoftext|>") for part in (data.train, data.held_out))
    assert train[:-1] + held_out[:-1] == stories and train[-1] == held_out[-1] == "" and 4 < len(held_out) < 16
    inputs, targets = data.batch(0)
    assert all(data.vocabulary.decode(window.tolist()).startswith("A") for window in inputs)
    assert len(inputs.unique(dim=0)) > 20 and torch.equal(inputs[:, 1:], targets[:, :-1])
    with pytest.raises(ValueError, match="this text has none"):
        replace(task, tokens="chars").load(batch=2, context=4)


@pytest.mark.parametrize("values, says", [
    ({}, "give one of corpus"), ({"corpus": "plays", "path": "tale.txt"}, "give one of corpus"),
    ({"path": "gone.txt"}, r"there is no .*gone.txt"), ({"corpus": "plays", "sha256": "0" * 64}, "leave it out"),
    ({"path": "tale.txt", "tokens": "words"}, "tokens"), ({"path": "tale.txt", "tokens": "bpe300", "validation": 0.2}, "0.1"),
])
def test_a_text_that_cannot_be_is_refused_when_it_is_configured(tale, values, says):
    with pytest.raises(ConfigurationError, match=says):
        parse(Task, {"kind": "Text"} | values, "x")


def test_baselines_of_a_text_are_over_what_the_losses_are_over(tale):
    data = Text(path=tale).load(batch=2, context=7)
    cut = int(0.9 * len(WORDS))
    counted, symbols = Counter(WORDS[:cut]), set(WORDS)
    whole = (len(WORDS[cut:]) - 1) // 7 * 7
    losses = [-np.log((counted[one] + 1) / (cut + len(symbols))) for one in WORDS[cut + 1:cut + 1 + whole]]
    assert data.baselines() == pytest.approx({"random guess": np.log(len(symbols)),
                                              "frequencies of single symbols": np.mean(losses)})


@pytest.fixture
def pictures(tmp_path):
    """Thirty coloured images of 4 x 6 pixels in three classes, as arrays, as a file and as a folder."""
    generator = np.random.default_rng(0)
    y = np.arange(30) % 3
    x = generator.integers(0, 256, (30, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", x=x, y=y)
    for index in range(30):
        folder = tmp_path / "own" / f"class{y[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[index]).save(folder / f"{index:02}.png")
    return x, y, tmp_path


def test_own_images_are_held_out_alike_for_all_seeds_and_cut_into_patches(pictures):
    x, y, folder = pictures
    first, other = (Images(path=str(folder / "own.npz"), patch=2, validation=0.2).load(batch=4, seed=seed) for seed in (0, 1))
    assert first.signal == Patches(tokens=6, size=12, classes=3, channels=3)
    assert torch.equal(first.test[0], other.test[0]) and len(first.test[1]) == 6 and len(first.train[1]) == 24
    assert not torch.equal(first.batch(0)[0], other.batch(0)[0]) and torch.equal(first.batch(7)[0], first.batch(7)[0])
    assert abs(first.train[0].mean()) < 1e-5 and first.train[0].std().item() == pytest.approx(1, abs=1e-5)
    flat = {row.tobytes(): label for row, label in zip(x.reshape(30, -1), y, strict=True)}
    inside = torch.cat([first.train[0], first.test[0]])  # each patch by hand, of the standardised image it came from
    low, high = inside.min(), inside.max()
    pixels = ((inside - low) / (high - low) * (int(x.max()) - int(x.min())) + int(x.min())).round().to(torch.uint8)
    for one, label in zip(pixels, torch.cat([first.train[1], first.test[1]]), strict=True):
        image = np.zeros((4, 6, 3), np.uint8)
        for token in range(6):
            row, column = divmod(token, 3)
            image[2 * row:2 * row + 2, 2 * column:2 * column + 2] = one[token].reshape(2, 2, 3)
        assert flat.pop(image.tobytes()) == label
    assert not flat  # every image once


def test_a_folder_of_class_folders_holds_the_same_images(pictures):
    *_, folder = pictures
    file, named = (Images(path=str(folder / name), patch=2).load(batch=4) for name in ("own.npz", "own"))
    assert named.signal == file.signal and len(named.train[1]) == len(file.train[1])
    whole = [sorted((label.item(), *image.sum((0, 1)).ravel().tolist()) for part in (data.train, data.test)
                    for image, label in zip(*part, strict=True)) for data in (file, named)]
    assert [label for label, _ in whole[0]] == [label for label, _ in whole[1]]
    (folder / "own" / "class0" / "00.png").unlink()
    with pytest.raises(DataError, match="changed since"):
        Images(path=str(folder / "own"), sha256=Images(path=str(folder / "own.npz")).sha256, patch=2).load(batch=4)


def test_images_that_cannot_be_are_refused(pictures):
    x, y, folder = pictures
    np.savez(folder / "nameless.npz", images=x)
    np.savez(folder / "flat.npz", x=x.reshape(30, -1), y=y)
    (folder / "text.npz").write_text("no file")
    for name, says in (("nameless", "with x and y"), ("flat", r"x is to be images"), ("text", "with x and y")):
        with pytest.raises(DataError, match=says):
            Images(path=str(folder / f"{name}.npz"), patch=2).load(batch=4)
    named = Images(path=str(folder / "own"), patch=2)
    for end in (".png", ".PNG"):
        place = folder / "own" / "class0" / f"more{end}"
        Image.fromarray(x[0]).convert("P").save(place)
        with pytest.raises(DataError, match=rf"more{end} has a palette \(mode P\); convert"):
            replace(named, sha256=None).load(batch=4)
        place.unlink()
    with pytest.raises(ValueError, match=r"4 x 6 pixels have no patches of 5 x 5"):
        Images(path=str(folder / "own.npz"), patch=5).load(batch=4)
    with pytest.raises(ValueError, match="batch 28 exceeds the 27 training images"):
        Images(path=str(folder / "own.npz"), patch=2).load(batch=28)


def test_a_model_is_built_again_from_what_its_task_said(pictures):
    """Without the data: weights, shapes and names are those of the run's own model."""
    config = RunConfig(experiment="x", arm="a", data=Images(path=str(pictures[2] / "own.npz"), patch=2), batch=4, steps=1,
                       model=Transformer(width=8, heads=2, block=blocks.Thick(causal=False)), estimator=estimators.DyadicEP())
    signal = build_task(config).signal
    again = parse(Signal, json.loads(json.dumps(plain(signal))), "x")
    ours, theirs = (build_model(config, one).state_dict() for one in (signal, again))
    assert again == signal and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(TypeError, match="takes Tokens or Patches, and the task gives Vectors"):
        build_model(config, Vectors(size=3))


def test_a_task_and_a_model_that_do_not_fit_are_refused(tale):
    text, image = Transformer(context=4, block=blocks.Thick()), Transformer(block=blocks.Thick(causal=False))
    Text(path=tale).fits(text)
    Mnist().fits(image)
    for task, model, says in ((Text(path=tale), image, "causal must be true for Text"), (Mnist(), text, "false for Mnist"),
                              (Text(path=tale), replace(text, context=None), "Text needs one, got context=None"),
                              (Mnist(), replace(image, context=4), "context=4 would do nothing")):
        with pytest.raises(ValueError, match=says):
            task.fits(model)


@configuration
class Vectors(Signal):
    size: int


@configuration
class Rule(Task):
    """Targets that a fixed linear rule gives."""

    size: int = 3

    def load(self, root=None, *, batch, seed=0, context=None):
        return Samples(self.size, batch, seed)


class Samples(Dataset):
    def __init__(self, size, batch, seed):
        self.signal, self.shape, self.seed = Vectors(size=size), (batch, size), seed

    def batch(self, step):
        inputs = torch.randn(self.shape, generator=torch.Generator().manual_seed(1000 * self.seed + step))
        return inputs, 0.5 * inputs.flip(-1)

    def validation(self):
        yield from map(self.batch, range(10_000, 10_003))


@configuration
class Tied(models.Architecture):
    """A readout by the embedding's own weights."""

    context: int | None = 4
    causal: bool | None = True

    def build(self, signal):
        return TiedModel(signal.vocab)


class TiedModel(models.Model):
    def __init__(self, vocab):
        super().__init__()
        self.embedding, self.readout = torch.nn.Embedding(vocab, 4), torch.nn.Linear(4, vocab, bias=False)
        self.readout.weight = self.embedding.weight
        self.block = Leaky()

    def clamp(self, inputs):
        return self.embedding(inputs)

    def predict(self, h):
        return self.readout(h)

    def loss_of(self, predictions, targets):
        return models.cross_entropy(predictions, targets)


class Leaky(blocks.Dynamical):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(4, 4)

    def forward(self, z, x):
        return x - z + 0.3 * torch.tanh(self.mix(z))


def test_tied_weights_are_saved_and_what_is_no_language_model_is_not_asked_for_text(tale, tmp_path):
    config = RunConfig(experiment="x", arm="a", data=Text(path=tale), model=Tied(), batch=2, steps=2, evaluate_every=2,
                       estimator=estimators.DyadicEP())
    trainer = Trainer(config, tmp_path / "run")
    trainer.advance(show=lambda _: None)
    again, path = Trainer(config, tmp_path / "run").model, trainer.weights(2)
    assert torch.equal(again.embedding.weight, trainer.model.embedding.weight)
    assert again.readout.weight is again.embedding.weight
    found = load(path)
    assert torch.equal(found.model.readout.weight, trainer.model.readout.weight)
    with pytest.raises(ValueError, match="TiedModel has no method generate"):
        found.generate("a tale", 1)


@configuration
class Linear(models.Architecture):
    def build(self, signal):
        size = signal.size
        return Regression(-torch.eye(size) + 0.1 * torch.randn(size, size), torch.randn(size, size))


class Regression(diagnostics.LinearSystem):
    def counted(self, targets):
        return torch.ones(len(targets))

    def correct(self, predictions, targets):
        return (predictions - targets).square().sum(-1) < 1e-2


def test_a_task_and_a_model_of_your_own_are_trained_by_what_the_interfaces_say(tmp_path):
    """No class ids, no tokens, no layer norm, states (B, n): nothing outside asks for them."""
    values = {"experiment": "x", "arm": "a", "data": {"kind": "Rule"}, "model": {"kind": "Linear"}, "batch": 16, "steps": 16,
              "estimator": {"kind": "AsymEP", "beta": 0.05}, "evaluate_every": 8, "audit_every": 8,
              "solver": {"kind": "Relaxation", "step": 0.5, "max_steps": 60, "tol": 1e-5},
              "optimiser": {"lr": 0.1, "ema": 0.5}, "gate": 0.1}
    config = parse(RunConfig, values, "x")
    assert config.data == Rule() and config.model == Linear() and parse(RunConfig, plain(config), "again") == config
    progress = Trainer(config, tmp_path).advance(show=lambda _: None)
    before, after = progress.rows[0], progress.curve[-1]
    assert after["loss"] < 0.1 * before["loss"] and after["settled"] == 1 and progress.rows[7]["audit_cosine"] > 0.999
    frozen = Trainer(replace(config, frozen=True, gate=None, audit_every=None), tmp_path / "frozen").model
    assert not any(parameter.requires_grad for parameter in frozen.parameters())  # it has no readout
