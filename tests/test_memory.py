"""The memory of a training run does not grow with its steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import eplib.data
from test_training import corpus, root  # noqa: F401  (fixtures)

GROWTH = 4 * 2**20  # bytes of resident memory from step 500 to step 2,000: allocators settle, and a row of the log has 0.4 kB
SCRIPT = """
import gc, sys
from pathlib import Path
import eplib.data
eplib.data.CORPORA["tinystories"] = eplib.data.{file!r}
import torch
from eplib import blocks, estimators, solvers
from eplib.controllers import ContractionRate
from eplib.training import Transformer, Optimiser, RunConfig, Text, Trainer

torch.set_num_threads(1)
config = RunConfig(
    experiment="tiny", arm="ep", data=Text(corpus="tinystories", validation=0.02), batch=2, steps=10_000, evaluate_every=10_000,
    model=Transformer(width=16, heads=2, context=8, block=blocks.Thick()), estimator=estimators.DyadicEP(),
    solver=solvers.Relaxation(step=0.8, max_steps=4, tol=1e-3), penalties=(ContractionRate(every=4),),
    optimiser=Optimiser(ema=0.9))
trainer = Trainer(config, Path(sys.argv[1]), Path(sys.argv[2]), backend=sys.argv[3])

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

gc.collect()
gc.disable()  # what only the search for cycles would free counts as grown: it comes when it likes, and states are large
for step in range(2_000):
    trainer._step()
    if step == 499:
        before = resident()
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what is resident")
@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_resident_memory_is_flat_over_2000_steps(backend, root, tmp_path, request):  # noqa: F811
    if backend == "compiled":
        request.getfixturevalue("compiled_kernel")
    script = tmp_path / "flat.py"
    script.write_text(SCRIPT.format(file=eplib.data.CORPORA["tinystories"]))
    done = subprocess.run([sys.executable, script, tmp_path / "run", root / "data", backend], capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": str(Path(eplib.data.__file__).parent.parent)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < GROWTH
