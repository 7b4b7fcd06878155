"""The files in deploy/kuberay: what one object names, another is; they give servers a place, time and no rights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from jaxlora.config.cluster import ClusterSection
from jaxlora.config.serving import ServeConfig
from jaxlora.config.toml import load
from serve.cli import main as cli
from serve.cluster import relay
from serve.server.build import STOP_S
from serve.server.gate import OPEN_PATHS

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "deploy/kuberay"
PAGE = (ROOT / "docs/deploy.md").read_text()
STARTS_S = 1800  # a download, compiling
SETTINGS, STATE = "/etc/jaxlora/serve.toml", "/var/lib/jaxlora"
OBJECTS = [one for name in ("cluster", "gateway") for one in yaml.safe_load_all((KUBERAY / f"{name}.yaml").read_text())]
UNITS = {"Mi": 2**20, "Gi": 2**30}


def names(kind: str) -> set[str]:
    return {one["metadata"]["name"] for one in OBJECTS if one["kind"] == kind}


def found(kind: str, name: str | None = None) -> dict:
    """The spec of an object, or its data."""
    (one,) = [o for o in OBJECTS if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return one.get("spec", one.get("data"))


def ray() -> dict:
    return found("RayCluster")


def group() -> dict:
    (one,) = ray()["workerGroupSpecs"]
    return one


TEMPLATES = {
    "front": found("Deployment")["template"],
    "head": ray()["headGroupSpec"]["template"],
    "server": group()["template"],
}


def front() -> dict:
    (one,) = TEMPLATES["front"]["spec"]["containers"]
    return one


def containers(role: str) -> list[dict]:
    pod = TEMPLATES[role]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


def selected(selector: dict) -> set[str]:
    """The roles of the pods that a selector finds."""
    exact = selector if not {"matchLabels", "matchExpressions"} & set(selector) else selector.get("matchLabels", {})
    within = {one["key"]: one["values"] for one in selector.get("matchExpressions", [])}
    return {
        role
        for role, template in TEMPLATES.items()
        if exact.items() <= template["metadata"]["labels"].items()
        and all(template["metadata"]["labels"].get(key) in values for key, values in within.items())
    }


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) * UNITS[unit]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> ServeConfig:
    path = tmp_path_factory.mktemp("settings") / "serve.toml"
    path.write_text(found("ConfigMap", "jaxlora")["serve.toml"])
    return load(path, ServeConfig)


# ---- settings


def test_the_settings_are_those_of_one_server_a_database_and_a_cluster(settings):
    alone = load(ROOT / "deploy/serve.toml", ServeConfig)
    ours = replace(settings, database=None, host=alone.host, memory_share=alone.memory_share, cluster=ClusterSection())
    assert ours == alone
    assert settings.database.startswith("postgresql+psycopg://jaxlora@")  # its password comes from the environment
    assert (settings.host, settings.blobs) == ("0.0.0.0", None)
    assert settings.memory_share < alone.memory_share


def test_each_pod_of_the_group_holds_one_server_and_all_have_a_place(settings):
    cluster = settings.cluster
    assert float(group()["rayStartParams"]["num-cpus"]) == cluster.cpus
    assert group()["replicas"] == group()["minReplicas"] == 0
    assert group()["maxReplicas"] >= cluster.server_limit > 1 + cluster.replicas + cluster.trainers
    assert ray()["enableInTreeAutoscaling"] is True
    assert ray()["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert " --num-cpus 0 " in front()["args"][0]
    gpus = [c["resources"]["limits"].get("nvidia.com/gpu", 0) for c in containers("server")]
    assert gpus == [cluster.gpus]


def test_ray_is_the_one_of_the_image():
    pinned = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    assert f"ray=={ray()['rayVersion']}" in pinned
    images = {c["image"] for role in TEMPLATES for c in containers(role)}
    (image,) = images
    assert image == f"jaxlora:{version('jaxlora')}-ray"
    (build,) = [line for line in PAGE.splitlines() if line.startswith("docker build") and line.endswith(f'/{image}" .')]
    assert set(re.search(r'EXTRAS="([^"]*)"', build)[1].split()) - {"--extra"} == {"postgres", "ray"}


# ---- names


def test_what_a_pod_mounts_reads_and_runs_as_is_there():
    claims, maps, accounts = names("PersistentVolumeClaim"), names("ConfigMap"), names("ServiceAccount")
    secret = yaml.safe_load((ROOT / "deploy/kubernetes/secret.yaml").read_text())["metadata"]["name"]
    for role, template in TEMPLATES.items():
        pod = template["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert len(volumes) == len(pod["volumes"])
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "jaxlora") in claims
            assert volume.get("configMap", {}).get("name", "jaxlora") in maps
        for one in containers(role):
            assert {mount["name"] for mount in one["volumeMounts"]} <= set(volumes)
            assert {source["secretRef"]["name"] for source in one.get("envFrom", [])} <= {secret}
        assert role == "head" or pod["serviceAccountName"] in accounts
    assert {mount["name"] for mount in ray()["autoscalerOptions"]["volumeMounts"]} <= {
        volume["name"] for volume in TEMPLATES["head"]["spec"]["volumes"]
    }


def test_all_servers_and_the_first_key_share_one_volume_that_many_nodes_write(settings):
    assert found("PersistentVolumeClaim")["accessModes"] == ["ReadWriteMany"]
    assert {settings.adapters.parent, settings.data.parent} == {Path(STATE)}
    for role in ("front", "server"):
        (volume,) = [v["name"] for v in TEMPLATES[role]["spec"]["volumes"] if "persistentVolumeClaim" in v]
        for one in containers(role):
            assert {"name": volume, "mountPath": STATE} in one["volumeMounts"]
    assert front()["workingDir"] == STATE
    mounts = {mount["mountPath"]: mount["name"] for mount in front()["volumeMounts"]}
    (mapped,) = [v for v in TEMPLATES["front"]["spec"]["volumes"] if v["name"] == mounts[str(Path(SETTINGS).parent)]]
    assert Path(SETTINGS).name in found("ConfigMap", mapped["configMap"]["name"])


def test_selectors_find_the_pods_that_they_are_for():
    deployment = found("Deployment")
    assert selected(deployment["selector"]) == selected(found("Service")["selector"]) == {"front"}
    assert selected(found("PodDisruptionBudget", "jaxlora")["selector"]) == {"front", "head"}
    assert selected(found("PodDisruptionBudget", "jaxlora-servers")["selector"]) == {"server"}
    assert selected(found("InferencePool")["selector"]) == {"front"}
    assert deployment["replicas"] == 1
    assert deployment["strategy"] == {"type": "Recreate"}


def test_one_server_may_go_at_a_time_and_neither_the_front_nor_the_head(settings):
    assert found("PodDisruptionBudget", "jaxlora")["minAvailable"] == 2
    assert found("PodDisruptionBudget", "jaxlora-servers")["minAvailable"] == settings.cluster.replicas


def test_the_front_joins_the_cluster_with_its_token():
    (cluster,) = names("RayCluster")
    environment = {one["name"]: one for one in front()["env"]}
    assert environment["RAY_HEAD"]["value"] == f"{cluster}-head-svc:6379"
    assert ray()["authOptions"] == {"mode": environment["RAY_AUTH_MODE"]["value"]} == {"mode": "token"}
    secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster, "key": "auth_token"}
    assert cluster not in names("ServiceAccount") | names("ConfigMap")


# ---- the command


def test_the_front_waits_for_ray_and_then_is_the_cluster(tmp_path):
    """Its script, with programs in place of ours that say what they are asked; Ray does not answer at first."""
    programs = {
        "ray": '[ -e tried ] && echo "ray $*" >> told; tried=$(ls tried 2>/dev/null); touch tried; [ -n "$tried" ]',
        "sleep": 'echo "sleep $*" >> told',
        "jaxlora": 'echo "jaxlora $*" >> told; exit 3',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = [*front()["command"], *front()["args"]]
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RAY_HEAD": "head:6379"}
    done = subprocess.run(command, cwd=tmp_path, env=env, check=False, timeout=20)
    assert done.returncode == 3
    assert (tmp_path / "told").read_text().splitlines() == [
        "sleep 5",
        "ray start --address head:6379 --num-cpus 0 --object-store-memory 268435456",
        f"jaxlora up {SETTINGS} --address head:6379",
    ]


def test_its_command_line_is_one_of_ours(monkeypatch, tmp_path, settings):
    (words,) = re.findall(r"exec jaxlora (.*)", front()["args"][0])
    (tmp_path / "serve.toml").write_text(found("ConfigMap", "jaxlora")["serve.toml"])
    started = []
    ours = SimpleNamespace(main=lambda config, address: started.append((config, address)))
    monkeypatch.setitem(sys.modules, "serve.cluster.up", ours)
    monkeypatch.setattr("serve.cluster.ray_environment.set_environment", lambda address: None)
    line = words.replace(SETTINGS, str(tmp_path / "serve.toml")).replace('"$RAY_HEAD"', "head:6379")
    result = CliRunner().invoke(cli.app, line.split())
    assert result.exit_code == 0, result.output
    assert started == [(settings, "head:6379")]


# ---- ports, probes, time


def test_all_ports_are_that_of_the_settings(settings):
    assert front()["ports"] == [{"name": "http", "containerPort": settings.port}]
    assert [port["targetPort"] for port in found("Service")["ports"]] == ["http"]
    assert found("InferencePool")["targetPorts"] == [{"number": settings.port}]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        ((_, asked),) = [(k, v) for k, v in front()[probe].items() if k in ("httpGet", "tcpSocket")]
        assert asked["port"] == "http"


def test_no_replica_that_is_gone_ends_the_front():
    """Beyond the start its probes ask for nothing that a replica answers."""
    asked = {f"GET {front()['startupProbe']['httpGet']['path']}"}
    assert asked <= relay.PROBES
    assert {path.removeprefix("GET ") for path in asked} <= OPEN_PATHS
    assert "tcpSocket" in front()["readinessProbe"]
    assert "tcpSocket" in front()["livenessProbe"]


def test_rays_nodes_are_probed_without_its_dashboard():
    """KubeRay adds probes of its own where there are none, and these need more of Ray than its core."""
    ports = {"head": "6379", "server": group()["rayStartParams"]["node-manager-port"]}
    assert f"-svc:{ports['head']}" in {one["name"]: one for one in front()["env"]}["RAY_HEAD"]["value"]
    for role, port in ports.items():
        (one,) = containers(role)
        ((name, number),) = [(p["name"], p["containerPort"]) for p in one["ports"]]
        assert str(number) == port
        assert [one[probe]["tcpSocket"] for probe in ("readinessProbe", "livenessProbe")] == [{"port": name}] * 2


def test_the_cluster_has_time_to_start_and_to_end(settings):
    startup = front()["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 2 * STARTS_S  # the keeper, then the replicas
    last_s = float(re.search(r"^LAST_S = ([\d.]+)", (ROOT / "serve/cluster/up.py").read_text(), re.M)[1])
    needed = 2 * (settings.grace_s + STOP_S + last_s)  # the front, then all servers at once
    assert TEMPLATES["front"]["spec"]["terminationGracePeriodSeconds"] >= needed


def test_rays_memory_has_room():
    (shared,) = [v["emptyDir"] for v in TEMPLATES["front"]["spec"]["volumes"] if v["name"] == "shm"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in front()["volumeMounts"]
    (store,) = map(int, re.findall(r"--object-store-memory (\d+)", front()["args"][0]))
    assert (shared["medium"], store <= bytes_of(shared["sizeLimit"])) == ("Memory", True)
    for spec in (ray()["headGroupSpec"], group()):
        (one,) = spec["template"]["spec"]["containers"]
        assert int(spec["rayStartParams"]["object-store-memory"]) <= bytes_of(one["resources"]["limits"]["memory"]) / 4


# ---- rights


@pytest.mark.fault("S4")
def test_nobody_is_root_and_everybody_is_confined():
    (user,) = re.findall(r"^USER (\d+)", (ROOT / "deploy/docker/Dockerfile").read_text(), re.M)
    confined = [one["securityContext"] for role in TEMPLATES for one in containers(role)]
    for context in [*confined, ray()["autoscalerOptions"]["securityContext"]]:
        assert (context["readOnlyRootFilesystem"], context["allowPrivilegeEscalation"]) == (True, False)
        assert context["capabilities"] == {"drop": ["ALL"]}
    for template in TEMPLATES.values():
        context = template["spec"]["securityContext"]
        assert (context["runAsNonRoot"], context["runAsUser"]) == (True, int(user))
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.fault("S4")
def test_only_the_autoscaler_has_an_account_that_may_anything():
    (account,) = [one for one in OBJECTS if one["kind"] == "ServiceAccount"]
    assert account["automountServiceAccountToken"] is False
    for role in ("front", "server"):
        assert TEMPLATES[role]["spec"]["automountServiceAccountToken"] is False
    assert not names("Role") | names("ClusterRole") | names("RoleBinding") | names("ClusterRoleBinding")


@pytest.mark.fault("S4")
def test_rays_ports_are_reached_by_its_own_pods_only_and_the_front_by_requests():
    inside, requests = found("NetworkPolicy", "jaxlora-cluster"), found("NetworkPolicy", "jaxlora")
    assert selected(inside["podSelector"]) == set(TEMPLATES)
    assert inside["policyTypes"] == ["Ingress", "Egress"]
    (into,), (among, out) = inside["ingress"], inside["egress"]
    for peers in (into["from"], among["to"]):
        assert [selected(peer["podSelector"]) for peer in peers] == [set(TEMPLATES)]
        assert all(set(peer) == {"podSelector"} for peer in peers)  # of this namespace
    assert {port["port"] for port in out["ports"]} == {53, 443, 6443, 5432}
    assert selected(requests["podSelector"]) == {"front"}
    assert [rule["ports"] for rule in requests["ingress"]] == [[{"port": "http"}]]
    assert ray()["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


# ---- the gateway


def test_the_gateway_sends_to_what_there_is(settings):
    rules = found("HTTPRoute")["rules"]
    generates, rest = rules
    ((pool,), (service,)) = generates["backendRefs"], rest["backendRefs"]
    assert (pool["group"], pool["kind"]) == ("inference.networking.k8s.io", "InferencePool")
    assert pool["name"] in names("InferencePool")
    assert service["name"] in names("Service")
    assert service["port"] in {port["port"] for port in found("Service")["ports"]}
    objective = found("InferenceObjective")["poolRef"]
    assert (objective["kind"], objective["group"]) == ("InferencePool", pool["group"])
    assert objective["name"] in names("InferencePool")
    hours = [int(rule["timeouts"]["request"].removesuffix("h")) for rule in rules]
    assert min(hours) * 3600 >= settings.max_request_s


def test_the_picker_gets_what_generates_and_metrics_stay_inside():
    generates, rest = found("HTTPRoute")["rules"]
    for match in generates["matches"]:
        assert match["path"]["type"] == "Exact"
        assert relay.GENERATES.fullmatch(f"{match['method']} {match['path']['value']}")
    prefixes = [match["path"]["value"] for match in rest["matches"]]
    assert not any("/metrics".startswith(prefix) for prefix in prefixes)
    assert any("/v1/files".startswith(prefix) for prefix in prefixes)


def test_the_picker_knows_our_pods_by_their_label():
    picker = yaml.safe_load(found("ConfigMap", "jaxlora-picker")["picker.yaml"])
    configured = {plugin["type"]: plugin.get("parameters", {}) for plugin in picker["plugins"]}
    (engine,) = configured["core-metrics-extractor"]["engineConfigs"]
    assert TEMPLATES["front"]["metadata"]["labels"]["llm-d.ai/engine-type"] == engine["name"]
    referred = {one["pluginRef"] for profile in picker["schedulingProfiles"] for one in profile["plugins"]}
    for source in picker["dataLayer"]["sources"]:
        referred |= {source["pluginRef"], *(one["pluginRef"] for one in source["extractors"])}
    assert referred == set(configured) - {"single-profile-handler"}
