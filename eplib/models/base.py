"""The interfaces of models: a block with what feeds it and what reads it out, and the configuration that builds one.

    x = model.clamp(inputs)          # (B, ...), what clamps the block
    h = model.block.output(z)        # (B, ...), of its state
    loss = model.loss(h, targets)    # (B,)

A model of your own gives `block`, `clamp`, `predict` and `loss_of`; everything else of eplib asks for no more.
"""

import re
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..blocks import Dynamical, EquilibriumBlock
from ..families import Family, owed
from ..intact import refuse_hooked_wrapper
from ..solvers import Solution, Solver
from ..tasks import Signal
from .losses import IGNORED

if TYPE_CHECKING:
    from ..kernels import CompiledBlock

Backend = Literal["torch", "compiled"]
# what torch.compile, parametrisations and the older weight_norm and spectral_norm make of a parameter's name
RENAMED = re.compile(r"_orig_mod\.|parametrizations\.(?=\w+\.original)|(?<=weight)(\.original[01]?|_orig|_g|_v)$")


class Model(nn.Module):
    """A block in training: inputs clamp it, and what its state puts out is compared with targets."""

    block: Dynamical
    READOUT: ClassVar[tuple[str, ...]] = ("norm", "readout")  # its parts that `predict` uses, as attributes

    def clamp(self, inputs: Tensor) -> Tensor:
        """What clamps the block, x (B, ...). Raises TypeError or ValueError for inputs that the model does not take."""
        raise owed(self, "clamp(inputs)")

    def predict(self, h: Tensor) -> Tensor:
        """What the model says, of what is read out: for classes and symbols one logit each, (B, ..., V)."""
        raise owed(self, "predict(h)")

    def loss_of(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """One loss for each sample: (B,)."""
        raise owed(self, "loss_of(predictions, targets)")

    def loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """One loss for each sample: (B,)."""
        return self.loss_of(self.predict(h), targets)

    def fitting(self, inputs: Tensor) -> tuple[int, ...] | None:
        """The shape of the targets that go with inputs; None where only their number is known."""
        return None

    def counted(self, targets: Tensor) -> Tensor:
        """How many targets of each sample count: (B,)."""
        return (targets != IGNORED).view(len(targets), -1).sum(1)

    def correct(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """How many targets of each sample have the largest logit; one that does not count is none of them: (B,)."""
        return (predictions.argmax(-1) == targets).view(len(targets), -1).sum(1)

    def groups(self) -> dict[str, list[str]]:
        """Names of the parameters of the block, of the embedding that clamps it, and of the readout, which the adjoint state
        does not enter."""
        found: dict[str, list[str]] = {"block": [], "embedding": [], "readout": []}
        for name, _ in self.named_parameters():
            part = RENAMED.sub("", name).split(".")[0]
            found["block" if part == "block" else "readout" if part in self.READOUT else "embedding"].append(name)
        return found

    def without_readout(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of {parameter name: tensor} that the adjoint state enters: all but the readout's."""
        return {name: value for name, value in tensors.items() if RENAMED.sub("", name).split(".")[0] not in self.READOUT}

    def dynamics(self, backend: Backend = "torch") -> "Dynamical | CompiledBlock":
        """What computes the block: the block itself, or the compiled kernel at its present weights. Raises
        `kernels.KernelError` where the kernel is not built or does not know the block."""
        refuse_hooked_wrapper(self.block)
        if backend == "torch":
            return self.block
        if backend != "compiled":
            raise ValueError(f"backend {backend!r} is not one of torch, compiled")
        from ..kernels import CompiledBlock  # loads the library

        return CompiledBlock(cast(EquilibriumBlock, self.block))  # which refuses any other

    @torch.no_grad()
    def settle(self, inputs: Tensor, solver: Solver, start: Tensor | None = None, backend: Backend = "torch") -> Solution:
        """The free phase: takes the clamped block to its fixed point, without a graph, from `start` (by default the
        block's)."""
        return solver.settle(self.dynamics(backend), self.clamp(inputs), start)


class Architecture(Family, default="Transformer"):
    """Shape of a model. One of your own is a `@configuration` with `build`.

    context: tokens of a text's windows, for a model of text. described: what it is, in words. causal: whether what it says of a
    place depends on those before it only, None where there are no places. explicit: its start state is its answer, so there is
    nothing to relax. clamp_shaped: states have the clamp's shape. in_kernel: the compiled kernel computes it.
    """

    context: int | None = None
    causal: bool | None = None
    explicit: bool = False
    clamp_shaped: bool = True
    in_kernel: bool = False

    @property
    def described(self) -> str:
        return f"model {self.kind}"

    def build(self, signal: Signal) -> Model:
        """The model that takes what a task gives, with initial weights. Raises TypeError for a signal that it does not take."""
        raise owed(self, "build(signal)")
