"""By which source, with which versions and on which machine a result was computed."""

import ast
import io
import platform
import re
import tokenize
from functools import cache
from hashlib import sha256
from pathlib import Path

import numpy
import torch

SOURCE = ("blocks", "calculus", "config", "controllers/__init__", "controllers/base", "controllers/contraction",
          "controllers/mode", "controllers/norms", "data", "diagnostics/__init__", "diagnostics/checking",
          "diagnostics/gdu", "diagnostics/gradients", "estimators/__init__", "estimators/baselines", "estimators/calls",
          "estimators/entry", "estimators/horizons", "estimators/loss", "estimators/nudged", "estimators/propagation",
          "evaluation", "families", "files", "intact", "kernels/__init__", "log", "models/__init__", "models/base",
          "runconfig", "solvers", "spectra", "starts", "tasks/__init__", "tasks/base", "training", "updates")
KERNEL = Path(__file__).parent / "kernels" / "thick.cpp"


def without_comments(path: Path) -> str:
    """Source text of a module without comments, docstrings and blank lines: what its results depend on."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) \
                and isinstance(body[0].value.value, str):
            first, last = body[0].lineno - 1, (body[0].end_lineno or body[0].lineno) - 1
            if not (lines[first].encode()[:body[0].col_offset] + lines[last].encode()[body[0].end_col_offset:]).strip():
                lines[first:last + 1] = [""] * (last + 1 - first)  # but a line that holds code as well stays
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1][column:column + 1] == "#":
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache  # a process computes with the source it has loaded, and a store asks for every run
def source_digest() -> str:
    """Digest of the library source that a run's numbers depend on; comments and docstrings do not count."""
    folder = Path(__file__).parent
    text = "\n".join(without_comments(folder / f"{name}.py") for name in SOURCE)
    return sha256((text + KERNEL.read_text(encoding="utf-8")).encode()).hexdigest()[:12]


def machine() -> dict:
    """Processor, threads and versions of the machine at hand."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        processor = found.group(1) if found else processor
    return {"processor": processor, "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None} | versions()


def versions() -> dict:
    """Of what computes."""
    return {"python": platform.python_version(), "torch": torch.__version__.split("+")[0], "numpy": numpy.__version__}
