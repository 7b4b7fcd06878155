"""Archives that strangers send (A6): what is no plain PEFT folder is refused, cheaply, and nothing is written elsewhere."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from adapters_world import BASE_FOLDER, adapter_files, tar_of, zip_of
from peft_world import base_config

from jaxlora.core.errors import AdapterInvalid
from jaxlora.peft.archive import MAX_MEMBERS, UploadLimits, unpack, upload_limits

LIMITS = UploadLimits(weights_bytes=100_000)
GOOD = adapter_files()
MIB = 2**20


def unpacked(data: bytes, tmp_path: Path, limits: UploadLimits = LIMITS) -> tuple[str, ...]:
    (tmp_path / "upload").write_bytes(data)
    (tmp_path / "out").mkdir()
    return unpack(tmp_path / "upload", tmp_path / "out", limits)


def zip_with(name: str, *, mode: int = 0o100644, flags: int = 0, data: bytes = b"x", method: int = 0) -> bytes:
    """A good zip with one more member, of this Unix mode."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for good, content in GOOD.items():
            archive.writestr(good, content)
        info = zipfile.ZipInfo("placeholder")
        info.external_attr = mode << 16
        archive.writestr(info, data, method)
    raw = out.getvalue().replace(b"placeholder", name.encode().ljust(11, b"_")[:11]) if len(name) <= 11 else None
    assert raw is not None, "the name takes the place of another of its length"
    if flags:
        at = raw.rindex(b"PK\x01\x02")
        raw = raw[: at + 8] + struct.pack("<H", flags) + raw[at + 10 :]
    return raw


def named_zip(name: str) -> bytes:
    return zip_of(GOOD | {name: b"x"})


def big_zip(name: str, nbytes: int, declared: int | None = None) -> bytes:
    """A member that inflates to so many zeros, and says that it has `declared`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as member:
        for _ in range(nbytes // MIB):
            member.write(bytes(MIB))
    raw = out.getvalue()
    return raw if declared is None else raw.replace(struct.pack("<I", nbytes), struct.pack("<I", declared))


def many(count: int) -> bytes:
    return zip_of([(f"m{i}/adapter_config.json", b"{}") for i in range(count)])


def empty_directory(count: int) -> bytes:
    """A zip whose directory alone has this many entries: nothing else in it is large."""
    entry = b"PK\x01\x02" + bytes(24) + struct.pack("<HHHHHII", 1, 0, 0, 0, 0, 0, 0) + b"a"
    directory = entry * count
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, min(count, 65535), min(count, 65535), len(directory), 4, 0)
    return b"PK\x03\x04" + directory + end


def pax_tar(header_bytes: int) -> bytes:
    """A tar.gz that begins with an extended header of so many bytes."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, header_bytes
    return gzip.compress(info.tobuf() + bytes(header_bytes), 1)


def chain_tar(count: int) -> bytes:
    """Extended headers of extended headers of …"""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 0
    return info.tobuf() * count + tar_of(GOOD)


REFUSED = {
    "parent": (lambda: named_zip("../adapter_config.json"), "paths must stay inside"),
    "parent inside": (lambda: named_zip("a/../../README.md"), "paths must stay inside"),
    "absolute": (lambda: named_zip("/etc/README.md"), "paths must stay inside"),
    "backslash": (lambda: named_zip("..\\README.md"), "paths must stay inside"),
    "drive": (lambda: named_zip("C:README.md"), "paths must stay inside"),
    "control character": (lambda: named_zip("a\n/README.md"), "paths must stay inside"),
    "NUL in a zip": (lambda: zip_with("README.md\0x"), "paths must stay inside"),
    "deep": (lambda: named_zip("a/b/README.md"), "nests a/b/README.md too deep"),
    "link in a zip": (lambda: zip_with("README.md", mode=0o120777), "is a link, a device"),
    "device in a zip": (lambda: zip_with("README.md", mode=0o060666), "is a link, a device"),
    "encrypted": (lambda: zip_with("README.md", flags=1), "is encrypted"),
    "lzma in a zip": (lambda: zip_of(GOOD, zipfile.ZIP_LZMA), "compressed in an unusual way"),
    "duplicate": (
        lambda: zip_of(GOOD | {"adapter_confiX.json": b""}).replace(b"confiX", b"config"),
        "holds adapter_config.json twice",
    ),
    "two adapters": (
        lambda: zip_of({"a/adapter_config.json": b"{}", "b/adapter_model.safetensors": b""}),
        "different folders",
    ),
    "archive in it": (lambda: named_zip("inner.zip"), "inner.zip is no file of an adapter"),
    "stranger": (lambda: named_zip("setup.py"), "setup.py is no file of an adapter"),
    "pickle": (lambda: named_zip("adapter_model.bin"), "pickle weights are not accepted"),
    "torch file": (lambda: zip_of({"archive/data.pkl": b"x", "archive/version": b"3"}), "pickle weights"),
    "bare pickle": (lambda: b"\x80\x04\x95" + bytes(600), "pickle weights are not accepted"),
    "bzip2": (lambda: tar_of(GOOD, "w:bz2"), "no archive that is read here"),
    "xz": (lambda: tar_of(GOOD, "w:xz"), "no archive that is read here"),
    "nothing": (lambda: b"", "no archive that is read here"),
    "text": (lambda: b"hello", "no archive that is read here"),
    "gzip of text": (lambda: gzip.compress(b"hello" * 1000), "damaged or of an unusual kind"),
    "cut zip": (lambda: zip_of(GOOD)[:-30], "damaged"),
    "cut tar": (lambda: tar_of(GOOD)[:2000], "damaged"),
    "cut gzip": (lambda: tar_of(GOOD, "w:gz")[:-60], "damaged"),
    "wrong sum": (lambda: zip_of(GOOD, zipfile.ZIP_STORED).replace(b"q_proj", b"x_proj", 1), "damaged"),
    "no file at all in a zip": (lambda: b"PK\x05\x06" + bytes(18), None),
    "links in a tar": (lambda: tar_of(GOOD, name="README.md", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "hard link": (
        lambda: tar_of(GOOD, name="README.md", type=tarfile.LNKTYPE, linkname="adapter_config.json"),
        "a link",
    ),
    "device": (lambda: tar_of(GOOD, name="README.md", type=tarfile.CHRTYPE), "a device"),
    "pipe": (lambda: tar_of(GOOD, name="README.md", type=tarfile.FIFOTYPE), "a device"),
    "sparse": (lambda: tar_of(GOOD, name="README.md", type=tarfile.GNUTYPE_SPARSE), "special member"),
    "parent in a tar": (lambda: tar_of({"../adapter_config.json": b"{}"}), "paths must stay inside"),
    "parent folder in a tar": (lambda: tar_of(GOOD, name="../x", type=tarfile.DIRTYPE), "paths must stay inside"),
    "absolute in a tar": (lambda: tar_of({"/adapter_config.json": b"{}"}), "paths must stay inside"),
    "many members": (lambda: many(MAX_MEMBERS + 1), "over 64 members"),
    "many members in a tar": (
        lambda: tar_of({"README.md": b""} | {f"._{i}": b"" for i in range(70)}),
        "over 64",
    ),
    "large directory": (lambda: empty_directory(200_000), "too large"),
    "large config": (lambda: zip_of({"adapter_config.json": bytes(1_000_001)}), "more than 1000000 bytes"),
    "zip bomb": (lambda: big_zip("adapter_model.safetensors", 50 * MIB), "more than 100000 bytes"),
    "zip bomb that lies": (lambda: big_zip("adapter_model.safetensors", 50 * MIB, 5000), "damaged|more than 100000"),
    "zip bomb left out": (lambda: big_zip("README.md", 50 * MIB), None),
    "gzip bomb": (lambda: gzip.compress(tar_of({"README.md": bytes(50 * MIB)}), 1), "inflates to more bytes"),
    "gzip bomb of weights": (
        lambda: gzip.compress(tar_of({"adapter_model.safetensors": bytes(50 * MIB)}), 1),
        "more than 100000",
    ),
    "large header": (lambda: pax_tar(30 * MIB), "too large"),
    "chain of headers": (lambda: chain_tar(5000), "damaged"),
}


@pytest.mark.fault("A6")
@pytest.mark.parametrize("name", REFUSED)
def test_an_archive_that_is_refused(name, tmp_path):
    """Quickly, in little memory, and with nothing outside its folder; two that hold nothing of ours give nothing."""
    make, message = REFUSED[name]
    data = make()
    before = sorted(tmp_path.parent.iterdir())
    tracemalloc.start()
    began = time.monotonic()
    if message is None:
        unpacked(data, tmp_path)
        assert list((tmp_path / "out").iterdir()) == []
    else:
        with pytest.raises(AdapterInvalid, match=message) as caught:
            unpacked(data, tmp_path)
        assert len(caught.value.message) < 600
    assert time.monotonic() - began < 6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * MIB
    assert sorted(tmp_path.parent.iterdir()) == before
    assert {p.name for p in tmp_path.iterdir()} == {"upload", "out"}
    assert {p.name for p in (tmp_path / "out").iterdir()} <= set(GOOD)
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) <= LIMITS.weights_bytes + 1_000_000


def test_a_damaged_archive_is_always_an_error_of_ours(tmp_path):
    """Any byte may be any other; what is read then is right, or refused."""
    random = np.random.default_rng(3)
    for kind in (zip_of(GOOD), tar_of(GOOD), tar_of(GOOD, "w:gz")):
        for i in range(150):
            data = bytearray(kind)
            for place in random.integers(0, len(data), 1 + i % 3):
                data[place] = random.integers(256)
            folder = tmp_path / f"{len(kind)}-{i}"
            folder.mkdir()
            with contextlib.suppress(AdapterInvalid):
                unpacked(bytes(data), folder)


def test_a_full_disk_is_no_fault_of_the_archive(tmp_path, monkeypatch):
    def full(self, *_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda p, mode, o=Path.open: full(p) if mode == "xb" else o(p, mode))
    with pytest.raises(OSError, match="No space left"):
        unpacked(zip_of(GOOD), tmp_path)


def test_the_largest_adapter_of_a_base_fits_its_limits():
    """Every module at the largest rank in float32, and PEFT's copy of the head."""
    config = base_config("llama")
    size = (BASE_FOLDER / "model.safetensors").stat().st_size
    limits = upload_limits(config, max_rank=8)
    per_layer = 8 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 2 * (32 + config.d_ff) + (config.d_ff + 32))
    weights = per_layer * config.layers + 8 * 4 * (32 + config.vocab) + 4 * config.vocab * 32
    assert limits.weights_bytes == weights + 1_000_008
    assert limits.total_bytes > limits.weights_bytes > size
