"""Makes new versions of adapters while the server runs.  Device thread only, but for `freshness`.

device rows ─publish─▶ store and a slot, without a load ─┐
host weights ─────add────────────▶ store, loaded later ──┴─▶ pins and followers of the adapter go on to the version
"""

from __future__ import annotations

import time
from collections.abc import Collection

from jaxlora.core.lora import AdapterRef, AdapterWeights, LoraSpec
from jaxlora.model.lora_pool import Rows, adapter_of_rows, read_finite
from serve.engine.engine import Engine
from serve.engine.telemetry import Histogram
from serve.runtime.catalog import Catalog

FRESHNESS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Publisher:
    """Puts versions into the engine's store and has the engine go on to them."""

    def __init__(self, engine: Engine, catalog: Catalog):
        self._engine, self._catalog = engine, catalog
        self.freshness = Histogram(FRESHNESS_S)  # learned → first token under the new version
        self._fresh: dict[tuple[str, str], tuple[AdapterRef, float]] = {}  # versions without a token, since when

    def add(
        self,
        tenant: str,
        name: str,
        weights: AdapterWeights,
        rows: Rows | None = None,
        *,
        after: AdapterRef | None = None,
    ) -> AdapterRef:
        """Stores the weights as the adapter's next version.

        rows: the same weights on the device, if they lie there.  after: a version of it that must still exist.
        Raises AdapterNotFound when `after` is deleted, StorageFailed or OSError when the store cannot give a number.
        """
        ref = self._engine.store.add(tenant, name, weights, after=after)
        if rows is None:
            self._engine.announce(ref)
        else:
            self._engine.install(ref, rows)
        return ref

    def publish(
        self,
        tenant: str,
        name: str,
        spec: LoraSpec,
        rows: Rows,
        *,
        keep: int | None = None,
        spare: Collection[int] = (),
        learned_s: float | None = None,
        after: AdapterRef | None = None,
    ) -> AdapterRef:
        """Makes a new version of these device rows, which is served from the next admission on.

        Requests in flight keep their version, but for those that follow the adapter.  The store writes the version to
        disk behind.  With `keep`, versions before the newest `keep` are deleted, but for those that a request still uses
        and those to `spare`.
        learned_s: when the weights were learned, on the monotonic clock; `freshness` counts from then.
        after: as `add` takes it.
        Raises InvalidRequest for the base's name; AdapterNotFinite, and publishes nothing, when a weight is not finite;
        StorageFailed or OSError when the store cannot give a number.
        """
        read_finite(rows)
        weights = adapter_of_rows(rows, spec, self._engine.base_hash)
        return self.publish_weights(
            tenant, name, weights, rows, keep=keep, spare=spare, learned_s=learned_s, after=after
        )

    def publish_weights(
        self,
        tenant: str,
        name: str,
        weights: AdapterWeights,
        rows: Rows | None = None,
        *,
        keep: int | None = None,
        spare: Collection[int] = (),
        learned_s: float | None = None,
        after: AdapterRef | None = None,
    ) -> AdapterRef:
        """Does the same for weights on the host, which are finite.  rows: as `add` takes them."""
        self._catalog.check_name(tenant, name)
        ref = self.add(tenant, name, weights, rows, after=after)
        self._fresh[tenant, name] = ref, time.monotonic() if learned_s is None else learned_s
        if keep is not None:
            store = self._engine.store
            for old in store.versions(tenant, name)[:-keep]:
                if old.version not in spare and self._engine.release(old):
                    store.prune(old)
        return ref

    def observe_token(self, ref: AdapterRef) -> None:
        """Counts the freshness of a version when its first token is delivered."""
        if self._fresh and self._fresh.get((ref.tenant, ref.name), (None,))[0] == ref:
            _, learned_s = self._fresh.pop((ref.tenant, ref.name))
            self.freshness.observe(time.monotonic() - learned_s)

    def rehearse(self, rows: Rows) -> None:
        """Compiles what `publish` runs for rows of this shape, and publishes nothing."""
        read_finite(rows)
        self._engine.rehearse_install(rows)
