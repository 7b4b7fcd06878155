"""The files in deploy/: their commands are ours, they probe routes that there are, and they give a server the time it needs."""

from __future__ import annotations

import ast
import configparser
import contextlib
import json
import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import yaml
from fake_backend import FakeBackend, serving
from typer.testing import CliRunner

from jaxlora.config.serving import ServeConfig
from jaxlora.config.training import load
from serve.access.keys import digest
from serve.cli import main as cli
from serve.db.database import Database
from serve.db.keys import StoredKeys
from serve.server.app import create_app
from serve.server.build import LOST_EXIT
from serve.server.gate import AppConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "docker/Dockerfile"
SETTINGS = "/etc/jaxlora/serve.toml"  # where each of them puts deploy/serve.toml
STATE = Path("/var/lib/jaxlora")
LAST_S = 60.0  # for the last writes, after the grace time
STARTS_S = 1800  # a download, compiling


class Unit(configparser.RawConfigParser):
    """A systemd unit: its keys keep their case."""

    def __init__(self, name: str):
        super().__init__(strict=True)
        self.optionxform = str  # ty: ignore[invalid-assignment]
        self.read_string((DEPLOY / "systemd" / name).read_text())


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of each line of the Dockerfile."""
    text = re.sub(r"\\\n", "", "\n".join(x for x in DOCKERFILE.read_text().splitlines() if not x.startswith("#")))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def instruction(keyword: str) -> str:
    """The last one."""
    return [rest for word, rest in instructions() if word == keyword][-1]


def compose() -> dict:
    return yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())["services"]["jaxlora"]


def objects() -> dict[str, dict]:
    """Those of Kubernetes, by kind."""
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes/jaxlora.yaml").read_text()))
    assert {o["metadata"]["name"] for o in found} == {"jaxlora"}
    return {o["kind"]: o for o in found}


def pod() -> dict:
    return objects()["StatefulSet"]["spec"]["template"]["spec"]


def container() -> dict:
    (one,) = pod()["containers"]
    return one


def settings() -> ServeConfig:
    return load(DEPLOY / "serve.toml", ServeConfig)


def run(arguments: list[str]) -> str:
    """What a command line of ours prints; its settings are the file of deploy/."""
    words = [a.replace(SETTINGS, str(DEPLOY / "serve.toml")) for a in arguments]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    return result.stdout


def is_asked(command: str, path: str) -> bool:
    """Whether a command asks a server of this machine for the path, at the port of the settings."""
    return f"http://127.0.0.1:{settings().port}{path}" in re.split(r"[\s'\";]+", command)


def seconds(time: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|min|m|h)", time).groups()
    return int(number) * {"s": 1, "min": 60, "m": 60, "h": 3600}[unit]


def test_the_settings_are_whole_and_keep_everything_in_one_folder():
    config = settings()
    assert {config.adapters.parent, config.data.parent} == {STATE}
    assert config.host == "127.0.0.1"
    assert config.training is not None


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda: shlex.split(Unit("jaxlora.service")["Service"]["ExecStart"])[1:], id="systemd"),
        pytest.param(lambda: json.loads(instruction("CMD")), id="docker"),
        pytest.param(lambda: container()["args"], id="kubernetes"),
    ],
)
def test_the_command_starts_a_server_with_these_settings(monkeypatch, request, command):
    started = []
    monkeypatch.setattr("serve.server.build.main", lambda *arguments, **told: started.append(arguments))
    run(command())
    host = "127.0.0.1" if request.node.callspec.id == "systemd" else "0.0.0.0"
    assert started == [(replace(settings(), host=host), DEPLOY / "serve.toml")]


@pytest.mark.parametrize("text", ["docker/compose.yaml", "kubernetes/jaxlora.yaml"])
def test_a_server_that_others_reach_has_a_key_before_it_starts(monkeypatch, tmp_path, text):
    words = re.search(r"\bkeys create [^>\n]*", (DEPLOY / text).read_text())[0].split()
    urls = []
    with contextlib.closing(Database(f"sqlite:///{tmp_path}/keys.sqlite")) as database:
        monkeypatch.setattr("serve.db.database.Database", lambda url: urls.append(url) or database)
        key = run(words).strip()
        (record,) = StoredKeys(database).all()
    assert (urls, record.digest, record.role) == ([settings().database_url], digest(key), "admin")


def test_the_paths_that_are_asked_are_routes_that_need_no_key():
    def nobody(connection):
        raise AssertionError("a probe has no key")

    probes = [container()[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert [p["path"] for p in probes] == ["/ready", "/ready", "/health"]
    with serving(create_app(FakeBackend(), AppConfig(default_max_tokens=8, caller_of=nobody))) as url:
        assert [httpx2.get(url + p["path"]).status_code for p in probes] == [200] * 3
    assert is_asked(Unit("jaxlora.service")["Service"]["ExecStartPost"], "/ready")
    assert is_asked(Unit("jaxlora-health.service")["Service"]["ExecStart"], "/health")
    assert is_asked(instruction("HEALTHCHECK"), "/health")


def test_all_ports_are_that_of_the_settings():
    port = settings().port
    assert instruction("EXPOSE") == str(port)
    assert [p.split(":")[-1] for p in compose()["ports"]] == [str(port)]
    (named,) = container()["ports"]
    assert named == {"name": "http", "containerPort": port}
    (shown,) = objects()["Service"]["spec"]["ports"]
    assert shown["targetPort"] == "http"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"]["port"] == "http"


def test_a_server_has_time_to_start_and_to_end():
    needed = settings().grace_s + LAST_S
    unit = Unit("jaxlora.service")["Service"]
    assert seconds(unit["TimeoutStopSec"]) >= needed
    assert seconds(compose()["stop_grace_period"]) >= needed
    assert pod()["terminationGracePeriodSeconds"] >= needed
    assert seconds(unit["TimeoutStartSec"]) >= STARTS_S
    startup = container()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= STARTS_S
    assert seconds(re.search(r"--start-period=(\S+)", instruction("HEALTHCHECK"))[1]) >= STARTS_S


def test_bad_health_ends_no_server_before_it_is_longer_than_a_slow_step():
    wanted = max(60.0, 5 * settings().hang_s)
    live = container()["livenessProbe"]
    assert live["periodSeconds"] * (live["failureThreshold"] - 1) >= wanted
    look = Unit("jaxlora-health.service")["Service"]["ExecStart"]
    retries, delay = (int(re.search(rf"--{option} (\d+)", look)[1]) for option in ("retry", "retry-delay"))
    assert retries * delay >= wanted


def test_systemd_starts_one_again_that_failed_but_not_for_what_its_user_must_mend():
    unit = Unit("jaxlora.service")
    service = unit["Service"]
    assert (service["Restart"], service["KillMode"]) == ("on-failure", "mixed")
    never = set(map(int, service["RestartPreventExitStatus"].split()))
    assert never == {cli.ERROR_EXIT}
    assert LOST_EXIT not in never | {0}
    assert int(unit["Unit"]["StartLimitBurst"]) > int(service["RestartSteps"])
    # Or a server that always fails would never be given up.
    longest = int(unit["Unit"]["StartLimitBurst"]) * seconds(service["RestartMaxDelaySec"])
    assert longest < seconds(unit["Unit"]["StartLimitIntervalSec"])
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    looks = Unit("jaxlora-health.service")["Service"]
    assert looks["ExecCondition"].endswith("is-active --quiet jaxlora.service")
    active = "/usr/bin/systemctl is-active --quiet jaxlora.service"
    assert looks["ExecStart"].endswith(f"|| ! {active} || /usr/bin/systemctl restart jaxlora.service'")
    assert "OnUnitInactiveSec" in Unit("jaxlora-health.timer")["Timer"]


def test_systemd_does_not_wait_for_a_server_that_has_ended():
    shell, flag, script = shlex.split(Unit("jaxlora.service")["Service"]["ExecStartPost"])
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    script = script.replace(f":{settings().port}/", ":1/")
    done = subprocess.run([shell, flag, script], env={"MAINPID": str(ended.pid)}, timeout=20, capture_output=True)
    assert done.returncode == 1


def test_what_a_server_writes_outlives_it():
    assert Path("/var/lib") / Unit("jaxlora.service")["Service"]["StateDirectory"] == STATE
    assert instruction("VOLUME") == str(STATE)
    assert f"state:{STATE}" in compose()["volumes"]
    (claim,) = objects()["StatefulSet"]["spec"]["volumeClaimTemplates"]
    mounts = {m["name"]: m["mountPath"] for m in container()["volumeMounts"]}
    assert mounts[claim["metadata"]["name"]] == str(STATE)
    assert mounts["settings"] == str(Path(SETTINGS).parent)


def test_the_settings_of_kubernetes_are_those_of_the_file():
    assert objects()["ConfigMap"]["data"] == {"serve.toml": (DEPLOY / "serve.toml").read_text()}
    (volume,) = [v for v in pod()["volumes"] if v["name"] == "settings"]
    assert volume["configMap"]["name"] == "jaxlora"
    for one in [*pod()["initContainers"], container()]:
        assert one["envFrom"] == [{"secretRef": {"name": objects()["Secret"]["metadata"]["name"]}}]


def test_one_replica_has_the_disk():
    stateful = objects()["StatefulSet"]["spec"]
    assert stateful["replicas"] == 1
    labels = stateful["template"]["metadata"]["labels"]
    assert labels == stateful["selector"]["matchLabels"] == objects()["Service"]["spec"]["selector"]


@pytest.mark.fault("S4")
def test_nobody_is_root():
    user = instruction("USER")
    assert int(user) > 0
    assert f"useradd --uid {user} " in " ".join(rest for word, rest in instructions() if word == "RUN")
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["runAsUser"] == int(user)
    assert Unit("jaxlora.service")["Service"]["User"] not in ("", "root")


@pytest.mark.fault("S4")
def test_a_server_may_write_to_its_state_only():
    assert (compose()["read_only"], compose()["cap_drop"]) == (True, ["ALL"])
    for one in (*pod()["initContainers"], container()):
        confined = one["securityContext"]
        assert (confined["readOnlyRootFilesystem"], confined["allowPrivilegeEscalation"]) == (True, False)
        assert confined["capabilities"]["drop"] == ["ALL"]
    assert Unit("jaxlora.service")["Service"]["ProtectSystem"] == "strict"


def test_the_image_is_made_of_files_that_there_are():
    copied = [
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert {"jaxlora/", "pallas_kernels/", "train/", "serve/"} < set(copied)
    build = compose()["build"]
    assert (DEPLOY / "docker" / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKERFILE
    assert json.loads(instruction("ENTRYPOINT")) == ["jaxlora"]


def test_the_health_check_of_the_image_is_a_program():
    command = json.loads(instruction("HEALTHCHECK").partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]
    ast.parse(command[2])


def test_docker_starts_one_again_that_failed():
    assert compose()["restart"] == "on-failure:10"
