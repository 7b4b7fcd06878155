"""gguf.py: every type of tensor against a definition of its own, the whole of SmolLM2, and files that lie."""

import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf_blocks import BY_HAND, random_blocks
from small_world import gguf_bytes

from jaxlora.checkpoints import gguf as ours
from jaxlora.checkpoints.gguf import PLAIN, QUANTISED, GgufFile, GgufSource
from jaxlora.checkpoints.load import base_hash, open_model, smollm2_path
from jaxlora.core.errors import ModelInvalid
from jaxlora.core.model_config import Llama3Rope

F32, Q4_1, Q8_0, Q8_1 = 0, 3, 8, 9
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


@pytest.mark.parametrize("kind", PLAIN + QUANTISED)
def test_every_type_is_dequantised_as_its_definition_says(write, kind):
    code = gguf.GGMLQuantizationType[kind]
    raw = random_blocks(kind, 6)
    shape = (2, 3 * gguf.GGML_QUANT_SIZES[code][0])
    got = GgufFile(write(gguf_bytes([], [("x", shape, int(code), raw.tobytes())]))).read("x")
    assert (got.dtype, got.shape) == (np.float32, shape)
    want = np.array([list(BY_HAND[kind][0](block.tolist())) for block in raw]).reshape(shape)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())  # two float32 roundings of it


def test_a_q4_1_block_by_hand(write):
    """20 bytes: 0.5 and -3 in float16, then nibbles; the low ones are elements 0 to 15, the high ones 16 to 31."""
    raw = np.array([0.5, -3.0], "<f2").tobytes() + bytes([0x21] + [0xF0] * 15)
    values = GgufFile(write(gguf_bytes([], [("x", (32,), Q4_1, raw)]))).read("x")
    assert values[0] == 0.5 * 1 - 3
    assert values[16] == 0.5 * 2 - 3
    assert values[1] == -3
    assert values[17] == 0.5 * 15 - 3


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_1"])
def test_what_is_read_is_the_readers_own(write, kind):
    """Not the file's bytes, which another process may change."""
    code = gguf.GGMLQuantizationType[kind]
    data = random_blocks(kind, 1).tobytes()
    file = GgufFile(write(gguf_bytes([], [("x", gguf.GGML_QUANT_SIZES[code][:1], int(code), data)])))
    before = file.read("x")
    want = before.copy()
    file.path.write_bytes(file.path.read_bytes()[: -len(data)] + b"\1" * len(data))
    np.testing.assert_array_equal(before, want)
    before[:] = 7.0


def test_a_model_of_k_quants_as_most_files_are(write):
    """Q4_K_M: most linears in Q4_K, some in Q6_K, norms in float32."""
    d, kinds = 256, {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
    tensors = []
    for name, shape, _, data in tiny_tensors(d=d, f=d):
        stem = name.removeprefix("blk.0.").removesuffix(".weight")
        kind = kinds.get(stem, "Q4_K") if len(shape) == 2 else "F32"
        code = gguf.GGMLQuantizationType[kind]
        tensors.append((name, shape, int(code), data if kind == "F32" else random_blocks(kind, shape[0]).tobytes()))
    meta = tiny_metadata(embedding_length=("u32", d), feed_forward_length=("u32", d))
    source = GgufSource(write(gguf_bytes(meta, tensors)))
    assert source.quantised == ["Q4_K", "Q6_K"]
    for name, kind in (("gate_proj", "Q4_K"), ("v_proj", "Q6_K")):
        weight = source.read(name, 0)
        first = random_blocks(kind, weight.shape[1])[0].tolist()  # a row of the file is one block
        np.testing.assert_allclose(weight[:, 0], list(BY_HAND[kind][0](first)), rtol=1e-5, atol=1e-5)


def test_real_tensors_equal_their_definition(smollm2):
    """Of each type that SmolLM2 has: the first blocks of a tensor, and the last ones."""
    seen = {tensor.tensor_type.name: name for name, tensor in smollm2.file.tensors.items()}
    assert sorted(seen) == ["F32", "Q4_1", "Q8_0"]
    for kind, name in seen.items():
        raw = smollm2.file.tensors[name].data.reshape(-1).view(np.uint8)
        blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
        blocks = np.concatenate([blocks[:4], blocks[-4:]])
        want = np.array([list(BY_HAND[kind][0](block.tolist())) for block in blocks]).reshape(-1)
        flat = smollm2.file.read(name).reshape(-1)
        got = np.concatenate([flat[: len(want) // 2], flat[-len(want) // 2 :]])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


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


def tiny_tensors(family="llama", head_dim=None, d=D, f=F, **changes):
    """Tensor rows, float32 with random values; changes are name → shape, None to leave out."""
    head_dim = d // HEADS if head_dim is None else head_dim
    shapes = {
        "token_embd.weight": (V, d),
        "output.weight": (V, d),
        "output_norm.weight": (d,),
        "blk.0.attn_norm.weight": (d,),
        "blk.0.attn_q.weight": (HEADS * head_dim, d),
        "blk.0.attn_k.weight": (KV * head_dim, d),
        "blk.0.attn_v.weight": (KV * head_dim, d),
        "blk.0.attn_output.weight": (d, HEADS * head_dim),
        "blk.0.ffn_norm.weight": (d,),
        "blk.0.ffn_gate.weight": (f, d),
        "blk.0.ffn_up.weight": (f, d),
        "blk.0.ffn_down.weight": (d, f),
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
    "Q8_1": (
        tiny_metadata(),
        [("blk.0.attn_q.weight", (1, 32), Q8_1, b"\0" * 40)],
        "blk.0.attn_q.weight has type Q8_1; supported: F32, F16, BF16, Q4_0, Q4_1",
    ),
    "type 999": (tiny_metadata(), [("x", (1,), 999, b"\0" * 4)], r"999\)? is not a valid GGMLQuantizationType"),
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
NESTED = number(9, 4) + number(1)
CUT = "is it cut off"
HOSTILE = {
    "empty": (b"", "starts with b''"),
    "short magic": (b"GG", "starts with b'GG'"),
    "another format": (b"PK\3\4" + b"\0" * 60, "little-endian GGUF version 3"),
    "version 2": (header(0, 0, version=2), "little-endian GGUF version 3"),
    "big-endian": (header(0, 0, version=3 << 24), "little-endian GGUF version 3"),
    "cut after the magic": (b"GGUF\3\0", "starts with"),
    "cut after the version": (b"GGUF\3\0\0\0", CUT),
    "2^63 tensors": (header(HUGE, 0), CUT),
    "2^63 keys": (header(0, HUGE), CUT),
    "2^63 keys in a large file": (header(0, HUGE, b"\0" * (1 << 20)), "Duplicate"),
    "2^63 tensors in a large file": (header(HUGE, 0, b"\0" * (1 << 14)), CUT),
    "more keys than bytes": (header(0, 4000), CUT),
    "key of 2^63 bytes": (header(0, 1, number(HUGE) + b"k"), CUT),
    "string of 2^63 bytes": (header(0, 1, KEY + number(8, 4) + number(HUGE)), CUT),
    "string past the end": (header(0, 1, KEY + number(8, 4) + number(50) + b"abc"), CUT),
    "not UTF-8": (header(0, 1, KEY + number(8, 4) + number(2) + b"\xff\xfe"), "utf-8"),
    "array of 2^63 numbers": (header(0, 1, KEY + number(9, 4) + number(4, 4) + number(HUGE)), CUT),
    "array of 2^63 strings": (header(0, 1, KEY + number(9, 4) + number(8, 4) + number(HUGE)), CUT),
    "array of arrays": (
        header(0, 1, KEY + number(9, 4) + NESTED + number(4, 4) + number(0)),
        "k is an array of arrays",
    ),
    "array of 5000 arrays": (header(0, 1, KEY + number(9, 4) + NESTED * 5000), "recursion"),
    "unknown value type": (header(0, 1, KEY + number(77, 4)), r"77\)? is not a valid GGUFValueType"),
    "key twice": (header(0, 2, (KEY + number(4, 4) + number(1, 4)) * 2), "Duplicate k"),
    "tensor twice": (two_tensors(0, 64).replace(b"\1\0\0\0\0\0\0\0b", b"\1\0\0\0\0\0\0\0a"), "duplicated tensor .* a"),
    "overlap": (two_tensors(0, 32), "overlaps"),
    "offset past the end": (directory(offset=1 << 40), CUT),
    "offset near 2^64": (directory(offset=2**64 - 32), "overflow"),
    "odd offset": (directory(offset=1), "not aligned to 32"),
    "shape whose product overflows": (directory(dims=(2**33, 2**33)), "cannot reshape|beyond 64 bits"),
    "shape whose product overflows to 4": (directory(dims=(2**62 + 1, 4)), "cannot reshape|beyond 64 bits"),
    "axis of 2^64 - 1": (directory(dims=(2**64 - 1,)), CUT),
    "shape with zero": (directory(dims=(0,)), "whole blocks"),
    "half a block": (directory(dims=(48,), code=Q8_0), "not a multiple of Q8_0 block size"),
    "nine axes": (directory(dims=(1,) * 9), "9 axes"),
    "2^32 axes": (directory(rank=2**32 - 1), CUT),
    "no axes": (directory(dims=()), "0 axes"),
    "no axes of blocks": (directory(dims=(), code=Q8_0), "not a GGUF file"),
    "data cut off": (directory(dims=(64,)), CUT),
    "alignment 0": (gguf_bytes([("general.alignment", "u32", 0)], []), "alignment"),
    "alignment 24": (gguf_bytes([("general.alignment", "u32", 24)], []), "alignment"),
    "alignment 2^31": (gguf_bytes([("general.alignment", "u32", 1 << 31)], []), "alignment"),
    "alignment in words": (gguf_bytes([("general.alignment", "str", "32")], []), "alignment"),
}


@pytest.mark.fault("A10")
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
    assert time.monotonic() - start_s < 5


def test_a_header_has_no_more_numbers_than_we_count(write, monkeypatch):
    """Each costs the library an object of 100 bytes, so that a large file could take all memory."""
    data = header(0, 1, KEY + number(9, 4) + number(0, 4) + number(1000) + b"\0" * 1000)
    assert GgufFile(write(data)).metadata["k"] == [0] * 1000
    monkeypatch.setattr(ours, "MAX_READS", 900)
    with pytest.raises(ModelInvalid, match="more than 900 numbers"):
        GgufFile(write(data))


@pytest.mark.fault("A10")
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
