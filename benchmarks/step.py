"""What does one training step cost? EP against backpropagation, BPTT, implicit differentiation and torchdeq.

    make bench                                    # all sizes, 10 to 20 minutes
    python -m benchmarks.step --size c64          # one of them

Everything is timed in one process, the arms in turn, so that whatever else the machine does falls on all of them; a time is the
median of the rounds after a warm-up (of a quarter of them for arms slower than twenty backprop steps). Beside it stands what
makes times comparable: the free residual, the adjoint residual, and the cosine of the gradient (block and embeddings) with a
converged one in float64, each the worst of the batches, and the cost in force evaluations of the whole batch: a linearisation
or a product with J or J^T counts as one, a backward pass as two for each evaluation in it; torchdeq's are not counted. What is
not paid at every step is measured on its own and shared out: the rate penalty over its cadence, the refit of the start over its
refresh. Beside it stands what holding every token costs at every step (`CONTROL`), and the whole step with it.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eplib
from eplib import kernels
from eplib.blocks import EquilibriumBlock, Feedforward
from eplib.calculus import AutomaticSlope
from eplib.config import digest, plain
from eplib.controllers import ContractionRate, Integral
from eplib.diagnostics import LiveBytes, agreement
from eplib.estimators import BPTT, AsymEP, Backprop, DyadicEP, Implicit, Report, Tracking
from eplib.models import Backend, LanguageModel, Model
from eplib.solvers import Anderson, MixedPrecision, Relaxation, Solver, Substitution, norm
from eplib.sources import source_digest
from eplib.spectra import contraction_rate
from eplib.starts import LinearStart
from eplib.store.records import ROOT, configurations, machine
from eplib.training import Mnist, RunConfig, Trainer, Transformer, build_model, build_task

Step = Callable[[Tensor, Tensor], Report | dict]
BATCHES = 6
REFRESH = 10  # cadence of the fit of the start
FREE, ADJOINT = 1e-4, 5e-3  # residuals at which the phases stop
STEP = 0.8
SLOW = 20  # backprop steps
# What the control is asked to cost at C=128: of the linear response, and the whole step with it in backprop steps, by backend.
SHARE, WHOLE = 0.25, {"compiled": 3.0, "torch": 9.0}
CONTROL = ContractionRate(target=0.975, step=0.25, per="token", products=3, driven=Integral())
# ||z_beta - z*|| / ||z*|| of two trajectories, from which their nudge is chosen. That of a sequence: at 3e-3 single tokens of
# trained models have left the linear range (cosine 0.9998 at C=128 T=128, 0.998 on MNIST).
DISPLACEMENT = 3e-4


@dataclass(frozen=True)
class Point:
    """A model at which the step is timed: weights, the ordinary transformer of the same shape, batches, and the penalty of the
    run that it comes from."""

    name: str
    model: Model
    twin: Model
    batches: list[tuple[Tensor, Tensor]]
    penalty: ContractionRate


# Changes of the run of E3 or E2 in the quick profile that is trained, the batch that is timed, and how long it is trained.
SIZES: dict[str, tuple[str, dict[str, Any], int, int | None]] = {
    "c64": ("shakespeare", {"width": 64, "context": 64}, 16, None),
    "c128": ("shakespeare", {"width": 128, "context": 128}, 16, None),
    "c128b8": ("shakespeare", {"width": 128, "context": 128}, 8, None),
    "mnist": ("mnist", {}, 128, 200),
    "toy": ("shakespeare", {"width": 16, "context": 8}, 4, 10),  # proves that everything runs; not among all sizes
}


def run_config(size: str) -> RunConfig:
    """The run whose initial and last weights are timed: E3's or E2's linear response in the quick profile, at this size."""
    experiment, shape, _, steps = SIZES[size]
    config = next(c for c in configurations("quick", experiment) if c.arm == "ep_linear" and c.seed == 0)
    assert isinstance(config.model, Transformer)
    config = replace(config, model=replace(config.model, **shape), steps=steps or config.steps, audit_every=None)
    return replace(config, data=replace(config.data, patch=7)) if isinstance(config.data, Mnist) else config


def points(size: str) -> list[Point]:
    """The initial and the trained model of a size; training is resumed or skipped where it was done before."""
    config, batch = run_config(size), SIZES[size][2]
    folder = ROOT / "checkpoints" / "bench" / source_digest(config) / f"{size}-{digest(plain(config))}"
    trainer = Trainer(config, folder, ROOT / "data", backend=fastest())
    trainer.advance()
    return points_of(replace(config, batch=batch), deepcopy(trainer.average).requires_grad_())


def points_of(config: RunConfig, trained: Model) -> list[Point]:
    """A run's initial weights and its trained ones, with batches that it never saw."""
    task = build_task(config, ROOT / "data")
    assert isinstance(config.model, Transformer)
    block = Feedforward(causal=config.model.block.causal)
    ordinary = replace(config, model=replace(config.model, block=block), estimator=Backprop(), nudged=None, start=None,
                       gate=None, penalties=(), audit_every=None, adaptive=False)
    twin = build_model(ordinary, task.signal)
    batches = [task.batch(config.steps + i) for i in range(BATCHES)]
    penalty = config.penalties[0]
    assert isinstance(penalty, ContractionRate)
    return [Point(name, model, twin, batches, penalty)
            for name, model in (("initial", build_model(config, task.signal)), ("trained", trained))]


def fastest() -> Backend:
    return "compiled" if kernels.available() else "torch"


class UncachedSlope(AutomaticSlope):
    """With a graph made anew for every product and freed on the way back through it: more time, less memory."""

    def transposed(self, u: Tensor) -> Tensor:
        with torch.enable_grad():
            z = self.z.expand_as(u).detach().requires_grad_()
            return torch.autograd.grad(self.block(z, self.x), z, u)[0]

    def contract(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        with torch.enable_grad():
            x, parameters = self.x.detach().requires_grad_(), dict(self.block.named_parameters())
            found = torch.autograd.grad(self.block(self.z, x), [*parameters.values(), x], u)
        return dict(zip(parameters, found, strict=False)), found[-1]


class Uncached(EquilibriumBlock):
    """The same block with its products by automatic differentiation, as the reference takes them."""

    def linearise(self, z: Tensor, x: Tensor) -> AutomaticSlope:
        return UncachedSlope(self, z, x)


def uncached(model: Model) -> Model:
    model = deepcopy(model)
    model.block.__class__ = Uncached
    return model


class Torchdeq:
    """torchdeq's implicit training step on the same block (Geng & Kolter 2023); its tolerances are on the map z + step F."""

    def __init__(self, solver: str):
        from torchdeq import get_deq

        settings = {"anderson": {"f_tol": STEP * FREE}, "fixed_point_iter": {"f_tol": STEP * FREE}}[solver]
        self.deq = get_deq(f_solver=solver, b_solver=solver, f_max_iter=64, b_max_iter=40, f_stop_mode="rel", b_stop_mode="rel",
                           b_tol=STEP * ADJOINT, ift=True, **settings)

    def __call__(self, model: Model, inputs: Tensor, targets: Tensor) -> dict:
        self.deq.train()
        x = model.clamp(inputs)
        states, _ = self.deq(lambda z: z + STEP * model.block(z, x), model.block.start(x.detach()))
        loss = model.loss(model.block.output(states[-1]), targets).mean()
        names, values = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
        return {"grads": dict(zip(names, grads, strict=True)), "state": states[-1].detach()}


def _phases(solver: Solver, nudged: Solver) -> dict[str, Any]:
    return {"solver": solver, "nudged": nudged}


def arms(point: Point, backend: str, horizon: int) -> dict[str, Step]:
    """The steps that are compared, by name. horizon: Euler steps that the free phase needs here, for BPTT."""
    fast = _phases(Substitution(step=STEP, tol=FREE), Substitution(step=STEP, max_steps=40, tol=ADJOINT))
    plain = _phases(Anderson(step=STEP, tol=FREE), Anderson(step=STEP, max_steps=40, tol=ADJOINT))
    mixed = _phases(MixedPrecision(step=STEP, tol=FREE), MixedPrecision(step=STEP, max_steps=40, tol=ADJOINT))
    reference = _phases(Relaxation(step=0.1, max_steps=150, tol=0), Relaxation(step=0.1, max_steps=20, tol=0))
    euler: dict[str, Any] = {"solver": Relaxation(step=STEP, tol=FREE)}
    slow = uncached(point.model)
    # the linear response says how far a nudge of one moves the states, at most
    responses = [eplib.gradient(point.model, *batch, estimator=DyadicEP(), **plain) for batch in point.batches]
    moved = max((norm(found.adjoint) / norm(found.free.value)).max().item() for found in responses)
    beta = float(f"{DISPLACEMENT / moved:.1g}")

    def ep(model: Model = point.model, **settings: Any) -> Callable[[Tensor, Tensor], Report]:
        carried: dict = {}

        def step(inputs: Tensor, targets: Tensor) -> Report:
            report = eplib.gradient(model, inputs, targets, state=carried, **settings)
            carried.update(report.state)
            return report

        return step

    warm, cold = Tracking(beta=beta, held=True, warm=True), AsymEP(beta=beta)
    found: dict[str, Step] = {"backprop": ep(point.twin, estimator=Backprop(), **euler)}
    ways: dict[str, dict[str, Any]] = {"compiled": fast | {"backend": "compiled"}, "torch": plain, "torch from bfloat16": mixed}
    for name in dict.fromkeys([backend, "torch", "torch from bfloat16"]):
        chosen = ways[name] | {"start": LinearStart(refresh=10**6)}
        found |= {
            f"EP linear response, {name}": ep(estimator=DyadicEP(), **chosen),
            f"EP linear response + penalty, {name}": ep(estimator=DyadicEP(), **chosen, penalties=(
                replace(point.penalty, every=1),)),
            f"EP linear response + control, {name}": ep(estimator=DyadicEP(), **chosen, penalties=(CONTROL,)),
            f"EP linear response + refit, {name}": ep(estimator=DyadicEP(), **(chosen | {"start": LinearStart(refresh=1)}))}
        if ways[name] is not mixed:  # contrasted trajectories are never rounded
            found |= {f"EP two trajectories, warm, {name}": ep(estimator=warm, **chosen),
                      f"EP two trajectories, cold, {name}": ep(estimator=cold, **chosen)}
    deq = {solver: Torchdeq(solver) for solver in ("anderson", "fixed_point_iter")}
    return found | {
        "implicit": ep(estimator=Implicit(), start=LinearStart(refresh=10**6), **plain),
        f"BPTT, {horizon} steps": ep(estimator=BPTT(steps=horizon), **euler),
        "EP, reference": ep(slow, estimator=AsymEP(beta=beta), **reference),
        **{f"torchdeq, {name}": partial(d, point.model) for name, d in deq.items()}}


def converged(point: Point) -> list[dict[str, Tensor]]:
    """The gradient of each batch in float64, both phases to 1e-9."""
    model, tight = deepcopy(point.model).double(), Anderson(step=STEP, max_steps=300, tol=1e-9)
    return [eplib.gradient(model, *_wide(batch), estimator=Implicit(), solver=tight, nudged=tight).grads
            for batch in point.batches]


def _wide(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    inputs, targets = batch
    return inputs.double() if inputs.is_floating_point() else inputs, targets


def accuracy(point: Point, step: Callable, truth: list[dict[str, Tensor]]) -> dict:
    """The worst of the batches: free residual, adjoint residual, cosine; fallbacks of the last."""
    worst = {"free_residual": 0.0, "adjoint_residual": 0.0, "cosine": 1.0}
    for batch, exact in zip(point.batches, truth, strict=True):
        found = step(*batch)
        if isinstance(found, dict):
            with torch.no_grad():
                force = point.model.block(found["state"], point.model.clamp(batch[0]))
            grads, free, nudged, extra = found["grads"], norm(force) / norm(found["state"]), None, {}
        else:
            grads, free, nudged = found.grads, found.free.residual, found.nudged
            extra = {"fallbacks": found.free.fallbacks + (nudged.fallbacks if nudged else 0)}
        worst["free_residual"] = max(worst["free_residual"], free.max().item())
        if nudged:
            worst["adjoint_residual"] = max(worst["adjoint_residual"], nudged.residual.max().item())
        cosine = agreement(*map(point.model.without_readout, (grads, {k: v.float() for k, v in exact.items()})))["total"].cosine
        worst["cosine"] = min(worst["cosine"], cosine)
    return worst | extra


def timed(steps: dict[str, Step], batches: list[tuple[Tensor, Tensor]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each step, the steps in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for count in range(rounds + 2):
        for name, step in steps.items():
            if count > 1 and count % 4 and seconds[name] and seconds[name][0] > SLOW * statistics.median(seconds["backprop"]):
                continue
            began = time.perf_counter()
            step(*batches[count % len(batches)])
            if count > 1:
                seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def measure(point: Point, rounds: int = 20) -> dict:
    """Median milliseconds, ratio to backprop, force evaluations, accuracy and peak live bytes of every arm at one point.

    The linear response is given with its amortised costs, and apart: `milliseconds` holds the bare step, `penalty` and `refit`
    what each adds when it runs, `amortised` the sum at their cadence; `control` what holding every token adds at every step, as
    a share of the bare step in `control_share`, and `controlled_ratio` the whole step with it over backprop.
    """
    horizon = int(point.model.settle(point.batches[0][0], Relaxation(step=STEP, tol=FREE, max_steps=300)).steps.max())
    steps = arms(point, fastest(), max(1, horizon))
    truth, milliseconds = converged(point), timed(steps, point.batches, rounds)
    found = {}
    for name, step in steps.items():
        if " + " in name:
            continue
        row = {"milliseconds": milliseconds[name], "amortised": milliseconds[name]}
        if name != "backprop":
            row |= accuracy(point, step, truth)
        for part, cadence in (("penalty", point.penalty.every), ("refit", REFRESH)):
            extra = name.replace(",", f" + {part},")
            if extra in milliseconds and extra != name:
                row[part] = milliseconds[extra] - milliseconds[name]
                row["amortised"] += row[part] / cadence
        if held := milliseconds.get(name.replace(",", " + control,")) if name.startswith("EP linear response,") else None:
            row |= {"control": held - milliseconds[name], "control_share": held / milliseconds[name] - 1,
                    "controlled_ratio": held / milliseconds["backprop"]}
        with LiveBytes() as counter:
            last = step(*point.batches[0])
        row["peak_bytes"] = counter.peak
        if isinstance(last, Report):
            row["force_evaluations"] = last.measured["force_evaluations"]
        found[name] = row
    for row in found.values():
        row["ratio"] = row["amortised"] / found["backprop"]["amortised"]
    solution = point.model.settle(point.batches[0][0], Anderson(step=STEP, max_steps=100, tol=1e-5))
    rates = contraction_rate(point.model, point.batches[0][0], solution.value, STEP)
    return {"arms": found, "rate_arnoldi": rates.max().item(), "rate_step": STEP, "horizon": horizon}


def generation(point: Point, tokens: int = 40) -> dict:
    """Milliseconds a token of generated text, the new token settled alone and, for comparison, the whole window for each."""
    model, solver = point.model, Anderson(step=STEP, tol=FREE)
    assert isinstance(model, LanguageModel)
    ids = point.batches[0][0][0, :model.context - tokens] if model.context > tokens else point.batches[0][0][0, :1]
    tokens = min(tokens, model.context - len(ids))
    began = time.perf_counter()
    drawn = model.generate(ids, tokens, solver, generator=torch.Generator().manual_seed(0))
    alone = time.perf_counter() - began
    began = time.perf_counter()
    for length in range(len(ids), len(ids) + tokens):
        model.settle(drawn[None, :length], solver)
    return {"milliseconds": 1e3 * alone / tokens, "whole_window": 1e3 * (time.perf_counter() - began) / tokens}


def compiled_backprop(point: Point, rounds: int = 20) -> dict:
    """The backprop step under torch.compile, beside the eager one: milliseconds of both, and seconds to compile."""
    model, values = point.twin, list(point.twin.parameters())

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return model.loss(model.block.output(model.block.start(model.clamp(inputs))), targets).mean()

    fused = torch.compile(loss)
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    began = time.perf_counter()
    torch.autograd.grad(fused(*point.batches[0]), values)
    compilation = time.perf_counter() - began
    for count in range(rounds):
        for name, function in (("eager", loss), ("compiled", fused)):
            began = time.perf_counter()
            torch.autograd.grad(function(*point.batches[count % BATCHES]), values)
            seconds[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()} | {"compilation_seconds": compilation}


def control(row: dict, most: float | None) -> str:
    """What holding every token adds, and the whole step with it, beside what is asked of both."""
    if "control" not in row:
        return ""
    whole = f"   control {row['control_share']:+.1%} (asked at C=128: {SHARE:.0%}), with it {row['controlled_ratio']:.2f}x"
    return whole + (f" (asked at C=128: {most:g}x)" if most else "")


def table(results: dict) -> str:
    """The arms of each point, a line each."""
    lines = []
    for point, found in results.items():
        lines.append(f"{point}: rate_arnoldi at step {found['rate_step']:g} {found['rate_arnoldi']:.3f}; {found['horizon']} "
                     f"Euler steps to {FREE:g}")
        for name, row in found["arms"].items():
            lines.append(f"  {name:36s}{row['amortised']:9.1f} ms {row['ratio']:7.2f}x {row.get('force_evaluations', '-'):>6} F"
                         + (f"   cosine {row['cosine']:.6f}  free {row['free_residual']:.1e}  adjoint "
                            f"{row['adjoint_residual']:.1e}" if "cosine" in row else "")
                         + control(row, WHOLE.get(name.rpartition(", ")[2])))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Times the sizes that are asked for, prints what was found and keeps it in --out; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="one, again for another; all but toy by default")
    parser.add_argument("--point", choices=("initial", "trained"), help="one operating point; both by default")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="time backprop under torch.compile (needs a C++ compiler)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results.json")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for size in options.size or [name for name in SIZES if name != "toy"]:
        at = points(size)
        print(f"== {size}: {machine()['processor']}, {torch.get_num_threads()} threads, {fastest()} backend", flush=True)
        results = {point.name: measure(point, options.rounds) for point in at if options.point in (None, point.name)}
        print(table(results), flush=True)
        found[size] = {"machine": machine(), "rounds": options.rounds, "points": results}
        if size != "mnist":
            found[size]["generation"] = generation(at[1])
            print(f"  a generated token: {found[size]['generation']}", flush=True)
        if options.compile:
            found[size]["compiled_backprop"] = compiled_backprop(at[0], options.rounds)
            print(f"  backprop, eager and under torch.compile: {found[size]['compiled_backprop']}", flush=True)
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        partial = options.out.with_name(f".{options.out.name}.{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
