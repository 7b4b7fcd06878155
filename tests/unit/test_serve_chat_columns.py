"""Two texts side by side: every row fits, nothing is lost, what was printed never changes, and no text steers the terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from serve.cli.chat_columns import GAP, Columns, clean, wrap

TEXT = st.text("ab 日é🌍\n", max_size=60)


@pytest.mark.parametrize(
    ("text", "width", "rows"),
    [
        ("", 5, [""]),
        ("one two three", 7, ["one two", "three"]),
        ("one  two", 5, ["one ", "two"]),
        ("abcdefgh ij", 3, ["abc", "def", "gh", "ij"]),
        ("日本語 x", 4, ["日本", "語 x"]),
        ("日本語", 3, ["日", "本", "語"]),
        ("a\n\nb", 5, ["a", "", "b"]),
        ("a\n", 5, ["a", ""]),
    ],
)
def test_rows(text, width, rows):
    assert wrap(text, width) == rows


@given(text=TEXT, width=st.integers(2, 12))
def test_every_row_fits_and_nothing_but_spaces_is_lost(text, width):
    rows = wrap(text, width)
    assert all(cell_len(row) <= width for row in rows)
    assert "".join(rows).replace(" ", "") == text.replace(" ", "").replace("\n", "")


@given(pieces=st.lists(st.tuples(st.integers(0, 1), TEXT), max_size=8), width=st.integers(8, 30), data=st.data())
def test_settled_rows_never_change_and_in_the_end_all_are(pieces, width, data):
    columns, printed = Columns(width), []
    for side, text in pieces:
        if columns.ended[side]:
            continue
        columns.add(side, text)
        columns.ended[side] = data.draw(st.booleans())
        rows, settled = columns.rows(), columns.settled()
        assert rows[: len(printed)] == printed
        assert settled >= len(printed)
        assert all(cell_len(row) <= width for row in rows)
        printed = rows[:settled]
    columns.ended = [True, True]
    assert columns.settled() == len(columns.rows())


def test_the_second_column_begins_at_the_same_cell_in_every_row():
    columns = Columns(23)
    columns.add(0, "日本 and\nmore")
    columns.add(1, "left is wide")
    assert columns.rows() == ["日本 and   │ left is", "more       │ wide"]
    assert {cell_len(row.split(GAP)[0]) for row in columns.rows()} == {10}


def test_a_row_waits_for_both_columns():
    columns = Columns(23)
    columns.add(0, "a\nb\nc")
    assert columns.settled() == 0
    columns.add(1, "x\n")
    assert columns.settled() == 1
    columns.ended[1] = True
    assert columns.settled() == 2
    columns.ended[0] = True
    assert columns.settled() == 3


def test_what_would_steer_the_terminal_is_shown_as_a_mark():
    assert clean("a\x1b[2Jb\x07\r\x9bc\u202ed\u2066") == "a�[2Jb���c�d�"
    assert clean("Grüße\n\t日") == "Grüße\n    日"
