"""What the keeper says of its training group to whoever decides how many trainers there are.  Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingReport:
    """The jobs that want slots, and the trainers that have them."""

    waiting: int  # jobs in line for a slot, at the keeper or anywhere else
    longest_wait_s: float  # of these; 0 without any
    trainers: Mapping[str, int]  # trainers in contact, by server name ("trainer-0") → jobs held; the keeper is none
