from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

import eplib
from eplib import blocks, calculus, estimators, models
from eplib.calculus import attention
from eplib.diagnostics import GROUPS, LiveBytes, adjoint_gradient, agreement
from eplib.solvers import Anderson, FixedHorizon, Relaxation, Status
from systems import TIGHT, transformer

EQUILIBRIUM = [blocks.Thick(init=1.0, damping=0.3), blocks.Thick(init=1.0, qk_norm=True), blocks.Layered(layers=3, init=1.0),
               blocks.Thick(init=1.0, damping=0.3, learned_damping=True, gated=1.5),
               blocks.Layered(layers=2, init=1.0, gated=0.7),
               blocks.Attractor(layers=2, init=1.0), blocks.LayeredAttractor(layers=2, init=1.0),
               blocks.Thin(init=1.0), blocks.Energy(init=1.0), blocks.Monotone()]
IMAGE = [blocks.Thick(init=1.0, causal=False), blocks.Layered(layers=2, init=1.0, causal=False),
         blocks.Thin(init=1.0, causal=False), blocks.Energy(init=1.0, causal=False), blocks.Monotone(causal=False),
         blocks.LinearAttention(init=1.0), blocks.LinearAttention(init=1.0, symmetric=True)]
CONSERVATIVE = [blocks.Energy(init=1.0), blocks.Energy(init=1.0, causal=False, damping=0.5),
                blocks.LinearAttention(init=1.0, symmetric=True)]


def name(config):
    return repr(config)


def system(config, samples=2, tokens=5, width=8, heads=2):
    """A float64 block with its clamped input and a state away from its fixed point."""
    torch.manual_seed(2)
    block = config.build(width, heads, tokens).double()
    for parameter in block.parameters():  # off the special values of initialisation
        torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    x = torch.randn(samples, tokens, width, dtype=torch.float64)
    with torch.no_grad():
        x = block.drive(x)
        start = block.start(x)
    return block, x, start + torch.randn_like(start)


@pytest.mark.parametrize("rows", [256, 2])
@pytest.mark.parametrize("config", EQUILIBRIUM + IMAGE, ids=name)
def test_products_and_contraction_are_those_of_automatic_differentiation(config, rows, monkeypatch):
    """J v and J^T u against the dense Jacobian; <u, F> in every weight and in x against autograd. rows: of attention weights
    that are alive at once."""
    monkeypatch.setattr(attention, "ROWS", rows)
    block, x, z = system(config)
    v, u = torch.randn_like(z), torch.randn_like(z)
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        forward, backward, (grads, into) = jacobian.product(v), jacobian.transposed(u), jacobian.contract(u)
    dense = torch.autograd.functional.jacobian(lambda state: block(state, x), z).reshape(z.numel(), z.numel())
    assert torch.allclose(forward.flatten(), dense @ v.flatten(), rtol=1e-10, atol=1e-10)
    assert torch.allclose(backward.flatten(), dense.T @ u.flatten(), rtol=1e-10, atol=1e-10)
    if isinstance(jacobian, blocks.Jacobian):  # the diagonal blocks over tokens
        samples, tokens, width = z.shape
        own = torch.einsum("btcbtd->btcd", dense.view(samples, tokens, width, samples, tokens, width))
        assert torch.allclose(jacobian.token_product(v), torch.einsum("btcd,btd->btc", own, v), rtol=1e-10, atol=1e-10)
    x.requires_grad_()
    weights = {key: value for key, value in block.named_parameters() if "backbone" not in key}  # that leads to x, not to F
    expected = torch.autograd.grad((u * block(z, x)).sum(), [*weights.values(), x], materialize_grads=True, allow_unused=True)
    assert set(grads) >= set(weights)
    for key, value in zip(weights, expected, strict=False):
        assert torch.allclose(grads[key], value, rtol=1e-6, atol=1e-9), key
    assert torch.allclose(into, expected[-1], rtol=1e-6, atol=1e-9)


def test_gates_stay_below_their_bound_and_a_learned_decay_above_zero_whatever_is_learned():
    block, x, z = system(blocks.Thick(init=1.0, damping=0.5, learned_damping=True, gated=0.4))
    plain = blocks.Thick(init=1.0).build(8, 2, 5).double()
    plain.load_state_dict({name: value for name, value in block.state_dict().items() if name in plain.state_dict()})
    with torch.no_grad():
        for parameter in (block.layers.wo.gate, block.layers.w2.gate, block.log_damping):
            parameter.copy_(50 * torch.randn(8))
        opened = {name: (getattr(block.layers, name)(torch.ones(layer.in_features, dtype=torch.float64)) / layer(
            torch.ones(layer.in_features, dtype=torch.float64))) for name, layer in plain.layers.named_children()
            if name in ("wo", "w2")}
        for share in opened.values():
            assert (share >= 0).all() and (share <= 0.4 + 1e-12).all() and share.max() > 0.39
        assert (block.state_decay > 1 - 1e-12).all()
        block.log_damping.zero_()
        assert torch.allclose(block(z, x), x - 1.5 * z + block.layers.parallel(z))
    with pytest.raises(ValidationError, match="damping above 0"):
        blocks.Thick(learned_damping=True)


@pytest.mark.parametrize("config", [blocks.Thick(init=1.0), blocks.Thick(init=1.0, causal=False),
                                    blocks.Thick(init=1.0, qk_norm=True)], ids=name)
def test_a_graph_through_products_by_blocks_of_queries_is_that_of_the_whole(config, monkeypatch):
    """A penalty differentiates products with J once more."""
    def gradients(rows):
        monkeypatch.setattr(attention, "ROWS", rows)
        block, x, z = system(config)
        jacobian = block.linearise(z, x)
        u = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
        value = (jacobian.transposed(u) * jacobian.product(u)).sum() + jacobian.token_product(u).square().sum()
        return torch.autograd.grad(value, list(block.parameters()), allow_unused=True, materialize_grads=True)

    whole = gradients(256)
    assert any(value.any() for value in whole)
    for rows in (2, 3):
        assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-9) for one, other in zip(whole, gradients(rows), strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_memory_grows_with_the_tokens_and_not_with_their_pairs(causal, monkeypatch):
    monkeypatch.setattr(attention, "ROWS", 8)

    def peak(tokens):
        block, x, z = system(blocks.Thick(causal=causal), tokens=tokens)
        with torch.no_grad(), LiveBytes() as counter:
            jacobian = block.linearise(z, x)
            jacobian.product(z), jacobian.contract(z)
        return counter.peak

    few, some, many = (peak(tokens) for tokens in (64, 128, 256))
    assert (many - some) / (some - few) == pytest.approx(2, rel=0.05)  # of pairs it is 4


def test_a_derivative_keeps_its_state_once():
    """Memory of a nudged phase: the inputs of the sublayers are a product away from the standardised state."""
    block, x, z = system(blocks.Thick())
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        jacobian.contract(z)
    parts = [jacobian.inner, *jacobian.inner.branches, *(part.branch for part in jacobian.inner.branches)]
    kept = {id(value) for part in parts for value in vars(part).values() if getattr(value, "shape", None) == z.shape}
    assert kept == {id(jacobian.inner.n)}


@pytest.mark.parametrize("config", [blocks.Thick(qk_norm=True), blocks.LinearAttention(), blocks.Energy(), blocks.Monotone()],
                         ids=name)
def test_forces_pass_gradcheck(config):
    block, x, z = system(config, samples=1, tokens=3, width=4)
    assert torch.autograd.gradcheck(lambda state, drive: block(state, drive), (z.requires_grad_(), x.requires_grad_()))


@pytest.mark.parametrize("config", CONSERVATIVE, ids=name)
def test_energy_blocks_follow_minus_the_gradient_of_their_energy(config):
    block, x, z = system(config)
    z.requires_grad_()
    slope, = torch.autograd.grad(block.energy(z, x).sum(), z)
    assert torch.allclose(block(z, x), -slope, rtol=1e-10, atol=1e-11)
    for b in range(len(z)):
        dense = torch.autograd.functional.jacobian(lambda state, b=b: block(state, x[b]), z[b].detach()).reshape(40, 40)
        assert (dense - dense.T).norm() < 1e-10 * dense.norm()


def test_a_symmetric_causal_jacobian_is_diagonal_in_the_tokens():
    block, x, z = system(blocks.Energy(init=1.0), samples=1)
    dense = torch.autograd.functional.jacobian(lambda state: block(state, x), z).reshape(5, 8, 5, 8)
    assert all(dense[t, :, s].abs().max() == 0 for t in range(5) for s in range(5) if t != s)
    other = x.clone()
    other[:, 1] += torch.randn(8)
    assert not torch.allclose(block(z, x)[:, 3], block(z, other)[:, 3])  # attention is there: through the clamped input


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_monotone_blocks_contract_whatever_their_weights(scale, causal):
    block, x, z = system(blocks.Monotone(bound=0.8, causal=causal), samples=1)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(scale)
    dense = torch.autograd.functional.jacobian(lambda state: block(state, x), z).reshape(40, 40)
    eigenvalues = torch.linalg.eigvals(dense + torch.eye(40))
    assert eigenvalues.abs().max() <= 0.8
    if scale == 30.0:
        assert eigenvalues.abs().max() > 0.05  # the bound is used, not only kept
    far = z + 10 * torch.randn_like(z)
    before, after = (a.norm(dim=-1).max() for a in (far - z, (far + block(far, x)) - (z + block(z, x))))
    assert after <= 0.8 * before


def test_the_bound_on_the_spectral_norm_is_one_and_tight():
    torch.manual_seed(0)
    for shape in ((64, 64), (256, 64), (8, 40)):
        weight = torch.randn(shape, dtype=torch.float64)
        assert 0.85 < torch.linalg.matrix_norm(blocks.monotone._at_most(weight, 1.0), 2) <= 1 + 1e-12
        assert torch.equal(blocks.monotone._at_most(weight, 1e3), weight)


def test_layered_is_the_ordinary_transformer_after_as_many_sweeps_as_layers():
    torch.manual_seed(1)
    layered = blocks.Layered(layers=4, init=1.0).build(8, 2, 5).double()
    plain = blocks.Feedforward(layers=4).build(8, 2, 5).double()
    plain.load_state_dict(layered.state_dict())  # weight for weight, by the same names
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        for sweeps in (3, 4):
            z = FixedHorizon(step=1.0, steps=sweeps).solve(lambda z: layered(z, x), layered.start(x)).value
            assert torch.allclose(layered.output(z), plain.start(x), atol=1e-12) == (sweeps == 4)
    dense = torch.autograd.functional.jacobian(lambda state: layered(state, x[:1]), z[:1]).reshape(160, 160)
    assert torch.equal(dense.diagonal(), -torch.ones(160, dtype=torch.float64))
    assert dense.triu(1).abs().max() == 0  # so every eigenvalue is -1


def test_an_attractor_refines_its_backbone_and_works_with_the_solver_removed():
    torch.manual_seed(1)
    model = models.LanguageModel(vocab=7, width=8, heads=2, context=5, block=blocks.Attractor(layers=2)).double()
    inputs = torch.randint(7, (3, 5))
    removed = model.settle(inputs, FixedHorizon(steps=0))
    embedded = model.embedding(inputs) + model.position
    assert torch.allclose(removed.value, model.block.backbone.start(embedded), atol=1e-12) and removed.steps.tolist() == [0] * 3
    refined = model.settle(inputs, TIGHT)
    assert refined.residual.max() < 1e-11 < removed.residual.min()


def test_an_attractor_with_its_backbone_in_the_state_is_the_same_network_and_gradient():
    """Fixed point, loss and the gradient in every weight: once with the backbone by autograd, once all of it from one adjoint
    state. The spectrum is the head's and the backbone's -1."""
    torch.manual_seed(1)
    inside, outside = (models.LanguageModel(vocab=7, width=8, heads=2, context=5, block=kind(layers=2, init=0.3)).double()
                       for kind in (blocks.LayeredAttractor, blocks.Attractor))

    def theirs(name):
        return name.replace("block.head.layers", "block.layers")

    outside.load_state_dict({theirs(name): value for name, value in inside.state_dict().items()})
    inputs = torch.randint(7, (3, 5))
    targets = torch.randint(7, (3, 5))
    reports = [eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT, nudged=TIGHT)
               for model in (inside, outside)]
    assert torch.allclose(inside.block.output(reports[0].free.value), reports[1].free.value, atol=1e-10)
    assert set(reports[0].grads) == {name for name, _ in inside.named_parameters()}
    for name, value in reports[0].grads.items():
        assert torch.allclose(value, reports[1].grads[theirs(name)], rtol=1e-7, atol=1e-10), name
    x = inside.clamp(inputs)[:1].detach()
    z = reports[0].free.value[:1]
    dense = torch.autograd.functional.jacobian(lambda state: inside.block(state, x), z).reshape(z.numel(), z.numel())
    head = dense[-40:, -40:]
    assert torch.equal(dense[:80, 80:], torch.zeros(80, 40, dtype=torch.float64))
    assert torch.allclose(dense[:80, :80].diagonal(), -torch.ones(80, dtype=torch.float64))
    of_all, of_head = (torch.linalg.eigvals(part).real.max().item() for part in (dense, head))
    assert of_all == pytest.approx(of_head, abs=1e-8)


def test_the_complex_extension_is_holomorphic_and_real_on_the_real_axis():
    """F(z + i h v) = F(z) + i h J v + O(h^2): complex-step differentiation gives J v to machine precision."""
    for config in (blocks.Thick(init=1.0, qk_norm=True), blocks.Thick(init=1.0, causal=False, damping=0.5)):
        block, x, z = system(config)
        v, h = torch.randn_like(z), 1e-20
        with torch.no_grad():
            stepped = block(torch.complex(z, h * v), x)
            assert torch.allclose(stepped.real, block(z, x), rtol=1e-12, atol=1e-12)
            assert torch.allclose(stepped.imag / h, block.linearise(z, x).product(v), rtol=1e-10, atol=1e-10)
            w = torch.complex(z, 0.3 * v)
            assert torch.allclose(block(w.conj(), x), block(w, x).conj(), rtol=1e-12)
            # the mean over a circle is the value at its centre
            around = [block(w + 0.2 * unit, x) for unit in (1, 1j, -1, -1j)]
            assert torch.allclose(sum(around) / 4, block(w, x), rtol=2e-2, atol=2e-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([torch.float32, torch.float64]), st.integers(1, 2), st.randoms(use_true_random=False))
def test_products_are_adjoint_and_batches_permute_for_any_shape(samples, tokens, heads, causal, qk_norm, strided, dtype,
                                                                threads, random):
    """<u, J v> = <J^T u, v>; a permuted batch gives the permuted result, whatever layout and thread count."""
    torch.manual_seed(random.randint(0, 999))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        block = blocks.Thick(causal=causal, qk_norm=qk_norm, init=1.0).build(8, heads, tokens).to(dtype)
        x, z, u, v = (torch.randn(samples, 8, tokens, dtype=dtype).mT for _ in range(4))
        if not strided:
            x, z, u, v = (a.contiguous() for a in (x, z, u, v))
        tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
        with torch.no_grad():
            jacobian = block.linearise(z, x)
            assert torch.allclose((u * jacobian.product(v)).sum(), (jacobian.transposed(u) * v).sum(), **tolerance)
            order = torch.randperm(samples)
            assert torch.allclose(block(z[order], x[order]), block(z, x)[order], **tolerance)
            assert torch.allclose(block(z.contiguous(), x.contiguous()), block(z, x), **tolerance)
    finally:
        torch.set_num_threads(before)


def test_products_broadcast_over_several_directions():
    model, inputs, _ = transformer()
    x = model.clamp(inputs).detach()
    v = torch.randn(4, 3, *x.shape[1:], dtype=x.dtype)
    with torch.no_grad():
        one, many = model.block.linearise(x, x), model.block.linearise(x.unsqueeze(1), x.unsqueeze(1))
        for k in range(3):
            assert torch.allclose(many.product(v)[:, k], one.product(v[:, k]), atol=1e-12)
            assert torch.allclose(many.transposed(v)[:, k], one.transposed(v[:, k]), atol=1e-12)


def test_the_force_is_the_one_of_the_paper():
    model, inputs, _ = transformer(damping=0.7)
    x, layers = model.clamp(inputs), model.block.layers
    z = torch.randn_like(x)
    a, f = layers.ln1(z), torch.nn.functional.gelu(layers.w1(layers.ln2(z)), approximate="tanh")
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in layers.qkv(a).chunk(3, -1))
    mask = torch.full((6, 6), -torch.inf, dtype=x.dtype).triu(1)
    mixed = ((q @ k.mT / 2 + mask).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = -(z - x) + layers.wo(mixed) + layers.w2(f) - 0.7 * z
    assert torch.allclose(model.block(z, x), expected, atol=1e-12)


@pytest.mark.parametrize("config", EQUILIBRIUM + IMAGE, ids=name)
def test_causal_blocks_do_not_look_ahead_and_full_ones_do(config):
    torch.manual_seed(0)
    block = config.build(width=16, heads=4, context=8)
    x = torch.randn(2, 8, 16)
    changed = x.clone()
    changed[:, 5:] += torch.randn(2, 3, 16)
    settled = [block.output(Relaxation(step=0.3, max_steps=4, tol=0.0).solve(lambda z, d=d: block(z, d), block.start(d)).value)
               for d in (block.drive(x), block.drive(changed))]
    assert torch.equal(settled[0][:, :5], settled[1][:, :5]) == config.causal


def test_the_feedforward_baseline_has_the_same_parameters():
    thick, plain = (config.build(16, 4, 8) for config in (blocks.Thick(), blocks.Feedforward()))
    assert sorted(p.shape for p in thick.parameters()) == sorted(p.shape for p in plain.parameters())
    x = torch.randn(2, 8, 16)
    assert plain(plain.start(x), x).abs().max() == 0


@pytest.mark.parametrize("config", [blocks.Thick(), blocks.Energy(), blocks.Thin(), blocks.Monotone(), blocks.Layered()],
                         ids=name)
def test_heads_must_divide_the_width(config):
    with pytest.raises(calculus.ShapeError, match="width 18 is not a multiple of heads 4"):
        config.build(width=18, heads=4, context=8)


@pytest.mark.parametrize(("key", "value", "allowed"), [("damping", -1.0, "greater than or equal to 0"),
                                                       ("damping", "1e-3", "valid number"), ("dampnig", 1.0, "Unexpected"),
                                                       ("causal", 1, "valid boolean"), ("expansion", 2.5, "valid integer")])
def test_bad_configurations_name_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValidationError) as caught:
        blocks.Thick(**{key: value})
    assert key in str(caught.value) and str(value) in str(caught.value) and allowed in str(caught.value)


def parametrised(name, make):
    def alter(block):
        layer = block.get_submodule(name)
        make(layer)
        with torch.no_grad():
            for _ in range(30):  # spectral_norm moves its vectors with every force in training, until they are settled
                layer(torch.ones(1, layer.in_features, dtype=torch.float64))
        return block.eval()
    return alter


class LowRank(nn.Module):
    """An adapter: a frozen layer and a product of two narrow ones."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        n, m = layer.weight.shape
        self.down, self.up = (nn.Parameter(0.3 * torch.randn(shape, dtype=layer.weight.dtype)) for shape in ((2, m), (n, 2)))

    @property
    def weight(self):
        return self.layer.weight + self.up @ self.down

    def forward(self, a):
        return a @ self.weight.mT


class Gated(blocks.EquilibriumBlock):
    """A subclass with a force of its own, and a parameter in it."""

    def forward(self, z, x):
        return super().forward(z, x) + 0.1 * torch.tanh(self.gate * z)


def gated(block):
    block.__class__, block.gate = Gated, nn.Parameter(torch.randn(block.layers.width, dtype=torch.float64))
    return block


def hooked(name):
    def alter(block):
        block.get_submodule(name).register_forward_hook(lambda module, inputs, out: 0.8 * torch.sin(out))
        return block
    return alter


def masked(block):
    block.layers.w1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * torch.linspace(0.2, 1, 16).to(inputs[0]),))
    return block


def replaced(block):
    layers = block.layers
    layers.network = lambda z: layers.w2(torch.tanh(layers.w1(layers.ln2(z))))
    return block


def own_forward(block):
    block.forward = lambda z, x: x - z - 0.5 * z * z.abs() + block.layers.parallel(z)
    return block


def swapped(name, make):
    def alter(block):
        *above, leaf = name.split(".")
        setattr(block.get_submodule(".".join(above)), leaf, make(block.get_submodule(name)).double())
        return block
    return alter


def biased(layer):
    made = nn.Linear(layer.in_features, layer.out_features)
    made.weight = layer.weight
    return made


def uneven_damping(block):
    block.damping = torch.linspace(0.2, 0.6, 16, dtype=torch.float64)
    return block


def learned_decay(block):
    block.log_damping = nn.Parameter(torch.randn(16, dtype=torch.float64) / 10)
    nn.utils.parametrize.register_parametrization(block, "log_damping", nn.Tanh())
    return block


def everywhere(block):
    return block  # the test registers a hook for all modules


def attention_of_features(block):
    block.layers.linear = block.layers.qk_norm = True
    block.layers.causal = False
    return block


ALTERED = {
    "spectral_norm": parametrised("layers.w1", nn.utils.parametrizations.spectral_norm),
    "weight_norm": parametrised("layers.qkv", nn.utils.parametrizations.weight_norm),
    "orthogonal": parametrised("layers.wo", nn.utils.parametrizations.orthogonal),
    "old weight_norm": parametrised("layers.w2", nn.utils.weight_norm),
    "old spectral_norm": parametrised("layers.qkv", nn.utils.spectral_norm),
    "pruned": parametrised("layers.w1", lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", amount=0.4)),
    "adapter": swapped("layers.qkv", LowRank), "bias": swapped("layers.wo", biased),
    "another norm": swapped("layers.ln1", lambda norm: nn.RMSNorm(norm.normalized_shape)),
    "another eps": swapped("layers.ln2", lambda norm: nn.LayerNorm(norm.normalized_shape, eps=0.1)),
    "a gain alone": swapped("layers.ln2", lambda norm: nn.LayerNorm(norm.normalized_shape, bias=False)),
    "hook inside": hooked("layers.w1"), "hook on the block": hooked(""), "pre-hook": masked, "activation": replaced,
    "learned decay": learned_decay,
    "subclass": gated, "own forward": own_forward, "uneven damping": uneven_damping, "global hook": everywhere,
    "linear attention with qk_norm": attention_of_features,
    "compiled part": swapped("layers.qkv", lambda layer: torch.compile(layer, backend="eager")),
}


@pytest.fixture
def global_hook(request):
    """A hook on every module while the case "global hook" runs."""
    handle = None
    if request.getfixturevalue("case") == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, out: 0.9 * out if isinstance(module, nn.Linear) else None)
    yield
    if handle:
        handle.remove()


def settled_gradient(model, inputs, targets):
    """DyadicEP's gradient and the dense one, at one state."""
    solver = Anderson(step=0.3, max_steps=800, tol=1e-11)
    report = eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=solver, nudged=solver)
    assert report.status is Status.CONVERGED
    return report.grads, adjoint_gradient(model, inputs, targets, report.free.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", ALTERED)
def test_an_altered_block_is_differentiated_as_it_is(case, global_hook):
    """Products against the dense Jacobian, the gradient in the model's own names against dense adjoint and autograd."""
    model, inputs, targets = transformer(init=0.5, damping=0.5)
    model.block = ALTERED[case](model.block)
    block = model.block
    assert block.altered() and block.prefix() is None and not block.holomorphic
    z, v = torch.randn(2, 2, 3, 16, dtype=torch.float64)
    x = torch.randn_like(z)
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        assert not jacobian.by_token
        forward, backward = jacobian.product(v), jacobian.transposed(v)
    dense = torch.autograd.functional.jacobian(lambda state: block(state, x), z).reshape(96, 96)
    assert torch.allclose(forward.flatten(), dense @ v.flatten(), rtol=1e-9, atol=1e-9)
    assert torch.allclose(backward.flatten(), dense.T @ v.flatten(), rtol=1e-9, atol=1e-9)
    for parameter in block.parameters():
        assert parameter.dtype is torch.float64
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    model.requires_grad_(True)  # for the dense reference
    ours, truth = settled_gradient(model, inputs, targets)
    assert trained <= set(ours) == set(truth)
    for key, value in truth.items():
        assert torch.allclose(ours[key], value, rtol=1e-6, atol=1e-9), key
        assert "embedding" in key or value.abs().max() > 1e-7, key  # nothing is compared with a zero


@pytest.mark.parametrize(("config", "alter"), [
    (blocks.Layered(layers=2, init=1.0), hooked("stack.1.w1")), (blocks.Layered(layers=2, init=1.0), hooked("stack.0.ln1")),
    (blocks.Attractor(init=1.0), hooked("layers.wo")), (blocks.Thin(init=1.0), hooked("memory")),
    (blocks.Thin(init=1.0), parametrised("qkv", nn.utils.parametrizations.weight_norm)),
    (blocks.Energy(init=1.0), hooked("wq")), (blocks.Monotone(), hooked("qk"))],
    ids=lambda part: getattr(part, "__qualname__", str(part)))
def test_every_kind_of_block_notices_what_alters_it(config, alter):
    block, x, z = system(config)
    plain, block = block(z, x).detach(), alter(block.train())
    u = torch.randn_like(z)
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        pulled, (grads, _) = jacobian.transposed(u), jacobian.contract(u)
    push = (u * block(z.requires_grad_(), x)).sum()
    weights = {key: value for key, value in block.named_parameters() if "backbone" not in key}
    slope, *expected = torch.autograd.grad(push, [z, *weights.values()], materialize_grads=True, allow_unused=True)
    assert torch.allclose(pulled, slope, rtol=1e-9, atol=1e-9)
    for key, value in zip(weights, expected, strict=True):
        assert torch.allclose(grads[key], value, rtol=1e-6, atol=1e-9), key
    assert config.kind == "Thin" or not torch.allclose(block(z, x), plain)


def test_a_block_that_only_leads_elsewhere_is_not_altered():
    """What is before the clamp, the start state and the read-out is not the derivative's matter."""
    class Elsewhere(blocks.EquilibriumBlock):
        def drive(self, x):
            return 2 * x

        def start(self, x):
            return torch.zeros_like(x)

    block, x, z = system(blocks.Thick())
    block.__class__ = Elsewhere
    assert block.altered() is None and isinstance(block.linearise(z, x), blocks.Jacobian)
    handle = block.layers.w1.register_forward_hook(lambda *rest: None)
    assert block.altered() == "layers.w1 has hooks"
    handle.remove()
    attractor = blocks.Attractor(layers=2).build(8, 2, 5)
    attractor.backbone.stack[0].w1.register_forward_hook(lambda *rest: None)
    assert attractor.altered() is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("way", ["block", "in place", "model", "copy", "hooked inside"])
def test_compiled_blocks_have_the_gradient_of_what_they_compile(way, backend):
    torch._dynamo.reset()
    model, inputs, targets = transformer(init=0.5, damping=0.5)
    inputs, targets = inputs[:2], targets[:2]
    reference = deepcopy(model)
    if way == "model":
        model = torch.compile(model, backend=backend)
    elif way == "in place":
        model.block.compile(backend=backend)
    else:
        if way == "hooked inside":
            for one in (model, reference):
                hooked("layers.w2")(one.block)
        model.block = torch.compile(model.block, backend=backend)
        model = deepcopy(model) if way == "copy" else model
    ours, _ = settled_gradient(model, inputs, targets)
    truth = settled_gradient(reference, inputs, targets)[1]
    assert set(ours) == {key for key, _ in model.named_parameters()}
    for key, value in ours.items():
        assert torch.allclose(value, truth[key.replace("_orig_mod.", "")], rtol=1e-6, atol=1e-9), key
    assert set(agreement(ours, ours)) == {*GROUPS, "total"}


@pytest.mark.parametrize("late", ["on the wrapper", "inside"])
def test_hooks_that_a_compiled_block_and_its_derivative_do_not_share_are_refused(late):
    torch._dynamo.reset()
    model, inputs, targets = transformer()
    model.block = torch.compile(model.block, backend="eager")
    model.settle(inputs, TIGHT)
    hooked("" if late == "on the wrapper" else "_orig_mod.layers.w1")(model.block)
    with pytest.raises(TypeError, match="another force than the block"):
        eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT)


def test_weights_that_are_shared_get_the_sum_of_their_parts():
    """By name or by module, in the block and outside it."""
    torch.manual_seed(0)
    deep = models.LanguageModel(7, 8, 2, 5, blocks.Layered(layers=3, init=1.0)).double()
    deep.block.stack[2] = deep.block.stack[0]
    norms = models.LanguageModel(7, 8, 2, 5, blocks.Thick(init=0.5)).double()
    norms.block.layers.ln2.weight = norms.block.layers.ln1.weight
    tied = models.LanguageModel(8, 8, 2, 5, blocks.Thick(init=0.5)).double()
    tied.readout.weight = tied.block.layers.wo.weight
    for model in (deep, norms, tied):
        inputs = torch.randint(7, (3, 5))
        ours, truth = settled_gradient(model, inputs, inputs.roll(1, 1))
        assert set(ours) == set(truth)
        for key, value in truth.items():
            assert torch.allclose(ours[key], value, rtol=1e-6, atol=1e-9), key


class Own(blocks.Dynamical):
    """A user's block with a derivative of its own, from which gradients may be lost."""

    def __init__(self, width, gives):
        super().__init__()
        self.scale, self.shift, self.unused = (nn.Parameter(torch.full((width,), 0.5, dtype=torch.float64)) for _ in range(3))
        self.gives = gives

    def forward(self, z, x):
        return x - z + 0.5 * torch.tanh(self.scale * z + self.shift)

    def linearise(self, z, x):
        jacobian, gives = calculus.AutomaticSlope(self, z, x), self.gives

        class Some:
            product, transposed = jacobian.product, jacobian.transposed

            def contract(self, u):
                grads, into = jacobian.contract(u)
                return gives(grads), into

        return Some()


@pytest.mark.parametrize(("gives", "says"), [
    (lambda grads: {"scale": grads["scale"]}, "depends on block.shift, of which"),
    (lambda grads: grads | {"shft": grads["shift"]}, "'shft' is no parameter"),
    (lambda grads: grads | {"shift": grads["shift"].sum()}, "of shape \\(16,\\)")])
def test_a_derivative_that_loses_a_parameter_is_an_error_that_names_it(gives, says):
    model, inputs, targets = transformer()
    model.block = Own(16, gives)
    with pytest.raises(estimators.DerivativeError, match=says):
        eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT)


def test_a_parameter_that_nothing_depends_on_has_a_zero_gradient():
    model, inputs, targets = transformer()
    model.block = Own(16, lambda grads: {"scale": grads["scale"], "shift": grads["shift"]})
    ours, truth = settled_gradient(model, inputs, targets)
    assert ours["block.unused"].abs().max() == 0 < ours["block.shift"].abs().min()
    assert all(torch.allclose(ours[key], value, rtol=1e-6, atol=1e-9) for key, value in truth.items())
    model.block.shift.requires_grad_(False)
    model.block.gives = lambda grads: {"scale": grads["scale"]}
    assert "block.shift" not in eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT).grads


def test_parameters_that_share_one_gradient_are_each_divided_by_the_batch_once():
    class Sum(blocks.Dynamical):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(0.1 * torch.ones(16, 16, dtype=torch.float64)) for _ in range(2))

        def forward(self, z, x):
            return x - z + 0.5 * torch.tanh(z @ (self.a + self.b.mT))

    model, inputs, targets = transformer()
    model.block = Sum()
    ours, truth = settled_gradient(model, inputs, targets)
    for key, value in truth.items():
        assert torch.allclose(ours[key], value, rtol=1e-6, atol=1e-9), key


def test_a_pass_is_not_taken_for_that_of_a_direction_written_to():
    """Nor one without a graph for one with: a penalty's gradient would lose a part."""
    block, x, z = system(blocks.Thick(init=1.0))
    u = torch.randn_like(z)
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        jacobian.transposed(u)
        u.mul_(-3)
        grads, fresh = jacobian.contract(u)[0], block.linearise(z, x).contract(u.clone())[0]
    assert all(torch.allclose(grads[key], value) for key, value in fresh.items())
    found = []
    for before in (True, False):
        jacobian = block.linearise(z, x)
        with torch.no_grad():
            if before:
                jacobian.transposed(u)
        found.append(torch.autograd.grad(jacobian.transposed(u).square().sum(), list(block.parameters())[1:3]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("config", [blocks.Thick(), blocks.Layered(layers=2), blocks.Thin(), blocks.Energy()], ids=name)
def test_a_derivative_is_of_the_weights_that_it_was_made_of(config):
    block, x, z = system(config)
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        jacobian.contract(z)
        for parameter in block.parameters():
            parameter.mul_(1.1)
        for use in (jacobian.product, jacobian.transposed, jacobian.contract):
            with pytest.raises(RuntimeError, match=r"weights have changed|modified by an inplace operation"):
                use(z)


@pytest.mark.parametrize("config", [blocks.Thick(), blocks.Layered(layers=2), blocks.Thin(), blocks.Energy()], ids=name)
def test_directions_of_another_shape_are_refused(config):
    block, x, z = system(config, samples=2)
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        for use in (jacobian.product, jacobian.transposed, jacobian.contract):
            for v in (torch.stack([z] * 2, 1), z[:1], z[..., :1]):
                with pytest.raises(calculus.ShapeError, match="does not fit J at states"):
                    use(v)


def test_a_derivative_by_itself_is_not_rounded_by_a_phase_in_mixed_precision():
    block, x, z = system(blocks.Energy(init=1.0))
    block, x, z = block.float(), x.float(), z.float()
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        with torch.autocast("cpu", torch.bfloat16):
            rough = jacobian.transposed(z)
        assert torch.allclose(rough, block.linearise(z, x).transposed(z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lifted", [False, True], ids=["states", "several states"])
@pytest.mark.parametrize(("width", "heads", "expansion", "samples", "tokens"),
                         [(6, 1, 1, 1, 1), (6, 6, 3, 2, 3), (1, 1, 2, 1, 4)])
@pytest.mark.parametrize("config", EQUILIBRIUM + IMAGE, ids=name)
def test_derivatives_are_those_of_any_shape(config, width, heads, expansion, samples, tokens, lifted):
    """One head, heads of one unit, one token, other expansions, strided states, several states under one clamp."""
    torch.manual_seed(4)
    block = replace(config, expansion=expansion).build(width, heads, 8).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    with torch.no_grad():
        x = block.drive(torch.randn(samples, tokens, width, dtype=torch.float64))
        z = block.start(x) + 1
        if lifted:
            x, z = x.unsqueeze(1), torch.stack([z, z - 2], 1)
        z, v, u = ((z + torch.randn_like(z)).mT.contiguous().mT for _ in range(3))
        jacobian = block.linearise(z, x)
        moved, pulled, (grads, into) = jacobian.product(v), jacobian.transposed(u), jacobian.contract(u)
    dense = torch.autograd.functional.jacobian(lambda state: block(state, x), z).reshape(z.numel(), z.numel())
    close = {"rtol": 1e-8, "atol": 1e-8}
    assert torch.allclose(moved.flatten(), dense @ v.flatten(), **close)
    assert torch.allclose(pulled.flatten(), dense.T @ u.flatten(), **close)
    if jacobian.by_token:
        each = dense.view(-1, tokens, width, z[..., 0, 0].numel(), tokens, width)
        own = torch.einsum("btcbtd->btcd", each)
        assert torch.allclose(jacobian.token_product(v).view(own.shape[:-1]),
                              torch.einsum("btcd,btd->btc", own, v.reshape(own.shape[:-1])), **close)
        assert all(each[:, t, :, :, t + 1:].abs().max() == 0 for t in range(tokens - 1))  # so they have all eigenvalues
    weights = {key: value for key, value in block.named_parameters() if "backbone" not in key}
    found = torch.autograd.grad((u * block(z, x.requires_grad_())).sum(), [*weights.values(), x], materialize_grads=True,
                                allow_unused=True)
    assert into.shape == x.shape and torch.allclose(into, found[-1], **close)
    assert all(torch.allclose(grads[key], value, rtol=1e-6, atol=1e-8) for key, value in zip(weights, found, strict=False))


def test_linear_attention_is_over_all_tokens():
    with pytest.raises(calculus.ShapeError, match="causal=False"):
        calculus.Sublayers(8, 2, 4, causal=True, qk_norm=False, init=1.0, linear=True)
    torch.manual_seed(0)  # a stack of such layers, which no configuration builds, has its derivative too
    block = blocks.LayeredBlock([calculus.Sublayers(8, 2, 4, False, False, 1.0, linear=True) for _ in range(2)]).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    z, v = torch.randn(2, 1, 2, 3, 8, dtype=torch.float64)
    dense = torch.autograd.functional.jacobian(lambda state: block(state, x), z).reshape(48, 48)
    with torch.no_grad():
        assert torch.allclose(block.linearise(z, x).transposed(v).flatten(), dense.T @ v.flatten(), atol=1e-10)


def test_the_batch_divides_a_gradient_in_place(monkeypatch):
    """A second copy of the size of the weights would be most of what a gradient takes."""
    model, inputs, targets = transformer(init=0.3)
    kept, contract = {}, blocks.Jacobian.contract

    def keeping(self, u):
        found = contract(self, u)
        kept.update({f"block.{name}": value.data_ptr() for name, value in found[0].items()})
        return found

    monkeypatch.setattr(blocks.Jacobian, "contract", keeping)
    report = eplib.gradient(model, inputs, targets, estimator=estimators.DyadicEP(), solver=TIGHT)
    assert kept and all(report.grads[name].data_ptr() == place for name, place in kept.items())


class Parts(nn.Module):
    """a and b side by side, and c over both: their gradients are views of one tensor, of which c's is the whole."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(0.1 * torch.randn(8, dtype=torch.float64)) for _ in range(2))
        self.c = nn.Parameter(0.1 * torch.randn(16, dtype=torch.float64))

    def forward(self):
        return torch.cat([self.a, self.b]) + self.c


@pytest.mark.parametrize("where", ["clamp", "block"])
def test_gradients_that_overlap_are_each_divided_by_the_batch_once(where):
    class Own(blocks.Dynamical):
        def __init__(self):
            super().__init__()
            self.parts = Parts()

        def forward(self, z, x):
            return x - z + torch.tanh(z) * self.parts()

    model, inputs, targets = transformer()
    if where == "block":
        model.block = Own()
    else:
        model.parts, embedding = Parts(), model.embedding
        model.embedding = nn.Sequential(embedding)
        model.clamp = lambda ids: embedding(ids) + model.position[: ids.shape[-1]] + model.parts()
    ours, truth = settled_gradient(model, inputs, targets)
    assert sum(".parts." in f".{key}" for key in truth) == 3
    for key, value in truth.items():
        assert torch.allclose(ours[key], value, rtol=1e-6, atol=1e-9), key


def test_hooks_on_the_wrapper_of_a_compiled_block_are_refused_wherever_it_is_computed(compiled_kernel):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = models.LanguageModel(11, 16, 4, 6, blocks.Thick(init=0.3))
    inputs = torch.randint(11, (2, 6))
    model.block = torch.compile(model.block, backend="eager")
    model.block.register_forward_hook(lambda block, arguments, force: 0.9 * force)
    solver = Relaxation()
    for use in (lambda: model.settle(inputs, solver), lambda: model.settle(inputs, solver, backend="compiled"),
                lambda: model.generate(inputs[0, :3], 1, solver),
                lambda: eplib.gradient(model, inputs, inputs, estimator=estimators.BPTT(steps=2), solver=solver)):
        with pytest.raises(TypeError, match="wrapper of EquilibriumBlock has hooks"):
            use()


def test_a_derivative_is_of_weights_that_were_not_replaced():
    block, x, z = system(blocks.Thick())
    with torch.no_grad():
        jacobian = block.linearise(z, x)
        block.layers.w1.weight = nn.Parameter(3 * block.layers.w1.weight)
        with pytest.raises(RuntimeError, match="weights have changed"):
            jacobian.product(z)


def test_tokens_settle_one_by_one_only_where_they_are_read_out_one_by_one():
    class Mixed(blocks.EquilibriumBlock):
        def output(self, z):
            return z.cumsum(-2)

    plain = blocks.Thick().build(16, 4, 6)
    assert plain.prefix() is not None and Mixed(plain.layers, 0.0).prefix() is None
