"""Settings files to begin with: every setting with its default and what it means, made from the dataclasses themselves.

What a setting means is the comment beside its field, read from the source, so that a file cannot say anything else.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import math
import textwrap
import tokenize
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path

from jaxlora.config.base import DEMO_MODEL
from jaxlora.config.toml import item_of, section_of, types_of

WIDTH = 118
COLUMN = 40  # where comments begin

# Values to show for settings that have no default, or none that can be written down.
EXAMPLES: dict[str, object] = {
    "AdapterSection.path": "runs/support/peft",
    "active_slots": 6,
    "adapter_bytes": 10 * 2**30,
    "adapters": 100,
    "beta": 0.1,
    "clip_high": 1.2,
    "clip_low": 0.8,
    "database": "postgresql+psycopg://user@host/name",
    "disk_gb": 100.0,
    "file_bytes": 10 * 2**30,
    "heldout": "heldout.jsonl",
    "host_adapters_gb": 2.0,
    "host_kv_gb": 0.5,
    "host_states_gb": 2.0,
    "jobs": 20,
    "kv_pages": 128,
    "lane_tokens": 256,
    "longest_tokens": 1024,
    "lanes": 4,
    "lora_roots": ("/srv/adapters",),
    "lr": 1e-3,
    "max_rank": 32,
    "max_waiting_tokens": 131_072,
    "memory_gb": 8.0,
    "most_replicas": 4,
    "most_trainers": 2,
    "name": "support",
    "open_requests": 64,
    "otel_endpoint": "http://127.0.0.1:4318",
    "passes": 2,
    "path": DEMO_MODEL,
    "pin": ("support",),
    "prefill_lanes": 8,
    "prefill_lanes_while_decoding": 2,
    "prefill_tokens": 32,
    "rank": 8,
    "RankClassSection.slots": 32,
    "read_memory_bytes": 2 * 2**30,
    "requests_per_address": 64,
    "requests_per_minute": 600,
    "rows": 8,
    "slot_sizes": (4, 8, 16),
    "slots": 8,
    "steps": 100,
    "tokens_per_minute": 1_000_000,
    "train": "train.jsonl",
    "url": "s3://bucket/prefix",
    "warmup_steps": 10,
}


@dataclass(frozen=True, slots=True)
class Note:
    """The comments of one field: those on the lines above it, and the one beside it."""

    above: str = ""
    beside: str = ""


def template(cls: type, command: str) -> str:
    """Returns a TOML file with every setting of `cls`: what must be given, and the rest as comments."""
    opening = [
        _first_line(cls),
        "",
        f"  {command}",
        "",
        "What stands here without a # must be given.  The rest are comments: defaults, or examples where something else",
        "happens to a setting that is left out.  Take the # away to set one; paths start at this file's folder.",
    ]
    return "\n".join([*(f"# {line}".rstrip() for line in opening), "", *_table(cls, "", active=True)]) + "\n"


def _table(cls: type, place: str, *, active: bool) -> list[str]:
    """Returns the lines of a table's keys, and then of the tables in it."""
    assert is_dataclass(cls)
    kinds, notes = types_of(cls), _notes(cls)
    lines, tables = [], []
    for f in sorted(fields(cls), key=_has_default):
        note, kind = notes.get(f.name, Note()), kinds[f.name]
        inner, item = section_of(kind), section_of(item_of(kind))
        name = f"{place}.{f.name}".removeprefix(".")
        if inner is not None or item is not None:
            own = inner or item
            assert own is not None
            said = "  ".join(filter(None, [_first_line(own), _plain(note.above), _plain(note.beside)]))
            shown = active and (not _has_default(f) or (inner is not None and f.default is not None))
            head = f"[{name}]" if item is None else f"[[{name}]]"
            tables += ["", *_wrapped(said), head if shown else f"# {head}", *_table(own, name, active=shown)]
        else:
            required = active and not _has_default(f)
            if note.above:
                lines += _wrapped(_plain(note.above))
            example = EXAMPLES.get(f"{cls.__name__}.{f.name}", EXAMPLES.get(f.name))
            shown = example if f.default in (MISSING, None, ()) else f.default
            lines += _pair(f"{'' if required else '# '}{f.name} = {_value(shown)}", _plain(note.beside))
    return lines + tables


def _pair(line: str, beside: str) -> list[str]:
    if not beside:
        return [line]
    whole = f"{line.ljust(COLUMN)}  # {beside}"
    return [whole] if len(whole) <= WIDTH else [*_wrapped(beside), line]


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]


def _has_default(f: Field) -> bool:
    return f.default is not MISSING


def _plain(comment: str) -> str:
    """Returns a comment in TOML's terms, which has no None."""
    return comment.replace("None", "left out").replace(".  left out", ".  Left out")


def _wrapped(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text[:1].upper() + text[1:], WIDTH - 2)]


def _value(value: object) -> str:
    """Returns a value as TOML writes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _notes(cls: type) -> dict[str, Note]:
    """Returns the comments of a dataclass's fields, those of its bases too."""
    notes: dict[str, Note] = {}
    for base in reversed(cls.__mro__):
        if is_dataclass(base):
            notes |= _own_notes(textwrap.dedent(inspect.getsource(base)))
    return notes


def _own_notes(source: str) -> dict[str, Note]:
    comments = {
        token.start[0]: (token.string.lstrip("# "), not token.line[: token.start[1]].strip())
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (body,) = (node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    notes = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            line, above = node.lineno - 1, []
            while comments.get(line, ("", False))[1]:
                above.insert(0, comments[line][0])
                line -= 1
            beside, _ = comments.get(node.end_lineno or node.lineno, ("", False))
            notes[node.target.id] = Note(" ".join(above), beside)
    return notes
