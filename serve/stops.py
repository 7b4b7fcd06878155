"""Stop strings in a stream of text.  Pure.

The stop string that is complete first ends the text; of several complete at the same character, the longest.  How the
text was cut into pieces never matters.  Each character costs amortised constant time for each stop string
(Knuth, Morris, Pratt 1977).
"""

from __future__ import annotations

from jaxlora.core.errors import InvalidRequest


def failure_table(word: str) -> list[int]:
    """For each prefix of the word, by length - 1: the length of its longest proper suffix that is a prefix of the word."""
    table = [0] * len(word)
    length = 0
    for i in range(1, len(word)):
        while length and word[i] != word[length]:
            length = table[length - 1]
        if word[i] == word[length]:
            length += 1
        table[i] = length
    return table


class StopStrings:
    """Finds the first stop string in text that comes in pieces; holds back only what may still become one.

    include: keep the stop string itself.  Nothing is held back then, since nothing already sent is ever cut.
    Raises InvalidRequest for an empty stop string.
    """

    def __init__(self, stops: tuple[str, ...], include: bool):
        if not all(stops):
            raise InvalidRequest("a stop string must not be empty; leave it out", param="stop")
        self._stops = stops
        self._tables = [failure_table(stop) for stop in stops]
        self._matched = [0] * len(stops)  # how much of each stop string the text ends with
        self._include = include
        self._held = ""
        self._hit = False

    def push(self, text: str, *, armed: bool = True) -> tuple[str, bool]:
        """(text that is safe to send, whether a stop string is complete).  After that, all text is dropped.

        armed: a stop string that becomes complete in this text counts; else it is text like any other.
        """
        if self._hit:
            return "", True
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            complete = self._step(char)
            if complete and armed:
                self._hit, self._held = True, ""
                return seen[: end if self._include else end - complete], True
        hold = 0 if self._include else max(self._matched, default=0)
        self._held = seen[len(seen) - hold :]
        return seen[: len(seen) - hold], False

    def flush(self) -> str:
        """The text held back; call it at the end of a text that no stop string ended."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _step(self, char: str) -> int:
        """Length of the longest stop string that this character completes, or 0."""
        complete = 0
        for i, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            length = self._matched[i]
            while length and char != stop[length]:
                length = table[length - 1]
            if char == stop[length]:
                length += 1
            self._matched[i] = length
            if length == len(stop):
                complete = max(complete, length)
                self._matched[i] = table[-1]
        return complete
