"""Every file under configs/ does what its header says, with fewer steps; and what a user gets wrong is one line."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from typer.testing import CliRunner

from jaxlora.config.training import TrainConfig, load
from serve.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TRAIN, SERVE = CONFIGS / "train_two_tenants.toml", CONFIGS / "serve_smollm2.toml"
DPO = CONFIGS / "train_dpo.toml"
ASK = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 8,
    "temperature": 0,
}


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, list(arguments))


def changed(source: Path, target: Path, **values: str) -> Path:
    """A copy of a file of settings with other values for some keys; its paths still start at configs/."""
    text = source.read_text()
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^{key} = \S+", f"{key} = {value}", text)
        assert count, key
    target.write_text(text.replace('"data/', f'"{CONFIGS}/data/'))
    return target


def test_every_config_is_tested_and_says_how_to_run_it():
    assert sorted(CONFIGS.glob("*.toml")) == [SERVE, DPO, TRAIN]
    for path in (SERVE, DPO, TRAIN):
        header = path.read_text().split("\n\n")[0]
        assert f"command    jaxlora {path.name.split('_')[0]} configs/{path.name}" in header
        assert all(f"#   {word} " in header for word in ("hardware", "expected"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """`out` of the training config after two steps of either tenant."""
    folder = tmp_path_factory.mktemp("configs")
    short = {
        "steps": "2",
        "warmup_steps": "0",
        "save_every": "2",
        "batch": "2",
        "lane_tokens": "96",
        "dtype": '"float32"',
    }
    path = changed(TRAIN, folder / "train.toml", out=f'"{folder}/out"', **short)
    result = run("train", str(path))
    assert result.exit_code == 0, result.output
    assert f"jaxlora serve --model smollm2 --adapters {folder}/out/store" in result.output
    return folder / "out"


@pytest.mark.slow
def test_the_training_config_trains_both_tenants(trained):
    tenants = load(TRAIN, TrainConfig).tenant
    assert [t.name for t in tenants] == ["roman", "plural"]
    for tenant in tenants:
        with (trained / tenant.name / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows] == ["1", "2"]
        assert all(row["finite"] == "True" and int(row["tokens"]) > 0 for row in rows)
        assert sorted(p.name for p in (trained / tenant.name / "state").iterdir()) == ["2"]
        settings = json.loads((trained / tenant.name / "peft" / "adapter_config.json").read_text())
        assert (settings["r"], settings["use_rslora"]) == (tenant.rank, tenant.rslora)
        assert settings["target_modules"] == sorted(tenant.targets)
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_preference_config_comes_to_prefer_the_chosen_answers(tmp_path):
    short = {"steps": "3", "warmup_steps": "0", "save_every": "3", "dtype": '"float32"', "schedule": '"constant"'}
    result = run("train", str(changed(DPO, tmp_path / "dpo.toml", out=f'"{tmp_path}/out"', **short)))
    assert result.exit_code == 0, result.output
    with (tmp_path / "out/brief/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[2] < losses[0] - 0.03
    assert rows[2]["accuracy"] == "1"
    assert re.search(r"brief *│ done *│ 0\.693 *│ 0\.[0-6]\d\d *│ 0% *│ (88|100)%", result.output), result.output


@pytest.mark.slow
def test_the_serving_config_serves_the_base_and_what_was_trained(trained, tmp_path):
    """On a free port, from the store the training config left; one adapter more comes as a PEFT folder."""
    path = changed(SERVE, tmp_path / "serve.toml", dtype='"float32"', adapters=f'"{trained}/store"')
    path.write_text(path.read_text() + f'\n[[load]]\nname = "imported"\npath = "{trained}/plural/peft"\n')
    command = [sys.executable, "-m", "serve.cli.main", "serve", str(path), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            lines = []
            while not any("serving smollm2 and 3 adapters on http" in line for line in lines):
                lines.append(process.stdout.readline())
                assert lines[-1], (lines, process.stderr.read())
            assert "loaded imported as version 1\n" in lines
            with httpx2.Client(base_url=lines[-1].split()[-1], timeout=120) as client:
                names = [m["id"] for m in client.get("models").json()["data"]]
                answers = [client.post("chat/completions", json=ASK | {"model": m}).json() for m in sorted(names)]
            path.write_text(path.read_text().replace("quantum_ms = 200", 'pin = ["imported"]\nquantum_ms = 50'))
            assert process.stdout.readline().startswith("now: jaxlora chat")
            process.send_signal(signal.SIGHUP)
            assert process.stdout.readline() == f"tuned by {path}\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert sorted(names) == ["imported", "plural", "roman", "smollm2"]
    texts = [a["choices"][0]["message"]["content"] for a in answers]
    assert all(texts)
    assert "Paris" in texts[-1]
    assert texts[0] == texts[1]  # the same adapter, from its PEFT folder and from the store
    assert (process.returncode, errors.splitlines()[-1]) == (130, "jaxlora: interrupted")
    assert "Traceback" not in errors


BAD = [
    pytest.param(["train", "none.toml"], "jaxlora: none.toml: cannot be read", id="no-file"),
    pytest.param(["train", str(CONFIGS)], "cannot be read", id="a-folder"),
    pytest.param(["serve", "--model", "smolm2"], "did you mean smollm2?", id="close-to-a-model"),
    pytest.param(["serve", "--model", "nothing-here"], "no such directory or .gguf file", id="no-model"),
    pytest.param(["serve", "--model", "acme/no-such-model"], "pass a local model directory or a GGUF", id="offline"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_a_user_gets_wrong_is_one_line_and_exit_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.startswith("jaxlora: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_a_config_of_the_other_command_has_a_line_for_each_mistake():
    result = run("train", str(SERVE))
    assert (result.exit_code, result.stdout) == (2, "")
    first, *lines = result.stderr.splitlines()
    assert first == f"jaxlora: {SERVE}: {len(lines)} mistakes"
    assert all(line.startswith(f"{SERVE}:") for line in lines)
    assert ": host: unknown key; known here: model, " in result.stderr
    assert any(line.endswith(": port: unknown key") for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("steps", "0", "steps must be at least 1"),
        ("lr", '"fast"', "lr: must be a valid number"),
        ("train", '"gone.jsonl"', "gone.jsonl"),
        ("rank", "9", "2 tenants of rank 1 to 9 need as many slots"),
        ("lane_tokens", "32", "tokens"),
    ],
)
def test_a_wrong_value_names_its_key_and_writes_nothing(key, value, message, tmp_path):
    path = changed(TRAIN, tmp_path / "train.toml", **{key: value})
    path.write_text(path.read_text().replace('"smollm2"', f'"{ROOT}/tests/fixtures/tiny-llama-tied"'))
    result = run("train", str(path))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["train.toml"]
