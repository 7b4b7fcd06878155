"""What GET /v1/stats answers, for the served document alone: a Snapshot, and what is said beside it."""

from __future__ import annotations

from typing import Literal, TypedDict

from pydantic import with_config

from serve.openai_answers import CLOSED
from serve.snapshot import SlotView, TrainingView, WaitView
from serve.watch import Rates


@with_config(CLOSED)
class StatsObject(TypedDict):
    object: Literal["server.stats"]
    model: str
    health: str
    age_s: float
    tokens_per_s: Rates
    running: int
    parked: int
    waiting: int
    rows: int
    pages: int
    free_pages: int
    host_pages: int
    host_pages_limit: int
    queried_tokens: int
    found_tokens: int
    parks: int
    recomputed_tokens: int
    swaps: int
    decoded_tokens: int
    prefilled_tokens: int
    slots: list[SlotView]
    waits: list[WaitView]
    waiting_adapters: int
    training: TrainingView | None
