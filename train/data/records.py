"""Turns records into examples: chats, preferences, prompt and completion, text, token ids, and what `shapes` converts.  No jax.

A record costs work and memory in proportion to the longest example: the bytes of its text are counted before it is
tokenised, and the conversations that its turns are rendered with before they are rendered.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from jaxlora.core.errors import DataInvalid, JaxLoraError
from train.data.examples import Example, Pair, Rollout, Unit
from train.data.shapes import check_keys, converted, json_kind, shaped, shown

ROLES = ("system", "user", "assistant")
MAX_RENDERED_BYTES = 2**24  # of all conversations that one record's trained turns are rendered with
TURN_BYTES = 32  # what a turn costs to render, in bytes of text


class ExampleTooLong(DataInvalid):
    """An example has more tokens than a lane holds."""

    def __init__(self, message: str, *, param: str | None, predictions: int, exact: bool = True):
        """predictions: tokens of the lane that would hold it.  Not exact: at least so many."""
        super().__init__(message, param=param)
        self.predictions, self.exact = predictions, exact


class Tokenizer(Protocol):
    """What training needs of a tokenizer: the same calls that serving makes, so that prompts agree token for token."""

    @property
    def eos_ids(self) -> Collection[int]:
        """Returns the ids that end a turn or a text; the first one ends a completion."""

    @property
    def vocab_size(self) -> int:
        """Returns one more than the largest token id."""

    @property
    def max_token_bytes(self) -> int:
        """Returns the length of the longest token: a text of n bytes has at least n / max_token_bytes tokens."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text."""

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text under the model's chat template, whose tokens serving would prompt with."""


# Examples of each kind.  A problem is a DataInvalid whose `param` is the field.


def chat_example(tokenizer: Tokenizer, messages: object, *, max_tokens: int) -> Example:
    """Returns the example of a conversation; trains content and end-of-turn token of assistant turns of weight not 0.

    Each trained turn follows exactly the tokens that serving would prompt with.  Tokens after the last trained one are
    dropped, since they cannot change the loss.
    Raises DataInvalid for a malformed conversation, one that does not end with the assistant, one over max_tokens, or
    one the chat template cannot train (see `_check_prefix`).
    """
    turns, trained = _read_messages(messages, "messages", ("weight",))
    _check_last(turns, "messages")
    if not trained:
        raise DataInvalid("no trainable token: every assistant turn has weight 0", param="messages")
    fields = {i: f"messages[{i}]" for i in trained}
    return _chat_example(tokenizer, turns, fields, "messages", max_tokens)


def preference_pair(tokenizer: Tokenizer, prompt: object, preferred: object, other: object, *, max_tokens: int) -> Pair:
    """Returns the pair of a conversation, {"messages": […]}, and two continuations, of which the first is preferred.

    Both are trained like `chat_example`; nothing of the conversation before them is trained.
    Raises DataInvalid for a malformed line, two equal continuations, or more tokens than a lane of max_tokens - 1
    predictions holds of the two together.
    """
    if not isinstance(prompt, dict):
        raise DataInvalid(f"must be an object with messages, got {json_kind(prompt)}", param="input")
    check_keys(prompt, ("messages",), (), "input.")
    before, _ = _read_messages(prompt["messages"], "input.messages", ())
    if before[-1]["role"] == "assistant":
        raise DataInvalid(
            "the last message must not be an assistant's", param=f"input.messages[{len(before) - 1}].role"
        )
    sides = []
    for field, answer in (("preferred_output", preferred), ("non_preferred_output", other)):
        after, trained = _read_messages(answer, field, ())
        _check_last(after, field)
        fields = {len(before) + i: f"{field}[{i}]" for i in trained}
        sides.append(_chat_example(tokenizer, before + after, fields, field, max_tokens))
    pair = Pair(*sides)
    if pair.predictions >= max_tokens:
        raise ExampleTooLong(
            f"the two answers with their prompt take {pair.predictions} predictions together, more than the "
            f"{max_tokens - 1} allowed; shorten them",
            param="input",
            predictions=pair.predictions,
        )
    return pair


def _chat_example(
    tokenizer: Tokenizer, turns: list[dict[str, str]], trained: dict[int, str], field: str, max_tokens: int
) -> Example:
    """Returns the example of the turns; only those in `trained` (index → its field, in order) have weight."""
    text = _render(tokenizer, turns, field, add_generation_prompt=False)
    _check_text(tokenizer, text, max_tokens, field)
    cost = len(trained) * (len(text.encode()) + TURN_BYTES * len(turns))
    if len(trained) > 1 and cost > MAX_RENDERED_BYTES:
        raise DataInvalid(
            f"each of its {len(trained)} turns to train is rendered with all turns before it, about {cost} bytes, more than "
            f"the {MAX_RENDERED_BYTES} allowed; train fewer of them (weight 0), or divide the conversation",
            param=field,
        )
    tokens = tokenizer.encode(text, add_special_tokens=False)
    weights = np.zeros(len(tokens), np.float32)
    last = 0
    for i, turn in reversed(trained.items()):  # the last one first: it says how long the example is
        before = _render(tokenizer, turns[:i], field, add_generation_prompt=True)
        after = _render(tokenizer, turns[: i + 1], field, add_generation_prompt=False)
        prompt, through = (tokenizer.encode(one, add_special_tokens=False) for one in (before, after))
        _check_prefix(prompt, through, turn, "of its own prompt")
        _check_prefix(through, tokens, turn, "when later turns follow")
        ends = [at for at in range(len(prompt), len(through)) if through[at] in tokenizer.eos_ids]
        if not ends:
            raise DataInvalid(
                "the chat template ends the assistant's turn with no end-of-sequence token, so the model would never "
                "learn to stop; use a base whose template has one",
                param=turn,
            )
        weights[len(prompt) : ends[-1] + 1] = 1.0
        last = last or ends[-1] + 1
        _check_count(last, max_tokens, field)
    return _example(tokens[:last], weights[:last], max_tokens, field)


def completion_example(tokenizer: Tokenizer, prompt: object, completion: object, *, max_tokens: int) -> Example:
    """Returns the example of a prompt (not trained), then a completion and the end-of-sequence token (trained).

    The two are tokenised separately, so that the prompt's tokens are the ones serving sees.
    Raises DataInvalid for a field that is not text, and for more than max_tokens tokens.
    """
    given, wanted = _text(prompt, "prompt"), _text(completion, "completion")
    _check_text(tokenizer, given + wanted, max_tokens, "completion")
    before = tokenizer.encode(given)
    after = tokenizer.encode(wanted, add_special_tokens=False)
    if not tokenizer.eos_ids:
        raise DataInvalid("the tokenizer has no end-of-sequence token to end a completion with", param="completion")
    after.append(next(iter(tokenizer.eos_ids)))
    weights = np.concatenate([np.zeros(len(before), np.float32), np.ones(len(after), np.float32)])
    return _example(before + after, weights, max_tokens, "completion")


def text_example(tokenizer: Tokenizer, text: object, *, max_tokens: int) -> Example:
    """Returns the example of a text, all trained except its first token; no end-of-sequence token is added.

    Raises DataInvalid when it is not text, has fewer than two tokens or more than max_tokens.
    """
    given = _text(text, "text")
    _check_text(tokenizer, given, max_tokens, "text")
    tokens = tokenizer.encode(given)
    return _example(tokens, np.ones(len(tokens), np.float32), max_tokens, "text")


def token_example(input_ids: object, weights: object, *, max_tokens: int, vocab: int) -> Example:
    """Returns the example of given token ids; weights[i] weights the prediction of token i, weights[0] is ignored.

    Raises DataInvalid for an id outside [0, vocab), a weight that is not a finite number, or arrays of unequal lengths.
    """
    ids = _ids(input_ids, vocab)
    return _example(ids, _numbers(weights, len(ids), "weights"), max_tokens, "input_ids")


def rollout_example(line: Mapping[str, object], *, max_tokens: int, vocab: int) -> Example:
    """Returns the example of a sampled sequence: input_ids, logprobs, advantages; weights and sequence_ratio_mask or 1.

    Entry i belongs to the prediction of token i, entry 0 is ignored.  A prompt should have weight 0.
    Raises DataInvalid as `token_example` does.
    """
    ids = _ids(line["input_ids"], vocab)
    ones = [1] * len(ids)
    weights = _numbers(line.get("weights", ones), len(ids), "weights")
    mask = _numbers(line.get("sequence_ratio_mask", ones), len(ids), "sequence_ratio_mask")
    if not np.isin(mask, (0, 1)).all():
        raise DataInvalid("must be a list of 0 and 1", param="sequence_ratio_mask")
    rollout = Rollout(
        logprobs=_numbers(line["logprobs"], len(ids), "logprobs"),
        advantages=_numbers(line["advantages"], len(ids), "advantages"),
        ratio_mask=mask == 1,
    )
    return replace(_example(ids, weights, max_tokens, "input_ids"), rollout=rollout)


def _ids(value: object, vocab: int) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < vocab for i in value):
        raise DataInvalid(f"must be a list of whole numbers in [0, {vocab})", param="input_ids")
    return value


def _numbers(value: object, count: int, field: str) -> np.ndarray:
    """Returns the numbers as float32 [count]."""
    if not isinstance(value, list) or not all(type(x) in (int, float) and _fits_float32(x) for x in value):
        raise DataInvalid("must be a list of finite numbers", param=field)
    if len(value) != count:
        raise DataInvalid(f"{count} input_ids but {len(value)} {field}; give one each", param=field)
    return np.array(value, np.float32)


def _read_messages(messages: object, where: str, optional: tuple[str, ...]) -> tuple[list[dict[str, str]], list[int]]:
    """Returns (messages without their weights, indices of the assistant turns to train)."""
    if not isinstance(messages, list) or not messages:
        raise DataInvalid(f"must be a list of at least one message, got {json_kind(messages)}", param=where)
    turns: list[dict[str, str]] = []
    trained: list[int] = []
    for i, message in enumerate(messages):
        field = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise DataInvalid(f"must be an object with role and content, got {json_kind(message)}", param=field)
        check_keys(message, ("role", "content"), optional, field + ".")
        role = message["role"]
        if role not in ROLES:
            raise DataInvalid(f"must be one of {', '.join(ROLES)}, got {shown(str(role))!r}", param=f"{field}.role")
        turns.append({"role": role, "content": _text(message["content"], f"{field}.content")})
        weight = message.get("weight", 1)
        if type(weight) is not int or weight not in (0, 1) or ("weight" in message and role != "assistant"):
            raise DataInvalid("must be 0 or 1, and only on an assistant's message", param=f"{field}.weight")
        if role == "assistant" and weight == 1:
            trained.append(i)
    return turns, trained


def _check_last(turns: Sequence[Mapping[str, str]], where: str) -> None:
    if turns[-1]["role"] != "assistant":
        raise DataInvalid("the last message must be an assistant's", param=f"{where}[{len(turns) - 1}].role")


def _render(tokenizer: Tokenizer, turns: list[dict[str, str]], field: str, *, add_generation_prompt: bool) -> str:
    """Returns the turns as text.  Raises DataInvalid where the template refuses them (role order, system message)."""
    try:
        return tokenizer.render(turns, add_generation_prompt=add_generation_prompt)
    except JaxLoraError as error:
        raise DataInvalid(f"the chat template refuses it: {error.message}", param=field) from error


def _check_prefix(prefix: list[int], whole: list[int], field: str, when: str) -> None:
    """Raises DataInvalid unless `whole` starts with `prefix`: training would see tokens that serving never does."""
    if whole[: len(prefix)] != prefix:
        raise DataInvalid(
            f"the tokens of this turn change {when}: the chat template rewrites it, or white space at the start of the "
            "answer merges with the prompt; strip the answer, or put each turn to train on a line of its own, last",
            param=field,
        )


def _check_text(tokenizer: Tokenizer, text: str, max_tokens: int, field: str) -> None:
    """Raises DataInvalid for a text that has too many tokens however it is tokenised."""
    size = len(text.encode())
    least = -(-size // tokenizer.max_token_bytes)
    if least > max_tokens:
        raise ExampleTooLong(
            f"{size} bytes of text are at least {least} tokens, more than the {max_tokens} allowed; shorten it",
            param=field,
            predictions=least - 1,
            exact=False,
        )


def _check_count(tokens: int, max_tokens: int, field: str) -> None:
    if tokens > max_tokens:
        raise ExampleTooLong(
            f"{tokens} tokens, more than the {max_tokens} allowed; shorten it", param=field, predictions=tokens - 1
        )


def _example(tokens: Sequence[int], weights: np.ndarray, max_tokens: int, field: str) -> Example:
    _check_count(len(tokens), max_tokens, field)
    weights[:1] = 0.0
    return Example(np.asarray(tokens, np.int32), weights)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise DataInvalid(f"must be a string, got {json_kind(value)}", param=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataInvalid("holds half of a surrogate pair, which is not text", param=field) from None
    return value


def _fits_float32(value: float) -> bool:
    return abs(value) <= float(np.finfo(np.float32).max)  # false for NaN; no overflow for a huge whole number


# Records.


def read_record(record: Mapping[str, object], tokenizer: Tokenizer, max_tokens: int) -> Unit:
    """Returns the example or pair of a record, whose keys determine its shape.

    Raises DataInvalid, with the record's own name of a field; ExampleTooLong for more than max_tokens.
    """
    shape, kept = shaped(record)
    ours, rename = converted(shape, kept)
    try:
        return _built(ours, tokenizer, max_tokens)
    except DataInvalid as error:
        error.param = None if error.param is None else rename(error.param)
        raise


def _built(record: Mapping[str, object], tokenizer: Tokenizer, max_tokens: int) -> Unit:
    if "preferred_output" in record:
        answers = record["preferred_output"], record["non_preferred_output"]
        return preference_pair(tokenizer, record["input"], *answers, max_tokens=max_tokens)
    if "messages" in record:
        return chat_example(tokenizer, record["messages"], max_tokens=max_tokens)
    if "prompt" in record:
        return completion_example(tokenizer, record["prompt"], record["completion"], max_tokens=max_tokens)
    if "logprobs" in record:
        return rollout_example(record, max_tokens=max_tokens, vocab=tokenizer.vocab_size)
    if "input_ids" in record:
        vocab = tokenizer.vocab_size
        return token_example(record["input_ids"], record["weights"], max_tokens=max_tokens, vocab=vocab)
    return text_example(tokenizer, record["text"], max_tokens=max_tokens)


def cut(unit: Unit, max_tokens: int) -> Unit:
    """Returns the beginning of an example, or of both sides of a pair, that a lane of max_tokens - 1 predictions holds.

    Raises DataInvalid when nothing to train is left of it.
    """
    if isinstance(unit, Example):
        return _beginning(unit, max_tokens)
    room, first, second = max_tokens - 1, unit.chosen.predictions, unit.rejected.predictions
    half = room // 2
    kept = (first, room - first) if first <= half else (room - second, second) if second <= half else (half, half)
    return Pair(*(_beginning(side, count + 1) for side, count in zip(unit.segments, kept, strict=True)))


def _beginning(example: Example, tokens: int) -> Example:
    rollout = example.rollout
    if rollout is not None:
        rollout = Rollout(rollout.logprobs[:tokens], rollout.advantages[:tokens], rollout.ratio_mask[:tokens])
    return Example(example.tokens[:tokens], example.weights[:tokens], rollout)
