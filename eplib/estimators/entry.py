"""What `gradient` refuses before it computes anything: what would fail later in somebody else's words, and options that would
do nothing."""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..calculus import twice_differentiable
from ..intact import bare, refuse_hooked_wrapper
from ..models import Backend, Model
from ..solvers import Solver, refuse_rounding
from ..starts import LinearStart


def second_phase(estimator: Any, solver: Solver | None, nudged: Solver | None) -> Solver | None:
    """The solver of the estimator's second phase, None where it has none. Raises ValueError for one that would do nothing."""
    name = type(estimator).__name__
    if not estimator.second_phase:
        if nudged is not None:
            raise ValueError(f"{name} has no nudged or adjoint phase, so nudged={nudged.kind} would do nothing; leave it out")
        return None
    steps = getattr(estimator, "steps", None)
    if nudged is not None and steps is not None:
        raise ValueError(f"{name} has steps={steps}, a horizon for where nudged is not given, and nudged={nudged.kind} "
                         "has its own; give one of the two")
    if nudged is not None and nudged.coarse is not None and not estimator.rounds:
        raise ValueError(f"{name} has a second phase of which nothing may be rounded, so the half precision of "
                         f"nudged={nudged.kind} would do nothing; use solvers.Anderson")
    chosen = nudged or solver
    if chosen is None:
        raise ValueError(f"{name} has a second phase; give nudged, the solver of it")
    chosen = chosen if steps is None else chosen.limited(steps)
    if chosen.max_steps < 1:
        raise ValueError(f"{name} has a second phase, which {chosen.kind} of no steps leaves where it starts; give nudged")
    return chosen


def refuse_misfits(model: Model, inputs: Tensor, targets: Tensor, estimator: Any, backend: Backend,
                   penalties: tuple = (), start: Tensor | LinearStart | None = None) -> None:
    """Raises ValueError or TypeError where model, batch, estimator, backend, penalties and start do not fit."""
    refuse_hooked_wrapper(model.block)
    if torch.is_inference_mode_enabled() or inputs.is_inference() or targets.is_inference():
        raise ValueError("autograd cannot record under torch.inference_mode, or from tensors made there: call gradient outside "
                         "of it, with torch.no_grad() or nothing around, on a clone of such tensors")
    refuse_rounding(next(model.parameters()))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("every parameter of the model is frozen; set requires_grad on those that are to be trained")
    if not len(inputs):
        raise ValueError("the batch is empty; a mean over no samples has no gradient")
    device = next(model.parameters()).device
    for name, value in (("inputs", inputs), ("targets", targets)):
        if value.device != device:
            raise ValueError(f"{name} are on {value.device} and the model is on {device}; move one of them")
    fitting = model.fitting(inputs)
    expected, found = (inputs.shape[:1], targets.shape[:1]) if fitting is None else (fitting, targets.shape)
    if tuple(found) != tuple(expected):
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit inputs of shape {tuple(inputs.shape)}; expected "
                         f"{tuple(expected)}")
    name, block = type(estimator).__name__, type(model.block).__name__
    if model.block.explicit and not estimator.explicit:
        raise TypeError(f"{name} needs an equilibrium block, got {block}; train blocks.Feedforward with Backprop")
    if estimator.explicit and not model.block.explicit:
        raise TypeError(f"{name} needs a feedforward block, got {block}; use BPTT(steps=...) to backpropagate through a "
                        "relaxation")
    if estimator.explicit and penalties:
        raise ValueError(f"{block} has no dynamics that {type(penalties[0]).__name__} could act on; leave penalties out")
    if start is not None and not estimator.equilibrium:
        raise ValueError(f"{name} begins at the block's own start state, so start={type(start).__name__} would do nothing; "
                         "leave it out")
    if backend == "compiled" and not estimator.compiled:
        raise ValueError(f"the compiled kernel computes nothing of {name}; use backend=\"torch\"")
    refuse_lost_graph(model, inputs)


class _Slopes(TorchFunctionMode):
    """Sees every torch.autograd.grad inside a force, and refuses those that fail without a graph around them, or of which the
    result has none to the state."""

    def __init__(self, block: str, state: Tensor):
        super().__init__()
        self.block, self.state = block, state

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.autograd.grad:
            return function(*args, **kwargs)
        taken = args[1] if len(args) > 1 else kwargs["inputs"]
        inner = torch._C._functorch.is_functorch_wrapped_tensor  # what torch.func.grad differentiates in
        apart = any(one.is_leaf and one is not self.state and not inner(one)
                    for one in ((taken,) if isinstance(taken, Tensor) else taken))
        if self.state.requires_grad and apart:
            raise self.error("takes a slope by torch.autograd.grad in a detached copy of the state")
        if self.state.requires_grad and not kwargs.get("create_graph", len(args) > 4 and args[4]):
            raise self.error("takes a slope by torch.autograd.grad without create_graph=True")
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            raise self.error(f"calls torch.autograd.grad, which fails in phases that keep no graph ({error})") from error

    def error(self, what: str) -> TypeError:
        return TypeError(f"the force of {self.block} {what}; J, its derivative in the state, is then not what it seems. Take "
                         "slopes by torch.func.grad, or give the energy alone: blocks.FromEnergy")


_SEEN: WeakSet[nn.Module] = WeakSet()  # blocks whose force was looked through


@torch.no_grad()
def refuse_lost_graph(model: Model, inputs: Tensor) -> None:
    """Raises TypeError where a block of the user's own computes its force such that autograd sees nothing of the state, or not
    all, and J^T a = -g would be solved for another J. Looks once at each block, on one sample."""
    block: Any = bare(model.block)
    if block in _SEEN or block.explicit or block.altered() is None:
        return
    x = model.clamp(inputs[:1])
    state = block.start(x).detach()
    looks = _Slopes(type(block).__name__, state)
    with looks:
        block(state, x)
    looks.state = state = state.clone().requires_grad_()
    with twice_differentiable(state.device), looks:
        force = block(state, x)
    if not force.requires_grad or torch.autograd.grad(force, state, torch.ones_like(force), allow_unused=True)[0] is None:
        raise looks.error("has no graph to the state: it is detached, or computed under torch.no_grad")
    _SEEN.add(block)


def first_state(start: Tensor | LinearStart | None, block: Any, x: Tensor, carried: dict[str, Tensor]) -> Tensor | None:
    """The state in which the free phase starts, None for the block's own. Raises ValueError where it does not fit the block."""
    if start is None:
        return None
    shape, name = block.start(x).shape, type(block).__name__
    if isinstance(start, LinearStart):
        if shape != x.shape:
            raise ValueError(f"LinearStart predicts states of the clamp's shape, {tuple(x.shape)}, and those of {name} have "
                             f"{tuple(shape)}; leave it out")
        return start.next(x, carried)
    if start.is_inference():
        raise ValueError("autograd cannot record from a state made under torch.inference_mode; give a clone of it")
    if start.shape != shape or start.dtype != x.dtype or start.device != x.device:
        raise ValueError(f"start is {start.dtype} {tuple(start.shape)} on {start.device}, and states of {name} are {x.dtype} "
                         f"{tuple(shape)} on {x.device}")
    return start.detach()
