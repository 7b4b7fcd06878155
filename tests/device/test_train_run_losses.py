"""`jaxlora train` with tenants of several losses in one file: what they leave, how they go on, what is refused."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from small_world import tiny_path
from train_world import examples, pairs, rollouts
from typer.testing import CliRunner

from serve.cli import main as cli
from train.data.examples import Pair, Rollout
from train.run.command import digest


def ask(*answers: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": a}] for a in answers]


WORDS = "abcdef"
PAIRS = [
    dict(
        zip(("preferred_output", "non_preferred_output"), ask(w, w + w), strict=True),
        input={"messages": [{"role": "user", "content": f"say {w}"}]},
    )
    for w in WORDS
]
ROLLOUTS = [
    {"input_ids": [5, 6 + i, 7, 8], "weights": [0, 0, 1, 1], "logprobs": [0, 0, -5, -6], "advantages": [0, 0, 1, -1]}
    for i in range(4)
]
CHATS = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]} for w in WORDS]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A file of a dpo, a ppo and a cross-entropy tenant, four steps each."""
    for name, lines in (("pairs", PAIRS), ("sampled", ROLLOUTS), ("chats", CHATS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tenants = "".join(
        f"""
[[tenant]]
name = "{name}"
train = "{name}.jsonl"
heldout = "{name}.jsonl"
{loss}
rank = 2
alpha = 4.0
lr = 1e-2
schedule = "constant"
warmup_steps = 0
weight_decay = 0.0
batch = 2
seed = 3
"""
        for name, loss in (("pairs", 'loss = "dpo"\nbeta = 0.5'), ("sampled", 'loss = "ppo"'), ("chats", ""))
    )
    path = tmp_path / "job.toml"
    path.write_text(f"""
out = "out"
lanes = 4
lane_tokens = 64
slots = 3
max_rank = 2
steps = 4
save_every = 2
model = {{path = "{tiny_path("tiny-llama-tied")}", dtype = "float32"}}
{tenants}""")
    return path


def train(path: Path):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["train", str(path)])


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def losses_of(path: Path, tenant: str) -> list[float]:
    with (path.parent / "out" / tenant / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


OTHERS = [
    ("beta = 0.5", "beta = 0.6"),
    ('loss = "ppo"', 'loss = "gspo"'),
    ('loss = "ppo"', 'loss = "ppo"\nclip_low = 0.7'),
]


@pytest.mark.slow
def test_three_losses_train_in_one_run_and_go_on_from_their_states(job):
    result = train(job)
    assert result.exit_code == 0, result.output
    whole = {name: losses_of(job, name) for name in ("pairs", "sampled", "chats")}
    assert whole["pairs"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert all(len(row) == 4 and row[3] < row[0] for row in (whole["pairs"], whole["chats"]))
    table = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│ pairs")][-1]
    assert [cell.strip() for cell in table[3:6:2]] == ["0.693", "0%"]  # the base is its own reference
    (job.parent / "out").rename(job.parent / "whole")
    change(job, "steps = 4", "steps = 2")
    assert train(job).exit_code == 0
    change(job, "steps = 2", "steps = 4")
    assert train(job).exit_code == 0
    assert {name: losses_of(job, name) for name in whole} == whole
    for old, new in OTHERS:
        change(job, old, new)
        refused = train(job)
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert "was made with another loss, beta, clip_low or clip_high; change that back" in refused.stderr
        change(job, new, old)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('loss = "dpo"\nbeta = 0.5', "", "loss cross_entropy trains on examples"),
        ('loss = "ppo"', 'loss = "dpo"', "loss dpo trains on preference pairs"),
        ('train = "chats.jsonl"', 'loss = "dro"\ntrain = "chats.jsonl"', "loss dro trains on sampled sequences"),
        ('heldout = "pairs.jsonl"', 'heldout = "chats.jsonl"', "loss dpo trains on preference pairs"),
        ("lane_tokens = 64", "lane_tokens = 32", "predictions together, more than the 32 allowed"),
    ],
)
def test_a_file_of_another_kind_or_too_long_is_one_error_with_nothing_started(job, old, new, says):
    change(job, old, new)
    refused = train(job)
    assert refused.exit_code == 2, refused.output
    told = " ".join(refused.stderr.split())
    assert "jsonl is not valid: line 1, " in told
    assert says in told
    assert not (job.parent / "out").exists()


def test_digest_depends_on_all_that_a_pair_and_a_rollout_hold():
    (pair,), (sampled,) = pairs(0, 1), rollouts(0, 1)
    r = sampled.rollout
    others = [
        Rollout(r.logprobs + np.float32(1), r.advantages, r.ratio_mask),
        Rollout(r.logprobs, r.advantages + np.float32(1), r.ratio_mask),
        Rollout(r.logprobs, r.advantages, ~r.ratio_mask),
    ]
    units = [
        pair,
        Pair(pair.rejected, pair.chosen),
        sampled,
        *(type(sampled)(sampled.tokens, sampled.weights, o) for o in others),
    ]
    digests = {digest([u]) for u in [*units, *examples(0, 1)]}
    assert len(digests) == len(units) + 1


@pytest.mark.slow
def test_examples_that_are_too_long_are_left_out_or_cut_and_told(job):
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 2000}]}
    path = job.parent / "chats.jsonl"
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    before = job.read_text()
    refused = train(job)
    assert refused.exit_code == 2
    assert re.search(r"lane_tokens = 64 holds \(line 7\); lane_tokens = \d+ would hold all", refused.stderr)
    for choice, what in (("skip", "was left out (line 7)"), ("truncate", "was cut (line 7)")):
        text = before.replace("[[tenant]]", f'[[tenant]]\ntoo_long = "{choice}"').replace('"out"', f'"out-{choice}"')
        job.write_text(text)
        result = train(job)
        assert result.exit_code == 0, result.output
        assert f"chats: chats.jsonl: 1 of 7 is longer than lane_tokens = 64 holds and {what}" in result.output
