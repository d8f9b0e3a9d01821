"""The files that describe the environment agree, and importing the package stays cheap."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pipelines import kernel
from pipelines.common import PipelineError

ROOT = Path(__file__).parent.parent
ASKED_FOR = ["torch", "jupyterlab", "papermill", "nbconvert", "matplotlib", "seaborn", "tokenizers", "dvc", "pooch", "typst",
             "pydantic", "safetensors", "tqdm", "pyyaml", "numpy", "scipy", "pytest", "hypothesis", "ipykernel", "setuptools"]


def pins(lines: list[str]) -> dict[str, str]:
    """Return {canonical name: version} of `name==version` lines; anything else is a failure."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"not a plain pin: {line!r}"
        name = canonicalize_name(match[1])
        assert name not in found, f"{name} is pinned twice"
        found[name] = match[2]
    return found


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return pins([line for line in lines if line.strip() and not line.startswith("#")])


def test_lock_holds_what_is_asked_for_and_no_gpu_build(lock):
    assert not [name for name in ASKED_FOR if name not in lock]
    assert lock["torch"] == "2.13.0"
    assert not [name for name in lock if name.startswith(("nvidia", "cuda", "triton"))]


@pytest.mark.parametrize("name", ["requirements.lock", "environment.yml"])
def test_no_local_builds_hashes_or_addresses(name):
    text = (ROOT / name).read_text()
    for unwanted in ("+cpu", "--hash", "sha256:", "://", "--index-url", "--find-links", "file:"):
        assert unwanted not in text, f"{name} holds {unwanted!r}"


def test_environment_yml_has_the_same_pins(lock):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "python=3.11" in conda and "pip" in conda
    assert pip[0] == "-e ."
    assert pins(pip[1:]) == lock


def test_pyproject_admits_the_pins(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    for requirement in map(Requirement, wanted):
        pinned = lock[canonicalize_name(requirement.name)]
        assert Version(pinned) in requirement.specifier, f"the lock has {pinned}, outside {requirement}"
    python = Requirement(f"python{project['requires-python']}").specifier
    assert [minor for minor in range(9, 16) if python.contains(f"3.{minor}.0")] == [11, 12, 13]


def test_installed_versions_are_the_locked_ones(lock):
    from importlib import metadata

    different = {}
    for name in ASKED_FOR:
        installed = metadata.version(name).split("+")[0]
        if installed != lock[name]:
            different[name] = (installed, lock[name])
    assert not different, f"installed, locked: {different}; `make setup` installs the locked versions"


def test_the_files_that_describe_the_software_agree():
    """CITATION.cff says it; pyproject.toml, codemeta.json and .zenodo.json repeat it."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    codemeta, zenodo = (json.loads((ROOT / name).read_text()) for name in ("codemeta.json", ".zenodo.json"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["title"] == codemeta["name"] == zenodo["title"]
    assert cited["abstract"] == codemeta["description"] == zenodo["description"] == project["description"]
    assert cited["version"] == codemeta["version"] == zenodo["version"] == project["version"]
    assert cited["license"] == codemeta["license"].rpartition("/")[2] == zenodo["license"] == project["license"]
    assert cited["keywords"] == codemeta["keywords"] == zenodo["keywords"]
    authors = [author["name"] for author in cited["authors"]]
    assert authors == [one["name"] for one in codemeta["author"]] == [one["name"] for one in zenodo["creators"]]
    assert codemeta["runtimePlatform"] == f"Python {project['requires-python']}"
    assert all((ROOT / codemeta[key]).is_file() for key in ("softwareRequirements", "buildInstructions", "readme"))


def test_the_container_file_sets_up_what_is_here():
    text = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert [name for name, _ in steps] == ["FROM", "RUN", "WORKDIR", "COPY", "ARG", "RUN", "CMD"]
    image = re.fullmatch(r"python:(3\.\d+)-slim", steps[0][1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert image and Requirement(f"python{project['requires-python']}").specifier.contains(f"{image[1]}.0")
    assert {"g++", "git", "make"} <= set(steps[1][1].split())
    goals = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in (steps[5][1].split(), json.loads(steps[6][1])):
        assert command[0] == "make" and set(command[1:]) <= set(goals), command
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "checkpoints", "data/raw", "eplib/kernels/build"} <= set(left_out)
    tracked = subprocess.run(["git", "ls-files", "--", *(name for name in left_out if "*" not in name)], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout
    assert not tracked, f"the image would lack {tracked}"


def test_import_is_cheap():
    code = "import eplib, sys; print([m for m in ('torch', 'matplotlib', 'pandas', 'dvc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_make_help_is_the_default_and_lists_the_commands():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for command in ("setup", "repro", "verify", "test", "lab", "smoke", "paper", "figures", "clean"):
        assert f"make {command} " in done.stdout


@pytest.mark.slow
def test_a_kernel_that_cannot_be_built_fails_its_tests_and_is_skipped_only_without_a_compiler(tmp_path):
    for path in [*ROOT.glob("eplib/**/*.py"), *ROOT.glob("eplib/kernels/*.cpp"),
                 *(ROOT / f"pipelines/{name}.py" for name in ("__init__", "data", "fetching")),
                 *(ROOT / f"tests/{name}.py" for name in ("conftest", "systems", "test_kernels"))]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    tests = ["pytest", "-q", "-p", "no:cacheprovider", "tests/test_kernels.py", "-k", "refuses"]

    def run(*module: str, compiler: str) -> tuple[int, str]:
        done = subprocess.run([sys.executable, "-m", *module], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"CXX": compiler, "PYTHONPATH": str(tmp_path)})
        return done.returncode, done.stdout + done.stderr

    code, said = run("eplib.kernels", compiler="false")
    assert code == 1 and "false could not compile thick.cpp" in said and "Traceback" not in said
    code, said = run(*tests, compiler="false")
    assert code == 1 and "1 error" in said and "could not compile thick.cpp" in said
    code, said = run("eplib.kernels", compiler="absent")
    assert code == 1 and "no C++ compiler found" in said
    code, said = run(*tests, compiler="absent")
    assert code == 0 and "1 skipped" in said


def test_a_checkout_that_converts_line_endings_has_the_same_bytes(tmp_path):
    """As on Windows with core.autocrlf: the embedded corpus keeps its checksum, and DVC sees no change."""
    git = ["git", "-C", str(tmp_path / "clone")]
    subprocess.run(["git", "clone", "--quiet", "--shared", "--no-checkout", "-c", "core.autocrlf=true", str(ROOT),
                    str(tmp_path / "clone")], check=True)
    files = [".gitattributes", "data/plays.txt.xz", "dvc.yaml", "pipelines/profiles/quick.yaml", "paper/main.typ"]
    subprocess.run([*git, "checkout", "--quiet", "HEAD", "--", *files], check=True)
    for name in files:
        kept = subprocess.run([*git, "cat-file", "blob", f"HEAD:{name}"], capture_output=True, check=True).stdout
        assert (tmp_path / "clone" / name).read_bytes() == kept, name


@pytest.fixture
def toy(tmp_path):
    """A folder with the Makefile, a finished set-up that does nothing, and a `dvc` that takes its time."""
    folder = tmp_path / "a folder with spaces"
    for name in ("Makefile", "requirements.lock", "pyproject.toml", ".dvc/config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name, does in (("python", "true"), ("dvc", "touch began; while [ ! -e go ]; do sleep 0.05; done; pwd > ended")):
        (folder / ".venv" / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / ".venv" / "bin" / name).chmod(0o755)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)


def stamp(folder: Path) -> Path:
    return folder / re.search(r"touch (\.venv/\.setup-[0-9a-f]+)", make(folder, "-n", "setup").stdout)[1]


def test_what_the_tools_keep_between_calls_lies_in_the_folder(toy, monkeypatch):
    """Their usual places may be read-only, or another user's."""
    for name in ("DVC_SITE_CACHE_DIR", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    stamp(toy).touch()
    (toy / ".venv" / "bin" / "dvc").write_text('#!/bin/sh\nprintf "%s\\n" "$DVC_SITE_CACHE_DIR" "$MPLCONFIGDIR"\n')
    done = make(toy, "repro")
    assert done.returncode == 0 and f"{toy}/.dvc/site\n{toy}/.venv/matplotlib\n" in done.stdout, done


@pytest.mark.skipif(not shutil.which("flock"), reason="nothing is guarded without flock")
def test_a_second_make_repro_is_told_that_one_is_at_work(toy):
    stamp(toy).touch()
    first = subprocess.Popen(["make", "repro"], cwd=toy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 60
    while not (toy / "began").exists():
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < until, "make repro has not reached dvc"
        time.sleep(0.02)
    for command in ("repro", "paper", "figures"):
        second = make(toy, command)
        assert second.returncode and "Another make repro, paper or figures is at work in this folder" in second.stderr
    (toy / "go").touch()
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 0, said
    assert (toy / "ended").read_text().strip() == str(toy) and make(toy, "repro").returncode == 0


@pytest.mark.skipif(not shutil.which("flock"), reason="nothing is guarded without flock")
def test_a_second_set_up_waits_for_the_first_and_does_not_install_again(toy):
    with (toy / "Makefile").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command = ["make", "--no-print-directory", "setup", "PYTHON=absent"]  # under `make test` it names the folder first
        waiting = subprocess.Popen(command, cwd=toy, stdout=subprocess.PIPE, text=True)
        assert "another make is setting up .venv; waiting for it" in waiting.stdout.readline()
        stamp(toy).touch()  # the first is done
    assert "== set-up done" in waiting.communicate(timeout=60)[0] and waiting.returncode == 0


def test_notebooks_run_where_the_home_is_read_only_and_the_temporary_folder_deep(tmp_path, monkeypatch):
    """The kernel's sockets need a short path; deeper than that they are put elsewhere."""
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, "/proc")
    monkeypatch.setenv("TMPDIR", str(deep))
    cell = {"cell_type": "code", "source": "import os; print(os.environ['TMPDIR'])"}
    executed, failure = kernel.execute({"notebook": "toy", "cells": [cell]}, {}, tmp_path)
    assert failure is None and executed["cells"][-1]["outputs"][0]["text"] == [f"{deep}\n"]
    assert list(deep.iterdir()) == []
    monkeypatch.setattr(kernel, "SOCKET_PATH", 10)
    with pytest.raises(PipelineError, match=r"no temporary folder for .* sockets.*set TMPDIR to a short path"):
        kernel.short_folder()


def test_an_executed_notebook_names_files_from_the_root_on():
    """A warning that it shows does not depend on where the repository lies."""
    said = {"output_type": "stream", "name": "stderr", "text": f"{ROOT}/eplib/runs.py:1: UserWarning: x\n"}
    cell = {"cell_type": "code", "metadata": {}, "source": [], "outputs": [said]}
    assert '"eplib/runs.py:1: UserWarning: x\\n"' in kernel.settle({"cells": [cell]})


def test_interrupted_setup_does_not_count_as_done(tmp_path):
    """A killed install leaves no stamp, so make starts it again; a finished one is not repeated."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)

    def needs_install() -> bool:
        return subprocess.run(["make", "-q", "setup"], cwd=tmp_path, capture_output=True).returncode != 0

    assert needs_install()
    stamp = subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    name = re.search(r"touch (\.venv/\.setup-[0-9a-f]+)", stamp)[1]
    (tmp_path / name).touch()
    assert not needs_install()
    with (tmp_path / "requirements.lock").open("a") as handle:
        handle.write("# changed\n")
    assert needs_install()
