"""README's Python, run as it stands against the whole server over a tiny model: only addresses, names and sizes are others."""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from fake_house import serving
from whole_world import joined, whole_config

from jaxlora.lora import AdapterRef
from jaxlora.store import AdapterStore

pytest_plugins = ["serve_fixtures"]
README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
SMALLER = {  # README's sizes are those of a real model
    '"smollm2"': '"tiny"',
    '"r": 8': '"r": 2',
    "rank=8": "rank=2",
    '"max_steps": 30, "checkpoint_every": 10': '"max_steps": 6, "checkpoint_every": 3',
    "time.sleep(1)": "time.sleep(0.01)",
}


def block(mark: str) -> str:
    """The one block of Python that has this in it."""
    found = [b for b in BLOCKS if mark in b]
    assert len(found) == 1, f"{len(found)} blocks with {mark}"
    return found[0]


@pytest.fixture(scope="module")
def url(world, tmp_path_factory):
    settings = whole_config(tmp_path_factory.mktemp("readme"))
    store = AdapterStore(settings.adapters, host_bytes=10**8)
    with contextlib.closing(store), joined(world, settings, store) as server:
        store.add("local", "dates", world.adapters[0])
        assert store.latest("local", "dates") == AdapterRef("local", "dates", 1)
        server.runner.start()
        server.own.jobs.start()
        try:
            with serving(server.app) as it:
                yield it
        finally:
            server.runner.stop()


def run(code: str, url: str, names: dict) -> None:
    """The block, with the server's address in the place of README's."""
    for ours, smaller in SMALLER.items():
        code = code.replace(ours, smaller)
    exec(compile(code.replace("http://127.0.0.1:8000", url), "README.md", "exec"), names)


def test_openai_asks_trains_and_asks_again(url, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"{i} is", "completion": f" {i}"} for i in range(6)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names: dict = {}
    run(block("client = OpenAI("), url, names)
    assert "dates" in capsys.readouterr().out
    run(block("response_format"), url, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # README opens a file as people do
        run(block("fine_tuning.jobs.create"), url, names)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("succeeded")
    assert last.count("ckpt-step-") == 2
    names["client"].close()


def test_gradient_trains_by_calls(url, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the SDK's own code warns of
        run(block("from gradientai import"), url, {})
    losses = [float(x) for x in capsys.readouterr().out.split()[:3]]
    assert losses == sorted(losses, reverse=True)
    assert np.isfinite(losses).all()


def test_every_block_is_run_somewhere():
    """The one of the notebook is that page's, which test_serve_session runs."""
    marks = ("client = OpenAI(", "response_format", "fine_tuning.jobs.create", "from gradientai import", "Session.open")
    assert sorted(map(block, marks)) == sorted(BLOCKS)
