"""The files in deploy/: their commands are ours, they probe routes that there are, and they give a server the time it needs."""

from __future__ import annotations

import ast
import configparser
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import httpx2
import pytest
import yaml
from fake_backend import FakeBackend, serving
from sqlalchemy import make_url
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
PAGE = (ROOT / "docs/deploy.md").read_text()


class Unit(configparser.RawConfigParser):
    """A systemd unit: its keys keep their case, and none is given twice but the devices, which are left out."""

    def __init__(self, name: str):
        super().__init__(strict=True)
        self.optionxform = str  # ty: ignore[invalid-assignment]
        self.read_string(re.sub(r"(?m)^DeviceAllow=.*\n", "", (DEPLOY / "systemd" / name).read_text()))


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of each line of the Dockerfile."""
    text = re.sub(r"\\\n", "", "\n".join(x for x in DOCKERFILE.read_text().splitlines() if not x.startswith("#")))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def instruction(keyword: str) -> str:
    """The last one."""
    return [rest for word, rest in instructions() if word == keyword][-1]


def stack() -> dict:
    return yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())


def compose() -> dict:
    return stack()["services"]["jaxlora"]


def objects() -> dict[str, dict]:
    """Those of Kubernetes, by kind."""
    found = [o for path in (DEPLOY / "kubernetes").iterdir() for o in yaml.safe_load_all(path.read_text())]
    assert {o["metadata"]["name"] for o in found} == {"jaxlora"}
    return {o["kind"]: o for o in found}


def pod() -> dict:
    return objects()["StatefulSet"]["spec"]["template"]["spec"]


def container() -> dict:
    (one,) = pod()["containers"]
    return one


def settings(name: str = "serve.toml") -> ServeConfig:
    return load(DEPLOY / name, ServeConfig)


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
    assert (config.host, config.keys) == ("127.0.0.1", "required")
    assert config.training is not None


def test_the_settings_of_the_stack_are_those_of_the_others_and_its_services():
    """The host of each URL is a service, whose password comes from the environment."""
    config, services = settings("docker/serve.toml"), stack()["services"]
    assert replace(config, database=None, blobs=None, metrics_open=False) == settings()
    database = make_url(config.database)
    assert (database.host, database.password) == ("postgres", None)
    assert services["postgres"]["environment"]["POSTGRES_USER"] == database.username
    ours, theirs = services["jaxlora"]["environment"], services["s3"]["environment"]
    assert ours["PGPASSWORD"] == services["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert config.blobs.url.startswith("s3://")
    assert ours["AWS_ENDPOINT_URL"] == "http://s3:8333"
    assert "-s3.port=8333" in services["s3"]["command"]
    assert {name: ours[name] for name in theirs} == theirs
    assert set(ours) - {"PGPASSWORD"} >= set(theirs)
    assert f"./serve.toml:{SETTINGS}:ro" in compose()["volumes"]
    assert set(compose()["depends_on"]) == {"postgres", "s3"}
    assert all("healthcheck" in services[name] for name in compose()["depends_on"])


def test_the_stack_starts_with_no_password_of_ours():
    asked = set(re.findall(r"\$\{(\w+)(:\?)?", (DEPLOY / "docker/compose.yaml").read_text()))
    assert {needed for _, needed in asked} == {":?"}
    (line,) = [line for line in PAGE.splitlines() if line.endswith("> deploy/docker/.env")]
    assert {name for name, _ in asked} == set(re.search(r"for name in (.*?);", line)[1].split())
    assert "/deploy/docker/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_stack_is_reached_from_this_machine_only_and_its_stores_from_nowhere():
    services, networks = stack()["services"], stack()["networks"]
    assert all(port.startswith("127.0.0.1:") for s in services.values() for port in s.get("ports", []))
    for name in ("postgres", "s3"):
        assert "ports" not in services[name]
        assert [networks[n] for n in services[name]["networks"]] == [{"internal": True}]


def test_images_are_pinned():
    images = [s["image"] for s in stack()["services"].values()] + [container()["image"]]
    images += [rest.partition("=")[2] for word, rest in instructions() if word == "ARG" and "python" in rest]
    assert {image.partition(":")[0] for image in images} == {
        "jaxlora", "postgres", "chrislusf/seaweedfs", "prom/prometheus", "grafana/grafana", "python"
    }  # fmt: skip
    assert [image for image in images if not re.fullmatch(r"[^:]+:v?\d+(\.\d+)+(-[\w-]+)?", image)] == []
    ours = f"jaxlora:{version('jaxlora')}"
    assert (compose()["image"], container()["image"]) == (ours, ours)


def test_the_stack_mounts_what_there_is_where_it_is_read():
    """Prometheus' folder, and of Grafana the provisioned datasource and the folder that its provider names."""
    services = stack()["services"]
    mounts = {name: dict(v.split(":")[:2] for v in s["volumes"]) for name, s in services.items()}
    files = [source for one in mounts.values() for source in one if source.startswith(".")]
    assert [f for f in files if not (DEPLOY / "docker" / f).exists()] == []
    told = dict(option.removeprefix("--").split("=") for option in services["prometheus"]["command"])
    assert Path(told["config.file"]).parent == Path(mounts["prometheus"]["../prometheus"])
    assert told["storage.tsdb.path"] == mounts["prometheus"]["prometheus"]
    (job,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"jaxlora:{settings().port}"]}]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provider.yaml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["grafana"]["../grafana/dashboards"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/datasource.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert set(services["prometheus"]["networks"]) == set(services["grafana"]["networks"]) <= set(compose()["networks"])


def test_a_gpu_changes_the_image_and_the_device_alone():
    over = yaml.safe_load((DEPLOY / "docker/compose.cuda.yaml").read_text())["services"]["jaxlora"]
    assert set(over) == {"build", "image", "deploy"}
    assert over["image"] == f"{compose()['image']}-cuda"
    extras = shlex.split(over["build"]["args"]["EXTRAS"])
    default = shlex.split(instruction("ARG").partition("=")[2])[0].split()
    assert set(extras) == {"cuda", *default}
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) - {"--extra"} <= set(known)


# ---- the page


def commands(section: str) -> list[list[str]]:
    """The words of each command of a section of docs/deploy.md, without `sudo` and the like."""
    text = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    found = [shlex.split(part) for line in lines for part in re.split(r" && | \| ", line)]
    return [[w for w in words if w != "sudo" and not re.match(r"[A-Z_]+=", w)] for words in found]


def test_each_section_of_the_page_makes_a_key_before_it_starts_a_server():
    starts = {"systemd": "enable", "Docker": "up", "Kubernetes": "apply"}
    for section, start in starts.items():
        lines = [" ".join(words) for words in commands(section)]
        assert any("Bearer $KEY" in line for line in lines)
        (first, *_) = [i for i, line in enumerate(lines) if f" {start} " in line]
        made = [i for i, line in enumerate(lines) if "keys create" in line or "first-key" in line]
        assert made
        assert section == "Kubernetes" or made[0] < first


def test_the_page_of_systemd_installs_each_file_where_the_unit_reads_it():
    lines = commands("systemd")
    installed = {w for words in lines if words[0] == "install" for w in words if w.startswith("deploy/")}
    assert installed == {"deploy/serve.toml", *(f"deploy/systemd/{p.name}" for p in (DEPLOY / "systemd").iterdir())}
    unit = Unit("jaxlora.service")["Service"]
    program, _, file = shlex.split(unit["ExecStart"])
    assert ["install", "-D", "--mode", "644", "deploy/serve.toml", file] in lines
    (useradd,) = [words for words in lines if words[0] == "useradd"]
    assert useradd[-1] == unit["User"]
    assert useradd[useradd.index("--home-dir") + 1] == str(STATE) == unit["Environment"].removeprefix("HOME=")
    (key,) = [words for words in lines if "keys" in words]
    assert key[:3] == ["--user", unit["User"], program]
    assert f"UV_PROJECT_ENVIRONMENT={Path(program).parents[1]} " in PAGE
    (enable,) = [words for words in lines if words[:3] == ["systemctl", "enable", "--now"]]
    assert set(enable[3:]) == {"jaxlora.service", "jaxlora-health.timer"}


def test_the_page_of_docker_and_of_kubernetes_name_services_objects_and_files():
    for words in commands("Docker"):
        if words[:2] == ["docker", "compose"]:
            assert all((ROOT / words[i + 1]).exists() for i, w in enumerate(words) if w == "--file")
        if "keys" in words:
            assert words[words.index("--config") + 1] == SETTINGS
    tag = f"jaxlora:{version('jaxlora')}"
    (alone,) = [words for words in commands("Docker") if words[:3] == ["docker", "run", "--detach"]]
    assert alone[-1] == tag
    assert float(alone[alone.index("--stop-timeout") + 1]) >= settings().grace_s + LAST_S
    assert alone[alone.index("--volume") + 1].endswith(f":{STATE}")
    lines = commands("Kubernetes")
    (script, file) = next(words for words in lines if words[0] == "sed")[1:]
    assert (ROOT / file).exists()
    assert script == "s|image: jaxlora|image: $REGISTRY/jaxlora|"
    assert ["docker", "push", f"$REGISTRY/{tag}"] in lines
    kinds = {kind.lower() for kind in objects()}
    named = [w.split("/")[0] for words in lines if words[0] == "kubectl" for w in words if w.endswith("/jaxlora")]
    assert set(named) == {"statefulset", "service"} <= kinds


def test_the_page_names_every_file():
    files = {p.relative_to(ROOT) for p in DEPLOY.rglob("*") if p.is_file()}
    assert [str(f) for f in files if str(f) not in PAGE and f"`{f.parent}/`" not in PAGE] == []


# ---- the command, the probes, the time they give


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


@pytest.mark.parametrize("text", ["docker/compose.yaml", "kubernetes/jaxlora.yaml", "../docs/deploy.md"])
def test_a_server_has_a_key_before_it_starts(monkeypatch, tmp_path, text):
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
        (source,) = one["envFrom"]
        assert source == {"secretRef": {"name": objects()["Secret"]["metadata"]["name"], "optional": True}}
    wanted = set(compose()["environment"]) - {"AWS_ALLOW_HTTP"}
    assert set(objects()["Secret"]["stringData"]) == wanted


def test_one_replica_has_the_disk_and_is_not_drained_by_itself():
    stateful = objects()["StatefulSet"]["spec"]
    assert stateful["replicas"] == 1
    labels = stateful["template"]["metadata"]["labels"]
    assert labels == stateful["selector"]["matchLabels"] == objects()["Service"]["spec"]["selector"]
    budget = objects()["PodDisruptionBudget"]["spec"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (0, labels)


@pytest.mark.fault("S4")
def test_the_network_lets_in_requests_and_out_what_the_settings_name():
    policy = objects()["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == objects()["StatefulSet"]["spec"]["selector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (into,), (out,) = policy["ingress"], policy["egress"]
    assert into["ports"] == [{"port": container()["ports"][0]["name"]}]
    assert {p["port"] for p in out["ports"]} == {53, 443, 5432}


@pytest.mark.fault("S4")
def test_nobody_is_root():
    user = instruction("USER")
    assert int(user) > 0
    assert f"useradd --uid {user} " in " ".join(rest for word, rest in instructions() if word == "RUN")
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["runAsUser"] == int(user)
    assert pod()["automountServiceAccountToken"] is False
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
    sent = {line[1:] for line in (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert sent == {source.rstrip("/") for source in copied}
    build = compose()["build"]
    assert (DEPLOY / "docker" / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKERFILE
    assert json.loads(instruction("ENTRYPOINT")) == ["jaxlora"]


@pytest.mark.soak
def test_the_first_stage_of_the_image_makes_a_server_without_docker(tmp_path):
    """Its COPY and RUN lines in order, in a folder with nothing else; pip's line brings uv, which is here."""
    starts = [i for i, (word, _) in enumerate(instructions()) if word == "FROM"]
    stage = instructions()[starts[0] : starts[1]]
    extras = next(shlex.split(rest)[0].partition("=")[2] for word, rest in stage if word == "ARG")
    env = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"} | {"EXTRAS": extras, "UV_PYTHON": sys.executable}
    ignored = shutil.ignore_patterns("__pycache__")
    for word, rest in stage:
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if source.endswith("/"):
                    shutil.copytree(ROOT / source, tmp_path / target, ignore=ignored)
                else:
                    shutil.copy(ROOT / source, tmp_path / target)
        elif word == "RUN" and not rest.startswith("pip "):
            done = subprocess.run(rest, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    python = tmp_path / ".venv/bin/python"
    for package in ("jaxlora", "psycopg", "serve.cli.main"):
        found = subprocess.run(
            [python, "-c", f"import {package}; print({package.split('.')[0]}.__file__)"],
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert str(tmp_path / ".venv") in found.stdout, found.stderr
    (entry,) = json.loads(instruction("ENTRYPOINT"))
    assert (
        subprocess.run([tmp_path / ".venv/bin" / entry, "--help"], cwd="/", capture_output=True, check=False).returncode
        == 0
    )


def test_the_health_check_of_the_image_is_a_program():
    command = json.loads(instruction("HEALTHCHECK").partition(" CMD ")[2])
    assert command[:2] == ["python", "-c"]
    ast.parse(command[2])


def test_docker_starts_one_again_that_failed():
    assert compose()["restart"] == "on-failure:10"
