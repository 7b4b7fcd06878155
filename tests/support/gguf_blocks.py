"""The types of a GGUF file's tensors, defined element by element, apart from any library; and random blocks of them.

`raw` is the bytes of one block, as integers.  Source: the structs of llama.cpp,
https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

import gguf
import numpy as np


def half(raw, at=0):
    return float(np.frombuffer(bytes(raw[at : at + 2]), "<f2")[0])


def scales_and_mins(raw):
    """Of Q4_K and Q5_K: eight pairs of 6-bit numbers in 12 bytes; the last four keep their high bits in the first eight."""
    low = [(raw[j] & 63, raw[j + 4] & 63) for j in range(4)]
    high = [(raw[j + 8] & 15 | raw[j] >> 6 << 4, raw[j + 8] >> 4 | raw[j + 4] >> 6 << 4) for j in range(4)]
    return low + high


def q2_k(raw):
    scales, qs, d, low = raw[:16], raw[16:80], half(raw, 80), half(raw, 82)
    for i in range(256):
        half_, shift, byte = i // 128, i % 128 // 32 * 2, i % 32
        s = scales[i // 16]
        yield d * (s & 15) * (qs[32 * half_ + byte] >> shift & 3) - low * (s >> 4)


def q3_k(raw):
    high, qs, packed, d = raw[:32], raw[32:96], raw[96:108], half(raw, 108)
    for i in range(256):
        half_, shift, byte, s = i // 128, i % 128 // 32, i % 32, i // 16
        scale = (packed[s % 8] >> 4 * (s // 8) & 15 | (packed[8 + s % 4] >> 2 * (s // 4) & 3) << 4) - 32
        level = (qs[32 * half_ + byte] >> 2 * shift & 3) - (0 if high[byte] >> (4 * half_ + shift) & 1 else 4)
        yield d * scale * level


def q4_k(raw):
    d, low, pairs, qs = half(raw), half(raw, 2), scales_and_mins(raw[4:16]), raw[16:]
    for i in range(256):
        scale, least = pairs[i // 32]
        yield d * scale * (qs[i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15) - low * least


def q5_k(raw):
    d, low, pairs, high, qs = half(raw), half(raw, 2), scales_and_mins(raw[4:16]), raw[16:48], raw[48:]
    for i in range(256):
        scale, least = pairs[i // 32]
        level = qs[i // 64 * 32 + i % 32] >> 4 * (i // 32 % 2) & 15 | (high[i % 32] >> i // 32 & 1) << 4
        yield d * scale * level - low * least


def q6_k(raw):
    low, high, scales, d = raw[:128], raw[128:192], np.frombuffer(bytes(raw[192:208]), "i1"), half(raw, 208)
    for i in range(256):
        half_, quarter, byte = i // 128, i % 128 // 32, i % 32
        level = low[64 * half_ + 32 * (quarter % 2) + byte] >> 4 * (quarter // 2) & 15
        level |= (high[32 * half_ + byte] >> 2 * quarter & 3) << 4
        yield d * float(scales[i // 16]) * (level - 32)


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_xs(raw):
    d, high, low, qs = half(raw), raw[2] | raw[3] << 8, raw[4:8], raw[8:]
    for i in range(256):
        block = i // 32
        scale = (low[block // 2] >> 4 * (block % 2) & 15 | (high >> 2 * block & 3) << 4) - 32
        yield d * scale * IQ4[qs[16 * block + i % 16] >> 4 * (i % 32 // 16) & 15]


def nibble(raw, i):
    """Element i of 32: the low halves of 16 bytes come first."""
    return raw[i % 16] >> 4 * (i // 16) & 15


def fifth_bit(raw, i):
    return (int.from_bytes(bytes(raw[:4]), "little") >> i & 1) << 4


BY_HAND = {  # type → the numbers of one block of bytes, and where its float16 numbers are
    "F32": (lambda raw: [float(np.frombuffer(bytes(raw), "<f4")[0])], ()),
    "F16": (lambda raw: [half(raw)], (0,)),
    "BF16": (lambda raw: [float(np.frombuffer(b"\0\0" + bytes(raw), "<f4")[0])], ()),
    "Q4_0": (lambda raw: [half(raw) * (nibble(raw[2:], i) - 8) for i in range(32)], (0,)),
    "Q4_1": (lambda raw: [half(raw) * nibble(raw[4:], i) + half(raw, 2) for i in range(32)], (0, 2)),
    "Q5_0": (lambda raw: [half(raw) * ((nibble(raw[6:], i) | fifth_bit(raw[2:], i)) - 16) for i in range(32)], (0,)),
    "Q5_1": (
        lambda raw: [half(raw) * (nibble(raw[8:], i) | fifth_bit(raw[4:], i)) + half(raw, 2) for i in range(32)],
        (0, 2),
    ),
    "Q8_0": (lambda raw: [half(raw) * float(x) for x in np.frombuffer(bytes(raw[2:]), "i1")], (0,)),
    "Q2_K": (q2_k, (80, 82)),
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
    "IQ4_NL": (lambda raw: [half(raw) * IQ4[nibble(raw[2:], i)] for i in range(32)], (0,)),
    "IQ4_XS": (iq4_xs, (0,)),
}


def random_blocks(kind, count, seed=0):
    """Bytes of `count` blocks of a type, whose floats are ordinary numbers: [count, bytes of a block]."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), np.uint8)
    for at in BY_HAND[kind][1]:
        raw[:, at : at + 2] = rng.standard_normal((count, 1)).astype("<f2").view(np.uint8)
    if kind in ("F32", "BF16"):
        raw[:, -1] = 63 + 128 * rng.integers(0, 2, count)  # sign and exponent: numbers about 1
    return raw
