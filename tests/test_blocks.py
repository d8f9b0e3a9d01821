import pytest
import torch
from pydantic import ValidationError

from eplib import blocks
from eplib.diagnostics import dense_jacobian
from systems import transformer


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", ["language", "image"])
def test_hand_written_products_are_those_of_the_dense_jacobian(kind, qk_norm):
    model, inputs, _ = transformer(kind, qk_norm=qk_norm, damping=0.3)
    x = model.clamp(inputs).detach()
    z, v = torch.randn_like(x), torch.randn_like(x)
    with torch.no_grad():
        jacobian = model.block.linearise(z, x)
        forward, backward = jacobian.product(v), jacobian.transposed(v)
    for b in range(len(z)):
        dense = dense_jacobian(model, x[b:b + 1], z[b:b + 1])
        assert torch.allclose(forward[b].flatten(), dense @ v[b].flatten(), rtol=1e-11, atol=1e-11)
        assert torch.allclose(backward[b].flatten(), dense.T @ v[b].flatten(), rtol=1e-11, atol=1e-11)
    assert (dense - dense.T).norm() > 0.1 * dense.norm()  # the system is one on which the difference matters


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


def test_a_causal_block_does_not_look_ahead_and_a_full_one_does():
    for causal in (True, False):
        torch.manual_seed(0)
        block = blocks.Thick(causal=causal, init=1.0).build(width=16, heads=4, context=8)
        x = torch.randn(2, 8, 16)
        changed = x.clone()
        changed[:, 5:] += 1.0
        same = torch.equal(block(x, x)[:, :5], block(changed, changed)[:, :5])
        assert same == causal


def test_the_feedforward_baseline_has_the_same_parameters():
    thick, plain = (config.build(16, 4, 8) for config in (blocks.Thick(), blocks.Feedforward()))
    assert sorted(p.shape for p in thick.parameters()) == sorted(p.shape for p in plain.parameters())
    x = torch.randn(2, 8, 16)
    assert plain(plain.start(x), x).abs().max() == 0


def test_heads_must_divide_the_width():
    with pytest.raises(blocks.ShapeError, match="width 18 is not a multiple of heads 4"):
        blocks.Thick().build(width=18, heads=4, context=8)


@pytest.mark.parametrize(("key", "value", "allowed"), [("damping", -1.0, "greater than or equal to 0"),
                                                       ("damping", "1e-3", "valid number"), ("dampnig", 1.0, "Unexpected"),
                                                       ("causal", 1, "valid boolean"), ("expansion", 2.5, "valid integer")])
def test_bad_configurations_name_key_value_and_what_is_allowed(key, value, allowed):
    with pytest.raises(ValidationError) as caught:
        blocks.Thick(**{key: value})
    assert key in str(caught.value) and str(value) in str(caught.value) and allowed in str(caught.value)
