"""What `gradient` refuses before it computes anything: what would fail later in somebody else's words, and options that would
do nothing."""

from typing import Any

import torch
from torch import Tensor

from .intact import refuse_hooked_wrapper
from .models import Backend, Classifier, EquilibriumModel, LanguageModel
from .solvers import Solver, refuse_rounding
from .starts import LinearStart


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


def check(model: EquilibriumModel, inputs: Tensor, targets: Tensor, estimator: Any, backend: Backend,
          penalties: tuple = ()) -> None:
    """Raises ValueError or TypeError where model, batch, estimator, backend and penalties do not fit."""
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
    expected = inputs.shape if isinstance(model, LanguageModel) else inputs.shape[:1]
    fitting = targets.shape if isinstance(model, LanguageModel | Classifier) else targets.shape[:1]
    if fitting != expected:
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
    if backend == "compiled" and not estimator.compiled:
        raise ValueError(f"the compiled kernel computes nothing of {name}; use backend=\"torch\"")


def refuse_start(estimator: Any, start: Tensor | LinearStart | None) -> None:
    """Raises ValueError for a start given to an estimator whose steps begin at the block's own."""
    if start is not None:
        raise ValueError(f"{type(estimator).__name__} begins at the block's own start state, so start={type(start).__name__} "
                         "would do nothing; leave it out")


def first_state(start: Tensor | LinearStart | None, block: Any, x: Tensor, carried: dict[str, Tensor]) -> Tensor | None:
    """The state in which the free phase starts, None for the block's own. Raises ValueError where it does not fit the block."""
    if start is None:
        return None
    shape, name = block.start(x).shape, type(block).__name__
    if isinstance(start, LinearStart):
        if shape != x.shape:
            raise ValueError(f"LinearStart predicts states of the clamp's shape, {tuple(x.shape)}, and those of {name} have "
                             f"{tuple(shape)}; leave it out")
        return start(x, carried)
    if start.is_inference():
        raise ValueError("autograd cannot record from a state made under torch.inference_mode; give a clone of it")
    if start.shape != shape or start.dtype != x.dtype or start.device != x.device:
        raise ValueError(f"start is {start.dtype} {tuple(start.shape)} on {start.device}, and states of {name} are {x.dtype} "
                         f"{tuple(shape)} on {x.device}")
    return start.detach()
