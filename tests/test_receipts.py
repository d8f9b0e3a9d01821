"""What a run leaves behind and how it is checked: the state of git, reference values, receipts, times, the page ARTIFACT.md."""

import subprocess
from pathlib import Path

import pytest
import yaml

from pipelines import close, common

ROOT = common.ROOT


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t")
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


# --- what git shows after a run ---

LOCK = {"schema": "2.0", "stages": {
    "train": {"cmd": "train", "deps": [{"path": "results/quick/sources/stages/train.json", "md5": "a"}],
              "outs": [{"path": "results/quick/runs/mnist", "md5": "b"}]},
    "notebook-mnist": {"cmd": "run", "deps": [{"path": "results/quick/sources/mnist.json", "md5": "c"},
                                              {"path": "results/quick/runs/mnist", "md5": "b"}],
                       "outs": [{"path": "results/quick/mnist", "md5": "d"}]}}}


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with one lock file."""
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(LOCK))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "dvc.lock")
    git(tmp_path, "commit", "--quiet", "-m", "a lock")
    return tmp_path


def after(checkout: Path, **md5: str) -> str:
    """What is said where outputs and inputs of these paths have other digests."""
    text = (checkout / "dvc.lock").read_text()
    for old, new in md5.items():
        text = text.replace(f"md5: {old}", f"md5: {new}")
    (checkout / "dvc.lock").write_text(text)
    return "\n".join(close.git_lines("quick", checkout))


def test_a_run_that_changes_nothing_says_so(checkout, tmp_path_factory):
    assert close.git_lines("quick", checkout) == ["git      nothing has changed"]
    assert close.git_lines("quick", tmp_path_factory.mktemp("no-checkout")) == []


def test_a_changed_lock_is_explained_stage_by_stage(checkout):
    said = after(checkout, b="z")
    assert f"{close.BYTES}: train\n" in said and f"{close.UPSTREAM}: notebook-mnist\n" in said and close.CODE not in said
    said = after(checkout, a="y")
    assert f"{close.CODE}: train\n" in said and f"{close.UPSTREAM}: notebook-mnist\n" in said and close.BYTES not in said
    (checkout / "mine.py").touch()
    assert "changed: dvc.lock, mine.py" in after(checkout)
