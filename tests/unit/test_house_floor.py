"""The floor plan, computed from the imports: folders point one way, stay small, say what they are, and some reach no jax.

Every rule is a pure function of {path: source}.  A folder of a package is a node of the graph, the package's root too; an
import stands for an edge wherever in a file it is, also inside a function.
"""

from __future__ import annotations

import ast
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
PACKAGES = ("pallas_kernels", "jaxlora", "train", "serve")  # each may import those before it
MAX_MODULES, MAX_LINES = 15, 600
DOCSTRING_LINES = range(2, 7)  # about three
PURE = (  # folders, and the files of others that decide
    "jaxlora/core",
    "jaxlora/config",
    "train/data",
    "train/jobs/fair_queue.py",
    "train/jobs/job.py",
    "jaxlora/model/memory_needs.py",
    "jaxlora/model/memory_plan.py",
    "serve/access",
    "serve/api/adapters/schemas.py",
    "serve/api/files/schemas.py",
    "serve/api/files/service.py",
    "serve/api/gradient/schemas.py",
    "serve/api/jobs/schemas.py",
    "serve/api/openai/schemas.py",
    "serve/api/responses/schemas.py",
    "serve/cluster/answers.py",
    "serve/cluster/autoscaler.py",
    "serve/cluster/peer.py",
    "serve/cluster/reconciler.py",
    "serve/cluster/relay.py",
    "serve/cluster/rendezvous.py",
    "serve/cluster/replica_view.py",
    "serve/cluster/router.py",
    "serve/cluster/training/placement.py",
    "serve/cluster/training/report.py",
    "serve/db",
    "serve/engine/grammar.py",
    "serve/engine/page_cache.py",
    "serve/engine/request.py",
    "serve/engine/scheduler.py",
    "serve/engine/sequence.py",
    "serve/engine/slot_scheduler.py",
    "serve/engine/slots.py",
    "serve/engine/telemetry.py",
    "serve/http",
    "serve/jobs/resolve.py",
    "serve/observability/logs.py",
    "serve/observability/tracing.py",
    "serve/runtime/backend.py",
    "serve/runtime/budget.py",
)
ONLY_IN = {  # somebody else's package → the only folders or files that import it
    "alembic": ("serve/db/migrations.py",),
    "flax": ("jaxlora/model/decoder.py",),
    "limits": ("serve/access/rate_limit.py",),
    "llguidance": ("serve/engine/grammar.py",),
    "obstore": ("jaxlora/storage/",),
    "opentelemetry": ("serve/observability/tracing.py",),
    "prometheus_client": ("serve/cluster/metrics.py", "serve/observability/metrics.py"),
    "pydantic": (
        "jaxlora/config/toml.py",
        "serve/api/",
        "serve/db/job_spec.py",
        "serve/http/errors.py",
        "serve/http/pagination.py",
        "serve/http/schema.py",
    ),
    "python_multipart": ("serve/http/multipart.py",),
    "ray": ("serve/cluster/ray_servers.py",),
    "sqlalchemy": ("serve/db/",),
    "structlog": ("serve/observability/logs.py",),
    "typer": ("serve/cli/",),
}
DOORS = {"jaxlora/__init__.py": "serve.session.Session"}  # the one import upwards, made when it is asked for
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch")
VAGUE = ("utils", "util", "helpers", "misc", "common")
JAX_FAMILY = ("jax", "jaxlib", "flax", "optax", "orbax")

type Sources = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Import:
    """One import of a module, ours or not."""

    file: str
    line: int
    module: str  # dotted, absolute; `from a import b` is a.b
    runs: bool  # when the file is imported, not only when a function is called

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def folder_of(file: str) -> str:
    return str(PurePosixPath(file).parent)


@functools.cache
def imports(file: str, source: str) -> list[Import]:
    """All of a file, those with a constant name given to `import_module` too."""
    return list(_imports(file, source))


def _imports(file: str, source: str) -> Iterator[Import]:
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        modules: list[str] = []
        match node:
            case ast.Import():
                modules = [alias.name for alias in node.names]
            case ast.ImportFrom():
                # The folder of the file is one level up for a module and for __init__ alike.
                up = PurePosixPath(file).parts[: -node.level] if node.level else ()
                base = [*up, *([node.module] if node.module else [])]
                modules = [".".join([*base, alias.name]) for alias in node.names]
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module")):
                match node.args:
                    case [ast.Constant(value=str(name)), *_]:
                        modules = [name]
        for module in modules:
            if DOORS.get(file) != module:
                yield Import(file, node.lineno, module, id(node) not in inside)


def all_imports(sources: Sources) -> list[Import]:
    return [found for file, source in sources.items() for found in imports(file, source)]


def target(sources: Sources, module: str) -> str | None:
    """The file of ours that an import names; None if it is somebody else's."""
    parts = module.split(".")
    while parts:
        path = "/".join(parts)
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in sources:
                return file
        parts.pop()  # a name in a module
    return None


def graph(sources: Sources) -> dict[str, dict[str, Import]]:
    """folder → folder that it imports → one of the imports."""
    edges: dict[str, dict[str, Import]] = defaultdict(dict)
    for found in all_imports(sources):
        file = target(sources, found.module)
        if file is not None and folder_of(file) != folder_of(found.file):
            edges[folder_of(found.file)].setdefault(folder_of(file), found)
    return edges


def cycles(sources: Sources) -> list[list[str]]:
    """The imports that close a circle of folders, for each folder that can reach itself by a shortest way."""
    edges, found = graph(sources), {}
    for start in edges:
        ways: dict[str, list[str]] = {start: []}
        todo = [start]
        while todo and start not in found:
            here = todo.pop(0)
            for there, by in edges.get(here, {}).items():
                way = [*ways[here], str(by)]
                if there == start:
                    found[start] = way
                    break
                if there not in ways:
                    ways[there] = way
                    todo.append(there)
    return list({tuple(sorted(way)): way for way in found.values()}.values())


def crowded(sources: Sources) -> dict[str, int]:
    """Folders of too many modules."""
    counts = Counter(folder_of(file) for file in sources if not file.endswith("/__init__.py"))
    return {folder: count for folder, count in counts.items() if count > MAX_MODULES}


def long_files(sources: Sources) -> dict[str, int]:
    """Files of too many lines."""
    lengths = {file: len(source.splitlines()) for file, source in sources.items()}
    return {file: length for file, length in lengths.items() if length > MAX_LINES}


def upward(sources: Sources) -> list[str]:
    """Imports from a lower package to a higher one."""
    rank = {package: i for i, package in enumerate(PACKAGES)}
    return [str(i) for i in all_imports(sources) if rank.get(i.top, 0) > rank[i.file.split("/")[0]]]


def undescribed(sources: Sources) -> list[str]:
    """Folders whose __init__.py does not say in about three lines what they are."""

    def lines(folder: str) -> int:
        text = ast.get_docstring(ast.parse(sources.get(f"{folder}/__init__.py", "")))
        return 0 if text is None else sum(bool(line.strip()) for line in text.splitlines())

    return [f for f in sorted({folder_of(file) for file in sources}) if lines(f) not in DOCSTRING_LINES]


def run_by(sources: Sources, module: str) -> Iterator[str]:
    """The files of ours that importing a module runs: its own, and those of the packages around it."""
    file = target(sources, module)
    if file is not None:
        yield file
        for folder in PurePosixPath(file).parents:
            if f"{folder}/__init__.py" in sources:
                yield f"{folder}/__init__.py"


def impure(sources: Sources) -> list[str]:
    """Imports of jax in a pure folder, wherever they are, and those that run when a file of it is imported."""
    pure = [file for file in sources if file in PURE or file.startswith(tuple(f"{folder}/" for folder in PURE))]
    found = {str(i) for file in pure for i in imports(file, sources[file]) if i.top in JAX_FAMILY}
    for start in pure:
        seen: dict[str, str] = {}  # file → the one that imports it
        todo = [(file, start) for file in run_by(sources, start.removesuffix(".py").replace("/", "."))]
        while todo:
            file, by = todo.pop()
            if file in seen:
                continue
            seen[file] = by
            for one in imports(file, sources[file]):
                if not one.runs:
                    continue
                if one.top in JAX_FAMILY and file != start:
                    found.add(f"{start} reaches {one}, through {by}")
                todo += [(other, file) for other in run_by(sources, one.module)]
    return sorted(found)


def misplaced(sources: Sources) -> list[str]:
    """Imports of a package outside the only places that may."""
    return [str(i) for i in all_imports(sources) if i.top in ONLY_IN and not i.file.startswith(ONLY_IN[i.top])]


def unsafe(sources: Sources) -> list[str]:
    """Every way of running code out of a data file."""
    found = [str(i) for i in all_imports(sources) if i.top in UNSAFE_MODULES]
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=False)):
                    pass
                case ast.keyword(arg="allow_pickle"):
                    found.append(f"{file}:{node.value.lineno} says allow_pickle")
    return found


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """All of ours."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def test_folders_point_one_way(sources):
    assert cycles(sources) == []


def test_folders_are_small(sources):
    assert crowded(sources) == {}


def test_files_are_as_long_as_their_subject(sources):
    assert long_files(sources) == {}


def test_packages_point_down(sources):
    assert upward(sources) == []


def test_every_folder_says_what_it_is(sources):
    assert undescribed(sources) == []


def test_pure_folders_reach_no_jax(sources):
    assert [one for one in PURE if not any(file == one or file.startswith(f"{one}/") for file in sources)] == []
    assert impure(sources) == []


def test_packages_of_others_are_imported_in_their_places(sources):
    assert misplaced(sources) == []


@pytest.mark.fault("A1")
def test_nothing_unpickles(sources):
    assert unsafe(sources) == []


def test_nothing_imports_the_tests(sources):
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} - {"__init__"} | {"tests"}
    assert [str(i) for i in all_imports(sources) if i.top in tests] == []


def test_no_module_has_a_vague_name(sources):
    assert [file for file in sources if PurePosixPath(file).stem.split("_")[-1] in VAGUE] == []


def test_tests_lie_in_their_folders():
    folder = ROOT / "tests"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if "fixtures" not in path.parts}
    tests = [p for p in found if PurePosixPath(p).name.startswith("test_")]
    assert [p for p in tests if p.split("/")[0] not in ("unit", "device", "system")] == []
    assert [
        p for p in found - set(tests) if not p.startswith(("support/", "clients/")) and not p.endswith("conftest.py")
    ] == []
    lengths = {p: len((folder / p).read_text().splitlines()) for p in found}
    assert {p: n for p, n in lengths.items() if n > MAX_LINES} == {}


class TestTheRulesCanFail:
    """Each rule, shown what it must refuse and what it must not."""

    @pytest.mark.parametrize(
        ("sources", "circles"),
        [
            pytest.param({"serve/a/x.py": "import serve.b.y", "serve/b/y.py": ""}, 0, id="one-way"),
            pytest.param({"serve/a/x.py": "import serve.b.y", "serve/b/y.py": "from serve.a import x"}, 1, id="two"),
            pytest.param(
                {"serve/a/x.py": "import serve.b.y", "serve/b/y.py": "", "serve/b/z.py": "import serve.a.w"}
                | {"serve/a/w.py": ""},
                1,
                id="folders-not-modules",
            ),
            pytest.param(
                {"serve/a/x.py": "from serve.b.y import Y", "serve/b/y.py": "def f():\n    import serve.a.x"},
                1,
                id="in-a-function",
            ),
            pytest.param(
                {"serve/a/x.py": "from ..b import y", "serve/b/y.py": "from ..a.x import X"}, 1, id="relative"
            ),
            pytest.param({"serve/a/x.py": "from . import y", "serve/a/y.py": "from .x import X"}, 0, id="same-folder"),
            pytest.param(
                {
                    "serve/a/x.py": "import serve.b.y",
                    "serve/b/y.py": "import serve.c.z",
                    "serve/c/z.py": "import serve.a.x",
                },
                1,
                id="three",
            ),
            pytest.param({"serve/s.py": "import serve.a.x", "serve/a/x.py": ""}, 0, id="root-to-folder"),
            pytest.param({"serve/s.py": "import serve.a.x", "serve/a/x.py": "from serve import s"}, 1, id="and-back"),
            pytest.param({"serve/s.py": "", "serve/a/x.py": "from serve.s import S"}, 0, id="folder-to-root"),
            pytest.param(
                {"serve/a/x.py": "import serve.b.y", "serve/b/y.py": "importlib.import_module('serve.a.x')"},
                1,
                id="by-name",
            ),
            pytest.param(
                {"serve/a/__init__.py": "from serve.b import Y", "serve/b/__init__.py": "from serve.a.x import X"}
                | {"serve/a/x.py": ""},
                1,
                id="init",
            ),
            pytest.param(
                {"serve/a/x.py": "import serve.a.deep.y", "serve/a/deep/y.py": "import serve.a.x"}, 1, id="nested"
            ),
            pytest.param({"serve/a/x.py": "import json, serveware.b"}, 0, id="not-ours"),
        ],
    )
    def test_cycles(self, sources, circles):
        assert len(cycles(sources)) == circles

    def test_a_circle_names_its_imports(self):
        (circle,) = cycles({"serve/a/x.py": "import serve.b.y", "serve/b/y.py": "\nimport serve.a.x"})
        assert sorted(circle) == ["serve/a/x.py:1 imports serve.b.y", "serve/b/y.py:2 imports serve.a.x"]

    @pytest.mark.parametrize(("modules", "refused"), [(MAX_MODULES, {}), (MAX_MODULES + 1, {"serve/a": 16})])
    def test_crowded(self, modules, refused):
        sources = {f"serve/a/m{i}.py": "" for i in range(modules)} | {"serve/a/__init__.py": "", "serve/a/b/n.py": ""}
        assert crowded(sources) == refused

    @pytest.mark.parametrize(("lines", "refused"), [(MAX_LINES, {}), (MAX_LINES + 1, {"serve/a.py": 601})])
    def test_long_files(self, lines, refused):
        assert long_files({"serve/a.py": "x = 1\n" * lines}) == refused

    @pytest.mark.parametrize(
        ("file", "source", "is_upward"),
        [
            ("jaxlora/model/pool.py", "from train import data", True),
            ("jaxlora/model/pool.py", "import serve.http.sse", True),
            ("train/run/command.py", "def f():\n    from serve.engine.request import Request", True),
            ("pallas_kernels/shapes.py", "import jaxlora", True),
            ("serve/server/app.py", "import train.run.command, jaxlora.model.pool", False),
            ("serve/server/app.py", "from .. import session", False),
            ("jaxlora/model/pool.py", "from jaxlora.core import lora", False),
            ("train/run/command.py", "import training", False),
        ],
    )
    def test_upward(self, file, source, is_upward):
        assert bool(upward({file: source})) is is_upward

    @pytest.mark.parametrize(
        ("init", "refused"),
        [
            pytest.param({"serve/a/__init__.py": '"""One.\n\nTwo.\nThree.\n"""'}, [], id="three"),
            pytest.param({"serve/a/__init__.py": '"""One."""'}, ["serve/a"], id="too-short"),
            pytest.param({"serve/a/__init__.py": '"""' + "Word.\n" * 20 + '"""'}, ["serve/a"], id="too-long"),
            pytest.param({"serve/a/__init__.py": "# One.\n# Two.\n# Three."}, ["serve/a"], id="a-comment"),
            pytest.param({}, ["serve/a"], id="no-init"),
        ],
    )
    def test_undescribed(self, init, refused):
        assert undescribed({"serve/a/x.py": "", **init}) == refused

    @pytest.mark.parametrize(
        ("sources", "refused"),
        [
            pytest.param({"serve/db/x.py": "import jax"}, 1, id="itself"),
            pytest.param({"serve/db/x.py": "def f():\n    from jax import numpy"}, 1, id="in-a-function"),
            pytest.param(
                {"serve/db/x.py": "import serve.engine.e", "serve/engine/e.py": "import optax"}, 1, id="other"
            ),
            pytest.param(
                {
                    "serve/db/x.py": "from serve.engine.e import E",
                    "serve/engine/e.py": "def f():\n    import jax",
                },
                0,
                id="a-choice-made-when-it-runs",
            ),
            pytest.param(
                {"serve/db/x.py": "def f():\n    import serve.engine.e", "serve/engine/e.py": "import jax"},
                0,
                id="late",
            ),
            pytest.param(
                {
                    "serve/db/x.py": "import serve.engine.e",
                    "serve/engine/e.py": "",
                    "serve/engine/__init__.py": "import jax",
                },
                1,
                id="the-package-around-it",
            ),
            pytest.param({"serve/db/x.py": "", "serve/__init__.py": "import jax"}, 1, id="the-package-around-us"),
            pytest.param({"serve/db/deep/x.py": "import flax"}, 1, id="below"),
            pytest.param({"serve/engine/e.py": "import jax", "serve/dbs.py": "import jax"}, 0, id="not-pure"),
            pytest.param({"jaxlora/core/x.py": "class C:\n    import jax.numpy as jnp"}, 1, id="in-a-class"),
        ],
    )
    def test_impure(self, sources, refused):
        assert len(impure(sources)) == refused

    @pytest.mark.parametrize(
        ("file", "line", "is_misplaced"),
        [
            ("serve/engine/engine.py", "import llguidance", True),
            ("serve/engine/grammar.py", "import llguidance", False),
            ("serve/api/files/routes.py", "from sqlalchemy import select", True),
            ("serve/db/files.py", "from sqlalchemy import select", False),
        ],
    )
    def test_misplaced(self, file, line, is_misplaced):
        assert bool(misplaced({file: line})) is is_misplaced

    @pytest.mark.parametrize(
        ("line", "is_unsafe"),
        [
            ("import pickle", True),
            ("from torch import load", True),
            ("np.load(p, allow_pickle=True)", True),
            ("np.load(p, allow_pickle=chosen)", True),
            ("np.load(p, allow_pickle=False)", False),
            ("import json", False),
        ],
    )
    def test_unsafe(self, line, is_unsafe):
        assert bool(unsafe({"jaxlora/storage/adapter_store.py": line})) is is_unsafe
