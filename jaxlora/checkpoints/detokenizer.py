"""Streaming detokenizer: converts token ids to text incrementally, using a table of the bytes of each token."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import tokenizers

from jaxlora.core.errors import ModelInvalid

if TYPE_CHECKING:
    from jaxlora.checkpoints.tokenizer import Tokenizer


BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
SPACE_MARK = "▁"  # how SentencePiece vocabularies write a space


class Detokenizer:
    """Converts tokens to text one by one; all texts and the `flush` joined equal `Tokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = tokenizer._strip_first

    def push(self, token: int) -> str:
        """Returns the characters this token completes, perhaps none."""
        if token in self._skip:
            return ""
        return self._out(self._characters.decode(self._tokenizer.token_bytes(token)))

    def flush(self) -> str:
        """Returns the rest of an unfinished character as U+FFFD, and resets the stream."""
        text = self._out(self._characters.decode(b"", final=True))
        self._characters.reset()
        self._strip_next = self._tokenizer._strip_first
        return text

    def _out(self, text: str) -> str:
        if not text or not self._strip_next:
            return text
        self._strip_next = False
        return text[1:] if text.startswith(" ") else text


def _byte_level_alphabet() -> dict[str, int]:
    """Returns character → byte of byte-level BPE.  Source: GPT-2; printable bytes map to themselves, others to 256+."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def byte_table(engine: tokenizers.Tokenizer, added: Mapping[int, str]) -> tuple[list[bytes], bool]:
    """Returns (bytes of each token id, whether a text's first space is dropped).  Raises ModelInvalid."""
    spec: dict = {"type": "none"} if engine.decoder is None else json.loads(engine.decoder.__getstate__())
    parts = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds: list[str] = [part["type"] for part in parts]
    byte_level = kinds == ["ByteLevel"]
    if not byte_level and kinds not in (
        ["Replace", "ByteFallback", "Fuse"],
        ["Replace", "ByteFallback", "Fuse", "Strip"],
    ):
        raise ModelInvalid(f"the tokenizer's decoder {'+'.join(kinds)[:200]} is not supported; byte-level BPE is")
    vocabulary = engine.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    alphabet = _byte_level_alphabet()
    for text, i in vocabulary.items():
        table[i] = _bytes_of(text, alphabet) if byte_level else _bytes_of_piece(text)
    for i, text in added.items():
        table[i] = text.encode()
    return table, kinds[-1] == "Strip"


def _bytes_of(text: str, alphabet: Mapping[str, int]) -> bytes:
    """Returns the bytes of a byte-level token; one written in other characters is encoded as it is."""
    try:
        return bytes([alphabet[character] for character in text])
    except KeyError:
        return text.encode()


def _bytes_of_piece(text: str) -> bytes:
    """Returns the bytes of a SentencePiece token: <0xNN> is a byte, the mark a space."""
    if BYTE_PIECE.fullmatch(text):
        return bytes.fromhex(text[3:5])
    return text.replace(SPACE_MARK, " ").encode()
