"""The stack of deploy/docker for real, of what there is without Docker: PostgreSQL and Prometheus of Debian, moto as S3.

`tests/run_postgres.sh tests/system/test_house_stack.py`.  The files are those of deploy/; only addresses and the model differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
import yaml
from small_world import tiny_path

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus: apt-get install prometheus"),
]
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
STARTS_S = 300
BUCKET = "jaxlora"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def running(log: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A process that writes its log and is killed, with its children, if it is still there at the end."""
    with log.open("a") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | environment, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until[T](what: Callable[[], T | None], log: Path, within_s: float = STARTS_S) -> T:
    """The first result that is true, asked again while nobody answers."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx2.HTTPError, OSError):
            if found := what():
                return found
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def environment(folder) -> Iterator[dict[str, str]]:
    """What compose gives the server, with an S3 server that runs."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", folder / "s3.log"
    moto = ("uvx", "--from", "moto[server]==5.2.*", "moto_server", "--host", "127.0.0.1", "--port", str(port))
    given = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())["services"]["jaxlora"]["environment"]
    with running(log, *moto):
        until(lambda: httpx2.get(url).status_code, log)
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield given | {"AWS_ENDPOINT_URL": url, "AWS_SECRET_ACCESS_KEY": "any", "PGPASSWORD": "none is asked for"}


@pytest.fixture(scope="module")
def settings(folder) -> Path:
    """deploy/docker/serve.toml with the addresses of here, the tiny model, and a database of its own."""
    import psycopg

    server, name = os.environ["JAXLORA_TEST_POSTGRES"], f"stack_{uuid.uuid4().hex}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(f"create database {name}")
    text = (DEPLOY / "docker/serve.toml").read_text()
    changes = {
        "postgresql+psycopg://jaxlora@postgres/jaxlora": f"postgresql+psycopg://{server.partition('://')[2]}/{name}",
        "port = 8000": f"port = {free_port()}",
        'path = "smollm2"': f'path = "{tiny_path("tiny-llama-tied")}"',
        "/var/lib/jaxlora": str(folder / "state"),
    }
    for ours, here in changes.items():
        assert ours in text
        text = text.replace(ours, here)
    (folder / "serve.toml").write_text(text)
    return folder / "serve.toml"


@pytest.fixture(scope="module")
def served(folder, settings, environment) -> Iterator[tuple[str, str, subprocess.Popen]]:
    """(URL, the first key, the process) of the server, once it is ready."""
    jaxlora = (sys.executable, "-m", "serve.cli.main")
    create = [*jaxlora, "keys", "create", "ops", "--role", "admin", "--config", str(settings)]
    made = subprocess.run(create, capture_output=True, text=True, env=os.environ | environment, check=False)
    assert made.returncode == 0, made.stderr
    url, log = f"http://127.0.0.1:{re.search(r'port = (\d+)', settings.read_text())[1]}", folder / "server.log"
    with running(log, *jaxlora, "serve", str(settings), **environment, JAX_PLATFORMS="cpu") as process:
        until(lambda: httpx2.get(f"{url}/ready").status_code == 200 or process.poll() is not None, log)
        assert process.poll() is None, log.read_text()[-3000:]
        yield url, made.stdout.strip(), process


@pytest.fixture(scope="module")
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key=served[1], timeout=60, max_retries=0) as it:
        yield it


@pytest.fixture(scope="module")
def prometheus(folder, served) -> Iterator[str]:
    """Its URL; it asks the server each second and applies the rules."""
    text = (DEPLOY / "prometheus/prometheus.yml").read_text()
    text = text.replace("jaxlora:8000", served[0].removeprefix("http://")).replace("15s", "1s")
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(DEPLOY / "prometheus/alerts.yml", folder)
    url, log = f"http://127.0.0.1:{free_port()}", folder / "prometheus.log"
    options = {
        "config.file": folder / "prometheus.yml",
        "storage.tsdb.path": folder / "tsdb",
        "web.listen-address": url.removeprefix("http://"),
    }
    with running(log, "prometheus", *(f"--{name}={value}" for name, value in options.items())):
        until(lambda: httpx2.get(f"{url}/-/ready").status_code == 200, log)
        yield url


def query(url: str, expression: str) -> list[dict]:
    answer = httpx2.get(f"{url}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    return answer["data"]["result"]


def test_nobody_is_served_without_the_key(served):
    assert httpx2.get(f"{served[0]}/v1/models").status_code == 401
    assert httpx2.get(f"{served[0]}/metrics").status_code == 200  # the network of the stack


def test_a_file_is_in_the_object_storage_and_its_record_in_the_database(client, folder, environment, settings):
    lines = [json.dumps({"prompt": f"{i} is", "completion": f" {i}"}) for i in range(8)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    with (folder / "train.jsonl").open("rb") as file:
        sent = client.files.create(file=file, purpose="fine-tune")
    listed = httpx2.get(f"{environment['AWS_ENDPOINT_URL']}/{BUCKET}", params={"list-type": "2", "prefix": "server/"})
    assert sent.id in listed.text
    assert "server/lease" in listed.text
    import psycopg

    database = re.search(r'database = "(.*)"', settings.read_text())[1].replace("+psycopg", "")
    with psycopg.connect(database) as connection:
        assert connection.execute("select count(*) from files").fetchone() == (1,)


def test_prometheus_sees_what_was_asked_and_knows_the_rules(client, prometheus, folder):
    base = client.models.list().data[0].id
    answer = client.completions.create(
        model=base, prompt="one two three", max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 5
    log = folder / "prometheus.log"
    counted = 'sum(vllm:request_success_total{finished_reason="length"})'
    until(lambda: [r for r in query(prometheus, counted) if float(r["value"][1]) >= 1], log, within_s=60)
    (target,) = httpx2.get(f"{prometheus}/api/v1/targets").json()["data"]["activeTargets"]
    assert (target["health"], target["labels"]["job"], target["lastError"]) == ("up", "jaxlora", "")

    def evaluated() -> list[dict]:
        (group,) = httpx2.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
        return group["rules"] if all(rule["health"] != "unknown" for rule in group["rules"]) else []

    rules = until(evaluated, log)
    (group,) = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_each_panel_of_the_dashboard_has_data(client, prometheus, folder):
    """But the refusals, of which there may be none yet, are asked for first; ratios of nothing are no number."""
    with contextlib.suppress(openai.NotFoundError):
        client.models.retrieve("nobody")
    panels = [
        p for p in json.loads((DEPLOY / "grafana/dashboards/jaxlora.json").read_text())["panels"] if "targets" in p
    ]
    wanted = [
        t["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*") for p in panels for t in p["targets"]
    ]
    for expression in wanted:
        until(lambda expression=expression: query(prometheus, expression), folder / "prometheus.log", within_s=60)


def test_the_server_ends_as_asked_and_gives_the_storage_back(served, folder):
    process = served[2]
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0, (folder / "server.log").read_text()[-3000:]
