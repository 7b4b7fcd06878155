"""Every package that an installation can bring is pinned once, and `.ci/pins` writes the pins."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LOCK = """version = 1
[[package]]
name = "jaxlora"
version = "0.1.0"
source = { editable = "." }
[[package]]
name = "numpy"
version = "2.5.5"
source = { registry = "https://index.example/simple" }
[[package]]
name = "jax"
version = "0.11.2"
source = { registry = "https://index.example/simple" }
"""
PROJECT = """[tool.uv]
default-groups = ["test"]
# A comment that stays.
constraint-dependencies = [
{}]

[tool.ruff]
line-length = 120
"""


def pins(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / ".ci/pins"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)


@pytest.fixture
def project(tmp_path):
    """Makes a folder with the command, LOCK, and these pins."""

    def make(*wanted: str) -> Path:
        (tmp_path / ".ci").mkdir()
        shutil.copy(ROOT / ".ci/pins", tmp_path / ".ci/pins")
        (tmp_path / "uv.lock").write_text(LOCK)
        (tmp_path / "pyproject.toml").write_text(PROJECT.format("".join(f'    "{pin}",\n' for pin in wanted)))
        return tmp_path

    return make


@pytest.mark.fault("S3")
def test_the_pins_are_those_of_the_lock():
    if not (ROOT / "uv.lock").exists():
        pytest.skip("uv.lock is written by `uv sync`")
    result = pins(ROOT, "--check")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (["jax==0.11.2", "numpy==2.5.5"], ""),
        (["jax==0.11.2"], "numpy==2.5.5 is not pinned"),
        (["jax==0.11.2", "numpy==2.5.4"], "numpy==2.5.4 is pinned, but 2.5.5 is locked"),
        (["jax==0.11.2", "numpy==2.5.5", "numpy==2.5.5"], "numpy is pinned 2 times"),
        (["jax==0.11.2", "numpy==2.5.5", "torch==2.9.0"], "torch==2.9.0 is pinned, but nothing brings it"),
        ([], "jax==0.11.2 is not pinned"),
    ],
)
def test_the_check_sees(project, wanted, says):
    result = pins(project(*wanted), "--check")
    assert result.returncode == bool(says)
    assert says in result.stderr


@pytest.mark.parametrize(("arguments", "lock"), [((), "lock --upgrade"), (("--keep",), "lock")])
def test_the_command_writes_what_uv_locks_without_pins(project, tmp_path_factory, arguments, lock):
    """uv stands in here: it sees no pins, and an older lock only if that is to be kept."""
    root = project("numpy==2.5.4", "torch==2.9.0")
    tools = tmp_path_factory.mktemp("bin")
    (tools / "locked").write_text(LOCK)
    (tools / "uv").write_text(f"""#!/bin/sh
echo "$*" > {tools}/asked
cp pyproject.toml {tools}/seen
ls uv.lock > {tools}/kept 2> /dev/null
cp {tools}/locked uv.lock
""")
    (tools / "uv").chmod(0o755)
    result = pins(root, *arguments, PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "jax: new -> 0.11.2\nnumpy: 2.5.4 -> 2.5.5\ntorch: 2.9.0 -> not needed\n"
    assert (tools / "asked").read_text().strip() == lock
    assert (tools / "kept").read_text() == ("uv.lock\n" if arguments else "")
    assert tomllib.loads((tools / "seen").read_text())["tool"]["uv"]["constraint-dependencies"] == []
    assert (root / "pyproject.toml").read_text() == PROJECT.format('    "jax==0.11.2",\n    "numpy==2.5.5",\n')
    assert pins(root, "--check").returncode == 0


def test_a_package_of_two_versions_has_no_pin(project):
    root = project("jax==0.11.2", "numpy==2.5.5")
    (root / "uv.lock").write_text(
        LOCK + LOCK.split("[[package]]")[2].join(["[[package]]", ""]).replace("2.5.5", "2.4.0")
    )
    result = pins(root, "--check")
    assert result.returncode == 1
    assert "several versions of numpy" in result.stderr


def test_every_client_has_a_pin_and_a_script():
    """The oldest `openai` is the one that docs/api.md names, the newest the one of our own tests."""
    clients = runpy.run_path(str(ROOT / ".ci/clients"))
    pins = {name: clients["requirement"](name) for name in clients["PINS"]}
    assert {name: pin for name, pin in pins.items() if not re.fullmatch(r"[a-z-]+==[0-9.]+", pin)} == {}
    scripts = {script for _, script in clients["PINS"].values()}
    assert scripts == {path.name for path in (ROOT / "tests/clients").glob("use_*.py")}
    oldest, newest = (pins[f"openai-{age}"].removeprefix("openai==") for age in ("oldest", "newest"))
    assert f"`openai` clients from {oldest} to {newest}" in (ROOT / "docs/api.md").read_text()
    command = [sys.executable, str(ROOT / ".ci/clients"), "--requirement", "openai-oldest"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"openai=={oldest}\n"


def test_a_client_that_cannot_be_installed_is_told(tmp_path, monkeypatch):
    """uv stands in here: it makes the environment, and finds no package."""
    clients = runpy.run_path(str(ROOT / ".ci/clients"))
    (tmp_path / "uv").write_text("#!/bin/sh\n[ $1 = venv ] && exit\necho 'No solution' >&2\nexit 1\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert clients["installed"]("llm", tmp_path) == (None, "No solution")
