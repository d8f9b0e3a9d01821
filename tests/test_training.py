"""Training runs: what a step does, what it logs, and that an interrupted run ends as if it had not been."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eplib.data
import systems  # noqa: F401  (one thread)
from eplib import blocks, diagnostics, estimators, training
from eplib.controllers import ContractionRate, Homeostasis, Integral, JacobianNorm, LeadingMode, ResidualDriven
from eplib.data import RawFile
from eplib.solvers import FixedHorizon, MixedPrecision, Relaxation, norm
from eplib.starts import LinearStart
from eplib.store.records import Store
from eplib.store.summary import summarise
from eplib.training import (
    Mnist,
    Optimiser,
    OutOfTime,
    RunConfig,
    Text,
    Trainer,
    Transformer,
    build_model,
    build_task,
    evaluate,
    fastest_backend,
)
from eplib.updates import clipped
from pipelines import data as preparing

REAL_MNIST = eplib.data.mnist
REPOSITORY = Path(__file__).resolve().parent.parent
BASE = {"experiment": "tiny", "arm": "ep", "data": Text(corpus="tinystories", validation=0.02),
        "model": Transformer(width=8, heads=2, context=8, block=blocks.Thick()),
        "estimator": estimators.DyadicEP(steps=4), "solver": Relaxation(step=0.8, max_steps=6, tol=1e-3),
        "penalties": (ContractionRate(target=0.2),),
        "optimiser": Optimiser(lr=1e-2), "steps": 6, "batch": 4, "evaluate_every": 2, "evaluation_batches": 1,
        "keep": (2,)}
IMAGES = {"data": Mnist(patch=14), "model": Transformer(width=8, heads=2, block=blocks.Thick(causal=False))}
BACKPROP = {"arm": "backprop", "model": Transformer(width=8, heads=2, context=8, block=blocks.Feedforward()),
            "estimator": estimators.Backprop(), "penalties": ()}


def config(**changes) -> RunConfig:
    return RunConfig(**BASE | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A data folder in which 20,000 characters of the plays, prepared by the real data stage, stand in for TinyStories,
    and 40 random images for MNIST."""
    root = tmp_path_factory.mktemp("data")
    content = preparing.corpus_text("plays", root)[:20_000].encode()
    file = RawFile("excerpt.txt", len(content), hashlib.sha256(content).hexdigest())
    noise = np.random.default_rng(0)
    images = eplib.data.Mnist(*(part.astype(np.uint8) for part in (
        noise.integers(0, 256, (40, 28, 28)), noise.integers(0, 10, 40), noise.integers(0, 256, (24, 28, 28)),
        noise.integers(0, 10, 24))))
    (root / "raw").mkdir()
    (root / "raw" / file.name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(eplib.data.CORPORA, "tinystories", file)
        patch.setattr(eplib.data, "mnist", lambda root: images)
        preparing.prepare("tinystories", "chars", root)
        yield root


def make_root(folder: Path, corpus: Path, profile: str = "runs: {}", stale: str = "retrain") -> Path:
    """A repository root with profile x and the data."""
    (folder / "pipelines" / "profiles").mkdir(parents=True)
    (folder / "pipelines" / "profiles" / "x.yaml").write_text(f"profile: x\nstale: {stale}\n{profile}\n")
    (folder / "data").symlink_to(corpus)
    return folder


@pytest.fixture
def root(tmp_path, corpus):
    return make_root(tmp_path / "root", corpus)


def outcome(root: Path) -> dict[str, bytes]:
    """Every result and weight of profile x by path, times left out."""
    results = root / "results" / "x"
    return {str(path.relative_to(results)): path.read_bytes() for path in sorted(results.rglob("*"))
            if path.is_file() and "machine" not in path.relative_to(results).parts}


def sessions(root: Path) -> int:
    [path] = (root / "results" / "x" / "machine" / "runs").rglob("machine.json")
    return json.loads(path.read_text())["sessions"]


# --- interruption

class Clock(SimpleNamespace):
    """A clock on which every training step takes one second and nothing else takes time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        self.now += 0.5
        return self.now


@pytest.mark.parametrize("changes", [{}, {"optimiser": Optimiser(lr=1e-2, ema=0.9, weight_decay=0.1)},
                                     IMAGES | {"optimiser": Optimiser(lr=1e-2, ema=0.9)}, BACKPROP,
                                     {"estimator": estimators.AsymEP(steps=4, nudging="random-sign")},
                                     {"estimator": estimators.FeedbackAlignment()},
                                     {"penalties": (JacobianNorm(driven=ResidualDriven()), Homeostasis())}],
                         ids=["text", "text-ema", "images-ema", "backprop", "random-signs", "feedback-matrix", "penalties"])
def test_a_run_out_of_time_goes_on_bit_identical(changes, corpus, tmp_path, monkeypatch):
    run = config(**changes)
    whole, pieces = (make_root(tmp_path / name, corpus) for name in ("whole", "pieces"))
    Store("x", whole).run(run)
    monkeypatch.setattr(training, "time", Clock())
    for deadline in (1.5, 4.5):
        with pytest.raises(OutOfTime, match=f"stopped at step {math.ceil(deadline)} of 6"):
            Store("x", pieces).run(run, deadline)
        assert outcome(pieces) == {} and Store("x", pieces).find(run) is None
    Store("x", pieces).run(run)
    assert sessions(pieces) == 3 and sessions(whole) == 1
    assert outcome(pieces) == outcome(whole)
    assert {Path(name).name for name in outcome(whole)} == {
        "log.csv.gz", "curve.csv", "metrics.json", "config.json", "provenance.json", "step-000002.safetensors",
        "step-000006.safetensors"}
    assert {path.parents[2].name for path in (pieces / "checkpoints").rglob("*.safetensors")} == {"states"}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_died_in_a_step_goes_on_from_its_checkpoint(ema, corpus, tmp_path, monkeypatch):
    run = config(optimiser=Optimiser(lr=1e-2, ema=ema))
    whole, broken = (make_root(tmp_path / name, corpus) for name in ("whole", "broken"))
    Store("x", whole).run(run)
    step = Trainer._step

    def dies(trainer):
        step(trainer)
        if trainer.progress.step == 4:
            raise MemoryError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
        patch.setattr(Trainer, "_step", dies)
        with pytest.raises(MemoryError):
            Store("x", broken).run(run)
    [checkpoint] = (broken / "checkpoints").rglob("checkpoint.safetensors")
    assert Trainer(run, checkpoint.parent, broken / "data").progress.step == 3
    Store("x", broken).run(run)
    assert outcome(broken) == outcome(whole)


SCRIPT = """
import sys
import eplib.data, eplib.training
eplib.training.CHECKPOINT_SECONDS = 0.0
eplib.data.CORPORA["tinystories"] = eplib.data.{file!r}
from pipelines import train
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
"""
KILLED = """
runs:
  tiny:
    - common: {data: {kind: Text, corpus: tinystories, validation: 0.02}, estimator: {kind: DyadicEP, steps: 4},
               model: {width: 8, heads: 2, context: 8, block: {kind: Thick}}, optimiser: {ema: 0.9}, steps: 150,
               batch: 4, solver: {kind: Relaxation, step: 0.8, max_steps: 4}, penalties: [{kind: ContractionRate}],
               evaluation_batches: 1}
      arms: {ep: }
"""


def test_a_killed_command_leaves_no_process_and_goes_on_bit_identical(corpus, tmp_path):
    """SIGKILL to `pipelines.train` alone: its workers end with it, and the run goes on from the checkpoint."""
    whole, killed = (make_root(tmp_path / name, corpus, KILLED) for name in ("whole", "killed"))
    (killed / "command.py").write_text(SCRIPT.format(file=eplib.data.CORPORA["tinystories"]))
    scratch = tempfile.TemporaryDirectory()  # for what killed processes leave; tmp_path is too long for a socket
    command = subprocess.Popen([sys.executable, "command.py", "--profile", "x"], cwd=killed, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": scratch.name}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while not list((killed / "checkpoints").rglob("checkpoint.safetensors")):
            assert command.poll() is None and time.monotonic() < until, command.communicate(timeout=10)[0]
            time.sleep(0.005)
        command.kill()
        said, _ = command.communicate(timeout=60)  # ends when the last process that holds the output has ended
    finally:
        with suppress(ProcessLookupError):  # as it should be: none is left
            os.killpg(command.pid, signal.SIGKILL)
        scratch.cleanup()
    assert outcome(killed) == {}, said
    stores = Store("x", killed), Store("x", whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command's workers do: the order of sums is that of one thread
    try:
        [run], [_] = (store.runs("tiny") for store in stores)
    finally:
        torch.set_num_threads(threads)
    assert sessions(killed) == 2 and run.config.steps == len(run.log["step"]) == 150
    assert outcome(killed) == outcome(whole)


def test_a_damaged_checkpoint_is_refused_by_name(root, tmp_path):
    trainer = Trainer(config(), tmp_path, root / "data")
    with pytest.raises(OutOfTime):
        trainer.advance(deadline=-math.inf)
    whole = trainer.checkpoint.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        trainer.checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint.safetensors is damaged .*remove it"):
            Trainer(config(), tmp_path, root / "data")
    trainer.checkpoint.write_bytes(whole)
    with pytest.raises(ValueError, match="belongs to another configuration"):
        Trainer(config(seed=1), tmp_path, root / "data")
    save_file({"something": torch.zeros(2)}, trainer.checkpoint)
    with pytest.raises(ValueError, match="belongs to another configuration"):
        Trainer(config(), tmp_path, root / "data")


def test_a_half_written_checkpoint_is_not_read(root, tmp_path, monkeypatch):
    trainer = Trainer(config(), tmp_path / "folder", root / "data")
    trainer._step()
    trainer._save()
    trainer._step()

    def full(path, content):
        path.open("wb").write(content[:50])
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space"):
            trainer._save()
    (tmp_path / "folder" / ".checkpoint.safetensors.1.partial").write_bytes(b"half")  # what a kill leaves
    assert Trainer(config(), tmp_path / "folder", root / "data").progress.step == 1
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        ".checkpoint.safetensors.1.partial", "checkpoint.safetensors"]


# --- data order and initial weights

@pytest.mark.parametrize("kind", [{}, IMAGES], ids=["text", "images"])
def test_order_depends_on_the_seed_alone(kind, corpus):
    width = replace(config(**kind).model, width=16)
    first, other_arm, other_seed = (build_task(config(**kind | more), corpus) for more in (
        {}, {"arm": "wide", "model": width, "estimator": estimators.BPTT(steps=2)}, {"seed": 1}))
    batches = [[task.batch(step) for step in (0, 1, 11, 0)] for task in (first, other_arm, other_seed)]
    for ours, same, different in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
        assert not torch.equal(ours[0], different[0])
    assert torch.equal(batches[0][0][0], batches[0][3][0])
    assert not torch.equal(batches[0][0][0], batches[0][1][0]) and not torch.equal(batches[0][1][0], batches[0][2][0])


def test_an_epoch_shows_every_image_once(corpus):
    task = build_task(config(**IMAGES), corpus)
    for epoch in (0, 1):
        seen = torch.cat([task.batch(10 * epoch + step)[0] for step in range(10)])
        assert torch.equal(seen.flatten(1).sum(1).sort().values, task.train[0].flatten(1).sum(1).sort().values)
    assert build_task(config(**IMAGES | {"data": Mnist(patch=14, limit=8)}), corpus).train[0].shape == (8, 4, 196)
    for limit, message in ((41, "limit 41 exceeds the 40"), (3, "batch 4 exceeds the 3")):
        with pytest.raises(ValueError, match=message):
            build_task(config(**IMAGES | {"data": Mnist(limit=limit)}), corpus)


def test_patches_are_squares_of_the_normalised_image(corpus):
    image = eplib.data.mnist(corpus).train_images[0]
    patches = build_task(config(**IMAGES), corpus).train[0][0]
    expected = (image[:14, 14:].astype(np.float32) / 255 - 0.1307) / 0.3081
    assert np.allclose(patches[1].view(14, 14).numpy(), expected, atol=1e-6)


def test_pixels_have_unit_variance_on_real_images(mnist_root):
    count = np.bincount(REAL_MNIST(mnist_root).train_images.ravel(), minlength=256)
    share, level = count / count.sum(), np.arange(256) / 255
    mean = share @ level
    assert mean == pytest.approx(0.1307, abs=1e-4)
    assert math.sqrt(share @ (level - mean) ** 2) == pytest.approx(0.3081, abs=1e-4)


def test_targets_are_the_next_tokens_and_the_split_is_by_position(corpus):
    task = build_task(config(), corpus)
    ids = torch.cat([task.train, task.held_out])
    text = eplib.data.text("tinystories", "chars", corpus)
    assert text.codec.decode(ids) == preparing.corpus_text("tinystories", corpus)
    assert len(task.train) == int(0.98 * len(ids))
    inputs, targets = task.batch(3)
    assert inputs.shape == targets.shape == (4, 8) and torch.equal(inputs[:, 1:], targets[:, :-1])
    windows = task.train.unfold(0, 9, 1)
    for row, last in zip(inputs, targets[:, -1:], strict=True):
        assert (windows == torch.cat([row, last])).all(1).any()


@pytest.mark.parametrize("kind", [{}, IMAGES], ids=["text", "images"])
def test_both_blocks_start_from_equal_weights(kind, corpus):
    thick = config(**kind)
    flat = config(**kind | {"estimator": estimators.Backprop(), "penalties": (),
                            "model": replace(thick.model, block=blocks.Feedforward(causal=not kind))})
    task = build_task(thick, corpus)
    ours, theirs, again, other = (dict(build_model(c, task.signal).named_parameters())
                                  for c in (thick, flat, thick, replace(thick, seed=1)))
    theirs = {name.replace("stack.0", "layers"): value for name, value in theirs.items()}
    assert list(theirs) == list(ours) and len(ours) >= 12
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
        assert torch.equal(ours[name], again[name]), name
    assert not torch.equal(ours["readout.weight"], other["readout.weight"])


def test_windows_and_batches_that_the_text_does_not_hold_are_refused_before_training(corpus):
    count = len(build_task(config(), corpus).held_out)
    shape = config().model
    assert next(build_task(config(model=replace(shape, context=count - 1)), corpus).validation())[0].shape == (1, count - 1)
    for context, split in ((count, "validation"), (19_700, "training")):
        with pytest.raises(ValueError, match=f"model.context {context} does not fit the {split} split"):
            build_task(config(model=replace(shape, context=context)), corpus)
    with pytest.raises(ValueError, match="batch 20000 exceeds the 19592 windows"):
        build_task(config(batch=20_000), corpus)


def test_runs_of_different_learning_rates_have_different_names():
    rates = (0.003, 0.0030000001, 1e-05, 2.0)
    assert [config(optimiser=Optimiser(lr=lr)).name for lr in rates] == [
        "ep-lr0.003-seed0", "ep-lr0.0030000001-seed0", "ep-lr1e-05-seed0", "ep-lr2-seed0"]
    with pytest.raises(ValueError, match="overlap: the peak rate would not be reached"):
        Optimiser(warmup=0.6, decay=0.5)


@pytest.mark.parametrize("changes, message", [
    ({"estimator": estimators.Backprop()}, "Feedforward goes with Backprop"),
    ({"model": BACKPROP["model"]}, "Feedforward goes with Backprop"),
    ({"data": Mnist()}, "block.causal must be true for Text"),
    ({"keep": (2, 7)}, r"keep \(2, 7\) names a step after the last, 6"),
    ({"estimator": estimators.BPTT(), "audit_every": 2}, "one free equilibrium, which estimator BPTT does not have"),
    ({"audit_every": 7}, "audit_every 7 comes after the last step, 6"),
    ({"model": Transformer(width=8, heads=2, block=blocks.Thick())}, "Text needs one, got context=None"),
    (IMAGES | {"model": Transformer(width=8, heads=2, context=4, block=blocks.Thick(causal=False))},
     "context=4 would do nothing"),
    ({"start": LinearStart(), "estimator": estimators.BPTT()}, "BPTT begins at the block's own"),
    ({"start": LinearStart(), "model": Transformer(width=8, heads=2, context=8, block=blocks.Layered(layers=2))},
     "block Layered has others"),
    ({"nudged": Relaxation(), "estimator": estimators.BPTT()}, "BPTT has no nudged or adjoint phase"),
    ({"nudged": Relaxation(), "estimator": estimators.OneStep()}, "OneStep has no nudged or adjoint phase"),
    (BACKPROP | {"nudged": Relaxation()}, "Backprop has no nudged or adjoint phase"),
    (BACKPROP | {"start": LinearStart()}, "Backprop begins at the block's own"),
    (BACKPROP | {"gate": 0.1}, "gate=0.1 would never act"),
    (BACKPROP | {"penalties": (Homeostasis(),)}, "no fixed point to act at"),
    ({"nudged": Relaxation(), "estimator": estimators.AsymEP(steps=4)}, "give one of the two"),
    ({"anneal": 0.1}, "the nudge's beta, which the estimator DyadicEP does not have"),
    ({"anneal": 0.1, "estimator": estimators.AsymEP(beta=0.1)}, "anneal 0.1 would move nothing in 6 steps"),
    ({"anneal": 0.1, "estimator": estimators.AsymEP(beta=0.2), "steps": 1, "keep": ()},
     "anneal 0.1 would move nothing in 1 steps"),
    ({"keep": (6,)}, "or the last, which is kept anyway"),
    ({"estimator": estimators.OneStep(), "solver": FixedHorizon(steps=0), "audit_every": 2},
     "a second phase, which FixedHorizon of no steps cannot settle"),
    ({"estimator": estimators.OneStep(), "anneal": 0.1}, "the nudge's beta, which the estimator OneStep does not have"),
    ({"frozen": True}, "give penalties: ..; audits|frozen leaves penalties nothing to change"),
    ({"adaptive": True}, "adaptive counts the iterations of test images"),
])
def test_parts_of_a_configuration_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_byte_pairs_are_not_learned_on_what_a_run_holds_out():
    assert Text(corpus="plays", tokens="bpe1024", validation=0.1).validation == 0.1
    with pytest.raises(ValueError, match=r"bpe1024 was learned on the first 90% of the text, so validation=0.3"):
        Text(corpus="plays", tokens="bpe1024", validation=0.3)


def test_half_precision_is_not_for_the_kernel_that_is_chosen_unasked(compiled_kernel):
    fitting = {"model": Transformer(width=16, heads=4, context=8, block=blocks.Thick()), "estimator": estimators.DyadicEP()}
    assert fastest_backend(config(**fitting)) == "compiled"
    assert fastest_backend(config(**fitting, nudged=MixedPrecision())) == "torch"
    assert fastest_backend(config(**fitting | {"solver": MixedPrecision()})) == "torch"


# --- the step

def test_schedule_warms_up_stays_and_decays():
    optimiser = Optimiser(lr=2.0, warmup=0.1, decay=0.2)
    rates = [optimiser.rate(step, 100) for step in range(100)]
    assert rates[:11] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.0])
    assert set(rates[9:81]) == {2.0}
    assert rates[80:] == pytest.approx([2.0 * (100 - step) / 20 for step in range(80, 100)])
    assert rates[99] == pytest.approx(0.1)
    assert [Optimiser(lr=2.0, warmup=0.0, decay=0.0).rate(step, 3) for step in range(3)] == [2.0] * 3


def applied(monkeypatch, trainer) -> list[dict[str, torch.Tensor | None]]:
    """The gradients that every optimiser step of the trainer is given from now on."""
    seen, step = [], trainer.optimiser.step

    def record():
        seen.append({name: None if p.grad is None else p.grad.clone() for name, p in trainer.model.named_parameters()})
        step()

    monkeypatch.setattr(trainer.optimiser, "step", record)
    return seen


def test_gradient_is_clipped_to_its_norm_and_its_direction_kept(root, tmp_path, monkeypatch):
    given = {}
    for clip in (0.01, 1e6):
        run = config(optimiser=Optimiser(lr=1e-2, clip=clip), penalties=())
        trainer = Trainer(run, tmp_path / str(clip), root / "data")
        seen = applied(monkeypatch, trainer)
        trainer._step()
        [grads] = seen
        given[clip] = torch.cat([g.flatten() for g in grads.values()])
        logged = trainer.progress.rows[0]["gradient_norm"]
    assert given[1e6].norm().item() == pytest.approx(logged, rel=1e-5) and logged > 0.02  # so the other was clipped
    assert given[0.01].norm().item() == pytest.approx(0.01, rel=1e-4)
    assert torch.allclose(given[0.01] / 0.01, given[1e6] / logged, atol=1e-5)


def test_loss_and_penalty_gradients_are_added(root, tmp_path, monkeypatch):
    run = config(optimiser=Optimiser(clip=1e6))
    trainer = Trainer(run, tmp_path, root / "data")
    report = training.gradient(trainer.model, *trainer.task.batch(0), estimator=run.estimator, solver=run.solver,
                               penalties=run.penalties)
    assert report.penalty_grads and set(report.penalty_grads) < set(report.grads)
    seen = applied(monkeypatch, trainer)
    trainer._step()
    for name, value in seen[0].items():
        assert torch.allclose(value, report.grads[name] + report.penalty_grads.get(name, 0), rtol=1e-4, atol=1e-7), name


def test_clipped_apart_the_penalties_weigh_no_more_than_the_task():
    apart, together = Optimiser(clip=2.0, clipping="apart"), Optimiser(clip=2.0)
    task, penalty = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}, {"a": torch.tensor([0.0, 10.0])}
    cut = clipped(task, penalty, apart)
    assert (cut.norm, cut.penalty_norm, cut.kept) == pytest.approx((5.0, 10.0, 0.2))  # the task's norm is 2 after its clip
    assert torch.allclose(cut.gradient["a"], torch.tensor([1.2, 2.0])) and torch.allclose(cut.gradient["b"], torch.tensor(1.6))
    weak = clipped({"a": torch.tensor([0.5, 0.0])}, penalty, apart)
    assert torch.allclose(weak.gradient["a"], torch.tensor([0.5, 0.5])) and weak.kept == pytest.approx(0.05)
    alone = clipped({}, penalty, apart)  # a step without a gradient of the task
    assert torch.allclose(alone.gradient["a"], torch.tensor([0.0, 2.0])) and (alone.norm, alone.kept) == pytest.approx((0, 0.2))
    small = clipped(task, {"a": torch.tensor([0.0, 1.0])}, apart)
    assert torch.allclose(small.gradient["a"], torch.tensor([1.2, 1.0])) and small.kept == 1
    both = clipped(task, penalty, together)
    assert (both.norm, both.kept) == pytest.approx((125**0.5, 2 / 125**0.5))
    assert torch.allclose(both.gradient["a"], torch.tensor([3.0, 10.0]) * both.kept)
    for rule in (apart, together):
        assert not clipped({}, {}, rule).usable
        for broken in (math.nan, math.inf):
            assert not clipped(task, {"a": torch.tensor([0.0, broken])}, rule).usable
            assert not clipped({"a": torch.tensor([0.0, broken])}, penalty, rule).usable


def test_the_trainer_tells_a_penalty_what_its_clip_left(root, tmp_path):
    held = ContractionRate(target=0.1, strength=1e4, per="token", driven=Integral())
    run = config(penalties=(held,), optimiser=Optimiser(clip=0.1, clipping="apart"), steps=3)
    trainer = Trainer(run, tmp_path, root / "data")
    trainer.advance()
    rows = list(trainer.progress.rows)
    assert all(row["penalty_norm"] > 0.1 and row["penalty_kept"] == pytest.approx(0.1 / row["penalty_norm"]) for row in rows)
    assert len({row["rate_coefficient"] for row in rows}) == 1  # cut to the clip, it does not wind up
    assert all(0 < row["rate_quantile"] <= row["rate_probe"] and row["rate_above"] > 0 for row in rows)
    with pytest.raises(ValueError, match=r"driven: Integral .*optimiser.clipping together .*give clipping: apart"):
        config(penalties=(Homeostasis(), held))
    for refused in ({"penalties": ()}, BACKPROP):
        with pytest.raises(ValueError, match="clipping apart"):
            config(**{"optimiser": run.optimiser, **refused})


def test_an_evaluation_holds_what_the_control_sees_against_the_exact_spectrum(root, tmp_path):
    held = ContractionRate(target=0.9, per="token", step=0.25, products=40)
    trainer = Trainer(config(penalties=(held,), steps=2, keep=()), tmp_path, root / "data")
    trainer.advance()
    [row], model = list(trainer.progress.curve), trainer.average
    inputs = trainer.task.batch(0)[0][:1]
    z, x = model.settle(inputs, trainer.config.solver).value, model.clamp(inputs).detach()
    own = diagnostics.dense_jacobian(model, x, z).unflatten(0, (8, 8)).unflatten(2, (8, 8))
    radii = [torch.linalg.eigvals(torch.eye(8) + 0.25 * own[t, :, t]).abs().max() for t in range(8)]
    assert row["held_step"] == 0.25 and row["rate_held"] == pytest.approx(max(radii).item(), rel=1e-4)
    assert row["rate_seen"] == pytest.approx(row["rate_held"], rel=2e-2)
    assert row["edges_residual"] == pytest.approx((norm(model.block(z, x)) / norm(z)).item(), rel=1e-3)


def test_the_average_follows_the_weights(root, tmp_path):
    trainer = Trainer(config(optimiser=Optimiser(lr=1e-2, ema=0.25)), tmp_path, root / "data")
    expected = {name: value.clone() for name, value in trainer.model.named_parameters()}
    for step in range(4):
        trainer._step()
        decay = min(0.25, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * value
                    for name, value in trainer.model.named_parameters()}
    for name, value in trainer.average.named_parameters():
        assert torch.allclose(value, expected[name], atol=1e-6), name
        assert not torch.allclose(value, dict(trainer.model.named_parameters())[name], atol=1e-6), name
    plain = Trainer(config(), tmp_path / "plain", root / "data")
    assert plain.average is plain.model


def test_a_gated_step_applies_the_penalties_alone(root, tmp_path):
    trainer = Trainer(config(gate=1e-12, optimiser=Optimiser(weight_decay=0.1)), tmp_path, root / "data")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    progress = trainer.advance()
    assert [row["gated"] for row in progress.rows] == [1] * 6 and not any(row["skipped"] for row in progress.rows)
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("block.")}
    free = Trainer(config(gate=1e9), tmp_path / "free", root / "data")
    assert not any(row["gated"] for row in free.advance().rows)


def test_a_nudged_phase_that_did_not_settle_is_gated_by_the_same_rule(root, tmp_path):
    """Its bound is the gate, or its own tolerance where that is above; the free phase has settled in each of these runs."""
    settles, short = Relaxation(step=0.8, max_steps=60, tol=1e-4), Relaxation(step=0.8, max_steps=1, tol=1e-3)
    kinds = {"solver": settles, "estimator": estimators.DyadicEP(), "steps": 2, "keep": ()}
    runs = {name: config(**kinds | changes) for name, changes in {
        "unsettled": {"gate": 0.01, "nudged": short}, "tolerant": {"gate": 1e-3, "nudged": replace(settles, tol=0.5)},
        "settled": {"gate": 0.01, "nudged": settles}, "no gate": {"nudged": short}}.items()}
    seen = {name: list(Trainer(run, tmp_path / name, root / "data").advance().rows) for name, run in runs.items()}
    for name, rows in seen.items():
        gated = name == "unsettled"
        assert [row["gated_nudged"] for row in rows] == [gated] * 2
        assert [row["task_gradient"] for row in rows] == [not gated] * 2
        assert [row["nudged_unsettled"] for row in rows] == [name in ("unsettled", "no gate")] * 2
        assert not any(row["gated"] or row["free_unsettled"] for row in rows)
    assert min(row["nudged_residual_max"] for row in seen["unsettled"]) > 0.02  # by a margin
    assert all(row["nudged_residual_max"] > 2e-3 for row in seen["tolerant"])  # above the gate, within its tolerance
    metrics = Store("x", root).run(runs["unsettled"]).metrics
    assert metrics["without_gradient"] == metrics["gated_nudged"] == 2 and metrics["gated"] == metrics["skipped"] == 0


def test_a_gradient_or_loss_that_is_not_finite_moves_nothing(root, tmp_path, monkeypatch):
    trainer = Trainer(config(penalties=()), tmp_path, root / "data")
    trainer._step()
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    real = training.gradient
    for change in ({"loss": math.nan}, {"grads": {name: value * math.nan for name, value in before.items()}}):
        monkeypatch.setattr(training, "gradient", lambda *args, change=change, **more: replace(real(*args, **more), **change))
        trainer._step()
        row = trainer.progress.rows[-1]
        assert row["task_gradient"] == 0 and row["skipped"] == 1
        assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_every_measured_value_is_in_the_row_of_its_step(root, tmp_path):
    penalties = (LeadingMode(), ContractionRate(every=3), ContractionRate(per="token"))
    trainer = Trainer(config(penalties=penalties), tmp_path, root / "data")
    report = training.gradient(trainer.model, *trainer.task.batch(0), estimator=trainer.config.estimator,
                               solver=trainer.config.solver, penalties=penalties)
    rows = list(trainer.advance().rows)
    assert {"abscissa_probe", "rate_probe", "rate_probe.2", "rate_probe_mean.2"} <= set(report.measured)
    assert {name: rows[0][name] for name in report.measured} == report.measured
    parts = ("penalty.LeadingMode", "penalty.ContractionRate", "penalty.ContractionRate.2")
    for row in rows:  # each has a value of its own wherever it acts, and one column has their sum
        assert row["penalty"] == pytest.approx(sum(row[name] for name in parts if not math.isnan(row[name])), rel=1e-12)
        assert math.isnan(row[parts[1]]) == math.isnan(row["rate_probe"])
    assert [math.isnan(row["rate_probe"]) for row in rows] == [False, True, True] * 2
    assert not any(math.isnan(row["rate_probe.2"]) or math.isnan(row["abscissa_probe"]) for row in rows)


def test_a_step_without_any_gradient_is_skipped_and_counted(root, tmp_path):
    run = config(gate=1e-12, penalties=(), keep=())
    trainer = Trainer(run, tmp_path, root / "data")
    before = [value.clone() for value in trainer.model.parameters()]
    trainer.advance()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    metrics = Store("x", root).run(run).metrics
    assert metrics["gated"] == metrics["skipped"] == 6


# --- log, metrics, evaluation

def test_the_log_has_every_promised_column_and_the_three_rates_apart(root):
    run = Store("x", root).run(config())
    assert set(run.log) >= {"step", "loss", "free_residual_median", "free_residual_max", "nudged_residual_median",
                            "nudged_residual_max", "iterations_mean", "iterations_max", "rate_probe", "rate_tail",
                            "penalty", "gated", "gradient_norm", "displacement", "lr", "force_evaluations",
                            "status_converged"}
    assert "seconds" not in run.log  # kept with the machine's facts
    assert run.log["step"].tolist() == [1, 2, 3, 4, 5, 6] and run.curve["step"].tolist() == [2, 4, 6]
    optimiser = run.config.optimiser
    assert run.log["lr"] == pytest.approx([optimiser.rate(step, 6) for step in range(6)])
    assert np.isfinite(run.log["loss"]).all()
    assert (run.log["free_residual_median"] <= run.log["free_residual_max"]).all()
    for rates in (run.log["rate_tail"], run.log["rate_probe"], run.curve["rate_arnoldi"]):
        assert ((rates > 0) & (rates < 2)).all()
    assert not np.allclose(run.log["rate_tail"], run.log["rate_probe"])
    assert not np.allclose(run.log["rate_probe"][1::2], run.curve["rate_arnoldi"])
    assert (run.curve["abscissa"] <= run.curve["numerical_abscissa"] + 1e-5).all() and (run.curve["frequency"] >= 0).all()
    assert ((run.curve["rate_tail"] > 0) & (run.curve["rate_tail"] < run.curve["rate_arnoldi"] + 0.1)).all()
    assert (run.curve["rate_arnoldi"] >= np.abs(1 + run.config.solver.step * run.curve["abscissa"]) - 1e-5).all()
    assert np.isnan(run.log["coefficient"]).all()  # no controller here has one
    timing = next((root / "results" / "x" / "machine").rglob("timing.csv")).read_text().splitlines()
    assert timing[0] == "step,seconds" and len(timing) == 4
    assert run.metrics["force_evaluations"] == run.log["force_evaluations"].sum() == run.curve["force_evaluations"][-1]
    assert run.metrics["best_loss"] == pytest.approx(run.curve["loss"].min(), rel=1e-8)
    assert run.metrics["rate_arnoldi"] == pytest.approx(run.curve["rate_arnoldi"][-1], rel=1e-8)
    flat = Store("x", root).run(config(**BACKPROP))
    assert "rate_arnoldi" not in flat.curve and flat.metrics["rate_arnoldi"] is None and "converged" not in flat.metrics


def test_an_audit_compares_the_linear_response_with_two_trajectories(root, tmp_path):
    """The cosine is logged at the audited steps, its cost is counted, and the training is not touched."""
    tight = {"solver": Relaxation(step=0.8, max_steps=40, tol=1e-5), "nudged": Relaxation(step=0.8, max_steps=40, tol=1e-4),
             "estimator": estimators.DyadicEP()}
    plain, audited = (Trainer(config(**tight, audit_every=every), tmp_path / str(every), root / "data") for every in (None, 3))
    rows, others = list(plain.advance().rows), list(audited.advance().rows)
    assert [math.isnan(row["audit_cosine"]) for row in others] == [True, True, False] * 2
    assert all(row["audit_cosine"] > 0.999 for row in others[2::3])
    assert [row["loss"] for row in rows] == [row["loss"] for row in others]
    assert [row["audit_evaluations"] > 0 for row in others] == [False, False, True] * 2
    own = {name: [[str(row[name]) for row in each] for each in (rows, others)] for name in rows[0]}  # NaN is NaN
    assert [name for name, (ours, same) in own.items() if ours != same] == ["audit_cosine", "audit_evaluations"]


def test_an_audit_of_another_estimator_compares_it_with_the_linear_response(root, tmp_path):
    """Uncorrected EP agrees in the readout, whose gradient ignores the adjoint state, and in no group of the block."""
    tight = {"solver": Relaxation(step=0.8, max_steps=60, tol=1e-6), "nudged": Relaxation(step=0.8, max_steps=60, tol=1e-5),
             "model": Transformer(width=8, heads=2, context=8, block=blocks.Thick(init=0.5))}
    rows = {kind.kind: Trainer(config(**tight, penalties=(), estimator=kind, audit_every=6), tmp_path / kind.kind,
                               root / "data").advance().rows[-1]
            for kind in (estimators.AsymEP(beta=0.01), estimators.VectorField(beta=0.01))}
    groups = [f"audit_{group}" for group in diagnostics.GROUPS if group != "readout"]
    assert all(rows["AsymEP"][group] > 0.9999 for group in ["audit_cosine", *groups])
    assert abs(rows["AsymEP"]["audit_ratio"] - 1) < 1e-3
    assert all(rows["VectorField"][group] < 0.99 for group in ["audit_cosine", *groups])
    assert all(row["audit_readout"] > 0.9999 for row in rows.values())


def test_an_annealed_nudge_moves_linearly_to_its_end(root, tmp_path):
    kinds = {"estimator": estimators.AsymEP(beta=0.3), "anneal": 0.2}
    annealed, fixed = (list(Trainer(config(**kinds | changes), tmp_path / name, root / "data").advance().rows)
                       for name, changes in (("a", {}), ("b", {"anneal": None})))
    assert [round(row["beta"], 6) for row in annealed] == [0.3, 0.28, 0.26, 0.24, 0.22, 0.2]
    assert [row["beta"] for row in fixed] == [0.3] * 6
    assert annealed[0]["displacement"] == fixed[0]["displacement"] and annealed[-1]["displacement"] < fixed[-1]["displacement"]


def test_a_frozen_run_trains_the_readout_alone(root, tmp_path):
    run = config(frozen=True, penalties=(), optimiser=Optimiser(lr=1e-2, weight_decay=0.1))
    trainer = Trainer(run, tmp_path, root / "data")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.advance()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"norm.weight", "norm.bias", "readout.weight"}
    assert Trainer(run, tmp_path, root / "data").progress.step == 6  # its checkpoint loads


def test_an_adaptive_run_records_how_many_steps_the_test_images_take(root):
    shape = Transformer(width=8, heads=2, block=blocks.Thick(causal=False, init=0.5))
    run = Store("x", root).run(config(**IMAGES | {"model": shape}, adaptive=True,
                                      solver=Relaxation(step=0.8, max_steps=60, tol=1e-4)))
    clean, noisy = (run.metrics["adaptive"][name] for name in ("clean", "noisy"))
    assert abs(clean["accuracy"] - run.metrics["final"]["accuracy"]) < 1e-9
    means = [clean[key]["mean"] for key in ("0.01", "0.001", "0.0001", "1e-05")]
    assert 0 < means[0] < means[1] < means[2] < means[3]
    assert abs(means[2] - run.metrics["final"]["iterations"]) < 0.05 * means[2]  # one relaxation read on its way
    assert noisy["1e-05"]["mean"] != clean["1e-05"]["mean"] and len(clean["0.001"]["by_margin"]) == 10


@pytest.mark.parametrize("block", [blocks.Layered(layers=2), blocks.Attractor(), blocks.LayeredAttractor(), blocks.Thin(),
                                   blocks.Energy(), blocks.Monotone()], ids=lambda block: block.kind)
def test_every_architecture_trains_under_the_penalty_and_is_evaluated(block, root):
    run = Store("x", root).run(config(model=Transformer(width=8, heads=2, context=8, block=block),
                                      solver=Relaxation(step=0.8, max_steps=30, tol=1e-3), optimiser=Optimiser(lr=1e-2),
                                      steps=40, evaluate_every=20, keep=()))
    assert run.curve["loss"][-1] < run.curve["loss"][0]
    assert run.metrics["converged"]["residual_max"] < 1e-3 and np.isfinite(run.log["asymmetry"][[19, 39]]).all()
    assert np.isfinite(run.log["rate_probe"]).all()
    model, task = run.model(), training.build_task(run.config, root / "data")
    with torch.no_grad():  # the start state alone is read out
        losses = [model.loss(model.block.output(model.block.start(model.clamp(inputs))), targets)
                  for inputs, targets in task.validation()]
    assert math.isclose(run.metrics["solver_removed"], torch.cat(losses).double().mean().item(), rel_tol=1e-6)


def test_excursions_are_steps_above_a_tenth_and_not_finite_ones(root, tmp_path):
    trainer = Trainer(config(), tmp_path, root / "data")
    progress = trainer.advance()
    progress.rows.columns["free_residual_max"] = array("d", (0.05, 0.1, 0.11, math.nan, math.inf, 1e-3))
    metrics = summarise(trainer, progress)
    assert metrics["excursions"] == 3 and metrics["first_excursion"] == 3
    progress.rows.columns["free_residual_max"] = array("d", [0.05, 0.1] * 3)
    metrics = summarise(trainer, progress)
    assert metrics["excursions"] == 0 and metrics["first_excursion"] is None


def test_evaluation_says_who_settled_from_x_and_from_the_predicted_start(root, tmp_path):
    run = config(start=LinearStart(refresh=1), solver=Relaxation(step=0.8, max_steps=4, tol=1e-2), steps=30, keep=(),
                 optimiser=Optimiser(lr=1e-3))  # nearly at its initial weights
    trainer = Trainer(run, tmp_path, root / "data")
    metrics = summarise(trainer, trainer.advance())
    residuals = torch.cat([run.solver.settle(trainer.model.block, trainer.model.clamp(inputs)).residual
                           for inputs, _ in trainer.task.validation()])
    assert metrics["final"]["settled"] == pytest.approx((residuals <= 1e-2).double().mean().item())
    assert metrics["final"]["excursions"] == (residuals > 0.1).sum()
    clamps = [trainer.model.clamp(inputs) for inputs, _ in trainer.task.validation()]
    predicted = torch.cat([run.solver.settle(trainer.model.block, x, run.start(x, trainer.state)).residual for x in clamps])
    assert metrics["training_start"]["residual_median"] == pytest.approx(predicted.median().item())
    assert metrics["training_start"]["settled"] == pytest.approx((predicted <= 1e-2).double().mean().item())
    assert not torch.allclose(predicted, residuals, rtol=0.1)
    stopped = evaluate(trainer.model, trainer.task, FixedHorizon(steps=0))
    sizes = torch.cat([trainer.model.block(x, x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1) for x in clamps])
    assert stopped["settled"] == 0 and 0 < stopped["excursions"] == (sizes > 0.1).sum() < len(sizes)
    plain = Trainer(config(), tmp_path / "plain", root / "data")
    assert "training_start" not in summarise(plain, plain.advance())


def test_steps_to_a_residual_are_counted_from_the_start(corpus):
    """However many residuals are read on the way, an image that took more than the most steps has not settled."""
    run = config(**IMAGES | {"model": Transformer(width=8, heads=2, block=blocks.Thick(causal=False, init=0.5))})
    task = build_task(run, corpus)
    model, tolerances = build_model(run, task.signal), (1e-1, 1e-2, 1e-3, 1e-4)
    phases = {tol: model.settle(task.test[0], Relaxation(step=0.3, max_steps=200, tol=tol)).steps for tol in tolerances}
    most = int(phases[1e-3].median())
    found = diagnostics.adaptive_compute(model, task.validation(), 0.3, tolerances, max_steps=most)
    for tol, steps in phases.items():
        assert found[f"{tol:g}"]["unsettled"] == pytest.approx((steps > most).double().mean().item()), tol


@pytest.mark.parametrize("kind", [{}, IMAGES], ids=["text", "images"])
def test_evaluation_covers_the_whole_split(kind, corpus):
    run = config(**kind)
    task = build_task(run, corpus)
    model = build_model(run, task.signal)
    if kind:
        assert sum(len(targets) for _, targets in task.validation()) == 24
        inputs, targets = task.test
    else:  # consecutive windows: every token but the first and the rest of a window is a target once
        targets = torch.cat([targets for _, targets in task.validation()])
        inputs = torch.cat([inputs for inputs, _ in task.validation()])
        assert 0 <= len(task.held_out) - 1 - targets.numel() < 8 and len(targets) > 32
        assert torch.equal(targets.flatten(), task.held_out[1:targets.numel() + 1])
        assert torch.equal(inputs.flatten(), task.held_out[:targets.numel()])
    found = evaluate(model, task, run.solver)
    state = model.settle(inputs, run.solver).value
    assert found["loss"] == pytest.approx(model.loss(state, targets).mean().item(), rel=1e-5)
    right = (model.predict(state).argmax(-1) == targets).double().mean().item()
    assert found["accuracy"] == pytest.approx(100 * right)
    if not kind:
        assert evaluate(model, task, run.solver, 1)["loss"] == pytest.approx(
            model.loss(state[:32], targets[:32]).mean().item(), rel=1e-5)


# --- generation

def test_generation_is_deterministic_keeps_the_prompt_and_outgrows_the_context(root):
    run = Store("x", root).run(config())
    model = run.model()
    text = eplib.data.text("tinystories", "chars", root / "data")
    prompt = torch.tensor(text.codec.encode("ALL'S"))
    draw = [model.generate(prompt, 20, run.config.solver, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert draw[0].shape == (25,) and torch.equal(draw[0][:5], prompt)
    assert text.codec.decode(draw[0]).startswith("ALL'S")
    with pytest.raises(ValueError, match=r"temperature must be at least 0, .*got -1\.0"):
        model.generate(prompt, 1, run.config.solver, -1.0)
    with pytest.raises(ValueError, match="9 tokens do not fit a context of 8"):
        model.clamp(torch.zeros(1, 9, dtype=torch.long))


def test_generation_settles_one_token_at_a_time_as_the_whole_sequence_does(root, tmp_path, monkeypatch):
    """Until the window is full each step settles one token, and has the state and the logits of the whole sequence settled
    anew; then the window goes on with its last half."""
    trainer = Trainer(config(), tmp_path, root / "data")
    model, tight, settled = trainer.model, Relaxation(step=0.8, max_steps=200, tol=1e-7), []
    solve = Relaxation.solve
    monkeypatch.setattr(Relaxation, "solve", lambda self, force, start, *rest: settled.append(
        found := solve(self, force, start, *rest)) or found)
    ids = model.generate(torch.arange(3), 9, tight, temperature=1e-6)
    monkeypatch.undo()
    assert [found.value.shape[-2] for found in settled] == [3, 1, 1, 1, 1, 1, 4, 1, 1]
    whole = model.settle(ids[None, :8], tight).value
    assert torch.allclose(torch.cat([found.value for found in settled[:6]], -2), whole, atol=1e-5)
    for length in range(3, 9):
        state = model.settle(ids[None, :length], tight).value
        assert ids[length] == model.predict(state)[0, -1].argmax()
    half = model.settle(ids[None, 5:11], tight).value  # from the ninth token on: the last four, at the first positions
    assert torch.allclose(torch.cat([found.value for found in settled[6:]], -2), half, atol=1e-5)


@pytest.mark.parametrize("block", [blocks.Layered(layers=2), blocks.Monotone()], ids=lambda b: b.kind)
def test_generation_without_a_past_settles_the_window(block):
    torch.manual_seed(0)
    model = eplib.models.LanguageModel(vocab=7, width=16, heads=2, context=6, block=block)
    tight = Relaxation(step=0.8, max_steps=200, tol=1e-6)
    ids = model.generate(torch.arange(4), 2, tight, temperature=1e-6)
    for length in (4, 5):
        assert ids[length] == model.predict(model.block.output(model.settle(ids[None, :length], tight).value))[0, -1].argmax()


def test_a_cold_sample_and_a_greedy_one_take_the_likeliest_token(root, tmp_path):
    trainer = Trainer(config(), tmp_path, root / "data")
    trainer.advance()
    model, solver = trainer.model, trainer.config.solver
    ids = torch.arange(11)
    state = model.settle(ids[None, -8:], solver).value
    for temperature in (1e-6, 0):
        assert model.generate(ids, 1, solver, temperature)[-1] == model.predict(state)[0, -1].argmax()


def test_a_checkpoint_holds_the_evaluated_weights(root, tmp_path):
    run = config(optimiser=Optimiser(lr=1e-2, ema=0.9))
    trainer = Trainer(run, tmp_path, root / "data")
    trainer.advance()
    kept = load_file(trainer.weights(6))
    for name, value in trainer.average.state_dict().items():
        assert torch.equal(kept[name], value), name
    assert not torch.equal(kept["readout.weight"], trainer.model.readout.weight)
    assert not torch.equal(kept["readout.weight"], load_file(trainer.weights(2))["readout.weight"])
