"""Says what a start does, how far it is and for how long: on a terminal in a line that moves, elsewhere in a line now and then.

with progress.stage("compiling", of=4, unit="programs") as stage:
    stage.at(2)         # compiling 2 of 4 programs, 31 s
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

EVERY_S = 4.0  # between two lines of a stage where none can move: with a look, less than five
LOOK_S = 0.5  # between two looks at how long a stage has lasted

Counted = Callable[[int, int], None]  # called with (number of the one that begins, how many there are)


def uncounted(number: int, of: int) -> None:
    """Tells nobody."""


class Screen(Protocol):
    """Where a stage is shown.  Called under the lock of one Progress."""

    def show(self, text: str, lasted_s: float) -> None:
        """Shows how far a stage is that has lasted so long."""
        ...

    def end(self, line: str | None) -> None:
        """Ends the stage with a line that stays, or without one."""
        ...


class Lines:
    """Lines for a file, a pipe or a log: one when a stage has taken `EVERY_S`, then one each `EVERY_S`, and its last."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._next_s = EVERY_S  # how long the stage has lasted when the next line is due

    def show(self, text: str, lasted_s: float) -> None:
        """Says it if a line is due."""
        if lasted_s >= self._next_s:
            self._next_s = lasted_s + EVERY_S
            self._say(text)

    def end(self, line: str | None) -> None:
        """Says the last line."""
        self._next_s = EVERY_S
        if line is not None:
            self._say(line)


class MovingLine:
    """A line of a terminal that is drawn anew; what others print meanwhile comes above it."""

    def __init__(self, console: Console):
        self._console = console
        self._line = Spinner("dots")
        self._live: Live | None = None

    def show(self, text: str, lasted_s: float) -> None:
        """Draws it."""
        self._line.update(text=Text(text, no_wrap=True, overflow="ellipsis"))
        if self._live is None:
            both = sys.stderr.isatty()  # what goes to a file stays there
            self._live = Live(
                self._line, console=self._console, refresh_per_second=8, transient=True, redirect_stderr=both
            )
            self._live.start()

    def end(self, line: str | None) -> None:
        """Removes it and prints the last line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if line is not None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class Stage:
    """One stage of a start."""

    def __init__(self, what: str, of: int | None, unit: str, clock: Callable[[], float]):
        self.what, self.unit, self._clock = what, unit, clock
        self._number, self._of = 0, of
        self._began_s = clock()

    def at(self, number: int, of: int | None = None) -> None:
        """Notes which one of them all it is at, or how many are done.  From any thread.  of: how many, where it was unknown."""
        self._number, self._of = number, self._of if of is None else of

    @property
    def lasted_s(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began_s

    def __str__(self) -> str:
        count = [] if self._of is None else [f"{self._number} of {self._of}"]
        return " ".join([self.what, *count, *([self.unit] if self.unit else [])]) + f", {duration(self.lasted_s)}"

    @property
    def last_line(self) -> str:
        """What is said when it has ended."""
        count = [] if self._of is None else [str(self._of)]
        return " ".join([self.what, *count, *([self.unit] if self.unit else [])]) + f": {self.lasted_s:.1f} s"


class Progress:
    """The stages of one start, one after the other.  `str` may be asked from any thread."""

    def __init__(
        self,
        screen: Screen | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        look_s: float | None = LOOK_S,
    ):
        """screen: None shows nothing.  look_s: None: nobody looks but who calls `look`."""
        self._screen, self._clock, self._look_s = screen, clock, look_s
        self._lock = threading.Lock()
        self._stage: Stage | None = None

    def __str__(self) -> str:
        """The present stage, empty between two."""
        stage = self._stage
        return "" if stage is None else str(stage)

    @contextlib.contextmanager
    def stage(self, what: str, *, of: int | None = None, unit: str = "") -> Generator[Stage]:
        """Shows a stage while it is entered.  One that raises leaves no last line.

        of: how many `unit` it has, if it counts.
        """
        stage, over = Stage(what, of, unit, self._clock), threading.Event()
        self._stage = stage
        self.look()
        looking = threading.Thread(target=self._keep_looking, args=(over,), name="jaxlora-progress", daemon=True)
        if self._screen is not None and self._look_s is not None:
            looking.start()
        try:
            yield stage
        except BaseException:
            self._end(None, over)
            raise
        self._end(stage.last_line, over)

    def look(self) -> None:
        """Shows how far the present stage is."""
        with self._lock:
            if self._screen is not None and self._stage is not None:
                self._screen.show(str(self._stage), self._stage.lasted_s)

    def _keep_looking(self, over: threading.Event) -> None:
        while not over.wait(self._look_s):
            self.look()

    def _end(self, line: str | None, over: threading.Event) -> None:
        over.set()
        with self._lock:
            self._stage = None
            if self._screen is not None:
                self._screen.end(line)


def moves(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can draw a line anew."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def screen_on(stream: TextIO) -> Screen:
    """A moving line where the stream is a terminal that can move one, else lines."""
    if moves(stream):
        return MovingLine(Console(file=stream))
    return Lines(lambda line: print(line, file=stream, flush=True))


def duration(seconds: float) -> str:
    """As people say it: "31 s", "2 min 5 s"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
