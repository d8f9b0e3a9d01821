"""What a training run is, as one validated configuration: data, model, estimator, solvers, controllers, optimiser, budget."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PlainValidator, model_validator

from . import classics  # noqa: F401  (its architectures are chosen by name)
from .config import configuration
from .controllers import Integral, Penalty
from .data import DATA
from .estimators import Beta, Estimator, second_phase
from .models import Architecture, Model
from .optimisers import Optimiser
from .solvers import Relaxation, Solver
from .starts import LinearStart
from .tasks import Dataset, Signal, Task

Positive = Annotated[int, Field(ge=1)]


@configuration
class Branch:
    """Where a run goes on from: the state that another `run` of the same store, "experiment/name-digest", kept after `step`
    updates, which is its last or one of its `keep`."""

    run: Annotated[str, Field(pattern=r"^[a-z0-9_]+/[a-z0-9][a-z0-9_.-]*-[0-9a-f]{8}$")]
    step: Positive


@configuration
class RunConfig:
    """One training run. Its digest names it in the run store, so every value here is part of its identity, and what would do
    nothing is refused.

    experiment, arm: what the run is for; the name adds learning rate and seed. gate: residual (max over the batch, each phase
    in its own unit) above which a phase makes the step a recovery step: the penalties' gradient alone is applied, by the same
    optimiser, so that momentum goes on in the block, and what has no gradient stays. A second phase within its own tolerance
    is never gated. evaluate_every: steps between evaluations during training, on `evaluation_batches` validation batches; the
    whole split is evaluated at the end. keep: steps after which the weights are kept, besides the last. start: how the free
    phase's start is predicted. audit_every: steps between audits, in which the step's gradient is compared, over block and
    embeddings and in each parameter group, with that of the linear response (which itself is compared with two trajectories).
    anneal: the nudge's beta at the last step, to which it moves linearly from the estimator's. frozen: only the readout is
    trained (negative control). adaptive: the iterations that each test image takes are measured at the end
    (`diagnostics.adaptive_compute`). branch: the run begins with the weights, moments and carried state that another one kept,
    and its first update is number branch.step of `steps`: so is its batch, and its learning rate that of the schedule of all.
    """

    experiment: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    arm: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    data: Task
    model: Architecture
    estimator: Estimator
    solver: Solver = Relaxation()
    nudged: Solver | None = None
    start: LinearStart | None = None
    penalties: tuple[Penalty, ...] = ()
    gate: Annotated[float, Field(gt=0)] | None = None
    optimiser: Annotated[Optimiser, PlainValidator(Optimiser.read)] = Optimiser()
    steps: Positive
    batch: Positive = 16
    seed: Annotated[int, Field(ge=0)] = 0
    evaluate_every: Positive = 100
    evaluation_batches: Positive = 16
    keep: tuple[Positive, ...] = ()
    audit_every: Positive | None = None
    anneal: Beta | None = None
    frozen: bool = False
    adaptive: bool = False
    branch: Branch | None = None

    @property
    def first(self) -> int:
        """The number of the first update, from 0."""
        return self.branch.step if self.branch else 0

    @property
    def second(self) -> Solver:
        """The solver of the second phase, nudged or adjoint; where the estimator has none, that of the free phase."""
        return second_phase(self.estimator, self.solver, self.nudged) or self.solver

    @property
    def plain_step(self) -> float:
        """The size of a plain step: the estimator's where it has one of its own, else the solver's."""
        return getattr(self.estimator, "step", None) or self.solver.step

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{repr(self.optimiser.lr).removesuffix('.0')}-seed{self.seed}"  # equal for equal rates only

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        kind = self.estimator.kind
        if self.model.explicit != self.estimator.explicit:
            raise ValueError(f"{self.model.described} does not fit estimator {kind}: Feedforward goes with Backprop, an "
                             "equilibrium block with any other estimator")
        self.data.fits(self.model)
        second_phase(self.estimator, self.solver, self.nudged)
        if self.start and not self.estimator.equilibrium:
            raise ValueError(f"start predicts where a free phase starts, and {kind} begins at the block's own; leave it out")
        if self.start and not self.model.clamp_shaped:
            raise ValueError(f"start predicts states of the clamp's shape, and {self.model.described} has others; leave it out")
        if self.optimiser.clipping == "apart" and not self.penalties:
            raise ValueError("optimiser.clipping apart cuts the penalties' gradient by the task's, and there are no penalties; "
                             "give clipping: together, or penalties")
        if self.optimiser.clipping == "together" and any(isinstance(getattr(one, "driven", None), Integral)
                                                         for one in self.penalties):
            raise ValueError("driven: Integral is told what the clip left of the penalties' gradient, which optimiser.clipping "
                             "together does not say, so that the strength would run to its ceiling; give clipping: apart, or "
                             "driven: null")
        if self.estimator.explicit and (self.gate or self.penalties):
            raise ValueError(f"{self.model.described} has no dynamics: its residual is zero, so gate={self.gate} would never "
                             "act, and penalties have no fixed point to act at; give gate: null and penalties: []")
        return self

    @model_validator(mode="after")
    def _measurements_fit(self) -> "RunConfig":
        kind = self.estimator.kind
        if self.first >= self.steps or any(step <= self.first for step in self.keep):
            raise ValueError(f"the run goes on after step {self.first}, so that steps {self.steps} and keep {self.keep} are to "
                             "be later ones: both count from the first step of the run that it goes on from")
        if any(step >= self.steps for step in self.keep):
            raise ValueError(f"keep {self.keep} names a step after the last, {self.steps}, or the last, which is kept anyway")
        if self.audit_every and not self.estimator.equilibrium:
            raise ValueError(f"audit_every compares gradients at one free equilibrium, which estimator {kind} does not have")
        if self.audit_every and self.audit_every > self.steps:
            raise ValueError(f"audit_every {self.audit_every} comes after the last step, {self.steps}: there would be no audit")
        if self.audit_every and self.second.max_steps < 1:
            raise ValueError(f"audit_every compares with a second phase, which {self.second.kind} of no steps cannot settle; "
                             "give nudged, or audit_every: null")
        if self.anneal and getattr(self.estimator, "beta", None) is None:
            raise ValueError(f"anneal moves the nudge's beta, which the estimator {kind} does not have")
        if self.anneal and (self.anneal == getattr(self.estimator, "beta", None) or self.steps == 1):
            raise ValueError(f"anneal {self.anneal} would move nothing in {self.steps} steps from the estimator's beta; leave "
                             "it out")
        if self.frozen and (self.penalties or self.audit_every):
            raise ValueError("frozen leaves penalties nothing to change and audits nothing to compare; give penalties: [] and "
                             "audit_every: null")
        if self.adaptive and (not self.data.labelled or self.estimator.explicit):
            raise ValueError("adaptive counts the iterations of test images; it needs Mnist or Images and an equilibrium block")
        return self

    def estimator_at(self, step: int) -> Estimator:
        """The estimator of update `step` (from 0), with its annealed beta."""
        if self.anneal is None:
            return self.estimator
        estimator: Any = self.estimator  # one that has a beta, by _measurements_fit
        first = estimator.beta
        return replace(estimator, beta=first + (self.anneal - first) * step / max(1, self.steps - 1))


def build_task(config: RunConfig, root: Path | str = DATA) -> Dataset:
    """The run's data. Raises `eplib.data.DataError` if they are not at `root`, ValueError if context or batch do not fit."""
    return config.data.load(Path(root), batch=config.batch, seed=config.seed, context=config.model.context)


def build_model(config: RunConfig, signal: Signal) -> Model:
    """The run's model with its initial weights, which depend on the seed and the shape only; `signal` is its task's."""
    torch.manual_seed(config.seed)
    return config.model.build(signal)
