"""The log of a run: columns that give back the rows they were given, in memory that stays small and files that load again."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open

import systems  # noqa: F401  (one thread)
from eplib.log import Log, Progress
from eplib.store import summary
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


def test_windows_of_a_log_keep_its_counts_its_largest_values_and_its_sparse_measurements():
    """1,001 steps in windows of two, against sums over the rows by hand; the last window is of one step."""
    values = np.random.default_rng(0).normal(size=1001)
    rows, log = [], Log()
    for step, value in enumerate(values.tolist()):
        rows.append({"step": step + 1, "loss": math.nan if step in (0, 1, 4) else value, "residual_max": abs(value),
                     "gated": step % 3, "status": "converged" if step % 5 else "diverged"}
                    | ({"audit": value} if step % 10 == 9 else {}))
        log.append(rows[-1])
    found = summary.windows(log)
    assert len(found) == 501 and [row["step"] for row in found] == [*range(2, 1001, 2), 1001]
    assert sum(row["gated"] for row in found) == sum(row["gated"] for row in rows)
    assert sum(row["status_diverged"] for row in found) == 201 and sum(row["status_converged"] for row in found) == 800
    for place in (0, 2, 7, 250, 500):
        own = rows[2 * place: 2 * place + 2]
        losses = [row["loss"] for row in own if math.isfinite(row["loss"])]
        assert found[place]["residual_max"] == max(row["residual_max"] for row in own)
        assert found[place]["loss"] == pytest.approx(np.mean(losses) if losses else math.nan, nan_ok=True)
    audits = [row["audit"] for row in found if math.isfinite(row["audit"])]
    assert audits == [row["audit"] for row in rows if "audit" in row]
    assert summary.windows(Log()) == []


def test_a_log_of_few_steps_is_recorded_row_by_row():
    log = Log()
    for step in range(749):
        log.append({"step": step + 1, "loss": 1 / (step + 1), "iterations_max": step, "penalty": math.nan})
    found = summary.windows(log)
    assert [(row["step"], row["loss"], row["iterations_max"]) for row in found] == [(n + 1, 1 / (n + 1), n) for n in range(749)]
    assert all(math.isnan(row["penalty"]) for row in found)


def test_what_tables_say_of_training_is_taken_from_every_step():
    steps = 8
    columns = {"loss": np.array([9, 9, 9, 9, 1, 2, math.inf, 3.0]), "displacement": np.array([math.nan, *range(7)]),
               "penalty": np.array([1, 1, 1, 1, 0, 0.5, math.nan, 0.5]), "task_gradient": np.array([0, 0, 0, 0, 1, 0, 1, 1]),
               "rate_probe": np.array([9, 9, 9, 9, math.nan, 0.4, 0.6, math.nan]), "free_residual_max": np.arange(8.0),
               "gradient_norm": np.array([9, 9, 9, 9, 1, 10, 2, 20.0]), "status": np.array(["converged"] * steps)}
    found = summary.over_training(columns, config(steps=steps, evaluate_every=2, keep=()))
    assert found["loss"] == 3 and found["displacement"] == 3
    assert found["second_half"] == {"loss": 2, "without_gradient": 0.25, "penalised": 0.5, "rate_probe": 0.5,
                                    "free_residual_max": 5.5, "gradient_norm_penalised": 15, "gradient_norm_others": 1.5}
