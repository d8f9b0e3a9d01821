"""What README shows runs as it stands there."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from eplib import kernels

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^    (python -m .+?)(?: +#.*)?$", README, re.MULTILINE)
# The experiment that README reads a recorded run of, at toy size.
PROFILE = """
profile: quick
runs:
  shakespeare:
    - common: {data: {kind: Text, corpus: plays, validation: 0.001}, estimator: {kind: DyadicEP},
               model: {width: 8, heads: 2, context: 8, block: {kind: Thick}}, batch: 4, steps: 2,
               solver: {kind: Relaxation, step: 0.8, max_steps: 8}, evaluate_every: 1, evaluation_batches: 1}
      arms: {ep: }
"""
BEFORE = """
import torch
from eplib.store import records
from pipelines import data
torch.set_num_threads(1)
data.prepare("plays", "chars", records.ROOT / "data")
records.Store("quick").runs("shakespeare")
torch.manual_seed(0)
"""
AFTER = {
    "report = eplib.gradient": """
from eplib.solvers import Status
assert report.free.status is Status.CONVERGED and report.nudged.status is Status.CONVERGED, report.nudged.residual
assert report.grads.keys() == dict(model.named_parameters()).keys()
assert report.loss > 0 and all(grad.isfinite().all() and grad.any() for grad in report.grads.values())
""",
    "report.assign(": """
assert all(torch.equal(parameter.grad, report.grads[name]) for name, parameter in model.named_parameters())
assert report.loss < 4.5, report.loss  # of log 256 = 5.5 without learning
before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
""",
    "loss, report = eplib.ep_loss": """
assert all(torch.allclose(parameter.grad - before[name], report.grads[name] / 4, atol=1e-6)
           for name, parameter in model.named_parameters())
""",
    "run.generate(": """
assert run.curve["loss"].shape == (2,) and run.metrics["final"]["loss"] > 0 and run.config.estimator.kind == "DyadicEP"
said = run.generate("The king", tokens=20)
assert said.startswith("The king") and len(said) == 28 and eplib.load("mine.safetensors").generate("The king", 20) == said
"""}


def clone(tmp_path: Path) -> Path:
    """A repository with the toy profile and nothing computed in it."""
    for package in ("eplib", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package,
                        ignore=shutil.ignore_patterns("__pycache__", "profiles", "*.partial"))
    (tmp_path / "pipelines" / "profiles").mkdir()
    (tmp_path / "pipelines" / "profiles" / "quick.yaml").write_text(PROFILE)
    shutil.copy(ROOT / "README.md", tmp_path)  # the text that it trains on
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "plays.txt.xz").symlink_to(ROOT / "data" / "plays.txt.xz")
    return tmp_path


def test_the_code_blocks_run_one_after_the_other_and_every_phase_converges(tmp_path):
    assert len(BLOCKS) == 5 and all(any(key in block for key in AFTER) for block in BLOCKS)
    if kernels.compiler():
        kernels.build()  # which the clone takes along
    script = BEFORE + "".join(block + "".join(check for key, check in AFTER.items() if key in block) for block in BLOCKS)
    script = script if kernels.compiler() else script.replace('backend="compiled"', 'backend="torch"')  # as README says
    done = subprocess.run([sys.executable, "-c", script], cwd=clone(tmp_path), capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


def test_the_commands_exist_and_know_their_options():
    goals = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    asked = set(re.findall(r"(?:^    |`)make ([a-z]+)", README, re.MULTILINE))
    assert {"repro", "test"} <= asked <= set(goals)
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        module, *words = command.split()[2:]
        usage = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        assert not [word for word in words if word.startswith("--") and f"{word} " not in usage.stdout], command


@pytest.mark.parametrize("package", ["blocks", "solvers", "estimators", "controllers", "optimisers", "spectra", "diagnostics"])
def test_the_table_of_parts_names_what_is_there(package):
    [row] = re.findall(rf"^\| `{package}` \| (.+) \|$", README, re.MULTILINE)
    module, parts = importlib.import_module(f"eplib.{package}"), importlib.import_module("eplib")
    for name in re.findall(r"`([A-Za-z]\w*(?:\.\w+)?)`", row):
        owner = module
        if "." in name:
            other, name = name.split(".")
            owner = getattr(parts, other)
        assert hasattr(owner, name), f"README names {name} of {package}"
