"""Tokenizer of a base model: converts text to token ids and back, and renders chats by the model's template.

Built on the `tokenizers` library.  `transformers` is imported only for a checkpoint without tokenizer.json: that takes
over a second, and its GGUF conversion drops SmolLM's digit splitting.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers

from jaxlora.checkpoints.chat_template import ChatTemplate, Scalar, Turn
from jaxlora.checkpoints.detokenizer import Detokenizer, byte_table
from jaxlora.checkpoints.gguf_tokenizer import GgufVocabulary
from jaxlora.checkpoints.hf import MAX_JSON_BYTES, read_json
from jaxlora.core.errors import InvalidRequest, ModelInvalid


class Tokenizer:
    """The tokenizer of one base model.  Made by `from_gguf` or `from_hf`."""

    def __init__(
        self,
        engine: tokenizers.Tokenizer,
        *,
        chat_template: str | None,
        eos_ids: tuple[int, ...],
        bos_id: int | None,
        pad_id: int | None,
    ):
        """Raises ModelInvalid for an unknown decoder, or an id that is not in the vocabulary."""
        self._engine = engine
        added = engine.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._bytes, self._strip_first = byte_table(engine, {i: token.content for i, token in added.items()})
        self.eos_ids, self.bos_id, self.pad_id = eos_ids, bos_id, pad_id
        self.chat_template = chat_template  # the template's text
        for name, i in [("eos", i) for i in eos_ids] + [("bos", bos_id), ("pad", pad_id)]:
            if i is not None and engine.id_to_token(i) is None:
                raise ModelInvalid(f"the {name} token id {i} is not in the vocabulary of {self.vocab_size} tokens")
        if not eos_ids:
            raise ModelInvalid("the tokenizer names no end-of-sequence token, so no answer would ever end")
        self._template = ChatTemplate(chat_template, self.special_texts) if chat_template is not None else None

    @property
    def special_texts(self) -> dict[str, str]:
        """Returns bos_token, eos_token and pad_token where they exist, which transformers passes to chat templates."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0], "pad_token": self.pad_id}
        texts = {name: self._engine.id_to_token(i) for name, i in ids.items() if i is not None}
        return {name: text for name, text in texts.items() if text is not None}

    @staticmethod
    def from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
        """Returns the tokenizer of a GGUF file's metadata.  Raises ModelInvalid naming a missing or unsupported key."""
        meta = GgufVocabulary(metadata)
        engine = meta.engine()
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise ModelInvalid("metadata tokenizer.chat_template must be text")
        eos = meta.token_id("eos_token_id")
        return Tokenizer(
            engine,
            chat_template=template,
            eos_ids=() if eos is None else (eos,),
            bos_id=meta.token_id("bos_token_id"),
            pad_id=meta.token_id("padding_token_id"),
        )

    @staticmethod
    def from_hf(path: Path) -> Tokenizer:
        """Returns the tokenizer of a Hugging Face directory: tokenizer.json and its companions.

        Raises ModelInvalid naming the file that is missing or unsupported.
        """
        path = Path(path)
        engine = _load_engine(path)
        settings_path = path / "tokenizer_config.json"
        settings = read_json(settings_path) if settings_path.exists() else {}
        bos, eos, pad = (_named_id(engine, settings, f"{kind}_token") for kind in ("bos", "eos", "pad"))
        _check_add_bos(engine, settings, bos)
        return Tokenizer(
            engine,
            chat_template=_hf_template(path, settings),
            eos_ids=_hf_eos_ids(path, eos),
            bos_id=bos,
            pad_id=pad,
        )

    def save(self, folder: Path) -> None:
        """Writes the files that `from_hf` and transformers read: the same ids, ends and chat template."""
        self._engine.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | self.special_texts, indent=2))
        ends = {"eos_token_id": list(self.eos_ids), "bos_token_id": self.bos_id, "pad_token_id": self.pad_id}
        (folder / "generation_config.json").write_text(json.dumps(ends, indent=2))
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Returns one more than the largest token id.  The model's vocabulary may be padded beyond it."""
        return len(self._bytes)

    @functools.cached_property
    def max_token_bytes(self) -> int:
        """Returns the length of the longest token: a text of n bytes has at least n / max_token_bytes tokens.

        A vocabulary that writes several unknown characters as one token may have fewer.
        """
        return max(map(len, self._bytes))

    @functools.cached_property
    def _plain_engine(self) -> tokenizers.Tokenizer:
        engine = tokenizers.Tokenizer.from_str(self._engine.to_str())  # a copy: the engine is shared by all threads
        engine.encode_special_tokens = True
        return engine

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Returns token ids.  parse_special: recognises special tokens in the text.  Bytes without a token are lost.

        add_special_tokens: also those the tokenizer itself adds (a bos for Llama 3, none for SmolLM2 and Qwen).
        Raises InvalidRequest for text that is not valid Unicode.
        """
        try:
            engine = self._engine if parse_special else self._plain_engine
            return engine.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("the text is not valid Unicode (a lone surrogate?)") from error

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text of the ids; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        skip = self.special_ids if skip_special else ()
        text = b"".join(self.token_bytes(i) for i in ids if i not in skip).decode("utf-8", "replace")
        return text[1:] if self._strip_first and text.startswith(" ") else text

    def token_bytes(self, id: int) -> bytes:
        """Returns the bytes of a token (of a special token: its name); none for an id without a token."""
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def token_text(self, id: int) -> str:
        """Returns `token_bytes` as text; a part of a character becomes U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    @property
    def template(self) -> ChatTemplate:
        """Returns the format the base model was trained on.  Raises InvalidRequest when it has no template."""
        if self._template is None:
            raise InvalidRequest("the base model has no chat template; use text completions", param="messages")
        return self._template

    def render(self, messages: Sequence[Turn], *, add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text in that format."""
        return self.template.render(messages, add_generation_prompt=add_generation_prompt)

    def chat(
        self,
        messages: Sequence[Turn],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Turn] | None = None,
        variables: Mapping[str, Scalar] | None = None,
    ) -> list[int]:
        """Returns the token ids of `template.render`.  Special tokens inside a message are recognised, as in transformers."""
        text = self.template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )
        return self.encode(text, add_special_tokens=False)

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """Returns a new Detokenizer."""
        return Detokenizer(self, skip_special=skip_special)


def _load_engine(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        if any((path / name).exists() for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")):
            raise ModelInvalid(
                f"{path} has only a SentencePiece file, which is not supported; convert it to tokenizer.json "
                "(load and save it with transformers)"
            )
        if (path / "vocab.json").exists() and (path / "merges.txt").exists():
            return _engine_of_merges(path)
        raise ModelInvalid(f"{path} has no tokenizer.json")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ModelInvalid(f"{file} is larger than {MAX_JSON_BYTES} bytes")
    try:
        engine = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelInvalid(f"{file} is not a tokenizer: {str(error)[:200]}") from error
    engine.no_truncation()  # a request that is too long gets an error, not a silent cut
    engine.no_padding()
    return engine


def _engine_of_merges(path: Path) -> tokenizers.Tokenizer:
    """Converts vocab.json and merges.txt with transformers, whose import takes seconds: only such checkpoints pay."""
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return converted.backend_tokenizer  # ty: ignore[missing-union-attribute]  (their hint admits None)
    except Exception as error:  # transformers raises many types, for files of many kinds
        raise ModelInvalid(
            f"{path} has no tokenizer.json, and transformers cannot make one of its vocab.json and merges.txt: "
            f"{str(error)[:200]}"
        ) from error


def _named_id(engine: tokenizers.Tokenizer, settings: Mapping[str, object], field: str) -> int | None:
    """Returns the id of the token that a field of tokenizer_config.json names, None when it names none."""
    value = settings.get(field)
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    i = engine.token_to_id(text) if isinstance(text, str) else None
    if i is None:
        raise ModelInvalid(f"tokenizer_config.json: {field} {repr(text)[:60]} is not in the vocabulary")
    return i


def _check_add_bos(engine: tokenizers.Tokenizer, settings: Mapping[str, object], bos: int | None) -> None:
    """Raises ModelInvalid when tokenizer_config.json and tokenizer.json disagree on adding a bos token."""
    wanted = settings.get("add_bos_token")
    if not isinstance(wanted, bool) or bos is None:
        return
    added = engine.encode("a").ids[:1] == [bos]
    if added != wanted:
        raise ModelInvalid(
            f"tokenizer_config.json says add_bos_token = {wanted}, but tokenizer.json "
            f"{'adds' if added else 'does not add'} one; make them agree"
        )


def _hf_eos_ids(path: Path, eos: int | None) -> tuple[int, ...]:
    """Returns the tokenizer's eos, then those of generation_config.json, or else of config.json."""
    ids = [] if eos is None else [eos]
    for name in ("generation_config.json", "config.json"):
        value = read_json(path / name).get("eos_token_id") if (path / name).exists() else None
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in listed):
            raise ModelInvalid(f"{name}: eos_token_id must be a token id or a list of them, got {repr(value)[:60]}")
        ids += listed
        break
    return tuple(dict.fromkeys(ids))


def _hf_template(path: Path, settings: Mapping[str, object]) -> str | None:
    """Returns chat_template.jinja if there is one, else the field of tokenizer_config.json (of a list, the default)."""
    file = path / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelInvalid(f"cannot read {file}: {error}") from error
    value = settings.get("chat_template")
    if isinstance(value, list):
        rows = [row for row in value if isinstance(row, dict) and row.get("name") == "default"]
        value = rows[0].get("template") if rows else None
    if value is not None and not isinstance(value, str):
        raise ModelInvalid("tokenizer_config.json: chat_template must be text, or a list of named templates")
    return value
