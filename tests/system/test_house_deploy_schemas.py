"""What others' tools say of deploy/: systemd's, Prometheus', and published schemas where the group `deploy` is installed.

`uv run --isolated --group deploy pytest tests/system/test_house_deploy_schemas.py`, and Debian's package `prometheus`.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("systemd/*"))
MOST_EXPOSED = 2.0  # of 10, by systemd's own measure; 9.2 is a unit that says nothing
OTHERS = {"ray.io/v1", "inference.networking.k8s.io/v1", "gateway.networking.k8s.io/v1", "llm-d.ai/v1alpha2"}
KUBERNETES = "1.32"  # the oldest version that the manifests are checked against; and the newest that is known


def run(*command: str, **options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)


def program(name: str, package: str) -> str:
    """Its path; skips the test without it."""
    here = Path(sys.executable).with_name(name)
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}: {package}")
    return found


def module(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"there is no {name}: uv run --isolated --group deploy pytest {Path(__file__).name}")


@pytest.fixture
def units(tmp_path):
    """The units, with a program that there is in place of ours."""
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/jaxlora/bin/jaxlora", sys.executable))
    return tmp_path


# ---- systemd


@pytest.mark.parametrize("line", ["", "Restart=perhaps"])
def test_systemd_takes_the_units(units, line):
    analyze = program("systemd-analyze", "apt-get install systemd")
    if line:  # so that a mistake would be seen
        text = (units / "jaxlora.service").read_text().replace("Restart=on-failure", line)
        (units / "jaxlora.service").write_text(text)
    done = run(analyze, "verify", "--man=no", "--recursive-errors=no", *(str(units / unit.name) for unit in UNITS))
    assert (done.stderr == "") == (not line), done.stderr


@pytest.mark.fault("S4")
def test_systemd_finds_the_server_confined(units):
    analyze = program("systemd-analyze", "apt-get install systemd")
    done = run(analyze, "security", "--offline=yes", "--no-pager", str(units / "jaxlora.service"))
    (level,) = re.findall(r"Overall exposure level for jaxlora.service: ([\d.]+)", done.stdout)
    assert float(level) <= MOST_EXPOSED, done.stdout


# ---- Prometheus


def test_prometheus_takes_its_settings_and_the_rules():
    promtool = program("promtool", "apt-get install prometheus")
    done = run(promtool, "check", "config", "--lint=all", "--lint-fatal", str(DEPLOY / "prometheus/prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_rule_fires_on_its_fault_and_on_nothing_else():
    promtool = program("promtool", "apt-get install prometheus")
    done = run(promtool, "test", "rules", str(DEPLOY / "prometheus/alerts_test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_rule_without_a_test_is_found():
    """What `promtool test rules` does not: every rule is among those that fire."""
    (group,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    text = (DEPLOY / "prometheus/alerts_test.yml").read_text()
    assert [rule["alert"] for rule in group["rules"]] == re.findall(r'alertname="(\w+)"', text)
    assert all({"severity"} == set(rule["labels"]) for rule in group["rules"])
    assert all({"summary", "description"} == set(rule["annotations"]) for rule in group["rules"])


# ---- published schemas


def own_objects(path: Path) -> list[dict]:
    """Those of a file that are Kubernetes' own, and the pods that another's objects are to make."""
    found = list(yaml.safe_load_all(path.read_text()))
    own = [one for one in found if one["apiVersion"] not in OTHERS]
    for one in (one["spec"] for one in found if one["kind"] == "RayCluster"):
        templates = [group["template"] for group in (one["headGroupSpec"], *one["workerGroupSpecs"])]
        own += [{"apiVersion": "v1", "kind": "Pod", **t, "metadata": {"name": "a", **t["metadata"]}} for t in templates]
    return own


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("kube*/*")), ids=lambda path: path.name)
@pytest.mark.parametrize("version", [KUBERNETES, "newest"])
def test_kubernetes_objects_follow_its_schema(path, version):
    module("kubernetes_validate")
    import kubernetes_validate

    wanted = kubernetes_validate.latest_version() if version == "newest" else version
    for one in own_objects(path):
        kubernetes_validate.validate(one, wanted, strict=True)
    one["spec" if "spec" in one else "type"] = {"replica": 1}  # so that a mistake would be seen
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, wanted, strict=True)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_follow_its_schema(name, tmp_path):
    check = [program("check-jsonschema", "uv run --group deploy"), "--builtin-schema", "vendor.compose-spec"]
    done = run(*check, str(DEPLOY / "docker" / name))
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / name
    wrong.write_text((DEPLOY / "docker" / name).read_text() + "\nservice: {}\n")
    assert run(*check, str(wrong)).returncode == 1


def test_compose_merges_the_files_for_a_gpu(tmp_path):
    """Docker's own reading, with the passwords that .env would have."""
    compose = program("docker-compose", "apt-get install docker-compose")
    (tmp_path / "env").write_text("POSTGRES_PASSWORD=a\nS3_SECRET=b\nGRAFANA_PASSWORD=c\n")
    files = [f"--file={DEPLOY / 'docker' / name}" for name in ("compose.yaml", "compose.cuda.yaml")]
    done = run(compose, f"--env-file={tmp_path / 'env'}", *files, "config")
    assert done.returncode == 0, done.stderr
    server = yaml.safe_load(done.stdout)["services"]["jaxlora"]
    assert server["build"]["args"] == {"EXTRAS": "--extra cuda --extra postgres"}
    assert server["environment"]["PGPASSWORD"] == "a"
    refused = run(compose, "--env-file=/dev/null", files[0], "config")
    assert "is not in .env" in refused.stderr


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path):
    hadolint = program("hadolint", "uv run --group deploy")
    done = run(hadolint, "--no-color", str(DEPLOY / "docker/Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")
    wrong = tmp_path / "Dockerfile"
    wrong.write_text((DEPLOY / "docker/Dockerfile").read_text().replace("uv==", "uv>="))
    assert "DL3013" in run(hadolint, "--no-color", str(wrong)).stdout
