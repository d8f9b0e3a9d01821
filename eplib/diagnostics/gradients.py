"""How gradients compare."""

import itertools
import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimators import BPTT, Estimator, gradient
from ..models import RENAMED, Backend, Model
from ..solvers import Solver

GROUPS = ("Wq", "Wk", "Wv", "Wo", "W1", "W2", "LN", "embeddings", "readout")

LEAVES = {"block": {"wq": "Wq", "wk": "Wk", "value": "Wv", "wo": "Wo", "w1": "W1", "w2": "W2", "memory": "W1", "ln1": "LN",
                    "ln2": "LN"},
          "": {"position": "embeddings", "embedding": "embeddings", "norm": "readout", "readout": "readout"}}


def groups(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One flat vector per parameter group of `GROUPS` from {parameter name: tensor}, and `other` for names of the user's own;
    absent groups are left out."""
    parts: dict[str, list[Tensor]] = {}
    for name, value in tensors.items():
        owner, _, rest = RENAMED.sub("", name).partition(".")
        path = [owner, *rest.split(".")] if owner == "block" else [owner]
        leaf = path[-2] if path[-1] in ("weight", "bias", "gate") else path[-1]
        if owner == "block" and leaf in ("qkv", "qk") and value.shape[0] % len(leaf) == 0:
            for group, rows in zip(("Wq", "Wk", "Wv"), value.chunk(len(leaf)), strict=False):
                parts.setdefault(group, []).append(rows.flatten())
        else:
            group = LEAVES["block" if owner == "block" else ""].get(leaf, "other")
            parts.setdefault(group, []).append(value.flatten())
    return {group: torch.cat(parts[group]) for group in (*GROUPS, "other") if group in parts}


@dataclass(frozen=True)
class Agreement:
    """Signed cosine, norm ratio ||g|| / ||r|| and relative error ||g - r|| / ||r|| of a gradient g against a reference r."""

    cosine: float
    ratio: float
    error: float


def agreement(gradient: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Agreement]:
    """Agreement per parameter group and in `total`, computed in float64. A zero gradient has cosine 0.

    Raises ValueError unless both have the same parameters, of the same shapes.
    """
    unlike = sorted(name for name in gradient.keys() | reference.keys()
                    if name not in gradient or name not in reference or gradient[name].shape != reference[name].shape)
    if unlike:
        raise ValueError(f"the gradient and the reference do not have the same parameters, or shapes: {', '.join(unlike)}")
    if not gradient:
        raise ValueError("two gradients without parameters have no agreement; compare those of a model's parameters")
    ours, theirs = groups(gradient), groups(reference)
    ours["total"], theirs["total"] = torch.cat(list(ours.values())), torch.cat(list(theirs.values()))
    found = {}
    for group, g in ours.items():
        g, r = g.double(), theirs[group].double()
        scale = (g.norm() * r.norm()).clamp_min(torch.finfo(torch.float64).tiny)
        found[group] = Agreement((g @ r / scale).item(), (g.norm() / r.norm()).item(), ((g - r).norm() / r.norm()).item())
    return found


def log_slope(x: list[float], y: list[float]) -> float:
    """Exponent p of y = c x^p by least squares in the logarithms; needs two different x, all above zero."""
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def triangulation(model: Model, batches: list[tuple[Tensor, Tensor]], estimator: Estimator,
                  horizons: tuple[int, int], solver: Solver, nudged: Solver | None, plain: Solver | None = None,
                  backend: Backend = "torch") -> dict[str, float]:
    """Gradient triangulation (Hao 2026): an estimator against BPTT at two horizons, and each against itself on another batch.

    batches: at least two (inputs, targets). Means over the batches of cos(estimator, BPTT at the shorter horizon), cos(BPTT at
    the two horizons) and the norm ratio estimator / BPTT; the self-cosines compare successive batches. An estimator whose phase
    diverged counts as NaN. plain: the solver of whose size BPTT's steps are, by default `solver`. Raises ValueError for fewer
    batches.
    """
    if len(batches) < 2:
        raise ValueError(f"gradients are compared from batch to batch, got {len(batches)} of them; give two or more")

    def flat(kind: Estimator, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, float]:
        steps = plain or solver if isinstance(kind, BPTT) else solver
        report = gradient(model, inputs, targets, estimator=kind, solver=steps, nudged=nudged if kind.second_phase else None,
                          backend=backend)
        vector = None if report.grads is None else torch.cat([g.flatten().double() for g in report.grads.values()])
        return vector, report.free.residual.max().item()

    def cosine(a: Tensor | None, b: Tensor | None) -> float:
        return math.nan if a is None or b is None else (a @ b / (a.norm() * b.norm())).item()

    ours, short, long = ([flat(kind, *batch) for batch in batches]
                         for kind in (estimator, *(BPTT(steps=horizon) for horizon in horizons)))
    pairs = list(zip([v for v, _ in ours], [v for v, _ in short], [v for v, _ in long], strict=True))
    mean = statistics.fmean
    return {"residual": max(residual for _, residual in ours), "cosine": mean(cosine(a, b) for a, b, _ in pairs),
            "cosine_horizons": mean(cosine(b, c) for _, b, c in pairs),
            "ratio": mean(math.nan if a is None or b is None else (a.norm() / b.norm()).item() for a, b, _ in pairs),
            "self_cosine": mean(cosine(p[0], q[0]) for p, q in itertools.pairwise(pairs)),
            "self_cosine_bptt": mean(cosine(p[1], q[1]) for p, q in itertools.pairwise(pairs))}
