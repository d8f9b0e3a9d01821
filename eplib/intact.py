"""Whether a block is exactly what its derivative by hand, and the compiled kernel, were written for.

Both compute from the weights, not through the modules: a hook, a parametrisation, an adapter, another activation or a force of
the user's own would be passed over in silence.
"""

from functools import cache
from numbers import Real
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from .calculus import EPS, Gated, Memory, Sublayers

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
FORCE = ("__call__", "forward", "_inputs", "state_decay")  # the methods of a block that make its force
WEIGHTS: dict[type, set[str]] = {nn.Linear: {"weight"}, nn.LayerNorm: {"weight", "bias"}, Gated: {"weight", "gate"},
                                     Memory: {"weight"}, Sublayers: set()}
OUTPUT = nn.Linear, Gated  # either
INSIDE: dict[type, dict[str, Any]] = {
    Sublayers: {"ln1": nn.LayerNorm, "ln2": nn.LayerNorm, "qkv": nn.Linear, "wo": OUTPUT, "w1": nn.Linear, "w2": OUTPUT}}


def alteration(block: nn.Module, written: type, parts: dict[str, type]) -> str | None:
    """How the force of a block may be another than that of the class `written`, made of its `parts` {path: class}; None if it
    is not.

    A subclass that inherits the force is no alteration, nor is anything that only leads to the clamp, the start state or the
    read-out.
    """
    for name in FORCE:
        if getattr(type(block), name, None) is not getattr(written, name, None):
            return f"{type(block).__name__} has its own {name}"
        if name in vars(block):
            return f"its {name} is replaced"
    if _has_any_global_hook():
        return "hooks are registered for all modules"
    if not isinstance(getattr(block, "damping", 0.0), Real):
        return f"its damping is a {type(block.damping).__name__}, not a number"
    if getattr(block, "log_damping", None) is not block._parameters.get("log_damping"):
        return "its log_damping is replaced"
    if _hooked(block):
        return "it has hooks"
    return next(filter(None, (_of_part(block, path, kind) for path, kind in parts.items())), None)


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


@cache
def _methods(kind: type) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


def _of_part(block: nn.Module, path: str, kind: Any) -> str | None:
    """How the module at the path is not a `kind`, or one of several, as its constructor made it, weights aside."""
    *above, name = path.split(".")
    part: Any = getattr(block.get_submodule(".".join(above)), name, None)
    made, kinds = type(part), kind if isinstance(kind, tuple) else (kind,)
    if made not in kinds:
        return f"{path} is a {made.__name__}, not a {kinds[0].__name__}"
    kind = made
    if _hooked(part):
        return f"{path} has hooks"
    for name in vars(part).keys() & _methods(kind):
        return f"{path}.{name} is replaced"
    weights = {name: value for name, value in part._parameters.items() if value is not None}
    if weights.keys() != WEIGHTS[kind]:
        return f"{path} holds {', '.join(weights) or 'no parameters'} instead of {' and '.join(sorted(WEIGHTS[kind]))}"
    for name, value in weights.items():
        if type(value) is not nn.Parameter or value._backward_hooks:
            return f"{path}.{name} is {'hooked' if value._backward_hooks else f'a {type(value).__name__}'}"
    if kind is nn.LayerNorm and (part.eps != EPS or len(part.normalized_shape) > 1):
        return f"{path} has eps {part.eps} over {part.normalized_shape}, not {EPS} over the last dimension"
    if kind is Sublayers and part.linear and part.qk_norm:
        return f"{path} has linear attention with qk_norm"
    return next(filter(None, (_of_part(block, f"{path}.{name}", inner) for name, inner in INSIDE.get(kind, {}).items())), None)


def bare(block: Any) -> Any:
    """The block that torch.compile wraps, or the block itself."""
    while isinstance(block, nn.Module) and "_orig_mod" in block._modules:
        block = block._orig_mod
    return block


def refuse_hooked_wrapper(block: Any) -> None:
    """Raises TypeError where torch.compile's wrapper of the block has hooks: the block's derivative and its way through tokens
    see nothing of them."""
    if isinstance(block, nn.Module) and block is not bare(block) and _hooked(block):
        raise TypeError(f"torch.compile's wrapper of {type(bare(block)).__name__} has hooks, with which it computes another "
                        "force than the block; register hooks on the block, then compile it")


def compiled(block: nn.Module) -> bool:
    """Whether torch.compile computes it, or a part of it."""
    return any("_orig_mod" in part._modules or part._compiled_call_impl for part in block.modules())
