"""The same conversations in the formats that people have train to the same bits."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from fake_tokenizer import FakeTokenizer
from train_world import LANE_TOKENS, lora, make_trainer, optimizer

from train.data.load import LengthLimit, load_file

EXAMPLES, STEPS = 60, 3
ROWS = [(f"{i}, then?", f"{i + 1};") for i in range(EXAMPLES)]
CHATS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]} for asked, said in ROWS
]
ALPACA = [{"instruction": asked, "input": "", "output": said} for asked, said in ROWS]
SHARED = [
    {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]} for asked, said in ROWS
]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict], delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the group `test` brings pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    pq.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=16)
    return out.getvalue()


def brief(messages) -> str:
    """A template of few tokens: a lane of the shared trainer holds 32."""
    return "".join(
        f"<s>{'assistant' + chr(10) if m['role'] == 'assistant' else ''}{m['content']}</s>" for m in messages
    )


def test_eight_formats_train_to_the_same_held_out_loss_bit_for_bit(tmp_path: Path):
    tokenizer = FakeTokenizer(brief)
    files = {
        "chat": jsonl(CHATS),
        "completion": jsonl(
            [{"prompt": tokenizer.render(c["messages"][:1]), "completion": c["messages"][1]["content"]} for c in CHATS]
        ),
        "alpaca": jsonl(ALPACA),
        "sharegpt": jsonl(SHARED),
        "array": json.dumps(CHATS, indent=1).encode(),
        "parquet": parquet(CHATS),
        "csv": b"\xef\xbb\xbf" + table(ALPACA, ","),
        "tsv": table(ALPACA, "\t"),
    }
    assert len(files) == 8
    trainer, heldout = make_trainer(), {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        loaded = load_file(tmp_path / name, tokenizer, limit=LengthLimit(lane_tokens=LANE_TOKENS))
        assert (len(loaded.units), loaded.note) == (EXAMPLES, None)
        heldout[name] = loaded.units[50:]
        trainer.add(name, lora(2), optimizer(total_steps=STEPS), loaded.units[:50], batch_size=10, seed=3)
    work = [(units, name) for name, units in heldout.items()]
    before = trainer.evaluate_all(work, tuned=False)[0].nll
    while trainer.has_work:
        trainer.step()
    after = dict(zip(files, (e.nll for e in trainer.evaluate_all(work, tuned=True)), strict=True))
    assert set(after.values()) == {after["chat"]}, after
    assert after["chat"] < before
