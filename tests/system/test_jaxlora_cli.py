"""The drain: what each command imports and hands on, and how it ends."""

from __future__ import annotations

import errno
import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.config.training import TrainConfig, load
from jaxlora.core.errors import AdapterInvalid
from pallas_kernels import dispatch
from serve.cli import doctor
from serve.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "configs/train_two_tenants.toml")
# pydantic is not in it: typer itself imports it for the help of a command.
HEAVY = {"jax", "flax", "optax", "numpy", "fastapi", "transformers", "uvicorn", "sqlalchemy", "httpx2"}
HEAVY |= {"train", "pallas_kernels"}
COMMANDS = ("demo", "serve", "chat", "train", "export", "doctor", "init serve", "init train")
COMMANDS += ("bench serve", "bench train", "bench roofline")
MAINS = ("serve.demo.command", "serve.server.build", "serve.cli.chat", "train.run.command", "pallas_kernels.bench.run")


@pytest.fixture
def entry(monkeypatch):
    """Stands in for what the commands import and run; a list of (module, positional, named) calls."""
    calls = []
    for module in MAINS:
        call = functools.partial(lambda module, *args, **named: calls.append((module, args, named)), module)
        monkeypatch.setattr(f"{module}.main", call)
    return calls


def run(*arguments: str, width: int = 200):
    return CliRunner(env={"COLUMNS": str(width), "NO_COLOR": "1"}).invoke(cli.app, list(arguments))


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([*c.split(), "--help"] for c in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    code = "import sys, serve.cli.main\ntry: serve.cli.main.main()\nfinally: print('\\nLOADED', *sorted(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    loaded = set(out.split("LOADED")[1].split())
    assert "typer" in loaded
    assert {name.split(".")[0] for name in loaded} & HEAVY == set()
    assert {name.split(".")[1] for name in loaded if name.startswith("serve.")} == {"cli"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_shows_an_example(command):
    assert f"Example:  jaxlora {command}" in run(*command.split(), "--help").output


def test_help_names_every_command():
    output = run("--help").output
    assert [c for c in COMMANDS if c.split()[0] not in output] == []


def test_version():
    assert run("--version").output.startswith("jaxlora 0.")


def test_demo_hands_on_its_options(entry):
    assert run("demo", "--exit", "--port", "0", "--out", "o", "--seed", "5").exit_code == 0
    assert run("demo").exit_code == 0
    assert entry == [
        ("serve.demo.command", (), {"exit_after": True, "port": 0, "out": Path("o"), "seed": 5}),
        ("serve.demo.command", (), {"exit_after": False, "port": 8000, "out": None, "seed": 0}),
    ]


def test_chat_hands_on_its_options(entry):
    assert run("chat").exit_code == run("chat", "roman@2", "--url", "http://h:1").exit_code == 0
    assert entry == [
        ("serve.cli.chat", (), {"url": "http://127.0.0.1:8000", "key": None, "name": None}),
        ("serve.cli.chat", (), {"url": "http://h:1", "key": None, "name": "roman@2"}),
    ]


def test_train_hands_on_its_path(entry):
    assert run("train", TRAIN).exit_code == 0
    assert entry == [("train.run.command", (load(Path(TRAIN), TrainConfig),), {})]


def test_serve_with_a_model_only(entry):
    assert run("serve", "--model", "smollm2").exit_code == 0
    told = {"adopt": False, "new_base": False}
    assert entry == [("serve.server.build", (ServeConfig(model=ModelSection(path="smollm2")), None), told)]


def test_serve_is_told_what_it_may_take_over(entry):
    assert run("serve", "--model", "smollm2", "--adopt", "--new-base").exit_code == 0
    assert entry[0][2] == {"adopt": True, "new_base": True}


def test_serve_options_replace_what_the_file_says(entry):
    options = "--model m --host 0.0.0.0 --port 0 --slots 3 --max-rank 4 --rows 5 --adapters a"
    path = ROOT / "configs/serve_smollm2.toml"
    assert run("serve", str(path), *options.split()).exit_code == 0
    ((_, (config, file), _),) = entry
    assert file == path
    got = (config.model.path, config.host, config.port, config.slots, config.max_rank, config.rows, config.adapters)
    assert got == ("m", "0.0.0.0", 0, 3, 4, 5, Path("a"))
    assert (config.kv_pages, config.model.dtype) == (128, "auto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["serve"], "jaxlora: serve needs to know the base", id="no-base"),
        pytest.param(["serve", "none.toml"], "jaxlora: none.toml: cannot be read", id="no-file"),
        pytest.param(["serve", "--model", "m", "--port", "65536"], "option of serve: port must be in", id="port"),
        pytest.param(["serve", "--model", "m", "--slots", "0"], "option of serve: slots must be at", id="slots"),
        pytest.param(
            ["serve", "--model", "m", "--supervise"], "jaxlora: --supervise is gone; leave it", id="supervise"
        ),
        pytest.param(["demo", "--port", "x"], "Invalid value for '--port'", id="not-a-number"),
        pytest.param(["nonsense"], "No such command 'nonsense'", id="no-command"),
        pytest.param(["srve"], "Did you mean 'serve'?", id="close-to-a-command"),
        pytest.param(["jobs", "creat"], "Did you mean 'create'?", id="close-to-a-command-of-jobs"),
        pytest.param(["serve", "--modl", "m"], "Possible options: --model", id="close-to-an-option"),
    ],
)
def test_bad_input_is_exit_2_and_a_line(entry, arguments, message):
    result = run(*arguments)
    assert (result.exit_code, result.stdout, entry) == (2, "", [])
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["serve", "train"])
def test_a_wrong_file_is_told_before_jax_is_imported(command, tmp_path):
    """Importing JAX is most of a start; without it, the answer comes at once."""
    (tmp_path / "c.toml").write_text("slot = 1\nmax_rank = 0\n")
    code = "import sys, serve.cli.main\ntry: serve.cli.main.main()\nfinally: print('LOADED', *sorted(sys.modules))"
    command_line = [sys.executable, "-c", code, command, str(tmp_path / "c.toml")]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert f"{tmp_path}/c.toml:1: slot: unknown key; did you mean slots?\n" in done.stderr
    assert f"{tmp_path}/c.toml:2: max_rank must be at least 1, got 0\n" in done.stderr
    loaded = {name.split(".")[0] for name in done.stdout.split("LOADED")[1].split()}
    assert "jaxlora" in loaded
    assert loaded & {"jax", "jaxlib", "flax", "train", "transformers"} == set()


@pytest.mark.parametrize(("command", "cls"), [("serve", ServeConfig), ("train", TrainConfig)])
def test_init_writes_a_file_that_the_command_takes(command, cls, tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    written = run("init", command)
    assert written.exit_code == 0, written.output
    file = tmp_path / f"{command}.toml"
    assert written.stdout.splitlines()[0] == f"wrote {file.name}"
    assert written.stdout.splitlines()[-1].split(": ")[-1] == f"jaxlora {command} {file.name}"
    assert run(command, file.name).exit_code == 0
    assert entry[0][1][0] == load(Path(file.name), cls)


def test_init_replaces_a_file_only_if_forced(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("mine")
    refused = run("init", "serve", str(file))
    assert (refused.exit_code, file.read_text()) == (2, "mine")
    assert refused.stderr == f"jaxlora: {file} is there; name another file, or add --force to replace it\n"
    assert run("init", "serve", str(file), "--force").exit_code == 0
    assert load(file, ServeConfig)


def test_init_shows_the_file_on_the_screen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("init", "train", "-")
    assert (shown.exit_code, list(tmp_path.iterdir())) == (0, [])
    (tmp_path / "shown.toml").write_text(shown.stdout)
    assert load(tmp_path / "shown.toml", TrainConfig)


def test_init_says_where_it_cannot_write(tmp_path):
    refused = run("init", "serve", str(tmp_path / "none" / "serve.toml"))
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "cannot be written (No such file or directory)" in refused.stderr


def fails_with(monkeypatch, error: BaseException) -> None:
    def main(config: TrainConfig) -> None:
        raise error

    monkeypatch.setattr("train.run.command.main", main)


def test_our_error_is_shown_as_it_is_and_exit_2(monkeypatch):
    fails_with(monkeypatch, AdapterInvalid("two\n  lines"))
    result = run("train", TRAIN)
    assert (result.exit_code, result.stderr) == (2, "jaxlora: two\n  lines\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_exit_2(monkeypatch, number):
    def main(*_, **__):
        raise OSError(number, os.strerror(number), "/srv/data/x")

    monkeypatch.setattr("serve.server.build.main", main)
    result = run("serve", "--model", "smollm2")
    assert (result.exit_code, result.output) == (
        2,
        "jaxlora: the disk is full (/srv/data/x); free some space and start again\n",
    )


def test_a_port_that_is_taken_is_told_before_anything_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.model.compile_cache.enable", lambda folder: folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(
            "serve", "--model", "/no/such/model", "--port", str(port), "--adapters", str(tmp_path / "adapters")
        )
    assert (result.exit_code, result.output) == (
        2,
        f"jaxlora: cannot listen on 127.0.0.1 port {port} (Address already in use); choose another --port\n",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_there_for_every_shell(shell):
    """typer asks which shell runs it unless it is told so."""
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-c", "from serve.cli.main import main; main()"]
    script = subprocess.run(
        [*command, "--show-completion", shell], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    ).stdout
    assert "_COMPLETE=complete_" + shell in script.replace("\n", " ")


def test_another_error_keeps_its_traceback(monkeypatch):
    fails_with(monkeypatch, ZeroDivisionError("ours"))
    assert isinstance(run("train", TRAIN).exception, ZeroDivisionError)


def test_ctrl_c_is_exit_130():
    code = (
        "import os, signal, sys, time, types, serve.cli.main as cli\n"
        "def main(config):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
        "sys.modules['train.run.command'] = types.SimpleNamespace(main=main)\n"
        "cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", TRAIN], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "jaxlora: interrupted\n")


@pytest.mark.parametrize("kind", ["package", "module"])
@pytest.mark.parametrize("name", ["pallas_kernels", "train"])
def test_a_stranger_is_refused_before_anything_runs(tmp_path, name, kind):
    stranger = tmp_path / name / "__init__.py" if kind == "package" else tmp_path / f"{name}.py"
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("raise SystemExit('the stranger ran')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "serve.cli.main", "train", "c.toml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 2
    assert str(tmp_path / name) in done.stderr
    assert str(ROOT / name) in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_is_well_here(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "cache"))
    result = run("doctor")
    assert result.exit_code == 0
    for part in ("jax  ", "1 x cpu", f"{tmp_path}/cache (empty", "SmolLM2", f"those of {ROOT}"):
        assert part in result.output
    assert not (tmp_path / "cache").exists()


def test_doctor_counts_what_is_cached(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path))
    assert f"{tmp_path} (1 files, 3 MB)" in run("doctor").output


def test_doctor_shows_memory_and_the_plan_of_a_model():
    tiny = str(ROOT / "tests/fixtures/tiny-llama-tied")
    result = run("doctor", "--model", tiny, "--memory-gb", "3", width=500)
    assert result.exit_code == 0
    for part in (
        "memory            3.0 GB, memory_gb",
        "plan: memory      process 0.7 + ",
        "of 3.0 GB",
        "8 rows x 2,048 tokens",
    ):
        assert part in result.output
    bodies = result.output.splitlines()[-1]
    assert bodies.startswith("bodies            ")
    assert all(op in bodies for op in dispatch.TABLE)
    assert [line for line in run("doctor").output.splitlines() if line.startswith(("plan", "bodies"))] == []
    short = run("doctor", "--model", tiny, "--memory-gb", "0.5", width=500)
    assert short.exit_code == 2
    assert "tiny-llama-tied in" in short.output.splitlines()[-1]
    assert "does not fit" in short.output.splitlines()[-1]


def test_doctor_warns_of_an_op_in_its_general_form(monkeypatch):
    """A CPU has none, so what is found is another device's."""
    choices = [dispatch.Choice("draw", "xla", None), dispatch.Choice("paged_attention", "xla", "why")]
    monkeypatch.setattr("serve.runtime.bodies.expected", lambda *_: choices)
    monkeypatch.setattr("serve.runtime.bodies.fallbacks", lambda found, _: [c.reason for c in found if c.reason])
    result = run("doctor", "--model", str(ROOT / "tests/fixtures/tiny-llama-tied"), "--memory-gb", "3", width=500)
    assert result.exit_code == 0
    assert result.output.splitlines()[-2:] == ["bodies            xla: draw, paged_attention", "WARNING           why"]


def test_doctor_says_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DISTRIBUTIONS", ("no-such-thing",))
    findings = {f.text.split()[0]: f for f in doctor.report(tmp_path, cli.check_neighbours)}
    assert (findings["no-such-thing"].ok, findings["neighbours"].ok, findings["devices"].ok) == (False, False, True)
    monkeypatch.setattr(doctor, "report", lambda *_, **__: findings.values())
    assert run("doctor").exit_code == 2


def test_bench_kernels_hands_on_its_choice(entry):
    assert (
        run(
            "bench", "kernels", "--op", "a", "--op", "b", "--model", "m", "--rows", "4", "--adapters", "2", "--json"
        ).exit_code
        == 0
    )
    ((module, _, named),) = entry
    assert module == "pallas_kernels.bench.run"
    assert (named["sizes"].rows, named["sizes"].adapters) == (4, 2)
    assert (named["ops"], named["models"], named["as_json"]) == (["a", "b"], ["m"], True)


def test_bench_kernels_refuses_in_one_line():
    for arguments in (["--dtype", "int8"], ["--adapters", "33"], ["--op", "nothing"]):
        got = run("bench", "kernels", *arguments)
        assert got.exit_code == cli.ERROR_EXIT
        assert got.stderr.count("\n") == 1
        assert arguments[1] in got.stderr


def test_help_of_bench_kernels_shows_an_example():
    got = run("bench", "kernels", "--help")
    assert "Example:  jaxlora bench kernels --op gathered_lora" in got.stdout
