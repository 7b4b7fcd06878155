"""What a file of training data holds, for the person who is to train with it.  Pure: no jax."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from train.data.examples import Example, Unit
from train.data.load import Scan

BINS = 8  # of the histogram
RENDERED = 3  # examples that are shown
MOST_CHARACTERS = 400  # of a run of trained or other tokens that is shown


class Spelling(Protocol):
    """A tokenizer that spells its tokens."""

    def token_bytes(self, id: int) -> bytes:
        """Returns the bytes of a token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """Examples of about the same length."""

    least: int  # tokens
    most: int
    examples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Tokens side by side that are all trained, or none of them."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """One example, as the model sees it; of a pair both sides, one after the other."""

    number: int  # of its line, element or row
    tokens: int
    runs: list[Run]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """What was found.  `good`: a job, or `jaxlora train`, would train with it."""

    good: bool
    format: str  # such as "JSONL"
    unit: str  # what is counted: "line", "element" or "row"
    read: int  # records
    shapes: dict[str, int]  # how many are "chat", "Alpaca" and so on
    examples: int
    tokens: int  # of all examples together
    trained_tokens: int
    median_tokens: float  # of an example
    histogram: list[Bin]
    long: str | None  # what is to be said of examples that are too long
    long_numbers: list[int]
    problems: list[str]
    stopped: bool  # there are more problems
    rendered: list[Rendered]

    def to_json(self) -> dict[str, object]:
        """Returns it as JSON has it."""
        return asdict(self)


def describe(found: Scan, tokenizer: Spelling) -> FileCheck:
    """Returns what there is to say of a file that was read."""
    sizes = [_tokens(unit) for unit in found.units]
    segments = [segment for unit in found.units for segment in unit.segments]
    refused = found.limit.too_long == "error" and bool(found.long.numbers)
    places = sorted({0, len(sizes) // 2, len(sizes) - 1}) if sizes else []
    return FileCheck(
        good=bool(sizes) and not found.problems and not refused,
        format=found.format,
        unit=found.unit,
        read=found.read,
        shapes=dict(found.shapes),
        examples=len(sizes),
        tokens=sum(sizes),
        trained_tokens=sum(int((segment.weights != 0).sum()) for segment in segments),
        median_tokens=statistics.median(sizes) if sizes else 0,
        histogram=_histogram(sizes),
        long=found.long_text,
        long_numbers=found.long.numbers,
        problems=[problem.text(found.unit) for problem in found.problems]
        or ["no example is in it"] * (found.read == 0),
        stopped=found.stopped,
        rendered=[_rendered(found.numbers[i], found.units[i], tokenizer) for i in places[:RENDERED]],
    )


def _tokens(unit: Unit) -> int:
    return sum(map(len, unit.segments))


def _histogram(sizes: Sequence[int]) -> list[Bin]:
    if not sizes:
        return []
    least, width = min(sizes), (max(sizes) - min(sizes)) // BINS + 1
    counts = [0] * BINS
    for size in sizes:
        counts[(size - least) // width] += 1
    bins = [Bin(least=least + i * width, most=least + (i + 1) * width - 1, examples=n) for i, n in enumerate(counts)]
    return [one for one in bins if one.least <= max(sizes)]


def _rendered(number: int, unit: Unit, tokenizer: Spelling) -> Rendered:
    runs = [run for segment in unit.segments for run in _runs(segment, tokenizer)]
    return Rendered(number=number, tokens=_tokens(unit), runs=runs)


def _runs(example: Example, tokenizer: Spelling) -> Iterable[Run]:
    tokens = zip(example.tokens.tolist(), (example.weights != 0).tolist(), strict=True)
    for trained, group in itertools.groupby(tokens, key=lambda token: token[1]):
        text = b"".join(tokenizer.token_bytes(id) for id, _ in group).decode(errors="replace")
        if len(text) > MOST_CHARACTERS:
            text = f"{text[: MOST_CHARACTERS // 2]} … {text[-MOST_CHARACTERS // 2 :]}"
        yield Run(text=text, trained=trained)
