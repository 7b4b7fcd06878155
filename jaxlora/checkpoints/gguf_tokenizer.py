"""Builds a `tokenizers` engine from the vocabulary, merges and flags in a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jaxlora.core.errors import ModelInvalid

# Regular expressions by which Llama 3 and Qwen2 split text into words; they differ in how many digits stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


class GgufVocabulary:
    """The tokenizer.ggml.* keys of a GGUF file, checked."""

    def __init__(self, metadata: Mapping[str, object]):
        self.metadata = metadata
        model, self.pre = self.get("model"), self.get("pre")
        if model != "gpt2":
            raise ModelInvalid(
                f"tokenizer.ggml.model {repr(model)[:60]} is not supported; supported: gpt2 (byte-level BPE)"
            )
        self.tokens, merges = self.strings("tokens"), self.strings("merges")
        kinds = self.get("token_type")
        self.kinds = np.asarray([] if kinds is None else kinds)
        if self.kinds.dtype.kind not in "iu" or self.kinds.shape != (len(self.tokens),):
            raise ModelInvalid(f"metadata tokenizer.ggml.token_type must be {len(self.tokens)} whole numbers")
        if bad := next((merge for merge in merges if merge.count(" ") != 1), None):
            raise ModelInvalid(f"tokenizer.ggml.merges has {bad[:60]!r}, expected two parts with one space")
        self.merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]

    def get(self, name: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def strings(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise ModelInvalid(f"metadata tokenizer.ggml.{name} must be a list of strings")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelInvalid(f"metadata tokenizer.ggml.{name} must be true or false")
        return value

    def token_id(self, name: str) -> int | None:
        value = self.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise ModelInvalid(
                f"tokenizer.ggml.{name} must be a token id below {len(self.tokens)}, got {repr(value)[:60]}"
            )
        return value

    def engine(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer that the `pre` key names.  Raises ModelInvalid for an unknown one."""
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pre == "smollm")
        if self.pre == "smollm":
            split = pre_tokenizers.Digits(individual_digits=True)
        elif self.pre in ("qwen2", "llama-bpe"):
            split = pre_tokenizers.Split(Regex(WORDS % ("{1,3}" if self.pre == "llama-bpe" else "")), "isolated")
        else:
            raise ModelInvalid(
                f"tokenizer.ggml.pre {repr(self.pre)[:60]} is not supported; supported: smollm, qwen2, llama-bpe"
            )
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if len(vocabulary) != len(self.tokens):
            raise ModelInvalid("metadata tokenizer.ggml.tokens has a token twice")
        try:
            model = models.BPE(vocab=vocabulary, merges=self.merges, ignore_merges=self.pre == "llama-bpe")
        except Exception as error:  # the library raises bare Exception
            raise ModelInvalid(f"tokenizer.ggml.merges does not fit the tokens: {str(error)[:200]}") from error
        engine = tokenizers.Tokenizer(model)
        if self.pre == "qwen2":
            engine.normalizer = normalizers.NFC()
        engine.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        engine.decoder = decoders.ByteLevel()
        for kind in (CONTROL, USER_DEFINED):
            texts = [token for token, k in zip(self.tokens, self.kinds, strict=True) if k == kind]
            engine.add_tokens([AddedToken(text, special=kind == CONTROL, normalized=False) for text in texts])
        self._add_ends(engine)
        return engine

    def _add_ends(self, engine: tokenizers.Tokenizer) -> None:
        """Sets the post-processor of add_bos_token and add_eos_token; if absent, bos for Llama 3 only, as llama.cpp."""
        ends = {}
        for name, default in (("bos", self.pre == "llama-bpe"), ("eos", False)):
            i = self.token_id(f"{name}_token_id")
            if not self.flag(f"add_{name}_token", default):
                continue
            if i is None:
                raise ModelInvalid(f"tokenizer.ggml.add_{name}_token is true but there is no {name}_token_id")
            ends[name] = (self.tokens[i], i)
        if ends:
            single = [ends["bos"][0]] if "bos" in ends else []
            single += ["$A"] + ([ends["eos"][0]] if "eos" in ends else [])
            engine.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ends.values()))
