"""Reasons to refuse an adapter: all are collected, and one error tells them, the most telling one first.

a kind of adapter that is not supported  →  made for another base  →  all else
"""

from __future__ import annotations

from jaxlora.core.errors import AdapterInvalid, BaseMismatch

MAX_DETAILS = 2000  # two for each adapted linear of a large base


class Reasons:
    """Reasons to refuse a file, each once, in order."""

    def __init__(self) -> None:
        self._unsupported: dict[str, None] = {}
        self._found: dict[str, type[AdapterInvalid]] = {}

    def __bool__(self) -> bool:
        return bool(self._unsupported or self._found)

    @property
    def another_base(self) -> list[str]:
        """The reasons that mean another base."""
        return [message for message, error in self._found.items() if error is BaseMismatch]

    def unsupported(self, message: str) -> None:
        """Adds a feature, or a kind of adapter, that is not supported whatever its tensors are."""
        self._unsupported[message] = None

    def add(self, message: str, *, error: type[AdapterInvalid] = AdapterInvalid) -> None:
        """Adds any other reason.  error: BaseMismatch where it means another base."""
        self._found.setdefault(message, error)

    def extend(self, other: Reasons) -> None:
        """Adds all reasons of the other."""
        self._unsupported |= other._unsupported
        for message, error in other._found.items():
            self._found.setdefault(message, error)

    def raise_if_any(self, another_base: str = "") -> None:
        """Raises one error: its message is the first reason, its class that reason's, its details are all reasons.

        another_base: a sentence in place of the reasons that mean another base.
        """
        if not self:
            return
        mismatches = self.another_base
        others = [message for message, error in self._found.items() if error is not BaseMismatch]
        details = [*self._unsupported, *mismatches, *others]
        if self._unsupported:
            error, said, told = AdapterInvalid, "; ".join(self._unsupported), len(self._unsupported)
        elif mismatches and another_base:
            error, said, told = BaseMismatch, another_base, len(details)
        else:
            error, said, told = self._found[details[0]], details[0], 1
        more = len(details) - told
        said += f" (and {more} more)" if more else ""
        raise error(f"adapter refused: {said}", details=_cut(details) if details != [said] else ())


def _cut(details: list[str]) -> tuple[str, ...]:
    more = len(details) - MAX_DETAILS
    return (*details[:MAX_DETAILS], *([f"and {more} more"] if more > 0 else []))


def shown(value: object) -> str:
    """Formats a value of the file for a message: strings bare, others as Python writes them, at most 200 characters."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
