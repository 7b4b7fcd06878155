"""The house keeps its shape: who may import whom, which files are pure, what is nowhere, how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("pallas_kernels", "jaxlora", "train", "serve")  # each may import those before it
PURE = (
    "jaxlora/peft/archive.py",
    "jaxlora/storage/object_store.py",
    "jaxlora/checkpoints/chat_template.py",
    "jaxlora/cli.py",
    "jaxlora/cli_keys.py",
    "jaxlora/config/training.py",
    "jaxlora/storage/adapter_files.py",
    "jaxlora/storage/disk_cache.py",
    "jaxlora/core/atomic_files.py",
    "jaxlora/core/errors.py",
    "jaxlora/storage/host_cache.py",
    "jaxlora/storage/lease.py",
    "jaxlora/core/lora.py",
    "jaxlora/core/model_config.py",
    "jaxlora/neighbours.py",
    "jaxlora/peft/config.py",
    "jaxlora/peft/targets.py",
    "jaxlora/config/serving.py",
    "jaxlora/storage/single_flight.py",
    "jaxlora/slots.py",
    "jaxlora/storage/checkpoints.py",
    "jaxlora/config/toml.py",
    "train/data/examples.py",
    "train/jobs/fair_queue.py",
    "train/jobs/job.py",
    "train/data/jsonl.py",
    "train/data/example_cache.py",
    "train/data/mixer.py",
    "serve/active.py",
    "serve/adapters_client.py",
    "serve/api_client.py",
    "serve/adapters_types.py",
    "serve/answered.py",
    "serve/auth.py",
    "serve/budget.py",
    "serve/chat.py",
    "serve/chat_client.py",
    "serve/chat_columns.py",
    "serve/database.py",
    "serve/delta_stream.py",
    "serve/demo_tasks.py",
    "serve/door.py",
    "serve/fine_tuning.py",
    "serve/file_store.py",
    "serve/files_types.py",
    "serve/gradient_choice.py",
    "serve/gradient_complete.py",
    "serve/gradient_errors.py",
    "serve/gradient_examples.py",
    "serve/gradient_house.py",
    "serve/gradient_types.py",
    "serve/grammar.py",
    "serve/histogram.py",
    "serve/house.py",
    "serve/idempotency.py",
    "serve/multipart.py",
    "serve/key_commands.py",
    "serve/keys.py",
    "serve/adapter_quota.py",
    "serve/limits.py",
    "serve/logs.py",
    "serve/jobs_client.py",
    "serve/jobs_answers.py",
    "serve/jobs_types.py",
    "serve/model_names.py",
    "serve/migrations.py",
    "serve/openai_answers.py",
    "serve/openai_chat.py",
    "serve/openai_format.py",
    "serve/openai_stream.py",
    "serve/openai_types.py",
    "serve/pages.py",
    "serve/records.py",
    "serve/request.py",
    "serve/responses_types.py",
    "serve/scheduler.py",
    "serve/sequence.py",
    "serve/shares.py",
    "serve/snapshot.py",
    "serve/stats_types.py",
    "serve/stops.py",
    "serve/telemetry.py",
    "serve/top.py",
    "serve/tracing.py",
    "serve/stored_answers.py",
    "serve/stored_files.py",
    "serve/stored_gradient.py",
    "serve/stored_jobs.py",
    "serve/stored_keys.py",
    "serve/tables.py",
    "serve/strict.py",
    "serve/tool_calls.py",
    "serve/tool_types.py",
    "serve/tuning.py",
    "serve/watch.py",
)
JAX_FAMILY = ("jax", "jaxlib", "flax", "optax", "orbax")
STORED = ("answers", "files", "gradient", "jobs", "keys")
SQL_FILES = ("serve/database.py", "serve/migrations.py", "serve/tables.py", *(f"serve/stored_{s}.py" for s in STORED))
WIRE_FILES = tuple(
    f"serve/{name}.py"
    for name in (
        "adapters_types",
        "files_types",
        "gradient_types",
        "jobs_answers",
        "jobs_types",
        "openai_answers",
        "openai_types",
        "responses_types",
        "stats_types",
        "strict",
        "tool_types",
    )
)
ONLY_IN = {  # package → the only files that import it
    "alembic": ("serve/migrations.py",),
    "flax": ("jaxlora/model/decoder.py",),
    "limits": ("serve/limits.py",),
    "llguidance": ("serve/grammar.py",),
    "python_multipart": ("serve/multipart.py",),
    "obstore": ("jaxlora/storage/object_store.py",),
    "opentelemetry": ("serve/tracing.py",),
    "prometheus_client": ("serve/metrics.py",),
    "pydantic": ("jaxlora/config/toml.py", *WIRE_FILES),
    "sqlalchemy": SQL_FILES,
    "sqlmodel": SQL_FILES,
    "structlog": ("serve/logs.py",),
}
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch")
MAX_LINES = 450


@dataclass(frozen=True, slots=True)
class Import:
    """One import, wherever in the file it stands."""

    file: str  # from the root of the repository
    line: int
    module: str  # dotted, absolute

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports(source: str, file: str) -> Iterator[Import]:
    """Every import of a file, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # packages are flat: a relative import stays in the file's own package
                module = ".".join(filter(None, [file.split("/")[0], module]))
            for alias in node.names:
                yield Import(file, node.lineno, f"{module}.{alias.name}")


def upward(found: Import) -> bool:
    """Whether an import goes from a lower layer to a higher one."""
    own = found.file.split("/")[0]
    return found.top in LAYERS and LAYERS.index(found.top) > LAYERS.index(own)


def unsafe(source: str, file: str) -> Iterator[str]:
    """Every way of running code out of a data file."""
    for found in imports(source, file):
        if found.top in UNSAFE_MODULES:
            yield str(found)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            refused = isinstance(node.value, ast.Constant) and node.value.value is False
            if not refused:
                yield f"{file}:{node.value.lineno} says allow_pickle"


def our_files() -> list[str]:
    return [str(p.relative_to(ROOT)) for layer in LAYERS for p in sorted((ROOT / layer).rglob("*.py"))]


def text(file: str) -> str:
    return (ROOT / file).read_text()


def all_imports() -> list[Import]:
    return [found for file in our_files() for found in imports(text(file), file)]


def test_layers_point_down():
    assert [str(i) for i in all_imports() if upward(i)] == []


def test_nothing_imports_the_tests():
    assert [str(i) for i in all_imports() if i.top in ("tests", "conftest", "small_world")] == []


@pytest.mark.parametrize("file", PURE)
def test_pure_file_imports_no_jax(file):
    assert [str(i) for i in imports(text(file), file) if i.top in JAX_FAMILY] == []


def test_pure_files_reach_no_jax_through_another_file():
    """Follows our own imports at module level; one inside a function is a choice made when it runs."""
    reached: dict[str, list[str]] = {}
    for start in PURE:
        seen, todo = set(), [start]
        while todo:
            file = todo.pop()
            if file in seen:
                continue
            seen.add(file)
            for found in module_level_imports(file):
                if found.top in JAX_FAMILY:
                    reached.setdefault(start, []).append(str(found))
                todo += our_file(found.module)
    assert reached == {}


def module_level_imports(file: str) -> list[Import]:
    tree = ast.parse(text(file))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return list(imports(ast.unparse(tree), file))


def our_file(module: str) -> list[str]:
    """The files that `import module` runs, out of ours."""
    parts = module.split(".")
    candidates = [f"{parts[0]}/__init__.py", *([f"{parts[0]}/{parts[1]}.py"] if len(parts) > 1 else [])]
    return [c for c in candidates if parts[0] in LAYERS and (ROOT / c).exists()]


@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_in_its_files(package):
    assert [str(i) for i in all_imports() if i.top == package and i.file not in ONLY_IN[package]] == []


def test_nothing_unpickles():
    assert [line for file in our_files() for line in unsafe(text(file), file)] == []


def test_files_are_short():
    tests = [str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py")]
    lengths = {file: len(text(file).splitlines()) for file in our_files() + tests}
    assert {file: n for file, n in lengths.items() if n > MAX_LINES} == {}


def test_no_module_is_called_utils():
    stems = {file: Path(file).stem for file in our_files()}
    assert [
        f for f, stem in stems.items() if stem.split("_")[-1] in ("utils", "util", "helpers", "misc", "common")
    ] == []


def test_packages_are_flat():
    assert [file for file in our_files() if file.count("/") != 1] == []


def test_tests_are_flat_and_named_after_what_they_test():
    folder = ROOT / "tests"
    subfolders = [p.name for p in folder.iterdir() if p.is_dir() and any(p.rglob("*.py"))]
    assert subfolders == []
    assert not (folder / "__init__.py").exists()
    prefixes = tuple(f"test_{layer}_" for layer in (*LAYERS, "house"))
    assert [p.name for p in folder.glob("test_*.py") if not p.name.startswith(prefixes)] == []


class TestTheRulesCanFail:
    """Each rule, shown what it must refuse."""

    @pytest.mark.parametrize(
        ("file", "line", "is_upward"),
        [
            ("jaxlora/model/lora_pool.py", "from train import data", True),
            ("jaxlora/model/lora_pool.py", "import serve.app", True),
            ("train/run/command.py", "def f():\n    from serve.request import Request", True),
            ("pallas_kernels/shapes.py", "import jaxlora", True),
            ("serve/app.py", "import train.run.command, jaxlora.model.lora_pool", False),
            ("serve/app.py", "from . import request", False),
            ("jaxlora/model/lora_pool.py", "from jaxlora import lora", False),
            ("train/run/command.py", "import training", False),
        ],
    )
    def test_upward(self, file, line, is_upward):
        assert any(upward(i) for i in imports(line, file)) is is_upward

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
        assert bool(list(unsafe(line, "jaxlora/storage/adapter_store.py"))) is is_unsafe
