"""What a training run is, as one validated configuration: data, model, estimator, solvers, controllers, optimiser, budget."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .blocks import Block, Feedforward
from .config import configuration
from .contrast import Beta
from .controllers import Penalty
from .estimators import Backprop, Estimator
from .solvers import Relaxation, Solver
from .starts import LinearStart

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@configuration
class Mnist:
    """MNIST in square patches; `limit` takes the first training images only, the test set is always whole."""

    kind: Literal["Mnist"] = "Mnist"
    patch: Literal[4, 7, 14] = 7
    limit: Positive | None = None


@configuration
class Text:
    """A corpus in tokens; the last `validation` share of it is the validation split."""

    kind: Literal["Text"] = "Text"
    corpus: Literal["plays", "tinyshakespeare", "tinystories"]
    tokens: Literal["chars", "bpe1024", "bpe4096"] = "chars"
    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.1


@configuration
class Architecture:
    """Shape of the model. `context` is the length of a text sequence; images have none but as many tokens as patches."""

    width: Positive = 64
    heads: Positive = 4
    context: Positive | None = None
    block: Block


@configuration
class Optimiser:
    """AdamW under a warm-up, stable, decay (WSD) schedule.

    lr: peak rate. warmup: share of the steps that rise linearly to it. decay: share at the end that falls linearly to zero.
    clip: largest gradient norm. ema: decay per step of the parameter average that is evaluated; 0 evaluates the weights.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-3
    warmup: Fraction = 0.05
    decay: Fraction = 0.25
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of update `step` (from 0) of `steps`."""
        rise = (step + 1) / max(1.0, self.warmup * steps)
        fall = (steps - step) / max(1.0, self.decay * steps)
        return self.lr * min(1.0, rise, fall)


@configuration
class RunConfig:
    """One training run. Its digest names it in the run store, so every value here is part of its identity.

    experiment, arm: what the run is for; the name adds learning rate and seed. gate: free residual (max over the batch) above
    which the step is a recovery step: the penalties' gradient alone is applied. evaluate_every: steps between evaluations
    during training, on `evaluation_batches` validation batches; the whole split is evaluated at the end. keep: steps after
    which the weights are kept, besides the last. start: how the free phase's start is predicted. audit_every: steps between
    audits, in which the step's gradient is compared, over block and embeddings and in each parameter group, with that of the
    linear response (which itself is compared with two trajectories). anneal: the nudge's beta at the last step, to which it
    moves linearly from the estimator's. frozen: only the readout is trained (negative control). adaptive: the iterations that
    each test image takes are measured at the end (`diagnostics.adaptive_compute`).
    """

    experiment: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    arm: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
    data: Annotated[Mnist | Text, Field(discriminator="kind")]
    model: Architecture
    estimator: Estimator
    solver: Solver = Relaxation()
    nudged: Solver | None = None
    start: LinearStart | None = None
    penalties: tuple[Penalty, ...] = ()
    gate: Annotated[float, Field(gt=0)] | None = None
    optimiser: Optimiser = Optimiser()
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

    @property
    def second(self) -> Solver:
        """The solver of the second phase, nudged or adjoint."""
        steps = getattr(self.estimator, "steps", None)
        return self.nudged or (self.solver.limited(steps) if steps else self.solver)

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.optimiser.lr:g}-seed{self.seed}"

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        if isinstance(self.model.block, Feedforward) != isinstance(self.estimator, Backprop):
            raise ValueError(f"block {self.model.block.kind} does not fit estimator {self.estimator.kind}: Feedforward goes "
                             "with Backprop, an equilibrium block with any other estimator")
        if self.model.block.causal != isinstance(self.data, Text):
            raise ValueError("block.causal must be true for Text and false for Mnist")
        if isinstance(self.data, Text) != (self.model.context is not None):
            raise ValueError(f"model.context = {self.model.context} for {self.data.kind}: a text needs the length of its "
                             "sequences, images have as many tokens as patches; give a context to Text and none to Mnist")
        if any(step > self.steps for step in self.keep):
            raise ValueError(f"keep {self.keep} names a step after the last, {self.steps}")
        if self.audit_every and not self.estimator.equilibrium:
            raise ValueError("audit_every compares gradients at one free equilibrium, which the estimator "
                             f"{self.estimator.kind} does not have")
        if self.anneal and getattr(self.estimator, "beta", None) is None:
            raise ValueError(f"anneal moves the nudge's beta, which the estimator {self.estimator.kind} does not have")
        if self.frozen and (self.penalties or self.audit_every):
            raise ValueError("frozen leaves penalties nothing to change and audits nothing to compare; give penalties: [] and "
                             "audit_every: null")
        if self.adaptive and (isinstance(self.data, Text) or isinstance(self.estimator, Backprop)):
            raise ValueError("adaptive counts the iterations of MNIST's test images; it needs Mnist and an equilibrium block")
        return self

    def estimator_at(self, step: int) -> Estimator:
        """The estimator of update `step` (from 0), with its annealed beta."""
        if self.anneal is None:
            return self.estimator
        estimator: Any = self.estimator  # one that has a beta, by _fits
        first = estimator.beta
        return replace(estimator, beta=first + (self.anneal - first) * step / max(1, self.steps - 1))
