"""The wheel holds every module, and `jaxlora` answers from it in an empty directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("jaxlora", "pallas_kernels", "train", "serve")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"  # what any front end calls
NOT_SHIPPED = {"__pycache__"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the sources, so that nothing built before can slip in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*NOT_SHIPPED))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
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
