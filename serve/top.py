"""`jaxlora top`: slots, lines, tokens a second and jobs of a running server, on a screen or as JSON.  Pure: all over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

import httpx2
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxlora.errors import JaxLoraError

EVERY_S = 1.0
TIMEOUT_S = 10.0
MOST_LINES = 15  # of adapters in line, and of jobs


class StatsFailed(JaxLoraError):
    """The server did not tell; the message is what it said."""


class StatsClient:
    """GET /v1/stats of one server."""

    def __init__(self, url: str, key: str | None):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            self._http = httpx2.Client(base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
        except (httpx2.InvalidURL, ValueError) as error:
            raise StatsFailed(f"{self.url}: {error}") from error

    def read(self) -> dict:
        """The server's state.  Raises StatsFailed."""
        try:
            response = self._http.get("/v1/stats")
            body = response.json()
            if response.is_error:
                raise StatsFailed(str(body["error"]["message"]))
        except httpx2.ConnectError as error:
            raise StatsFailed(
                f"no server answers on {self.url}; start one with `jaxlora serve`, or give --url"
            ) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise StatsFailed(f"{self.url}: {str(error) or type(error).__name__}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise StatsFailed(f"what answers on {self.url} is no jaxlora server") from error
        if not isinstance(body, dict) or body.get("object") != "server.stats":
            raise StatsFailed(f"what answers on {self.url} is no jaxlora server")
        return body

    def close(self) -> None:
        """Drops the connection."""
        self._http.close()


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
    """A row for each slot."""
    table = _table("slots", "slot", "adapter", "active", "rows", "waiting", "")
    for number, slot in enumerate(slots):
        active = "" if slot["active_s"] is None else f"{slot['active_s']:.1f} s"
        pinned = "pinned" if slot["pinned"] else ""
        name = adapter_name(slot["adapter"])
        table.add_row(str(number), name, active, str(slot["rows"] or ""), str(slot["waiting"] or ""), pinned)
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


def main(*, url: str, key: str | None, as_json: bool, once: bool, say: Callable[[str], None]) -> None:
    """Shows the server's state each second until Ctrl-C, or once.  Raises StatsFailed when the first look fails."""
    client = StatsClient(url, key)
    try:
        stats = client.read()
        if as_json or once:
            if as_json:
                say(json.dumps(stats))
            else:
                Console().print(screen(stats))
            while not once:
                time.sleep(EVERY_S)
                say(json.dumps(client.read()))
            return
        with Live(screen(stats), auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(EVERY_S)
                live.update(look(client), refresh=True)
    finally:
        client.close()


def look(client: StatsClient) -> RenderableType:
    """The screen, or why there is none now: a server that restarts comes back."""
    try:
        return screen(client.read())
    except StatsFailed as error:
        return Text(error.message, "bold red")
