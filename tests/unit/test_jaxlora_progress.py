"""What a start says of itself: a line every few seconds where none can move, and one at each stage's end; no clock but a fake one."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from jaxlora.core.progress import EVERY_S, LOOK_S, Lines, MovingLine, Progress, duration, screen_on


class Clock:
    """Seconds that a test sets."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def said():
    return []


@pytest.fixture
def progress(clock, said):
    """Nobody looks but the test."""
    return Progress(Lines(said.append), clock=clock, look_s=None)


def test_a_stage_of_a_moment_is_one_line_at_its_end(progress, clock, said):
    with progress.stage("opening tiny"):
        clock.now += EVERY_S - 0.1
        progress.look()
        assert said == []
    assert said == ["opening tiny: 3.9 s"]


def test_a_long_stage_says_how_far_it_is_every_few_seconds_and_no_oftener(progress, clock, said):
    with progress.stage("compiling", of=4, unit="programs") as stage:
        for second in range(1, 18):
            clock.now += 1
            stage.at(1 + second // 6)
            progress.look()
            progress.look()
    assert said == [
        "compiling 1 of 4 programs, 4 s",
        "compiling 2 of 4 programs, 8 s",
        "compiling 3 of 4 programs, 12 s",
        "compiling 3 of 4 programs, 16 s",
        "compiling 4 programs: 17.0 s",
    ]
    assert EVERY_S + 2 * LOOK_S <= 5


def test_how_many_there_are_may_be_known_later(progress, clock):
    with progress.stage("asking", unit="questions") as stage:
        assert str(progress) == "asking questions, 0 s"
        stage.at(3, 8)
        clock.now += 125
        assert str(progress) == "asking 3 of 8 questions, 2 min 5 s"
    assert str(progress) == ""


def test_a_stage_that_fails_leaves_the_error_the_last_word(progress, said):
    with pytest.raises(ZeroDivisionError), progress.stage("opening"):
        raise ZeroDivisionError
    assert said == []
    assert str(progress) == ""


def test_every_stage_begins_anew(progress, clock, said):
    for what in ("one", "two"):
        with progress.stage(what):
            clock.now += EVERY_S
            progress.look()
    assert said == ["one, 4 s", "one: 4.0 s", "two, 4 s", "two: 4.0 s"]


def test_somebody_looks_while_the_caller_works(clock):
    """On a thread of its own, as a compiler gives nothing back until it has ended."""
    heard = threading.Event()
    progress = Progress(Lines(lambda line: heard.set()), clock=clock, look_s=0.001)
    with progress.stage("compiling"):
        clock.now += EVERY_S
        assert heard.wait(30)


def test_nobody_is_told_where_nobody_listens(clock):
    progress = Progress(None, clock=clock)
    threads = threading.active_count()
    with progress.stage("opening"):
        assert str(progress) == "opening, 0 s"
        assert threading.active_count() == threads


def test_a_terminal_has_one_line_that_moves_and_a_file_none(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(screen_on(Terminal()), MovingLine)
    assert isinstance(screen_on(io.StringIO()), Lines)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(screen_on(Terminal()), Lines)


def test_a_moving_line_is_gone_when_its_stage_is_over_and_names_are_no_markup(clock):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, legacy_windows=False, color_system=None)
    progress = Progress(MovingLine(console), clock=clock, look_s=None)
    with progress.stage("opening /models/[bold]x[/bold]"):
        clock.now += 3
        progress.look()
    shown = out.getvalue()
    assert "opening /models/[bold]x[/bold], " in shown
    assert shown.endswith("opening /models/[bold]x[/bold]: 3.0 s\n")
    assert "\x1b[2K" in shown  # it is taken off the screen


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.9, "0 s"), (59.9, "59 s"), (60.0, "1 min 0 s"), (3723.0, "62 min 3 s")]
)
def test_durations_are_said_as_people_do(seconds, text):
    assert duration(seconds) == text
