"""One run on several ranks is the run of one process: same gradients, same decisions, same log."""

import lzma
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import eplib
import systems  # noqa: F401  (one thread)
from eplib import blocks, estimators, kernels, parallel, solvers
from eplib.config import configuration
from eplib.controllers import ContractionRate, Homeostasis, Integral, JacobianNorm, ResidualDriven, ResidualPenalty
from eplib.estimators import Batch
from eplib.estimators.whole import agreed
from eplib.models import Transformer
from eplib.parallel import Part
from eplib.runconfig import Optimiser, RunConfig
from eplib.solvers import Status
from eplib.starts import LinearStart
from eplib.store.records import Store
from eplib.store.summary import summarise
from eplib.tasks import Text
from eplib.training import Trainer

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS, FEW = 25, 5  # of a run in float64, and in float32
BASE = {"experiment": "tiny", "arm": "ep", "model": Transformer(width=16, heads=4, context=8, block=blocks.Thick(init=0.3)),
        "estimator": estimators.DyadicEP(), "solver": solvers.Relaxation(step=0.7, max_steps=30, tol=1e-3),
        "optimiser": Optimiser(lr=1e-2), "steps": STEPS, "batch": 5, "evaluate_every": 25, "evaluation_batches": 3}
CONTROL = ContractionRate(target=0.3, probes=2, driven=Integral(floor=0.5, quantile=0.9))
ARMS = {
    "linear response, predicted start, clipped apart, gate": {
        "start": LinearStart(refresh=3, cold=0.2), "penalties": (CONTROL,), "gate": 1e-2, "audit_every": 10,
        "optimiser": Optimiser(lr=1e-2, clipping="apart", clip=0.3)},
    "random signs, norm driven by the residual": {
        "estimator": estimators.AsymEP(beta=0.05, nudging="random-sign"),
        "penalties": (JacobianNorm(driven=ResidualDriven()),), "audit_every": 10},
    "shuffled targets, homeostasis": {"estimator": estimators.ShuffledNudge(), "penalties": (Homeostasis(),)},
    "holomorphic, average": {"estimator": estimators.HolomorphicEP(beta=0.1), "optimiser": Optimiser(lr=1e-2, ema=0.9)},
    "feedback alignment": {"estimator": estimators.FeedbackAlignment(), "penalties": (ContractionRate(target=0.3, every=2),)},
    "unsettled, residual penalty": {"solver": solvers.Relaxation(step=0.7, max_steps=6, tol=1e-2), "gate": 5e-2,
                                    "penalties": (ResidualPenalty(strength=1.0),), "start": LinearStart()},
    "BPTT": {"estimator": estimators.BPTT(steps=8), "penalties": (ContractionRate(target=0.3, probes=2),)},
    "backprop": {"estimator": estimators.Backprop(), "model": Transformer(width=16, heads=4, context=8,
                                                                           block=blocks.Feedforward())}}
SINGLE = {  # float32 alone
    "half precision first": {"solver": solvers.MixedPrecision(step=0.7, max_steps=30, tol=1e-5, coarse=3e-2)},
    "compiled": {"solver": solvers.Substitution(step=0.7, max_steps=30, tol=1e-5)}}


def config(text: Path, changes: dict) -> RunConfig:
    return RunConfig(**BASE | {"data": Text(path=str(text), validation=0.2)} | changes)


@dataclass(frozen=True)
class Outcome:
    """Weights at the end {name: tensor}, the log and the evaluations {column: numbers}, and the metrics."""

    weights: dict[str, Tensor]
    columns: dict[str, list[float]]
    metrics: dict


def trained(run: RunConfig, folder: Path, dtype: torch.dtype, reverse: bool = False) -> Outcome:
    """A run by whatever ranks there are. reverse: with the samples of each batch in the opposite order."""
    trainer = Trainer(run, folder, backend="compiled" if isinstance(run.solver, solvers.Substitution) else "torch")
    for model in (trainer.model, trainer.average):
        model.to(dtype)
    if reverse:
        batch = trainer.task.batch
        trainer.task.batch = lambda step: [whole.flip(0) for whole in batch(step)]
    progress = trainer.advance(show=lambda line: None)
    columns = {f"{part}.{name}": log.column(name).tolist()
               for part, log in (("rows", progress.rows), ("curve", progress.curve)) for name in log.columns}
    return Outcome(trainer.model.state_dict(), columns, summarise(trainer, progress))


def runs(text: Path) -> dict[str, tuple[RunConfig, torch.dtype]]:
    """Every arm in float64, and for a few steps in float32."""
    few = {"steps": FEW, "evaluate_every": FEW, "audit_every": None}
    single = ARMS | {name: arm for name, arm in SINGLE.items() if name != "compiled" or kernels.available()}
    return {name: (config(text, arm), torch.float64) for name, arm in ARMS.items()} | {
        f"{name}, single": (config(text, arm | few), torch.float32) for name, arm in single.items()}


def apart(ours: Outcome, theirs: Outcome) -> float:
    """||a - b|| / ||b|| of the weights."""
    a, b = (torch.cat([value.flatten().double() for value in one.weights.values()]) for one in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def work(what: str, text: Path, folder: Path) -> None:
    """What a rank does: every run, or one of batches of 7."""
    with parallel.joined(patience=60):
        torch.set_num_threads(1)
        for name, (run, dtype) in runs(text).items():
            if what in ("all", name):
                found = trained(run if what == "all" else replace(run, batch=7), folder / "runs" / name, dtype)
                if parallel.place()[0] == 0:
                    torch.save((found.weights, found.columns, found.metrics), folder / f"{name}.pt")


ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A short text of one's own, the same whatever else changes here: rounding is another one on another text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    with lzma.open(REPOSITORY / "data" / "plays.txt.xz", "rt", encoding="utf-8") as plays:
        path.write_text(plays.read(6000))
    return path


def by_torchrun(ranks: int, what: str, text: Path, folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__,
                           what, str(text), str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 0, done.stderr


def read(path: Path) -> Outcome:
    return Outcome(*torch.load(path, weights_only=False))


@pytest.fixture(scope="module")
def together(text, tmp_path_factory):
    """Where two ranks have left every run."""
    folder = tmp_path_factory.mktemp("together")
    by_torchrun(2, "all", text, folder)
    return folder


COUNTS = ("evaluations",)  # a batch shrinks once half of it has ended: half of a part is another half


def agree(ours: Outcome, theirs: Outcome, bound: float) -> None:
    """Weights and loss to the bound, the log to what they make of it."""
    assert apart(ours, theirs) <= bound
    assert ours.columns.keys() == theirs.columns.keys()
    for name, values in theirs.columns.items():
        if not name.endswith(COUNTS):
            assert ours.columns[name] == pytest.approx(values, rel=1e4 * bound, abs=1e2 * bound, nan_ok=True), name
    assert ours.metrics["final"]["loss"] == pytest.approx(theirs.metrics["final"]["loss"], rel=10 * bound)


@pytest.mark.parametrize("name", ARMS)
def test_two_ranks_train_as_one_process_does(name, text, together, tmp_path):
    """In float64. The yardstick is one process with the samples of each batch in reverse: by rounding alone it ends as far
    away."""
    run, dtype = runs(text)[name]
    agree(read(together / f"{name}.pt"), trained(run, tmp_path, dtype), 1e-8)


@pytest.mark.parametrize("name", ["unsettled, residual penalty", "backprop", *SINGLE])
def test_in_float32_they_agree_to_its_rounding(name, text, together, tmp_path, request):
    if name == "compiled":
        request.getfixturevalue("compiled_kernel")
    run, dtype = runs(text)[f"{name}, single"]
    agree(read(together / f"{name}, single.pt"), trained(run, tmp_path, dtype), 2e-6)


def test_a_batch_of_seven_is_shared_by_three(text, tmp_path):
    name = "shuffled targets, homeostasis"
    by_torchrun(3, name, text, tmp_path)
    run, dtype = runs(text)[name]
    agree(read(tmp_path / f"{name}.pt"), trained(replace(run, batch=7), tmp_path / "alone", dtype), 1e-8)


# --- a rank that is killed

PROFILE = """
profile: x
runs:
  tiny:
    - common: {{data: {{kind: Text, path: {text}, validation: 0.2}}, estimator: {{kind: AsymEP, nudging: random-sign}},
               model: {{width: 8, heads: 2, context: 8, block: {{kind: Thick}}}}, optimiser: {{ema: 0.9}}, steps: 12, batch: 4,
               solver: {{kind: Relaxation, step: 0.8, max_steps: 4}}, penalties: [{{kind: Homeostasis}}], start: {{refresh: 2}},
               evaluation_batches: 1, evaluate_every: 4}}
      arms: {{ep: }}
"""
COMMAND = """
import os, signal, sys, time
from pathlib import Path
from eplib import training
from pipelines import train

training.CHECKPOINT_SECONDS, step = 0.0, training.Trainer._step

def dies(trainer):
    if trainer.part.rank == 1 and trainer.progress.step == 7 and not Path("died").exists():
        Path("died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    step(trainer)

training.Trainer._step = dies
try:
    status = train.main(["--profile", "x", "--backend", "torch"])
finally:
    print("ended", time.time(), flush=True)
sys.exit(status)
"""


def make_root(folder: Path, text: Path) -> Path:
    (folder / "pipelines" / "profiles").mkdir(parents=True)
    (folder / "pipelines" / "profiles" / "x.yaml").write_text(PROFILE.format(text=text))
    (folder / "command.py").write_text(COMMAND)
    return folder


def command(root: Path, ranks: int = 2) -> list[tuple[int, str]]:
    """Status and words of each rank of the training command. They are started one by one: torchrun would end them all with the
    first that fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    started = [subprocess.Popen([sys.executable, "command.py"], cwd=root, env=ENVIRONMENT | place | {"RANK": str(rank)},
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(ranks)]
    try:
        said = [one.communicate(timeout=120)[0] for one in started]
    finally:
        for one in started:
            one.kill()
    return [(one.returncode, words) for one, words in zip(started, said, strict=True)]


def left(root: Path) -> dict[str, bytes]:
    results = root / "results" / "x"
    return {str(path.relative_to(results)): path.read_bytes() for path in sorted(results.rglob("*"))
            if path.is_file() and "machine" not in path.relative_to(results).parts}


def test_a_killed_rank_is_named_at_once_and_the_run_goes_on_bit_identical(text, tmp_path):
    whole, killed = (make_root(tmp_path / name, text) for name in ("whole", "killed"))
    (whole / "died").touch()
    assert [status for status, _ in command(whole)] == [0, 0]
    (status, said), (other, _) = command(killed)
    assert status == 1 and other == -signal.SIGKILL and left(killed) == {}
    assert "rank 0 has lost another one" in said and "start the command again" in said
    assert float(said.split("ended ")[1].split()[0]) - float((killed / "died").read_text()) < 2
    alone = tmp_path / "alone"
    shutil.copytree(killed, alone)
    assert [status for status, _ in command(killed)] == [0, 0]
    assert left(killed) == left(whole)
    [run] = Store("x", whole).recorded("tiny")
    assert run.provenance["ranks"] == 2 and run.config.steps == len(run.log["step"])
    [one] = Store("x", alone).runs("tiny")  # by one process, from the checkpoint of two
    assert "ranks" not in one.provenance
    assert one.metrics["final"]["loss"] == pytest.approx(run.metrics["final"]["loss"], rel=1e-3)


# --- what is refused, and what is agreed upon

@configuration
class Own(estimators.ByAdjoint):
    """An estimator of a user's own, of which nothing is known."""


@configuration
class Apart(estimators.ByAdjoint):
    by_sample = True


@configuration
class Rule(Optimiser):
    """An update rule sees no samples."""


@configuration
class Derived(Apart):
    """What it inherits from says nothing of it."""


def test_what_may_look_at_the_whole_batch_is_refused_by_name(text):
    run = config(text, {})
    parallel.refuse_shared(run)
    parallel.refuse_shared(replace(run, estimator=Apart(), optimiser=Rule()))
    for own in (Own(), Derived()):
        with pytest.raises(ValueError, match=rf"test_parallel:{type(own).__name__} is not known .* by_sample = True"):
            parallel.refuse_shared(replace(run, estimator=own))


class Two(Part):
    """The first of two ranks, the other having said `other`."""

    other = None

    def pooled(self, value):
        return [value, self.other]


def test_all_ranks_go_on_or_none_does(text, tmp_path):
    part = Two(4, 0, 2, 0, 2)
    trainer = Trainer(config(text, {}), tmp_path)
    inputs, targets = (whole[:2] for whole in trainer.task.batch(0))
    report = eplib.gradient(trainer.model, inputs, targets, estimator=estimators.DyadicEP(), solver=solvers.Relaxation())
    assert report.free.status is Status.CONVERGED
    for other in Status:
        part.__dict__["other"] = other
        assert agreed(report.free, part).status is other
        settled = Batch(trainer.model, inputs, targets, trainer.model.block, part).settle(solvers.Relaxation())
        assert settled.status is other


def test_ranks_that_have_come_apart_are_named():
    part, weights = Two(4, 0, 2, 0, 2), {"w": torch.zeros(2)}
    part.__dict__["other"] = (3, "0" * 64)
    with pytest.raises(parallel.RankError, match=r"rank 1 is at step 3, the first at 4"):
        part.check(4, weights)
    with pytest.raises(parallel.RankError, match=r"rank 1 has other weights than the first after 3 steps"):
        part.check(3, weights)


def test_alone_a_process_has_the_whole_batch():
    part, values = Part.of(3), torch.arange(3.0)
    assert (part.rows, part.share, part.leads) == (slice(0, 3), 1.0, True)
    assert part.mine(lambda size: torch.arange(size)).tolist() == [0, 1, 2]
    assert part.gathered(values) is values and part.total(values)[0] is values and part.largest(1.0, 2.0) == [1.0, 2.0]
    assert math.isnan(part.largest(math.nan)[0]) and parallel.broadcast(lambda: 5) == 5
    assert [Part(7, 7 * rank // 3, 7 * (rank + 1) // 3 - 7 * rank // 3, rank, 3).count for rank in range(3)] == [2, 2, 3]


def test_a_part_that_does_not_fit_is_refused(text, tmp_path, monkeypatch):
    trainer = Trainer(config(text, {}), tmp_path)
    with pytest.raises(ValueError, match=r"inputs have 5 samples, and the part of the batch 2; give inputs\[part.rows\]"):
        eplib.gradient(trainer.model, *trainer.task.batch(0), estimator=estimators.DyadicEP(), solver=solvers.Relaxation(),
                       part=Part(4, 0, 2))
    monkeypatch.setattr(parallel, "place", lambda: (0, 8))
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared by 8 ranks; start at most 5"):
        Part.of(5)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
