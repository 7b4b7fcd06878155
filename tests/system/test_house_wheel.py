"""The wheel holds every module, and `jaxlora` answers from it in an empty directory and in an empty environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxlora", "pallas_kernels", "train", "serve")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"  # what any front end calls
NOT_SHIPPED = {"__pycache__"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, so that nothing built before can slip in."""
    source = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    run = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_every_file_of_the_packages(wheel):
    files = [p.relative_to(ROOT) for name in PACKAGES for p in (ROOT / name).rglob("*") if p.is_file()]
    wanted = {str(f) for f in files if not NOT_SHIPPED & set(f.parts)}
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert held == wanted


def test_wheel_names_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "jaxlora = serve.cli.main:main" in archive.read(entry).decode()


def test_jaxlora_answers_from_an_empty_directory(wheel, tmp_path):
    code = "import sys, jaxlora; assert sys.argv[1] in jaxlora.__file__, jaxlora.__file__"
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    for arguments in (["-c", code, str(wheel)], ["-m", "serve.cli.main", "--help"]):
        run = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
    assert "serve" in run.stdout


@pytest.mark.soak
def test_the_page_makes_an_empty_environment_that_answers_the_demo(source, tmp_path):
    """The commands of docs/deploy.md in order, with a folder of here for /opt/jaxlora and the versions that were tested."""
    section = re.search(r"^## A wheel\n\n```sh\n(.*?)^```$", (ROOT / "docs/deploy.md").read_text(), re.M | re.S)[1]
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    (tmp_path / "pins.txt").write_text("\n".join(pins))
    environment = tmp_path / "jaxlora"
    env = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    env |= {"UV_CONSTRAINT": str(tmp_path / "pins.txt"), "UV_PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}

    def run(words: list[str], cwd: Path) -> str:
        done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    *install, demo = [shlex.split(line.replace("/opt/jaxlora", str(environment))) for line in section.splitlines()]
    jaxlora = demo[0]
    for words in install:
        if "--no-deps" in words:  # until then the demo says what it wants
            asked = subprocess.run([*demo], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert asked.returncode == 2
            assert " ".join(words[words.index("--no-deps") :]) in asked.stderr
            assert "Traceback" not in asked.stderr
        run(words, source)
    assert "serve" in run([jaxlora, "--help"], tmp_path)
    findings = run([jaxlora, "doctor"], tmp_path)
    assert str(environment) in findings
    assert "MISSING" not in findings
    shown = run(demo, tmp_path)
    assert re.search(
        "[678] of 8 tenants went from at most 0.20 to at least 0.70", shown
    )  # how many varies with the CPU
    assert "compiles after warm-up: 0" in shown
