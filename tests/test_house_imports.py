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
    "serve/cli/main.py",
    "serve/cli/keys.py",
    "jaxlora/config/training.py",
    "jaxlora/storage/adapter_files.py",
    "jaxlora/storage/disk_cache.py",
    "jaxlora/core/atomic_files.py",
    "jaxlora/core/errors.py",
    "jaxlora/storage/host_cache.py",
    "jaxlora/storage/lease.py",
    "jaxlora/core/lora.py",
    "jaxlora/core/model_config.py",
    "serve/cli/neighbours.py",
    "jaxlora/peft/config.py",
    "jaxlora/peft/targets.py",
    "jaxlora/config/serving.py",
    "jaxlora/storage/single_flight.py",
    "serve/engine/slots.py",
    "jaxlora/storage/checkpoints.py",
    "jaxlora/config/toml.py",
    "train/data/examples.py",
    "train/jobs/fair_queue.py",
    "train/jobs/job.py",
    "train/data/jsonl.py",
    "train/data/example_cache.py",
    "train/data/mixer.py",
    "serve/engine/slot_scheduler.py",
    "serve/cli/adapters_client.py",
    "serve/cli/http_client.py",
    "serve/api/adapters/schemas.py",
    "serve/http/request_log.py",
    "serve/access/caller.py",
    "serve/runtime/budget.py",
    "serve/cli/chat.py",
    "serve/cli/chat_client.py",
    "serve/cli/chat_columns.py",
    "serve/db/database.py",
    "serve/runtime/device_thread.py",
    "serve/demo/tasks.py",
    "serve/http/drain.py",
    "serve/jobs/resolve.py",
    "serve/api/files/service.py",
    "serve/api/files/schemas.py",
    "serve/api/gradient/complete.py",
    "serve/api/gradient/complete.py",
    "serve/api/gradient/errors.py",
    "serve/api/gradient/examples.py",
    "serve/api/gradient/complete.py",
    "serve/api/gradient/schemas.py",
    "serve/engine/grammar.py",
    "serve/engine/telemetry.py",
    "serve/runtime/backend.py",
    "serve/http/idempotency.py",
    "serve/http/multipart.py",
    "serve/cli/key_commands.py",
    "serve/access/keys.py",
    "serve/access/adapter_quota.py",
    "serve/access/rate_limit.py",
    "serve/observability/logs.py",
    "serve/cli/jobs_client.py",
    "serve/api/jobs/schemas.py",
    "serve/api/jobs/schemas.py",
    "serve/runtime/catalog.py",
    "serve/db/migrations.py",
    "serve/api/openai/schemas.py",
    "serve/api/openai/messages.py",
    "serve/api/openai/render.py",
    "serve/api/openai/logprobs.py",
    "serve/api/openai/schemas.py",
    "serve/engine/page_cache.py",
    "serve/db/models.py",
    "serve/engine/request.py",
    "serve/api/responses/schemas.py",
    "serve/engine/scheduler.py",
    "serve/engine/sequence.py",
    "serve/engine/slot_scheduler.py",
    "serve/runtime/snapshot.py",
    "serve/api/stats.py",
    "serve/engine/output.py",
    "serve/engine/telemetry.py",
    "serve/cli/top.py",
    "serve/observability/tracing.py",
    "serve/db/idempotency.py",
    "serve/db/files.py",
    "serve/db/gradient.py",
    "serve/db/jobs.py",
    "serve/db/keys.py",
    "serve/db/models.py",
    "serve/http/schema.py",
    "serve/api/openai/tools.py",
    "serve/api/openai/tools.py",
    "serve/engine/scheduler.py",
    "serve/runtime/watchdog.py",
)
JAX_FAMILY = ("jax", "jaxlib", "flax", "optax", "orbax")
STORED = ("answers", "files", "gradient", "jobs", "keys")
SQL_FILES = (
    "serve/db/database.py",
    "serve/db/migrations.py",
    "serve/db/models.py",
    *(f"serve/stored_{s}.py" for s in STORED),
)
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
    "alembic": ("serve/db/migrations.py",),
    "flax": ("jaxlora/model/decoder.py",),
    "limits": ("serve/access/rate_limit.py",),
    "llguidance": ("serve/engine/grammar.py",),
    "python_multipart": ("serve/http/multipart.py",),
    "obstore": ("jaxlora/storage/object_store.py",),
    "opentelemetry": ("serve/observability/tracing.py",),
    "prometheus_client": ("serve/observability/metrics.py",),
    "pydantic": ("jaxlora/config/toml.py", *WIRE_FILES),
    "sqlalchemy": SQL_FILES,
    "sqlmodel": SQL_FILES,
    "structlog": ("serve/observability/logs.py",),
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
            ("jaxlora/model/lora_pool.py", "import serve.server.app", True),
            ("train/run/command.py", "def f():\n    from serve.engine.request import Request", True),
            ("pallas_kernels/shapes.py", "import jaxlora", True),
            ("serve/server/app.py", "import train.run.command, jaxlora.model.lora_pool", False),
            ("serve/server/app.py", "from . import request", False),
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
