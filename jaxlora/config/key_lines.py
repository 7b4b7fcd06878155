"""Where each key of a TOML file stands, which `tomllib` does not tell."""

from __future__ import annotations

import bisect
import re
import tomllib

Loc = tuple[int | str, ...]  # of ("tenant", 1, "lr"): the key `lr` of the second [[tenant]]

TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
    | (?P<text>\"{3}(?:\\.|[^\\])*?\"{3,5} | '{3}.*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*')
    | (?P<mark>[\[\]{}=,.\n])
    | (?P<bare>[^\s\[\]{}=,.\#"']+)""",
    re.DOTALL | re.VERBOSE,
)


class _Reader:
    """Reads the tokens of one file, in one pass."""

    def __init__(self, text: str):
        ends = [m.start() for m in re.finditer("\n", text)]
        found = [m for m in TOKEN.finditer(text) if m.lastgroup != "comment"]
        self.tokens = [(m.group(), m.lastgroup, bisect.bisect_left(ends, m.start()) + 1) for m in found]
        self.at = 0
        self.lines: dict[Loc, int] = {}
        self.counts: dict[Loc, int] = {}  # of tables in an array of tables, by its place

    def taken(self, *marks: str) -> bool:
        """Passes a mark, if it is one of these."""
        if self.at < len(self.tokens) and self.tokens[self.at][1] == "mark" and self.tokens[self.at][0] in marks:
            self.at += 1
            return True
        return False

    def key(self, start: Loc) -> Loc:
        """Passes a dotted key; returns its place below `start` and notes the line of each of its parts."""
        while True:
            text, kind, line = self.tokens[self.at]
            self.at += 1
            start = (*start, tomllib.loads(f"key = {text}")["key"] if kind == "text" else text)
            self.lines.setdefault(start, line)
            if not self.taken("."):
                return start
            if start in self.counts:
                start = (*start, self.counts[start] - 1)

    def file(self) -> dict[Loc, int]:
        """Reads it all."""
        table: Loc = ()
        while self.at < len(self.tokens):
            if self.taken("\n"):
                continue
            if self.taken("["):
                array, line = self.taken("["), self.tokens[self.at][2]
                table = self.key(())
                if array:
                    self.counts[table] = self.counts.get(table, 0) + 1
                if table in self.counts:
                    table = (*table, self.counts[table] - 1)
                self.lines.setdefault(table, line)
                while self.taken("]"):
                    pass
            else:
                self.pair(table)
        return self.lines

    def pair(self, table: Loc) -> None:
        """Passes `key = value`."""
        place = self.key(table)
        self.taken("=")
        self.value(place)

    def value(self, place: Loc) -> None:
        """Passes a value, which may be an array or an inline table."""
        self.lines.setdefault(place, self.tokens[self.at][2])
        if self.taken("["):
            item = 0
            while not self.taken("]"):
                if not self.taken("\n", ","):
                    self.value((*place, item))
                    item += 1
        elif self.taken("{"):
            while not self.taken("}"):
                if not self.taken("\n", ","):
                    self.pair(place)
        else:  # a number may have a dot, a date a blank
            while self.at < len(self.tokens) and self.tokens[self.at][0] not in ("\n", ",", "]", "}"):
                self.at += 1


def key_lines(text: str) -> dict[Loc, int]:
    """Returns the line of each key, table and item of a text that `tomllib` has read."""
    return _Reader(text).file()
