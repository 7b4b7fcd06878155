"""Two texts side by side in a terminal, row by row while they grow.  Pure host code."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, chop_cells, set_cell_size

GAP = " │ "
TAB = "    "
# A model's text must not steer the terminal: escape sequences, bells, and the marks that turn writing around.
_STEERING = dict.fromkeys(
    [c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"]
    + [*range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "�",
) | {ord("\t"): TAB}


def clean(text: str) -> str:
    """The text with a mark for each character that would steer a terminal."""
    return text.translate(_STEERING)


def wrap(text: str, width: int) -> list[str]:
    """Rows of at most `width` cells, broken at spaces; a longer word is cut.  A wide character takes two cells."""
    rows = []
    for line in text.split("\n"):
        row = ""
        for i, word in enumerate(line.split(" ")):
            longer = f"{row} {word}" if i else word
            if cell_len(longer) <= width:
                row = longer
                continue
            if row:
                rows.append(row)
            *cut, row = chop_cells(word, width) or [""]
            rows += cut
        rows.append(row)
    return rows


class Columns:
    """Two columns in a terminal of this many cells a row.  A text is added to; its rows up to the last never change."""

    def __init__(self, width: int):
        self.width = max((width - len(GAP)) // 2, 2)  # of a column; a wide character must fit
        self.texts = ["", ""]
        self.ended = [False, False]

    def add(self, side: int, text: str) -> None:
        """More of a column, as a model said it."""
        self.texts[side] += clean(text)

    def rows(self) -> list[str]:
        """All rows of both so far."""
        left, right = (wrap(text, self.width) for text in self.texts)
        count = max(len(left), len(right))
        return [beside(self._at(left, i), self._at(right, i), self.width) for i in range(count)]

    def settled(self) -> int:
        """How many of the first rows stay as they are, whatever comes."""
        lengths = [len(wrap(text, self.width)) for text in self.texts]
        growing = [n - 1 for n, ended in zip(lengths, self.ended, strict=True) if not ended]
        return min([*growing, max(lengths)])

    @staticmethod
    def _at(rows: Sequence[str], i: int) -> str:
        return rows[i] if i < len(rows) else ""


def beside(left: str, right: str, width: int) -> str:
    """A row of two columns of that many cells."""
    return (set_cell_size(left, width) + GAP + right).rstrip()
