"""A training run: its configuration, its data order, the loop, its log, and checkpoints that survive a kill.

Everything a step uses is a function of (configuration, step): batches come from generators seeded by (seed, epoch or step), so
a run that was killed and resumed is bit-identical, on CPU, to one that was not.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import data as corpora
from . import spectra
from .blocks import Block, Feedforward
from .config import configuration, plain
from .controllers import Penalty
from .diagnostics import READOUT, agreement, without_readout
from .estimators import BPTT, AsymEP, Backprop, Beta, DyadicEP, Estimator, ForwardMode, HolomorphicEP, asymmetry, gradient
from .files import write_atomically
from .kernels import available, knows
from .models import Backend, Classifier, EquilibriumModel, LanguageModel
from .solvers import Relaxation, Solver
from .starts import LinearStart

EXCURSION = 1e-1  # free residual (max over the batch) above which a step counts as an excursion
CHECKPOINT_SECONDS = 20.0
TAIL = 64  # steps of plain relaxation at an evaluation, at most, the last of which gives `rate_tail`

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
    """Shape of the model. `context` is the length of a text sequence; images have as many tokens as patches."""

    width: Positive = 64
    heads: Positive = 4
    context: Positive = 64
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
    def name(self) -> str:
        return f"{self.arm}-lr{self.optimiser.lr:g}-seed{self.seed}"

    @model_validator(mode="after")
    def _fits(self) -> "RunConfig":
        if isinstance(self.model.block, Feedforward) != isinstance(self.estimator, Backprop):
            raise ValueError(f"block {self.model.block.kind} does not fit estimator {self.estimator.kind}: Feedforward goes "
                             "with Backprop, an equilibrium block with any other estimator")
        if self.model.block.causal != isinstance(self.data, Text):
            raise ValueError("block.causal must be true for Text and false for Mnist")
        if any(step > self.steps for step in self.keep):
            raise ValueError(f"keep {self.keep} names a step after the last, {self.steps}")
        if self.audit_every and isinstance(self.estimator, BPTT | Backprop | ForwardMode):
            raise ValueError("audit_every compares gradients at one free equilibrium, which the estimator "
                             f"{self.estimator.kind} does not have")
        if self.anneal and not hasattr(self.estimator, "beta"):
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
        first = self.estimator.beta
        return replace(self.estimator, beta=first + (self.anneal - first) * step / max(1, self.steps - 1))


class ImageTask:
    """Patches and labels of MNIST in the run's order: a fresh permutation each epoch."""

    def __init__(self, config: RunConfig, root: Path):
        images = corpora.mnist(root)
        count = config.data.limit or len(images.train_labels)
        if count > len(images.train_labels):
            raise ValueError(f"data.limit {count} exceeds the {len(images.train_labels)} training images")
        if config.batch > count:
            raise ValueError(f"batch {config.batch} exceeds the {count} training images")
        self.config, self.patch, self.count = config, config.data.patch, count
        self.epoch, self.order = None, None  # a permutation of 60,000 takes as long as a small step's update
        self.train = self._patches(images.train_images[:count]), torch.from_numpy(images.train_labels[:count].copy()).long()
        self.test = self._patches(images.test_images), torch.from_numpy(images.test_labels.copy()).long()

    def _patches(self, images: Any) -> Tensor:
        pixels = (torch.from_numpy(images.copy()).float() / 255 - 0.1307) / 0.3081  # mean and deviation of the training pixels
        p = self.patch
        return pixels.unflatten(1, (-1, p)).unflatten(3, (-1, p)).transpose(2, 3).flatten(3).flatten(1, 2).contiguous()

    def model(self) -> EquilibriumModel:
        shape, patch = self.config.model, self.patch
        return Classifier(patch=patch**2, tokens=(28 // patch) ** 2, classes=10, width=shape.width, heads=shape.heads,
                          block=shape.block)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        per_epoch = self.count // self.config.batch
        epoch, position = divmod(step, per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator)
        chosen = self.order[position * self.config.batch:(position + 1) * self.config.batch]
        return self.train[0][chosen], self.train[1][chosen]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*(part.split(500) for part in self.test), strict=True)


class TextTask:
    """Random windows of the training split, consecutive windows of the validation split."""

    def __init__(self, config: RunConfig, root: Path):
        self.config, self.context = config, config.model.context
        self.text = corpora.text(config.data.corpus, config.data.tokens, root)
        self.vocab, ids = self.text.vocab, torch.from_numpy(self.text.ids)
        cut = int((1 - config.data.validation) * len(ids))
        self.train, self.held_out = ids[:cut], ids[cut:]

    def model(self) -> EquilibriumModel:
        shape = self.config.model
        return LanguageModel(vocab=self.vocab, width=shape.width, heads=shape.heads, context=shape.context, block=shape.block)

    def encode(self, prompt: str) -> Tensor:
        """Ids (T,) of a prompt. Raises `eplib.data.DataError` for what the vocabulary lacks, or the training split: a model has
        learned nothing of it."""
        ids = torch.tensor(self.text.encode(prompt), dtype=torch.long)
        seen = torch.bincount(self.train, minlength=self.vocab) > 0
        if not seen[ids].all():
            unseen = self.text.decode(ids[~seen[ids]].unique().tolist())
            raise corpora.DataError(f"the training split of {self.text.corpus} never has {unseen!r}, so that the model knows "
                                    f"nothing of it; choose a prompt without it, or a smaller data.validation than "
                                    f"{self.config.data.validation:g}")
        return ids

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + step)
        starts = torch.randint(len(self.train) - self.context, (self.config.batch,), generator=generator)
        windows = self.train[starts[:, None] + torch.arange(self.context + 1)]  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = (len(self.held_out) - 1) // self.context
        inputs = self.held_out[: count * self.context].view(count, self.context)
        targets = self.held_out[1: count * self.context + 1].view(count, self.context)
        yield from zip(inputs.split(32), targets.split(32), strict=True)


def build_task(config: RunConfig, root: Path | str = "data") -> ImageTask | TextTask:
    """The run's data. Raises `eplib.data.DataError` if they are not at `root`."""
    return (ImageTask if isinstance(config.data, Mnist) else TextTask)(config, Path(root))


def build_model(config: RunConfig, task: ImageTask | TextTask) -> EquilibriumModel:
    """The run's model with its initial weights, which depend on the seed and the shape only."""
    torch.manual_seed(config.seed)
    return task.model()


def fastest_backend(config: RunConfig, device: str = "cpu") -> Backend:
    """The compiled kernel where it is built and knows the run's block and what its estimator asks of it, else PyTorch."""
    graph = isinstance(config.estimator, Backprop | ForwardMode | HolomorphicEP)  # or complex states
    fits = device == "cpu" and not graph and knows(config.model.block, config.model.width, config.model.heads)
    return "compiled" if fits and available() else "torch"


@torch.no_grad()
def evaluate(model: EquilibriumModel, task: ImageTask | TextTask, solver: Solver, batches: int | None = None,
             backend: Backend = "torch") -> dict:
    """Loss (nats), accuracy (percent), and residual and steps of the free phase over the validation split or its first
    `batches` batches, over the targets that count. A sample whose phase diverged counts with the state it was left in."""
    losses, right, total, residuals, steps = [], 0, 0, [], []
    for count, (inputs, targets) in enumerate(task.validation()):
        if count == batches:
            break
        inputs, targets = _like(model, inputs), _like(model, targets)
        solution = model.settle(inputs, solver, backend=backend)
        logits, counted = model.logits(model.block.output(solution.value)), model.counted(targets)
        losses.append(model.loss_of(logits, targets)[counted > 0])
        right += model.correct(logits, targets).sum().item()
        total += counted.sum().item()
        residuals.append(solution.residual)
        steps.append(solution.steps)
    residual = torch.cat(residuals)
    return {"loss": torch.cat(losses).double().mean().item(), "accuracy": 100 * right / total,
            "residual_median": residual.median().item(), "residual_max": residual.max().item(),
            "iterations": torch.cat(steps).double().mean().item()}


def _like(model: nn.Module, a: Tensor) -> Tensor:
    return a.to(next(model.parameters()).device)


@dataclass
class Progress:
    """What a run has done so far: rows of the log, evaluations, and what it took. Seconds are kept apart from the log, which
    is the same on every machine that computes the same."""

    step: int = 0
    rows: list[dict] = field(default_factory=list)
    curve: list[dict] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    sessions: int = 0


class OutOfTime(RuntimeError):
    """The budget ended before the run did; its checkpoint is written and the run goes on from there."""


class Bar:
    """One line of progress on a terminal: step, loss, residual, iterations, rate, time left.

    It writes past Jupyter's capture, so a run inside a notebook leaves no trace of its timing in the notebook's outputs.
    """

    def __init__(self, config: RunConfig):
        self.config, self.began, self.first = config, time.monotonic(), None

    def line(self, progress: Progress) -> str:
        self.first = progress.step - 1 if self.first is None else self.first
        row = progress.rows[-1]
        left = (time.monotonic() - self.began) / (progress.step - self.first) * (self.config.steps - progress.step)
        return (f"{self.config.experiment}/{self.config.name} {progress.step}/{self.config.steps}  loss {row['loss']:.3f}  "
                f"residual {row['free_residual_max']:.1e}  iterations {row['iterations_max']}  rate {row['rate_probe']:.3f}  "
                f"{left:.0f} s left")


def show_on_terminal(line: str) -> None:
    """Replaces the last line of a terminal's standard error; silent where there is no terminal."""
    if sys.__stderr__ is not None and sys.__stderr__.isatty():
        sys.__stderr__.write(f"\r{line}\x1b[K")
        sys.__stderr__.flush()


class Trainer:
    """Runs one configuration. `advance` trains to the end or to the deadline, checkpointing on the way."""

    def __init__(self, config: RunConfig, folder: Path, root: Path | str = "data", device: str = "cpu",
                 backend: Backend = "torch"):
        """folder: where the checkpoint and the kept weights go. device: where the run is trained, e.g. "cuda". backend: what
        computes its phases."""
        self.config, self.folder, self.backend = config, Path(folder), backend
        self.task = build_task(config, root)
        self.model = build_model(config, self.task).to(device)
        if config.frozen:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.split(".")[0] in READOUT)
        self.average = deepcopy(self.model).requires_grad_(False) if config.optimiser.ema else self.model
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=config.optimiser.lr, betas=(0.9, 0.95),
                                           weight_decay=config.optimiser.weight_decay)
        self.state: dict[str, Any] = {}
        self.progress = Progress()
        if self.checkpoint.exists():
            self._load()
        self.progress.sessions += 1

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def weights(self, step: int) -> Path:
        """Where the evaluated weights after `step` updates are kept."""
        return self.folder / f"step-{step:06d}.safetensors"

    def advance(self, deadline: float = math.inf, show: Callable[[str], None] = show_on_terminal) -> Progress:
        """Trains on. Raises `OutOfTime` at `deadline` (of time.monotonic), with everything so far checkpointed.

        show: takes a line of progress, twice a second.
        """
        saved, shown, bar = time.monotonic(), 0.0, Bar(self.config)
        while self.progress.step < self.config.steps:
            if time.monotonic() > deadline:
                self._save()
                raise OutOfTime(f"{self.config.name}: stopped at step {self.progress.step} of {self.config.steps}")
            began = time.perf_counter()
            self._step()
            self.progress.seconds.append(time.perf_counter() - began)
            step = self.progress.step
            if self._evaluates(step):
                self._evaluate(step)
            if step in self.config.keep or step == self.config.steps:
                write_atomically(self.weights(step), save(self.average.state_dict()))
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
            if time.monotonic() - shown > 0.5:
                shown = time.monotonic()
                show(bar.line(self.progress))
        self._save()
        return self.progress

    def _evaluates(self, step: int) -> bool:
        return step % self.config.evaluate_every == 0 or step == self.config.steps

    def _step(self) -> None:
        config, step = self.config, self.progress.step
        estimator = config.estimator_at(step)
        inputs, targets = (_like(self.model, part) for part in self.task.batch(step))
        report = gradient(self.model, inputs, targets, estimator=estimator, solver=config.solver, nudged=config.nudged,
                          penalties=config.penalties, state=self.state, start=config.start, backend=self.backend)
        self.state = report.state
        odd = math.nan
        if report.grads is not None and report.adjoint is not None and self._evaluates(step + 1):
            with torch.no_grad():
                jacobian = self.model.block.linearise(report.free.value, self.model.clamp(inputs))
            odd = asymmetry(jacobian, report.adjoint)
        audited = config.audit_every is not None and (step + 1) % config.audit_every == 0
        audit, extra = self._audit(inputs, targets, report.grads) if audited else ({"audit_cosine": math.nan}, 0)
        worst = report.free.residual.max().item()
        gated = config.gate is not None and not worst <= config.gate
        grads = None if gated else report.grads
        total = {name: None for name, _ in self.model.named_parameters()}
        for part in (grads or {}, report.penalty_grads):
            for name, value in part.items():
                total[name] = value if total[name] is None else total[name] + value
        known = [value for value in total.values() if value is not None]
        norm = torch.stack([value.norm() for value in known]).norm().item() if known else 0.0
        rate = config.optimiser.rate(step, config.steps)
        if math.isfinite(norm) and known:
            scale = min(1.0, config.optimiser.clip / (norm + 1e-12))
            for name, parameter in self.model.named_parameters():
                parameter.grad = None if total[name] is None else total[name] * scale
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.step()
            self.optimiser.zero_grad()
        if self.average is not self.model:
            # the average forgets its start: early in training it follows the weights closely
            decay = min(config.optimiser.ema, (1 + step) / (10 + step))
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value.detach(), 1 - decay)
        self.progress.step += 1
        nudged = report.nudged.residual if report.nudged else torch.full((1,), torch.nan)
        self.progress.rows.append({
            "step": self.progress.step, "loss": report.loss,
            "free_residual_median": report.free.residual.median().item(), "free_residual_max": worst,
            "nudged_residual_median": nudged.median().item(), "nudged_residual_max": nudged.max().item(),
            "iterations_mean": report.free.steps.double().mean().item(), "iterations_max": report.free.steps.max().item(),
            "nudged_iterations_max": report.nudged.steps.max().item() if report.nudged else 0,
            "rate_tail": max(report.free.rate[report.free.rate.isfinite()].tolist(), default=math.nan),
            "rate_probe": report.measured.get("rate_probe", math.nan), "penalty": report.measured.get("penalty", math.nan),
            "coefficient": report.measured.get("coefficient", math.nan),
            "displacement": report.measured.get("displacement", math.nan),
            "beta": getattr(estimator, "beta", math.nan), "asymmetry": odd,
            "fallbacks": report.free.fallbacks + (report.nudged.fallbacks if report.nudged else 0),
            "gradient_norm": norm, "lr": rate,
            "gated": int(gated), "skipped": int(not (math.isfinite(norm) and known)), "status": report.status.value,
            "force_evaluations": report.measured["force_evaluations"] + extra} | audit)

    def _audit(self, inputs: Tensor, targets: Tensor, grads: dict[str, Tensor] | None) -> tuple[dict[str, float], int]:
        """Cosine and norm ratio of the step's gradient against the linear response's (of the linear response against two
        trajectories), over block and embeddings and in each parameter group, and the audit's force evaluations."""
        config = self.config
        linear = isinstance(config.estimator, DyadicEP)
        kind = AsymEP(beta=config.estimator.beta, steps=config.estimator.steps) if linear else DyadicEP()
        other = gradient(self.model, inputs, targets, estimator=kind, solver=config.solver, nudged=config.nudged,
                         backend=self.backend)
        found = {"audit_cosine": math.nan}
        if grads is not None and other.grads is not None:
            total = agreement(without_readout(grads), without_readout(other.grads))["total"]
            found = {"audit_cosine": total.cosine, "audit_ratio": total.ratio}
            found |= {f"audit_{group}": one.cosine for group, one in agreement(grads, other.grads).items() if group != "total"}
        return found, other.measured["force_evaluations"]

    def _evaluate(self, step: int) -> None:
        row = {"step": step} | evaluate(self.average, self.task, self.config.solver, self.config.evaluation_batches,
                                        self.backend)
        if not self.average.block.explicit:
            inputs = _like(self.model, self.task.batch(0)[0][:4])
            solution = self.average.settle(inputs, self.config.solver)
            if solution.status.usable:
                with torch.no_grad():
                    jacobian = self.average.block.linearise(solution.value, self.average.clamp(inputs))
                step = self.config.solver.step
                row |= spectra.edges(spectra.eigenvalues(jacobian, solution.value, step), step)
                relaxed = self.average.settle(inputs, Relaxation(step=step, max_steps=TAIL, tol=1e-5))
                row |= {"numerical_abscissa": spectra.numerical_abscissa(jacobian, solution.value).max().item(),
                        "rate_tail": relaxed.rate.max().item()}
        self.progress.curve.append(row)

    def _save(self) -> None:
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not self.model:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v for k, v in slots.items()}
        tensors |= {f"state.{k}": v for k, v in self.state.items()}
        header = {"config": json.dumps(plain(self.config)), "progress": json.dumps(vars(self.progress))}
        write_atomically(self.checkpoint, save({k: v.contiguous() for k, v in tensors.items()}, metadata=header))

    def _load(self) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimiser": {}, "state": {}}
        try:
            with safe_open(self.checkpoint, "pt", device=str(next(self.model.parameters()).device)) as file:
                header = file.metadata() or {}
                if json.loads(header.get("config", "null")) != plain(self.config):
                    raise ValueError(f"{self.checkpoint} belongs to another configuration; remove it or use another folder")
                for key in file.keys():
                    part, name = key.split(".", 1)
                    parts[part][name] = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{self.checkpoint} is damaged ({error}); remove it, and the run starts from its first step") \
                from error
        self.model.load_state_dict(parts["model"])
        if self.average is not self.model:
            self.average.load_state_dict(parts["average"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimiser"].items():
            index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": slots})
        self.state = parts["state"]
        self.progress = Progress(**json.loads(header["progress"]))
