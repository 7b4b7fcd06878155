"""Losses in a terminal: where their marks stand, counted by hand."""

from __future__ import annotations

from serve.cli.loss_chart import ASCII, HEIGHT, UNICODE, chart

WIDTH = 32  # of which 20 columns are the chart's


def body(lines: list[str]) -> list[str]:
    """The columns of the chart."""
    return [line[12:].ljust(WIDTH - 12) for line in lines[:HEIGHT]]


def test_the_first_loss_is_high_on_the_left_and_the_last_low_on_the_right():
    rows = body(chart([(1, 8.0), (2, 1.0)], [], width=WIDTH, ascii_only=True))
    assert (rows[0][0], rows[-1][-1]) == (".", ".")
    for column in range(20):  # a straight line: one mark in each column, and none that goes up
        marks = [y for y, row in enumerate(rows) if row[column] == "."]
        assert marks == [round(7 * column / 19)]


def test_a_column_of_many_steps_has_their_mean():
    rows = body(
        chart(
            [(0, 4.0), *((100 + i, float(i % 2) * 2) for i in range(2000)), (2100, 0.0)],
            [],
            width=WIDTH,
            ascii_only=True,
        )
    )
    assert rows[round((4 - 1) / 4 * 7)].count(".") >= 15, "ones, and neither zeros nor twos"


def test_held_out_losses_are_marks_over_the_line():
    lines = chart([(1, 2.0), (9, 1.0)], [(1, 2.0), (5, 1.0)], width=WIDTH, ascii_only=False)
    rows = body(lines)
    mark = UNICODE[1]
    found = [(y, x) for y, row in enumerate(rows) for x, letter in enumerate(row) if letter == mark]
    assert found == [(0, 0), (7, 10)]
    dots = [letter for row in rows for letter in row if letter not in (mark, " ")]
    assert dots
    assert all(0x2800 < ord(letter) < 0x2900 for letter in dots)
    assert mark in lines[-1]


def test_every_line_is_within_the_width_and_ascii_is_ascii():
    train, heldout = [(i, 1 / i) for i in range(1, 5000)], [(i, 1.0) for i in range(1, 5000, 500)]
    for ascii_only in (False, True):
        for width in (20, 80):
            lines = chart(train, heldout, width=width, ascii_only=ascii_only)
            assert max(map(len, lines[:-1])) <= width
            assert all(line.isascii() for line in lines) is ascii_only


def test_without_losses_there_is_no_chart_and_one_loss_is_one_mark():
    assert chart([], [], width=80, ascii_only=True) == []
    rows = body(chart([(3, 1.5)], [], width=WIDTH, ascii_only=True))
    assert "".join(rows).count(ASCII[0]) == 1
