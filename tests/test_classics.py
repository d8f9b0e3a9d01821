"""The classic networks, and blocks given by their energy or by a slope of their own, against truth that knows neither."""

import itertools

import pytest
import torch
from torch import nn

import eplib
from eplib import blocks, dynamics, estimators, solvers, tasks
from eplib.blocks import Dynamical
from eplib.classics import Convolutional, Hopfield, LayeredHopfield
from eplib.diagnostics import adjoint_gradient, agreement
from eplib.models import Model

TIGHT = solvers.Relaxation(step=0.7, max_steps=4000, tol=1e-13)
NUDGED = solvers.Relaxation(step=0.7, max_steps=4000, tol=1e-9)


PATCHES = tasks.Patches(tokens=1, size=7, classes=3)


def batch(samples=12, pixels=7, classes=3, seed=1):
    """Classes that a linear rule tells apart, with noise."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(samples, pixels, generator=generator, dtype=torch.float64)
    return inputs, inputs[:, :classes].argmax(-1)


def network(scale=0.6):
    """In float64, with weights large enough that units of every layer, outputs too, sit at both bounds."""
    torch.manual_seed(2)
    model = LayeredHopfield(hidden=(9, 6)).build(PATCHES).double()
    for link in (model.first, *model.block.links):
        nn.init.normal_(link.weight, std=scale / link.in_features ** 0.5)
        nn.init.normal_(link.bias, mean=0.1, std=0.4)
    return model


EXACT = [estimators.VectorField(beta=1e-4), estimators.VectorField(beta=1e-6, nudging="one-sided"),
         estimators.AsymEP(beta=1e-4), estimators.Tracking(beta=1e-4), estimators.Tracking(beta=1e-4, warm=True),
         estimators.DyadicEP(), estimators.DyadicEP(beta=1e-4, held=False), estimators.Implicit(),
         estimators.BPTT(steps=300), estimators.ForwardMode(steps=80)]


@pytest.mark.parametrize("estimator", EXACT, ids=repr)
def test_every_estimator_is_the_dense_adjoint_with_units_at_both_bounds(estimator):
    model, (inputs, targets) = network(), batch()
    report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT,
                            nudged=NUDGED if estimator.second_phase else None)
    state = model.settle(inputs, TIGHT).value
    low, high = state < 1e-9, state > 1 - 1e-9
    pulled = (model.block.output(state) - nn.functional.one_hot(targets, 3)).abs() > 0.5
    assert low.any() and high.any() and ((state > 0.05) & (state < 0.95)).any()
    held = low | high  # an output held and pulled by the loss, above free units: where the pull has to stay in the box
    assert ((pulled & held[:, -3:]).any(1) & (~held[:, 9:15]).any(1)).any()
    for group, value in agreement(report.grads, adjoint_gradient(model, inputs, targets, state)).items():
        assert value.error < 1e-4, (group, value)


def error(model, inputs, targets, estimator):
    state = model.settle(inputs, TIGHT).value
    found = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT, nudged=NUDGED).grads
    return agreement(found, adjoint_gradient(model, inputs, targets, state))["total"].error


def test_plain_ep_needs_the_pull_inside_the_box(monkeypatch):
    """Negative control: J is not symmetric where units are held, and saturated outputs are pulled."""
    case = (network(), *batch(), estimators.VectorField(beta=1e-4))
    assert error(*case) < 1e-4
    monkeypatch.setattr(blocks.FromEnergy, "nudged", None)
    assert error(*case) > 1e-2


def test_states_stay_in_the_box_under_steps_of_at_most_one():
    model = network(scale=4.0)
    x = model.clamp(batch()[0]).detach()
    z = torch.rand(len(x), 18, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for step in (1.0, 0.3):
        for pull in (0.0, 5.0, -5.0):
            moved = z + step * model.block.nudged(z, x, torch.full_like(z, pull))
            assert moved.min() > -1e-12 and moved.max() < 1 + 1e-12


def test_each_layer_relaxes_to_the_hard_sigmoid_of_what_comes_from_below_and_above():
    model, (inputs, _) = network(), batch()
    z = torch.rand(len(inputs), 18, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (s1, s2, s3), (w1, w2), x = z.split((9, 6, 3), -1), model.block.links, model.first(inputs)
    drives = x + s2 @ w1.weight, w1(s1) + s3 @ w2.weight, w2(s2)
    assert torch.allclose(model.block(z, x), torch.cat(drives, -1).clamp(0, 1) - z, rtol=1e-12, atol=1e-12)


def images(samples=6, side=8, classes=3):
    """Square images, whole (B, H, W) and in the four patches (B, 4, n) of their corners."""
    whole = torch.rand(samples, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    return whole, tasks.images.patches(whole, side // 2), torch.arange(samples) % classes


def convolutional(**changes):
    torch.manual_seed(3)
    return Convolutional(channels=(2, 3), kernel=3, **changes).build(tasks.Patches(tokens=4, size=16, classes=3)).double()


def test_convolutions_see_the_image_that_the_patches_are_cut_from():
    model, (whole, patched, _) = convolutional(), images()
    assert torch.equal(model.clamp(patched), model.first(whole.unsqueeze(1)))


@pytest.mark.parametrize("estimator", [estimators.VectorField(beta=1e-4), estimators.BPTT(steps=300)], ids=repr)
def test_the_convolutional_network_has_the_dense_adjoint_s_gradient(estimator):
    model, (_, inputs, targets) = convolutional(), images()
    nn.init.normal_(model.first.weight, std=0.8)  # so large that units of the first layer sit at both bounds
    nn.init.constant_(model.block.links[0].bias, 0.3)
    report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT,
                            nudged=NUDGED if estimator.second_phase else None)
    state = model.settle(inputs, TIGHT).value
    last = state[:, -model.block.layers.sizes[-1]:]
    assert (state < 1e-9).any() and (state > 1 - 1e-9).any() and ((last > 0.05) & (last < 0.95)).any()
    for group, value in agreement(report.grads, adjoint_gradient(model, inputs, targets, state)).items():
        assert value.error < 1e-4, (group, value)


def test_without_feedback_both_are_ordinary_networks_of_the_same_weights():
    _, inputs, targets = images()
    hopfield = [LayeredHopfield(hidden=(9, 6), feedback=fed) for fed in (True, False)]
    built = []
    for architecture in hopfield:
        torch.manual_seed(3)
        built.append(architecture.build(tasks.Patches(tokens=4, size=16, classes=3)).double())
    for fed, plain in (built, (convolutional(), convolutional(feedback=False))):
        assert all(torch.equal(a, b) for a, b in zip(fed.parameters(), plain.parameters(), strict=True))
        layer = plain.clamp(inputs).clamp(0, 1)
        for link in plain.block.links:
            layer = link(layer).clamp(0, 1)
        plain.loss(layer.flatten(1), targets).mean().backward()
        found = eplib.gradient(plain, inputs, targets, estimator=estimators.Backprop(), solver=TIGHT).grads
        assert all(torch.allclose(found[name], parameter.grad, atol=1e-14) for name, parameter in plain.named_parameters())


@pytest.mark.parametrize(("architecture", "signal", "error", "says"), [
    (LayeredHopfield(), tasks.Tokens(vocab=5, context=4), TypeError, "LayeredHopfield takes images in Patches"),
    (Convolutional(), tasks.Patches(tokens=3, size=16, classes=2), TypeError, "square images in square Patches"),
    (Convolutional(), tasks.Patches(tokens=16, size=4 * 49, classes=2, channels=4), TypeError, "Patches of one channel"),
    (Convolutional(), tasks.Patches(tokens=1, size=100, classes=2), ValueError, "3 x 3 units has no room for a kernel of 6")])
def test_what_a_classic_network_does_not_take_is_refused(architecture, signal, error, says):
    with pytest.raises(error, match=says):
        architecture.build(signal)


class Bowl(blocks.FromEnergy):
    """E = z A z / 2 - <x, z>, without a box unless one is given: a quadratic programme."""

    def __init__(self, matrix, box=None):
        super().__init__()
        self.matrix, self.box = nn.Parameter(matrix), box

    def energy(self, z, x):
        return ((z @ self.matrix) * z).sum(-1) / 2 - (x * z).sum(-1)


def bowl(box=None):
    raw = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return Bowl(raw @ raw.mT / 10 + 0.5 * torch.eye(5, dtype=torch.float64), box)


def test_without_a_box_the_force_is_minus_the_slope():
    block, x, z = bowl(), *torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    symmetric = (block.matrix + block.matrix.mT) / 2
    assert torch.allclose(block(z, x), x - z @ symmetric, rtol=1e-12, atol=1e-12)
    v = torch.ones_like(z)
    assert torch.allclose(block.linearise(z, x).product(v), -v @ symmetric, rtol=1e-12, atol=1e-12)


def test_the_fixed_point_is_the_minimum_in_the_box():
    """Against the best of all 3^5 active sets, each solved by itself."""
    block, x = bowl((-0.4, 0.6)), torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[None]
    z = TIGHT.settle(block, x, torch.zeros_like(x)).value
    a, best = block.matrix.detach(), torch.inf
    for held in itertools.product((None, *block.box), repeat=5):
        free = torch.tensor([one is None for one in held])
        point = torch.tensor([one or 0.0 for one in held], dtype=torch.float64)
        point[free] = torch.linalg.solve(a[free][:, free], x[0, free] - a[free][:, ~free] @ point[~free])
        if point.min() >= -0.4 and point.max() <= 0.6:
            best = min(best, block.energy(point[None], x).item())
    assert abs(block.energy(z, x).item() - best) < 1e-10
    assert (z > 0.6 - 1e-9).any() and (z < -0.4 + 1e-9).any()


def test_a_complex_nudge_is_refused_by_name():
    model, (inputs, targets) = network(), batch()
    with pytest.raises(TypeError, match="Hopfield has no complex extension"):
        eplib.gradient(model, inputs, targets, estimator=estimators.HolomorphicEP(), solver=TIGHT)


@pytest.mark.parametrize(("energy", "box", "says"), [
    (lambda z: z.square().mean(), None, r"energy of Odd has shape \(\) for states \(3, 5\); give one for each sample"),
    (lambda z: z.square().sum(-1), (1.0, 0.0), r"box of Odd is \(1.0, 0.0\); its first number is to be below")])
def test_an_energy_that_is_none_says_what_to_do(energy, box, says):
    Odd = type("Odd", (blocks.FromEnergy,), {"box": box, "energy": lambda self, z, x: energy(z)})
    with pytest.raises(ValueError, match=says):
        Odd()(torch.ones(3, 5), torch.ones(3, 5))


def test_sixty_steps_of_plain_ep_lower_the_loss():
    torch.manual_seed(0)
    model, (inputs, targets) = LayeredHopfield(hidden=(16,)).build(PATCHES), batch(samples=32)
    inputs, optimiser, losses = inputs.float(), torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(60):
        report = eplib.gradient(model, inputs, targets, estimator=estimators.VectorField(beta=0.2),
                                solver=solvers.Relaxation(step=1.0, max_steps=20, tol=1e-3),
                                nudged=solvers.Relaxation(step=1.0, max_steps=10, tol=1e-2))
        losses.append(report.loss)
        report.assign(model)
        optimiser.step()
    h = model.block.output(model.settle(inputs, solvers.Relaxation(step=1.0, max_steps=20, tol=1e-3)).value)
    assert losses[-1] < 0.6 * losses[0] and (h.argmax(-1) == targets).double().mean() > 0.8


class Slope(Dynamical):
    """Hands -dE/dz of E = |z - x|^2 / 2 - z W z / 2 by torch.autograd.grad, in a way given."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(6)
        self.way, self.weight = way, nn.Parameter(0.2 * torch.randn(7, 7, dtype=torch.float64))

    def forward(self, z, x):
        if self.way == "no_grad":
            with torch.no_grad():
                return x - z + torch.tanh(z @ self.weight)
        if self.way == "plain":
            return -torch.autograd.grad(self.energy(z, x), z, create_graph=True)[0]
        with torch.enable_grad():
            s = z if self.way != "detached" and z.requires_grad else z.detach().requires_grad_()
            slope, = torch.autograd.grad(self.energy(s, x), s, create_graph=self.way != "closed")
        return -slope

    def energy(self, z, x):
        return ((z - x).square().sum() - ((z @ self.weight) * z).sum()) / 2


class Sloped(Model):
    def __init__(self, way):
        super().__init__()
        self.block = Slope(way)

    def clamp(self, inputs):
        return inputs

    def loss(self, h, targets):
        return h[..., :3].sub(nn.functional.one_hot(targets, 3)).square().sum(-1) / 2


SLOPED = [estimators.VectorField(beta=1e-4), estimators.AsymEP(beta=1e-4), estimators.DyadicEP(), estimators.Implicit(),
          estimators.BPTT(steps=200)]


@pytest.mark.parametrize("estimator", SLOPED, ids=repr)
def test_a_slope_by_autograd_that_keeps_its_graph_is_right(estimator):
    model, (inputs, targets) = Sloped("kept"), batch()
    report = eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT,
                            nudged=NUDGED if estimator.second_phase else None)
    truth = adjoint_gradient(model, inputs, targets, model.settle(inputs, TIGHT).value)
    assert agreement(report.grads, truth)["total"].error < 1e-6


@pytest.mark.parametrize("estimator", SLOPED, ids=repr)
@pytest.mark.parametrize(("way", "says"), [
    ("detached", "in a detached copy of the state"), ("closed", "without create_graph=True"),
    ("plain", "which fails in phases that keep no graph"), ("no_grad", "has no graph to the state")])
def test_a_slope_by_autograd_that_loses_its_graph_is_refused_with_what_to_do(way, says, estimator):
    model, (inputs, targets) = Sloped(way), batch()
    with pytest.raises(TypeError, match=f"the force of Slope .*{says}.*torch.func.grad.*FromEnergy"):
        eplib.gradient(model, inputs, targets, estimator=estimator, solver=TIGHT)


def test_several_tensors_are_one_state_and_its_parts_are_views_of_it():
    layers = blocks.Packed((2, 3), (4,))
    z = layers.zeros(torch.ones(5, 7))
    assert layers.size == 10 and z.shape == (5, 10) and not z.any()
    many = torch.arange(60.0).view(2, 3, 10)  # several states of a sample
    image, line = layers.split(many)
    assert image.shape == (2, 3, 2, 3) and line.shape == (2, 3, 4)
    assert torch.equal(layers.join(image, line), many)
    line.add_(1)
    assert torch.equal(many[..., 6:], line)
    with pytest.raises(ValueError, match=r"does not hold tensors \[\(2, 3\), \(4,\)\], which are 10 numbers"):
        layers.split(torch.zeros(5, 9))
    for parts in ((image,), (line, image), (image, line, line)):
        with pytest.raises(ValueError, match="do not end in"):
            layers.join(*parts)


@pytest.mark.parametrize("solver", [solvers.Relaxation(step=1.2, tol=1e-9), solvers.Anderson(step=0.9, tol=1e-9)],
                         ids=lambda solver: solver.kind)
def test_a_solver_puts_every_state_into_the_box(solver, monkeypatch):
    """Steps above 1, and accelerated ones, would leave it, where the energy of a network may be another or none."""
    torch.manual_seed(0)
    model, forward = LayeredHopfield(hidden=(6, 5)).build(PATCHES).double(), Hopfield.forward
    for link, scale in zip((model.first, *model.block.links), (1.5, 0.1, 0.1), strict=True):  # units meet bounds, and settle
        nn.init.normal_(link.weight, std=scale)
    seen = []
    monkeypatch.setattr(Hopfield, "forward", lambda self, z, x: seen.append(z) or forward(self, z, x))

    def farthest():
        return max(max((-z).max().item(), (z - 1).max().item()) for z in seen)

    found, truth = (model.settle(batch()[0], one) for one in (solver, solvers.Relaxation(max_steps=999, tol=1e-10)))
    assert found.status is solvers.Status.CONVERGED and torch.allclose(found.value, truth.value, atol=1e-7)
    assert farthest() <= 0
    monkeypatch.setattr(solvers.base, "projection", lambda block: None)
    model.settle(batch()[0], solver)
    assert farthest() > 1e-4  # else this shows nothing


class Mixed(Dynamical):
    """F = x - z + W z / 10, W a layer that has the name of what holds states in a set."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4, bias=False)

    def forward(self, z, x):
        return x - z + 0.1 * self.project(z)


def test_a_layer_named_project_holds_no_states_and_a_compiled_block_keeps_its_box():
    torch.manual_seed(0)
    block, x = Mixed().double(), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        found = solvers.Relaxation(step=0.7, max_steps=99, tol=1e-12).settle(block, x).value
        truth = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - 0.1 * block.project.weight, x.mT).mT
    assert torch.allclose(found, truth, atol=1e-9)
    boxed = bowl((0.0, 0.1))
    for one in (boxed, torch.compile(boxed, backend="eager")):
        hold = dynamics.projection(one)
        assert torch.equal(hold(torch.tensor([-1.0, 0.05, 2.0])), torch.tensor([0.0, 0.05, 0.1]))
