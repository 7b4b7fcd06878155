"""The sandbox of chat templates: Jinja's immutable one, with limits of time and of the text that a template makes.

A template could double a string until the memory is gone, long before it writes anything.  Everything that makes a longer
text or list therefore asks the `Meter` of the rendering first whether there is room for it, and what was made is counted,
also what is dropped again.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Set, ValuesView
from contextvars import ContextVar

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor
from jinja2.exceptions import SecurityError

MAX_NUMBER_BITS = 1 << 20
MAX_PADDING = 16  # characters of JSON's indent and separators
ITEM, TEXT_ITEM = 8, 64  # what an item of a list counts, in characters: a reference, and a text or a number of its own
STEP, NODE = 32, 4  # what an iteration, a call of a macro or a look into a list counts, and each part of a body
LAYOUT_FILTERS = ("center", "pprint", "urlize", "wordwrap", "xmlattr")  # for pages; not limited here, so left out
LAYOUT_METHODS = frozenset({"encode", "expandtabs", "format_map", "translate", "to_bytes", "from_bytes"})
STRUCTURE_FILTERS = frozenset(  # which take lists and make no text of their items
    {"attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map"}
    | {
        "max",
        "min",
        "random",
        "reject",
        "rejectattr",
        "reverse",
        "select",
        "selectattr",
        "slice",
        "sort",
        "sum",
        "unique",
    }
)
LISTS = (list, tuple, Set, KeysView, ValuesView, ItemsView)
WIDE_FORMAT = re.compile(  # a width beyond 999, one that comes with the values, a key with brackets in it
    r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\d{4}|\*)|%\([^()]*\(|\{[^{}]*(?:\d{4}|\{)"
)


class Meter:
    """What one rendering may still make, and until when.  Not reachable by templates."""

    def __init__(self, *, characters: int, seconds: float):
        self._left, self._seconds = characters, seconds
        self._deadline_s = time.monotonic() + seconds

    @property
    def left(self) -> int:
        """Returns the characters there is room for."""
        return self._left

    def need(self, characters: int) -> None:
        """Raises SecurityError when there is no room for so many characters, and after the deadline."""
        if characters > self._left:
            raise SecurityError("the texts it makes are too large")
        if time.monotonic() > self._deadline_s:
            raise SecurityError(f"it took longer than {self._seconds:g} seconds")

    def spend(self, characters: int) -> None:
        """Counts characters that were made.  Raises as `need`."""
        self.need(characters)
        self._left -= characters


METER: ContextVar[Meter] = ContextVar("meter")  # of the rendering; none while a template is compiled


def _need(characters: int) -> None:
    METER.get().need(characters)


def _size(value: object) -> int:
    """Returns the characters of a value as text, about; an object that is in it twice counts twice.

    Raises SecurityError when there is no room for them.
    """
    meter, todo, total = METER.get(), [value], 0
    while todo:
        one = todo.pop()
        total += ITEM
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, LISTS):
            todo += one
            total += STEP
        elif isinstance(one, Mapping):
            todo += [part for item in one.items() for part in item]
            total += STEP
        elif isinstance(one, jinja2.utils.Namespace):
            raise SecurityError("a namespace is no text")
        meter.need(total + ITEM * len(todo))
    return total


def _made(value: object) -> int:
    """Returns what a new value counts, without what its items are."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return (TEXT_ITEM if value and isinstance(value[0], str | int | float) else ITEM) * len(value)
    if isinstance(value, dict):
        return TEXT_ITEM * len(value)
    return value.bit_length() // 8 if isinstance(value, int) else 0


def _check_number(bits: int) -> None:
    if bits > MAX_NUMBER_BITS:
        raise SecurityError(f"the numbers it computes have more than {MAX_NUMBER_BITS} bits")


def _replaced(text: object, old: object, new: object, count: object = None) -> int:
    _need(_size((old, new)))
    whole, part = str(text), str(old)
    return len(whole) + (whole.count(part) if part else len(whole) + 1) * len(str(new))


def _formatted(template: object, *args: object, **kwargs: object) -> int:
    text = str(template)
    if WIDE_FORMAT.search(text):
        raise SecurityError("a format may only have widths below 1000")
    return len(text) + (text.count("%") + text.count("{")) * (1000 + _size(args) + _size(kwargs))


def _joined(values: list[object], d: object = "", attribute: object = None) -> int:
    return _size(values) + len(values) * _size(d)


def _indented(text: object, width: object = 4, first: object = False, blank: object = False) -> int:
    each = width if isinstance(width, int) else len(str(width))
    return len(str(text)) + (len(str(text).splitlines()) + 1) * each


def _summed(values: object, attribute: object = None, start: object = 0) -> int:
    if not isinstance(start, int | float):
        raise SecurityError("only numbers are summed")
    return 0


def _padded(text: str, width: int, fill: object = " ") -> int:
    return max(len(text), width)


FILTER_NEEDS: Mapping[str, Callable[..., int]] = {
    "batch": lambda values, linecount, fill_with=None: ITEM * linecount,
    "format": _formatted,
    "indent": _indented,
    "join": _joined,
    "replace": _replaced,
    "slice": lambda values, slices, fill_with=None: TEXT_ITEM * slices,
    "sum": _summed,
}
METHOD_NEEDS: Mapping[str, Callable[..., int]] = {
    "center": _padded,
    "format": _formatted,
    "join": lambda separator, values: _joined(values, separator),
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "zfill": _padded,
}


def _metered(name: str, filter: Callable[..., object]) -> Callable[..., object]:
    """Returns the filter with limits: it cannot be folded when the template is compiled, as there is no meter then."""
    skip = hasattr(filter, "jinja_pass_arg")  # a first argument from Jinja

    @functools.wraps(filter)
    def metered(*args: object, **kwargs: object) -> object:
        given = list(args)
        if name == "join" and not isinstance(given[skip], str):
            given[skip] = _listed(given[skip])
        if name not in STRUCTURE_FILTERS and not isinstance(given[skip], str):
            _need(_size(given[skip]))
        if name in FILTER_NEEDS:
            _need(FILTER_NEEDS[name](*given[skip:], **kwargs))
        result = filter(*given, **kwargs)
        METER.get().spend(_made(result))
        return result

    return metered


def _listed(values: object) -> list[object]:
    """Returns the items of a list, a generator, …; counts them as they come."""
    if not isinstance(values, Iterable):
        raise SecurityError("only lists are joined")
    items: list[object] = []
    for item in values:
        items.append(item)
        _need(ITEM * len(items))
    return items


def to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns the value as JSON; unlike Jinja's own filter without HTML escapes."""
    for padding in (" " * indent if isinstance(indent, int) and indent <= MAX_PADDING else indent, *(separators or ())):
        if padding is not None and not (isinstance(padding, str) and len(padding) <= MAX_PADDING):
            raise SecurityError(f"JSON's indent and separators have at most {MAX_PADDING} characters")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces: list[str] = []
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        METER.get().spend(len(piece))
    return "".join(pieces)


class _Limits(jinja2.visitor.NodeTransformer):
    """Has a sandbox told of what Jinja does by itself: `~`, slices, iterations and calls of macros."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes, node)

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _call("kept", [node], node) if isinstance(node.arg, jinja2.nodes.Slice) else node

    def _visit_body(self, node: jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock) -> jinja2.nodes.Node:
        parts = sum(1 for _ in node.find_all(jinja2.nodes.Node))
        self.generic_visit(node)
        cost = jinja2.nodes.Const(STEP + NODE * parts)
        node.body.insert(0, jinja2.nodes.ExprStmt(_call("step", [cost], node)).set_lineno(node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = _visit_body


def _call(name: str, args: list[jinja2.nodes.Expr], at: jinja2.nodes.Node) -> jinja2.nodes.Call:
    call = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute(name), args, [], None, None)
    return call.set_lineno(at.lineno)  # ty: ignore[invalid-explicit-return]


def _concat(pieces: Iterable[str]) -> str:
    """Joins what a macro or a block wrote."""
    texts = list(pieces)
    size = sum(map(len, texts))
    _need(size)
    METER.get().spend(size)
    return "".join(texts)


def _as_text(value: object) -> object:
    """Looks at what is written, before it becomes text."""
    meter = METER.get(None)
    if meter is not None and not isinstance(value, str):
        meter.need(_size(value))
    return value


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Compiles and runs templates; running needs a METER."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)

    def __init__(self, extensions: list[type[jinja2.ext.Extension]]):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_as_text)
        self.filters["tojson"] = to_json
        self.filters = {n: _metered(n, f) for n, f in self.filters.items() if n not in LAYOUT_FILTERS}
        del self.globals["lipsum"]  # it makes text of any length

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Limits().visit(super()._parse(source, name, filename))

    @staticmethod
    def step(cost: int) -> None:
        """Counts an iteration or a call, and checks the time."""
        METER.get().spend(cost)

    @staticmethod
    def kept(value: object) -> object:
        """Returns it; `call` counts it."""
        return value

    @staticmethod
    def joined(*values: object) -> str:
        """Returns what `~` makes."""
        _need(_size(values))
        return "".join(map(str, values))

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        """Returns whether a template may have it."""
        return attr not in LAYOUT_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(self, context: jinja2.runtime.Context, obj: object, /, *args: object, **kwargs: object) -> object:
        """Calls a function, a macro or a method, if there is room for what it makes."""
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps str.format
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str) and name in METHOD_NEEDS:
            if name == "join" and args:
                args = (_listed(args[0]), *args[1:])
            _need(METHOD_NEEDS[name](text, *args, **kwargs))
        result = super().call(context, obj, *args, **kwargs)
        METER.get().spend(_made(result))
        return result

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        """Computes `left operator right`, if there is room for it."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_number(left.bit_length() * abs(right))
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check_number(left.bit_length() + right.bit_length())
        elif operator == "%" and isinstance(left, str):
            _need(_formatted(left, right))
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _need(_made(one) * other)
        elif isinstance(left, str | list | tuple):
            _need(_made(left) + _made(right))
        result = super().call_binop(context, operator, left, right)
        METER.get().spend(_made(result))
        return result
