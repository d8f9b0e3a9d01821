"""What another processor changes: one gradient and a short training under other vector instructions.

`python tests/test_numerics.py 50 > a.json` in each of two environments and `python tests/test_numerics.py a.json b.json` make
the table of CONTRIBUTING.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import eplib
from eplib import blocks, controllers, estimators, models, solvers

OTHER = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}  # PyTorch and MKL without vector instructions
SOLVE = {"solver": solvers.Anderson(step=0.7, max_steps=100, tol=1e-5), "estimator": estimators.DyadicEP(),
         "nudged": solvers.Anderson(step=0.7, max_steps=100, tol=1e-4), "backend": "torch"}
Rows = dict[str, list[float]]


def flat(tensors: Iterable[torch.Tensor]) -> list[float]:
    return torch.cat([tensor.detach().flatten() for tensor in tensors]).tolist()


def system(dtype: torch.dtype) -> tuple[models.LanguageModel, torch.Tensor]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # weights are drawn in it
    try:
        torch.manual_seed(0)
        model = models.LanguageModel(vocab=32, width=32, heads=4, context=32, block=blocks.Thick(init=0.5))
    finally:
        torch.set_default_dtype(before)
    return model, torch.randint(32, (8, 33)).cumsum(1) % 32


def one_gradient(dtype: torch.dtype) -> Rows:
    model, ids = system(dtype)
    drawn = flat(model.parameters())
    report = eplib.gradient(model, ids[:, :-1], ids[:, 1:], **SOLVE)
    return {"weights drawn": drawn, "loss": [report.loss], "gradient": flat(report.grads.values()),
            "residual": report.free.residual.tolist(), "iterations": report.free.steps.tolist()}


def training(dtype: torch.dtype, steps: int) -> Rows:
    model, ids = system(dtype)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    log: Rows = {"loss": [], "residual": [], "iterations": []}
    state = None
    for step in range(steps):
        rows = ids.roll(step, 0)[:4]
        report = eplib.gradient(model, rows[:, :-1], rows[:, 1:], state=state,
                                penalties=(controllers.ContractionRate(target=0.6),), **SOLVE)
        state = report.state
        for name, parameter in model.named_parameters():
            parameter.grad = report.grads[name] + report.penalty_grads.get(name, 0)
        optimiser.step()
        log["loss"].append(report.loss)
        log["residual"].append(report.free.residual.max().item())
        log["iterations"].append(report.free.steps.double().mean().item())
    return log | {"weights": flat(model.parameters())}


def measured(steps: int) -> dict[str, Rows]:
    return {f"{what}, {str(dtype)[6:]}": rows for dtype in (torch.float32, torch.float64)
            for what, rows in (("gradient", one_gradient(dtype)), (f"{steps} steps", training(dtype, steps)))}


def differences(ours: dict[str, Rows], theirs: dict[str, Rows]) -> dict[str, dict[str, float]]:
    """||a - b|| / ||b|| of every row."""
    def apart(a: list[float], b: list[float]) -> float:
        a, b = (torch.tensor(part, dtype=torch.float64) for part in (a, b))
        return ((a - b).norm() / b.norm()).item()

    return {what: {name: apart(ours[what][name], row) for name, row in rows.items()} for what, rows in theirs.items()}


def test_another_processor_changes_no_more_than_contributing_says():
    """A hundred and more times what was measured, so that the processor at hand does not decide."""
    told = subprocess.run([sys.executable, __file__, "3"], env=os.environ | OTHER, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    found = differences(measured(3), json.loads(told.stdout))
    assert found["gradient, float64"]["weights drawn"] == 0
    assert found["gradient, float64"]["gradient"] < 1e-13 and found["gradient, float64"]["residual"] < 1e-9
    assert found["3 steps, float64"]["weights"] < 1e-8
    assert found["gradient, float32"]["loss"] < 1e-5 and found["gradient, float32"]["gradient"] < 1e-4
    assert found["3 steps, float32"]["loss"] < 1e-3


@pytest.mark.parametrize("scale", [1 + 1e-6, -1.0])
def test_a_change_of_the_gradient_is_seen(scale):
    ours = {"gradient": {"gradient": [1.0, -2.0, 3.0]}}
    theirs = {"gradient": {"gradient": [scale * value for value in ours["gradient"]["gradient"]]}}
    assert differences(ours, theirs)["gradient"]["gradient"] == pytest.approx(abs(1 - scale), rel=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if sys.argv[1].isdigit():
        json.dump(measured(int(sys.argv[1])), sys.stdout)
    else:
        one, other = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
        print("\n".join(f"{what}: {name} {value:.0e}" for what, rows in differences(one, other).items()
                        for name, value in rows.items()))
