"""Implements `jaxlora export`: writes one adapter, of a PEFT folder or a store, in a format that other programs load.

    peft         a PEFT folder
    merged       the base with the adapter merged in, as a Hugging Face checkpoint
    gguf-lora    adapter.gguf, for llama.cpp beside a GGUF of the same base

The folder is complete or absent.  Its `jaxlora.json` describes the contents; only such a folder is ever replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from jaxlora.checkpoints.gguf import GgufSource
from jaxlora.checkpoints.hf import HfSource
from jaxlora.checkpoints.load import base_hash, find_model, open_source
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
from jaxlora.peft.folder import OWN_FILE, OWN_FORMAT, check_fits, export_peft
from jaxlora.peft.gguf import write_gguf_lora
from jaxlora.peft.ingest import read_over
from jaxlora.peft.merge import unties, write_merged
from jaxlora.storage.adapter_files import load_version, scan

DTYPES = {  # form → dtypes, the first is the default
    "peft": ("float32", "bfloat16", "float16"),
    "merged": ("float32", "bfloat16"),
    "gguf-lora": ("float32", "float16"),
}


@dataclass(frozen=True, slots=True)
class _Base:
    """A base that is read from its files, without a device."""

    name: str
    source: HfSource | GgufSource
    hash: str


def main(
    *,
    model: str,
    folder: Path | None,
    store: Path | None,
    name: str | None,
    form: str,
    out: Path,
    dtype: str | None,
    replace: bool,
    dequantise: bool,
    say: Callable[[str], None],
) -> None:
    """Writes the adapter of a PEFT `folder`, or the one called `name` in `store`, into `out`.

    Raises a JaxLoraError, before anything is written where the cause can be known by then.
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
    opened, path = find_model(model)
    source = open_source(path)
    base = _Base(opened, source, base_hash(path))
    if form == "merged" and isinstance(source, GgufSource) and source.quantised and not dequantise:
        raise ModelInvalid(
            f"{path.name} is quantised ({', '.join(source.quantised)}); a merged checkpoint holds its weights in {chosen}, "
            "which is larger and no more exact; pass --dequantise to write that"
        )
    adapter = _find(base, folder, store, name, say)
    adapter.check_finite()
    check_fits(adapter, source.config)
    try:
        _write(base, adapter, form, out, chosen, say)
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise StorageFailed(f"{out} cannot be written: {reason}") from e
    say(f"wrote {adapter.ref} over {base.name} as {form} ({chosen}) into {out}")


def _check_out(out: Path, replace: bool) -> None:
    if not out.exists():
        return
    if not replace:
        raise AlreadyExists(f"{out} exists; name a new folder, or pass --replace")
    if not (out / OWN_FILE).is_file():
        raise AlreadyExists(
            f"{out} has no {OWN_FILE}, so no export wrote it and it is not replaced; name another folder"
        )


def _find(
    base: _Base, folder: Path | None, store: Path | None, name: str | None, say: Callable[[str], None]
) -> Adapter:
    """Returns the requested adapter.  Raises InvalidRequest when the request is ambiguous."""
    if (folder is None) == (store is None) or (store is None) != (name is None):
        raise InvalidRequest("give a PEFT folder, or --adapters STORE with --name NAME[@VERSION]")
    if store is not None and name is not None:
        adapter = read_stored(store, name)
        if adapter.base_hash != base.hash:
            raise BaseMismatch(f"{adapter.ref} was trained on another base than {base.name}; name its own with --model")
        return adapter
    assert folder is not None
    weights, report = read_over(base.source, base.hash, folder)
    for note in report.notes:
        say(f"note: {note}")
    return weights.named(AdapterRef("local", "adapter", 1))  # a folder has no version


def read_stored(store: Path, name: str) -> Adapter:
    """Reads `[TENANT/]NAME[@VERSION]`, by default the newest version; the store may be open in a server.

    Raises AdapterNotFound, InvalidRequest when several tenants have it or the version is not a number, StorageFailed.
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


def _write(base: _Base, adapter: Adapter, form: str, out: Path, dtype: str, say: Callable[[str], None]) -> None:
    config = base.source.config
    if form == "peft":
        export_peft(adapter, out, config, base_name=base.name, dtype=dtype, replace=True)
        return
    with whole_folder(out) as new:
        if form == "merged":
            write_merged(new, base.source, adapter, dtype=dtype)
            if unties(config, adapter):
                say(
                    "note: the adapter changes lm_head, so the head is no longer the embedding (tie_word_embeddings = false)"
                )
        else:
            write_gguf_lora(new / "adapter.gguf", config, adapter, dtype=dtype)
        own = {
            "format": OWN_FORMAT,
            "form": form,
            "name": adapter.ref.name,
            "version": adapter.ref.version,
            "base_hash": base.hash,
        }
        (new / OWN_FILE).write_text(json.dumps(own, indent=2))
