"""`jaxlora top`: slots, lines, tokens a second and jobs of a running server, on a screen or as JSON.  Pure: all over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serve.cli.http_client import AnswerFailed, ApiClient

EVERY_S = 1.0
MOST_LINES = 15  # of adapters in line, and of jobs
MOST_SLOTS = 40  # that are shown


def read(server: ApiClient) -> dict:
    """The server's state.  Raises AnswerFailed."""
    stats = server.entry("GET", "stats")
    if not isinstance(stats, dict) or stats.get("object") != "server.stats":
        raise AnswerFailed(f"what answers on {server.url} is no jaxlora server")
    return stats


def adapter_name(ref: Mapping | None) -> str:
    """TENANT/NAME@VERSION, or a dash for none."""
    return "-" if ref is None else f"{ref['tenant']}/{ref['name']}@{ref['version']}"


def screen(stats: Mapping) -> RenderableType:
    """All of it, for a terminal."""
    rates, health = stats["tokens_per_s"], stats["health"]
    used = 1 - stats["free_pages"] / stats["pages"]
    head = Text.assemble(
        (stats["model"], "bold"),
        "   ",
        (health, "green" if health == "ok" else "bold red"),
        f"   running {stats['running']}/{stats['rows']}   parked {stats['parked']}   waiting {stats['waiting']}"
        f"   KV {used:.0%}\n",
        f"tokens/s: {rates['decoded']:.0f} generated, {rates['prefilled']:.0f} of prompts, {rates['trained']:.0f} trained",
    )
    parts: list[RenderableType] = [head, slots_table(stats["slots"])]
    if stats["waits"]:
        parts.append(waits_table(stats["waits"], stats["waiting_adapters"]))
    if stats["training"] is not None:
        parts.append(jobs_table(stats["training"]))
    return Group(*parts)


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, collapse_padding=True, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold" if column in ("adapter", "job") else "ellipsis")
    return table


def slots_table(slots: list[Mapping]) -> Table:
    """A row for each slot; of many those of active adapters first."""
    shown = sorted(range(len(slots)), key=lambda i: (slots[i]["active_s"] is None, slots[i]["adapter"] is None, i))
    caption = f"and {len(slots) - MOST_SLOTS} more" if len(slots) > MOST_SLOTS else None
    table = _table("slots", "slot", "rank", "adapter", "active", "rows", "waiting", "", caption=caption)
    for number in sorted(shown[:MOST_SLOTS]):
        slot = slots[number]
        active = "" if slot["active_s"] is None else f"{slot['active_s']:.1f} s"
        pinned = "pinned" if slot["pinned"] else ""
        name = adapter_name(slot["adapter"])
        counts = str(slot["rows"] or ""), str(slot["waiting"] or "")
        table.add_row(str(number), str(slot["rank"]), name, active, *counts, pinned)
    return table


def waits_table(waits: list[Mapping], total: int) -> Table:
    """Adapters in line, the one that waits longest first."""
    shown = waits[:MOST_LINES]
    caption = f"and {total - len(shown)} more" if total > len(shown) else None
    table = _table("waiting for a slot", "adapter", "for", "requests", caption=caption)
    for wait in shown:
        table.add_row(adapter_name(wait["adapter"]), f"{wait['waited_s']:.1f} s", str(wait["requests"]))
    return table


def jobs_table(training: Mapping) -> Table:
    """Jobs that have not ended; all are counted below."""
    counts = [f"{count} {state}" for state, count in training["jobs"].items() if count]
    table = _table("training", "job", "adapter", "state", "step", "loss", caption=", ".join(counts) or "no jobs")
    for job in training["open"][:MOST_LINES]:
        loss = "" if job["loss"] is None else f"{job['loss']:.3f}"
        step = f"{job['step']}/{job['steps']}"
        table.add_row(job["id"], f"{job['owner']}/{job['name']}", job["state"], step, loss)
    return table


def main(*, url: str, key: str | None, as_json: bool, once: bool) -> None:
    """Shows the server's state each second until Ctrl-C, or once.  Raises AnswerFailed when the first look fails."""
    with ApiClient(url, key) as server:
        stats = read(server)
        if as_json:
            typer.echo(json.dumps(stats))
            while not once:
                time.sleep(EVERY_S)
                typer.echo(json.dumps(read(server)))
        elif once:
            Console().print(screen(stats))
        else:
            with Live(screen(stats), auto_refresh=False, screen=True) as live:
                while True:
                    time.sleep(EVERY_S)
                    live.update(look(server), refresh=True)


def look(server: ApiClient) -> RenderableType:
    """The screen, or why there is none now: a server that restarts comes back."""
    try:
        return screen(read(server))
    except AnswerFailed as error:
        return Text(error.message, "bold red")
