"""Calls in a text: which form a template shows, and a parser that finds the same calls however the text is cut."""

import itertools
import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve.api.openai.tools import BARE, TAGGED, CallParser, CallPart, call_form, gathered

NAMES = frozenset({"find", "add-2"})
TAGGED_TEMPLATE = """{% if tools %}<tools>{{ tools }}</tools> {"name": ..., "arguments": ...}{% endif %}
{% for m in messages %}<tool_call>{{ m }}</tool_call>{% endfor %}"""
BARE_TEMPLATE = """{% if tools is defined %}{{ tools }}{% endif %}{{ '{"name": "' + f.name + '", "parameters": ' }}"""


def read(text, form=TAGGED, cuts=()):
    """(text, calls) of the text in pieces."""
    parser, parts, places = CallParser(form, NAMES), [], [0, *sorted({c for c in cuts if 0 < c < len(text)}), len(text)]
    for begin, end in itertools.pairwise(places):
        parts += parser.push(text[begin:end])
    parts += parser.flush()
    said, calls = gathered(parts)
    assert parser.calls == len(calls)
    # The name comes first and once, and nothing comes before its call.
    indices = [p.index for p in parts if isinstance(p, CallPart)]
    assert indices == sorted(indices)
    assert [p.index for p in parts if isinstance(p, CallPart) and p.name is not None] == list(range(len(calls)))
    return said, calls


def tagged(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("template", "form"),
    [
        pytest.param(None, None, id="none"),
        pytest.param("{% for m in messages %}{{ m.content }}{% endfor %}", None, id="no_tools"),
        pytest.param(TAGGED_TEMPLATE, TAGGED, id="tagged"),
        pytest.param(TAGGED_TEMPLATE + "<function=x>", None, id="xml"),
        pytest.param(TAGGED_TEMPLATE.replace("tools", "others"), None, id="calls_without_tools"),
        pytest.param(BARE_TEMPLATE, BARE, id="bare"),
        pytest.param("{% if tools %}[TOOL_CALLS]{{ tools }}{% endif %}", None, id="unknown_form"),
    ],
)
def test_the_form_is_read_off_the_template(template, form):
    assert call_form(template) == form


ARGUMENTS = '{"q": "a } </tool_call> \\" {", "n": [1, {"x": null}]}'
TABLE = {
    "text": ("hello", "hello", []),
    "white_space_at_the_end": ("hello \n", "hello \n", []),
    "one": (tagged("find", ARGUMENTS), "", [("find", ARGUMENTS)]),
    "text_around": (f"So:\n{tagged('find', '{}')}\nDone. ", "So:\nDone.", [("find", "{}")]),
    "two": (tagged("find", "{}") + "\n" + tagged("add-2", '{"a":1}'), "", [("find", "{}"), ("add-2", '{"a":1}')]),
    "compact": ('<tool_call>{"name":"find","arguments":{"a":1}}</tool_call>', "", [("find", '{"a":1}')]),
    "other_order": ('<tool_call>{"arguments": {"a": 1}, "name": "find"}</tool_call>', "", [("find", '{"a": 1}')]),
    "no_arguments": ('<tool_call>{"name": "find"}</tool_call>', "", [("find", "{}")]),
    "unknown_function": (tagged("drop", "{}"), tagged("drop", "{}"), []),
    "no_json": ("a <tool_call>b</tool_call> c", "a <tool_call>b</tool_call> c", []),
    "arguments_no_object": (tagged("find", "[1]"), tagged("find", "[1]"), []),
    "cut_in_the_head": ('x <tool_call>\n{"name": "fi', 'x <tool_call>\n{"name": "fi', []),
    "cut_in_the_arguments": (tagged("find", '{"a": "b')[:-14], "", [("find", '{"a": "b')]),
    "no_end_mark": (tagged("find", "{}")[:-13], "", [("find", "{}")]),
    "broken_arguments": ('<tool_call>{"name": "find", "arguments": {"a": </tool_call>b', "b", [("find", '{"a": ')]),
    "part_of_a_mark": ("a <tool_c", "a <tool_c", []),
    "begins_like_a_mark": ("a <tool> b", "a <tool> b", []),
}
BARE_TABLE = {
    "one": ('{"name": "find", "parameters": {"a": "}"}}', "", [("find", '{"a": "}"}')]),
    "after_white_space": (' \n{"name": "find", "parameters": {}} \n', "", [("find", "{}")]),
    "more_after_it": ('{"name": "find", "parameters": {}} so', " so", [("find", "{}")]),
    "text": ("hi {", "hi {", []),
    "other_json": (' {"a": 1}\n', ' {"a": 1}\n', []),
    "unknown_function": ('{"name": "drop", "parameters": {}}', '{"name": "drop", "parameters": {}}', []),
    "cut": ('{"name": "find", "para', '{"name": "find", "para', []),
    "not_at_the_start": ('x {"name": "find", "parameters": {}}', 'x {"name": "find", "parameters": {}}', []),
    "tags_are_text": (tagged("find", "{}"), tagged("find", "{}"), []),
}
CASES = [pytest.param(TAGGED, *row, id=f"tagged_{name}") for name, row in TABLE.items()]
CASES += [pytest.param(BARE, *row, id=f"bare_{name}") for name, row in BARE_TABLE.items()]


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
def test_a_text_has_these_calls_whole_and_letter_by_letter(form, text, said, calls):
    assert read(text, form) == (said, calls)
    assert read(text, form, range(len(text))) == (said, calls)


MARKS = [
    "<tool_call>",
    "</tool_call>",
    "<tool",
    '{"name": "find", "arguments": ',
    '{"name": "nobody"',
    '"parameters": ',
]
LETTERS = [*'{}"\\ \na', '{"a": "<"}', tagged("find", '{"q": "é"}'), tagged("add-2", "{}")]
PIECES = st.sampled_from([*MARKS, *LETTERS])


@given(
    st.lists(PIECES, max_size=12).map("".join),
    st.lists(st.integers(1, 300), max_size=8),
    st.sampled_from([TAGGED, BARE]),
)
@example(TABLE["two"][0], [3, 40], TAGGED)
def test_any_split_gives_the_same(text, cuts, form):
    assert read(text, form, cuts) == read(text, form)


@given(st.lists(st.tuples(st.sampled_from(sorted(NAMES)), st.dictionaries(st.text(), st.text())), max_size=3))
def test_what_is_written_is_read(calls):
    text = "\n".join(tagged(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls)
    said, found = read(text, cuts=range(0, len(text), 3))
    assert (said, [(name, json.loads(arguments)) for name, arguments in found]) == ("", calls)
