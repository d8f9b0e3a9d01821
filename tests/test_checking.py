"""What is wrong with a user's block is said in words: blocks broken on purpose, one mistake each."""

import pytest
import torch
from torch import nn

from eplib import models
from eplib.blocks import Dynamical
from eplib.calculus import AutomaticSlope
from eplib.diagnostics import check
from eplib.solvers import Relaxation


class Own(Dynamical):
    """F = x - z + tanh(scale W z), with one mistake."""

    def __init__(self, mistake):
        super().__init__()
        torch.manual_seed(0)
        self.mistake, self.weight, self.scale = mistake, nn.Parameter(0.3 * torch.randn(5, 5)), nn.Parameter(torch.ones(5))

    def forward(self, z, x):
        weight, scale = self.weight, self.scale
        if self.mistake == "unstable":
            return x - 5 * z
        if self.mistake == "explodes":
            return x + 2 * z
        if self.mistake == "one state":
            return x - z + torch.tanh(torch.einsum("bi,ij->bj", z.reshape(len(z), -1)[:, :5], weight * scale)).view(
                (len(z),) + (1,) * (z.dim() - 2) + (5,))
        if self.mistake == "detached":
            return x - z + torch.tanh(z.detach() @ weight * scale)
        if self.mistake == "data":
            scale = scale.data
        if self.mistake == "batch":
            return x - z + torch.tanh(z.mean(0, keepdim=True) @ weight * scale)
        if self.mistake == "noise":
            return x - z + torch.tanh(nn.functional.dropout(z @ weight * scale))
        if self.mistake == "shape":
            return (x - z + torch.tanh(z @ weight * scale))[..., :4]
        return x - z + torch.tanh(z @ weight * scale)

    def linearise(self, z, x):
        true, mistake = AutomaticSlope(self, z, x), self.mistake

        class By:
            def product(self, v):
                return true.product(v) * (1.3 if mistake == "product" else 1)

            def transposed(self, u):
                return true.product(u) if mistake == "transposed" else true.transposed(u)

            def contract(self, u):
                grads, into = true.contract(u)
                if mistake == "lost":
                    del grads["scale"]
                if mistake == "halved":
                    grads["weight"] = grads["weight"] / 2
                return grads, into * (2 if mistake == "clamp" else 1)

        return By()


class Leaky(Dynamical):
    """F = x - decay z + tanh(W z), whose own attributes have names that come to mind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.decay, self.damping = nn.Parameter(0.3 * torch.randn(5, 5)), nn.Parameter(torch.tensor(2.0)), 0.5

    def forward(self, z, x):
        return x - self.decay * z + torch.tanh(z @ self.weight)


class System(models.Model):
    def __init__(self, mistake=None):
        super().__init__()
        self.block, self.inflow = Own(mistake), nn.Linear(4, 5)

    def clamp(self, inputs):
        return self.inflow(inputs)

    def loss(self, h, targets):
        losses = (h - targets).square().sum(-1) / 2
        return losses.mean() if getattr(self.block, "mistake", None) == "mean" else losses


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 5, generator=generator)


def test_of_a_right_block_nothing_is_wrong_and_the_model_stays_as_it_is():
    model = System()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = check(model, *batch())
    assert found.ok and str(found).startswith("nothing is wrong"), str(found)
    assert found.measured["gradient"] < 1e-3 and found.measured["J^T u"] < 1e-12
    assert all(torch.equal(value, before[name]) and value.dtype == torch.float32 for name, value in model.state_dict().items())


def test_a_block_of_ones_own_names_its_parts_as_it_likes():
    model = System()
    model.block = Leaky()
    found = check(model, *batch(), solver=Relaxation(step=0.4, max_steps=200))
    assert found.ok, str(found)


@pytest.mark.parametrize(("mistake", "says"), [
    ("lost", "contract gives no gradient for block.scale (its norm is"),
    ("halved", "contract's gradient for block.weight is not autograd's (error 0.5)"),
    ("clamp", "contract's gradient in the clamp x is not autograd's (error 1)"),
    ("transposed", "J^T u is not the transpose of J v (error 0."),
    ("product", "J v is not autograd's (error 0.3)"),
    ("detached", "autograd's derivative is not that of the force (error"),
    ("data", "autograd's gradient in block.scale is not the force's (error"),
    ("unstable", "the free phase does not settle in 200 steps of 0.5 (residual"),
    ("explodes", "smaller step, smaller weights, or more damping"),
    ("batch", "a sample's force depends on the others of its batch (error"),
    ("noise", "the force is another each time it is computed"),
    ("one state", "states (B, K, ...) under a clamp (B, 1, ...) get another force than alone"),
    ("shape", "the force has shape (6, 4) at states (6, 5)"),
    ("mean", "loss gives () for a batch of 6; give one number for each sample, (6,)")])
def test_a_mistake_is_said_in_words(mistake, says):
    solver = Relaxation(step=0.5 if mistake != "unstable" else 0.4, max_steps=200)
    says = says.replace("steps of 0.5", f"steps of {solver.step:g}")
    found = check(System(mistake), *batch(), solver=solver)
    assert not found.ok and any(says in one for one in found.wrong), str(found)
