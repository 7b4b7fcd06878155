"""Watches the device thread: whether it still turns, and a snapshot of the server twice a second.  Pure.

The thread is never asked: it writes what any thread can read, also while it is busy for long.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass

from serve.engine.engine import Engine
from serve.runtime.snapshot import Snapshot, TrainingView, take

EVERY_S = 0.5  # between two snapshots of a busy thread; one that becomes idle leaves one first
RATE_S = 10.0  # over which rates are measured
HANG_S = 4.0  # a turn that lasts longer counts as a hang, so that a probe learns of it within five


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens since the start."""

    at_s: float
    decoded: int
    prefilled: int
    trained: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Tokens a second over the last seconds."""

    decoded: float
    prefilled: float
    trained: float


class Watch:
    """Holds the newest turn and snapshot.  The device thread writes, any thread reads."""

    def __init__(self, engine: Engine, *, hang_s: float = HANG_S, clock: Callable[[], float] = time.monotonic):
        """clock: of turns."""
        self._engine, self._clock = engine, clock
        self.hang_s = hang_s  # how long a turn may last; may change at any time
        # Called on the device thread; None: the server does not train.
        self.training: Callable[[], TrainingView] | None = None
        self._since: float | None = None  # when the present turn began; None: there is none to end
        self._patient = False  # the present turn may last
        self._due = 0.0  # when the next snapshot is
        self._past: tuple[_Tokens, ...] = ()  # of the last seconds; replaced, never changed
        self.snapshot = self._take()

    # ---- of the device thread -------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Begins a turn; the one before it has ended."""
        now = self._clock()
        if self._since is None:  # it has rested, and left a snapshot then
            self._due = now + EVERY_S
        self._since = now
        if now >= self._due:
            self._due = now + EVERY_S
            self.snapshot = self._take()

    def rest(self) -> None:
        """Begins to wait for a message."""
        self._since = None
        self.snapshot = self._take()

    @contextlib.contextmanager
    def patience(self) -> Generator[None]:
        """Lets the present turn take any time while it is entered, as compiling does."""
        self._patient = True
        try:
            yield
        finally:
            self._since = self._clock()
            self._patient = False

    def _take(self) -> Snapshot:
        engine, training = self._engine, self.training
        snapshot = take(
            engine.scheduler,
            engine.clock(),
            decoded=engine.decoded_tokens,
            prefilled=engine.prefilled_tokens,
            resizes=engine.resizes,
            training=None if training is None else training(),
        )
        trained = 0 if snapshot.training is None else snapshot.training.tokens
        tokens = _Tokens(self._clock(), snapshot.decoded_tokens, snapshot.prefilled_tokens, trained)
        past = self._past
        if len(past) > 1 and tokens.at_s - past[-2].at_s < EVERY_S:
            past = past[:-1]  # a thread that often rests must not fill it
        began = self._before(past, tokens.at_s - RATE_S)
        self._past = (*past[began:], tokens)
        return snapshot

    def _before(self, past: tuple[_Tokens, ...], at_s: float) -> int:
        """Returns the index of the newest that was taken before then, or of the oldest."""
        return max((i for i, tokens in enumerate(past) if tokens.at_s <= at_s), default=0)

    # ---- of any thread --------------------------------------------------------------------------------------------

    def hangs_s(self) -> float | None:
        """Returns how long the present turn has lasted, when that is too long; else None."""
        since = self._since
        lasted = 0.0 if since is None or self._patient else self._clock() - since
        return lasted if lasted > self.hang_s else None

    def age_s(self) -> float:
        """Returns the age of the snapshot; that of an idle thread is 0."""
        return 0.0 if self._since is None else self._engine.clock() - self.snapshot.at_s

    def rates(self) -> Rates:
        """Returns tokens a second over the last `RATE_S`, or since the start."""
        past, now = self._past, self._clock()
        first, last = past[self._before(past, now - RATE_S)], past[-1]
        seconds = max(min(now - first.at_s, RATE_S), EVERY_S)
        return Rates(
            decoded=(last.decoded - first.decoded) / seconds,
            prefilled=(last.prefilled - first.prefilled) / seconds,
            trained=(last.trained - first.trained) / seconds,
        )
