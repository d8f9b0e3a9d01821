"""How one run scales: bytes that are sent, and what is known of larger sizes."""

import pytest

import systems  # noqa: F401  (one thread)
from eplib.blocks import Thick
from eplib.calculus import attention
from eplib.experiments import scaling
from eplib.experiments.scaling import ARMS, Cluster, Size


def test_two_ranks_send_the_gradient_once_whatever_the_phases_take():
    size = Size(width=16, heads=2, context=8, vocab=11, batch=5)
    weights = sum(value.numel() for value in size.model(Thick()).parameters())
    assert scaling.parameters(size) == weights
    for arm, ranks in scaling.measure(2, size, rounds=1).items():
        for rank in ranks:
            assert rank["gradient_bytes"] == 4 * weights, arm
            assert 0 < rank["other_bytes"] < 5000 and rank["cpu"] > 0, arm


def test_a_ring_sends_what_lies_elsewhere_twice():
    assert scaling.all_reduced(1000, 1) == 0 and scaling.all_reduced(1000, 2) == 4000
    large = Size(width=4096, heads=64, context=1024, vocab=4096)
    square, wide = large.width**2, large.width
    expected = 12 * square + 2 * large.vocab * wide + large.context * wide  # weights, without biases and norms: 1e-4 of them
    assert scaling.parameters(large) == pytest.approx(expected, rel=2e-4)
    assert scaling.all_reduced(scaling.parameters(large), 64) == pytest.approx(2 * 63 / 64 * 4 * expected, rel=2e-4)


@pytest.mark.parametrize(("arm", "context"), [("ep_linear", 64), ("ep_linear", 256), ("bptt", 64), ("backprop", 64)])
def test_bytes_of_a_wider_block_follow_from_those_of_narrow_ones(arm, context, monkeypatch):
    monkeypatch.setitem(ARMS, "bptt", (Thick(), scaling.BPTT(steps=3)))
    for module in (scaling, attention):
        monkeypatch.setattr(module, "ROWS", 64)  # fewer than the tokens, and as many
    wide = Size(width=256, heads=8, context=context, vocab=512, batch=16)
    assert scaling.per_token(arm, wide) == pytest.approx(scaling.counted(arm, wide), rel=0.05)


def test_a_full_memory_holds_the_weights_and_whole_sequences():
    size, cluster = Size(width=256, heads=4, context=64, vocab=256), Cluster(ranks=4, memory=1e9, link=1e9, speed=1e12)
    plan = scaling.planned("ep_linear", size, cluster)
    held = plan.sequences * size.context * plan.bytes_per_token + 5 * 4 * scaling.parameters(size)
    assert held <= 1e9 < held + size.context * plan.bytes_per_token
    assert plan.summing == pytest.approx(2 * 3 / 4 * 4 * scaling.parameters(size) / 1e9, rel=1e-6)
    assert plan.share == pytest.approx(plan.summing / (plan.summing + plan.computing))
    assert plan.evaluations >= 2 * scaling.SOLVER.max_steps
