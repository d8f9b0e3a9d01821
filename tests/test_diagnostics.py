"""Measurements at a fixed point, against what they are by definition; and where they are refused."""

import math

import pytest
import torch
from torch import nn

from eplib import blocks, diagnostics, estimators, models
from eplib.calculus import EPS
from eplib.solvers import Anderson, Relaxation
from systems import linear_batch, linear_system, transformer

SOLVER = Anderson(step=0.5, max_steps=400, tol=1e-10)
EVERY = [blocks.Thick(init=0.5), blocks.Thick(init=0.5, causal=False, qk_norm=True), blocks.Layered(layers=2, init=0.5),
         blocks.Attractor(init=0.5), blocks.Thin(init=0.5), blocks.Thin(init=0.5, causal=False), blocks.Energy(init=0.5),
         blocks.Energy(init=0.5, causal=False), blocks.LinearAttention(init=0.3), blocks.LinearAttention(symmetric=True),
         blocks.Monotone(bound=0.6)]


def small(config):
    torch.manual_seed(1)
    model = models.LanguageModel(vocab=7, width=8, heads=2, context=5, block=config).double()
    nn.init.normal_(model.readout.weight, std=0.5)
    return model, torch.randint(7, (2, 5)), torch.randint(7, (2, 5))


def test_every_name_has_a_group_whatever_has_renamed_it():
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=7, width=8, heads=2, context=5, block=blocks.Thick())
    plain = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    assert set(diagnostics.groups(plain)) == set(diagnostics.GROUPS)
    nn.utils.parametrizations.weight_norm(model.block.layers.w1)
    nn.utils.parametrizations.orthogonal(model.block.layers.wo)
    nn.utils.parametrizations.spectral_norm(model.block.layers.qkv)
    model.block = torch.compile(model.block, backend="eager")
    model.adapter, model.block.norm = nn.Linear(8, 8), nn.LayerNorm(8)
    renamed = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    assert not set(renamed) & {f"block.layers.{name}.weight" for name in ("w1", "wo", "qkv")}
    found = diagnostics.groups(renamed)
    assert set(found) == {*diagnostics.GROUPS, "other"}
    sizes = {"Wq": 64, "Wk": 64, "Wv": 64, "Wo": 64, "W1": 32 + 256, "W2": 256, "LN": 32, "other": 72 + 16}
    assert {group: found[group].numel() for group in sizes} == sizes
    assert set(model.without_readout(renamed)) == {n for n in renamed if n.split(".")[0] not in ("norm", "readout")}
    whole = {f"_orig_mod.{name}": value for name, value in plain.items()}
    assert set(model.without_readout(whole)) == {f"_orig_mod.{name}" for name in model.without_readout(plain)}


def test_gradients_of_different_parameters_have_no_agreement():
    one, other = {"block.a": torch.ones(2), "inflow": torch.ones(2)}, {"block.a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="same parameters, or shapes: b, inflow"):
        diagnostics.agreement(one, other)
    with pytest.raises(ValueError, match="shapes: block"):
        diagnostics.agreement({"block.a": torch.ones(2)}, {"block.a": torch.ones(3)})
    with pytest.raises(ValueError, match="without parameters"):
        diagnostics.agreement({}, {})
    assert diagnostics.agreement(one, one)["other"].cosine == pytest.approx(1)


@pytest.mark.parametrize("config", EVERY, ids=repr)
def test_every_equilibrium_block_has_a_fingerprint(config):
    model, inputs, targets = small(config)
    found = diagnostics.fingerprint(model, inputs, targets, SOLVER)
    z = model.settle(inputs, SOLVER).value
    values = []
    for b in range(2):
        x = model.clamp(inputs[b:b + 1]).detach()
        dense = diagnostics.dense_jacobian(model, x, z[b:b + 1])
        values.append(torch.linalg.eigvals(dense).real.max().item())
    # all eigenvalues of Layered are -1 in Jordan blocks, which split by a root of the rounding
    assert found["abscissa"] == pytest.approx(max(values), abs=1e-3 if config.kind == "Layered" else 1e-6)
    lacks = {"attention_distance"} if config.kind in ("Layered", "Energy", "Monotone") or getattr(config, "symmetric", False) \
        else set()
    assert {name for name, value in found.items() if math.isnan(value)} == lacks
    jacobian = model.block.linearise(z, model.clamp(inputs).detach())
    assert ("attention_distance" in lacks) == (not isinstance(jacobian, blocks.Jacobian))


def test_a_hooked_block_has_the_fingerprint_of_its_force():
    model, inputs, targets = small(blocks.Thick(init=0.5))
    before = diagnostics.fingerprint(model, inputs, targets, SOLVER)
    model.block.layers.w2.register_forward_hook(lambda module, inputs, out: 3 * out)
    hooked = diagnostics.fingerprint(model, inputs, targets, SOLVER)
    model.block.layers.w2._forward_hooks.clear()
    with torch.no_grad():
        model.block.layers.w2.weight.mul_(3)
    scaled = diagnostics.fingerprint(model, inputs, targets, SOLVER)
    assert math.isnan(hooked.pop("attention_distance")) and scaled.pop("attention_distance") > 0
    assert abs(scaled["abscissa"] - before["abscissa"]) > 1e-3
    for name in ("abscissa", "numerical_abscissa", "asymmetry", "transient_growth"):
        assert hooked[name] == pytest.approx(scaled[name], abs=1e-5), name


def test_what_a_block_does_not_have_is_refused_by_name():
    model, inputs, targets = small(blocks.Feedforward())
    with pytest.raises(TypeError, match="FeedforwardBlock is no equilibrium block"):
        diagnostics.fingerprint(model, inputs, targets, SOLVER)
    for config, kind in ((blocks.Layered(layers=2), "StackJacobian"), (blocks.Energy(), "AutomaticSlope")):
        model, inputs, _ = small(config)
        z = model.block.start(model.clamp(inputs)).detach()
        with pytest.raises(TypeError, match=f"{kind} holds no attention weights"):
            diagnostics.attention_distance(model.block.linearise(z, model.clamp(inputs).detach()))
    for config, why in ((blocks.Energy(), "EnergyBlock"), (blocks.Layered(), "LayeredBlock"),
                        (blocks.LinearAttention(), "EquilibriumBlock"), (blocks.Thick(qk_norm=True), "EquilibriumBlock")):
        model, inputs, _ = small(config)
        z = model.clamp(inputs).detach()
        with pytest.raises(TypeError, match=f"got {why}"):
            diagnostics.singular_radii(model, z, z)
    model, inputs, _ = small(blocks.Thick())
    model.block.layers.w1.register_forward_hook(lambda *rest: None)
    with pytest.raises(TypeError, match=r"layers.w1 has hooks"):
        diagnostics.singular_radii(model, model.clamp(inputs).detach(), model.clamp(inputs).detach())


@pytest.mark.parametrize("config", [blocks.Thick(init=0.5), blocks.Thin(init=0.5, causal=False)], ids=repr)
def test_attention_distance_is_the_mean_of_a_double_sum(config):
    model, inputs, _ = small(config)
    block, z = model.block, torch.randn(2, 5, 8, dtype=torch.float64)
    found = diagnostics.attention_distance(block.linearise(z, model.clamp(inputs).detach()))
    source = block.layers if config.kind == "Thick" else block
    n = torch.nn.functional.layer_norm(z, (8,), eps=EPS)
    for b in range(2):
        q, k, _ = source.qkv(n[b]).chunk(3, -1)
        total = 0.0
        for h in range(2):
            for t in range(5):
                seen = range(t + 1) if config.causal else range(5)
                scores = [math.exp((q[t, 4 * h:4 * h + 4] @ k[s, 4 * h:4 * h + 4]).item() / 2) for s in seen]
                total += sum(score * abs(t - s) for score, s in zip(scores, seen, strict=True)) / sum(scores)
        assert found[b].item() == pytest.approx(total / 10, rel=1e-9)


def around(radius, value):
    """Least |value(beta)| over the circle of the radius: on a fine grid, then finer around its best point."""
    angles, width = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64), math.pi
    for _ in range(6):
        found = torch.stack([value(radius * torch.polar(torch.ones((), dtype=torch.float64), angle)) for angle in angles])
        width /= 40
        angles = angles[found.argmin()] + torch.linspace(-width, width, 101, dtype=torch.float64)
    return found.min().item()


@pytest.mark.parametrize("causal", [True, False])
def test_singular_radii_are_where_something_vanishes_first(causal):
    """Against the definitions on a circle in the complex plane: at the radius a denominator is zero, inside it none is."""
    torch.manual_seed(3)
    model, _, _ = transformer(kind="language" if causal else "image", init=1.0)
    block, layers = model.block, model.block.layers
    z, v = torch.randn(2, 1, 3, 16, dtype=torch.float64)
    v[0, 1] = 0  # a token that does not move is never singular
    radii = diagnostics.singular_radii(model, z, v)

    def variance(beta):
        moved = z + beta * v
        return ((moved - moved.mean(-1, keepdim=True)).square().mean(-1) + EPS).abs().min()

    with torch.no_grad():
        n = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
        along = torch.autograd.functional.jvp(lambda a: layers.w1(layers.ln2(a)), z, v)[1].to(torch.complex128)
        hidden = layers.w1(n * layers.ln2.weight + layers.ln2.bias)

        def gate(beta):
            h = hidden + beta * along
            return (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3))).abs().min()

        for name, value in (("LayerNorm", variance), ("tanh-GELU", gate)):
            reached, inside = around(radii[name], value), around(0.9 * radii[name], value)
            assert reached < 1e-4 < 1e-3 < inside, name

    def scores(a):
        q, k = (part.unflatten(-1, (layers.heads, -1)).transpose(1, 2) for part in layers.qkv(layers.ln1(a)).chunk(3, -1)[:2])
        return q @ k.mT / math.sqrt(q.shape[-1])

    moving = torch.autograd.functional.jvp(scores, z, v)[1]
    widest = max((moving[0, h, t, s] - moving[0, h, t, r]).abs().item() for h in range(layers.heads) for t in range(3)
                 for s in range(t + 1 if causal else 3) for r in range(t + 1 if causal else 3))
    assert radii["softmax"] == pytest.approx(math.pi / widest, rel=1e-9)
    still = diagnostics.singular_radii(model, z, torch.zeros_like(v))
    assert all(value == math.inf for value in still.values()) and block.altered() is None


def test_triangulation_is_that_of_the_gradients_themselves():
    """Of a linear system, whose fixed-point gradient is known and whose unrolled one is a loop."""
    model = linear_system(symmetric=False)
    inputs, targets = linear_batch()
    batches = [(inputs, targets), (inputs.flip(0), -targets), (2 * inputs, targets + 1)]
    step, short, long = 0.4, 3, 200
    solver = Relaxation(step=step, max_steps=2000, tol=1e-12)

    def unrolled(x, y, count):
        drive = x @ model.inflow.mT
        z = drive
        for _ in range(count):
            z = z + step * (z @ model.block.matrix.mT + drive)
        loss = ((z - y).square().sum(-1) / 2).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [model.inflow, model.block.matrix])])

    def exact(x, y):
        found = model.closed_form(x, y)
        return torch.cat([found["inflow"].flatten(), found["block.matrix"].flatten()])

    def cosine(a, b):
        return torch.nn.functional.cosine_similarity(a, b, dim=0).item()

    ours, near, far = ([kind(x, y) for x, y in batches] for kind in (
        exact, lambda x, y: unrolled(x, y, short), lambda x, y: unrolled(x, y, long)))
    found = diagnostics.triangulation(model, batches, estimators.DyadicEP(), (short, long), solver, solver)
    expected = {
        "cosine": sum(map(cosine, ours, near)) / 3, "cosine_horizons": sum(map(cosine, near, far)) / 3,
        "ratio": sum((a.norm() / b.norm()).item() for a, b in zip(ours, near, strict=True)) / 3,
        "self_cosine": (cosine(ours[0], ours[1]) + cosine(ours[1], ours[2])) / 2,
        "self_cosine_bptt": (cosine(near[0], near[1]) + cosine(near[1], near[2])) / 2}
    assert found.pop("residual") <= 1e-12 and found == pytest.approx(expected, rel=1e-6)
    assert found["cosine"] < 0.99 and abs(found["ratio"] - 1) > 0.01  # the short horizon is another gradient
    with pytest.raises(ValueError, match="two or more"):
        diagnostics.triangulation(model, batches[:1], estimators.DyadicEP(), (short, long), solver, solver)


def test_a_phase_that_diverged_makes_its_triangulation_nan():
    model = linear_system(symmetric=False)
    with torch.no_grad():
        model.block.matrix.neg_()  # nothing settles
    batches = [linear_batch()] * 2
    solver = Relaxation(step=0.4, max_steps=400, tol=1e-8)
    found = diagnostics.triangulation(model, batches, estimators.DyadicEP(), (3, 5), solver, solver)
    assert all(math.isnan(found[name]) for name in ("cosine", "ratio", "self_cosine")) and found["self_cosine_bptt"] > 0.99
