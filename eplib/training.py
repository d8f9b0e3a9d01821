"""A training run: the loop, what a step does and logs, and checkpoints that survive a kill.

Everything a step uses is a function of (configuration, step): batches come from generators seeded by (seed, epoch or step), so
a run that was killed and resumed is bit-identical, on CPU, to one that was not. On several ranks (`parallel`) every one goes
through the same steps with its part of each batch; the first alone reads, writes and shows.
"""

import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoints
from .config import plain
from .controllers import KEPT
from .diagnostics import agreement
from .estimators import AsymEP, DyadicEP, Estimator, Report, asymmetry, at_state, gradient
from .evaluation import EXCURSION, edges, evaluate, moved
from .kernels import available
from .log import Bar, Progress, Value, show_on_terminal
from .models import Backend, Transformer
from .parallel import Part, broadcast, refuse_shared
from .runconfig import Optimiser, RunConfig, build_model, build_task
from .tasks import Mnist, Text
from .trained import Trained
from .updates import clipped, follow, gates, phases

__all__ = ["EXCURSION", "Mnist", "Optimiser", "OutOfTime", "Progress", "RunConfig", "Text", "Trainer", "Transformer",
           "build_model", "build_task", "evaluate", "fastest_backend", "show_on_terminal"]

CHECKPOINT_SECONDS = 20.0
AUDIT_BETA = 0.2  # of the two trajectories with which an audit compares the linear response
ALWAYS = ("rate_probe", "penalty", "coefficient", "displacement", "audit_cosine")  # columns of every log, measured or not


def fastest_backend(config: RunConfig, device: str = "cpu") -> Backend:
    """The compiled kernel where it is built and knows the run's block and what its estimator and solvers ask of it, else
    PyTorch."""
    fits = device == "cpu" and config.estimator.compiled and config.model.in_kernel
    fits = fits and config.solver.coarse is None and config.second.coarse is None
    return "compiled" if fits and available() else "torch"


class OutOfTime(RuntimeError):
    """The budget ended before the run did; its checkpoint is written and the run goes on from there."""


class Trainer:
    """Runs one configuration. `advance` trains to the end or to the deadline, checkpointing on the way."""

    def __init__(self, config: RunConfig, folder: Path, root: Path | str = "data", device: str = "cpu",
                 backend: Backend = "torch", origin: Path | None = None):
        """folder: where the checkpoint, the kept weights and states go. device: where the run is trained, e.g. "cuda". backend:
        what computes its phases. origin: the state that a run with a `branch` begins with.

        Raises ValueError for a checkpoint of another configuration, and for an origin whose weights have other names or shapes
        than the model's; on several ranks for a part of the configuration that cannot be shared out.
        """
        self.config, self.folder, self.backend, self.part = config, Path(folder), backend, Part.of(config.batch)
        if self.part.ranks > 1:
            refuse_shared(config)
        self.task = build_task(config, root)
        self.model = build_model(config, self.task.signal).to(device)
        if config.frozen:
            readout = self.model.groups()["readout"]
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in readout)
        self.average = deepcopy(self.model).requires_grad_(False) if config.optimiser.ema else self.model
        self.optimiser = config.optimiser.build(self.model.parameters())
        self.state: dict[str, Any] = {}
        self.progress = Progress()
        self._begin(origin)
        self.part.check(self.progress.step, self._tensors())
        self.progress.sessions += 1

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def weights(self, step: int) -> Path:
        """Where the evaluated weights after `step` updates are kept."""
        return self.folder / f"step-{step:06d}.safetensors"

    def kept_state(self, step: int) -> Path:
        """Where that is kept with which another run goes on after `step` updates: weights, moments, carried state."""
        return self.folder / f"state-{step:06d}.safetensors"

    def advance(self, deadline: float = math.inf, show: Callable[[str], None] = show_on_terminal) -> Progress:
        """Trains on. Raises `OutOfTime` at `deadline` (of time.monotonic), with everything so far checkpointed.

        show: takes a line of progress, twice a second.
        """
        saved, shown, bar = time.monotonic(), 0.0, Bar(f"{self.config.experiment}/{self.config.name}", self.config.steps)
        while self.progress.step < self.config.steps:
            if deadline < math.inf and self.part.largest(time.monotonic() > deadline)[0]:
                self._save()
                raise OutOfTime(f"{self.config.name}: stopped at step {self.progress.step} of {self.config.steps}")
            began = time.perf_counter()
            self._step()
            self.progress.seconds.append(time.perf_counter() - began)
            step = self.progress.step
            if self.part.leads and time.monotonic() - shown > 0.5:
                shown = time.monotonic()  # before anything is written: who shows may have lost the run, and stop it
                show(bar.line(self.progress))
            if self._evaluates(step):
                self._evaluate(step)
            if step in self.config.keep or step == self.config.steps:
                self._keep(step)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        self._save()
        return self.progress

    def _evaluates(self, step: int) -> bool:
        return step % self.config.evaluate_every == 0 or step == self.config.steps

    def _step(self) -> None:
        """One update and its row of the log. Gate, audit and asymmetry see the weights that the gradient was taken at."""
        config, step = self.config, self.progress.step
        estimator = config.estimator_at(step)
        batch = self.task.batch(step)
        part = Part.of(len(batch[0]))
        inputs, targets = (moved(self.model, whole[part.rows]) for whole in batch)
        report = gradient(self.model, inputs, targets, estimator=estimator, solver=config.solver, nudged=config.nudged,
                          penalties=config.penalties, state=self.state, start=config.start, backend=self.backend, part=part)
        self.state = report.state
        gated, gated_nudged = gates(report, config.gate, config.second)
        row: dict[str, Value] = {"step": step + 1, "loss": report.loss} | phases(report, config.solver, config.second) | {
            "beta": getattr(estimator, "beta", None) or math.nan,
            "asymmetry": self._asymmetry(inputs, report) if self._evaluates(step + 1) else math.nan,
            "gated": int(gated), "gated_nudged": int(gated_nudged)}
        audit: dict[str, float] = {"audit_evaluations": 0}
        if config.audit_every is not None and (step + 1) % config.audit_every == 0:
            audit = self._audit(inputs, targets, estimator, report, part)
        task = report.grads if math.isfinite(report.loss) and not gated and not gated_nudged else None
        rate = config.optimiser.rate(step, config.steps)
        row |= self._apply(task or {}, report.penalty_grads, rate) | audit
        if self.average is not self.model:
            follow(self.average, self.model, min(config.optimiser.ema, (1 + step) / (10 + step)))
        if taken := sorted(row.keys() & report.measured.keys()):
            raise ValueError(f"the estimator or a penalty measures {', '.join(taken)}, a column of the log already; rename it")
        self.progress.step += 1
        self.progress.rows.append(dict.fromkeys(ALWAYS, math.nan) | row | dict(report.measured))

    def _apply(self, task: dict[str, Tensor], penalties: dict[str, Tensor], rate: float) -> dict[str, Value]:
        """One step of the optimiser along both gradients, clipped, and what the log says of it. Without any gradient, or with
        one that is not finite, weights and moments stay as they are. A parameter that has no gradient, frozen or outside of
        what a penalty reaches, neither moves nor decays."""
        cut = clipped(task, penalties, self.config.optimiser)
        if penalties and self.config.optimiser.clipping == "apart":  # a penalty that asks for nothing was not cut
            self.state |= {f"penalty{i}.{KEPT}": torch.tensor(cut.kept) for i in range(1, 1 + len(self.config.penalties))}
        if cut.usable:
            for name, parameter in self.model.named_parameters():
                parameter.grad = cut.gradient.get(name)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.step()
            self.optimiser.zero_grad()
        return {"gradient_norm": cut.norm, "penalty_norm": cut.penalty_norm, "penalty_kept": cut.kept, "lr": rate,
                "skipped": int(not cut.usable), "task_gradient": int(bool(task) and cut.usable)}

    def _asymmetry(self, inputs: Tensor, report: Report) -> float:
        if report.grads is None or report.adjoint is None:
            return math.nan
        with torch.no_grad():
            jacobian = self.model.block.linearise(report.free.value, self.model.clamp(inputs))
        return self.part.largest(asymmetry(jacobian, report.adjoint))[0]

    def _audit(self, inputs: Tensor, targets: Tensor, estimator: Estimator, report: Report, part: Part) -> dict[str, float]:
        """Cosine and norm ratio of the step's gradient against the linear response's (of the linear response's against that of
        two trajectories), over block and embeddings and in each parameter group, and the audit's force evaluations. Both are
        taken at the step's own free state, their second phases solved alike."""
        linear = estimator.linear
        other = at_state(self.model, inputs, targets, report.free.value, AsymEP(beta=AUDIT_BETA) if linear else DyadicEP(),
                         self.config.second, backend=self.backend, part=part)
        found = {"audit_evaluations": other.measured["force_evaluations"],
                 "audit_residual": report.free.residual.max().item(),
                 "audit_displacement": report.measured.get("displacement", math.nan)}
        if report.grads is not None and other.grads is not None:
            total = agreement(*map(self.model.without_readout, (report.grads, other.grads)))["total"]
            found |= {"audit_cosine": total.cosine, "audit_ratio": total.ratio}
            found |= {f"audit_{group}": one.cosine for group, one in agreement(report.grads, other.grads).items()
                      if group != "total"}
        return found

    def predicted_start(self, x: Tensor) -> Tensor | None:
        """Where training's free phase starts under the clamp x: as the run predicts it, None for the block's own start."""
        return self.config.start(x, self.state) if self.config.start else None

    def _evaluate(self, step: int) -> None:
        solver = self.config.solver
        self.part.check(step, self._tensors())
        self.progress.curve.append(
            {"step": step} | evaluate(self.average, self.task, solver, self.config.evaluation_batches, self.backend,
                                      part=self.part)
            | edges(self.average, self.task.batch(0)[0], solver, self.config.penalties))

    def _keep(self, step: int) -> None:
        if not self.part.leads:
            return
        Trained(self.config, step, self.average, self.task.signal, self.task.vocabulary).save(self.weights(step))
        checkpoints.write(self.kept_state(step), self._tensors(), {"config": plain(self.config)})

    def _tensors(self) -> dict[str, Tensor]:
        """All that a step changes, but for what it has logged."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.average is not self.model:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v for k, v in slots.items()}
        return tensors | {f"state.{k}": v for k, v in self.state.items()}

    def _restore(self, parts: checkpoints.Parts) -> None:
        self.model.load_state_dict(parts["model"])
        if self.average is not self.model:
            self.average.load_state_dict(parts["average"] or parts["model"])
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimiser"].items():
            index, slot = name.split(".")
            slots.setdefault(int(index), {})[slot] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": slots})
        self.state = parts["state"]

    def _save(self) -> None:
        if self.part.leads:
            header = {"config": plain(self.config), "progress": self.progress.header()}
            checkpoints.write(self.checkpoint, self._tensors() | self.progress.tensors(), header)

    def _begin(self, origin: Path | None) -> None:
        """Goes on from the run's checkpoint, else from the origin of its branch, as the first rank has them."""
        resumes = broadcast(self.checkpoint.exists)
        if not resumes and not self.config.branch:
            return
        source = self.checkpoint if resumes else origin or Path()
        if self.part.leads and not source.name:
            raise ValueError(f"{self.config.name} goes on from {self.config.branch}: give the state of that run as origin")
        tensors, header = broadcast(lambda: checkpoints.read(source))
        if resumes and header.get("config") != plain(self.config):
            raise ValueError(f"{self.checkpoint} belongs to another configuration; remove it or use another folder")
        device = next(self.model.parameters()).device
        parts = checkpoints.by_part({name: value.to(device) for name, value in tensors.items()})
        try:
            self._restore(parts)
        except RuntimeError as error:
            raise ValueError(f"{self.config.name} cannot go on from {source}, which is of another model: "
                             f"{str(error).splitlines()[-1].strip()}") from None
        self.progress = Progress.restored(parts, header["progress"]) if resumes else Progress(step=self.config.first)
