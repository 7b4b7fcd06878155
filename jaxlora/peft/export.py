"""Writes one adapter, out of a PEFT folder or a store, in a form that others load.

    peft         a PEFT folder
    merged       the base with the adapter merged in, as a Hugging Face checkpoint
    gguf-lora    adapter.gguf, for llama.cpp beside a GGUF of the same base

The folder is there whole or not at all.  `jaxlora.json` in it says what it holds; only such a folder is ever replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from jaxlora.checkpoints.gguf import GgufSource
from jaxlora.core.adapter_size import AdapterSize
from jaxlora.core.atomic_files import whole_folder
from jaxlora.core.errors import (
    AdapterNotFound,
    AlreadyExists,
    BaseMismatch,
    InvalidRequest,
    ModelInvalid,
    StorageFailed,
)
from jaxlora.core.lora import Adapter, AdapterRef
from jaxlora.peft.folder import OWN_FILE, check_fits, describe, export_peft
from jaxlora.peft.gguf import write_gguf_lora
from jaxlora.peft.ingest import BaseFiles, find_base
from jaxlora.peft.merge import unties, write_merged
from jaxlora.storage.adapter_files import load_version, scan

DTYPES = {  # form → dtypes, the first is what is written when none is asked for
    "peft": ("float32", "bfloat16", "float16"),
    "merged": ("float32", "bfloat16"),
    "gguf-lora": ("float32", "float16"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A checked request to write some adapter of `base`."""

    base: BaseFiles
    form: str  # of DTYPES
    dtype: str  # one that its form has
    out: Path  # absolute

    def write(self, adapter: Adapter) -> tuple[AdapterSize, list[str]]:
        """Writes the adapter and returns (its size, as jaxlora.json says it; notes for its reader).

        Raises AdapterInvalid for a value that is not finite, BaseMismatch for the shapes of another base, StorageFailed.
        """
        adapter.check_finite()
        check_fits(adapter, self.base.source.config)
        try:
            return self._write(adapter)
        except (OSError, SafetensorError) as e:
            reason = e.strerror if isinstance(e, OSError) else e
            raise StorageFailed(f"{self.out} cannot be written: {reason}") from e

    def _write(self, adapter: Adapter) -> tuple[AdapterSize, list[str]]:
        config, notes = self.base.source.config, []
        if self.form == "peft":
            size = export_peft(adapter, self.out, config, base_name=self.base.name, dtype=self.dtype, replace=True)
            return size, notes
        with whole_folder(self.out) as new:
            if self.form == "merged":
                write_merged(new, self.base.source, adapter, dtype=self.dtype)
                if unties(config, adapter):
                    notes.append(
                        "the adapter changes lm_head, so the head is no longer the embedding (tie_word_embeddings = false)"
                    )
            else:
                write_gguf_lora(new / "adapter.gguf", config, adapter, dtype=self.dtype)
            return describe(new, adapter, config, {"form": self.form}), notes


def prepare(model: str, *, form: str, dtype: str | None, out: Path, replace: bool, dequantise: bool) -> Export:
    """Checks all that can be known before an adapter is read.  dtype: None is the first of the form's.

    Raises InvalidRequest for a form or dtype that there is not, AlreadyExists for an `out` that is not to be replaced,
    ModelInvalid for no base or a quantised one.
    """
    if form not in DTYPES:
        raise InvalidRequest(f"--form must be one of {', '.join(DTYPES)}; got {form!r}", param="form")
    chosen = dtype or DTYPES[form][0]
    if chosen not in DTYPES[form]:
        raise InvalidRequest(
            f"--dtype of {form} must be one of {', '.join(DTYPES[form])}; got {chosen!r}", param="dtype"
        )
    out = out.absolute()
    _check_out(out, replace)
    base = find_base(model)
    if form == "merged" and isinstance(base.source, GgufSource) and base.source.quantised and not dequantise:
        raise ModelInvalid(
            f"{base.path.name} is quantised ({', '.join(base.source.quantised)}); a merged checkpoint holds its weights in "
            f"{chosen}, which is larger and no more exact; pass --dequantise to write that"
        )
    return Export(base=base, form=form, dtype=chosen, out=out)


def _check_out(out: Path, replace: bool) -> None:
    if not out.exists():
        return
    if not replace:
        raise AlreadyExists(f"{out} exists; name a new folder, or pass --replace")
    if not (out / OWN_FILE).is_file():
        raise AlreadyExists(
            f"{out} has no {OWN_FILE}, so no export wrote it and it is not replaced; name another folder"
        )


def read_stored_over(base: BaseFiles, store: Path, name: str) -> Adapter:
    """The adapter of that name, as `read_stored` finds it.  Raises BaseMismatch when it was trained on another base."""
    adapter = read_stored(store, name)
    if adapter.base_hash != base.hash:
        raise BaseMismatch(f"{adapter.ref} was trained on another base than {base.name}; name its own with --model")
    return adapter


def read_stored(store: Path, name: str) -> Adapter:
    """The adapter `[TENANT/]NAME[@VERSION]`, the newest when no version is given; also of a store that a server has open.

    Raises AdapterNotFound, InvalidRequest when several tenants have it or the version is no number, StorageFailed.
    """
    adapters = store.absolute() / "adapters"
    if not adapters.is_dir():
        raise AdapterNotFound(f"{store} is no adapter store: it has no folder `adapters`")
    whole, _, version = name.partition("@")
    tenant, _, short = whole.rpartition("/")
    if version and not (version.isascii() and version.isdigit()):
        raise InvalidRequest(
            f"--name must be [TENANT/]NAME[@VERSION] with a number as version, got {name!r}", param="name"
        )
    found = scan(adapters)
    owners = sorted(t for t, n in found if n == short and tenant in ("", t))
    if not owners:
        known = ", ".join(sorted({n for _, n in found})[:10]) or "none"
        raise AdapterNotFound(f"no adapter {whole} in {store}; there are: {known}")
    if len(owners) > 1:
        raise InvalidRequest(f"{short} belongs to {', '.join(owners[:10])}; say which, as TENANT/{short}", param="name")
    versions = found[owners[0], short]
    wanted = int(version) if version else max(versions)
    if wanted not in versions:
        raise AdapterNotFound(f"no version {wanted} of {whole} in {store}; there are: {sorted(versions)}")
    ref = AdapterRef(owners[0], short, wanted)
    return load_version(adapters / ref.tenant / ref.name, ref)[0]
