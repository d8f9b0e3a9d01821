"""Right or refused: estimator x solver x nudged solver x block x backend x start x penalties.

Every call gives the gradient that dense linear algebra gives at the same fixed point, or is refused with an error that names
two of its parts. Nothing else may happen. All pairs of choices are enumerated; whole combinations are drawn besides.
"""

import itertools
import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import eplib
from eplib import blocks, estimators, models
from eplib.calculus import Sublayers
from eplib.controllers import (
    ContractionRate,
    Homeostasis,
    Integral,
    JacobianNorm,
    LeadingMode,
    NumericalAbscissa,
    ResidualDriven,
    ResidualPenalty,
)
from eplib.diagnostics import dense_jacobian
from eplib.kernels import KernelError
from eplib.solvers import (
    Anderson,
    FixedHorizon,
    Homotopy,
    MixedPrecision,
    Relaxation,
    Snapshot,
    Status,
    Substitution,
    norm,
)
from eplib.starts import LinearStart
from systems import TIGHT  # which also sets one thread

SAMPLES, TOKENS, WIDTH, VOCAB, STEP = 2, 4, 16, 7, 0.7


class Shifted(blocks.EquilibriumBlock):
    """A subclass with a force of its own."""

    def forward(self, z, x):
        return super().forward(z, x) - 0.1 * torch.tanh(z)


class Pair(blocks.Dynamical):
    """A block of a user's own: two coupled layers of which the second knows the clamp only through the first."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def start(self, x):
        return torch.stack([x, torch.zeros_like(x)], -3)  # (..., 2, T, C)

    def forward(self, z, x):
        low, high = z.unbind(-3)
        return torch.stack([x - low + 0.3 * torch.tanh(self.down(high)), torch.tanh(self.up(low)) - high], -3)

    def output(self, z):
        return z[..., 0, :, :]


def shifted(model):
    model.block = Shifted(Sublayers(WIDTH, 2, 4, True, False, 0.3), 0.0)


def hooked(model):
    model.block.register_forward_hook(lambda block, arguments, force: 0.9 * force)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.block.layers.w1)


def own(model):
    model.block = Pair()


BLOCKS = {
    "Thick": (blocks.Thick(init=0.3), None), "image": (blocks.Thick(init=0.3, causal=False), None),
    "damped": (blocks.Thick(init=0.3, damping=0.2), None), "qk_norm": (blocks.Thick(init=0.3, qk_norm=True), None),
    "gated": (blocks.Thick(init=0.6, gated=1.0, damping=0.2, learned_damping=True), None),
    "Attractor": (blocks.Attractor(init=0.3), None), "Layered": (blocks.Layered(layers=2, init=0.3), None),
    "LayeredAttractor": (blocks.LayeredAttractor(init=0.3), None),
    "Thin": (blocks.Thin(), None), "Energy": (blocks.Energy(), None), "Energy, image": (blocks.Energy(causal=False), None),
    "Monotone": (blocks.Monotone(bound=0.5), None), "LinearAttention": (blocks.LinearAttention(init=0.1), None),
    "LinearAttention, symmetric": (blocks.LinearAttention(symmetric=True), None), "Feedforward": (blocks.Feedforward(), None),
    "subclass": (blocks.Thick(init=0.3), shifted), "hooked": (blocks.Thick(init=0.3), hooked),
    "parametrised": (blocks.Thick(init=0.3), parametrised), "own": (blocks.Thick(), own)}
ESTIMATORS = {
    "AsymEP": lambda beta: estimators.AsymEP(beta=beta),
    "one-sided": lambda beta: estimators.AsymEP(beta=beta, nudging="one-sided"),
    "random-sign": lambda beta: estimators.AsymEP(beta=beta, nudging="random-sign"),
    "VectorField": lambda beta: estimators.VectorField(beta=beta),
    "Holomorphic": lambda beta: estimators.HolomorphicEP(beta=beta),
    "Tracking": lambda beta: estimators.Tracking(beta=beta),
    "Tracking, warm": lambda beta: estimators.Tracking(beta=beta, held=True, warm=True),
    "DyadicEP": lambda beta: estimators.DyadicEP(), "DyadicEP, moving": lambda beta: estimators.DyadicEP(beta=beta, held=False),
    "Implicit": lambda beta: estimators.Implicit(), "OneStep": lambda beta: estimators.OneStep(),
    "FeedbackAlignment": lambda beta: estimators.FeedbackAlignment(), "ShuffledNudge": lambda beta: estimators.ShuffledNudge(),
    "FlippedCorrection": lambda beta: estimators.FlippedCorrection(beta=beta), "Backprop": lambda beta: estimators.Backprop(),
    "BPTT": lambda beta: estimators.BPTT(steps=40), "BPTT, last": lambda beta: estimators.BPTT(steps=40, window=1),
    "ForwardMode": lambda beta: estimators.ForwardMode(steps=30)}
SOLVERS = {
    "Relaxation": lambda tol: Relaxation(step=STEP, max_steps=300, tol=tol),
    "Anderson": lambda tol: Anderson(step=STEP, max_steps=300, tol=tol),
    "Homotopy": lambda tol: Homotopy(step=STEP, max_steps=300, tol=tol, stages=2, corrections=4),
    "MixedPrecision": lambda tol: MixedPrecision(step=STEP, max_steps=300, tol=tol),
    "Substitution": lambda tol: Substitution(step=STEP, max_steps=300, tol=tol, chunk=2),
    "FixedHorizon": lambda tol: FixedHorizon(step=STEP, steps=40), "Snapshot": lambda tol: Snapshot(step=STEP, max_steps=40)}
PENALTIES = {
    "none": (), "rate": (ContractionRate(target=0.2, strength=2.0, products=1),),
    "plane": (ContractionRate(target=0.2, strength=2.0, probes=2),),
    "token": (ContractionRate(target=0.2, strength=2.0, per="token"),),
    "plane, driven": (ContractionRate(target=0.2, strength=2.0, probes=2, driven=Integral(floor=0.5)),),
    "token, driven": (ContractionRate(target=0.2, strength=2.0, per="token", step=0.25, driven=Integral(floor=0.5)),),
    "mode": (LeadingMode(margin=0.95, strength=2.0),),
    "numerical": (NumericalAbscissa(bound=-0.9, size=2),),
    "norm": (JacobianNorm(driven=ResidualDriven()),), "residual": (ResidualPenalty(),), "homeostasis": (Homeostasis(),),
    "two of a kind": (ContractionRate(target=0.2, strength=2.0), ContractionRate(target=0.3, strength=1.0, products=0)),
    "two kinds": (Homeostasis(), JacobianNorm(strength=2.0))}
AXES = {"estimator": list(ESTIMATORS), "block": list(BLOCKS), "solver": list(SOLVERS), "nudged": ["none", *SOLVERS],
        "start": ["none", "tensor", "LinearStart"], "penalties": list(PENALTIES), "backend": ["torch", "compiled"]}

PLAINEST = {"estimator": "DyadicEP", "block": "Thick", "solver": "Relaxation", "nudged": "none", "start": "none",
            "penalties": "none", "backend": "torch"}


@cache
def system(block: str, dtype: torch.dtype):
    """A model with a batch, its fixed point and, sample by sample, J and g there."""
    torch.manual_seed(1)
    config, change = BLOCKS[block]
    model = models.LanguageModel(vocab=VOCAB, width=WIDTH, heads=2, context=TOKENS, block=config)
    if change:
        change(model)
    model = model.double()
    nn.init.normal_(model.readout.weight, std=0.3)
    inputs, targets = torch.randint(VOCAB, (SAMPLES, TOKENS)), torch.randint(VOCAB, (SAMPLES, TOKENS))
    if model.block.explicit:
        return model.to(dtype), inputs, targets, None, None, None
    found = model.settle(inputs, replace(TIGHT, step=STEP))
    assert found.status is Status.CONVERGED
    z, x = found.value, model.clamp(inputs).detach()
    jacobians = torch.stack([dense_jacobian(model, x[b:b + 1], z[b:b + 1]) for b in range(SAMPLES)])
    return model.to(dtype), inputs, targets, z, jacobians, slope(model.double(), z, targets)


def slope(model, z, targets):
    probe = z.clone().requires_grad_()
    return torch.autograd.grad(model.loss(model.block.output(probe), targets).sum(), probe)[0]


def adjoint(kind: str, report, model, targets, z, j, g):
    """The adjoint state that the estimator of this name says it finds, by dense linear algebra."""
    def solve(matrix, right):
        return torch.linalg.solve(matrix, -right.flatten(1).unsqueeze(-1)).view_as(z)

    if kind == "OneStep":
        return g
    if kind == "BPTT, last":
        return STEP * g
    if kind == "VectorField":
        return solve(j, g)
    if kind == "FlippedCorrection":
        return solve(2 * j - j.mT, g)
    if kind == "ShuffledNudge":
        return solve(j.mT, slope(model, z, targets.flatten().roll(targets.numel() // 2).view_as(targets)))
    if kind == "FeedbackAlignment":
        logits = model.predict(model.block.output(z)).detach()
        error = (logits.softmax(-1) - nn.functional.one_hot(targets, VOCAB)) / TOKENS
        if z.dim() > 3:
            error = error.unsqueeze(1)
        return (error @ report.state["feedback"].to(z)).expand_as(z)
    return solve(j.mT, g)


def truth(model, inputs, targets, z, a):
    """d/dtheta of mean_b <a_b, F> + l_b by autograd, of parameters that are trained."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if z is None:  # a feedforward block
        score = model.loss(model.block.start(model.clamp(inputs)), targets).mean()
    else:
        score = (a * model.block(z, model.clamp(inputs))).sum() / SAMPLES + model.loss(model.block.output(z), targets).mean()
    found = torch.autograd.grad(score, list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


def penalty_value(penalty, model, z, x, step):
    """The formula of the penalty's docstring, J dense and with a graph in the weights, z and directions held."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        j = torch.stack([torch.autograd.functional.jacobian(lambda s, b=b: model.block(s, x[b:b + 1]).flatten(), z[b:b + 1],
                                                            create_graph=True).flatten(1) for b in range(len(z))])
    with torch.no_grad():  # bit by bit as the phase computes it: of a settled state it is all round-off, and a probe
        force = model.block(z, x)
    eye = torch.eye(j.shape[-1], dtype=j.dtype)
    draw = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw = (draw / norm(draw).view(-1, *[1] * (z.dim() - 1))).flatten(1).unsqueeze(-1)

    def krylov(step, products, size):
        iterates = [force.flatten(1)]
        for _ in range(products + size - 1):
            v = iterates[-1] / iterates[-1].norm(dim=1, keepdim=True)
            iterates.append(v + step * (j.detach() @ v.unsqueeze(-1)).squeeze(-1))
        return torch.linalg.qr(torch.stack([v / v.norm(dim=1, keepdim=True) for v in iterates[-size:]], -1))[0]

    if isinstance(penalty, JacobianNorm):
        strength, residual = penalty.strength, (norm(force) / norm(z)).max().item()
        if penalty.driven:
            strength = penalty.driven(residual, {}, strength)
        decay = (torch.ones_like(z[0]) * model.block.state_decay).flatten()
        return strength * ((j + decay * eye) @ draw).square().sum((1, 2)).mean()
    if isinstance(penalty, Homeostasis):
        return penalty.strength * ((j - j.mT) @ draw).square().sum((1, 2)).mean()
    if isinstance(penalty, ResidualPenalty):
        return penalty.strength * (norm(model.block(z, x)) / norm(z)).square().mean()
    if isinstance(penalty, LeadingMode):
        q = krylov(penalty.step, penalty.products, 2)
        alpha = torch.linalg.eigvals(q.mT @ j @ q).real.amax(-1)
        return penalty.strength * (alpha + penalty.margin).clamp_min(0).square().mean()
    if isinstance(penalty, NumericalAbscissa):
        s, v, columns = (j + j.mT).detach() / 2, force.flatten(1).unsqueeze(-1), []
        for _ in range(penalty.size):
            columns.append(v / v.norm(dim=1, keepdim=True))
            v = s @ columns[-1]
        q = torch.linalg.qr(torch.cat(columns, -1))[0]
        top = q @ torch.linalg.eigh(q.mT @ s @ q)[1][..., -1:]
        return penalty.strength * ((top.mT @ j @ top).flatten() - penalty.bound).clamp_min(0).square().mean()
    step = penalty.step or step
    move = eye + step * j
    if penalty.per == "token":
        own = move.unflatten(1, (TOKENS, WIDTH)).unflatten(3, (TOKENS, WIDTH))
        move = torch.stack([own[:, t, :, t] for t in range(TOKENS)], 1)  # (B, T, C, C)
        v = force
        for _ in range(penalty.products):
            v = (move.detach() @ v.unsqueeze(-1)).squeeze(-1)
        rate = ((move @ v.unsqueeze(-1)).squeeze(-1).norm(dim=-1) / v.norm(dim=-1))
    elif penalty.probes > 1:
        q = krylov(step, penalty.products, penalty.probes)
        rate = torch.linalg.eigvals(q.mT @ move @ q).abs().amax(-1)
    else:
        v = force.flatten(1).unsqueeze(-1)
        for _ in range(penalty.products):
            v = move.detach() @ v
        rate = (move @ v).norm(dim=1).squeeze(-1) / v.norm(dim=1).squeeze(-1)
    strength = penalty.strength
    if penalty.driven:
        strength = penalty.driven((rate > penalty.target).double().mean().item(), {}, strength)
    return strength * (rate.view(len(rate), -1).amax(1) - penalty.target).clamp_min(0).square().mean()


def named(case: dict, model, message: str) -> set[str]:
    """The axes of which the message names this case's choice, or what it is made of."""
    words = {"block": {type(model.block).__name__, "block"}, "estimator": {estimator_of(case).kind}, "backend": {"compiled"},
             "start": {"start", "LinearStart"}, "solver": {SOLVERS[case["solver"]](0.1).kind},
             "nudged": {"nudged", "second phase"} | ({case["nudged"]} - {"none"}),
             "dtype": {"float64", "float32", "complex"}, "penalties": {p.kind for p in PENALTIES[case["penalties"]]} | {"per="}}
    return {axis for axis, some in words.items() if any(word in message for word in some)}


def estimator_of(case: dict):
    return ESTIMATORS[case["estimator"]](1e-3 if case["backend"] == "torch" else 0.05)


def check(case: dict) -> str:
    """Runs one combination: "right" or "refused", and raises for anything else."""
    single = case["backend"] == "compiled"
    dtype = torch.float32 if single else torch.float64
    model, inputs, targets, z, j, g = system(case["block"], torch.float64)
    if single:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model = model.to(dtype)
    try:
        return _check(case, model, inputs, targets, z, j, g, single)
    finally:
        if single:
            model.double().load_state_dict(state)
        model.requires_grad_(True)


def _check(case, model, inputs, targets, z, j, g, single) -> str:
    kind, kinds = case["estimator"], PENALTIES[case["penalties"]]
    if kind == "ForwardMode":  # a tangent for each parameter
        small = [n for n, value in model.named_parameters() if value.dim() == 1 and n.startswith("block.")][:1]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in ("norm.bias", *small))
    solver = SOLVERS[case["solver"]]((1e-4 if kinds else 1e-6) if single else 1e-7 if kinds else 1e-9)
    estimator = estimator_of(case)
    if kinds and z is not None:  # no further than this: rounding makes noise of a settled state's force, a penalty's probe
        last = 8 if single else int(model.settle(inputs, replace(TIGHT, step=STEP, tol=1e-9)).steps.max())
        solver = solver if solver.tol else solver.limited(min(solver.max_steps, last))
        if estimator.kind in ("BPTT", "ForwardMode"):
            estimator = replace(estimator, steps=min(estimator.steps, last))
    chosen = {"solver": solver, "backend": case["backend"], "penalties": kinds, "estimator": estimator,
              "nudged": None if case["nudged"] == "none" else SOLVERS[case["nudged"]](1e-3 if single else 1e-7)}
    if case["start"] == "LinearStart":
        chosen["start"] = LinearStart(refresh=1)
    elif case["start"] == "tensor":
        start = model.block.start(model.clamp(inputs)).detach()
        chosen["start"] = start + 0.01
    try:
        report = eplib.gradient(model, inputs, targets, **chosen)
        if case["start"] == "LinearStart":  # the first call fits it, exactly on so few tokens: a penalty's probe needs more
            fitted = {} if kinds else {key: value for key, value in report.state.items() if "start" in key}
            report = eplib.gradient(model, inputs, targets, state=fitted, **chosen)
    except (ValueError, TypeError, KernelError) as error:
        if len(named(case, model, str(error))) < 2:
            raise AssertionError(f"{error} names no two parts") from error
        return "refused"
    if kind == "FlippedCorrection" and report.status is Status.DIVERGED:  # as its own J says: 2 J - J^T need not contract
        flipped = torch.eye(j.shape[-1]) + STEP * (2 * j - j.mT)
        assert report.grads is None and torch.linalg.eigvals(flipped).abs().max() > 1
        return "right"
    assert report.status.usable and report.grads is not None, report.status
    wide = model.double()
    a = None if z is None else adjoint(kind, report, wide, targets, z, j, g).detach()
    expected = truth(wide, inputs, targets, z, a)
    bias = 1e-2 if kind in ("one-sided", "random-sign") else 1e-4  # of first order in beta
    left = 10 * report.nudged.residual.max().item() if report.nudged else 0.0  # of what has not settled
    compare(report.grads, expected, max(bias, 3e-2 if single else 0.0) + left)
    if kinds:
        x = model.clamp(inputs).detach()
        trained = {f"block.{n}": value for n, value in wide.block.named_parameters() if value.requires_grad}
        # at the state that the phase reached, whose force is the probe
        total = sum(penalty_value(penalty, wide, report.free.value.double(), x, chosen["solver"].step) for penalty in kinds)
        found = torch.autograd.grad(total, list(trained.values()), allow_unused=True, materialize_grads=True) if \
            total.requires_grad and trained else [torch.zeros_like(value) for value in trained.values()]
        got = {name: report.penalty_grads.get(name, torch.zeros_like(value)) for name, value in trained.items()}
        assert report.measured["penalty"] == pytest.approx(total.item(), rel=2e-2 if single else 1e-6, abs=1e-12)
        compare(got, dict(zip(trained, found, strict=True)), 5e-2 if single else 1e-5)
    assert all(math.isfinite(value) for value in report.measured.values())
    return "right"


def compare(found, expected, tolerance):
    assert found.keys() == expected.keys()
    scale = max(value.norm() for value in expected.values()) if expected else 0
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * (value.norm() + 1e-2 * scale) + 1e-12, name


def covering() -> list[dict]:
    """Combinations in which every pair of choices of two axes occurs, found greedily: the same list every time."""
    names, generator = list(AXES), random.Random(0)
    left = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in AXES[a] for y in AXES[b]}
    found = []
    while left:
        first = min(left)
        best = max(({**{name: generator.choice(AXES[name]) for name in names}, **dict(first)} for _ in range(30)),
                   key=lambda case: sum(pair in left for pair in itertools.combinations(case.items(), 2)))
        left -= set(itertools.combinations(best.items(), 2))
        found.append(best)
    return found


def failures(cases) -> tuple[dict[str, list[dict]], list[str]]:
    """The cases of each outcome, and what went neither way."""
    outcomes, found = {"right": [], "refused": []}, []
    for case in cases:
        try:
            outcomes[check(case)].append(case)
        except Exception as error:  # each is reported with its combination
            found.append(f"{case}: {type(error).__name__}: {str(error)[:300]}")
    return outcomes, found


@cache
def covered() -> tuple[dict[str, list[dict]], list[str]]:
    return failures(covering())


def test_every_pair_of_choices_is_right_or_refused(compiled_kernel):
    outcomes, found = covered()
    assert not found, "\n".join(found)
    assert len(outcomes["right"]) > 60 and len(outcomes["refused"]) > 60  # else this shows nothing


@pytest.mark.slow
def test_a_pair_that_a_third_choice_kept_from_being_tried_is_right_or_refused(compiled_kernel):
    """Each such pair once more, among choices that fit most."""
    (outcomes, _), pairs = covered(), lambda case: set(itertools.combinations(case.items(), 2))
    left = set().union(*map(pairs, outcomes["refused"])) - set().union(*map(pairs, outcomes["right"]))
    alone, found = failures([PLAINEST | dict(pair) for pair in sorted(left)])
    assert not found, "\n".join(found)
    assert len(alone["right"]) > 60 and len(alone["refused"]) > 60


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.fixed_dictionaries({axis: st.sampled_from(choices) for axis, choices in (AXES | {
    "backend": ["torch"], "nudged": ["none"], "start": ["none", "tensor"],
    "solver": ["Relaxation", "Anderson", "Substitution", "Snapshot"]}).items()}))
def test_any_combination_is_right_or_refused(case):
    check(case)


def test_the_negative_controls_are_wrong_in_the_way_they_say():
    """Each equals a dense formula of its own above; that formula is not the gradient."""
    model, inputs, targets, z, j, g = system("Thick", torch.float64)
    right = truth(model, inputs, targets, z, adjoint("DyadicEP", None, model, targets, z, j, g))
    for kind in ("VectorField", "FlippedCorrection", "ShuffledNudge", "OneStep", "BPTT, last"):
        other = truth(model, inputs, targets, z, adjoint(kind, None, model, targets, z, j, g))
        mine, exact = (found["block.layers.wo.weight"] for found in (other, right))
        assert (mine - exact).norm() > 0.05 * exact.norm(), kind
        assert torch.allclose(other["readout.weight"], right["readout.weight"])


CADENCES = (
    (ContractionRate(target=0.2, every=2), ContractionRate(target=0.3, every=2)),
    (ContractionRate(target=0.2, every=1), ContractionRate(target=0.2, every=2), ContractionRate(target=0.2, every=3)),
    (JacobianNorm(driven=ResidualDriven()), JacobianNorm(strength=1.0, driven=ResidualDriven(gain=0.7))),
    (JacobianNorm(), Homeostasis(), ContractionRate(target=0.2, every=3), LeadingMode(margin=0.95), ResidualPenalty()))


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("penalties", CADENCES, ids=lambda p: "+".join(one.kind for one in p))
def test_any_list_of_penalties_is_the_sum_of_its_parts_at_every_cadence(penalties, backend, compiled_kernel):
    model, inputs, targets, *_ = system("Thick", torch.float64)
    model = model.float()
    try:
        call = {"estimator": estimators.OneStep(), "solver": FixedHorizon(step=STEP, steps=4), "backend": backend}
        whole, parts = {}, [{} for _ in penalties]
        for _ in range(4):
            together = eplib.gradient(model, inputs, targets, penalties=penalties, state=whole, **call)
            alone = [eplib.gradient(model, inputs, targets, penalties=(penalty,), state=state, **call)
                     for penalty, state in zip(penalties, parts, strict=True)]
            whole, parts = together.state, [report.state for report in alone]
            names = {name for report in alone for name in report.penalty_grads}
            assert names == set(together.penalty_grads)
            for name in names:
                expected = sum(report.penalty_grads[name] for report in alone if name in report.penalty_grads)
                assert torch.allclose(together.penalty_grads[name], expected, rtol=1e-4, atol=1e-7), name
            values = [report.measured["penalty"] for report in alone if "penalty" in report.measured]
            assert together.measured.get("penalty") == (pytest.approx(sum(values), rel=1e-5) if values else None)
            counts: dict[str, int] = {}
            own = {}  # what each measures where it acts, and nothing where it does not
            for penalty, report in zip(penalties, alone, strict=True):
                counts[penalty.kind] = counts.get(penalty.kind, 0) + 1
                suffix = f".{counts[penalty.kind]}" if counts[penalty.kind] > 1 else ""
                own |= {(f"penalty.{penalty.kind}" if name == "penalty" else name) + suffix: value
                        for name, value in report.measured.items() if name != "force_evaluations"}
            found = {name: value for name, value in together.measured.items() if name not in ("force_evaluations", "penalty")}
            assert found == pytest.approx(own, rel=1e-5)
    finally:
        model.double()


def test_two_kinds_that_measure_one_name_are_refused():
    def penalty(problem, step, carried):
        return eplib.controllers.Outcome({}, {"coefficient": 1.0}, 0)

    model, inputs, targets, *_ = system("Thick", torch.float64)
    with pytest.raises(ValueError, match="function and JacobianNorm both measure 'coefficient'"):
        eplib.gradient(model, inputs, targets, estimator=estimators.OneStep(), solver=Anderson(),
                       penalties=(JacobianNorm(), penalty))


def test_the_first_example_of_the_readme_converges_in_both_phases():
    code = Path(__file__).resolve().parent.parent.joinpath("README.md").read_text().split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    inputs = torch.randint(65, (4, 64))
    names = {"inputs": inputs, "targets": inputs.roll(-1, 1)}
    exec(code, names)
    assert [phase.status.value for phase in (names["report"].free, names["report"].nudged)] == ["converged"] * 2
