"""README and docs say what holds: every block is run, loaded or parsed, every link resolves, and README stays short.

Python runs as it stands against the whole server over a tiny model, page by page; only addresses, names and sizes are others.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import tomllib
import warnings
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
import typer
from fake_backend import serving
from whole_world import joined, whole_config

from jaxlora.config.serving import ServeConfig
from jaxlora.config.training import TrainConfig, load
from jaxlora.core.progress import Progress
from jaxlora.storage.adapter_store import AdapterStore
from serve.cli import main as cli
from train.data.load import LengthLimit, load_file

pytest_plugins = ["serve_fixtures"]
ROOT = Path(__file__).parents[2]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MOST_LINES, MOST_SNIPPET_LINES = 130, 10  # of README
URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def read(page: str) -> str:
    """A page's text."""
    return (ROOT / page).read_text()


BLOCKS = [Block(p, *found) for p in PAGES for found in re.findall(r"^```(\w*)\n(.*?)^```$", read(p), re.M | re.S)]


def of(language: str) -> list[Block]:
    """All blocks of a language, page by page."""
    return [block for block in BLOCKS if block.language == language]


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)


def test_every_block_is_of_a_kind_that_is_checked_here():
    assert {block.language for block in BLOCKS} == {"python", "sh", "toml", "json", "jsonl", ""}
    for picture in of(""):  # trees and diagrams; what can be run says in which language
        assert not re.search(r"^\s*((uv|curl|pip|from|import) |[{\[])", picture.text, re.M), picture


# ---- Python

SERVER = {  # sizes of the documents are those of a real model
    '"smollm2"': '"tiny"',
    '"r": 8': '"r": 2',
    "rank=8": "rank=2",
    '"max_steps": 30, "checkpoint_every": 10': '"max_steps": 6, "checkpoint_every": 3',
    "time.sleep(1)": "time.sleep(0.01)",
}
TINY_JOB = 'extra_body={"lora": {"r": 2}, "max_steps": 6, "checkpoint_every": 3}'
SUBSTITUTIONS: Mapping[str, Mapping[str, str]] = {
    "README.md": {**SERVER, 'suffix="support")': f'suffix="support", {TINY_JOB})'},
    "docs/api.md": SERVER,
    "docs/serving.md": SERVER,
}
NOTEBOOKS = {"README.md", "docs/training.md"}  # blocks with a Session: test_serve_session has one over the tiny model


@pytest.fixture(scope="module")
def url(world, tmp_path_factory) -> Iterator[str]:
    """The whole server over the tiny model, with two adapters."""
    settings = whole_config(tmp_path_factory.mktemp("docs"))
    store = AdapterStore(settings.adapters, host_bytes=10**8)
    with contextlib.closing(store), joined(world, settings, store) as server:
        for name in ("dates", "roman"):
            store.put(replace(world.adapters[0], ref=store.mint("local", name)))
        server.runner.start()
        server.own.jobs.start(Progress(None))
        try:
            with serving(server.app) as it:
                yield it
        finally:
            server.runner.stop()


@pytest.fixture
def run_page(url, tmp_path, monkeypatch, capsys) -> Iterator[Callable[[str], tuple[dict, list[str]]]]:
    """Runs a page's blocks one after another in a folder with a training file; returns its names and the lines it printed."""
    monkeypatch.chdir(tmp_path)
    lines = [{"prompt": f"{i} is", "completion": f" {i}"} for i in range(6)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names: dict = {}

    def run(page: str) -> tuple[dict, list[str]]:
        for block in of("python"):
            if block.page == page and "Session" not in block.text:
                code = block.text
                for real, tiny in SUBSTITUTIONS[page].items():
                    code = code.replace(real, tiny)
                with warnings.catch_warnings():
                    if "gradientai" in code:
                        warnings.simplefilter("ignore")  # of what the SDK's own code warns
                    warnings.simplefilter("ignore", ResourceWarning)  # documents open a file as people do
                    exec(compile(code.replace(URL, url), page, "exec"), names)
        return names, capsys.readouterr().out.splitlines()

    yield run
    if "client" in names:
        names["client"].close()


def test_every_page_with_python_is_run():
    notebooks = [block for block in of("python") if "Session" in block.text]
    assert {block.page for block in of("python") if block not in notebooks} == set(SUBSTITUTIONS)
    assert sorted(block.page for block in notebooks) == sorted(NOTEBOOKS)


def test_readme_asks_and_fine_tunes(run_page):
    names, _ = run_page("README.md")
    assert names["answer"].adapter_version == 1
    assert names["job"].status == "succeeded"
    assert names["client"].models.retrieve(names["job"].fine_tuned_model)


def test_the_page_of_the_api_asks_fine_tunes_and_speaks_gradient(run_page):
    names, shown = run_page("docs/api.md")
    assert names["answer"].choices[0].message.content.startswith("{")
    assert names["picked"].choices[0].text in ("May", "June")
    (job,) = [line for line in shown if line.startswith("succeeded")]
    assert job.count("ckpt-step-") == 2
    losses = [float(line) for line in shown[shown.index(job) + 1 :][:3]]
    assert losses == sorted(losses, reverse=True)
    assert np.isfinite(losses).all()


def test_the_page_of_serving_streams_and_follows(run_page):
    _, shown = run_page("docs/serving.md")
    assert {"tiny", "dates", "roman"} <= set(re.findall(r"'(.*?)'", shown[0]))
    assert shown[-1] == "1"  # the version that made the last chunk


# ---- settings and data

BASES = {
    "# server.toml": ("configs/serve_smollm2.toml", ServeConfig),
    "# train.toml": ("configs/train_two_tenants.toml", TrainConfig),
}


def merged(base: Mapping, over: Mapping) -> dict:
    """The settings of `over`, and of `base` where it says nothing."""
    both = {
        k: merged(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }
    return {**base, **both}


def toml(value: object) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


@pytest.mark.parametrize("block", of("toml"), ids=lambda block: block.page)
def test_settings_are_taken_by_the_loader(block, tmp_path):
    """A fragment is laid over the example of its kind, which its first line names; a whole file stands alone."""
    base, cls = BASES[block.text.splitlines()[0]]
    table = tomllib.loads(block.text)
    whole = table if "out" in table else merged(tomllib.loads(read(base)), table)
    (tmp_path / "it.toml").write_text("\n".join(f"{k} = {toml(v)}" for k, v in whole.items()))
    assert load(tmp_path / "it.toml", cls)


def test_lines_of_data_are_read_as_training_reads_them(world, tmp_path):
    (block,) = of("jsonl")
    (tmp_path / "it.jsonl").write_text(block.text)
    for i, line in enumerate(lines := block.text.splitlines()):
        (tmp_path / "it.jsonl").write_text(line)
        limit = LengthLimit(lane_tokens=63)
        assert len(load_file(tmp_path / "it.jsonl", world.tokenizer, limit=limit, loss=None).units) == 1, lines[i]


def test_the_error_that_is_shown_is_the_servers(url):
    (block,) = of("json")
    asked = {"model": "nobody", "prompt": "hi"}
    assert httpx2.post(f"{url}/v1/completions", json=asked, timeout=60).json() == json.loads(block.text)


# ---- commands

NOT_RUN = {  # programs whose lines are not looked into further
    "pip": "uv is here already",
    "uvx": "fetches a tool",
    "export": "an environment variable",
    "kill": "test_house_configs and test_house_drain send signals",
    "apt-get": "changes the machine; test_house_deploy checks the files that are named",
    "pipx": "likewise",
    "useradd": "likewise",
    "install": "likewise",
    "umask": "likewise",
    "git": "likewise",
    "cd": "likewise",
    "for": "likewise",
    "sed": "likewise",
    "promtool": "test_house_deploy_schemas runs it",
    "systemctl": "likewise",
    "journalctl": "likewise",
    "docker": "likewise",
    "kubectl": "likewise",
}
LINES = [
    pytest.param(part, id=f"{block.page}: {part[:60]}")
    for block in of("sh")
    for line in block.text.splitlines()
    for part in line.split(" && ")
]
CLI = typer.main.get_command(cli.app)
USAGE_ERROR = typer.BadParameter.__mro__[1]  # click's, of which typer has its own copy
PROJECT = tomllib.loads(read("pyproject.toml"))


def check_jaxlora(words: list[str]) -> None:
    """Raises KeyError for an unknown command, click's UsageError for an unknown option or a missing argument."""
    command = CLI
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("jaxlora", words)


def check_uv(words: list[str]) -> None:
    """`uv sync` names extras, `uv run` our command, or a tool as CI runs it with markers that there are."""
    verb, *rest = words
    extras = [rest[i + 1] for i, word in enumerate(rest) if word == "--extra"]
    groups = [rest[i + 1] for i, word in enumerate(rest) if word == "--group"]
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert set(groups) <= set(PROJECT["dependency-groups"])
    if verb == "run" and rest[0] == "jaxlora":
        check_jaxlora(rest[1:])
    elif verb == "run" and "pytest" in rest:
        named = rest[rest.index("-m") + 1] if "-m" in rest else "slow"
        assert named in {marker.split(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    elif verb == "run":
        assert shlex.join(["run", *rest]) in read(".ci/run")
    else:
        assert verb in ("sync", "build", "venv", "pip")


def check_curl(words: list[str], url: str) -> None:
    """What curl would ask of a server, asked of ours."""
    data = words[words.index("-d") + 1] if "-d" in words else None
    headers = dict([words[words.index("-H") + 1].split(": ")]) if "-H" in words else {}
    method = "POST" if data is not None else "GET"
    answer = httpx2.request(method, words[0].replace(URL, url), content=data, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("line", LINES)
def test_commands_exist_with_these_options(line, request):
    words = shlex.split(line.split(" < ")[0])
    while "=" in words[0] or words[0] == "sudo":  # environment variables, and as whom
        del words[: 3 if words[1] == "--user" else 1]
    program, *rest = words
    program = Path(program).name
    if program == "uv":
        check_uv(rest)
    elif program == "jaxlora":
        check_jaxlora(rest)
    elif program == "curl":
        check_curl(rest, request.getfixturevalue("url"))
    else:
        assert program in NOT_RUN


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("run jaxlora sreve", KeyError),
        ("run jaxlora serve --supervize", USAGE_ERROR),
        ("run jaxlora export", USAGE_ERROR),
        ("run pytest -m slwo", AssertionError),
        ("sync --extra nothing", AssertionError),
    ],
)
def test_a_wrong_command_would_be_found(line, error):
    with pytest.raises(error):
        check_uv(line.split())


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_exist(page):
    assert set(re.findall(r"`jaxlora ([a-z]+)", prose(page))) <= set(CLI.commands)


# ---- links, pictures, length


def anchors(text: str) -> list[str]:
    """What headings are called in links."""
    names = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)]
    return [name if (n := names[:i].count(name)) == 0 else f"{name}-{n}" for i, name in enumerate(names)]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_files_that_are_named_exist():
    tops = r"serve|train|jaxlora|pallas_kernels|deploy|benchmarks|configs|tests|docs|\.ci|\.github"
    named = {
        (p, path) for p in PAGES for path in re.findall(rf"`((?:{tops})/[\w./-]*[\w/])", prose(p)) if p != "docs/LOG.md"
    }
    assert [f"{p}: {path}" for p, path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_log_begins_with_its_headings():
    text = read("docs/LOG.md")
    contents, body = re.split(r"^(?=## \d)", text, maxsplit=1, flags=re.M)
    titles = re.findall(r"^###? (.*)$", body, re.M)
    assert re.findall(r"^ *- \[(.*)\]\(#", contents, re.M) == titles


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_svg_and_fetch_nothing(picture):
    text = picture.read_text()
    assert xml.etree.ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert set(re.findall(r"\w+://[^\s\"')]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert f"docs/{picture.name}" in read("README.md") or f"]({picture.name})" in read("docs/LOG.md")


def test_readme_is_read_in_three_minutes():
    text = read("README.md")
    assert text.count("\n") <= MOST_LINES
    assert "pip install uv && uv run jaxlora demo\nuv run pytest\n" in text
    snippets = [block.text for block in of("python") if block.page == "README.md"]
    assert [s.count("\n") <= MOST_SNIPPET_LINES for s in snippets] == [True] * 3
