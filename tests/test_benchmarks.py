"""The benchmark runs, at toy size: what it times and counts, not how fast it is."""

import json

import pytest
import torch

from benchmarks import step
from pipelines import data


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What `python -m benchmarks.step --size toy` keeps, in a folder of its own, and its point after training."""
    root = tmp_path_factory.mktemp("bench")
    data.prepare("plays", "chars", root / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "ROOT", root)
        assert step.main(["--size", "toy", "--rounds", "1", "--out", str(root / "results.json")]) == 0
        trained = step.points("toy")[1]
    return json.loads((root / "results.json").read_text())["toy"], trained


def test_every_arm_is_timed_and_its_gradient_is_the_converged_one(results):
    found, _ = results
    assert set(found["points"]) == {"initial", "trained"} and found["generation"]["milliseconds"] > 0
    for point in found["points"].values():
        assert point["arms"]["backprop"]["ratio"] == 1 and point["rate_arnoldi"] < 1
        for name, row in point["arms"].items():
            assert row["amortised"] > 0 and row["peak_bytes"] > 0, name
            # the reference takes so many steps, settled or not; the others have their tolerances
            assert name == "backprop" or row["cosine"] > (0.9 if name == "EP, reference" else 0.999), name


def test_costs_are_in_force_evaluations_of_the_whole_batch(results):
    found, _ = results
    for point in found["points"].values():
        costs = {name: row.get("force_evaluations") for name, row in point["arms"].items()}
        steps = point["horizon"]
        assert costs["backprop"] == 3 and costs[f"BPTT, {steps} steps"] == 3 * steps
        assert {name for name, cost in costs.items() if cost is None} == {"torchdeq, anderson", "torchdeq, fixed_point_iter"}
        response = next(cost for name, cost in costs.items() if name.startswith("EP linear response"))
        assert 3 < response < costs["EP, reference"]


def test_holding_every_token_is_timed_beside_the_linear_response(results):
    found, _ = results
    for point in found["points"].values():
        held = {name for name, row in point["arms"].items() if "control" in row}
        assert held and held == {name for name in point["arms"] if name.startswith("EP linear response")}
        for name in held:
            row, backprop = point["arms"][name], point["arms"]["backprop"]["milliseconds"]
            assert row["control_share"] == pytest.approx(row["control"] / row["milliseconds"])
            assert row["controlled_ratio"] == pytest.approx((row["milliseconds"] + row["control"]) / backprop)


def test_the_uncached_block_has_the_gradient_of_the_block(results):
    """The products of the reference, with a graph made anew, are those by hand."""
    _, point = results
    slow, (inputs, _) = step.uncached(point.model), point.batches[0]
    with torch.no_grad():
        x = point.model.clamp(inputs)
        z = point.model.settle(inputs, step.Relaxation(step=0.5)).value
    u = torch.randn_like(z)
    ours, theirs = slow.block.linearise(z, x), point.model.block.linearise(z, x)
    assert torch.allclose(ours.transposed(u), theirs.transposed(u), atol=1e-5)
    (grads, into), (truth, truth_into) = ours.contract(u), theirs.contract(u)
    assert torch.allclose(into, truth_into, atol=1e-5)
    for name, value in truth.items():
        assert torch.allclose(grads[name], value, atol=1e-4), name
