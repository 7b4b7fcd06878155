"""Without the extra `ray` nothing imports it but `jaxlora up`, which says what to install."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from cluster_world import CONFIG
from small_world import tiny_path
from typer.testing import CliRunner

from serve.cli.main import app
from serve.cluster.ray_environment import AUTH_MODE, AUTH_TOKEN, DEDUPLICATES, JOINS, USAGE_STATS, UV, set_environment


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Is as it was at the end, and without Ray's settings meanwhile."""
    for name in (AUTH_MODE, AUTH_TOKEN, DEDUPLICATES, JOINS, USAGE_STATS, UV):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "serve.toml").write_text(CONFIG.format(model=tiny_path("tiny-llama-tied")))
    return tmp_path / "serve.toml"


def test_everything_but_up_does_without():
    code = "import sys; sys.modules['ray'] = None\nimport serve.cli.main, serve.session, serve.server.build"
    code += "\nimport serve.cluster.front, serve.cluster.replica, serve.cluster.relay"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_up_names_the_extra(monkeypatch, settings):
    for module in ("serve.cluster.up", "serve.cluster.ray_servers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    result = CliRunner().invoke(app, ["up", str(settings)])
    assert (result.exit_code, "up needs the extra `ray`; install jaxlora[ray]" in result.output) == (2, True)


def test_a_mistake_in_the_settings_is_told_before(settings):
    settings.write_text(settings.read_text().replace("replicas = 2", "replicas = 0"))
    result = CliRunner().invoke(app, ["up", str(settings)])
    assert (result.exit_code, "cluster: replicas must be at least 1" in result.output, os.environ.get(AUTH_MODE)) == (
        2,
        True,
        None,
    )


def test_a_cluster_of_our_own_has_a_token_that_nobody_knows():
    tokens = set()
    for _ in range(2):
        set_environment(None)
        tokens.add(os.environ[AUTH_TOKEN])
    assert len(tokens) == 2
    assert min(map(len, tokens)) >= 64
    assert os.environ[AUTH_MODE] == "token"
    assert [os.environ[name] for name in (JOINS, USAGE_STATS, DEDUPLICATES, UV)] == ["0"] * 4


def test_a_cluster_that_is_there_keeps_its_own(monkeypatch):
    monkeypatch.setenv(USAGE_STATS, "1")
    set_environment("10.0.0.1:6379")
    found = [os.environ.get(name) for name in (AUTH_MODE, AUTH_TOKEN, JOINS, USAGE_STATS)]
    assert found == [None, None, None, "1"]
