"""The compiled kernel against the PyTorch path, which is its reference."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch

import eplib
from eplib import blocks, estimators, kernels, models
from eplib.diagnostics import LiveBytes, agreement
from eplib.solvers import Anderson, Relaxation, Status, Substitution, norm, relative_force
from eplib.starts import LinearStart

pytestmark = pytest.mark.usefixtures("compiled_kernel")

SHAPES = [(16, 4, 5, True, False), (32, 4, 13, True, False), (64, 4, 40, True, False), (48, 2, 9, False, False),
          (64, 8, 16, False, False), (64, 4, 4, False, True), (48, 4, 17, False, True),  # the last two: linear attention
          (16, 2, 300, True, False), (16, 2, 530, False, False), (16, 2, 300, False, True)]  # attention weights made anew


def system(width=32, heads=4, tokens=13, causal=True, strength=1.0, damping=0.0, batch=3, linear=False, **options):
    """A block with all its weights away from their initial values, and a clamp."""
    torch.manual_seed(0)
    kind = blocks.LinearAttention() if linear else blocks.Thick(causal=causal)
    block = replace(kind, init=strength, damping=damping, **options).build(width, heads, tokens)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return block, torch.randn(batch, tokens, width)


def close(a, b, tolerance=2e-6):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize(("width", "heads", "tokens", "causal", "linear"), SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_force_and_products_are_those_of_pytorch(width, heads, tokens, causal, linear, damping):
    block, x = system(width, heads, tokens, causal, damping=damping, linear=linear)
    z, v = torch.randn_like(x), torch.randn_like(x)
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        ours, theirs = compiled.linearise(z, x), block.linearise(z, x)
        assert close(compiled(z, x), block(z, x))
        assert close(ours.product(v), theirs.product(v))
        assert close(ours.token_product(v), theirs.token_product(v))
        assert ours.by_token == theirs.by_token == causal
        assert close(ours.transposed(v), theirs.transposed(v))
        grads, truth = ours.contract(v)[0], theirs.contract(v)[0]
        assert set(grads) == set(truth)
        for name in truth:
            assert close(grads[name], truth[name], 5e-6), name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{"qk_norm": True}, {"gated": 1.5}, {"damping": 0.3, "learned_damping": True}], ids=repr)
def test_every_option_of_a_block_is_computed_as_pytorch_does(options, causal):
    """Force, products, the gradient in every parameter, and where both phases end."""
    block, x = system(causal=causal, strength=0.5, **options)
    solver, v = Anderson(step=0.7, max_steps=200, tol=1e-5), torch.randn_like(x)
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        z = Substitution(step=0.7, max_steps=200, tol=1e-6).settle(compiled, x).value
        assert close(z, solver.settle(block, x).value, 5e-5)
        ours, theirs = compiled.linearise(z, x), block.linearise(z, x)
        assert close(ours.product(v), theirs.product(v)) and close(ours.transposed(v), theirs.transposed(v))
        a = solver.adjoint(ours, v, norm(v)).value
        assert close(a, solver.adjoint(theirs, v, norm(v)).value, 1e-4)
        grads, truth = ours.contract(a)[0], theirs.contract(a)[0]
        assert set(grads) == set(truth) == {name for name, _ in block.named_parameters()}
        for name in truth:
            assert close(grads[name], truth[name], 5e-6), name
        for parameter in block.parameters(recurse=False):
            parameter += 0.1
            with pytest.raises(kernels.KernelError, match="weights have changed"):
                compiled(z, x)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"causal": False, "linear": True}, {"qk_norm": True}], ids=repr)
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_attention_weights_made_anew_are_those_that_were_kept(options, chunk, monkeypatch):
    block, x = system(64, 4, 40, strength=0.4, **options)
    solver, v = Substitution(step=0.7, max_steps=100, tol=1e-5, chunk=chunk), torch.randn_like(x)

    def everything():
        with torch.no_grad():
            compiled = kernels.CompiledBlock(block)
            free = solver.settle(compiled, x)
            jacobian = compiled.linearise(free.value, x)
            a = solver.adjoint(jacobian, v, norm(v))
            yield from (free.value, compiled(free.value, x), compiled(v, x), a.value, jacobian.product(v))
            yield from (jacobian.transposed(v), jacobian.token_product(v), *jacobian.token_probe(v, 0.25, 2))
            yield from jacobian.contract(a.value)[0].values()
            yield from compiled.linearise(v, x).contract(v)[0].values()

    kept = list(everything())
    monkeypatch.setattr(kernels.storage, "ROWS", 0)
    assert all(torch.equal(one, other) for one, other in zip(kept, everything(), strict=True))


@pytest.mark.parametrize("chunk", [2, 280, 600])
def test_of_many_tokens_a_phase_ends_where_pytorchs_does(chunk):
    """Units of few tokens, of more than a thread has attention weights of at once, and of all."""
    block, x = system(16, 2, 530, strength=0.4, batch=2)
    solver, slope = Substitution(step=0.7, max_steps=200, tol=1e-6, chunk=chunk), torch.randn_like(x)
    with torch.no_grad():
        compiled, reference = kernels.CompiledBlock(block), Anderson(step=0.7, max_steps=400, tol=1e-6)
        z = solver.settle(compiled, x)
        assert z.status is Status.CONVERGED and close(z.value, reference.settle(block, x).value, 5e-5)
        ours, theirs = compiled.linearise(z.value, x), block.linearise(z.value, x)
        a, truth = solver.adjoint(ours, slope, norm(slope)), reference.adjoint(theirs, slope, norm(slope)).value
        assert a.status is Status.CONVERGED and close(a.value, truth, 5e-5)
        grads, expected = ours.contract(a.value)[0], theirs.contract(a.value)[0]
        assert all(close(grads[name], expected[name], 5e-6) for name in expected)


def test_what_the_kernel_keeps_grows_with_the_tokens_and_not_with_their_pairs():
    def kept(tokens):
        block, x = system(16, 2, tokens, batch=1)
        with torch.no_grad(), LiveBytes() as counter:
            compiled = kernels.CompiledBlock(block)
            jacobian = compiled.linearise(x, x)
            jacobian.product(x), jacobian.contract(x)
        return counter.peak

    few, some, many = (kept(tokens) for tokens in (512, 1024, 2048))
    assert (many - some) / (some - few) == pytest.approx(2, rel=0.05)  # of pairs it is 4


@pytest.mark.parametrize("products", [0, 3])
def test_a_probe_of_every_token_is_refined_as_by_single_products(products):
    """More tokens than are refined together, and a sample that ends among them."""
    block, x = system(64, 4, 40)
    v, step = torch.randn_like(x), 0.25
    v[1, 5] = 0  # a probe of zero stays zero
    with torch.no_grad():
        jacobian, reference = kernels.CompiledBlock(block).linearise(x, x), block.linearise(x, x)
        probe, moved = jacobian.token_probe(v, step, products)
        for _ in range(products):
            v = v + step * reference.token_product(v)
            v /= v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
        assert close(probe, v) and close(moved, v + step * reference.token_product(v))
        assert not probe[1, 5].any() and not moved[1, 5].any()


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (127, 7, 33), (300, 100, 64), (128, 48, 80)])
def test_outer_products_are_summed_over_all_positions(count, rows, columns):
    """More positions than are summed at once, and numbers of rows and columns that fill no tile."""
    torch.manual_seed(0)
    jacobian = kernels.CompiledBlock(system()[0]).linearise(torch.randn(1, 13, 32), torch.randn(1, 13, 32))
    a, b = torch.randn(count, rows), torch.randn(count, columns)
    assert close(jacobian._outer(a, b), a.mT @ b)


@pytest.mark.parametrize(("batch", "tokens", "causal", "linear"), [(3, 13, True, False), (17, 4, False, False),
                                                                   (17, 4, False, True)])
def test_several_trajectories_share_a_clamp_and_a_linearisation(batch, tokens, causal, linear):
    """Few tokens are computed several samples at a time; a sample's result is that of its own."""
    block, x = system(tokens=tokens, causal=causal, batch=batch, linear=linear)
    z, v = torch.randn(batch, 2, tokens, 32), torch.randn(batch, 2, tokens, 32)
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        jacobian = compiled.linearise(z[:, 0], x)
        assert close(compiled(z, x.unsqueeze(1)), block(z, x.unsqueeze(1)))
        both = torch.stack([jacobian.product(v[:, k].contiguous()) for k in range(2)], 1)
        assert torch.equal(jacobian.product(v), both)
        both = torch.stack([jacobian.transposed(v[:, k].contiguous()) for k in range(2)], 1)
        assert torch.equal(jacobian.transposed(v), both)
        last = kernels.CompiledBlock(block).linearise(z[-1:, 0].contiguous(), x[-1:])
        assert torch.equal(last.transposed(v[-1:, 0].contiguous()), both[-1:, 0])


@pytest.mark.parametrize(("causal", "linear"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("chunk", [1, 3, 8, 40])
def test_substitution_ends_where_pytorch_does(causal, linear, chunk):
    block, x = system(64, 4, 40, causal, strength=0.4, linear=linear)
    solver = Substitution(step=0.7, max_steps=100, tol=1e-5, chunk=chunk)
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        ours, theirs = solver.settle(compiled, x), Anderson(step=0.7, max_steps=200, tol=1e-6).settle(block, x)
        assert ours.status is Status.CONVERGED and (ours.residual <= 1e-5).all()
        assert torch.allclose(relative_force(block(ours.value, x), ours.value), ours.residual, rtol=0.05, atol=1e-7)
        assert close(ours.value, theirs.value, 5e-5)
        reference = solver.settle(block, x)  # the same substitution in PyTorch
        assert reference.status is Status.CONVERGED and close(reference.value, theirs.value, 5e-5)

        slope, jacobian = torch.randn_like(x), compiled.linearise(ours.value, x)
        scale = norm(slope)
        a = solver.adjoint(jacobian, slope, scale)
        assert a.status is Status.CONVERGED and (a.residual <= 1e-5).all()
        exact = Anderson(step=0.7, max_steps=300, tol=1e-6).adjoint(block.linearise(ours.value, x), slope, scale)
        assert close(a.value, exact.value, 1e-4)
        kept, fresh = jacobian.contract(a.value)[0], jacobian.contract(a.value.clone())[0]  # of the last pass, and anew
        for name in fresh:
            assert close(kept[name], fresh[name], 1e-5), name


@pytest.mark.parametrize(("causal", "linear"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("solver", [Relaxation(step=0.6, tol=1e-4), Anderson(step=0.7, tol=1e-4),
                                    Relaxation(step=0.6, max_steps=3)],
                         ids=["relaxation", "anderson", "cut short"])
def test_a_phase_in_the_kernels_own_loop_is_that_of_pytorch(causal, linear, solver):
    """The same iterates, so the same steps and rates but for rounding near the tolerance."""
    block, x = system(64, 4, 12, causal, strength=0.4, linear=linear, batch=6)
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        ours, theirs = solver.settle(compiled, x), solver.settle(block, x)
        slope = torch.randn_like(x)
        pairs = [(ours, theirs), (solver.adjoint(compiled.linearise(ours.value, x), slope, norm(slope)),
                                  solver.adjoint(block.linearise(ours.value, x), slope, norm(slope)))]
    for kernel, reference in pairs:
        assert kernel.status is reference.status
        assert close(kernel.value, reference.value, 3e-4)
        assert (kernel.steps - reference.steps).abs().max() <= 1
        if isinstance(solver, Relaxation):
            assert torch.allclose(kernel.rate, reference.rate, rtol=0.02)
            assert abs(kernel.evaluations - reference.evaluations) <= 2  # ours stop sample by sample


def test_memory_is_kept_of_the_shapes_that_were_used_last(monkeypatch):
    monkeypatch.setattr(kernels.storage.Storage, "spare", {})
    block, x = system(tokens=40)
    compiled, seen = kernels.CompiledBlock(block), []
    for tokens in (40, *range(1, 8), 40, 9, 10):
        part = x[:, :tokens].contiguous()
        seen.append(compiled.linearise(part, part).cache.parts[0].data_ptr())
    assert len(kernels.storage.Storage.spare) == kernels.storage.SHAPES
    sizes = {3 * tokens * 32 for tokens in (40, *range(3, 8), 9, 10)}
    assert {key[0] for key in kernels.storage.Storage.spare} == sizes and seen[8] == seen[0]


def test_a_copy_made_for_the_kernel_lives_through_the_call():
    """Of an input that is not contiguous the kernel is given a copy, which nobody else holds."""
    block, x = system(batch=64, tokens=16)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    z = torch.randn_like(x)
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        assert not strided.is_contiguous() and torch.equal(compiled(z, strided), compiled(z, x))
        jacobian, solver = compiled.linearise(z, x), Relaxation(tol=1e-3)
        slope, scale = torch.randn_like(x), torch.rand(64, 2) + 1
        found = solver.adjoint(jacobian, slope.transpose(1, 2).contiguous().transpose(1, 2), scale[:, 0])
        assert torch.equal(found.value, solver.adjoint(jacobian, slope, scale[:, 0].contiguous()).value)


def test_the_free_state_brings_its_force_and_its_linearisation(monkeypatch):
    block, x = system()
    v = torch.randn_like(x)
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        z = Substitution(tol=1e-4).settle(compiled, x).value
        fresh, other = kernels.CompiledBlock(block)(z, x), kernels.CompiledBlock(block)(z, x + 1)
        assert (compiled(z, x) - fresh).norm() <= 1e-5 * z.norm() and torch.equal(compiled(z, x + 1), other)
        monkeypatch.setattr(kernels.CompiledBlock, "_evaluate", None)
        assert compiled(z.unsqueeze(1), x.unsqueeze(1)).shape == (*z.shape[:1], 1, *z.shape[1:])
        monkeypatch.undo()
        assert compiled.linearise(z, x).cache is compiled.settled[1]
        assert close(compiled.linearise(z, x).transposed(v), block.linearise(z, x).transposed(v))
        assert compiled.linearise(z.clone(), x).cache is not compiled.settled[1]


def test_results_do_not_depend_on_threads_or_neighbours():
    block, x = system(64, 4, 40, batch=7)
    solver, threads = Substitution(tol=1e-4, chunk=3), torch.get_num_threads()
    found, read_out = [], []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                compiled = kernels.CompiledBlock(block)
                found.append(solver.settle(compiled, x))
                read_out.append(compiled.linearise(x, x).contract(x)[0])
    finally:
        torch.set_num_threads(threads)
    for other in read_out[1:]:
        assert all(torch.equal(other[name], read_out[0][name]) for name in other)
    for other in found[1:]:
        assert torch.equal(other.value, found[0].value) and torch.equal(other.steps, found[0].steps)
    alone = solver.settle(kernels.CompiledBlock(block), x[4:5])
    assert torch.equal(alone.value[0], found[0].value[4])


def test_a_phase_that_cannot_settle_says_so_with_its_best_state():
    block, x = system(strength=3.0)  # far outside the contractive region
    with torch.no_grad():
        few = Substitution(step=0.7, max_steps=4, tol=1e-7).settle(kernels.CompiledBlock(block), x)
        assert few.status is Status.MAX_STEPS
        assert torch.allclose(relative_force(block(few.value, x), few.value), few.residual, rtol=1e-3)
        wild = Substitution(step=2.0, max_steps=400, tol=1e-7, memory=1).settle(kernels.CompiledBlock(block), 1e4 * x)
        true = relative_force(block(wild.value, 1e4 * x), wild.value)
        assert wild.status is not Status.CONVERGED or (true < 1e-5).all()
        x[1, 2, 3] = torch.nan
        broken = Substitution(step=0.7, max_steps=20, tol=1e-4).settle(kernels.CompiledBlock(block), x)
        assert broken.status is Status.NONFINITE and not broken.residual[1].isfinite()


def test_acceleration_that_stalls_falls_back_and_is_counted():
    """Far outside the contractive region some sample stalls; what comes back is its best state with that state's residual."""
    with torch.no_grad():
        for strength, step, memory in itertools.product((1.0, 2.0, 3.0, 5.0), (1.2, 1.6, 2.0), (1, 2)):
            block, x = system(strength=strength, tokens=24, batch=8)
            compiled = kernels.CompiledBlock(block)
            found = Substitution(step=step, max_steps=200, tol=1e-5, memory=memory, chunk=24).settle(compiled, x)
            if found.fallbacks:
                break
        assert found.fallbacks > 0
        assert torch.allclose(relative_force(block(found.value, x), found.value), found.residual, rtol=1e-2, atol=1e-7)
        block, x = system(strength=0.4)
        assert Substitution(step=0.5, max_steps=300, tol=1e-5).settle(kernels.CompiledBlock(block), x).fallbacks == 0


@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), estimators.AsymEP(beta=0.5), estimators.VectorField(beta=0.5),
                                       estimators.Tracking(beta=0.5, held=True, warm=True), estimators.Implicit()],
                         ids=lambda e: e.kind)
def test_the_gradient_is_that_of_pytorch(estimator):
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=32, heads=4, context=12, block=blocks.Thick(init=0.6))
    inputs = torch.randint(11, (4, 12))
    settings = {"estimator": estimator, "solver": Substitution(step=0.7, tol=1e-6, max_steps=200),
                "nudged": Substitution(step=0.7, tol=1e-4, max_steps=200)}
    ours, theirs = (eplib.gradient(model, inputs, inputs.roll(-1, 1), backend=backend, **settings)
                    for backend in ("compiled", "torch"))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for group, found in agreement(ours.grads, theirs.grads).items():
        assert found.error < 3e-3, group


@pytest.mark.parametrize("nudging", ["symmetric", "one-sided", "random-sign"])
@pytest.mark.parametrize("estimator", [estimators.VectorField, estimators.AsymEP], ids=lambda e: e.__name__)
@pytest.mark.parametrize("beta", [0.02, 0.2, 2.0])
@pytest.mark.parametrize("block", [blocks.Thick(causal=False, init=0.3), blocks.LinearAttention(init=0.1)],
                         ids=lambda b: b.kind)
def test_a_nudged_phase_in_rounds_ends_where_pytorchs_does(block, beta, estimator, nudging):
    """Also at a nudge at which the slope moves with the state; the readout is scaled up for that."""
    torch.manual_seed(0)
    model = models.Classifier(patch=9, tokens=4, classes=10, width=32, heads=4, block=block)
    with torch.no_grad():
        model.readout.weight.mul_(10)
    inputs, targets = torch.randn(24, 4, 9), torch.randint(10, (24,))
    nudged = Anderson(step=0.7, tol=2e-3, max_steps=200)
    found = {backend: eplib.gradient(model, inputs, targets, estimator=estimator(beta=beta, nudging=nudging), backend=backend,
                                     solver=Anderson(step=0.7, tol=2e-7, max_steps=200), nudged=nudged)
             for backend in ("compiled", "torch")}
    ours, theirs = found["compiled"], found["torch"]
    assert ours.nudged.status is Status.CONVERGED and (ours.nudged.residual <= nudged.tol).all()
    assert close(ours.adjoint, theirs.adjoint, 1e-2)
    assert ours.measured["displacement"] == pytest.approx(theirs.measured["displacement"], rel=1e-2)
    cut = eplib.gradient(model, inputs, targets, estimator=estimator(beta=beta), backend="compiled",
                         solver=Anderson(step=0.7, tol=2e-7, max_steps=200), nudged=Relaxation(step=0.5, max_steps=2, tol=1e-6))
    assert cut.nudged.status is Status.MAX_STEPS and (cut.nudged.residual > 1e-3).all()


@pytest.mark.parametrize("estimator", [estimators.VectorField(beta=0.5), estimators.AsymEP(beta=0.5)], ids=lambda e: e.kind)
def test_rounds_of_one_sample_do_not_depend_on_its_neighbours(estimator):
    """Also where some samples run out of steps."""
    torch.manual_seed(0)
    model = models.Classifier(patch=9, tokens=4, classes=10, width=32, heads=4, block=blocks.Thick(causal=False, init=0.3))
    with torch.no_grad():
        model.readout.weight.mul_(10)
    inputs, targets = torch.randn(12, 4, 9), torch.randint(10, (12,))

    def found(chosen):
        report = eplib.gradient(model, inputs[chosen], targets[chosen], estimator=estimator, backend="compiled",
                                solver=Anderson(step=0.7, tol=1e-6), nudged=Relaxation(step=0.6, max_steps=11, tol=1e-2))
        return report.adjoint, report.nudged.steps

    states, steps = found(torch.arange(12))
    assert steps.min() < 11 <= steps.max()
    for sample in (int(steps.argmin()), int(steps.argmax())):
        alone, taken = found(torch.tensor([sample]))
        assert taken[0] == steps[sample] and close(alone[0], states[sample], 5e-3)


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("step", [None, 0.25])
@pytest.mark.parametrize("window", [None, 3, 12])
def test_bptt_by_hand_is_autograds(window, step, image):
    torch.manual_seed(0)
    kind = blocks.Thick(init=0.6, causal=not image)
    model = models.Classifier(patch=9, tokens=4, classes=10, width=32, heads=4, block=kind) if image else \
        models.LanguageModel(vocab=11, width=32, heads=4, context=12, block=kind)
    inputs = torch.randn(5, 4, 9) if image else torch.randint(11, (5, 12))
    targets = torch.randint(10, (5,)) if image else inputs.roll(-1, 1)
    ours, theirs = (eplib.gradient(model, inputs, targets, estimator=estimators.BPTT(steps=12, window=window, step=step),
                                   backend=backend, solver=Relaxation(step=0.5, tol=1e-4)) for backend in ("compiled", "torch"))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6) and ours.status is theirs.status
    assert torch.allclose(ours.free.residual, theirs.free.residual, rtol=1e-3)
    assert set(ours.grads) == set(theirs.grads)
    for group, found in agreement(ours.grads, theirs.grads).items():
        assert found.error < 2e-5, group


def test_the_first_corrected_round_is_one_solve(monkeypatch):
    """At z* the forces of the trajectories are multiples of one another; with the linear response given, none is solved."""
    solves, relax = [], kernels.CompiledJacobian.relax
    monkeypatch.setattr(kernels.CompiledJacobian, "relax", lambda self, *rest: solves.append(1) or relax(self, *rest))
    for estimator in (estimators.AsymEP(beta=0.1), estimators.Tracking(beta=0.1, held=True, warm=True)):
        solves.clear()
        report = small_step("compiled", estimator=estimator)
        assert report.status is Status.CONVERGED and len(solves) == 1


def test_a_slope_below_round_off_does_not_keep_a_contrast_going():
    """A sample that the readout is sure of is nudged by less than float32 resolves of its state."""
    torch.manual_seed(0)
    model = models.Classifier(patch=9, tokens=4, classes=10, width=32, heads=4, block=blocks.Thick(causal=False, init=0.3))
    with torch.no_grad():
        model.readout.weight.mul_(200)
    settings = {"solver": Anderson(step=0.7, tol=1e-6, max_steps=100), "nudged": Anderson(step=0.7, tol=1e-2, max_steps=60)}
    inputs = torch.randn(200, 4, 9)
    states = model.settle(inputs, settings["solver"]).value
    targets = model.predict(states).argmax(-1).detach()
    nudge = estimators.Problem(model, inputs, targets, model.clamp(inputs).detach(), states).scale / norm(states)
    sure = (nudge > 1e-9) & (nudge < 1e-5)
    assert sure.sum() > 10
    for backend, kind in itertools.product(("torch", "compiled"), (estimators.AsymEP, estimators.VectorField)):
        report = eplib.gradient(model, inputs[sure], targets[sure], backend=backend, estimator=kind(beta=0.22), **settings)
        assert report.nudged.status is Status.CONVERGED and report.nudged.steps.max() < 30, (backend, kind)


def test_it_refuses_what_it_does_not_compute():
    block, x = system()
    with pytest.raises(kernels.KernelError, match="float32"):
        kernels.CompiledBlock(block)(x.double(), x)
    with pytest.raises(kernels.KernelError, match="asymmetric"):
        kernels.CompiledBlock(blocks.LinearAttention(symmetric=True).build(32, 4, 8))
    with pytest.raises(kernels.KernelError, match="LayeredBlock"):
        kernels.CompiledBlock(blocks.Layered().build(32, 4, 8))
    with pytest.raises(kernels.KernelError, match="multiple of 16"):
        kernels.CompiledBlock(blocks.Thick().build(24, 4, 8))
    with pytest.raises(kernels.KernelError, match="memory=17"):
        Substitution(memory=17).settle(kernels.CompiledBlock(block), x)
    model = models.LanguageModel(vocab=5, width=32, heads=4, context=8, block=blocks.Thick())
    with pytest.raises(ValueError, match="torch, compiled"):
        model.settle(torch.zeros(1, 8, dtype=torch.long), Relaxation(), backend="fast")


class Shifted(blocks.EquilibriumBlock):
    def forward(self, z, x):
        return super().forward(z, x) + 0.1


class FromZero(blocks.EquilibriumBlock):
    def start(self, x):
        return torch.zeros_like(x)


def with_class(kind):
    return lambda block: setattr(block, "__class__", kind)


def widened(block):
    block.layers.w1, block.layers.w2 = torch.nn.Linear(32, 40, bias=False), torch.nn.Linear(40, 32, bias=False)


@pytest.mark.parametrize(("alter", "reason"), [
    (with_class(Shifted), "Shifted has its own forward"), (with_class(FromZero), "its own start"),
    (lambda block: setattr(block, "forward", lambda z, x: x - z), "its forward is replaced"),
    (lambda block: setattr(block.layers, "network", torch.tanh), "layers.network is replaced"),
    (lambda block: block.register_forward_hook(lambda *rest: None), "it has hooks"),
    (lambda block: block.layers.qkv.register_forward_pre_hook(lambda *rest: None), "layers.qkv has hooks"),
    (lambda block: block.layers.wo.weight.register_hook(lambda grad: 2 * grad), "layers.wo.weight is hooked"),
    (lambda block: torch.nn.utils.parametrizations.weight_norm(block.layers.w1), "layers.w1 is a ParametrizedLinear"),
    (lambda block: setattr(block.layers, "w1", torch.nn.Linear(32, 128)), "layers.w1 holds weight, bias instead of weight"),
    (lambda block: setattr(block.layers, "ln1", torch.nn.LayerNorm(32, eps=0.1)), "eps 0.1"),
    (lambda block: setattr(block, "damping", torch.tensor(0.5)), "damping is a Tensor"), (widened, "hidden units")])
def test_a_block_that_was_altered_is_refused_with_the_reason(alter, reason):
    model = models.LanguageModel(vocab=5, width=32, heads=4, context=8, block=blocks.Thick())
    alter(model.block)
    with pytest.raises(kernels.KernelError, match=reason):
        model.settle(torch.zeros(1, 8, dtype=torch.long), Relaxation(), backend="compiled")


def test_what_torch_compiles_is_the_same_block_to_the_kernel_and_frozen_weights_get_no_gradient():
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=32, heads=4, context=12, block=blocks.Thick(init=0.6))
    model.block.layers.ln2.weight = model.block.layers.ln1.weight  # shared
    model.block.layers.wo.requires_grad_(False)
    inputs = torch.randint(11, (4, 12))
    solver = Anderson(step=0.7, tol=1e-6)
    ours, theirs = (eplib.gradient(model, inputs, inputs.roll(-1, 1), estimator=estimators.DyadicEP(), solver=solver,
                                   backend=backend).grads for backend in ("compiled", "torch"))
    assert "block.layers.wo.weight" not in ours and "block.layers.ln2.weight" not in ours and set(ours) == set(theirs)
    assert all(close(ours[name], theirs[name], 1e-3) for name in ours)
    state = model.settle(inputs, solver, backend="compiled").value
    model.block = torch.compile(model.block, backend="eager")
    assert torch.equal(model.settle(inputs, solver, backend="compiled").value, state)


def test_a_kernel_is_of_the_weights_that_it_was_made_of():
    block, x = system()
    for change in (lambda w: w.mul_(1.1), lambda w: setattr(block.layers.w1, "weight", torch.nn.Parameter(w.clone()))):
        with torch.no_grad():
            compiled = kernels.CompiledBlock(block)
            jacobian = compiled.linearise(x, x)
            change(block.layers.w1.weight)
            for use, arguments in ((compiled, (x, x)), (Relaxation().settle, (compiled, x)), (jacobian.product, (x,)),
                                   (jacobian.transposed, (x,)), (jacobian.contract, (x,)), (compiled.linearise, (x, x))):
                with pytest.raises(kernels.KernelError, match="weights have changed"):
                    use(*arguments)


def test_what_is_kept_of_the_free_state_is_not_taken_for_that_of_another():
    """Of a state or a clamp that was written to, or that only begins at the same address."""
    block, x = system(width=16, tokens=16, batch=16)
    solver = Substitution(tol=1e-4)
    with torch.no_grad():
        for change in (lambda z, x: (z.mul_(0.5), x), lambda z, x: (z, x.mul_(0.5)), lambda z, x: (z.mT, x),
                       lambda z, x: (z.transpose(0, 1), x), lambda z, x: (z, x.transpose(0, 1)),
                       lambda z, x: (z, x[:1].expand_as(x)), lambda z, x: (z, x[:1])):
            compiled, own = kernels.CompiledBlock(block), x.clone()
            z, drive = change(solver.settle(compiled, own).value, own)
            fresh = kernels.CompiledBlock(block)
            assert torch.equal(compiled(z, drive), fresh(z, drive)) and close(compiled(z, drive), block(z, drive))
            assert close(compiled.linearise(z, drive).product(x), block.linearise(z, drive).product(x), 1e-5)
        jacobian = compiled.linearise(x, x)
        a = solver.adjoint(jacobian, x, norm(x)).value
        a.mul_(-2)
        found, truth = (one.contract(a)[0]["layers.w1.weight"] for one in (jacobian, block.linearise(x, x)))
        assert close(found, truth, 1e-5)


def test_a_phase_that_diverged_leaves_no_force_behind():
    block, x = system()
    x[1, 2, 3] = torch.nan
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        found = Substitution(step=0.7, max_steps=20, tol=1e-4).settle(compiled, x)
        assert found.status is Status.NONFINITE and compiled.settled is None


@pytest.mark.parametrize(("state", "clamp"), [((3, 13, 32), (1, 13, 32)), ((3, 2, 13, 32), (3, 1, 13, 32)),
                                              ((3, 2, 13, 32), (1, 2, 13, 32)), ((3, 2, 13, 32), (13, 32)),
                                              ((1, 13, 32), (1, 13, 32)), ((2, 3, 13, 32), (3, 13, 32))])
def test_a_clamp_is_shared_as_pytorch_broadcasts_it(state, clamp):
    block, _ = system()
    z, x = torch.randn(state), torch.randn(clamp)
    with torch.no_grad():
        assert close(kernels.CompiledBlock(block)(z, x), block(z, x))


def test_shapes_that_the_kernel_would_misread_are_refused():
    block, x = system()
    with torch.no_grad():
        compiled = kernels.CompiledBlock(block)
        jacobian = compiled.linearise(x, x)
        for use in (lambda: compiled(x[..., :16], x[..., :16]), lambda: compiled(x, x[:, :5]),
                    lambda: Relaxation().settle(compiled, x, x[:2]), lambda: Relaxation().settle(compiled, x, x[:, :5])):
            with pytest.raises(kernels.KernelError, match="are to be"):
                use()
        pair = torch.stack([x, x])  # (2, B, T, C)
        for use, v in ((jacobian.product, x[:, :5]), (jacobian.product, x[:2]), (jacobian.transposed, pair),
                       (jacobian.contract, torch.stack([x, x], 1))):
            with pytest.raises(kernels.KernelError, match="does not fit J at states"):
                use(v)


def test_a_block_of_the_users_own_that_is_a_thick_one_is_not_taken_for_it():
    """Its configuration may build another module; a module that holds its states in a set is refused by that."""
    own = type("Own", (blocks.Thick,), {})
    assert kernels.knows(blocks.Thick(), 32, 4) and not kernels.knows(own(), 32, 4)
    block = system()[0]
    block.__class__ = type("Boxed", (blocks.EquilibriumBlock,), {"project": lambda self, z: z.clamp(-1, 1)})
    with pytest.raises(kernels.KernelError, match="does not compute this Boxed: it holds its states in a set, by `project`"):
        kernels.CompiledBlock(block)
    assert block.prefix() is None
    found = Substitution(step=0.7, max_steps=3, chunk=2).settle(block, torch.randn(2, 13, 32))
    assert found.value.abs().max() <= 1


def test_a_machine_without_the_kernel_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels.compile, "path", lambda: tmp_path / "build" / "thick-0.so")
    monkeypatch.setattr(kernels.compile, "compiler", lambda: None)
    kernels.library.cache_clear()
    try:
        with pytest.raises(kernels.KernelError, match=r"python -m eplib.kernels"):
            kernels.CompiledBlock(system()[0])
        with pytest.raises(kernels.KernelError, match="no C\\+\\+ compiler"):
            kernels.build()
    finally:
        kernels.library.cache_clear()
    (tmp_path / "broken.cpp").write_text("int main( {")
    monkeypatch.undo()
    monkeypatch.setattr(kernels.compile, "SOURCE", tmp_path / "broken.cpp")
    with pytest.raises(kernels.KernelError, match=r"could not compile broken.cpp"):
        kernels.build()
    assert not any((tmp_path / "build").iterdir())


def small_step(backend, start=None, state=None, **settings):
    torch.manual_seed(0)
    model = models.LanguageModel(vocab=11, width=32, heads=4, context=24, block=blocks.Thick(init=0.8))
    inputs = torch.randint(11, (6, 24))
    chosen = {"solver": Substitution(step=0.8, tol=1e-4), "nudged": Substitution(step=0.8, tol=5e-3),
              "estimator": estimators.DyadicEP()} | settings
    return eplib.gradient(model, inputs, inputs.roll(-1, 1), backend=backend, start=start, state=state, **chosen)


def test_a_step_takes_no_more_evaluations_than_it_did():
    """The guard on speed: counts, which do not depend on the machine's load. Substitution saves against whole sequences, the
    linear start against the clamp."""
    whole, tokens = small_step("torch"), small_step("compiled")
    fitted = small_step("compiled", LinearStart(), small_step("compiled", LinearStart()).state)
    counts = [report.measured["force_evaluations"] for report in (whole, tokens, fitted)]
    assert counts[0] > counts[1] and tokens.free.steps.sum() > fitted.free.steps.sum()
    assert counts[0] <= 46 and counts[1] <= 29 and counts[2] <= 27
    assert (fitted.free.residual <= 1e-4).all() and (fitted.nudged.residual <= 5e-3).all()


@pytest.mark.parametrize("backend", ["compiled", "torch"])
@pytest.mark.parametrize("estimator", [estimators.DyadicEP(), estimators.AsymEP(), estimators.Implicit()], ids=lambda e: e.kind)
def test_memory_does_not_grow_with_the_steps(backend, estimator):
    """Nor does it depend on whether the last iterate is the one that is returned."""
    def peak(steps):
        exactly = Relaxation(step=0.8, max_steps=steps, tol=0.0)
        gc.collect()
        kernels.storage.Storage.spare.clear()  # what the kernel keeps from call to call would not be counted
        with LiveBytes() as counter:
            small_step(backend, estimator=estimator, solver=exactly, nudged=exactly)
        return counter.peak

    assert peak(10) == peak(60) == peak(400)


def test_the_read_out_takes_its_derivatives_from_the_solve_that_found_the_adjoint_state(monkeypatch):
    back, passes = kernels.CompiledJacobian._back, []
    monkeypatch.setattr(kernels.CompiledJacobian, "_back", lambda self, u: passes.append(u) or back(self, u))
    assert small_step("compiled").grads is not None and not passes
