"""Every threat that we know has a test that shows what happens instead, or a line in docs/operations.md why it cannot come.

A test carries the ids of the threats that it shows: `@pytest.mark.fault("T1")`; `pytest --collect-only -q` with
`-m fault` lists them.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
OPERATIONS = TESTS.parent / "docs/operations.md"
NOT_IN_CI = {"soak", "s3", "postgres"}

FAULTS = {
    # Hostile adapters and files
    "A1": "weights are a pickle, which runs code when it is read",
    "A2": "weights hold NaN or infinity, from a file or from training",
    "A3": "one slot's NaN leaks into rows that do not use it",
    "A4": "tensors are not of the rank, layers and modules that the config says",
    "A5": "a safetensors header claims sizes that nobody has, or is itself too large",
    "A6": "an archive unpacks without end, or to a place outside its folder",
    "A7": "a name is a path, or looks like another name",
    "A8": "an adapter is given as a location, and the server fetches it",
    "A9": "a config, tokenizer or template brings code, or costs more than it may",
    "A10": "a GGUF file points outside itself",
    "A11": "an adapter was made for another base and happens to fit",
    "A12": "finite weights are so large that products overflow",
    # Isolation of tenants
    "T1": "a key reads or uses what is another tenant's",
    "T2": "a cached prefix tells one tenant what another asked",
    "T3": "a new version answers from the old one's keys and values",
    "T4": "an answer mixes versions while one is published",
    "T5": "a slot is given away while a request still reads it",
    "T6": "a step needs more adapters than there are slots",
    "T7": "a tenant with much work leaves the others none",
    "T8": "an error or a log line quotes a prompt, a key or a path",
    "T9": "a key can be guessed or read, or works after it was revoked",
    "T10": "a route answers without a key",
    "T11": "a web page, or the text of a model, steers the user's browser or terminal",
    "T12": "rows keep the slot numbers of before adapters moved",
    # Resources
    "R1": "a body is too large, or never ends",
    "R2": "one request asks for hundreds of answers",
    "R3": "prompt and answer do not fit the context",
    "R4": "more comes than can be served",
    "R5": "a client leaves and its work goes on",
    "R6": "a grammar takes forever to compile or to follow",
    "R7": "shapes or settings of requests make programs compile again",
    "R8": "cold or broken adapters push out those in use",
    "R9": "the disk is full in the middle of a write",
    "R10": "memory, threads or descriptors grow with what was served",
    "R11": "paused requests hold all pages and nobody goes on",
    # Crash and recovery
    "C1": "a training process is killed at any moment",
    "C2": "a process is killed within a save, an upload or a publication",
    "C3": "a server is told to end while it answers",
    "C4": "the device thread dies or hangs",
    "C5": "a request is sent twice",
    "C6": "the database is away or locked",
    "C7": "two servers believe that one thing is theirs",
    "C8": "the object store is slow, fails, or gives back other bytes",
    "C9": "one of the processes that train together dies",
    "C10": "a replica dies under load",
    "C11": "data of an older version is opened by a newer one",
    "C12": "bytes of a stored version have changed",
    # Training
    "N1": "a step moves the weights of a tenant who is not in it",
    "N2": "a tenant inherits the moments of who had its slot before",
    "N3": "padding or prompts are learned",
    "N4": "some targets do not learn, or something else does",
    "N5": "accumulated gradients are not those of the large batch",
    "N6": "a setting is accepted and ignored",
    "N7": "an exported adapter is not the one that was trained",
    "N8": "sampling changes the training state",
    # Cluster and supply chain
    "S1": "whoever reaches the port between nodes is believed",
    "S2": "a compiled program from another user's folder is run",
    "S3": "a dependency is replaced, or has a known hole",
    "S4": "who breaks into the container can change it",
}


def marks(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> dict[str, list[ast.expr]]:
    """The arguments of each pytest mark of a test, by the mark's name."""
    found = {}
    for mark in node.decorator_list:
        call = mark.func if isinstance(mark, ast.Call) else mark
        if ast.unparse(call).startswith("pytest.mark."):
            found[ast.unparse(call).removeprefix("pytest.mark.")] = mark.args if isinstance(mark, ast.Call) else []
    return found


def shown(sources: dict[str, str]) -> dict[str, list[str]]:
    """Id → tests of these files that carry it and that CI runs.  Raises ValueError for a mark that is on no test."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, source in sources.items():
        tree = ast.parse(source)
        whole_file = {word for node in tree.body if isinstance(node, ast.Assign) for word in file_marks(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                carried = marks(node)
                if "fault" in carried and not re.match("test_|Test", node.name):
                    raise ValueError(f"{name}: {node.name} is no test")
                if not NOT_IN_CI & (carried.keys() | whole_file):
                    for id in carried.get("fault", []):
                        found[ast.literal_eval(id)].append(f"{name}::{node.name}")
    return found


def file_marks(node: ast.Assign) -> list[str]:
    """The marks that `pytestmark = ...` gives to a whole file."""
    return re.findall(r"pytest\.mark\.(\w+)", ast.unparse(node.value)) if "pytestmark" in ast.unparse(node) else []


def excused(text: str) -> dict[str, str]:
    """Id → reason, of the table in the section of faults that do not apply."""
    section = text.partition("## Faults that do not apply\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| ([A-Z]\d+) \| .*? \| (.+) \|$", section, re.M))


@pytest.fixture(scope="module")
def ours() -> dict[str, list[str]]:
    return shown({str(p.relative_to(TESTS)): p.read_text() for p in sorted(TESTS.rglob("test_*.py"))})


def test_every_threat_is_shown_by_a_test_or_excused(ours):
    reasons = excused(OPERATIONS.read_text())
    assert sorted(FAULTS.keys() - ours.keys() - reasons.keys()) == []
    assert sorted(reasons.keys() & ours.keys()) == [], "a test shows it: it does apply"
    assert sorted(reasons.keys() - FAULTS.keys()) == []
    assert all(len(reason) > 40 for reason in reasons.values())


def test_no_test_carries_an_id_that_is_not_in_the_table(ours):
    assert {id: tests for id, tests in ours.items() if id not in FAULTS} == {}


SOURCE = """
@pytest.mark.fault("T1", "T2")
@pytest.mark.slow
def test_both(): ...
class TestAll:
    @pytest.mark.parametrize("x", [1])
    @pytest.mark.fault("T2")
    async def test_one(self, x): ...
@pytest.mark.soak
@pytest.mark.fault("T3")
def test_never(): ...
def test_none(): ...
"""


def test_the_scan_sees():
    assert shown({"a": SOURCE}) == {"T1": ["a::test_both"], "T2": ["a::test_both", "a::test_one"]}
    assert shown({"a": "pytestmark = [pytest.mark.s3]\n" + SOURCE}) == {}
    with pytest.raises(ValueError, match="a: helper is no test"):
        shown({"a": SOURCE.replace("test_both", "helper")})
    page = "## A\n| T9 | x | y |\n## Faults that do not apply\n\n| id | a | why |\n| --- | --- | --- |\n| T1 | b | c d |\n## B\n"
    assert excused(page) == {"T1": "c d"}
