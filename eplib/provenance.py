"""With which versions and on which machine a result was computed; by which source, says `sources`."""

import platform
import re
from pathlib import Path

import numpy
import torch


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
