"""Reads training data: a file of any format, or a list of records, into examples, and says what is wrong or too long.  No jax."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxlora.config.training import CROSS_ENTROPY, LANE_BLOCK, TooLong
from jaxlora.core.errors import DataInvalid
from train.data.examples import KINDS, Example, Pair, Unit, check_kind, kind_of_unit
from train.data.file_formats import ACCEPTED, open_records
from train.data.records import ExampleTooLong, Tokenizer, cut, read_record
from train.data.shapes import shape_of

SHOWN_PROBLEMS = 5  # problems reported of a bad file; reading stops there
SHOWN_NUMBERS = 10  # lines named of those that are too long
ESCAPE_BYTES = 6  # of JSON for one byte of text, at most: \u0041
NUMBERS_BYTES = 128  # of JSON for all numbers of one token
FRAME_BYTES = 2**16  # of JSON for keys, roles and white space


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthLimit:
    """How long an example may be, and what becomes of a longer one."""

    lane_tokens: int  # predictions that a lane holds: an example has at most one token more
    too_long: TooLong = "error"
    setting: str = "lane_tokens"  # what messages call that limit
    measured: bool = False  # texts too long to have so few tokens are tokenised all the same, to say how many they have

    @property
    def max_tokens(self) -> int:
        """Returns the tokens of the longest example."""
        return self.lane_tokens + 1

    def most_bytes(self, tokenizer: Tokenizer) -> int:
        """Returns the bytes that a record of so many tokens may take in a file."""
        return self.max_tokens * max(ESCAPE_BYTES * tokenizer.max_token_bytes, NUMBERS_BYTES) + FRAME_BYTES


@dataclass(frozen=True, slots=True)
class Loaded:
    """The examples of a file, or of a list."""

    units: Sequence[Unit]
    note: str | None = None  # which were too long, and what became of them


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one record, or with the file."""

    number: int | None  # None: the file
    field: str | None
    message: str

    def text(self, unit: str) -> str:
        """Returns a line for a person."""
        if self.number is None:
            return self.message
        return f"{unit} {self.number}{f', {self.field}' if self.field else ''}: {self.message}"


@dataclass(slots=True)
class LongOnes:
    """The records that are longer than the limit."""

    numbers: list[int] = field(default_factory=list)
    first: list[Problem] = field(default_factory=list)
    dropped: int = 0  # of which nothing could be kept when they were cut
    predictions: int = 0  # of the longest one
    exact: bool = True  # whether that is known, or it has at least so many

    def add(self, number: int, error: ExampleTooLong) -> None:
        """Counts one more."""
        self.numbers.append(number)
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(Problem(number, error.param, error.message))
        self.predictions = max(self.predictions, error.predictions)
        self.exact = self.exact and error.exact


@dataclass(kw_only=True, slots=True)
class Scan:
    """What was found in a file or list."""

    limit: LengthLimit
    format: str = "a list"
    unit: str = "example"  # what is counted
    read: int = 0  # records
    shapes: Counter[str] = field(default_factory=Counter)  # of the records that are of one
    units: list[Unit] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of each unit
    problems: list[Problem] = field(default_factory=list)
    stopped: bool = False  # there were too many problems to read on
    long: LongOnes = field(default_factory=LongOnes)

    @property
    def fitting_tokens(self) -> int:
        """Returns the least lane that would hold the longest one."""
        longest = self.long.predictions
        return longest if longest < LANE_BLOCK else -(-longest // LANE_BLOCK) * LANE_BLOCK

    @property
    def long_text(self) -> str | None:
        """Returns what is to be said of records that are too long; None when there are none."""
        count, setting = len(self.long.numbers), self.limit.setting
        if not count:
            return None
        some = ", ".join(map(str, self.long.numbers[:SHOWN_NUMBERS]))
        more = f" and {count - SHOWN_NUMBERS} more" if count > SHOWN_NUMBERS else ""
        which = f"{self.unit}{'s' if count > 1 else ''} {some}{more}"
        what = f"{count} of {self.read} {'is' if count == 1 else 'are'} longer than {setting} = {self.limit.lane_tokens} holds"
        fits = ""
        if self.long.predictions > self.limit.lane_tokens:  # else they are too large to say
            fits = f"; {setting} = {self.fitting_tokens}{'' if self.long.exact else ' or more'} would hold all"
        match self.limit.too_long:
            case "skip":
                return f"{what} and {'was' if count == 1 else 'were'} left out ({which}){fits}"
            case "truncate":
                lost = f"; of {self.long.dropped} nothing to train remained" if self.long.dropped else ""
                return f"{what} and {'was' if count == 1 else 'were'} cut ({which}){lost}{fits}"
        return f'{what} ({which}){fits}; or set too_long = "skip" or "truncate"'

    def loaded(self, source: str) -> Loaded:
        """Returns the examples.  Raises DataInvalid, calling the data `source`, when something is wrong with them."""
        refused = self.limit.too_long == "error" and bool(self.long.numbers)
        if self.problems or refused:
            shown = self.problems + (self.long.first if refused else [])
            shown.sort(key=lambda problem: -1 if problem.number is None else problem.number)
            lines = [problem.text(self.unit) for problem in shown]
            lines += ["reading stopped here"] if self.stopped else []
            lines += [self.long_text] if refused and self.long_text else []
            raise DataInvalid(f"{source} is not valid:\n" + ";\n".join(lines))
        if not self.units:
            raise DataInvalid(
                f"{source} has no examples; give {ACCEPTED}" if not self.read else f"{source}: {self.long_text}"
            )
        return Loaded(self.units, self.long_text)


def scan_file(
    path: Path, tokenizer: Tokenizer, *, limit: LengthLimit, loss: str | None, most_problems: int = SHOWN_PROBLEMS
) -> Scan:
    """Reads a file, up to so many problems.  loss: that the examples are for; None: any, but the same for all.

    Raises OSError when it cannot be read.
    """
    found = Scan(limit=limit, format="an unknown format", unit="line")
    try:
        with open_records(path, limit.most_bytes(tokenizer)) as opened:
            found.format, found.unit = opened.format, opened.unit
            _collect(found, opened.records, tokenizer, loss, most_problems)
    except DataInvalid as error:  # the file is none of ours, or damaged
        found.problems.append(Problem(None, error.param, error.message))
    return found


def load_file(
    path: Path | str,
    tokenizer: Tokenizer,
    *,
    limit: LengthLimit,
    loss: str | None = CROSS_ENTROPY.name,
    name: str | None = None,
) -> Loaded:
    """Returns the examples or pairs of a file, in its order.  A record is of a kind that the loss trains on:

        cross_entropy  {"messages": [{"role", "content", "weight"?: 0 | 1}, …]}      {"prompt": text, "completion": text}
                       {"input_ids": [id, …], "weights": [number, …]}                {"text": text}
        dpo            {"input": {"messages": […]}, "preferred_output": [message, …], "non_preferred_output": [message, …]}
        the others     {"input_ids": [id, …], "logprobs": [number, …], "advantages": [number, …], "weights"?: [number, …],
                        "sequence_ratio_mask"?: [0 | 1, …]}

    or one that `train.data.shapes` converts to these.  name: what errors call the file; None: its path.
    Raises DataInvalid, naming the file, and line and field of the first problems, also when it cannot be read or has no
    example.
    """
    name = str(path) if name is None else name
    try:
        return scan_file(Path(path), tokenizer, limit=limit, loss=loss).loaded(name)
    except OSError as error:
        raise DataInvalid(f"{name} cannot be read ({error.strerror}); give the path of a file") from error


def load_records(
    data: Iterable[Mapping[str, object] | Unit], tokenizer: Tokenizer, *, limit: LengthLimit, loss: str
) -> Loaded:
    """Returns the examples or pairs of records as a file holds them, or of ready ones, in their order.

    Raises DataInvalid, naming index (from 0) and field of the first problems, also when there are none.
    """
    found = Scan(limit=limit)
    numbered = ((i, functools.partial(_given, item)) for i, item in enumerate(data))
    _collect(found, numbered, tokenizer, loss, SHOWN_PROBLEMS)
    if not found.read:
        raise DataInvalid("data has no examples; give at least one")
    return found.loaded("data")


def _given(item: object) -> Mapping[str, object] | Unit:
    if isinstance(item, Example | Pair):
        return item
    if not isinstance(item, dict) or not all(isinstance(key, str) for key in item):
        raise DataInvalid(f"must be an object, such as a line of a JSONL file holds, got {type(item).__name__}")
    return item


def _collect(
    found: Scan,
    records: Iterable[tuple[int, Callable[[], Mapping[str, object] | Unit]]],
    tokenizer: Tokenizer,
    loss: str | None,
    most_problems: int,
) -> None:
    """Adds what these records hold, until there are too many problems."""
    for number, read in records:
        found.read += 1
        try:
            unit = _fitted(found, number, read(), tokenizer)
            if unit is None:
                continue
            if loss is not None:
                check_kind(unit, loss)
            elif found.units:
                _check_alike(unit, found.units[0], f"{found.unit} {found.numbers[0]}")
            found.units.append(unit)
            found.numbers.append(number)
        except ExampleTooLong as error:
            found.long.add(number, error)
        except DataInvalid as error:
            found.problems.append(Problem(number, error.param, error.message))
            if len(found.problems) == most_problems:
                found.stopped = True
                return


def _fitted(found: Scan, number: int, record: Mapping[str, object] | Unit, tokenizer: Tokenizer) -> Unit | None:
    """Returns the example of a record, cut where that is asked for; None when nothing of it can be kept.

    Raises DataInvalid; ExampleTooLong for one that is not cut.
    """
    limit = found.limit
    if isinstance(record, Example | Pair):
        return record  # whoever gives examples has them checked where they are trained
    shape = shape_of(record.keys())
    found.shapes.update([] if shape is None else [shape.name])
    whole: Unit | None = None
    try:
        return read_record(record, tokenizer, limit.max_tokens)
    except ExampleTooLong as error:
        too_long = error
    if limit.too_long == "truncate" or (limit.measured and not too_long.exact):
        with contextlib.suppress(DataInvalid):
            # A record has no more tokens than bytes.
            whole = read_record(record, tokenizer, limit.most_bytes(tokenizer))
            too_long.predictions, too_long.exact = whole.predictions, True
    if limit.too_long != "truncate":
        raise too_long
    found.long.add(number, too_long)
    if whole is not None:
        with contextlib.suppress(DataInvalid):
            return cut(whole, limit.max_tokens)
    found.long.dropped += 1
    return None


def _check_alike(unit: Unit, first: Unit, where: str) -> None:
    """Raises DataInvalid for data of another kind than the first: no loss trains on both."""
    kind, other = kind_of_unit(unit), kind_of_unit(first)
    if kind != other:
        raise DataInvalid(
            f"this is one of the {KINDS[kind]}, but {where} is one of the {KINDS[other]}; a file holds one kind"
        )
