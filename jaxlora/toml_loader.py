"""TOML → frozen dataclasses, strictly: `load(path, cls)`.  An unknown or missing key is an error that names file and key.

What a field may be: bool, int, float, str, Path, a Literal of strings or numbers, an Enum (by value), a dataclass (a
table), tuple[X, ...] (an array, or an array of tables), X | None (the key may be left out if it has a default; TOML has
no null).  A float accepts an integer; nothing accepts a bool but bool.  Relative paths start at the file's folder.
"""

from __future__ import annotations

import dataclasses
import enum
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from jaxlora.errors import ConfigInvalid


class PathOrName:
    """Marks `Annotated[str, PathOrName]`: a name, or a path that then starts at the file's folder like every path.

    A path is what begins with ./, ../, / or ~, ends in .gguf, or is there in the file's folder.
    """


def load[T](path: Path, cls: type[T]) -> T:
    """The settings in a TOML file as an instance of the dataclass `cls`.

    Raises ConfigInvalid, naming the file and the dotted key, for a file that cannot be read or parsed, an unknown or
    missing key, a value of another type, and whatever a dataclass's own check refuses.
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
        raise ConfigInvalid(f"{path}: is not TOML: {e}") from e
    built = _table(table, cls, "", path)
    if not isinstance(built, cls):
        raise TypeError(f"{cls} is not a class to load")
    return built


def _at(path: Path, key: str, message: str) -> ConfigInvalid:
    return ConfigInvalid(f"{path}: {key}: {message}" if key else f"{path}: {message}", param=key or None)


def _table(value: object, cls: type, key: str, path: Path) -> object:
    """The dataclass `cls` out of a TOML table."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls} is not a dataclass")
    if not isinstance(value, Mapping):
        raise _at(path, key, f"must be a table, got {_shown(value)}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in known:
            raise _at(path, f"{prefix}{name}", f"unknown key; known here: {', '.join(known)}")
    hints = get_type_hints(cls, include_extras=True)
    given = {}
    for name, f in known.items():
        if name in value:
            given[name] = _value(value[name], hints[name], f"{prefix}{name}", path)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise _at(path, f"{prefix}{name}", f"missing; wanted {_wanted(hints[name])}")
    try:
        return cls(**given)
    except ValueError as e:
        raise _at(path, key, str(e)) from e


def _value(value: object, hint: object, key: str, path: Path) -> object:
    """`value` as the type `hint`, or ConfigInvalid."""
    origin, args = get_origin(hint), get_args(hint)
    wrong = _at(path, key, f"must be {_wanted(hint)}, got {_shown(value)}")
    if origin is Annotated:
        plain = _value(value, args[0], key, path)
        return _path_or_name(str(plain), key, path) if PathOrName in args[1:] else plain
    if origin in (types.UnionType, Union):
        inner = [a for a in args if a is not type(None)]
        if len(inner) != 1 or len(args) != 2:
            raise TypeError(f"{key}: a setting is X or X | None, not {hint}")
        return _value(value, inner[0], key, path)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise wrong
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise wrong
        if len(args) != 2 or args[1] is not ...:
            raise TypeError(f"{key}: a tuple setting is tuple[X, ...], not {hint}")
        return tuple(_value(v, args[0], f"{key}[{i}]", path) for i, v in enumerate(value))
    if not isinstance(hint, type):
        raise TypeError(f"{key}: a setting cannot have the type {hint}")
    if dataclasses.is_dataclass(hint):
        return _table(value, hint, key, path)
    if hint is Path:
        if not isinstance(value, str) or not value:
            raise wrong
        return _resolve(value, key, path)
    return _scalar(value, hint, wrong)


def _scalar(value: object, hint: type, wrong: ConfigInvalid) -> object:
    if issubclass(hint, enum.Enum):
        for member in hint:
            if member.value == value and type(member.value) is type(value):
                return member
        raise wrong
    if hint is float and type(value) is int:
        return float(value)
    if hint not in (bool, int, float, str):
        raise TypeError(f"a setting cannot have the type {hint}")
    if type(value) is not hint:
        raise wrong
    return value


def _resolve(text: str, key: str, path: Path) -> Path:
    try:
        return path.parent / Path(text).expanduser()
    except RuntimeError as e:  # ~name of an unknown user
        raise _at(path, key, f"{text!r} has no home folder behind its ~; write the path out") from e


def _path_or_name(text: str, key: str, path: Path) -> str:
    is_path = text.startswith(("./", "../", "/", "~")) or text.endswith(".gguf") or (path.parent / text).exists()
    return str(_resolve(text, key, path)) if text and is_path else text


def _wanted(hint: object) -> str:
    """A type in a reader's words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _wanted(args[0])
    if origin in (types.UnionType, Union):
        return _wanted(next(a for a in args if a is not type(None)))
    if origin is Literal:
        return f"one of {', '.join(repr(a) for a in args)}"
    if origin is tuple:
        return f"an array, each {_wanted(args[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(repr(m.value) for m in hint)}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a table"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a path"}
    return names[hint] if isinstance(hint, type) and hint in names else str(hint)


def _shown(value: object) -> str:
    """The value and its TOML type, cut short."""
    names = {bool: "boolean", int: "integer", float: "float", str: "string", list: "array", dict: "table"}
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({names.get(type(value), type(value).__name__)})"
