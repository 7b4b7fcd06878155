"""`jaxlora train` on a tiny model: what lands in `out`, and that a run which goes on is the run that never stopped."""

import csv
import json

import numpy as np
import pytest
from small_world import tiny_path

from jaxlora.base_files import base_hash
from jaxlora.errors import ConfigInvalid, DataInvalid
from jaxlora.hf import HfSource
from jaxlora.lora import AdapterRef
from jaxlora.peft import import_peft
from jaxlora.store import AdapterStore
from train.run import COLUMNS, main

BASE = tiny_path("tiny-llama-tied")
CONFIG = """
out = "{out}"
lanes = 4
lane_tokens = 32
slots = 2
max_rank = 4
steps = {steps}
save_every = 2

[model]
path = "{base}"
dtype = "float32"

[[tenant]]
name = "first"
train = "data.jsonl"
heldout = "heldout.jsonl"
rank = {rank}
alpha = 8.0
lr = 0.02
schedule = "constant"
warmup_steps = 1
weight_decay = 0.1
batch = 3
seed = 0

[[tenant]]
name = "second"
train = "data.jsonl"
rank = 2
alpha = 2.0
targets = ["q_proj", "lm_head"]
lr = 0.05
schedule = "linear"
warmup_steps = 0
weight_decay = 0.0
clip = 1.0
batch = 1
steps = 3
seed = 1
"""


@pytest.fixture
def train(tmp_path):
    """Runs the file's two tenants for some steps into out; returns the out folder."""
    lines = [{"prompt": f"say {i}", "completion": "abc"[: 1 + i % 3] * 2} for i in range(7)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "heldout.jsonl").write_text(json.dumps(lines[0]) + "\n")

    def run(out="out", steps=5, rank=4, change=("", "")):
        text = CONFIG.format(out=out, steps=steps, base=BASE, rank=rank)
        assert change[0] in text
        path = tmp_path / "config.toml"
        path.write_text(text.replace(*change, 1))
        main(path)
        return tmp_path / out

    return run


def metrics(out, name):
    with (out / name / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def newest(out, name):
    store = AdapterStore(out / "store", host_bytes=10**8)
    adapter = store.get(store.latest(name, name))
    store.close()
    return adapter


def checkpoints(out, name):
    return sorted(int(p.name) for p in (out / name / "state").iterdir())


def test_a_run_leaves_metrics_checkpoints_adapters_and_a_plot(train, capsys):
    out = train()
    rows = metrics(out, "first")
    assert tuple(rows[0]) == COLUMNS
    assert [r["step"] for r in rows] == ["1", "2", "3", "4", "5"]
    assert all(r["finite"] == "True" for r in rows)
    assert [float(r["lr"]) for r in metrics(out, "second")] == pytest.approx([0.05, 0.05 * 2 / 3, 0.05 / 3])
    assert checkpoints(out, "first") == [4, 5]
    assert checkpoints(out, "second") == [2, 3]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    source = HfSource(BASE)
    for name, rank in (("first", 4), ("second", 2)):
        stored = newest(out, name)
        assert stored.ref == AdapterRef(name, name, 1)
        assert (stored.spec.rank, stored.base_hash) == (rank, base_hash(BASE))
        peft, _ = import_peft(
            out / name / "peft",
            source.config,
            ref=stored.ref,
            base_hash=stored.base_hash,
            max_rank=4,
            head_supported=True,
            base_head_VD=source.read("embed", None),
        )
        assert peft.weights.keys() == stored.weights.keys()
        for target, pair in stored.weights.items():
            for a, b in zip(pair, peft.weights[target], strict=True):
                assert a.any()
                np.testing.assert_array_equal(a, b)
    table = capsys.readouterr().out
    assert "held-out" in table
    assert table.count("done") >= 2


def test_a_run_that_goes_on_is_the_run_that_never_stopped(train):
    """Three steps, then to five from the checkpoint: the same weights, bit for bit.  A third run has nothing to do."""
    whole, parts = train("whole"), train("parts", steps=3)
    expected = newest(whole, "first")
    assert not np.array_equal(newest(parts, "first").weights["q_proj"][0], expected.weights["q_proj"][0])
    for _ in range(2):
        train("parts")
        for name in ("first", "second"):
            assert metrics(parts, name) == metrics(whole, name)
            for target, pair in newest(whole, name).weights.items():
                for a, b in zip(pair, newest(parts, name).weights[target], strict=True):
                    np.testing.assert_array_equal(a, b)
    assert checkpoints(parts, "first") == [4, 5]


def test_another_rank_does_not_go_on_from_the_checkpoint(train):
    out = train(steps=2)
    before = metrics(out, "first")
    with pytest.raises(ConfigInvalid, match=r"tenant first: the checkpoint in .* has another rank, alpha or targets"):
        train(rank=3)
    assert metrics(out, "first") == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("slots = 2", "slots = 1"), ConfigInvalid, "2 tenants need as many slots"),
        (("lane_tokens = 32", "lane_tokens = 40"), ConfigInvalid, "lane_tokens must be at most 32 or a multiple"),
        (("lane_tokens = 32", "lane_tokens = 2"), DataInvalid, r"tenant first, .*/data\.jsonl: the training"),
        (
            ('"heldout.jsonl"', '"none.jsonl"'),
            DataInvalid,
            r"tenant first, .*/none\.jsonl: cannot be read: No such file",
        ),
        (("clip = 1.0", "eps = 1e-60"), ConfigInvalid, "eps must be"),
        (("warmup_steps = 0", "warmup_steps = 4"), ConfigInvalid, r"warmup_steps must be in \[0, 3\]"),
    ],
)
def test_what_cannot_run_writes_nothing(train, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train(change=change)
    assert not (tmp_path / "out").exists()
