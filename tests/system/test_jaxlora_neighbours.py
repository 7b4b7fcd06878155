"""In Python a local train.py or serve.py that hides ours ends in the sentence that the command line says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxlora
from jaxlora.core.errors import ConfigInvalid
from jaxlora.neighbours import HOME, check_neighbours

OWN = "print('the local file ran')"


def ends(folder: Path, code: str, script: str = "notebook.py") -> subprocess.CompletedProcess[str]:
    """Runs a script of the folder, as its user would."""
    (folder / script).write_text(code)
    command = [sys.executable, script]
    env = os.environ | {"PYTHONPATH": str(HOME)}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=env)


@pytest.mark.parametrize(
    ("stranger", "code"),
    [
        pytest.param("train", "from jaxlora import Session", id="train.py"),
        pytest.param("serve", "from jaxlora import Session", id="serve.py"),
        pytest.param("serve", "import jaxlora; jaxlora.Session.open('smollm2')", id="serve.py-by-attribute"),
        pytest.param("train", "from serve.session import Session", id="train.py-through-serve"),
    ],
)
def test_a_local_file_that_hides_ours_is_named(tmp_path, stranger, code):
    (tmp_path / f"{stranger}.py").write_text(OWN)
    done = ends(
        tmp_path,
        f"try:\n    {code}\nexcept ImportError as e:\n    print(e)\n    print('jax' in __import__('sys').modules)",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"`import {stranger}` finds {tmp_path / stranger}.py, a stranger; jaxlora's own is {HOME / stranger}.  Rename "
        "the stranger, run from another folder, or uninstall the package that brought it\nFalse\n"
    )


def test_a_script_of_that_name_is_named_in_the_last_line(tmp_path):
    done = ends(tmp_path, "from jaxlora import Session", "train.py")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"jaxlora.core.errors.PackageHidden: `import train` finds {tmp_path}/train.py, a stranger; ")


def test_two_strangers_are_told_at_once(tmp_path, monkeypatch):
    for name in ("train", "serve"):
        (tmp_path / f"{name}.py").write_text(OWN)
    done = ends(tmp_path, "from jaxlora import Session")
    assert all(f"`import {name}` finds {tmp_path / name}.py" in done.stderr for name in ("train", "serve"))


def test_what_needs_no_neighbour_is_imported_beside_a_stranger(tmp_path):
    (tmp_path / "train.py").write_text(OWN)
    done = ends(tmp_path, "import jaxlora.core.errors, sys; import train; print('jax' in sys.modules)")
    assert (done.stdout, done.stderr) == ("the local file ran\nFalse\n", "")


def test_the_documented_session_is_the_one_of_serve():
    from serve.session import Session

    assert jaxlora.Session is Session
    with pytest.raises(AttributeError, match="module 'jaxlora' has no attribute 'Sessions'"):
        _ = jaxlora.Sessions


def test_neighbours_are_ours():
    check_neighbours()


def test_a_missing_neighbour_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigInvalid, match="no package pallas_kernels was found beside"):
        check_neighbours()
