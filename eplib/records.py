"""The run store: what was trained, with which configuration and by which source, and the results that notebooks write.

    results/<profile>/runs/<experiment>/<name>-<digest>/    config.json metrics.json log.csv.gz curve.csv provenance.json
                                                            (sample.txt, horizon.json where they were asked for)
    results/<profile>/weights/<experiment>/<name>-<digest>/ step-000300.safetensors
    results/<profile>/machine/runs/<experiment>/<name>-<digest>/ machine.json timing.csv   (times and host, kept apart)

The digest is that of the whole configuration, so a changed configuration can never show an old result.
"""

import ast
import csv
import gzip
import io
import json
import math
import platform
import re
import shutil
import statistics
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from safetensors.torch import load_file

from . import data
from .config import ConfigurationError, digest, parse, plain
from .diagnostics import adaptive_compute, agreement, without_readout
from .estimators import BPTT, DyadicEP, gradient
from .models import Backend, EquilibriumModel
from .solvers import Anderson, FixedHorizon, Relaxation, Substitution
from .training import EXCURSION, Progress, RunConfig, Text, Trainer, build_model, build_task, evaluate, fastest_backend, \
    show_on_terminal, write_atomically

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ("blocks", "calculus", "config", "contrast", "controllers", "data", "diagnostics", "estimators", "horizons",
          "kernels/__init__", "models", "solvers", "spectra", "starts", "training")
KERNEL = Path(__file__).parent / "kernels" / "thick.cpp"
NOISE = 1.0  # of the noisy copy of the test images, in standard deviations of the training pixels
PROMPT = "The king"  # of the recorded samples of text
CONVERGED = Substitution(step=0.8, max_steps=60, tol=1e-4)  # "at the converged fixed point"


def _without_comments(path: Path) -> str:
    """Source text of a module without comments, docstrings and blank lines: what its results depend on."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) \
                and isinstance(body[0].value.value, str):
            first, last = body[0].lineno - 1, body[0].end_lineno - 1
            if not (lines[first].encode()[:body[0].col_offset] + lines[last].encode()[body[0].end_col_offset:]).strip():
                lines[first:last + 1] = [""] * (last + 1 - first)  # but a line that holds code as well stays
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1][column:column + 1] == "#":
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache  # a process computes with the source it has loaded, and a store asks for every run
def source_digest() -> str:
    """Digest of the library source that a run's numbers depend on; comments and docstrings do not count."""
    folder = Path(__file__).parent
    text = "\n".join(_without_comments(folder / f"{name}.py") for name in SOURCE)
    return sha256((text + KERNEL.read_text(encoding="utf-8")).encode()).hexdigest()[:12]


def save_result(profile: str, experiment: str, name: str, value: Any) -> Path:
    """Writes a notebook's result to results/<profile>/<experiment>/<name>.json; non-finite numbers become null."""
    path = ROOT / "results" / profile / experiment / f"{name}.json"
    write_atomically(path, _json(value))
    return path


def save_machine(profile: str, name: str, value: Any) -> Path:
    """Like `save_result` for times and other facts of this machine: results/<profile>/machine/<name>.json."""
    path = ROOT / "results" / profile / "machine" / f"{name}.json"
    write_atomically(path, _json(value | {"machine": machine()}))
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, numpy.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> bytes:
    return (json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else f"{value:.9g}" if isinstance(value, float) else value
                      for key, value in row.items()} for row in rows)
    return text.getvalue().encode()


def machine() -> dict:
    """Processor, threads and versions of the machine at hand."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        processor = found.group(1) if found else processor
    return {"processor": processor, "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None} | versions()


def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__.split("+")[0], "numpy": numpy.__version__}


@dataclass(frozen=True)
class Run:
    """A finished run as the store holds it."""

    config: RunConfig
    folder: Path
    weights_folder: Path

    @cached_property
    def metrics(self) -> dict:
        return json.loads((self.folder / "metrics.json").read_text())

    @cached_property
    def provenance(self) -> dict:
        return json.loads((self.folder / "provenance.json").read_text())

    @property
    def current(self) -> bool:
        """Whether the library source that recorded the run is today's."""
        return self.provenance["source"] == source_digest()

    def has_weights(self, step: int | None = None) -> bool:
        """Whether the weights after `step` updates (the last by default) are kept here."""
        return self._weights(step).exists()

    def _weights(self, step: int | None) -> Path:
        return self.weights_folder / f"step-{step or self.config.steps:06d}.safetensors"

    @cached_property
    def log(self) -> dict[str, numpy.ndarray]:
        return _columns(self.folder / "log.csv.gz")

    @cached_property
    def curve(self) -> dict[str, numpy.ndarray]:
        return _columns(self.folder / "curve.csv")

    @cached_property
    def seconds(self) -> numpy.ndarray | None:
        """Seconds of each update (steps,) on the machine that trained the run; None where they did not travel with it."""
        path = self.folder.parents[2] / "machine" / "runs" / self.config.experiment / self.folder.name / "timing.csv"
        return _columns(path)["seconds"] if path.exists() else None

    def model(self, step: int | None = None, root: Path = ROOT / "data") -> EquilibriumModel:
        """The evaluated weights after `step` updates (the last by default), in the run's model.

        Raises FileNotFoundError if they were not kept here: weights do not travel with a run's results.
        """
        path = self._weights(step)
        if not path.exists():
            raise FileNotFoundError(f"the weights of {self.config.name} after step {step or self.config.steps} are not at "
                                    f"{path}; train the run here, or add the step to its `keep`")
        model = build_model(self.config, build_task(self.config, root))
        model.load_state_dict(load_file(path))
        return model

    def generate(self, prompt: str = PROMPT, tokens: int = 200, temperature: float = 0.8, seed: int = 0,
                 step: int | None = None, root: Path = ROOT / "data") -> str:
        """`prompt` and `tokens` more, drawn from the weights after `step` updates under the run's own solver.

        Raises FileNotFoundError without weights here, `data.DataError` for a character that the run's corpus has not.
        """
        model = self.model(step, root)
        return _generate(model, self.config, prompt, tokens, temperature, seed, root)

    @property
    def sample(self) -> str | None:
        """The text recorded with the run, where its profile asks for one: weights do not travel with results, it does."""
        path = self.folder / "sample.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def horizon(self, steps: Iterable[int], root: Path = ROOT / "data") -> list[dict[str, float]]:
        """The horizon that BPTT needs at the last weights, on the batch after the run's last: a row for each number of steps.

        `residual`, the worst sequence's |F| / |z| after so many steps of plain relaxation at the run's step; `cosine` and `ratio` of BPTT's
        gradient over them (block and embeddings) to that of the settled phases, whose own free residual is `settled`.
        Raises FileNotFoundError without weights here.
        """
        model, step = self.model(root=root), self.config.solver.step
        batch = build_task(self.config, root).batch(self.config.steps)
        exact = gradient(model, *batch, estimator=DyadicEP(), solver=Anderson(step=step, max_steps=200, tol=1e-6),
                         nudged=Anderson(step=step, max_steps=200, tol=1e-5))
        rows = []
        for count in steps:
            found = gradient(model, *batch, estimator=BPTT(steps=count), solver=Relaxation(step=step))
            agreed = agreement(without_readout(found.grads), without_readout(exact.grads))["total"]
            rows.append({"steps": count, "residual": found.free.residual.max().item(), "cosine": agreed.cosine,
                         "ratio": agreed.ratio, "settled": exact.free.residual.max().item()})
        return rows

    def record_horizon(self, steps: Iterable[int], root: Path = ROOT / "data") -> Path:
        """Keeps `horizon` with the run's results, where it travels as the weights do not."""
        path = self.folder / "horizon.json"
        write_atomically(path, _json(self.horizon(steps, root)))
        return path

    @property
    def recorded_horizon(self) -> list[dict[str, float]] | None:
        """What `record_horizon` kept."""
        path = self.folder / "horizon.json"
        return json.loads(path.read_text()) if path.exists() else None


def _generate(model: EquilibriumModel, config: RunConfig, prompt: str, tokens: int, temperature: float, seed: int,
              root: Path) -> str:
    text = data.text(config.data.corpus, config.data.tokens, root)
    ids = model.generate(torch.tensor(text.encode(prompt)), tokens, config.solver, temperature,
                         torch.Generator().manual_seed(seed))
    return text.decode(ids.tolist())


def _columns(path: Path) -> dict[str, numpy.ndarray]:
    """A CSV file, compressed or not, as {column: values}; numbers where every cell is one, an empty cell is NaN."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for key in rows[0] if rows else ():
        cells = [row[key] for row in rows]
        try:
            found[key] = numpy.array([float(cell or "nan") for cell in cells])
        except ValueError:
            found[key] = numpy.array(cells)
    return found


class Store:
    """Runs of one profile. `run` gives a run and trains it if it is absent."""

    def __init__(self, profile: str, root: Path = ROOT):
        self.profile, self.root = profile, Path(root)
        self.results = self.root / "results" / profile
        settings = load_profile(profile, self.root)
        self.stale, self.sample = settings.get("stale", "keep"), settings.get("sample", 0)

    def find(self, config: RunConfig) -> Run | None:
        """The recorded run of this configuration, or None. A run of older source counts unless the profile retrains those."""
        run = self._place(config)
        if not (run.folder / "metrics.json").exists():  # written last: a run is there as a whole or not at all
            return None
        return run if self.stale == "keep" or run.current else None

    def run(self, config: RunConfig, deadline: float = math.inf, device: str = "cpu", show=show_on_terminal,
            backend: Backend | None = None) -> Run:
        """The run, trained first if it is absent, by default with the fastest backend; the provenance says with which. Raises
        `training.OutOfTime` if that takes longer than the deadline."""
        found = self.find(config)
        if found:
            return found
        run = self._place(config)
        scratch = self.root / "checkpoints" / self.profile / source_digest() / config.experiment / run.folder.name
        backend = backend or fastest_backend(config, device)
        trainer = Trainer(config, scratch, self.root / "data", device, backend)
        progress = trainer.advance(deadline, show)
        metrics = summarise(trainer, progress)
        sample = _generate(trainer.average, config, PROMPT, self.sample, 0.8, 0, self.root / "data") \
            if self.sample and isinstance(config.data, Text) else None
        for step in (*config.keep, config.steps):
            write_atomically(run.weights_folder / trainer.weights(step).name, trainer.weights(step).read_bytes())
        elsewhere = self.results / "machine" / "runs" / config.experiment / run.folder.name
        write_atomically(elsewhere / "timing.csv", _csv([{"step": i + 1, "seconds": s}
                                                        for i, s in enumerate(progress.seconds)]))
        write_atomically(elsewhere / "machine.json", _json(machine() | {
            "device": device, "seconds": sum(progress.seconds), "sessions": progress.sessions}))
        for name in ("metrics.json", "horizon.json"):  # of older source: a kill from here on leaves no mixture
            (run.folder / name).unlink(missing_ok=True)
        write_atomically(run.folder / "config.json", _json(plain(config)))
        # one row a step, a third of the size; without a time, so that equal logs are equal files
        write_atomically(run.folder / "log.csv.gz", gzip.compress(_csv(progress.rows), mtime=0))
        write_atomically(run.folder / "curve.csv", _csv(progress.curve))
        if sample:
            write_atomically(run.folder / "sample.txt", sample.encode())
        write_atomically(run.folder / "provenance.json", _json({"source": source_digest(), "backend": backend} | versions()))
        write_atomically(run.folder / "metrics.json", _json(metrics))
        shutil.rmtree(scratch)
        return run

    def runs(self, experiment: str) -> list[Run]:
        """Every run that the profile names for an experiment, trained where absent, in the profile's order."""
        return [self.run(config) for config in configurations(self.profile, experiment, self.root)]

    def recorded(self, experiment: str) -> list[Run]:
        """The profile's runs that are recorded; those missing are left out (the paper profile is filled piece by piece)."""
        found = (self.find(config) for config in configurations(self.profile, experiment, self.root))
        return [run for run in found if run]

    def prune(self, experiment: str) -> list[str]:
        """Removes runs that the profile no longer names; returns their names."""
        wanted = {self._place(config).folder.name for config in configurations(self.profile, experiment, self.root)}
        gone = []
        for part in ("runs", "weights", "machine/runs"):
            folder = self.results / part / experiment
            for path in sorted(folder.iterdir()) if folder.exists() else ():
                if path.name not in wanted:
                    shutil.rmtree(path)
                    gone.append(path.name)
        return sorted(set(gone))

    def _place(self, config: RunConfig) -> Run:
        name = f"{config.name}-{digest(plain(config))}"
        return Run(config, self.results / "runs" / config.experiment / name,
                   self.results / "weights" / config.experiment / name)


def summarise(trainer: Trainer, progress: Progress) -> dict:
    """The metrics of a finished run on the whole validation split: with the training solver, at the converged fixed point, and the
    loss of the start state, the solver removed."""
    config, model = trainer.config, trainer.average
    excursions = [row["step"] for row in progress.rows if not row["free_residual_max"] <= EXCURSION]
    best = min(progress.curve, key=lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf)
    rates = [row["rate_arnoldi"] for row in progress.curve if "rate_arnoldi" in row]
    metrics = {"final": evaluate(model, trainer.task, config.solver, backend=trainer.backend),
               "best_loss": best["loss"], "best_step": best["step"],
               "excursions": len(excursions), "first_excursion": excursions[0] if excursions else None,
               "gated": sum(row["gated"] for row in progress.rows), "skipped": sum(row["skipped"] for row in progress.rows),
               "force_evaluations": sum(row["force_evaluations"] for row in progress.rows),
               "rate_arnoldi": rates[-1] if rates else None,
               "parameters": sum(p.numel() for p in model.parameters())}
    if not model.block.explicit:
        metrics["converged"] = evaluate(model, trainer.task, CONVERGED, backend=trainer.backend)
        metrics["solver_removed"] = evaluate(model, trainer.task, FixedHorizon(steps=0), backend=trainer.backend)["loss"]
    if config.adaptive:
        metrics["adaptive"] = {name: adaptive_compute(model, trainer.task.validation(), config.solver.step, noise=noise)
                               for name, noise in (("clean", 0.0), ("noisy", NOISE))}
    return metrics


def best_of_grid(runs: list[Run]) -> dict[str, list[Run]]:
    """For each arm its runs, one per seed, at the learning rate with the lowest mean final loss; arms in the runs' order.

    A learning rate at which any seed ended without a finite loss is not chosen unless all did.
    """
    grid: dict[str, dict[float, list[Run]]] = {}
    for run in runs:
        grid.setdefault(run.config.arm, {}).setdefault(run.config.optimiser.lr, []).append(run)

    def score(chosen: list[Run]) -> float:
        losses = [run.metrics["final"]["loss"] for run in chosen]
        return math.inf if None in losses else sum(losses) / len(losses)

    return {arm: min(rates.values(), key=score) for arm, rates in grid.items()}


def excursions(runs: Iterable[Run], absent: Iterable[str] = ()) -> int | None:
    """Training steps with an excursion, over all runs. None without a run, or if there is none yet but an arm is `absent`: what
    never ran has not stayed stable."""
    found = [run.metrics["excursions"] for run in runs]
    return None if not found or (not sum(found) and list(absent)) else sum(found)


def mean_loss(arms: dict[str, list[Run]], arm: str, metric: str = "loss") -> float | None:
    """Mean of a final metric over an arm's seeds; None if the arm is missing or a run has no finite value."""
    values = [run.metrics["final"][metric] for run in arms.get(arm, ())]
    return None if not values or None in values else sum(values) / len(values)


def spread(arms: dict[str, list[Run]], arm: str, metric: str = "loss") -> float | None:
    """Standard deviation of a final metric over an arm's seeds; None below two seeds or if a run has no finite value."""
    values = [run.metrics["final"][metric] for run in arms.get(arm, ())]
    return None if len(values) < 2 or None in values else statistics.stdev(values)


def differences(arms: dict[str, list[Run]], ours: str, theirs: str, metric: str = "loss") -> list[float]:
    """Differences of a final metric, seed by seed, over the seeds that both arms have and that ended with a finite value."""
    seeds = [{run.config.seed: run.metrics["final"][metric] for run in arms.get(arm, ())} for arm in (ours, theirs)]
    return [seeds[0][seed] - seeds[1][seed] for seed in sorted(seeds[0])
            if seeds[0][seed] is not None and seeds[1].get(seed) is not None]


def paired(arms: dict[str, list[Run]], ours: str, theirs: str, metric: str = "loss") -> float | None:
    """Mean of `differences`; None if the arms share no seed."""
    found = differences(arms, ours, theirs, metric)
    return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class Comparison:
    """Of paired differences: their mean, its 95 % interval [low, high] (Student's t), and p, the larger p value of the two
    one-sided tests against -margin and +margin; None where there are fewer than two pairs."""

    pairs: int
    mean: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def equivalent(self) -> bool | None:
        """Whether the mean lies within the margin at the 5 % level; None where that cannot be said."""
        return None if self.p is None else self.p < 0.05


def compare(differences: list[float], margin: float) -> Comparison:
    """Equivalence by two one-sided tests (Schuirmann 1987) of paired `differences` at +-`margin` (> 0)."""
    from scipy import stats  # with the pipeline, not with the bare library

    if margin <= 0:
        raise ValueError(f"margin = {margin}; equivalence needs a margin above zero")
    if len(differences) < 2:
        return Comparison(len(differences), differences[0] if differences else None)
    ends = [stats.ttest_1samp(differences, side * margin, alternative="greater" if side < 0 else "less") for side in (-1, 1)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return Comparison(len(differences), sum(differences) / len(differences), float(interval.low), float(interval.high),
                      float(max(end.pvalue for end in ends)))


def load_profile(profile: str, root: Path = ROOT) -> dict:
    """pipelines/profiles/<profile>.yaml. Raises `ConfigurationError` naming the known profiles if there is none."""
    path = root / "pipelines" / "profiles" / f"{profile}.yaml"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ConfigurationError(f"there is no profile {profile!r}; there are: {known}")
    # The compiled loader where PyYAML has it: ten times as fast, and every worker and notebook reads a profile.
    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def configurations(profile: str, experiment: str, root: Path = ROOT) -> list[RunConfig]:
    """The runs that a profile names for an experiment.

    An experiment is a list of families {common, arms: {arm: changes}, over: {dotted.key: [values]}}: every arm is the common
    configuration with its changes, once for each combination of the values in `over`.
    """
    families = (load_profile(profile, root).get("runs") or {}).get(experiment) or []
    found = []
    for family in families:
        unknown = set(family) - {"common", "arms", "over"}
        if unknown:
            raise ConfigurationError(f"{profile}.yaml, runs.{experiment}: unknown key {', '.join(sorted(unknown))}; a family "
                                     "has common, arms and over")
        if not family.get("arms"):
            raise ConfigurationError(f"{profile}.yaml, runs.{experiment}: a family has no arms; give it "
                                     "arms: {NAME: {...}}")
        over = family.get("over", {})
        for key, values in over.items():
            if not isinstance(values, list):
                raise ConfigurationError(f"{profile}.yaml, runs.{experiment}, over.{key}: got {values!r}; "
                                         "give a list of values")
        for arm, changes in family["arms"].items():
            for values in product(*over.values()):
                merged = _merge(_merge({"experiment": experiment, "arm": arm}, family.get("common", {})), changes or {})
                for key, value in zip(over, values, strict=True):
                    merged = _merge(merged, _nest(key, value))
                config = parse(RunConfig, merged, f"{profile}.yaml, runs.{experiment}, arm {arm}")
                if config in found:
                    raise ConfigurationError(f"{profile}.yaml, runs.{experiment}, arm {arm}: {config.name} is named twice with "
                                             "the same configuration; remove one")
                found.append(config)
    return found


def _nest(key: str, value: Any) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _merge(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it; mappings merge unless they name two different kinds."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        together = isinstance(old, dict) and isinstance(value, dict) and len({old.get("kind"), value.get("kind")} - {None}) < 2
        merged[key] = _merge(old, value) if together else value
    return merged
