"""What E4 measures at weights and concludes from runs, on systems and runs of which the answer is known."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eplib import plotting, verdicts
from eplib.diagnostics import LinearSystem
from eplib.experiments import campaign, campaign_tables, campaign_verdicts
from eplib.models import Transformer
from eplib.settings import ROOT
from eplib.store import records
from systems import linear_batch, linear_system, transformer


def found(*vectors) -> campaign.Found:
    return campaign.Found([None if one is None else torch.tensor(one, dtype=torch.float64) for one in vectors], [])


def test_the_share_of_bias_is_one_for_one_error_and_zero_for_errors_that_have_nothing_in_common():
    exact = found([1.0, 2.0, 0.0], [0.0, -1.0, 3.0], [5.0, 0.0, 0.0])
    shifted = campaign.Found([one + torch.tensor([0.5, 0.0, -1.0]) for one in exact.vectors], [])
    assert campaign.share_of_bias(shifted, exact) == pytest.approx(1)
    scattered = campaign.Found([one + unit for one, unit in zip(exact.vectors, torch.eye(3), strict=True)], [])
    assert campaign.share_of_bias(scattered, exact) == pytest.approx(0)
    both = [one + 2 * torch.tensor([1.0, 1.0, 1.0]) + unit for one, unit in zip(exact.vectors, torch.eye(3), strict=True)]
    # of the error b + e_k: |b|^2 and 2 <b, e_k> are shared, |e_k|^2 is not
    assert campaign.share_of_bias(campaign.Found(both, []), exact) == pytest.approx((12 + 4) / (12 + 4 + 1))


def test_means_over_batches_are_compared_group_by_group_and_a_diverged_one_has_no_cosine():
    ours, exact = found([1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]), found(*[[1.0, 0.0]] * 4)
    one, two, four = campaign.averaged(ours, exact, (1, 2, 4))
    half = 0.5**0.5
    assert one == (1, pytest.approx(3 / 4), pytest.approx(1 / 3))
    assert two == (2, pytest.approx((half + 1) / 2), pytest.approx(half))
    assert four[1] == pytest.approx(3 / 10**0.5) and four[2] != four[2]  # one group has no next
    assert campaign.averaged(found([1.0, 0.0], None), found([1.0, 0.0], [1.0, 0.0]), (1,))[0][1] != 0.5


def test_a_small_step_along_the_gradient_lowers_the_loss_by_its_square():
    model, batch = linear_system(symmetric=False), linear_batch()
    grads = model.closed_form(*batch)
    square = sum(value.square().sum().item() for value in grads.values())
    before = campaign.loss_at(model, batch)
    change = campaign._change(model, grads, 1e-5 / square, batch, before)
    assert change == pytest.approx(-1e-5, rel=1e-2) and campaign.loss_at(model, batch) == before
    unstable = LinearSystem(torch.diag(torch.tensor([0.3, -1.0])).double(), torch.eye(2).double())
    assert campaign.loss_at(unstable, (torch.full((1, 2), torch.inf).double(), torch.zeros(1, 2).double())) is None


def test_losses_by_position_have_the_model_s_loss_as_their_mean():
    model, inputs, targets = transformer(init=0.3)
    run = SimpleNamespace(model=lambda step: model)
    one = campaign.mixing(run, None, (inputs, targets))
    x = model.clamp(inputs)
    exact = model.loss(model.block.output(campaign.SETTLE.settle(model.block, x).value), targets).mean()
    assert one["loss"].mean().item() == pytest.approx(exact.item()) and 0 < one["distance"] < inputs.shape[1]
    assert campaign.quarters(torch.arange(8.0)) == [0.5, 2.5, 4.5, 6.5]


def test_what_anderson_leaves_is_tried_again_by_homotopy():
    model, inputs, _ = transformer()
    shares = campaign.solved(model, inputs, tol=1e-6, most=100)
    both, alone = shares["Anderson, then Homotopy"], shares["Anderson"]
    assert both[0] >= max(alone[0], shares["Homotopy"][0]) and both[2] <= alone[2]
    assert both[1] == pytest.approx(alone[1] + shares["Homotopy"][1] * (1 - alone[0]))


def run(arm, loss, seed=0, width=64, settled=1.0):
    model = replace(CONFIG.model, width=width)
    config = SimpleNamespace(arm=arm, seed=seed, model=model, branch=None, optimiser=SimpleNamespace(lr=1e-3), start=None)
    return SimpleNamespace(config=config, name=f"{arm}-{seed}-{width}", metrics={"final": {"loss": loss, "settled": settled}})


CONFIG = records.configurations("paper", "campaign")[0]


def test_the_gap_is_that_of_paired_seeds_at_each_width():
    noise = (0.3, -0.2, 0.1)
    runs = [run(arm, 3 + noise[s] + shift, s, width) for width, extra in ((32, 0.0), (64, 0.5)) for s in range(3)
            for arm, shift in (("ep_linear", 0.01 * s + extra), ("bptt", 0.0))]
    rows = campaign_tables.gaps(campaign_tables.by_width(runs))
    assert [row[:2] for row in rows] == [[32, "EP, linear response - BPTT"], [64, "EP, linear response - BPTT"]]
    half = 4.302652729911275 * 0.01 / 3**0.5  # Student's t of two degrees of freedom
    assert rows[0][2:6] == [pytest.approx(0.01), pytest.approx(0.01 - half), pytest.approx(0.01 + half), 3]
    assert rows[1][2] == pytest.approx(0.51) and rows[0][-1] == "yes"
    short = campaign_tables.gaps(campaign_tables.by_width([*runs[:5], run("bptt", 3.1, 2, 32, settled=0.5)]))
    assert short[0][-1] == "no"


def test_the_operations_of_a_force_are_those_that_pytorch_counts():
    config = replace(CONFIG, batch=2, steps=3, keep=())
    one, more = (campaign_tables.cost(config, 50, evaluations) for evaluations in (1.0, 2.0))
    model = config.model.build(campaign_tables.Tokens(vocab=50, context=config.model.context))
    x = model.clamp(torch.randint(50, (2, config.model.context))).detach()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():  # a fused one is not counted
        model.block(x, x)
    assert more["step"] - one["step"] == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.predict(x)
    assert one["step"] - (more["step"] - one["step"]) == 3 * counter.get_total_flops()  # once, and two products back
    assert one["parameters"] == sum(value.numel() for value in model.parameters()) and one["run"] == 3 * one["step"]


def test_a_size_that_was_not_trained_is_estimated_for_the_arms_that_were():
    rows = campaign_tables.costs(CONFIG, {"ep_linear": 40.0})
    assert [row[0] for row in rows] == [512] * 3 + [2048] * 3 and isinstance(CONFIG.model, Transformer)
    per_step = {(row[0], row[3]): row[6] for row in rows}
    label = plotting.label("ep_linear")
    assert 9 < per_step[2048, label] / per_step[512, label] < 32  # C^2 and T, less the readout


def row(arm: str, seed: int, **known: object) -> list:
    return [plotting.label(arm), seed, *(known.get(name.replace(" ", "_")) for name in campaign_tables.HISTORY[2:])]


def test_histories_are_judged_over_all_their_seeds():
    rows = {"X3": [row("bptt", seed, excursions=count) for seed, count in enumerate((900, 7, 0))],
            "X4": [row("warm_a", seed, first_task_gradient=step) for seed, step in enumerate((1, 5))],
            "X5": [row("norm_weak", 0, final_loss=2.0), row("norm_strong", 0, final_loss=2.5)],
            "X6": [row("ep_linear", 0, largest_abscissa=-0.3), row("ep_linear", 1, largest_abscissa=-0.2),
                   row("control_off", 0, largest_abscissa=-0.1), row("control_off", 1, largest_abscissa=0.5)]}
    found = campaign_verdicts.of_runs(rows)
    assert (found["x3_excursions"], found["x4_waited"], found["x5_price"]) == (907, 4, 0.5)
    assert found["x6_off"] == pytest.approx(0.2) and found["x6_frozen"] is None
    assert campaign_verdicts.of_runs(rows | {"X5": rows["X5"][:1]})["x5_price"] is None


def test_a_phase_that_diverged_has_lost_the_direction():
    held = [[plotting.label("ep"), 0, 2.0, 1e-5, 0.999, 1.0, 1.0, 1.0, 1.0]]
    assert campaign_verdicts.triangulation(held)["x1_cosine"] == 0.999
    diverged = [*held, [plotting.label("ep"), 10, 2.0, None, None, None, None, None, None]]
    assert campaign_verdicts.triangulation(diverged)["x1_cosine"] == -1.0


def test_the_best_step_along_ep_is_a_share_of_the_best_along_bptt():
    rows = [[plotting.label("ep"), "EP", -0.01, -0.09, -0.09], [plotting.label("ep"), "BPTT", -0.02, -0.1, -0.1]]
    assert campaign_verdicts.one_step(rows)["x2_share_ep"] == pytest.approx(0.9)


def test_a_table_of_weights_is_measured_where_they_are_and_else_kept_for_the_same_runs(tmp_path):
    here, gone = SimpleNamespace(name="a", has_weights=lambda: True), SimpleNamespace(name="a", has_weights=lambda: False)
    path = tmp_path / "results" / "paper" / "campaign" / "X8.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"of": ["a"], "rows": [[1]]}))
    assert campaign_tables.rows_of("paper", "X8", [here], lambda: [[2]], tmp_path) == [[2]]
    assert campaign_tables.rows_of("paper", "X8", [gone], lambda: [[2]], tmp_path) == [[1]]
    assert campaign_tables.rows_of("paper", "X8", [gone, here], lambda: [[2]], tmp_path) == []
    assert campaign_tables.rows_of("paper", "X8", [SimpleNamespace(name="b", has_weights=lambda: False)], list, tmp_path) == []
    assert campaign_tables.rows_of("paper", "X9", [], lambda: [[2]], tmp_path) == []


def test_every_section_asks_what_its_claim_asks():
    claims = {claim["id"]: claim for claim in yaml.safe_load((ROOT / "paper" / "claims.yaml").read_text())}
    for section, (_, key, holds) in campaign_verdicts.SECTIONS.items():
        claim = claims[f"campaign-{section.lower()}"]
        assert (claim["value"], claim["holds"]) == ({"file": "campaign/summary.json", "key": key}, holds), section


def test_a_section_without_a_number_decides_nothing():
    rows = {row[0]: row for row in campaign_verdicts.verdicts_on({"x1_cosine": 0.995, "x5_price": -0.1})}
    assert rows["X1"][2:] == ["≥ 0.99", "0.995", verdicts.HOLDS] and rows["X5"][-1] == verdicts.FAILS
    assert rows["X9"][3:] == [None, verdicts.UNDECIDED]
    assert campaign_verdicts.verdict("X9", {}).endswith("not measured, asked > 0.5: not decided.")


def test_what_a_homotopy_rescues_is_a_share_of_what_stalled_over_all_weights():
    def rows(*settled):
        return [["at", name, share, 1, 0] for pair in settled for name, share in zip(
            ("Anderson", "Anderson, then Homotopy"), pair, strict=True)]

    assert campaign_verdicts.rescued(rows((100, 100), (50, 75))) == pytest.approx(0.5)
    assert campaign_verdicts.rescued(rows((100, 100)))["undecided"] == "Anderson's method stalled at no sequence"
    assert campaign_verdicts.rescued([]) is None  # where nothing was run the reason would be false
