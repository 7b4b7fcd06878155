"""Implements `jaxlora import`: adds a PEFT folder, or an archive of one, to an adapter store that no server has open.

The counterpart of `jaxlora export`.  `jaxlora adapters upload` does the same with a running server.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from jaxlora.checkpoints.gguf import GgufSource
from jaxlora.checkpoints.hf import HfSource
from jaxlora.checkpoints.load import base_hash, find_model, open_source
from jaxlora.core.lora import AdapterWeights, check_name
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.archive import unpack, upload_limits
from jaxlora.peft.folder import ImportReport, import_peft
from jaxlora.storage.adapter_store import AdapterStore

LOCAL_TENANT = "local"  # the tenant of names without a tenant


def main(*, model: str, folder: Path, store: Path, name: str, any_base: bool, say: Callable[[str], None]) -> None:
    """Adds the adapter to `store` as the next version of [TENANT/]NAME.

    Raises a JaxLoraError, before the store is changed where the cause can be known by then.
    """
    tenant, slash, short = name.rpartition("/")
    tenant = tenant if slash else LOCAL_TENANT
    check_name(tenant, "tenant")
    check_name(short, "--name")
    _, path = find_model(model)
    source = open_source(path)
    with tempfile.TemporaryDirectory() as temporary:
        if folder.is_file():
            unpack(folder, Path(temporary), upload_limits(source.config, largest_rank(source.config)))
            folder = Path(temporary)
        weights, report = read_over(source, base_hash(path), folder, any_base=any_base)
    for note in report.notes:
        say(f"note: {note}")
    if report.ignored:
        say(f"note: these settings have no effect here: {', '.join(report.ignored)}")
    opened = AdapterStore(store, host_bytes=0)
    try:
        ref = opened.add(tenant, short, weights)
    finally:
        opened.close()
    say(f"imported {ref}: {len(report.modules)} modules, {report.parameters} parameters")


def read_over(
    source: HfSource | GgufSource, base: str, folder: Path, *, any_base: bool = False
) -> tuple[AdapterWeights, ImportReport]:
    """Reads the adapter in a PEFT folder, up to the base's largest rank.  base: its hash.  Raises as `import_peft`."""
    config = source.config
    return import_peft(
        folder,
        config,
        base_hash=base,
        max_rank=largest_rank(config),
        head_supported=True,
        read_head=lambda: source.read("embed", None) if config.tied else source.read("head", None).T,
        any_base=any_base,
    )


def largest_rank(config: ModelConfig) -> int:
    """Returns the rank above which a LoRA is larger than the weights it changes."""
    return max(config.d_model, config.d_ff)
