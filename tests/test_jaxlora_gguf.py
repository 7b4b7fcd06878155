"""gguf.py: dequantisers against the `gguf` package, the whole of SmolLM2, and files that lie."""

import time
import tracemalloc

import gguf
import numpy as np
import pytest
from small_world import gguf_bytes

from jaxlora.base_files import base_hash, open_model, smollm2_path
from jaxlora.errors import ModelInvalid
from jaxlora.gguf import BLOCKS, GgufFile, GgufSource, dequantise
from jaxlora.model_config import Llama3Rope

F32, Q4_1, Q8_0, Q4_K, BF16 = 0, 3, 8, 12, 30
D, F, HEADS, KV, V = 8, 12, 2, 1, 6


@pytest.fixture(scope="module")
def smollm2():
    return GgufSource(smollm2_path())


@pytest.fixture
def write(tmp_path):
    def write(data: bytes):
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


# What a file says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(BLOCKS))
def test_random_blocks_dequantise_as_the_gguf_package_does(kind):
    code = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (200, gguf.GGML_QUANT_SIZES[code][1]), np.uint8)
    if kind in ("Q8_0", "Q4_1"):  # scale, and for Q4_1 the low end: finite numbers
        size = 2 if kind == "Q8_0" else 4
        raw[:, :size] = rng.standard_normal((200, size // 2)).astype("<f2").view(np.uint8)
    passed_through = kind in ("F32", "F16")  # by the package
    want = raw.view(BLOCKS[kind][1]).astype(np.float32) if passed_through else gguf.quants.dequantize(raw, code)
    got = dequantise(raw.reshape(-1).view(BLOCKS[kind][1]), kind)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want.reshape(-1))


def test_a_q4_1_block_by_hand():
    """20 bytes: 0.5 and -3 in float16, then nibbles; the low ones are elements 0 to 15, the high ones 16 to 31."""
    raw = np.array([0.5, -3.0], "<f2").tobytes() + bytes([0x21] + [0xF0] * 15)
    values = dequantise(np.frombuffer(raw, BLOCKS["Q4_1"][1]), "Q4_1")
    assert values[0] == 0.5 * 1 - 3
    assert values[16] == 0.5 * 2 - 3
    assert values[1] == -3
    assert values[17] == 0.5 * 15 - 3


def test_real_tensors_equal_the_gguf_package(smollm2):
    reader = gguf.GGUFReader(smollm2_path())
    seen = set()
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in seen or tensor.name.startswith("blk.29."):
            seen.add(kind)
            want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(smollm2.file.read(tensor.name), want)
    assert seen == {"F32", "Q4_1", "Q8_0"}


def test_smollm2_config(smollm2):
    c = smollm2.config
    assert (c.family, c.layers, c.d_model, c.d_ff, c.heads, c.kv_heads) == ("llama", 30, 576, 1536, 9, 3)
    assert (c.head_dim, c.vocab, c.context, c.rope_theta, c.tied) == (64, 49152, 8192, 100000.0, True)
    assert c.norm_eps == pytest.approx(1e-5)
    assert c.rope_scaling is None
    assert c.window is None


def test_only_query_and_key_rows_are_reordered(smollm2):
    """Row 2i+j of a head in the file is row j*32+i for half-split rope; written as a loop."""
    stored = smollm2.file.read("blk.3.attn_k.weight")
    want = np.zeros_like(stored)
    for head in range(3):
        for i in range(32):
            for j in range(2):
                want[head * 64 + j * 32 + i] = stored[head * 64 + 2 * i + j]
    np.testing.assert_array_equal(smollm2.read("k_proj", 3), want.T)
    np.testing.assert_array_equal(smollm2.read("v_proj", 3), smollm2.file.read("blk.3.attn_v.weight").T)


def test_open_model_and_hash():
    source, tokenizer = open_model(smollm2_path())
    assert tokenizer.vocab_size == source.config.vocab
    assert base_hash(smollm2_path()) == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@pytest.mark.parametrize("values", [[1.0, np.nan, 0, 0], [np.inf, 0, 0, 0]], ids=["nan", "infinite"])
def test_a_weight_that_is_no_number_is_refused(write, values):
    file = GgufFile(write(gguf_bytes([], [("x", (4,), F32, np.array(values, "<f4").tobytes())])))
    with pytest.raises(ModelInvalid, match="tensor x has values that are NaN"):
        file.read("x")


def test_an_infinite_block_scale_is_refused(write):
    block = np.array([np.inf, -np.inf], "<f2").tobytes() + b"\x12" * 16
    file = GgufFile(write(gguf_bytes([], [("x", (32,), Q4_1, block)])))
    with pytest.raises(ModelInvalid, match="tensor x has values that are NaN"):
        file.read("x")


# Small files made here --------------------------------------------------------------------------------------------


def tiny_metadata(family="llama", **changes):
    """Metadata rows of a one-layer model; a change to None leaves the row out."""
    rows = {
        "block_count": ("u32", 1),
        "context_length": ("u32", 64),
        "embedding_length": ("u32", D),
        "feed_forward_length": ("u32", F),
        "attention.head_count": ("u32", HEADS),
        "attention.head_count_kv": ("u32", KV),
        "attention.layer_norm_rms_epsilon": ("f32", 1e-6),
        "rope.freq_base": ("f32", 10000.0),
    } | changes
    return [("general.architecture", "str", family)] + [(f"{family}.{k}", *v) for k, v in rows.items() if v is not None]


def tiny_tensors(family="llama", head_dim=D // HEADS, **changes):
    """Tensor rows, float32 with random values; changes are name → shape, None to leave out."""
    shapes = {
        "token_embd.weight": (V, D),
        "output.weight": (V, D),
        "output_norm.weight": (D,),
        "blk.0.attn_norm.weight": (D,),
        "blk.0.attn_q.weight": (HEADS * head_dim, D),
        "blk.0.attn_k.weight": (KV * head_dim, D),
        "blk.0.attn_v.weight": (KV * head_dim, D),
        "blk.0.attn_output.weight": (D, HEADS * head_dim),
        "blk.0.ffn_norm.weight": (D,),
        "blk.0.ffn_gate.weight": (F, D),
        "blk.0.ffn_up.weight": (F, D),
        "blk.0.ffn_down.weight": (D, F),
    }
    if family == "qwen2":
        shapes |= {f"blk.0.attn_{x}.bias": (n * head_dim,) for x, n in (("q", HEADS), ("k", KV), ("v", KV))}
    if family == "qwen3":
        shapes |= {f"blk.0.attn_{x}_norm.weight": (head_dim,) for x in "qk"}
    shapes |= changes
    rng = np.random.default_rng(0)
    return [
        (name, shape, F32, rng.standard_normal(shape).astype("<f4").tobytes())
        for name, shape in shapes.items()
        if shape is not None
    ]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_rows_stay_in_place(write, family):
    source = GgufSource(write(gguf_bytes(tiny_metadata(family), tiny_tensors(family))))
    assert (source.config.qkv_bias, source.config.qk_norm) == (family == "qwen2", family == "qwen3")
    assert not source.config.tied
    np.testing.assert_array_equal(source.read("q_proj", 0), source.file.read("blk.0.attn_q.weight").T)
    extra = "q_bias" if family == "qwen2" else "q_norm"
    assert source.read(extra, 0).shape == ((D,) if family == "qwen2" else (D // HEADS,))
    assert source.read("head", None).shape == (D, V)


def test_llama3_scaling_is_recognised_by_its_factors(write):
    """The stored divisors of Llama 3.2 (factor 32): 1 below a wavelength of 2048, 32 above 8192."""
    head_dim, theta = 16, 500000.0
    divisors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        inside = 1 / ((1 - smooth) / 32 + smooth)
        divisors.append(1.0 if wavelength < 8192 / 4 else 32.0 if wavelength > 8192 else inside)
    meta = tiny_metadata(**{"attention.key_length": ("u32", head_dim), "rope.freq_base": ("f32", theta)})
    good = [*tiny_tensors(head_dim=head_dim), ("rope_freqs.weight", (8,), F32, np.array(divisors, "<f4").tobytes())]
    config = GgufSource(write(gguf_bytes(meta, good))).config
    assert config.rope_scaling == Llama3Rope(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    divisors[0] = 1.5
    bad = [*good[:-1], ("rope_freqs.weight", (8,), F32, np.array(divisors, "<f4").tobytes())]
    with pytest.raises(ModelInvalid, match="rope_freqs"):
        GgufSource(write(gguf_bytes(meta, bad)))


REFUSED = {
    "architecture": (tiny_metadata("gemma3"), tiny_tensors(), "gemma3"),
    "yarn": (tiny_metadata(**{"rope.scaling.type": ("str", "yarn")}), tiny_tensors(), "yarn"),
    "linear factor": (tiny_metadata(**{"rope.scaling.factor": ("f32", 4.0)}), tiny_tensors(), "rope.scaling.factor"),
    "experts": (tiny_metadata(expert_count=("u32", 8)), tiny_tensors(), "expert_count"),
    "partial rope": (tiny_metadata(**{"rope.dimension_count": ("u32", 2)}), tiny_tensors(), "rope.dimension_count"),
    "no rope base": (tiny_metadata(**{"rope.freq_base": None}), tiny_tensors(), "rope.freq_base"),
    "heads per layer": (
        tiny_metadata(**{"attention.head_count": ("i32s", [2])}),
        tiny_tensors(),
        "attention.head_count must be one value",
    ),
    "too many layers": (tiny_metadata(block_count=("u32", 2**32 - 1)), tiny_tensors(), "block_count"),
    "a layer missing": (tiny_metadata(block_count=("u32", 2)), tiny_tensors(), "blk.1.attn_norm.weight"),
    "no embedding": (tiny_metadata(), tiny_tensors(**{"token_embd.weight": None}), "token_embd.weight"),
    "no up": (tiny_metadata(), tiny_tensors(**{"blk.0.ffn_up.weight": None}), "blk.0.ffn_up.weight"),
    "wrong shape": (
        tiny_metadata(),
        tiny_tensors(**{"blk.0.ffn_up.weight": (D, F)}),
        r"blk.0.ffn_up.weight has shape \[8, 12\], expected \[12, 8\]",
    ),
    "llama with a bias": (tiny_metadata(), tiny_tensors(**{"blk.0.attn_q.bias": (D,)}), "blk.0.attn_q.bias"),
    "qwen2 without": (
        tiny_metadata("qwen2"),
        tiny_tensors("qwen2", **{"blk.0.attn_k.bias": None}),
        "blk.0.attn_k.bias",
    ),
    "Q4_K": (
        tiny_metadata(),
        [("blk.0.attn_q.weight", (1, 256), Q4_K, b"\0" * 144)],
        "blk.0.attn_q.weight has type Q4_K; supported: F32, F16, BF16, Q8_0, Q4_1",
    ),
    "type 999": (tiny_metadata(), [("x", (1,), 999, b"\0" * 4)], "tensor x has type number 999"),
}


@pytest.mark.parametrize(("metadata", "tensors", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(write, metadata, tensors, words):
    with pytest.raises(ModelInvalid, match=words):
        GgufSource(write(gguf_bytes(metadata, tensors)))


# Files that lie ---------------------------------------------------------------------------------------------------


def number(value, nbytes=8):
    return value.to_bytes(nbytes, "little")


def header(tensors, keys, rest=b"", version=3):
    return b"GGUF" + number(version, 4) + number(tensors) + number(keys) + rest


def directory(name=b"x", dims=(4,), code=F32, offset=0, rank=None, data=b"\0" * 64):
    row = number(len(name)) + name + number(len(dims) if rank is None else rank, 4)
    row += b"".join(map(number, dims)) + number(code, 4) + number(offset)
    head = header(1, 0, row)
    return head + b"\0" * (-len(head) % 32) + data


def two_tensors(first, second):
    """Two tensors of 64 bytes at these offsets in 128 bytes."""
    row = b"".join(
        number(1) + name + number(1, 4) + number(16) + number(F32, 4) + number(offset)
        for name, offset in ((b"a", first), (b"b", second))
    )
    head = header(2, 0, row)
    return head + b"\0" * (-len(head) % 32) + b"\0" * 128


KEY = number(1) + b"k"
HUGE = 2**63 - 1
HOSTILE = {
    "empty": (b"", "needs 4 bytes"),
    "short magic": (b"GG", "needs 4 bytes"),
    "another format": (b"PK\3\4" + b"\0" * 60, "letters GGUF"),
    "version 2": (header(0, 0, version=2), "version 2"),
    "big-endian": (header(0, 0, version=3 << 24), "version 50331648"),
    "cut after the magic": (b"GGUF\3\0", "needs 4 bytes"),
    "2^63 tensors": (header(HUGE, 0), "number of tensors"),
    "2^63 keys": (header(0, HUGE), "number of metadata keys"),
    "more keys than bytes": (header(0, 4000), "needs 8 bytes"),
    "key of 2^63 bytes": (header(0, 1, number(HUGE) + b"k"), "a metadata key"),
    "string of 2^63 bytes": (header(0, 1, KEY + number(8, 4) + number(HUGE)), "at most"),
    "string past the end": (header(0, 1, KEY + number(8, 4) + number(50) + b"abc"), "at most|needs 50"),
    "not UTF-8": (header(0, 1, KEY + number(8, 4) + number(2) + b"\xff\xfe"), "not UTF-8"),
    "array of 2^63 numbers": (header(0, 1, KEY + number(9, 4) + number(4, 4) + number(HUGE)), "number of items"),
    "array of 2^63 strings": (header(0, 1, KEY + number(9, 4) + number(8, 4) + number(HUGE)), "number of items"),
    "array of arrays": (header(0, 1, KEY + number(9, 4) + number(9, 4) + number(1)), "array of value type 9"),
    "unknown value type": (header(0, 1, KEY + number(77, 4)), "value type 77"),
    "key twice": (header(0, 2, (KEY + number(4, 4) + number(1, 4)) * 2), "k appears twice"),
    "tensor twice": (two_tensors(0, 64).replace(b"\1\0\0\0\0\0\0\0b", b"\1\0\0\0\0\0\0\0a"), "a appears twice"),
    "overlap": (two_tensors(0, 32), "overlaps"),
    "offset past the end": (directory(offset=1 << 40), "is it cut off"),
    "offset near 2^64": (directory(offset=2**64 - 32), "is it cut off"),
    "odd offset": (directory(offset=1), "not a multiple"),
    "shape whose product overflows": (directory(dims=(2**33, 2**33)), "is it cut off"),
    "shape with zero": (directory(dims=(0,)), "whole blocks"),
    "half a block": (directory(dims=(48,), code=Q8_0), "whole blocks"),
    "nine axes": (directory(dims=(1,) * 9), "9 axes"),
    "2^32 axes": (directory(rank=2**32 - 1), "axes"),
    "no axes": (directory(dims=()), "0 axes"),
    "data cut off": (directory(dims=(64,)), "is it cut off"),
    "alignment 0": (gguf_bytes([("general.alignment", "u32", 0)], []), "alignment"),
    "alignment 24": (gguf_bytes([("general.alignment", "u32", 24)], []), "alignment"),
    "alignment 2^31": (gguf_bytes([("general.alignment", "u32", 1 << 31)], []), "alignment"),
    "alignment in words": (gguf_bytes([("general.alignment", "str", "32")], []), "alignment"),
}


@pytest.mark.parametrize(("data", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused_fast_and_small(write, data, words):
    path = write(data)
    tracemalloc.start()
    start_s = time.monotonic()
    try:
        with pytest.raises(ModelInvalid, match=words):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start_s < 1.0


def test_every_cut_and_every_changed_byte_is_read_or_refused(write):
    """No other exception than ModelInvalid comes out, whatever the header says."""
    whole = gguf_bytes(tiny_metadata(), tiny_tensors())
    end = len(whole) - sum(len(row[3]) for row in tiny_tensors())
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(0, end, 3):
        changed = bytearray(whole)
        changed[at] ^= int(rng.integers(1, 256))
        for data in (bytes(changed), whole[:at]):
            try:
                GgufSource(write(data))
            except ModelInvalid:
                refused += 1
    assert refused > end / 3  # all the cuts, and most of the changes


def test_missing_file(tmp_path):
    with pytest.raises(ModelInvalid, match="No such file"):
        GgufFile(tmp_path / "nothing.gguf")
