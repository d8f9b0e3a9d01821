"""Files of tensors with a header of JSON, in the format of safetensors: weights, and checkpoints of a training run."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import write_atomically

Parts = dict[str, dict[str, Tensor]]


def write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes named tensors and a header of JSON values; tensors that share memory, as tied weights do, each whole."""
    held, apart = set[int](), dict[str, Tensor]()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if place in held else value
        held.add(place)
    # as one entry, because the format writes several in any order, and equal files are to be equal to the byte
    write_atomically(path, save({name: value.contiguous() for name, value in apart.items()},
                                metadata={"header": json.dumps(header)}))


def read(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header. Raises FileNotFoundError, ValueError for a file that is damaged."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118  (a file is not iterable)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and have it written again") from error


def by_part(tensors: dict[str, Tensor]) -> Parts:
    """Tensors named part.name, by part; a part that is not there is empty."""
    parts: Parts = defaultdict(dict)
    for key, value in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    return parts
