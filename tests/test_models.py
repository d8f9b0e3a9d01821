"""What a model is given and what it makes of it: targets that do not count, ids, patches, prompts."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import nn

import eplib
from eplib import blocks, data, estimators, models
from eplib.blocks import Dynamical
from eplib.models import IGNORED, UnsettledWarning, generation
from eplib.solvers import Anderson, FixedHorizon, Relaxation
from eplib.training import RunConfig, Text, Transformer, build_task, evaluate
from systems import TIGHT

ADJOINTS = [estimators.DyadicEP(), estimators.DyadicEP(held=False, beta=1e-4), estimators.AsymEP(beta=1e-4),
            estimators.Tracking(beta=1e-4), estimators.HolomorphicEP(beta=1e-2), estimators.Implicit()]


def language_model(dtype=torch.float64, block=None):
    torch.manual_seed(0)
    return models.LanguageModel(vocab=11, width=16, heads=2, context=6, block=block or blocks.Thick(init=0.5)).to(dtype)


def classifier():
    torch.manual_seed(0)
    return models.Classifier(patch=4, tokens=5, classes=10, width=16, heads=2, block=blocks.Thick(causal=False))


def padded(samples=4):
    """Inputs, targets of which each sample counts another number, and which count."""
    torch.manual_seed(1)
    inputs, targets = torch.randint(11, (samples, 6)), torch.randint(11, (samples, 6))
    counts = torch.arange(6) < torch.tensor([6, 1, 4, 2])[:samples, None]
    return inputs, targets.masked_fill(~counts, IGNORED), counts


# --- targets that do not count

def test_a_sample_s_loss_is_the_mean_over_its_targets_that_count():
    model, (inputs, targets, counts) = language_model(), padded()
    h = model.settle(inputs, TIGHT).value
    logits, found = model.predict(h), model.loss(h, targets)
    for sample in range(4):
        kept = counts[sample]
        own = functional.cross_entropy(logits[sample, kept], targets[sample, kept])
        assert found[sample].item() == pytest.approx(own.item(), rel=1e-12)
    right = [(logits[b, counts[b]].argmax(-1) == targets[b, counts[b]]).sum() for b in range(4)]
    assert model.correct(logits, targets).tolist() == right and model.counted(targets).tolist() == [6, 1, 4, 2]


def test_an_evaluation_is_over_the_targets_that_count():
    model, (inputs, targets, counts) = language_model(), padded()
    counts[3], targets[3] = False, IGNORED
    task = type("Task", (), {"validation": lambda self: zip(inputs.split(2), targets.split(2), strict=True)})()
    found = evaluate(model, task, TIGHT)
    logits = model.predict(model.settle(inputs, TIGHT).value)
    each = functional.cross_entropy(logits.mT, targets.clamp_min(0), reduction="none")
    assert found["loss"] == pytest.approx(sum(each[b, counts[b]].mean().item() for b in range(3)) / 3, rel=1e-9)
    assert found["accuracy"] == pytest.approx(100 * (logits.argmax(-1) == targets)[counts].double().mean().item())


@pytest.mark.parametrize("estimator", ADJOINTS, ids=lambda e: f"{e.kind}{'' if getattr(e, 'held', True) else ', not held'}")
def test_padding_leaves_every_estimators_gradient_that_of_the_sequences_cut_short(estimator):
    """In a causal block the tokens after the last that counts change nothing: each sequence cut there, alone, is the truth."""
    model, (inputs, targets, counts) = language_model(), padded()
    tight = Anderson(step=0.7, tol=1e-10, max_steps=300)
    found = eplib.gradient(model, inputs, targets, estimator=estimator, solver=tight, nudged=Anderson(
        step=0.7, tol=1e-8, max_steps=300))
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    losses = []
    for sample in range(4):
        length = int(counts[sample].sum())
        alone = eplib.gradient(model, inputs[sample:sample + 1, :length], targets[sample:sample + 1, :length], solver=tight,
                               estimator=estimators.Implicit(), nudged=tight)
        losses.append(alone.loss)
        for name, value in alone.grads.items():
            total[name] += value / 4
    assert found.loss == pytest.approx(sum(losses) / 4, rel=1e-8)
    for name, value in total.items():
        assert torch.allclose(found.grads[name], value, rtol=1e-4, atol=1e-6 * max(v.abs().max() for v in total.values())), name


@pytest.mark.parametrize("estimator", [estimators.BPTT(steps=40), estimators.OneStep(), estimators.FeedbackAlignment(),
                                       *ADJOINTS], ids=lambda e: e.kind)
def test_a_sample_without_a_target_that_counts_has_no_loss_and_no_gradient(estimator):
    """The batch's gradient is that of the other samples, divided by all."""
    model, (inputs, targets, _) = language_model(), padded()
    targets[1] = IGNORED
    tight = Anderson(step=0.7, tol=1e-9, max_steps=200)
    both = [eplib.gradient(model, inputs[chosen], targets[chosen], estimator=estimator, solver=tight, nudged=Anderson(
                step=0.7, tol=1e-7, max_steps=200) if estimator.kind not in ("BPTT", "OneStep", "FeedbackAlignment") else None)
            for chosen in ([0, 1, 2, 3], [0, 2, 3])]
    assert both[0].loss == pytest.approx(3 / 4 * both[1].loss, rel=1e-9)
    for name, value in both[1].grads.items():
        assert torch.allclose(both[0].grads[name], 3 / 4 * value, rtol=1e-5, atol=1e-9), name


@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), estimators.AsymEP(beta=1e-2), estimators.BPTT(steps=8)],
                         ids=lambda e: e.kind)
def test_padding_in_the_compiled_backend_is_that_of_pytorch(compiled_kernel, estimator):
    model, (inputs, targets, _) = language_model(torch.float32), padded()
    targets[3] = IGNORED
    phases = {"solver": Anderson(tol=1e-6)} | ({} if estimator.kind == "BPTT" else {"nudged": Anderson(tol=1e-5)})
    ours, theirs = (eplib.gradient(model, inputs, targets, backend=backend, estimator=estimator, **phases)
                    for backend in ("compiled", "torch"))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for name, value in theirs.grads.items():
        assert (ours.grads[name] - value).norm() <= 1e-2 * value.norm() + 1e-9, name


def test_the_loss_of_complex_states_is_holomorphic_where_targets_do_not_count():
    """Its derivative along the real and the imaginary axis is one number (Cauchy-Riemann); on the axis it is the real loss."""
    model, (_, targets, _) = language_model(), padded(2)
    targets[1] = IGNORED
    h, v = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 6, 16, dtype=torch.float64)
    assert torch.allclose(model.loss(h.to(torch.complex128), targets).real, model.loss(h, targets), rtol=1e-12)
    step = 1e-5
    along = [(model.loss(h + w * v, targets) - model.loss(h - w * v, targets)) / (2 * w) for w in (step + 0j, 1j * step)]
    assert torch.allclose(along[0], along[1], rtol=1e-7) and along[1][1] == 0


def test_a_classifier_refuses_a_target_that_does_not_count():
    model = classifier()
    with pytest.raises(ValueError, match=r"target -100 at \(1,\).*leave the sample out"):
        model.loss(torch.randn(3, 5, 16), torch.tensor([0, IGNORED, 9]))


# --- ids, patches and shapes

@pytest.mark.parametrize("wrong", [11, -1, 10**9])
def test_ids_outside_the_vocabulary_are_named(wrong):
    model, ids = language_model(), torch.zeros(2, 6, dtype=torch.long)
    ids[1, 3] = wrong
    where = rf"{wrong} at \(1, 3\) is not one of the 11 ids 0 .. 10"
    with pytest.raises(ValueError, match=f"input {where}$"):
        model.clamp(ids)
    for dtype in (torch.float64, torch.complex128):
        with pytest.raises(ValueError, match=f"target {where}; -100 marks"):
            model.loss(torch.randn(2, 6, 16, dtype=dtype), ids)
    with pytest.raises(ValueError, match="input -100 at"):
        model.clamp(torch.full((1, 2), IGNORED))
    with pytest.raises(ValueError, match=r"target 10 at \(0,\) is not one of the 10 ids"):
        classifier().loss(torch.randn(1, 5, 16), torch.tensor([10]))


def test_ids_of_another_type_or_shape_are_refused():
    model, good = language_model(), torch.zeros(2, 6, dtype=torch.long)
    for wrong in (good.float(), good.bool()):
        with pytest.raises(TypeError, match=r"must be ids.*\.long\(\)"):
            model.clamp(wrong)
        with pytest.raises(TypeError, match="targets must be ids"):
            model.loss(torch.randn(2, 6, 16, dtype=torch.float64), wrong)
    for wrong in (good[0], good[:0], good[:, :0], good[None]):
        with pytest.raises(ValueError, match="at least one sample and one token, got"):
            model.clamp(wrong)
    with pytest.raises(ValueError, match="7 tokens do not fit a context of 6"):
        model.clamp(torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match=r"need targets \(2, 6\), got \(6, 2\)"):  # as many, in another order
        model.loss(torch.randn(2, 6, 16, dtype=torch.float64), good.mT)
    assert torch.equal(model.clamp(good), model.clamp(good.int()))


def test_patches_of_another_type_or_shape_or_not_finite_are_refused():
    model, good = classifier(), torch.randn(3, 5, 4)
    for wrong in (good[:0], good[0]):
        with pytest.raises(ValueError, match="at least one sample"):
            model.clamp(wrong)
    with pytest.raises(ValueError, match=r"expected patches \(B, 5, 4\), got \(3, 4, 5\)"):
        model.clamp(good.mT)
    for wrong in (good.double(), good.to(torch.uint8)):
        with pytest.raises(TypeError, match=r"expected patches of torch\.float32"):
            model.clamp(wrong)
    for value in (math.nan, math.inf, -math.inf):
        bad = good.clone()
        bad[1, 2, 3] = value
        with pytest.raises(ValueError, match="patches of sample 1 are not finite"):
            model.clamp(bad)
    assert model.clamp(torch.full_like(good, 3e38)).shape == (3, 5, 16)  # their sum overflows, they do not


class Pair(Dynamical):
    """A user's block: two copies of the state relax to x, the second read out if `reads`."""

    def __init__(self, width, heads, context):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def start(self, x):
        return torch.stack([x, 0 * x], 1)  # (B, 2, T, C)

    def forward(self, z, x):
        return self.scale * x.unsqueeze(-3) - z


class PairRead(Pair):
    def output(self, z):
        return z[..., 1, :, :]


def of(block):
    """A configuration of the block."""
    return type("Own", (), {"build": staticmethod(block)})()


def test_a_users_block_of_another_state_shape_trains_and_one_that_reads_out_the_whole_state_is_told():
    inputs, targets, _ = padded()
    settings = {"estimator": estimators.DyadicEP(), "solver": TIGHT}
    good = language_model(block=of(PairRead))
    found = eplib.gradient(good, inputs, targets, **settings)
    loss = good.loss(good.block.scale * good.clamp(inputs), targets).mean()  # z* = scale x
    for (name, value), expected in zip(found.grads.items(), torch.autograd.grad(loss, list(good.parameters())), strict=True):
        assert torch.allclose(value, expected, rtol=1e-7, atol=1e-10), name
    with pytest.raises(ValueError, match=r"logits \(4, 2, 6, 11\) need targets .*block.output is to give \(B, T, C\)"):
        eplib.gradient(language_model(block=of(Pair)), inputs, targets, **settings)


# --- generation

def test_a_prompt_is_refused_for_what_the_training_split_never_has(monkeypatch):
    """`c` stands in the held-out end only: it has an id, and an embedding that no gradient ever reached."""
    codec = data.Chars(("a", "b", "c"))
    text = data.Text(np.array(codec.encode("abab" * 5 + "cc")), codec)
    monkeypatch.setattr(data, "text", lambda *_: text)
    run = RunConfig(experiment="x", arm="a", data=Text(corpus="plays"), steps=1, estimator=estimators.DyadicEP(),
                    model=Transformer(width=8, heads=2, context=2, block=blocks.Thick()))
    vocabulary = build_task(run).vocabulary
    for known in (vocabulary, data.Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))):
        assert known.encode("ba") == [1, 0] and known.encode("") == [] and known.decode([2, 0]) == "ca"
        with pytest.raises(data.DataError, match=r"training split never has 'c'.*smaller data.validation"):
            known.encode("abc")
        with pytest.raises(data.DataError, match="cannot encode 'd'"):
            known.encode("abcd")


def test_what_cannot_be_continued_is_refused():
    model, prompt, solver = language_model(), torch.arange(3), Relaxation()
    for wrong, said in ((prompt[:0], "at least one token"), (prompt[None], "at least one token"),
                        (torch.tensor([0, 11]), r"prompt 11 at \(1,\)"), (torch.tensor([IGNORED]), "prompt -100")):
        with pytest.raises(ValueError, match=said):
            model.generate(wrong, 3, solver)
    with pytest.raises(TypeError, match="prompt must be ids"):
        model.generate(prompt.float(), 3, solver)
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"temperature must be at least 0, .*got {temperature}"):
            model.generate(prompt, 1, solver, temperature)
    for top_k in (0, -1, 12, 2.0, True):
        with pytest.raises(ValueError, match=rf"top_k must be one of 1 \.\. 11, .*got {top_k}"):
            model.generate(prompt, 1, solver, top_k=top_k)
    with pytest.raises(ValueError, match="temperature 0 takes the likeliest token, so top_k=3 would do nothing"):
        model.generate(prompt, 1, solver, 0.0, top_k=3)
    with pytest.raises(ValueError, match="tokens must be at least 0, got -1"):
        model.generate(prompt, -1, solver)
    assert torch.equal(model.generate(prompt, 0, solver), prompt)
    with torch.no_grad():
        model.block.layers.wo.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"weights are not finite: block\.layers\.wo\.weight"):
        model.generate(prompt, 1, solver)


def test_greedy_generation_takes_the_likeliest_token_of_the_whole_window_each_time():
    model, solver = language_model(), Anderson(tol=1e-10)
    nn.init.normal_(model.readout.weight)  # so that the likeliest is so by a margin
    ids, drawn = torch.arange(3), torch.Generator().manual_seed(0)
    before = drawn.get_state()
    found = model.generate(ids, 3, solver, temperature=0, generator=drawn)
    for _ in range(3):
        logits = model.predict(model.block.output(model.settle(ids[None], solver).value))[0, -1]
        ids = torch.cat([ids, logits.argmax()[None]])
    assert torch.equal(found, ids) and torch.equal(drawn.get_state(), before)


def test_of_the_k_likeliest_tokens_each_is_drawn_in_its_share_and_no_other():
    """Against softmax(logits / temperature) over the k largest, normed to one by hand; of equal logits no more than k stay."""
    values, generator, count = [0.3, 2.0, -1.0, 1.2, 1.2, 0.9, -4.0], torch.Generator().manual_seed(0), 2000
    for k in (1, 2, 5, 7):
        drawn = torch.cat([generation._chosen(torch.tensor(values), 0.7, k, generator) for _ in range(count)])
        likeliest = sorted(values, reverse=True)[:k]
        weights = torch.tensor([math.exp(value / 0.7) for value in likeliest])
        shares = torch.tensor([(torch.tensor(values)[drawn] == value).double().mean() / likeliest.count(value)
                               for value in likeliest])
        assert len(drawn.unique()) <= k
        assert (shares - weights / weights.sum()).abs().max() < 0.06, (k, shares)  # five standard errors


def test_one_likeliest_token_is_the_greedy_one_and_the_whole_vocabulary_leaves_out_none():
    model, prompt, solver = language_model(), torch.arange(3), Relaxation(max_steps=30, tol=1e-4)
    greedy, first, every, none = (
        model.generate(prompt, 4, solver, temperature, torch.Generator().manual_seed(1), top_k=top_k)
        for temperature, top_k in ((0, None), (0.8, 1), (0.8, 11), (0.8, None)))
    assert torch.equal(greedy, first) and torch.equal(every, none) and not torch.equal(greedy, every)


@pytest.mark.parametrize("block", [blocks.Thick(), blocks.Energy()], ids=lambda b: b.kind)
def test_tokens_drawn_from_states_that_did_not_settle_are_counted(block):
    model, prompt = language_model(block=block), torch.arange(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settled = model.generate(prompt, 9, Anderson(tol=1e-8), generator=torch.Generator().manual_seed(0))
        model.generate(prompt, 2, FixedHorizon(steps=1))  # has no tolerance to miss
    with pytest.warns(UnsettledWarning, match="9 of 9 tokens were drawn from states that had not settled to 1e-08 in 1 step"):
        model.generate(prompt, 9, Relaxation(max_steps=1, tol=1e-8))
    with torch.inference_mode():
        again = model.generate(prompt, 9, Anderson(tol=1e-8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(settled, again)
