"""The shapes of a training record, told by its keys, and how those that others use become ours.  No jax.

Alpaca       {"instruction", "input"?, "output", "system"?}                     ─▶ a chat of one turn
ShareGPT     {"conversations": [{"from", "value", "weight"?}, …], "system"?}    ─▶ a chat
preferences  {"prompt", "chosen", "rejected"}, texts or lists of messages       ─▶ OpenAI's preferences
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from jaxlora.core.errors import DataInvalid
from train.data.examples import KINDS

# What data sets say about an example beside the example itself; it is passed over.
ABOUT = ("id", "idx", "index", "uuid", "source", "dataset", "category", "language", "lang", "url", "score")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}

type Record = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Records of the same keys."""

    name: str
    marks: tuple[str, ...]  # any of these keys says that a record is of this shape
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()  # beside ABOUT
    structured: tuple[str, ...] = ()  # keys whose values are lists or objects: JSON in the cell of a table

    def passes_over(self, key: str) -> bool:
        """Returns whether the key says something about the example that is not trained."""
        return key in ABOUT or key in self.ignored


SHAPES = (  # the first one that a record has a mark of
    Shape(
        name="Alpaca",
        marks=("instruction", "output"),
        needed=("instruction", "output"),
        optional=("input", "system"),
        ignored=("text",),  # all of it in a template of its own
    ),
    Shape(
        name="OpenAI preferences",
        marks=("input", "preferred_output", "non_preferred_output"),
        needed=("input", "preferred_output", "non_preferred_output"),
        structured=("input", "preferred_output", "non_preferred_output"),
    ),
    Shape(name="chat", marks=("messages",), needed=("messages",), structured=("messages",)),
    Shape(
        name="ShareGPT",
        marks=("conversations",),
        needed=("conversations",),
        optional=("system",),
        structured=("conversations",),
    ),
    Shape(name="preferences", marks=("chosen", "rejected"), needed=("chosen", "rejected"), optional=("prompt",)),
    Shape(name="prompt and completion", marks=("prompt", "completion"), needed=("prompt", "completion")),
    Shape(
        name="rollouts",
        marks=("logprobs", "advantages"),
        needed=("input_ids", "logprobs", "advantages"),
        optional=("weights", "sequence_ratio_mask"),
        structured=("input_ids", "logprobs", "advantages", "weights", "sequence_ratio_mask"),
    ),
    Shape(
        name="token ids",
        marks=("input_ids", "weights"),
        needed=("input_ids", "weights"),
        structured=("input_ids", "weights"),
    ),
    Shape(name="text", marks=("text",), needed=("text",)),
)


def shape_of(keys: Collection[str]) -> Shape | None:
    """Returns the shape of records with these keys, None for keys that are of none."""
    return next((shape for shape in SHAPES if not set(shape.marks).isdisjoint(keys)), None)


def shaped(record: Mapping[str, object]) -> tuple[Shape, Record]:
    """Returns the shape of a record, and its keys that belong to that.  Raises DataInvalid for one of no shape."""
    shape = shape_of(record.keys())
    if shape is None:
        raise DataInvalid(f"keys {some_of(record)} are of no known kind; give {'; or '.join(KINDS.values())}")
    absent = {k for k, v in record.items() if v is None and k in shape.optional}
    kept = {k: v for k, v in record.items() if k not in absent and not shape.passes_over(k)}
    check_keys(kept, shape.needed, shape.optional, "")
    return shape, kept


def check_columns(shape: Shape, columns: Sequence[str]) -> None:
    """Raises DataInvalid for columns of a table that are not those of the shape."""
    for column in columns:
        if columns.count(column) > 1:
            raise DataInvalid(f"two columns are called {shown(column)}; rename or remove one")
        if column not in shape.needed + shape.optional and not shape.passes_over(column):
            raise DataInvalid(
                f"column {shown(column)} is not known for {shape.name}; known are "
                f"{', '.join(shape.needed + shape.optional)}, and passed over {', '.join(shape.ignored + ABOUT)}; "
                "remove it, or rename it"
            )
    missing = [column for column in shape.needed if column not in columns]
    if missing:
        raise DataInvalid(
            f"column {missing[0]} is missing for {shape.name}; the file has {some_of(columns)}, needed are "
            f"{', '.join(shape.needed)}"
        )


def check_keys(got: Mapping[str, object], needed: tuple[str, ...], optional: tuple[str, ...], prefix: str) -> None:
    """Raises DataInvalid for a key that is not known, or missing."""
    for key in got:
        if key not in needed + optional:
            raise DataInvalid(f"unknown key; known are {', '.join(needed + optional)}", param=f"{prefix}{shown(key)}")
    for key in needed:
        if key not in got:
            raise DataInvalid("is missing", param=prefix + key)


def some_of(keys: Collection[str]) -> str:
    """Returns the first keys, for a message."""
    return ", ".join(shown(key) for key in list(keys)[:5]) + (", …" if len(keys) > 5 else "") or "(none)"


def shown(text: str) -> str:
    """Returns at most 40 characters of the text, fit for any output: lone surrogates are escaped."""
    return text[:40].encode(errors="backslashreplace").decode()


def json_kind(value: object) -> str:
    """Returns the JSON name of a value's type."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__) + (" of length 0" if value in ([], {}) else "")


# Conversions.  Each returns a record of ours, and what the fields of that are called in the record that was given.

type Rename = Callable[[str], str]


def converted(shape: Shape, record: Record) -> tuple[Record, Rename]:
    """Returns the record as a chat or OpenAI's preferences where it is of another shape.  Raises DataInvalid."""
    match shape.name:
        case "Alpaca":
            return _alpaca(record)
        case "ShareGPT":
            return _sharegpt(record)
        case "preferences":
            return _preferences(record)
    return record, lambda field: field


def _alpaca(record: Record) -> tuple[Record, Rename]:
    for key in ("instruction", "input", "output", "system"):
        if not isinstance(record.get(key, ""), str):
            raise DataInvalid("must be a string", param=key)
    more = str(record.get("input", ""))
    asked = str(record["instruction"]) + (f"\n\n{more}" if more else "")
    turns = [_turn("user", asked), _turn("assistant", record["output"])]
    names = ["instruction", "output"]
    if record.get("system"):
        turns, names = [_turn("system", record["system"]), *turns], ["system", *names]

    def rename(field: str) -> str:
        place = re.match(r"messages\[(\d+)\]", field)
        return "output" if place is None else names[int(place[1])]

    return {"messages": turns}, rename


def _sharegpt(record: Record) -> tuple[Record, Rename]:
    given = record["conversations"]
    if not isinstance(given, list):
        raise DataInvalid("must be a list of turns, each with from and value", param="conversations")
    before = [_turn("system", record["system"])] if record.get("system") else []
    ours = any(isinstance(turn, dict) and "role" in turn for turn in given)  # some write messages so
    turns = [turn if ours else _spoken(turn, f"conversations[{i}]") for i, turn in enumerate(given)]

    def rename(field: str) -> str:
        place = re.match(r"messages\[(\d+)\]", field)
        if place is None:
            return field.replace("messages", "conversations")
        number, rest = int(place[1]) - len(before), field[place.end() :]
        if number < 0:
            return "system"
        rest = rest if ours else {".role": ".from", ".content": ".value"}.get(rest, rest)
        return f"conversations[{number}]{rest}"

    return {"messages": [*before, *turns]}, rename


def _spoken(turn: object, field: str) -> Record:
    """Returns a turn of ShareGPT as a message."""
    if not isinstance(turn, dict):
        raise DataInvalid("must be an object with from and value", param=field)
    check_keys(turn, ("from", "value"), ("weight",), field + ".")
    role = SPEAKERS.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise DataInvalid(
            f"must be one of {', '.join(SPEAKERS)}, got {shown(str(turn['from']))!r}", param=f"{field}.from"
        )
    return _turn(role, turn["value"]) | {k: v for k, v in turn.items() if k == "weight"}


def _preferences(record: Record) -> tuple[Record, Rename]:
    prompt, sides = record.get("prompt"), [record["chosen"], record["rejected"]]
    before = prompt if isinstance(prompt, list) else [_turn("user", prompt)]
    chosen, rejected = ([_turn("assistant", side)] if isinstance(side, str) else side for side in sides)
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = _shared_turns(chosen, rejected)
        if shared:  # both are whole conversations
            before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        elif prompt is None:
            raise DataInvalid("is missing, and chosen and rejected do not begin with the same turns", param="prompt")

    def rename(field: str) -> str:
        for ours, theirs in (("non_preferred_output", "rejected"), ("preferred_output", "chosen")):
            if field.startswith(ours):
                return field.replace(ours, theirs, 1) if isinstance(record[theirs], list) else theirs
        return field.replace("input.messages", "prompt", 1) if isinstance(prompt, list) else "prompt"

    return {"input": {"messages": before}, "preferred_output": chosen, "non_preferred_output": rejected}, rename


def _shared_turns(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Returns how many turns both begin with, when the first one is not the assistant's: the prompt of both."""
    count = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    first = chosen[0] if chosen else None
    return count if isinstance(first, dict) and first.get("role") != "assistant" else 0


def _turn(role: str, content: object) -> Record:
    return {"role": role, "content": content}
