"""A finished run: its configuration, metrics, logs and, where they are kept here, its weights."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy

from ..diagnostics import agreement
from ..estimators import BPTT, DyadicEP, gradient
from ..files import write_atomically
from ..models import Model
from ..runconfig import Branch
from ..solvers import Anderson, Relaxation
from ..sources import source_digest
from ..tasks import Dataset
from ..trained import Trained, load
from ..training import RunConfig, build_task
from .formats import columns, to_json

PROMPT = "The king"  # of the recorded samples of text


def state_path(checkpoints: Path, run: str, step: int) -> Path:
    """Where a profile's checkpoints keep that with which another run goes on from `run`, "experiment/name-digest"."""
    return checkpoints / "states" / run / f"step-{step:06d}.safetensors"


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Run:
    """A finished run as a store holds it.

    folder: <root>/results/<profile>/runs/<experiment>/<name>. train: the store's function from a configuration to its run.
    """

    config: RunConfig
    folder: Path
    train: Callable[..., "Run"] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Of its folders: what it is called, and the digest of what differs from the defaults."""
        return self.folder.name

    @property
    def root(self) -> Path:
        """Of the store: data, results and checkpoints lie in it."""
        return self.folder.parents[4]

    @property
    def weights_folder(self) -> Path:
        """Of what stays here: weights, and the log of every step."""
        return self._part("weights")

    @property
    def machine_folder(self) -> Path:
        """Of what depends on the machine that trained it."""
        return self._part("machine/runs")

    def _part(self, part: str) -> Path:
        return self.folder.parents[2] / part / self.folder.parent.name / self.name

    @cached_property
    def recorded_config(self) -> dict:
        """The configuration as it was recorded, whole: what a default was then is in it."""
        return json.loads((self.folder / "config.json").read_text())

    @cached_property
    def metrics(self) -> dict:
        return json.loads((self.folder / "metrics.json").read_text())

    @cached_property
    def provenance(self) -> dict:
        return json.loads((self.folder / "provenance.json").read_text())

    @property
    def notes(self) -> dict[str, str]:
        """What of a run of older source is not as today's would record it, by the name of what it is about."""
        return self.provenance.get("notes", {})

    @property
    def current(self) -> bool:
        """Whether the source that recorded the run is today's, of what the run uses, and the state that it began with the one
        that its origin has kept, where that is here. Of a run recorded before that state was noted, the source decides."""
        if self.provenance["source"] != source_digest(self.config):
            return False
        noted, branch = self.provenance.get("origin"), self.config.branch
        kept = noted and branch and state_path(self.root / "checkpoints" / self.folder.parents[2].name, branch.run, branch.step)
        return not kept or not kept.exists() or digest_of(kept) == noted

    def has_weights(self, step: int | None = None) -> bool:
        """Whether the weights after `step` updates (the last by default) are kept here."""
        return self._weights(step).exists()

    def _weights(self, step: int | None) -> Path:
        return self.weights_folder / f"step-{step or self.config.steps:06d}.safetensors"

    @cached_property
    def log(self) -> dict[str, numpy.ndarray]:
        """The log in windows of steps (`summary.windows`): `step` is the last of each."""
        return columns(self.folder / "log.csv.gz")

    @cached_property
    def full_log(self) -> dict[str, numpy.ndarray] | None:
        """The log of every step (steps,); None where it is not here: it does not travel."""
        path = self.weights_folder / "log.csv.gz"
        return columns(path) if path.exists() else None

    @cached_property
    def curve(self) -> dict[str, numpy.ndarray]:
        """The evaluations during training (evaluations,), after the updates `step`, which had spent `force_evaluations`."""
        return columns(self.folder / "curve.csv")

    @cached_property
    def seconds(self) -> numpy.ndarray | None:
        """Seconds of training up to each evaluation of `curve`, on the machine that trained the run; None where these did not
        travel with it."""
        path = self.machine_folder / "timing.csv"
        return columns(path)["seconds"] if path.exists() else None

    def task(self) -> Dataset:
        """What the run learned from. Raises `data.DataError` where it is not at the store's data."""
        return build_task(self.config, self.root / "data")

    def trained(self, step: int | None = None) -> Trained:
        """The evaluated weights after `step` updates (the last by default) in the run's model, with its vocabulary.

        Raises FileNotFoundError if they were not kept here: weights do not travel with a run's results.
        """
        path = self._weights(step)
        if not path.exists():
            raise FileNotFoundError(f"the weights of {self.config.name} after step {step or self.config.steps} are not at "
                                    f"{path}; train the run here, or add the step to its `keep`")
        return load(path)

    def model(self, step: int | None = None) -> Model:
        """The model of `trained`."""
        return self.trained(step).model

    def export(self, path: Path | str, step: int | None = None) -> Path:
        """Writes what `trained` gives to one file, which `eplib.load` reads without the data and without this store."""
        return self.trained(step).save(path)

    def generate(self, prompt: str = PROMPT, tokens: int = 200, temperature: float = 0.8, seed: int = 0,
                 step: int | None = None, *, top_k: int | None = None) -> str:
        """`Trained.generate` of the weights after `step` updates. Raises FileNotFoundError without weights here."""
        return self.trained(step).generate(prompt, tokens, temperature, seed, top_k=top_k)

    def extend(self, steps: int, **how: Any) -> "Run":
        """The run that goes on from here for `steps` updates more, with weights, moments and carried state; of the experiment
        `extended`, which no profile prunes. Its learning rate is that of the schedule over all its steps, so it rises again
        where this run's had fallen; an annealed beta stays where it ended. how: as of `Store.run`. Raises FileNotFoundError
        where the state was not kept here."""
        branch = Branch(run=f"{self.config.experiment}/{self.name}", step=self.config.steps)
        longer = replace(self.config, experiment="extended", branch=branch, steps=self.config.steps + steps, keep=(),
                         estimator=self.config.estimator_at(self.config.steps - 1), anneal=None)
        return self.train(longer, **how)

    @property
    def sample(self) -> str | None:
        """The text recorded with the run, where its profile asks for one: weights do not travel with results, it does."""
        path = self.folder / "sample.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def horizon(self, steps: Iterable[int]) -> list[dict[str, float]]:
        """The horizon that BPTT needs at the last weights, on the batch after the run's last: a row for each number of steps.

        `residual`, the worst sequence's |F| / |z| after so many steps of plain relaxation at the run's `plain_step`; `cosine`
        and `ratio` of BPTT's gradient over them (block and embeddings) to that of the settled phases, whose own free residual
        is `settled`.
        Raises FileNotFoundError without weights here, ValueError if a phase diverges.
        """
        model, step = self.model(), self.config.plain_step
        batch = self.task().batch(self.config.steps)
        exact = gradient(model, *batch, estimator=DyadicEP(), solver=Anderson(step=step, max_steps=200, tol=1e-6),
                         nudged=Anderson(step=step, max_steps=200, tol=1e-5))
        rows = []
        for count in steps:
            found = gradient(model, *batch, estimator=BPTT(steps=count), solver=Relaxation(step=step))
            if found.grads is None or exact.grads is None:
                raise ValueError(f"{self.config.name}: a phase diverged at the last weights, so no gradient can be compared")
            agreed = agreement(*map(model.without_readout, (found.grads, exact.grads)))["total"]
            rows.append({"steps": count, "residual": found.free.residual.max().item(), "cosine": agreed.cosine,
                         "ratio": agreed.ratio, "settled": exact.free.residual.max().item()})
        return rows

    def record_horizon(self, steps: Iterable[int]) -> list[dict[str, float]]:
        """`horizon`, kept with the run's results, where it travels as the weights do not."""
        rows = self.horizon(steps)
        write_atomically(self.folder / "horizon.json", to_json(rows))
        return rows

    @property
    def recorded_horizon(self) -> list[dict[str, float]] | None:
        """What `record_horizon` kept."""
        path = self.folder / "horizon.json"
        return json.loads(path.read_text()) if path.exists() else None
