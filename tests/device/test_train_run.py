"""Whole runs of `jaxlora train` on a tiny checkpoint: what they leave, how they go on, what they refuse."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_world import tiny_path
from train_world import SPEC, examples, lora, make_trainer, optimizer, small_base
from typer.testing import CliRunner

from jaxlora.config.training import check_lane_tokens
from jaxlora.core import progress as core_progress
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.lora import AdapterRef
from jaxlora.model.mesh import make_mesh
from jaxlora.storage.adapter_store import AdapterStore
from serve.cli import main as cli
from train.data.examples import Example
from train.run import command as run
from train.run import metrics
from train.run import progress as run_progress
from train.step.batch import idle_batch
from train.step.state import empty_state
from train.step.step import accumulate
from train.trainer import Trainer

LINES = [{"messages": [{"role": "user", "content": f"say {w}"}, {"role": "assistant", "content": w}]} for w in "abcdef"]
STEPS = {"one": 6, "two": 4}


@pytest.fixture
def job(tmp_path):
    """A file of two tenants: `one` takes 6 steps and has held-out lines, `two` takes 4."""
    write_lines(tmp_path / "one.jsonl", LINES)
    write_lines(tmp_path / "held.jsonl", LINES[:2])
    write_lines(tmp_path / "two.jsonl", LINES[::-1])
    path = tmp_path / "job.toml"
    path.write_text(f"""
out = "out"
lanes = 4
lane_tokens = 96
slots = 2
max_rank = 16
steps = 6
save_every = 2
model = {{path = "{tiny_path("tiny-llama-tied")}", dtype = "float32"}}

[[tenant]]
name = "one"
train = "one.jsonl"
heldout = "held.jsonl"
rank = 4
alpha = 8.0
lr = 1e-2
schedule = "linear"
warmup_steps = 1
weight_decay = 0.01
batch = 2
seed = 3

[[tenant]]
name = "two"
train = "two.jsonl"
rank = 2
alpha = 4.0
lr = 1e-2
schedule = "cosine"
warmup_steps = 0
weight_decay = 0.0
batch = 3
steps = 4
seed = 4
""")
    return path


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def train(path: Path):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["train", str(path)])


def trained(path: Path) -> str:
    """What a run that ends well shows."""
    result = train(path)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(path: Path) -> str:
    """What is told of a run that the user must mend, in one line."""
    result = train(path)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    return " ".join(result.stderr.split())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def steps_of(path: Path, tenant: str) -> list[int]:
    with (path.parent / "out" / tenant / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def weights(path: Path, tenant: str) -> dict[str, np.ndarray]:
    return load_file(path.parent / "out" / tenant / "peft" / "adapter_model.safetensors")


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


class Crash(BaseException):
    """Ends a run where a killed process would."""


def crash_at(monkeypatch, tenant: str, step: int) -> None:
    """The run ends after that step's row is written and before its checkpoint is."""
    append = metrics.append

    def then_crash(path, report):
        append(path, report)
        if (report.tenant, report.step) == (tenant, step):
            raise Crash

    monkeypatch.setattr(metrics, "append", then_crash)


def test_a_run_leaves_states_metrics_adapters_and_a_picture(job):
    shown = trained(job)
    out = job.parent / "out"
    for name, steps in STEPS.items():
        assert steps_of(job, name) == list(range(1, steps + 1))
        assert sorted(p.name for p in (out / name / "state").iterdir()) == [str(steps - 2), str(steps)]
        assert json.loads((out / name / "adapter.json").read_text()) == {"step": steps, "version": 1}
        store = AdapterStore(out / "store", host_bytes=1 << 20)
        a_LRX, _ = store.get(AdapterRef(name, name, 1)).weights["q_proj"]
        store.close()
        np.testing.assert_array_equal(
            weights(job, name)["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"], a_LRX[1]
        )
        assert f"{name}: step 2 of {steps}, loss " in shown
    assert f"jaxlora serve --model {tiny_path('tiny-llama-tied')} --adapters {out}/store\n" in shown
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "loss.svg").read_bytes()
    with (out / "one/heldout.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6]
    last = [line for line in shown.splitlines() if "│ one " in line and " done " in line][-1]
    assert f"{float(rows[0]['loss']):.3f}" in last, "the base's"
    assert f"{float(rows[-1]['loss']):.3f}" in last
    assert not (out / "two/heldout.csv").exists()


def test_where_no_line_can_move_each_part_of_a_run_says_how_far_it_is_and_how_long_it_took(job, monkeypatch):
    monkeypatch.setattr(core_progress, "EVERY_S", 0.0)  # a line at each look
    monkeypatch.setattr(run_progress, "LINE_S", 0.0)
    change(job, "save_every = 2", "save_every = 100")
    shown = trained(job)
    parts = [
        "opening the base model",
        r"reading 3 files",
        r"compiling \d+ training programs",
        "asking the base model for the held-out examples",
        "training 10 steps",
        "drawing the loss curves",
        "asking the adapters for the held-out examples",
    ]
    ends = [re.search(f"^{part}: \\d+\\.\\d s$", shown, re.MULTILINE) for part in parts]
    assert all(ends), shown
    assert [end.start() for end in ends] == sorted(end.start() for end in ends)
    assert "reading files, 0 s\n" in shown
    assert "training 0 of 10 steps, 0 s\n" in shown
    for name, steps in STEPS.items():
        assert [int(n) for n in re.findall(rf"^{name}: step (\d) of {steps}, loss ", shown, re.MULTILINE)] == list(
            range(1, steps + 1)
        )


def test_a_long_part_of_a_run_is_not_silent(job, monkeypatch):
    monkeypatch.setattr(core_progress, "EVERY_S", 0.6)
    step = Trainer.step

    def slow(self):
        time.sleep(1.2)  # while whoever looks does so
        return step(self)

    monkeypatch.setattr(Trainer, "step", slow)
    change(job, "steps = 6", "steps = 1")
    change(job, "steps = 4", "steps = 1")
    assert re.search(r"^training 0 of 2 steps, 1 s$", trained(job), re.MULTILINE)


def test_a_run_from_its_own_folder_shows_short_paths(job, monkeypatch):
    monkeypatch.chdir(job.parent)
    (job.parent / "configs").mkdir()
    change(job, 'out = "out"', 'out = "../out"')
    for file in job.parent.glob("*.*"):
        file.rename(job.parent / "configs" / file.name)
    shown = trained(Path("configs/job.toml"))
    assert "adapters: out/TENANT/peft; loss curves: out/loss.png and loss.svg\n" in shown
    for name, rank in (("one", 4), ("two", 2)):
        saved = load_file(f"out/{name}/peft/adapter_model.safetensors")
        assert f"{name}: trainable params: {sum(v.size for v in saved.values()):,} || all params: " in shown
        assert {min(v.shape) for v in saved.values()} == {rank}
    assert "nothing to do: every tenant has trained its last step and its adapter is in out\n" in trained(
        Path("configs/job.toml")
    )


def test_a_finished_run_does_nothing_but_say_so(job):
    trained(job)
    before = snapshot(job.parent / "out")
    shown = trained(job)
    assert "one: step 6 of 6" in shown
    assert "nothing to do" in shown
    assert snapshot(job.parent / "out") == before


def test_only_the_tenant_with_more_steps_goes_on(job):
    trained(job)
    two = snapshot(job.parent / "out" / "two")
    change(job, "steps = 6", "steps = 8")
    trained(job)
    assert steps_of(job, "one") == list(range(1, 9))
    assert json.loads((job.parent / "out/one/adapter.json").read_text()) == {"step": 8, "version": 2}
    assert snapshot(job.parent / "out" / "two") == two


def test_fewer_steps_than_were_trained_is_done(job):
    trained(job)
    change(job, "steps = 6", "steps = 5")
    assert "nothing to do" in trained(job)


def test_a_crash_before_the_adapter_was_written_is_mended(job, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "export_peft", lambda *args, **named: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            train(job)
    trained(job)
    assert {name: (job.parent / "out" / name / "peft").is_dir() for name in STEPS} == {"one": True, "two": True}


def test_a_crash_costs_the_steps_since_the_checkpoint_and_nothing_else(job, monkeypatch):
    trained(job)
    whole, rows = {name: weights(job, name) for name in STEPS}, (job.parent / "out/one/metrics.csv").read_text()
    shutil.rmtree(job.parent / "out")
    with monkeypatch.context() as patch:
        crash_at(patch, "one", 5)
        with pytest.raises(Crash):
            train(job)
    assert steps_of(job, "one") == [1, 2, 3, 4, 5]
    curves = {}
    monkeypatch.setattr(run, "write_pictures", lambda given, folder: curves.update(given))
    assert "one: step 4 of 6, from its checkpoint" in trained(job)
    for name, steps in STEPS.items():
        assert_same(weights(job, name), whole[name])
        found, losses = curves[name].train
        assert (list(found), len(losses)) == (list(range(1, steps + 1)), steps)
    assert (curves["one"].heldout[0], curves["two"].heldout[0]) == ([0, 2, 4, 6], [])
    assert (job.parent / "out/one/metrics.csv").read_text() == rows


def test_rows_of_a_run_without_a_checkpoint_are_dropped(job, monkeypatch):
    with monkeypatch.context() as patch:
        crash_at(patch, "one", 1)
        with pytest.raises(Crash):
            train(job)
    with (job.parent / "out/one/metrics.csv").open("a") as file:
        file.write("2,0.")  # half a row
    trained(job)
    assert steps_of(job, "one") == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_finishes_the_step_saves_and_goes_on_later(job, monkeypatch):
    trained(job)
    whole = {name: weights(job, name) for name in STEPS}
    shutil.rmtree(job.parent / "out")
    step = Trainer.step

    def interrupted(self):
        if self.tenants["one"].step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        result = train(job)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stdout
    assert result.stderr == "jaxlora: interrupted\n"
    assert steps_of(job, "one") == [1, 2, 3]
    assert (job.parent / "out/loss.svg").exists(), "what is there so far is drawn"
    assert (job.parent / "out/one/state/3").is_dir()
    assert not (job.parent / "out/one/peft").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trained(job)
    for name in STEPS:
        assert_same(weights(job, name), whole[name])


def test_the_old_peft_folder_stays_until_the_new_one_is_whole(job, monkeypatch):
    trained(job)
    before = weights(job, "one")
    change(job, "steps = 6", "steps = 8")
    with monkeypatch.context() as patch:
        patch.setattr("jaxlora.core.atomic_files.sync_tree", lambda folder: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            train(job)
    assert_same(weights(job, "one"), before)
    trained(job)
    assert any((weights(job, "one")[name] != value).any() for name, value in before.items())
    assert sorted(p.name for p in (job.parent / "out/one").iterdir()) == [
        "adapter.json",
        "heldout.csv",
        "metrics.csv",
        "peft",
        "state",
        "tensorboard",
    ]


OTHERS = [  # file, what is changed in it, what the refusal says
    ("job.toml", "seed = 3", "seed = 5", "made with another seed; change that back"),
    ("job.toml", "steps = 6", 'moments = "bfloat16"\nsteps = 6', "made with another moments;"),
    ("job.toml", "steps = 6", 'moments = "uint8"\nsteps = 6', "made with another moments;"),
    ("job.toml", "alpha = 8.0", "alpha = 4.0", "another rank, alpha, targets, rslora or dropout;"),
    (
        "job.toml",
        "max_rank = 16",
        "max_rank = 8",
        "another max_rank, other buckets, or lm_head in some tenant's targets;",
    ),
    ("one.jsonl", '"say a"', '"tell a"', "another examples (the train file"),
    ("base/tokenizer_config.json", "{", "{ ", "another base model ([model] path);"),
]


def test_a_checkpoint_of_something_else_is_refused_by_name(job):
    shutil.copytree(tiny_path("tiny-llama-tied"), job.parent / "base")
    change(job, str(tiny_path("tiny-llama-tied")), "./base")
    trained(job)
    out, before = job.parent / "out", snapshot(job.parent / "out")
    for file, old, new, says in OTHERS:
        change(job.parent / file, old, new)
        message = refused(job)
        assert message.startswith(f"jaxlora: tenant one: the checkpoint in {out}/one/state was made with another ")
        assert says in message
        assert f"name another `out`, or remove {out}/one to train anew" in message
        change(job.parent / file, new, old)
    assert "nothing to do" in trained(job)
    assert snapshot(out) == before


def test_digest_depends_on_tokens_weights_and_order():
    one, two = (Example(np.arange(n, dtype=np.int32), np.array([0] + [1] * (n - 1), np.float32)) for n in (3, 4))
    half = Example(one.tokens, one.weights * np.float32(0.5))
    digests = [run.digest(e) for e in ([one, two], [two, one], [one], [half], [one, one])]
    assert len(set(digests)) == len(digests)
    assert run.digest([Example(one.tokens.copy(), one.weights.copy())]) == digests[2]


def test_other_numbers_of_the_optimizer_may_change(job):
    trained(job)
    change(job, "steps = 6", "steps = 7")
    change(job, "lr = 1e-2", "lr = 1e-3")
    trained(job)
    assert steps_of(job, "one") == [1, 2, 3, 4, 5, 6, 7]


def test_a_tenant_that_fails_is_an_error_and_the_others_keep_theirs(job):
    lines = [{"input_ids": [1, 2, 3], "weights": [0, 3e38, 3e38]}]
    write_lines(job.parent / "one.jsonl", lines)
    message = refused(job)
    assert message.startswith("jaxlora: one failed: 5 updates in a row were not finite")
    assert (job.parent / "out/two/peft").is_dir()
    assert not (job.parent / "out/one/peft").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.unlink(), "cannot be read (No such file or directory); give the path of a file"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read (Is a directory)"),
        (lambda path: path.write_bytes(b""), "has no examples; give JSONL (a JSON object a line), a JSON array"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not valid: the file is text in UTF-16; save it as UTF-8"),
        (lambda path: path.write_text("{}\n"), "is not valid: line 1: keys (none) are of no known kind"),
    ],
)
@pytest.mark.parametrize("file", ["one.jsonl", "held.jsonl"])
def test_a_data_file_that_cannot_be_used(job, file, make, says):
    make(job.parent / file)
    assert refused(job).startswith(f"jaxlora: {job.parent / file} {says}")
    assert not (job.parent / "out").exists()


def test_an_out_that_cannot_be_written(job):
    (job.parent / "out").write_text("a file")
    assert f"the adapter store {job.parent / 'out/store'} cannot be made" in refused(job)


def test_a_batch_out_of_range_names_its_tenant(job):
    change(job, "batch = 2", "batch = 5000")
    assert refused(job).startswith("jaxlora: tenant one: batch_size must be in [1, 4096], got 5000")


def test_more_tenants_than_slots(job):
    change(job, "slots = 2", "slots = 1")
    assert "2 tenants in the file need as many slots" in refused(job)


@pytest.mark.parametrize("lane_tokens", [31, 32, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 64, 96))])
def test_the_kernels_take_every_lane_that_the_settings_accept(lane_tokens):
    check_lane_tokens(lane_tokens)
    base, batch = small_base(), idle_batch(2, lane_tokens)
    jax.eval_shape(lambda *args: accumulate(base, *args), (empty_state(base, SPEC, make_mesh()),), batch)


@pytest.mark.parametrize(
    ("lane_tokens", "near"), [(100, "96 or 128"), (33, "32 or 64"), (0, "1 or 32"), (-40, "1 or 32")]
)
def test_a_trainer_refuses_lanes_that_are_not_whole_blocks(lane_tokens, near):
    with pytest.raises(ConfigInvalid, match=f"lane_tokens must be .*such as {near}.*; got {lane_tokens}") as e:
        Trainer(small_base(), make_mesh(), [SPEC], lanes=2, lane_tokens=lane_tokens, base_hash="")
    assert e.value.param == "lane_tokens"


def test_negative_weights_unlearn_and_are_divided_by_their_size():
    """One step on weights of -1 makes the tokens less likely; ten times the weights are the same step."""
    trainer = make_trainer()
    data = examples(1, 4)
    for name, size in (("one", -1.0), ("ten", -10.0)):
        signed = [Example(e.tokens, e.weights * np.float32(size)) for e in data]
        trainer.add(name, lora(4), optimizer(total_steps=3), signed, batch_size=4, seed=5)
    reports = []
    while trainer.has_work:
        reports += trainer.step()
    first = {r.tenant: r for r in reports if r.step == 1}
    before = trainer.evaluate(data, None).nll
    assert first["one"].loss == pytest.approx(-before, rel=1e-5)
    assert first["ten"].loss == pytest.approx(-before, rel=1e-5)
    assert first["ten"].grad_norm == pytest.approx(first["one"].grad_norm, rel=1e-5)
    assert trainer.evaluate(data, "one").nll > before + 0.01


def test_weights_that_cancel_out_train():
    trainer = make_trainer()
    tokens, weights = np.arange(5, dtype=np.int32), np.array([0, 1, -1, 1, -1], np.float32)
    trainer.add("one", lora(4), optimizer(), [Example(tokens, weights)], batch_size=1, seed=5)
    (report,) = trainer.step()
    one, four = (Example(tokens, np.float32(w) * np.array([0, 1, s, 1, s], np.float32)) for w, s in ((1, 0), (1, 1)))
    good, every = (trainer.evaluate([e], None) for e in (one, four))
    assert report.loss == pytest.approx((2 * good.nll - (4 * every.nll - 2 * good.nll)) / 4, rel=1e-4)
    assert report.finite
