"""A byte tokenizer with ChatML-like templates, for tests of what depends on templates and not on a vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from jaxlora.core.errors import InvalidRequest

START, END, TWO_NEWLINES, VOCAB = 1, 2, 3, 260
SPECIALS = {"<s>": START, "</s>": END, "\n\n": TWO_NEWLINES}  # two newlines merge, as byte-pair encoding does
FIRST_BYTE = 4

Messages = Sequence[dict[str, str]]


def chatml(messages: Messages) -> str:
    """Every turn as it is; a default system message when none is given."""
    head = "" if messages and messages[0]["role"] == "system" else "<s>system\nhelp</s>\n"
    return head + "".join(f"<s>{m['role']}\n{m['content']}</s>\n" for m in messages)


def forgetful(messages: Messages) -> str:
    """Rewrites earlier assistant turns, as templates that drop old reasoning do."""
    kept = [dict(m, content="...") if m["role"] == "assistant" else m for m in messages[:-1]]
    return chatml([*kept, *messages[-1:]])


def endless(messages: Messages) -> str:
    """Never says that a turn is over."""
    return "".join(f"<s>{m['role']}\n{m['content']}\n" for m in messages)


def strict(messages: Messages) -> str:
    """Refuses system messages, as some templates do."""
    if any(m["role"] == "system" for m in messages):
        raise InvalidRequest("no system messages", param="messages")
    return chatml(messages)


class FakeTokenizer:
    def __init__(self, template: Callable[[Messages], str] = chatml, bos: bool = False):
        self.template = template
        self.bos = bos
        self.eos_ids = (END,)
        self.vocab_size = VOCAB
        self.max_token_bytes = max(map(len, SPECIALS))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [START] if self.bos and add_special_tokens else []
        for piece in re.split("(<s>|</s>|\n\n)", text):
            ids += [SPECIALS[piece]] if piece in SPECIALS else [FIRST_BYTE + b for b in piece.encode()]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        names = {i: name.encode() for name, i in SPECIALS.items()}
        return b"".join(names[i] if i in names else bytes([i - FIRST_BYTE]) for i in ids).decode()

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        return self.template(messages) + "<s>assistant\n" * add_generation_prompt

    def chat(self, messages: Messages) -> list[int]:
        return self.encode(self.render(messages), add_special_tokens=False)
