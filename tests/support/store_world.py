"""A store of small adapters: what the tests of the store share.  The fixture is in store_fixtures.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jaxlora.core.lora import Adapter, AdapterRef, LoraSpec, ModuleException
from jaxlora.storage.adapter_store import AdapterStore

SPEC = LoraSpec(
    rank=4,
    alpha=8.5,
    targets=("q_proj", "lm_head"),
    rslora=True,
    exceptions=(ModuleException(target="q_proj", layer=1, rank=2, alpha=3.0),),
)
LARGE = 10**9


def make(ref: AdapterRef, value: float | None = None) -> Adapter:
    random = np.random.default_rng(ref.version)
    shapes = {"q_proj": ((2, 4, 16), (2, 4, 24)), "lm_head": ((1, 4, 16), (1, 4, 40))}
    weights = {
        target: tuple(
            random.normal(size=s).astype(np.float32) if value is None else np.full(s, value, np.float32) for s in pair
        )
        for target, pair in shapes.items()
    }
    return Adapter(ref=ref, spec=SPEC, base_hash="sha256:base", weights=weights)


def same(x: Adapter, y: Adapter) -> bool:
    return (x.ref, x.spec, x.base_hash, sorted(x.weights)) == (y.ref, y.spec, y.base_hash, sorted(y.weights)) and all(
        p.tobytes() == q.tobytes() and p.shape == q.shape and p.dtype == q.dtype
        for target in x.weights
        for p, q in zip(x.weights[target], y.weights[target], strict=True)
    )


def put(store: AdapterStore, tenant="acme", name="bot", value: float | None = None) -> Adapter:
    adapter = make(store.mint(tenant, name), value)
    store.put(adapter)
    return adapter


def kill_at_work(code: str, *arguments: Path, kill: int) -> set[int]:
    """Runs a script that prints the versions it knows to be stored, and kills it soon: those that it said.

    code: with {paths!r} where it sets sys.path.  kill: how many were killed before; each works a little longer.
    """
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    command = [sys.executable, "-c", code.format(paths=paths), *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    said: set[int] = set()
    try:
        for _ in range(2 + kill):
            said |= {int(v) for v in child.stdout.readline().split()}
        time.sleep(0.013 * (kill + 1))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    return said
