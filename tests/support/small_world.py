"""Helpers the tests share: the committed fixtures, and small files made on the spot.

Fixtures are what transformers says; `make_model_fixtures.py` wrote them.  All arrays float32 or int32.

    fixtures/smollm2.json     prompts: 20 × {text, ids}; chats: 6 × {messages, text, ids, text_without_prompt,
                              text_continued}.  The ids come with digits split one by one.
    fixtures/smollm2.npz      sampled_ids [256] vocabulary ids; for prompt i: ids_i [T], logits_i [T, 256] at every
                              position for the sampled ids, greedy_i [64] continuation by argmax (eos does not end it),
                              margin_i [64] how far the best logit was above the second; last_i [V] all logits at the
                              last position, for i = 0, 2, 15.  The base is SmolLM2-135M-Instruct (Q4_1, dequantised).
    fixtures/templates.json   templates: name → Jinja; renders: {template, messages, add_generation_prompt, text}, text
                              null where the template refuses; encodings of the tokenizer in tiny-llama-tied:
                              {text, ids, ids_bare (nothing added), decoded (specials skipped)}
    fixtures/tiny-*/          a Hugging Face checkpoint with random weights, and expected.npz: for i = 0..3
                              ids_i [T] and logits_i [T, V] (T = 1, 7, 24, 60)

        tiny-llama-tied   tied head; the only one with a tokenizer    tiny-qwen2   biases; stored in bfloat16, tied
        tiny-llama-rope   Llama-3 rope scaling from 32 tokens         tiny-qwen3   q/k norm; heads*head_dim = 2*hidden;
        tiny-mistral      sliding window of 4 tokens                               two shards
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY_MODELS = ("tiny-llama-tied", "tiny-llama-rope", "tiny-mistral", "tiny-qwen2", "tiny-qwen3")


@dataclass(frozen=True)
class Expected:
    """One token sequence and transformers' logits for it, [T, V]; for SmolLM2 [T, 256], see SmolPrompt."""

    ids_T: np.ndarray
    logits_TV: np.ndarray


@dataclass(frozen=True)
class SmolPrompt:
    """A prompt of SmolLM2: logits of the sampled ids, greedy continuation, and all logits at the end for some."""

    text: str
    ids_T: np.ndarray
    sampled_ids: np.ndarray  # [256]
    logits_TV: np.ndarray  # [T, 256], columns are sampled_ids
    greedy: np.ndarray  # [64]
    margin: np.ndarray  # [64]
    last_V: np.ndarray | None


def tiny_path(name: str) -> Path:
    """The directory of one of TINY_MODELS."""
    return FIXTURES / name


def tiny_expected(name: str) -> list[Expected]:
    """Four sequences with their logits."""
    with np.load(FIXTURES / name / "expected.npz") as file:
        return [Expected(file[f"ids_{i}"], file[f"logits_{i}"]) for i in range(4)]


def smollm2_prompts() -> list[SmolPrompt]:
    """The 20 prompts."""
    texts = load_json("smollm2.json")["prompts"]
    with np.load(FIXTURES / "smollm2.npz") as file:
        return [
            SmolPrompt(
                text=row["text"],
                ids_T=file[f"ids_{i}"],
                sampled_ids=file["sampled_ids"],
                logits_TV=file[f"logits_{i}"],
                greedy=file[f"greedy_{i}"],
                margin=file[f"margin_{i}"],
                last_V=file.get(f"last_{i}"),
            )
            for i, row in enumerate(texts)
        ]


def load_json(name: str) -> dict:
    """smollm2.json or templates.json."""
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


def gguf_bytes(
    metadata: list[tuple[str, str, object]],
    tensors: list[tuple[str, tuple[int, ...], int, bytes]],
    *,
    alignment: int = 32,
) -> bytes:
    """A GGUF v3 file written by hand: metadata rows are (key, kind, value), tensors (name, numpy shape, type, data).

    Kinds: u32 u64 f32 bool str, or strs and i32s for arrays.
    """
    head = b"GGUF" + _u32(3) + _u64(len(tensors)) + _u64(len(metadata))
    for key, kind, value in metadata:
        head += _text(key) + _gguf_value(kind, value)
    body = b""
    for name, shape, code, data in tensors:
        body += b"\0" * (-len(body) % alignment)
        head += _text(name) + _u32(len(shape)) + b"".join(map(_u64, shape[::-1])) + _u32(code) + _u64(len(body))
        body += data
    return head + b"\0" * (-len(head) % alignment) + body


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def _text(value: str) -> bytes:
    return _u64(len(value.encode())) + value.encode()


def _gguf_value(kind: str, value: object) -> bytes:
    match kind, value:
        case "u32", int():
            return _u32(4) + _u32(value)
        case "u64", int():
            return _u32(10) + _u64(value)
        case "f32", float():
            return _u32(6) + np.float32(value).tobytes()
        case "bool", bool():
            return _u32(7) + bytes([value])
        case "str", str():
            return _u32(8) + _text(value)
        case "strs", list():
            return _u32(9) + _u32(8) + _u64(len(value)) + b"".join(map(_text, value))
        case "i32s", list():
            return _u32(9) + _u32(5) + _u64(len(value)) + np.array(value, "<i4").tobytes()
    raise ValueError(f"no GGUF value {kind} for {value!r}")
