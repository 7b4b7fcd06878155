"""The adapter of a PEFT folder, or of an archive of one, read over the files of its base and without a device."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from jaxlora.checkpoints.gguf import GgufSource
from jaxlora.checkpoints.hf import HfSource
from jaxlora.checkpoints.load import base_hash, find_model, head_of, open_source
from jaxlora.core.lora import AdapterWeights
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.archive import unpack, upload_limits
from jaxlora.peft.folder import ImportReport, import_peft


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFiles:
    """A base that is read from its files, on no device."""

    name: str  # what clients call it
    path: Path
    source: HfSource | GgufSource
    hash: str


def find_base(model: str) -> BaseFiles:
    """The base that `model` names: the demo model, a directory, a .gguf file or a hub id.  Raises ModelInvalid."""
    name, path = find_model(model)
    return BaseFiles(name=name, path=path, source=open_source(path), hash=base_hash(path))


def read_path(base: BaseFiles, path: Path, *, any_base: bool = False) -> tuple[AdapterWeights, ImportReport]:
    """The adapter in a PEFT folder or an archive of one.  Raises as `unpack` and `read_over` do."""
    if not path.is_file():
        return read_over(base, path, any_base=any_base)
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder), upload_limits(base.source.config, largest_rank(base.source.config)))
        return read_over(base, Path(folder), any_base=any_base)


def read_over(base: BaseFiles, folder: Path, *, any_base: bool = False) -> tuple[AdapterWeights, ImportReport]:
    """The adapter in a PEFT folder, of any rank that its base has room for.  Raises as `import_peft` does."""
    source, config = base.source, base.source.config
    return import_peft(
        folder,
        config,
        base_hash=base.hash,
        base_name=base.name,
        max_rank=largest_rank(config),
        head_supported=True,
        read_head=lambda: head_of(source),
        any_base=any_base,
    )


def largest_rank(config: ModelConfig) -> int:
    """Above it a LoRA is larger than what it changes."""
    return max(config.d_model, config.d_ff)
