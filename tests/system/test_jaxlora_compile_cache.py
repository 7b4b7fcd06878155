"""The compile cache on disk, and the counter that the no-retrace tests rely on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from compiled import cache_folder

from jaxlora.core.errors import ConfigInvalid
from jaxlora.model import compile_cache
from jaxlora.model.compile_cache import CompileCounter


@pytest.fixture
def cache(tmp_path):
    """A fresh cache folder; the suite's own comes back afterwards."""
    before = jax.config.jax_compilation_cache_dir
    yield compile_cache.enable(tmp_path / "deep" / "cache")
    compile_cache.enable(Path(before))


def fresh_program():
    """A new jitted function each time: jax has never seen it."""
    return jax.jit(lambda x: x * 2.0 + 1.0)


def ready(n: int) -> jax.Array:
    return jax.block_until_ready(jnp.ones(n))


def test_first_call_counts_and_cached_calls_do_not():
    f, x = fresh_program(), ready(3)
    with CompileCounter() as first:
        f(x)
    with CompileCounter() as later:
        for _ in range(3):
            f(x)
    assert (first.traces, first.lowerings, first.compiles, first.retraced) == (1, 1, 1, True)
    assert (later.traces, later.lowerings, later.compiles, later.retraced) == (0, 0, 0, False)


@pytest.mark.parametrize(
    ("warm", "changed"),
    [
        pytest.param((jnp.float32, (3,)), (jnp.float32, (4,)), id="shape"),
        pytest.param((jnp.float32, (3,)), (jnp.bfloat16, (3,)), id="dtype"),
    ],
)
def test_a_retrace_is_counted(warm, changed):
    f = fresh_program()
    a, b = (jax.block_until_ready(jnp.ones(shape, dtype)) for dtype, shape in (warm, changed))
    f(a)
    with CompileCounter() as counter:
        f(a)
        f(b)
    assert (counter.traces, counter.compiles) == (1, 1)


def test_a_changed_static_argument_is_counted():
    f, x = jax.jit(lambda x, n: x * n, static_argnums=1), ready(3)
    f(x, 2)
    with CompileCounter() as counter:
        f(x, 2)
    assert not counter.retraced
    with counter:
        f(x, 3)
    assert counter.compiles == 1


def test_changed_values_are_not_counted():
    f, xs = fresh_program(), [jax.block_until_ready(jnp.full(3, v)) for v in (1.0, 2.0)]
    f(xs[0])
    with CompileCounter() as counter:
        f(xs[1])
    assert not counter.retraced


def test_an_eager_operation_counts_as_the_program_it_compiles():
    x = ready(7)
    with CompileCounter() as counter:
        jnp.cumsum(x)
    assert counter.compiles >= 1


def test_another_thread_is_counted():
    f, x = fresh_program(), ready(3)
    with CompileCounter() as counter:
        thread = threading.Thread(target=f, args=(x,))
        thread.start()
        thread.join()
    assert counter.compiles == 1


def test_counters_nest_and_stop_when_left():
    f, g, h, x = fresh_program(), fresh_program(), fresh_program(), ready(3)
    with CompileCounter() as outer:
        f(x)
        with CompileCounter() as inner:
            g(x)
    h(x)
    assert (outer.compiles, inner.compiles) == (2, 1)


def test_counter_stops_when_left_by_an_error():
    counter = CompileCounter()
    with pytest.raises(KeyError), counter:
        raise KeyError
    fresh_program()(ready(3))
    assert counter.compiles == 0


def test_entering_twice_is_refused():
    with CompileCounter() as counter, pytest.raises(RuntimeError, match="entered already"), counter:
        pass


@pytest.mark.fault("S2")
def test_enabled_folder_is_private_and_filled(cache):
    assert cache.stat().st_mode & 0o777 == 0o700
    fresh_program()(ready(3))
    assert any(cache.iterdir())


@pytest.mark.fault("S2")
def test_an_open_folder_is_closed(tmp_path, cache):
    folder = tmp_path / "open"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    compile_cache.enable(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_program_read_from_disk_counts_as_a_compile(cache):
    x = ready(3)
    with CompileCounter() as first:
        fresh_program()(x)
    with CompileCounter() as second:
        fresh_program()(x)
    assert (first.compiles, first.disk_hits) == (1, 0)
    assert (second.compiles, second.disk_hits, second.retraced) == (1, 1, True)


def test_folder_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXLORA_CACHE", str(tmp_path / "x"))
    assert compile_cache.folder_in_use() == tmp_path / "x"
    monkeypatch.delenv("JAXLORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile_cache.folder_in_use() == tmp_path / ".cache/jaxlora/xla"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="cannot be used: File exists; set JAXLORA_CACHE"):
        compile_cache.enable(tmp_path / "file")


@pytest.mark.fault("S2")
def test_a_folder_of_someone_else_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(ConfigInvalid, match="belongs to user id"):
        compile_cache.enable(tmp_path)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    code = (
        "import jax, jax.numpy as jnp\n"
        "from jaxlora.model.compile_cache import CompileCounter, enable\n"
        "enable(None)\n"
        "with CompileCounter() as c:\n"
        "    jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((4, 4)))\n"
        "print(c.compiles, c.compiles - c.disk_hits)\n"
    )
    env = {**os.environ, "JAXLORA_CACHE": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.split()
        for _ in range(2)
    ]
    assert runs[0][0] == runs[0][1] != "0"
    assert runs[1] == [runs[0][0], "0"]


def test_the_tests_keep_programs_for_each_lock_and_cpu(monkeypatch, tmp_path):
    """Never those of another kind of CPU, which might not run there."""
    here = cache_folder()
    assert here == cache_folder()
    monkeypatch.setattr("compiled.this_cpu", lambda: "another")
    elsewhere = cache_folder()
    (tmp_path / "uv.lock").write_text("other packages")
    monkeypatch.setattr("compiled.LOCK", tmp_path / "uv.lock")
    assert len({here, elsewhere, cache_folder()}) == 3
    assert {here.parent, elsewhere.parent, cache_folder().parent} == {Path.home() / ".cache/jaxlora/tests"}
