"""The log of a run: columns that give back the rows they were given, in memory that stays small and files that load again."""

import json
import math

import pytest
import torch
from safetensors import safe_open

import systems  # noqa: F401  (one thread)
from eplib.log import Log, Progress
from test_training import Trainer, config, corpus, root  # noqa: F401  (corpus and root are fixtures)


def test_a_log_gives_back_every_row_with_every_column():
    log = Log()
    rows = [{"step": 1, "loss": 0.1, "status": "converged"}, {"step": 2, "loss": 2, "status": "max_steps", "probe": 0.3},
            {"step": 3, "loss": math.nan, "status": "converged", "count": 7}]
    for row in rows:
        log.append(row)
    assert len(log) == 3 and list(log[0]) == ["step", "loss", "status", "probe", "count"]
    for row, found in zip(rows, log, strict=True):
        assert [str(found[name]) for name in row] == [str(float(v) if k == "loss" else v) for k, v in row.items()]
        assert all(math.isnan(value) for name, value in found.items() if name not in row)
    assert isinstance(log[-1]["step"], int) and isinstance(log[2]["count"], int) and isinstance(log[1]["loss"], float)
    assert log.column("step").tolist() == [1, 2, 3] and all(map(math.isnan, log.column("absent")))
    with pytest.raises(IndexError, match="row 3 of a log of 3"):
        log[3]
    again = Log.restored(log.tensors(), json.loads(json.dumps(log.header())))
    assert [str(row) for row in again] == [str(row) for row in log]
    for each in (log, again):
        each.append({"step": 4, "status": "diverged"})
    assert str(again[3]) == str(log[3]) and again[3]["status"] == "diverged"


def test_a_checkpoint_of_150000_steps_is_loaded_again(root, tmp_path):  # noqa: F811
    """What grows with the steps is in tensors: the file's header, which has a limit of its own, does not know their number."""
    trainer = Trainer(config(steps=200_000), tmp_path, root / "data")
    trainer._step()
    row = trainer.progress.rows[0]
    progress, lengths = Progress(step=1_000), []
    for step in range(1_000):
        progress.rows.append(row | {"step": step + 1, "loss": 1 / (step + 1)})
        progress.seconds.append(0.25)
    for times in (1, 150):
        progress.step, progress.rows.length, progress.seconds = 1_000 * times, 1_000 * times, progress.seconds * times
        progress.rows.columns = {name: column * times for name, column in progress.rows.columns.items()}
        trainer.progress = progress
        trainer._save()
        with safe_open(trainer.checkpoint, "pt") as file:
            lengths.append(sum(map(len, file.metadata().values())))
    assert lengths[1] < lengths[0] + 100
    loaded = Trainer(trainer.config, tmp_path, root / "data").progress
    assert loaded.step == 150_000 == len(loaded.rows) == len(loaded.seconds) and loaded.sessions == 1
    for index in (0, 77_777, -1):
        assert str(loaded.rows[index]) == str(progress.rows[index])
    assert torch.equal(loaded.tensors()["rows.loss"], progress.tensors()["rows.loss"])
