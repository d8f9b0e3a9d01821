"""Checkpoints: tensors by part and name in one safetensors file, with a header of JSON."""

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
    """Writes tensors, named part.name, and a header of JSON values."""
    write_atomically(path, save({name: value.contiguous() for name, value in tensors.items()},
                                metadata={name: json.dumps(value) for name, value in header.items()}))


def read(path: Path, device: torch.device | str = "cpu") -> tuple[Parts, dict[str, Any]]:
    """The tensors by part, and the header. Raises ValueError for a file that is damaged."""
    parts: Parts = defaultdict(dict)
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            for key in file.keys():  # noqa: SIM118  (the file itself is not iterable)
                part, _, name = key.partition(".")
                parts[part][name] = file.get_tensor(key)
            return parts, {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the run starts from its first step") from error
