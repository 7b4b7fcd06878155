"""Loads TOML into frozen dataclasses, strictly, by pydantic: `load(path, cls)`.  One error reports a file's mistakes.

A field's type is checked as pydantic's strict mode checks JSON: a float accepts an integer, only bool accepts a bool,
and an enum is given by its value.  `X | None` may be left out if it has a default, as TOML has no null.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from jaxlora.core.errors import ConfigInvalid

MOST_SHOWN = 5  # mistakes that one error shows


def load[T](path: Path, cls: type[T]) -> T:
    """Returns the settings in a TOML file as an instance of the dataclass `cls`.

    Raises ConfigInvalid, naming the file and the dotted key, for a file that cannot be read or parsed, an unknown or
    missing key, a value of another type, and whatever a dataclass's own check refuses.
    """
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as e:
        raise ConfigInvalid(f"{path}: cannot be read ({e.strerror}); give the path of a TOML file") from e
    except UnicodeDecodeError as e:
        raise ConfigInvalid(f"{path}: is not UTF-8 text (byte {e.start}); TOML files are") from e
    except tomllib.TOMLDecodeError as e:
        raise ConfigInvalid(f"{path}: is not TOML: {e}") from e
    text = json.dumps(table, default=lambda date: {"date or time": str(date)})  # no field accepts this value
    try:
        return TypeAdapter(cls).validate_json(text, strict=True, extra="forbid", context=path.parent)
    except ValidationError as e:
        # Unknown keys first: another key may be missing because it is misspelt.
        errors = sorted(e.errors(include_url=False), key=lambda error: error["type"] != "unexpected_keyword_argument")
        mistakes = [(_key(error["loc"]), _message(error, cls)) for error in errors]
        shown = [f"{key}: {message}" if key else message for key, message in mistakes[:MOST_SHOWN]]
        if len(mistakes) > MOST_SHOWN:
            shown.append(f"and {len(mistakes) - MOST_SHOWN} more mistakes")
        raise ConfigInvalid(f"{path}: {'; '.join(shown)}", param=mistakes[0][0] or None) from e


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


# A path; a relative one is resolved against the file's folder.
TomlPath = Annotated[Path, BeforeValidator(_beside_file)]
# Such a path with a default, which is resolved likewise.
TomlPathByDefault = Annotated[TomlPath, Field(validate_default=True)]
# A name, or such a path: a text that begins with ./, ../, / or ~, ends in .gguf, or exists in the file's folder.
PathOrName = Annotated[str, AfterValidator(_path_or_name)]


def _key(parts: tuple[int | str, ...]) -> str:
    """Returns the dotted key: ("rows", 1, "size") → rows[1].size"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")


def _message(error: ErrorDetails, cls: type) -> str:
    """Describes what is wrong with the value, in TOML's terms."""
    match error["type"]:
        case "missing":
            wanted = _fields_at(cls, error["loc"][:-1])[str(error["loc"][-1])]
            return f"missing (wanted {wanted.__name__ if isinstance(wanted, type) else wanted})"
        case "unexpected_keyword_argument":
            return f"unknown key (known here: {', '.join(_fields_at(cls, error['loc'][:-1]))})"
        case "value_error":
            return str(error["ctx"]["error"])
    wanted = error["msg"].replace("Input should be", "must be").replace("an object", "a table")
    shown = repr(error["input"])
    return f"{wanted}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"


def _fields_at(cls: type, parts: tuple[int | str, ...]) -> dict[str, object]:
    """Returns name → type of the fields of the table that a key names."""
    for part in parts:
        cls = get_args(cls)[0] if isinstance(part, int) else get_type_hints(cls)[part]
        if get_origin(cls) in (UnionType, Union):
            (cls,) = (a for a in get_args(cls) if a is not NoneType)
    return get_type_hints(cls)
