"""What a run shows while it lasts: TensorBoard's event files beside metrics.csv, and the table on the screen."""

from __future__ import annotations

import io
import json
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from small_world import tiny_path
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]
from train_world import lora, optimizer
from typer.testing import CliRunner

from jaxlora.checkpoints.hf import HfSource
from jaxlora.config.training import Loss, default_lr
from serve.cli import main as cli
from train.run import command as run
from train.run import metrics
from train.run.metrics import SCALARS, EventFile
from train.run.progress import LINE_S, ProgressScreen
from train.trainer import StepReport, Tenant

MODEL = "tiny-llama-tied"
WORDS = "abcdef"


@pytest.fixture
def job(tmp_path) -> Path:
    """A file of two tenants that say next to nothing; `one` has held-out lines and takes 4 steps, `two` takes 2."""
    lines = [json.dumps({"prompt": f"say {w}", "completion": w}) for w in WORDS]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    path = tmp_path / "job.toml"
    path.write_text(f"""
out = "out"
lanes = 4
lane_tokens = 96
slots = 2
max_rank = 16
steps = 4
save_every = 2
model = {{path = "{tiny_path(MODEL)}", dtype = "float32"}}
tenant = [
    {{name = "one", train = "lines.jsonl", heldout = "lines.jsonl"}},
    {{name = "two", train = "lines.jsonl", steps = 2}},
]
""")
    return path


def train(path: Path):
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["train", str(path)])


def events(path: Path) -> list[Event]:
    """The events of a file, read as the format of TFRecord files says, checksums and all."""
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + size]
        for part, at in ((data[:8], 8), (body, 12 + size)):
            crc = crc32c(part)
            assert struct.unpack("<I", data[at : at + 4])[0] == (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
        found.append(Event.FromString(body))
        data = data[16 + size :]
    assert all(event.file_version == "brain.Event:2" for event in found[:1])  # none is on disk yet, at first
    return found[1:]


def shown(folder: Path) -> list[dict[str, float]]:
    """step and scalars, as TensorBoard reads all files of a folder: one that starts a session hides the steps from its own."""
    rows: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("*")):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                rows = {step: row for step, row in rows.items() if step < event.step}
            for value in event.summary.value:
                row = rows.setdefault(event.step, {"step": event.step})
                assert value.tag not in row
                row[value.tag] = value.simple_value
    return list(rows.values())


def csv_of(path: Path) -> list[dict[str, float]]:
    """step and the numbers of each row, as a scalar holds them."""
    names = ("step", *SCALARS)
    return [{n: float(np.float32(float(row[n]))) for n in names} for row in metrics.rows(path)]


class Crash(BaseException):
    """Ends a run where a killed process would."""


@pytest.mark.slow
def test_each_tenant_has_its_numbers_once_also_after_a_crash(job, monkeypatch):
    out, append = job.parent / "out", metrics.append

    def then_crash(path, report):
        append(path, report)
        if (report.tenant, report.step) == ("one", 4):
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "append", then_crash)
        with pytest.raises(Crash):
            train(job)
    assert [e["step"] for e in shown(out / "one/tensorboard")] == [1, 2, 3]
    before = (out / "two/tensorboard").stat().st_mtime_ns, shown(out / "two/tensorboard")
    assert train(job).exit_code == 0
    for name, steps in (("one", 4), ("two", 2)):
        assert [e["step"] for e in shown(out / name / "tensorboard")] == list(range(1, steps + 1))
        assert shown(out / name / "tensorboard") == csv_of(out / name / "metrics.csv")
    assert ((out / "two/tensorboard").stat().st_mtime_ns, shown(out / "two/tensorboard")) == before


def test_rows_are_on_disk_while_a_run_lasts(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "FLUSH_S", 0.05)
    row = dict.fromkeys(metrics.COLUMNS, "0.5") | {"step": "7"}
    file = EventFile(tmp_path, [row])
    file.add(row | {"step": "8", "loss": "nan"})
    until_s = time.monotonic() + 10.0
    while [e["step"] for e in shown(tmp_path) if len(e) == len(SCALARS) + 1] != [7, 8]:
        assert time.monotonic() < until_s
        time.sleep(0.02)
    assert np.isnan(shown(tmp_path)[1]["loss"])
    file.close()


def test_an_event_file_hides_what_earlier_ones_hold(tmp_path):
    row = dict.fromkeys(metrics.COLUMNS, "0.5") | {"step": "1"}
    old = EventFile(tmp_path, [row, row | {"step": "2"}, row | {"step": "3"}])
    old.close()
    (path,) = tmp_path.glob("*")
    path.rename(tmp_path / path.name.replace("tfevents.", "tfevents.0"))  # of another second
    assert [e["step"] for e in shown(tmp_path)] == [1, 2, 3]
    EventFile(tmp_path, [row | {"loss": "0.25"}]).close()
    assert len(list(tmp_path.glob("*"))) == 2
    assert [(e["step"], e["loss"]) for e in shown(tmp_path)] == [(1, 0.25)]


def test_a_tenant_that_names_no_rate_gets_that_of_the_base(job):
    assert train(job).exit_code == 0
    peak = default_lr(HfSource(tiny_path(MODEL)).config)
    rates = [row["lr"] for row in csv_of(job.parent / "out/one/metrics.csv")]
    np.testing.assert_allclose(rates, [peak, peak, peak * 2 / 3, peak / 3], rtol=1e-6)  # one step of warm-up in four
    settings = json.loads((job.parent / "out/one/peft/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], len(settings["target_modules"])) == (16, 32, 7)


def test_a_run_shows_speed_and_held_out_losses(job, monkeypatch):
    tables = []
    table = run.ProgressScreen.table
    monkeypatch.setattr(run.ProgressScreen, "table", lambda screen: tables.append(table(screen)) or tables[-1])
    asked = []
    evaluate = run.evaluate_all

    def note(trainer, jobs, names, *, tuned):
        found = evaluate(trainer, jobs, names, tuned=tuned)
        asked.append((sorted(names), tuned, {name: e.nll for name, e in found.items()}))
        return found

    monkeypatch.setattr(run, "evaluate_all", note)
    result = train(job)
    assert result.exit_code == 0, result.output
    assert [(names, tuned) for names, tuned, _ in asked] == [
        (["one", "two"], False),
        ([], True),
        (["one", "two"], True),
        ([], True),
        (["one"], True),
        (["one", "two"], True),
    ]
    base, half, last = (asked[i][2]["one"] for i in (0, 2, 4))
    assert last < half < base
    columns = {str(c.header): list(c.cells) for c in tables[0].columns}
    assert columns["held-out"] == [f"{base:.3f}", ""]
    columns = {str(c.header): list(c.cells) for c in tables[-1].columns}
    assert columns["held-out"] == [f"{last:.3f}", ""]
    assert all(int(cell) > 0 for cell in columns["tokens/s"])
    assert (
        f"one: step 2 of 4, loss {csv_of(job.parent / 'out/one/metrics.csv')[1]['loss']:.3f}, held-out {half:.3f}, "
        in result.stdout
    )


def report_of(tenant: Tenant, step: int) -> StepReport:
    return StepReport(
        tenant=tenant.name,
        step=step,
        nll=1.0,
        targets=1,
        loss=12.3456,
        accuracy=1.0,
        lr=1.5e-4,
        grad_norm=28.594,
        tokens=123456,
        finite=True,
    )


def test_a_tenant_is_due_a_line_when_its_last_one_is_old():
    tenant = Tenant("one", 0, lora(4), optimizer(total_steps=1000), None, Loss())  # ty: ignore[invalid-argument-type]
    now_s = [50.0]
    screen = ProgressScreen({tenant.name: tenant}, {}, clock=lambda: now_s[0])
    due = []
    for step, now_s[0] in enumerate([60.0, 79.9, 80.0, 109.9, 110.1], 1):
        screen.note(report_of(tenant, step))
        due.append(screen.is_due("one"))
        if due[-1]:
            screen.line("one")
    assert due == [False, False, True, False, True], f"after {LINE_S:g} s"


def test_the_table_cuts_no_number_in_a_narrow_window():
    tenant = Tenant("a-tenant-with-a-long-name", 0, lora(4), optimizer(total_steps=1000), None, Loss(), step=999)  # ty: ignore[invalid-argument-type]
    ticks = iter([0.0, 2.0])
    screen = ProgressScreen({tenant.name: tenant}, {}, clock=lambda: next(ticks))
    screen.note(report_of(tenant, 999))
    screen.note_heldout(tenant.name, 11.25)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(screen.table())
    text = console.export_text()
    assert [
        word in text for word in ("999/1000", "12.346", "100%", "11.250", "1.5e-04", "28.59", "61728", "running")
    ] == [True] * 8
    assert "…" not in text
    assert screen.line(tenant.name).endswith(": step 999 of 1000, loss 12.346, held-out 11.250, 61728 tokens/s")
