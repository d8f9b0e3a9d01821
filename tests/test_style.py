"""ruff and mypy find nothing, in the versions that the lock names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def said(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_the_tools_are_the_locked_ones(tool):
    [locked] = re.findall(rf"^{tool}==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert said(tool, "--version").stdout.split()[1] == locked


def test_ruff_finds_nothing():
    done = said("ruff", "check", "--output-format", "concise")
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_finds_nothing():
    done = said("mypy")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_checkers_check_something(tmp_path):
    """Each finds the fault of its kind under this repository's settings."""
    (tmp_path / "faulty.py").write_text('import os\n\n\ndef half(count: int) -> int:\n    return str(count)\n')
    settings = ("--config", str(ROOT / "pyproject.toml"))
    assert "F401" in said("ruff", "check", *settings, str(tmp_path / "faulty.py")).stdout
    assert "[return-value]" in said("mypy", "--config-file", settings[1], str(tmp_path / "faulty.py")).stdout
