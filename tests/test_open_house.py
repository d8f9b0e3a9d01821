"""One file outside the repository: a block, an estimator, a penalty, a solver and a task of one's own, named in a profile,
trained by the command, stored, found again by another process and drawn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MINE = '''
import torch
from torch import Tensor, nn

from eplib import blocks, controllers, estimators, solvers, tasks
from eplib.config import configuration


class Force(blocks.Dynamical):
    """F = x - z + gain tanh(W z), token by token."""

    def __init__(self, width: int, gain: float):
        super().__init__()
        self.mix, self.gain = nn.Linear(width, width, bias=False), gain

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x - z + self.gain * torch.tanh(self.mix(z))


@configuration
class Leaky(blocks.Block):
    gain: float = 0.5
    causal: bool = True

    def build(self, width: int, heads: int, context: int) -> Force:
        return Force(width, self.gain)


@configuration
class Neumann(estimators.ByAdjoint):
    """a = g + (I + J^T) g + .. + (I + J^T)^terms g, which tends to -J^-T g."""

    terms: int = 8

    second_phase = compiled = False

    def adjoint(self, problem, solver):
        a = problem.slope
        for _ in range(self.terms):
            a = a + problem.jacobian.transposed(a) + problem.slope
        return estimators.Adjoint(a, None, None, self.terms, {"terms": float(self.terms)})


@configuration
class Decay(controllers.Penalty):
    """strength / 2 times the block's squared weights."""

    strength: float = 0.1

    def __call__(self, problem, step, carried):
        weights = {f"block.{name}": value.detach() for name, value in problem.model.block.named_parameters()}
        value = self.strength / 2 * sum(weight.square().sum().item() for weight in weights.values())
        return controllers.Outcome({name: self.strength * weight for name, weight in weights.items()}, {"penalty": value}, 0)


@configuration
class Slowing(solvers.Relaxation):
    """Euler steps of half the length below a residual of `slow`."""

    slow: float = 1e-3

    def next(self, state, push, residual, best, history):
        step = torch.where(residual < self.slow, self.step / 2, self.step)
        return state + step.view(-1, *(1,) * (push.dim() - 1)) * push


class Counted(tasks.Dataset):
    """Windows of 0 1 2 .. count - 1 0 1 2 .."""

    def __init__(self, count: int, batch: int, seed: int, context: int):
        self.signal = tasks.Tokens(vocab=count, context=context)
        self.count, self.size, self.seed = count, batch, seed

    def windows(self, first: Tensor) -> tuple[Tensor, Tensor]:
        ids = (first[:, None] + torch.arange(self.signal.context + 1)) % self.count
        return ids[:, :-1], ids[:, 1:]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        return self.windows(torch.randint(self.count, (self.size,), generator=generator))

    def validation(self):
        yield self.windows(torch.arange(self.count))


@configuration
class Count(tasks.Task):
    count: int = 5

    def load(self, root=None, *, batch, seed=0, context=None):
        return Counted(self.count, batch, seed, context)
'''
PROFILE = """
plugins: [mine]
runs:
  tiny:
  - common:
      data: {kind: Count, count: 7}
      model: {width: 8, heads: 2, context: 4, block: {kind: Leaky, gain: 0.4}}
      solver: {kind: "mine:Slowing", step: 0.9, max_steps: 60, tol: 1.0e-5}
      penalties: [{kind: Decay, strength: 1.0e-3}]
      optimiser: {lr: 2.0e-2}
      steps: 30
      batch: 4
      evaluate_every: 10
      evaluation_batches: 1
    arms:
      series: {estimator: {kind: Neumann, terms: 30}}
      corrected: {estimator: {kind: DyadicEP}, label: linear response, colour: "#d55e00"}
"""
SEEN = """
import json
from eplib import plotting, solvers
from eplib.store import Store

plotting.use("own")
runs = Store("own").recorded("tiny")
fig, (ax,) = plotting.figure("column")
for run in runs:
    plotting.seeds(ax, run.curve["step"], [run.curve["loss"]], run.config.arm)
plotting.save(fig, "F1", "own", "tiny")
inputs, _ = run.config.data.load(batch=run.config.batch, context=4).batch(0)
slowing, plain = run.config.solver, solvers.Relaxation(step=0.9, max_steps=60, tol=1e-5)
print(json.dumps([{
    "steps": [run.model().settle(inputs, solver).steps.tolist() for solver in (slowing, plain)],
    "arm": run.config.arm,
    "kinds": [one.kind for one in (run.config.data, run.config.model.block, run.config.estimator, run.config.solver,
                                   *run.config.penalties)],
    "start": float(run.curve["loss"][0]), "final": run.metrics["final"]["loss"], "settled": run.metrics["final"]["settled"],
    "current": run.current, "columns": sorted(run.log),
    "label": plotting.label(run.config.arm), "colour": plotting.colour(run.config.arm),
    "weights": sorted(run.model().state_dict())} for run in runs]))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A folder with the file and the profile, and what runs in it."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "mine.py").write_text(MINE)
    (folder / "pipelines" / "profiles").mkdir(parents=True)
    (folder / "pipelines" / "profiles" / "own.yaml").write_text(PROFILE)

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return folder, run


def test_a_file_of_ones_own_is_trained_stored_found_again_and_drawn(house):
    folder, run = house
    said = run("-m", "pipelines.train", "--profile", "own", "--workers", "1")
    assert said.count(": done (") == 2, said
    series, corrected = json.loads(run("-c", SEEN).splitlines()[-1])
    for one in (series, corrected):
        assert one["kinds"] == ["mine:Count", "mine:Leaky", "mine:Neumann" if one is series else "DyadicEP", "mine:Slowing",
                                "mine:Decay"]
        assert one["final"] < one["start"] - 0.2 and one["settled"] == 1 and "penalty" in one["columns"]
        assert all(slowing > plain + 2 for slowing, plain in zip(*one["steps"], strict=True))  # the solver's own `next`
        assert one["current"] and "block.mix.weight" in one["weights"]
    assert "terms" in series["columns"] and "terms" not in corrected["columns"]
    assert series["final"] == pytest.approx(corrected["final"], abs=0.01)  # the same gradient, found in two ways
    assert (series["label"], corrected["label"], corrected["colour"]) == ("series", "linear response", "#d55e00")
    assert series["colour"].startswith("#") and series["colour"] != corrected["colour"]
    assert [path.name for path in sorted((folder / "figures").rglob("F1.*"))] == ["F1.csv", "F1.pdf", "F1.svg"]


def test_a_package_that_is_installed_for_good_works_from_the_repository_s_folder(tmp_path):
    """Results, data and profiles are those of the folder that one works in, wherever the library lies."""
    for package in ("eplib", "pipelines"):
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "build"))
    code = ("import eplib\nfrom eplib import data, plotting\nfrom eplib.store import Store\nfrom pipelines import common\n"
            "store = Store('paper')\nprint(eplib.__file__, len(store.recorded('mnist')))\n"
            "print(store.root, data.DATA.parent, plotting.ROOT, common.ROOT, sep='\\n')")
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=REPOSITORY / "notebooks", capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found, *folders = done.stdout.splitlines()
    there = len(list((REPOSITORY / "results" / "paper" / "runs" / "mnist").glob("*/config.json")))
    assert there and found == f"{tmp_path / 'eplib' / '__init__.py'} {there}" and folders == [str(REPOSITORY)] * 4
