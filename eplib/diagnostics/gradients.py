"""Measurements at a fixed point: gradient agreement, the dense truth of small systems, live memory."""

import itertools
import math
import statistics
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import spectra
from ..blocks import Dynamical, EquilibriumBlock, Jacobian
from ..calculus import EPS, GELU_CUBIC, GELU_SCALE, split_heads, standardise, standardise_slope
from ..estimators import BPTT, DyadicEP, Estimator, VectorField, asymmetry, gradient
from ..models import RENAMED, Model
from ..solvers import Anderson, Relaxation, Solver

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
        leaf = path[-2] if path[-1] in ("weight", "bias") else path[-1]
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


def dense_jacobian(model: Model, x: Tensor, z: Tensor) -> Tensor:
    """J of one sample by autograd, (n, n) with n = z.numel(); x and z are (1, ...). For small systems and as a reference."""
    rows = torch.autograd.functional.jacobian(lambda state: model.block(state, x.detach()), z.detach())
    return rows.reshape(z.numel(), z.numel())


def adjoint_gradient(model: Model, inputs: Tensor, targets: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Exact gradient of the mean loss at the fixed point z (B, ...), by dense solves of J^T a = -g, sample by sample."""
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for b in range(z.shape[0]):
        one, target = z[b:b + 1].detach(), targets[b:b + 1]
        with torch.enable_grad():
            x = model.clamp(inputs[b:b + 1])
            probe = one.clone().requires_grad_()
            slope, = torch.autograd.grad(model.loss(model.block.output(probe), target).sum(), probe)
            jacobian = dense_jacobian(model, x, one)
            a = torch.linalg.solve(jacobian.mT, -slope.flatten()).view_as(one)
            score = (a * model.block(one, x)).sum() + model.loss(model.block.output(one), target).sum()
            grads = torch.autograd.grad(score / z.shape[0], list(parameters.values()), allow_unused=True,
                                        materialize_grads=True)
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += grad
    return total


def triangulation(model: Model, batches: list[tuple[Tensor, Tensor]], estimator: Estimator,
                  horizons: tuple[int, int], solver: Solver, nudged: Solver) -> dict[str, float]:
    """Gradient triangulation (Hao 2026): an estimator against BPTT at two horizons, and each against itself on another batch.

    batches: at least two (inputs, targets). Means over the batches of cos(estimator, BPTT at the shorter horizon), cos(BPTT at
    the two horizons) and the norm ratio estimator / BPTT; the self-cosines compare successive batches. An estimator whose phase
    diverged counts as NaN. Raises ValueError for fewer batches.
    """
    if len(batches) < 2:
        raise ValueError(f"gradients are compared from batch to batch, got {len(batches)} of them; give two or more")

    def flat(kind: Estimator, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, float]:
        report = gradient(model, inputs, targets, estimator=kind, solver=solver, nudged=nudged if kind.second_phase else None)
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


class LinearBlock(Dynamical):
    """F(z) = A z + x, states (..., n)."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.matrix.mT + x


class LinearSystem(Model):
    """x = B inputs, F = A z + x, loss = |z - target|^2 / 2: a model of which every gradient is known in closed form."""

    def __init__(self, matrix: Tensor, inflow: Tensor):
        """matrix A (n, n), its eigenvalues left of zero; inflow B (n, m)."""
        super().__init__()
        self.block, self.inflow = LinearBlock(matrix), nn.Parameter(inflow)

    def clamp(self, inputs: Tensor) -> Tensor:
        return inputs @ self.inflow.mT

    def predict(self, h: Tensor) -> Tensor:
        return h

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        return (predictions - targets).square().sum(-1) / 2

    def closed_form(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The gradient of the mean loss: with a = -A^-T (z* - target), a z*^T in A and a inputs^T in B."""
        a, b = cast(LinearBlock, self.block).matrix.detach(), self.inflow.detach()
        z = -torch.linalg.solve(a, (inputs @ b.mT).mT).mT
        adjoint = -torch.linalg.solve(a.mT, (z - targets).mT).mT
        return {"block.matrix": adjoint.mT @ z / len(z), "inflow": adjoint.mT @ inputs / len(z)}


@dataclass(frozen=True)
class NonReciprocity:
    """How far J is from symmetric: S = (J + J^T) / 2, A = (J - J^T) / 2.

    abscissa: largest real part of the eigenvalues of J; below 0 small deviations die out in the end. numerical_abscissa:
    largest eigenvalue of S; above 0 some grow first. asymmetry: ||A|| / ||S|| (Frobenius). rho: spectral radius of S^-1 A.
    """

    abscissa: float
    numerical_abscissa: float
    asymmetry: float
    rho: float


def non_reciprocity(jacobian: Tensor) -> NonReciprocity:
    """Measures a dense Jacobian (n, n)."""
    s, a = (jacobian + jacobian.mT) / 2, (jacobian - jacobian.mT) / 2
    return NonReciprocity(torch.linalg.eigvals(jacobian).real.max().item(), torch.linalg.eigvalsh(s)[-1].item(),
                          (a.norm() / s.norm()).item(), torch.linalg.eigvals(torch.linalg.solve(s, a)).abs().max().item())


@torch.no_grad()
def singular_radii(model: Model, z: Tensor, v: Tensor) -> dict[str, float]:
    """How far z + beta v (B, T, C) may go in the complex plane of beta before `EquilibriumBlock`'s force is singular: smallest
    |beta|.

    LayerNorm: where a token's variance + eps is zero. tanh-GELU: where its logistic gate has a pole, 0.0447 h^3 + h = i pi /
    1.596, the hidden units moving linearly. Softmax: below this radius no denominator vanishes, since a sum of exponentials
    needs phases pi apart; its zero lies further out. To first order in beta inside the block. The nearest of them bounds the
    radius of convergence.
    """
    block = model.block
    if not isinstance(block, EquilibriumBlock) or block.altered() or block.layers.linear or block.layers.qk_norm:
        why = block.altered() if isinstance(block, EquilibriumBlock) else None
        raise TypeError(f"singular_radii is for blocks.Thick without qk_norm and blocks.Attractor, as they are built, got "
                        f"{type(block).__name__}{f': {why}' if why else ''}")

    def nearest(away: Tensor, moving: Tensor) -> float:
        """Smallest |away / moving|; what does not move is never reached."""
        return (away.abs() / moving.abs()).nan_to_num(nan=math.inf, posinf=math.inf).min().item()

    layers = block.layers
    zc, vc = z - z.mean(-1, keepdim=True), v - v.mean(-1, keepdim=True)
    a, b, c = (pair.mean(-1).to(torch.complex128) for pair in (vc * vc, 2 * zc * vc, zc * zc + EPS))
    root = (b * b - 4 * a * c).sqrt()
    radii = {"LayerNorm": min(nearest(-b + root, 2 * a), nearest(-b - root, 2 * a))}
    n, inverse = standardise(z)
    dn = standardise_slope(v, n, inverse)
    hidden, moving = layers.w1(n * layers.ln2.weight + layers.ln2.bias), layers.w1(dn * layers.ln2.weight)
    poles = torch.as_tensor(numpy.roots([GELU_CUBIC, 0, 1, -1j * math.pi / GELU_SCALE]))
    radii["tanh-GELU"] = min(nearest(pole - hidden, moving) for pole in poles)
    q, k = (split_heads(part, layers.heads) for part in layers.qkv(n * layers.ln1.weight + layers.ln1.bias).chunk(3, -1)[:2])
    dq, dk = (split_heads(part, layers.heads) for part in layers.qkv(dn * layers.ln1.weight).chunk(3, -1)[:2])
    slope = (dq @ k.mT + q @ dk.mT) / math.sqrt(q.shape[-1])  # (B, H, T, T), of the scores
    future = torch.ones_like(slope, dtype=torch.bool).triu(1) if layers.causal else torch.zeros_like(slope, dtype=torch.bool)
    spread = slope.masked_fill(future, -torch.inf).amax(-1) - slope.masked_fill(future, torch.inf).amin(-1)
    return radii | {"softmax": nearest(torch.full_like(spread, math.pi), spread)}


def ranks(values: Tensor) -> Tensor:
    """Rank of each value (n,), from 0; equal values share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count + 1) / 2).double()[place]


@torch.no_grad()
def adaptive_compute(model: Model, batches: Iterable[tuple[Tensor, Tensor]], step: float,
                     tolerances: tuple[float, ...] = (1e-2, 1e-3, 1e-4, 1e-5), noise: float = 0.0,
                     max_steps: int = 300) -> dict[str, dict]:
    """How many plain relaxation steps each image takes to each residual, against its margin and whether it is classified right.

    batches: (inputs, class ids), to whose inputs Gaussian noise of the standard deviation `noise` is added. The margin is the
    largest logit over the second at the tightest residual. For each tolerance, in decreasing order: the share that did not
    settle within `max_steps`; of the others mean, standard deviation, least and most steps; the mean over those classified
    right and wrong; Spearman's correlation of steps with margin; the mean in each tenth of the images by margin, smallest
    first. And `accuracy` in percent.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for inputs, targets in batches:
        inputs, targets = (part.to(next(model.parameters()).device) for part in (inputs, targets))
        if noise:
            inputs = inputs + noise * torch.randn(inputs.shape, generator=generator).to(inputs)
        state: Tensor | None = None
        total, steps, reached = torch.zeros((), dtype=torch.long), [], []
        for tol in tolerances:  # one relaxation, read where it passes each residual
            phase = model.settle(inputs, Relaxation(step=step, max_steps=max_steps, tol=tol), state)
            state, total = phase.value, phase.steps + total
            steps.append(total)
            reached.append((phase.residual <= tol) & (total <= max_steps))  # the steps to the residuals above count as well
        best = model.predict(model.block.output(phase.value)).topk(2)
        rows.append((torch.stack(steps, -1), torch.stack(reached, -1), best.values[:, 0] - best.values[:, 1],
                     best.indices[:, 0] == targets))
    taken, settled, margins, right = (torch.cat(part).cpu() for part in zip(*rows, strict=True))
    tenth = (ranks(margins) * 10 / len(margins)).long()
    found: dict[str, Any] = {"accuracy": 100 * right.double().mean().item()}
    for index, tol in enumerate(tolerances):
        kept = settled[:, index]
        n = taken[kept, index].double()
        if len(n) < 2:
            found[f"{tol:g}"] = {"unsettled": 1 - len(n) / len(kept)}
            continue
        both = torch.stack([ranks(n), ranks(margins[kept])])
        found[f"{tol:g}"] = {
            "unsettled": 1 - len(n) / len(kept), "mean": n.mean().item(), "deviation": n.std().item(),
            "least": n.min().item(), "most": n.max().item(), "right": n[right[kept]].mean().item(),
            "wrong": n[~right[kept]].mean().item(), "rank_correlation": torch.corrcoef(both)[0, 1].item(),
            "by_margin": [n[tenth[kept] == part].mean().item() for part in range(10)]}
    return found


def attention_distance(jacobian: Any) -> Tensor:
    """Effective attention distance: sum_s w_ts |t - s| of attention weights w, mean over tokens and heads, (B,), in tokens.

    Raises TypeError for a derivative without attention weights of its own: that of a stack or an automatic one.
    """
    if not isinstance(jacobian, Jacobian):
        raise TypeError(f"{type(jacobian).__name__} holds no attention weights; attention_distance is for the derivative by "
                        "hand of blocks.Thick, Attractor, Thin and LinearAttention")
    weights = jacobian.attention.weights  # (B, H, T, T)
    places = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
    return (weights * (places[:, None] - places).abs()).sum(-1).mean((-2, -1))


def fingerprint(model: Model, inputs: Tensor, targets: Tensor, solver: Solver,
                step: float = 0.5) -> dict[str, float]:
    """Operator fingerprint (Hao 2026): what a stored checkpoint's free phase and Jacobian are like on one batch, in one call.

    residual: of the free phase, the largest. abscissa: largest real part of the eigenvalues of J, and frequency: the imaginary
    part of that eigenvalue; rate_arnoldi: spectral radius of I + step J, the step being `rate_step`; all exact and over all
    tokens, or with `abscissa_residual` (`spectra.edges`). numerical_abscissa, transient_growth (the largest of 1 .. 16 steps),
    asymmetry_radius (rho(S^-1 A)) and its residual, asymmetry ||J a - J^T a|| / ||J a|| along the adjoint state, cosine of
    uncorrected EP's gradient with the exact one over block and embeddings, attention_distance in tokens. Every number is the
    worst of the batch; cosine and distance are of the batch as a whole. NaN where the free phase diverged, and for what the
    block does not have: attention_distance without the derivative by hand of one attention layer, the radius and its residual
    where S is singular. Raises TypeError for blocks.Feedforward, which has no dynamics.
    """
    if model.block.explicit:
        raise TypeError(f"{type(model.block).__name__} is no equilibrium block: it has no fixed point and no Jacobian there")
    names = ("abscissa", "frequency", "abscissa_residual", "rate_arnoldi", "rate_step", "numerical_abscissa",
             "transient_growth", "asymmetry_radius", "asymmetry_radius_residual", "asymmetry", "cosine_uncorrected",
             "attention_distance")
    solution = model.settle(inputs, solver)
    found = {"residual": solution.residual.max().item()} | dict.fromkeys(names, math.nan)
    if not solution.status.usable:
        return found
    with torch.no_grad():
        z, jacobian = solution.value, model.block.linearise(solution.value, model.clamp(inputs))
    rho, residual = spectra.asymmetry_radius(jacobian, z)
    exact, plain = (gradient(model, inputs, targets, estimator=kind, solver=solver, start=z, nudged=Anderson(tol=1e-3))
                    for kind in (DyadicEP(), VectorField(beta=1e-2)))
    found |= spectra.edges(model.block, z, model.clamp(inputs), step) | {
        "numerical_abscissa": spectra.numerical_abscissa(jacobian, z).max().item(),
        "transient_growth": spectra.transient_growth(jacobian, z, step).max().item(),
        "asymmetry_radius": rho.max().item(), "asymmetry_radius_residual": residual.max().item()}
    if exact.grads is not None and exact.adjoint is not None:
        found["asymmetry"] = asymmetry(jacobian, exact.adjoint)
        if plain.grads is not None:
            found["cosine_uncorrected"] = agreement(*map(model.without_readout, (plain.grads, exact.grads)))["total"].cosine
    if isinstance(jacobian, Jacobian):
        found["attention_distance"] = attention_distance(jacobian).mean().item()
    return found


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages allocated inside the `with` block and still alive; `.peak` is the most at once.

    Exact and independent of the allocator: every operation's outputs are seen, and a storage counts until it is freed.
    Temporaries inside one kernel are not tensors and are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = {a.untyped_storage()._cdata for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._known or key in arguments:
                continue  # a view, or a result written in place
            self._known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out
