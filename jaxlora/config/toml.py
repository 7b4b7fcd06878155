"""Loads TOML into frozen dataclasses, strictly: `load(path, cls)`.  One error tells all mistakes of a file with their lines.

A field's type is checked as pydantic's strict mode checks JSON: a float accepts an integer, only bool accepts a bool,
and an enum is given by its value.  `X | None` may be left out if it has a default, as TOML has no null.

A section is checked by itself once its fields are right.  So after each look what was wrong is replaced by its default, or
by a stand-in where there is none, and the file is looked at again until nothing new is found.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from jaxlora.config.key_lines import Loc, key_lines
from jaxlora.config.words import did_you_mean, meant, our_word
from jaxlora.core.errors import ConfigInvalid, JaxLoraError


class DoNotGoTogether(ConfigInvalid):
    """A setting that others make impossible; `others` names their keys: while one of those is wrong, it says nothing."""

    def __init__(self, message: str, *, param: str, others: tuple[str, ...]):
        super().__init__(message, param=param)
        self.others = others


class Mistakes(ConfigInvalid):
    """Several mistakes in one section, each an error whose `param` names its key from there, such as tenant[1].rank."""

    def __init__(self, found: list[JaxLoraError]):
        super().__init__("; ".join(e.message for e in found), param=found[0].param)
        self.found = found


@dataclass(frozen=True, slots=True, order=True)
class Mistake:
    """What is wrong at one place of a file."""

    line: int
    key: str  # dotted; of the whole file: ""
    message: str


def load[T](path: Path, cls: type[T]) -> T:
    """Returns the settings in a TOML file as an instance of the dataclass `cls`.

    Raises ConfigInvalid for a file that cannot be read or parsed, and for one with mistakes: unknown or missing keys,
    values of another type, and whatever the dataclasses' own checks refuse.  Each is a line of the message, with file,
    line and dotted key.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as e:
        raise ConfigInvalid(f"{path}: cannot be read ({e.strerror}); give the path of a TOML file") from e
    except UnicodeDecodeError as e:
        raise ConfigInvalid(f"{path}: is not UTF-8 text (byte {e.start}); TOML files are") from e
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        at = re.search(r"at line (\d+)", str(e))
        line = int(at[1]) if at else text.rstrip().count("\n") + 1
        raise ConfigInvalid(f"{path}:{line}: is not TOML: {e}") from e
    reader = _Reader(path.parent, cls, key_lines(text))
    table = reader.in_our_words(table, cls, (), ())
    loaded = reader.read(table)
    if not reader.mistakes:
        assert isinstance(loaded, cls)
        return loaded
    mistakes = sorted(reader.mistakes)
    shown = [f"{path}:{m.line}: {m.key}{': ' if m.key else ''}{m.message}" for m in mistakes]
    if len(shown) > 1:
        shown.insert(0, f"{path}: {len(shown)} mistakes")
    raise ConfigInvalid("\n".join(shown), param=mistakes[0].key or None)


class _Reader:
    """Reads one file and notes its mistakes."""

    def __init__(self, folder: Path, cls: type, lines: Mapping[Loc, int]):
        self.folder, self.cls, self.written = folder, cls, lines
        self.lines: dict[Loc, int] = {(): 1}  # of the keys in our words
        self.mistakes: list[Mistake] = []
        self.wrong: list[Loc] = []  # places whose values are wrong, and are replaced
        self.stand_ins = 0
        self.told: set[Loc] = set()  # tables whose known keys have been told

    def note(self, loc: Loc, message: str, *, key: Loc | None = None) -> None:
        """Notes a mistake at a place; key: what to call it, if not by the place."""
        near = next(loc[:n] for n in range(len(loc), -1, -1) if loc[:n] in self.lines)
        self.mistakes.append(Mistake(self.lines[near], _key(loc if key is None else key), message))

    def in_our_words(self, value: object, kind: object, loc: Loc, written: Loc) -> object:
        """Returns a value of the file in our words, without unknown keys, which it notes.

        A misspelt key counts as the one that it is close to, unless that is there too.
        """
        if written in self.written:
            self.lines[loc] = self.written[written]
        if isinstance(value, list):
            item = item_of(kind)
            return [self.in_our_words(v, item, (*loc, i), (*written, i)) for i, v in enumerate(value)]
        section = section_of(kind)
        if not isinstance(value, dict) or section is None:
            return value
        known, table = types_of(section), {}
        for word, content in value.items():
            ours, place = our_word(word, known), (*written, word)
            if ours in table or (ours != word and ours in value):
                self.lines[(*loc, word)] = self.written[place]
                self.note((*loc, word), f"means the same as {ours}, which is given, too; leave one out")
                continue
            if ours not in known:
                self.lines[(*loc, word)] = self.written[place]
                self.note(
                    (*loc, word), "; ".join(filter(None, ["unknown key", self.where_it_belongs(word, loc, known)]))
                )
                ours = meant(word, known) or word
                if ours not in known or ours in table or ours in value:
                    continue
            table[ours] = self.in_our_words(content, known[ours], (*loc, ours), place)
        return table

    def where_it_belongs(self, word: str, loc: Loc, known: Mapping[str, object]) -> str:
        """Returns what to do about a key that is unknown in the table at `loc`; tells once what is known there."""
        if loc and our_word(word, types_of(self.cls)) in types_of(self.cls):
            return "it belongs to the top of the file, above the first [table]"
        for name, kind in types_of(self.cls).items():
            section = section_of(kind)
            if (name,) != loc and section is not None and our_word(word, types_of(section)) in types_of(section):
                return f"it belongs under [{name}]"
        if meant(word, known) is None:
            if loc in self.told:
                return ""
            self.told.add(loc)
        return did_you_mean(word, known)

    def read(self, table: object) -> object:
        """Returns the settings, or None when there are mistakes, all of which are then noted."""
        check = TypeAdapter(self.cls)
        while True:
            # No field accepts a date.
            text = json.dumps(table, default=lambda date: {"date or time": str(date)})
            try:
                return check.validate_json(text, strict=True, context=self.folder)
            except ValidationError as e:
                before = list(self.wrong)
                for error in e.errors(include_url=False):
                    for loc, message, others in _mistakes(error, self.cls):
                        if not any(_related(place, known) for place in (loc, *others) for known in before):
                            self.note(loc, message, key=error["loc"])
                            self.wrong.append(loc)
                new = self.wrong[len(before) :]
                if not new or () in new:
                    return None
                for loc in new:
                    self.replace(table, loc)

    def replace(self, table: object, loc: Loc) -> None:
        """Puts a default or a stand-in in place of a wrong value."""
        kind: object = self.cls
        for i, part in enumerate(loc):
            last = i + 1 == len(loc)
            if isinstance(table, list) and isinstance(part, int) and part < len(table):
                kind = item_of(kind)
                if last:
                    table[part] = self.stand_in(kind)
                    return
                table = table[part]
            elif isinstance(table, dict) and isinstance(part, str) and (section := section_of(kind)) is not None:
                kind = types_of(section)[part]
                holds = section_of(kind) is not None or section_of(item_of(kind)) is not None
                if last or not holds or part not in table:
                    table.pop(part, None)
                    if part in _required(section):
                        table[part] = self.stand_in(kind)
                    return
                table = table[part]

    def stand_in(self, kind: object) -> object:
        """Returns a value that a field of this type accepts, and that no other is."""
        kind, section = _plain(kind), section_of(kind)
        self.stand_ins += 1
        if section is not None:
            return {name: self.stand_in(types_of(section)[name]) for name in _required(section)}
        if get_origin(kind) is Literal:
            return get_args(kind)[0]
        if get_origin(kind) is tuple:
            return []
        numbers: dict[object, object] = {int: 1, float: 1.0, bool: False}
        return numbers.get(kind, f"unnamed{self.stand_ins}")


def _beside_file(text: object, info: ValidationInfo[Path]) -> object:
    if isinstance(text, Path):  # a default
        return str(info.context / text)
    if not isinstance(text, str):
        return text  # pydantic refuses it
    if not text:
        raise ValueError("must be a path, got ''")
    try:
        return str(info.context / Path(text).expanduser())
    except RuntimeError as e:  # ~name of an unknown user
        raise ValueError(f"{text!r} has no home folder behind its ~; write the path out") from e


def _path_or_name(text: str, info: ValidationInfo[Path]) -> object:
    is_path = text.startswith(("./", "../", "/", "~")) or text.endswith(".gguf") or (info.context / text).exists()
    return _beside_file(text, info) if text and is_path else text


# `false` in a file in place of a table: None.
NoneIfFalse = BeforeValidator(lambda given: None if given is False else given)
# A path; a relative one is resolved against the file's folder.
TomlPath = Annotated[Path, BeforeValidator(_beside_file)]
# Such a path with a default, which is resolved likewise.
TomlPathByDefault = Annotated[TomlPath, Field(validate_default=True)]
# A name, or such a path: a text that begins with ./, ../, / or ~, ends in .gguf, or exists in the file's folder.
PathOrName = Annotated[str, AfterValidator(_path_or_name)]


def _key(parts: Loc) -> str:
    """Returns the dotted key: ("rows", 1, "size") → rows[1].size"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _loc(key: str | None) -> Loc:
    """Returns the parts of a dotted key: rows[1].size → ("rows", 1, "size")"""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key or ""))


def _related(one: Loc, other: Loc) -> bool:
    """Whether one place is the other, or in it."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _mistakes(error: ErrorDetails, cls: type) -> list[tuple[Loc, str, list[Loc]]]:
    """Returns place and description, in TOML's terms, of what pydantic has found, and what other places it is about."""
    loc, shown = error["loc"], repr(error["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    match error["type"]:
        case "missing":
            return [(loc, f"missing; wanted {_described(_kind_at(cls, loc), loc)}", [])]
        case "value_error":
            own = error["ctx"]["error"]
            found = own.found if isinstance(own, Mistakes) else [own]
            return [
                (
                    (*loc, *_loc(e.param if isinstance(e, JaxLoraError) else None)),
                    e.message if isinstance(e, JaxLoraError) else str(e),
                    [(*loc, *_loc(other)) for other in e.others] if isinstance(e, DoNotGoTogether) else [],
                )
                for e in found
            ]
        case "literal_error" | "enum" if isinstance(error["input"], str):
            known = re.findall(r"'(.*?)'", error["ctx"]["expected"])
            close = meant(error["input"], known)
            shown += f"; did you mean '{close}'?" if close else ""
    wanted = error["msg"].replace("Input should be", "must be").replace("an object", "a table")
    return [(loc, f"{wanted}, got {shown}", [])]


def _described(kind: object, loc: Loc) -> str:
    """Describes the values of a type in TOML's terms."""
    if (section := section_of(kind)) is not None:
        return f"a table [{_key(loc)}] with {', '.join(_required(section)) or 'any of its keys'}"
    if (section := section_of(item_of(kind))) is not None:
        return f"at least one [[{_key(loc)}]] table with {', '.join(_required(section))}"
    names: dict[object, str] = {
        str: "a string",
        Path: "a path",
        int: "an integer",
        float: "a number",
        bool: "a boolean",
    }
    return names.get(_plain(kind), "a value")


def _plain(kind: object) -> object:
    """Returns a type without None."""
    if get_origin(kind) in (UnionType, Union):
        (kind,) = (a for a in get_args(kind) if a is not NoneType)
    return kind


def section_of(kind: object) -> type | None:
    """Returns the dataclass that a type is."""
    kind = _plain(kind)
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def item_of(kind: object) -> object:
    """Returns the type of an array's items; None: it is no array's."""
    kind = _plain(kind)
    return get_args(kind)[0] if get_origin(kind) is tuple else None


@functools.cache
def types_of(section: type) -> dict[str, object]:
    """Returns name → type of the fields of a dataclass."""
    return get_type_hints(section)


def _required(section: type) -> list[str]:
    """Returns the names of the fields that have no default."""
    assert is_dataclass(section)
    return [f.name for f in fields(section) if f.default is MISSING and f.default_factory is MISSING]


def _kind_at(kind: object, parts: Loc) -> object:
    """Returns the type of what stands at a place."""
    for part in parts:
        section = section_of(kind)
        kind = item_of(kind) if isinstance(part, int) or section is None else types_of(section)[part]
    return kind
