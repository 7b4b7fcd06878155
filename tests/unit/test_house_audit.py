"""`.ci/pip-audit`: a known vulnerability of a pin fails it, an advisory service that is away does not; uv stands in here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINS = ["jax==0.11.2", "numpy==2.5.5"]
SAFE = {"name": "jax", "version": "0.11.2", "vulns": []}
BAD = {"name": "numpy", "version": "2.5.5", "vulns": [{"id": "PYSEC-2026-1", "fix_versions": ["2.5.6", "2.6"]}]}
UNMENDED = BAD | {"vulns": [{"id": "PYSEC-2026-1", "fix_versions": []}]}
UNKNOWN = {"name": "numpy", "skip_reason": "Dependency not found on PyPI and could not be audited: numpy (2.5.5)"}


@pytest.fixture
def audit(tmp_path):
    """Runs the command in a folder of its own, where pip-audit says this."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/pip-audit", tmp_path / ".ci/pip-audit")
    (tmp_path / "pyproject.toml").write_text(f"[tool.uv]\nconstraint-dependencies = {json.dumps(PINS)}\n")
    uv = tmp_path / "uv"

    def run(stdout: str, stderr: str, code: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "stdout").write_text(stdout)
        (tmp_path / "stderr").write_text(stderr)
        uv.write_text(f"""#!/bin/sh
cd {tmp_path}
for word; do test "$before" = --requirement && cp "$word" requirements; before="$word"; done
echo "$*" > asked
cat stdout
cat stderr >&2
exit {code}
""")
        uv.chmod(0o755)
        command = [sys.executable, str(tmp_path / ".ci/pip-audit"), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"UV": str(uv)}, timeout=20
        )

    return run


def told(*packages: dict) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


@pytest.mark.fault("S3")
def test_a_known_vulnerability_fails(audit, tmp_path):
    result = audit(told(SAFE, BAD), "Found 1 known vulnerability", 1, "--ignore-vuln", "PYSEC-1")
    assert result.returncode == 1
    assert result.stderr == "numpy==2.5.5: PYSEC-2026-1, mended in 2.5.6, 2.6\n"
    assert (tmp_path / "requirements").read_text().split() == PINS
    assert (tmp_path / "asked").read_text().rstrip().endswith("--ignore-vuln PYSEC-1")
    assert "mended in no version" in audit(told(SAFE, UNMENDED), "", 1).stderr


def test_what_is_safe_or_unknown_passes_and_is_told_apart(audit):
    result = audit(told(SAFE, SAFE | {"name": "numpy"}), "", 0)
    assert (result.returncode, result.stdout) == (0, "2 of 2 pins were audited\n")
    result = audit(told(SAFE, UNKNOWN), "", 0)
    assert (result.returncode, result.stdout.splitlines()) == (
        0,
        ["1 of 2 pins were audited", "the advisory service does not know 1: numpy"],
    )


@pytest.mark.parametrize(
    "last",
    [
        "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed",
        "requests.exceptions.ReadTimeout: Read timed out.",
        "ERROR:pip_audit._cli:",  # the service answered with an error
    ],
)
def test_a_service_that_is_away_fails_nothing(audit, last):
    result = audit("", f"WARNING:pip_audit._cli:--no-deps\n{last}\n", 1)
    assert (result.returncode, result.stdout) == (0, f"0 of 2 pins were audited: {last}\n")


def test_a_failure_of_the_command_is_one(audit):
    result = audit("", "error: no such group `audit`", 2)
    assert result.returncode == 1
    assert "ended with 2:\nerror: no such group `audit`" in result.stderr
