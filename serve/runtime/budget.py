"""Decides whether serving or training has the device next.  Pure host code: clock in, decision out.

A stream's time between two tokens is a serving step and what was trained before it.  A part of a training step runs when
it fits: when the next token still comes within the target, by what parts and steps have lately taken.  Both sides have a
floor, a share of the time while both have work, which is stronger than the target: a side below its floor goes first.
A request without its first token does not wait for a fit: training then has its floor alone.

By default the target follows from serving itself: so many times what a step takes when nothing was trained before it.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, fields

from jaxlora.core.errors import InvalidRequest

RECENT = 32  # durations that are kept
PROBE_EVERY = 16  # serving steps; one of so many has no training before it, to learn what such a step takes
WINDOW_S = 2.0  # over which shares of the time are counted
GRACE_S = 0.5  # time that both have had work, before which nobody is below its floor: a short request meets no training
LIKELY = 0.9  # quantile of the recent durations that decisions use


@dataclass(slots=True)
class BudgetSettings:
    """How serving and training share the device.  Each number may be set at any time, from any thread, through `set`."""

    slowdown: float = 3.0  # time between tokens with training, over that without; what target_s follows from
    target_s: float | None = None  # seconds between two tokens of a stream; None: from `slowdown`
    # Share of the time, of training: it keeps 0.4 of its speed and more, as caches are cold.
    training_floor: float = 0.45
    serving_floor: float = 0.2  # share of the time, of serving

    def set(self, **numbers: float | None) -> None:
        """Changes these numbers, all or none.  Raises InvalidRequest, naming one that is out of range or unknown."""
        new = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in numbers:
            if name not in new:
                raise InvalidRequest(f"the budget has no {name}; it has {', '.join(new)}", param=name)
        new |= numbers
        target_s, floors = new["target_s"], [new["training_floor"], new["serving_floor"]]
        for name, ok, wanted in (
            ("slowdown", _number(new["slowdown"]) and new["slowdown"] >= 1, "at least 1"),
            ("target_s", target_s is None or (_number(target_s) and target_s > 0), "positive, or None"),
            ("training_floor", _number(floors[0]) and 0 <= floors[0] < 1, "in [0, 1)"),
            ("serving_floor", _number(floors[1]) and 0 <= floors[1] < 1, "in [0, 1)"),
        ):
            if not ok:
                raise InvalidRequest(f"{name} must be {wanted}, got {new[name]}", param=name)
        if sum(floors) >= 1:
            raise InvalidRequest(
                f"the floors must leave room between them; training_floor {floors[0]} and serving_floor {floors[1]} "
                "are 1 or more together",
                param="training_floor",
            )
        for name, value in numbers.items():
            setattr(self, name, value)


def _number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < float("inf")
    )


class Durations:
    """The newest few durations of a kind of work."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        """Adds a duration."""
        self._recent.append(seconds)

    def __len__(self) -> int:
        return len(self._recent)

    def quantile(self, share: float) -> float:
        """Returns the duration that this share of them took at most; 0 before the first."""
        ranked = sorted(self._recent)
        return ranked[min(int(share * len(ranked)), len(ranked) - 1)] if ranked else 0.0


class Budget:
    """Decides before each serving step and each part of a training step.  Owned by one thread, but for its settings."""

    def __init__(self, settings: BudgetSettings | None = None):
        self.settings = BudgetSettings() if settings is None else settings
        self.alone = Durations()  # steps that decoded, and nothing was trained before them
        self.steps = Durations()  # steps that decoded
        self.parts: dict[str, Durations] = {}  # of a training step, by name
        self.parts_done: Counter[str] = Counter()  # since the start
        self.training_s = self.serving_s = 0.0  # time that each side has had since the start
        self._gap_from: float | None = None  # since when a stream waits for its next token
        self._trained_s = 0.0  # since then
        self._since_probe = 0
        self._spent: deque[tuple[float, bool, float]] = deque()  # (end, of training, seconds) while both had work
        self._sums = {False: 0.0, True: 0.0}

    @property
    def target_s(self) -> float | None:
        """The target for the seconds between two tokens; None until there are durations to derive it from."""
        if self.settings.target_s is not None:
            return self.settings.target_s
        return self.settings.slowdown * self.alone.quantile(0.5) if len(self.alone) else None

    @property
    def training_share(self) -> float:
        """Training's share of the last seconds in which both had work; 0 before any."""
        total = sum(self._sums.values())
        return self._sums[True] / total if total else 0.0

    def trains(self, now: float, part: str, *, urgent: bool) -> bool:
        """Returns whether this part of a training step goes before the next serving step, where both have work.

        urgent: a request waits for its first token.
        """
        self._forget(now)
        if self._since_probe >= PROBE_EVERY and self._trained_s == 0:
            return False
        share, floors = self.training_share, sum(self._sums.values()) >= GRACE_S
        if floors and share < (floor := self.settings.training_floor):
            # Of this gap, and a little of the probes': nobody pays for all gaps.
            owed_s = floor / (1 - floor) * self.steps.quantile(LIKELY) * (1 + 2 / PROBE_EVERY)
            return self._trained_s == 0 or (part in self.parts and self._trained_s + self._likely(part) <= owed_s)
        target_s = self.target_s
        if urgent or (floors and 1 - share < self.settings.serving_floor) or target_s is None or not self.steps:
            return False  # or the first step must say what a step takes
        if part not in self.parts:
            return self._trained_s == 0  # nobody knows what it takes: one of them at a time
        waited_s = 0.0 if self._gap_from is None else now - self._gap_from
        return waited_s + self._likely(part) + self.steps.quantile(LIKELY) <= target_s

    def trained(self, start: float, end: float, part: str, *, beside: bool) -> None:
        """Records a part of a training step.  beside: serving had work too."""
        self.parts.setdefault(part, Durations()).add(end - start)
        self.parts_done[part] += 1
        self.training_s += end - start
        if beside:
            self._trained_s += end - start
            self._spend(end, True, end - start)
        else:
            self._gap_from = None

    def served(self, start: float, end: float, *, decoded: bool, beside: bool) -> None:
        """Records a serving step.  decoded: it gave tokens and computed no prompts.  beside: training had work too."""
        self.serving_s += end - start
        if decoded:
            self.steps.add(end - start)
            if self._trained_s == 0:
                self.alone.add(end - start)
        self._since_probe = self._since_probe + 1 if self._trained_s else 0
        self._gap_from, self._trained_s = end, 0.0
        if beside:
            self._spend(end, False, end - start)

    def _likely(self, part: str) -> float:
        return self.parts[part].quantile(LIKELY) if part in self.parts else 0.0

    def _spend(self, end: float, training: bool, seconds: float) -> None:
        self._spent.append((end, training, seconds))
        self._sums[training] += seconds
        self._forget(end)

    def _forget(self, now: float) -> None:
        while self._spent and self._spent[0][0] < now - WINDOW_S:
            _, training, seconds = self._spent.popleft()
            self._sums[training] -= seconds
        if not self._spent:
            self._sums = {False: 0.0, True: 0.0}  # and no rounding stays
