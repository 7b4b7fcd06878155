"""On-disk cache of compiled programs, and a counter of what is compiled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from jaxlora.core.errors import ConfigInvalid

# Events that jax reports.  A jitted call that finds its program in memory reports none.
TRACE_EVENT = "/jax/core/compile/jaxpr_trace_duration"
LOWER_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # reported also for a read from the disk cache
DISK_HIT_EVENT = "/jax/compilation_cache/cache_hits"


def folder_in_use() -> Path:
    """Returns the default folder of compiled programs: $JAXLORA_CACHE, or ~/.cache/jaxlora/xla."""
    chosen = os.environ.get("JAXLORA_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "jaxlora" / "xla"


def enable(folder: Path | None) -> Path:
    """Makes jax keep compiled programs in a folder and returns it; None is `folder_in_use()`.

    jax loads files from there as code, so the folder gets mode 0700.  Raises ConfigInvalid when it cannot be made
    or belongs to another user.
    """
    chosen = (folder if folder is not None else folder_in_use()).expanduser().absolute()
    advice = "set JAXLORA_CACHE to a folder of your own"
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = chosen.stat().st_uid
        if owner != os.geteuid():
            raise ConfigInvalid(
                f"the compile cache {chosen} belongs to user id {owner}, not to you ({os.geteuid()}), and would be run "
                f"as code; {advice}"
            )
        chosen.chmod(0o700)
    except OSError as e:
        raise ConfigInvalid(f"the compile cache {chosen} cannot be used: {e.strerror}; {advice}") from e
    if jax.config.jax_compilation_cache_dir != str(chosen):
        compilation_cache.reset_cache()  # jax opens the folder once, at the first compile
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return chosen


@dataclass(slots=True)
class CompileCounter:
    """Counts what jax compiles in this process, in every thread, while it is entered.

        with CompileCounter() as counter:
            step(batch)
        assert not counter.retraced

    A program read from the disk cache counts as a compile: it still stalls the step.  Each counter may be entered again
    and then continues to count.
    """

    traces: int = 0  # Python functions traced, those nested in another jit included
    lowerings: int = 0  # programs passed to the compiler
    compiles: int = 0  # programs compiled or read from disk
    disk_hits: int = 0  # of these, read from disk
    _exit: contextlib.ExitStack | None = None

    @property
    def retraced(self) -> bool:
        """Returns whether anything was traced, lowered or compiled, which must not happen after warm-up."""
        return bool(self.traces or self.lowerings or self.compiles)

    def __enter__(self) -> CompileCounter:
        if self._exit is not None:
            raise RuntimeError("this CompileCounter is entered already; make another one")
        self._exit = contextlib.ExitStack()
        self._exit.enter_context(_listening(self))
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._exit is not None:
            self._exit.close()
            self._exit = None


@contextlib.contextmanager
def _listening(counter: CompileCounter) -> Generator[None]:
    def on_duration(event: str, duration_secs: float, **_labels: str | int) -> None:
        counter.traces += event == TRACE_EVENT
        counter.lowerings += event == LOWER_EVENT
        counter.compiles += event == COMPILE_EVENT

    def on_event(event: str, **_labels: str | int) -> None:
        counter.disk_hits += event == DISK_HIT_EVENT

    monitoring.register_event_duration_secs_listener(on_duration)
    monitoring.register_event_listener(on_event)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(on_duration)
        monitoring.unregister_event_listener(on_event)
