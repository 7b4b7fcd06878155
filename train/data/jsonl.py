"""Parses JSONL lines into examples: OpenAI chat and preferences, prompt and completion, text, token ids.  No jax.

A line costs work and memory in proportion to the longest example: its bytes are counted before it is parsed, the bytes of
its text before they are tokenised, and the conversations that its turns are rendered with before they are rendered.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxlora.config.training import CROSS_ENTROPY
from jaxlora.core.errors import DataInvalid, JaxLoraError
from train.data.examples import KINDS, Example, Pair, Rollout, Unit, check_kind

ROLES = ("system", "user", "assistant")
SHOWN_PROBLEMS = 5  # problems reported of a bad file; reading stops there
ESCAPE_BYTES = 6  # of JSON for one byte of text, at most: \u0041
NUMBERS_BYTES = 128  # of JSON for all numbers of one token
FRAME_BYTES = 2**16  # of JSON for keys, roles and white space
MAX_RENDERED_BYTES = 2**24  # of all conversations that one line's trained turns are rendered with
TURN_BYTES = 32  # what a turn costs to render, in bytes of text
PART_BYTES = 2**16  # read at once of a line that is too long


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
        raise DataInvalid(f"must be an object with messages, got {_kind(prompt)}", param="input")
    _check_keys(prompt, ("messages",), (), "input.")
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
        raise DataInvalid(
            f"the two answers with their prompt take {pair.predictions} predictions together, more than the "
            f"{max_tokens - 1} allowed; shorten them",
            param="input",
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
        raise DataInvalid(f"must be a list of at least one message, got {_kind(messages)}", param=where)
    turns: list[dict[str, str]] = []
    trained: list[int] = []
    for i, message in enumerate(messages):
        field = f"{where}[{i}]"
        if not isinstance(message, dict):
            raise DataInvalid(f"must be an object with role and content, got {_kind(message)}", param=field)
        _check_keys(message, ("role", "content"), optional, field + ".")
        role = message["role"]
        if role not in ROLES:
            raise DataInvalid(f"must be one of {', '.join(ROLES)}, got {_shown(str(role))!r}", param=f"{field}.role")
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
        raise DataInvalid(
            f"{size} bytes of text are at least {least} tokens, more than the {max_tokens} allowed; shorten it",
            param=field,
        )


def _check_count(tokens: int, max_tokens: int, field: str) -> None:
    if tokens > max_tokens:
        raise DataInvalid(f"{tokens} tokens, more than the {max_tokens} allowed; shorten it", param=field)


def _example(tokens: Sequence[int], weights: np.ndarray, max_tokens: int, field: str) -> Example:
    _check_count(len(tokens), max_tokens, field)
    weights[:1] = 0.0
    return Example(np.asarray(tokens, np.int32), weights)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise DataInvalid(f"must be a string, got {_kind(value)}", param=field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataInvalid("holds half of a surrogate pair, which is not text", param=field) from None
    return value


def _fits_float32(value: float) -> bool:
    return abs(value) <= float(np.finfo(np.float32).max)  # false for NaN; no overflow for a huge whole number


def _shown(text: str) -> str:
    """Returns at most 40 characters of the text, fit for any output: lone surrogates are escaped."""
    return text[:40].encode(errors="backslashreplace").decode()


def _kind(value: object) -> str:
    """Returns the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number") + (" of length 0" if value in ([], {}) else "")


def _check_keys(got: Mapping[str, object], needed: tuple[str, ...], optional: tuple[str, ...], prefix: str) -> None:
    for key in got:
        if key not in needed + optional:
            raise DataInvalid(f"unknown key; known are {', '.join(needed + optional)}", param=f"{prefix}{_shown(key)}")
    for key in needed:
        if key not in got:
            raise DataInvalid("is missing", param=prefix + key)


# JSONL files.


def load_jsonl(
    path: Path | str,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    loss: str | None = CROSS_ENTROPY.name,
    name: str | None = None,
) -> list[Unit]:
    """Returns the examples or pairs of a JSONL file, in its order.  A line is one object of a kind the loss trains on:

        cross_entropy  {"messages": [{"role", "content", "weight"?: 0 | 1}, …]}      {"prompt": text, "completion": text}
                       {"input_ids": [id, …], "weights": [number, …]}                {"text": text}
        dpo            {"input": {"messages": […]}, "preferred_output": [message, …], "non_preferred_output": [message, …]}
        the others     {"input_ids": [id, …], "logprobs": [number, …], "advantages": [number, …], "weights"?: [number, …],
                        "sequence_ratio_mask"?: [0 | 1, …]}

    loss: None accepts lines of all kinds.  name: what errors call the file; None: its path.
    Raises DataInvalid, naming the file, and line and field of the first problems, also when it cannot be read or has no
    example.
    """
    name = str(path) if name is None else name
    most = max_tokens * max(ESCAPE_BYTES * tokenizer.max_token_bytes, NUMBERS_BYTES) + FRAME_BYTES

    def unit(raw: bytes, size: int, number: int) -> Unit:
        if size > most:
            raise DataInvalid(
                f"{size} bytes, more than the {most} that a line of at most {max_tokens} tokens may take; shorten it"
            )
        return _read_line(_parse_line(raw, first=number == 1), tokenizer, max_tokens)

    try:
        lines = ((n, functools.partial(unit, raw, size, n)) for n, raw, size in _lines(Path(path), most))
        examples = _collect(name, "line", lines, loss)
    except OSError as error:
        raise DataInvalid(f"{name} cannot be read ({error.strerror}); give the path of a JSONL file") from error
    if not examples:
        raise DataInvalid(f"{name} has no examples; give one JSON object a line")
    return examples


def _lines(path: Path, most: int) -> Iterator[tuple[int, bytes, int]]:
    """Yields (number from 1, bytes, size) of each line that is not blank; of one larger than `most` only its beginning."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            part = file.readline(most + 1)
            if not part:
                return
            raw, size = part.removesuffix(b"\n"), len(part)
            while not part.endswith(b"\n") and (part := file.readline(PART_BYTES)):
                size += len(part)
            size -= part.endswith(b"\n")
            if size > most or raw.strip():
                yield number, raw, size


def read_examples(
    data: Iterable[Mapping[str, object] | Unit], tokenizer: Tokenizer, *, max_tokens: int, loss: str
) -> list[Unit]:
    """Returns the examples or pairs of objects in the format of a file's lines, or of ready ones, in their order.

    Raises DataInvalid, naming index (from 0) and field of the first problems, also when there are none.
    """

    def unit(item: object) -> Unit:
        if isinstance(item, Example | Pair):
            return item
        if not isinstance(item, dict) or not all(isinstance(key, str) for key in item):
            raise DataInvalid(f"must be an object, such as a line of a JSONL file holds, got {type(item).__name__}")
        return _read_line(item, tokenizer, max_tokens)

    examples = _collect("data", "example", ((i, functools.partial(unit, item)) for i, item in enumerate(data)), loss)
    if not examples:
        raise DataInvalid("data has no examples; give at least one")
    return examples


def _collect(source: str, what: str, units: Iterable[tuple[int, Callable[[], Unit]]], loss: str | None) -> list[Unit]:
    """Returns the units that these calls make.  Raises one DataInvalid for the first problems, by number and field."""
    examples: list[Unit] = []
    problems: list[str] = []
    for number, make in units:
        try:
            unit = make()
            if loss is not None:
                check_kind(unit, loss)
            examples.append(unit)
        except DataInvalid as error:
            field = f", {error.param}" if error.param else ""
            problems.append(f"{what} {number}{field}: {error.message}")
            if len(problems) == SHOWN_PROBLEMS:
                problems.append("reading stopped here")
                break
    if problems:
        raise DataInvalid(f"{source} is not valid:\n" + ";\n".join(problems))
    return examples


def _parse_line(raw: bytes, *, first: bool) -> dict[str, object]:
    """Returns the JSON object of one line."""
    if first and raw.startswith(b"\xef\xbb\xbf"):
        raise DataInvalid("the file starts with a byte order mark; save it as UTF-8 without one")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataInvalid(f"not UTF-8: byte {error.start + 1} of the line; save the file as UTF-8") from error
    except RecursionError as error:
        raise DataInvalid("nested too deeply to be an example") from error
    except DataInvalid:
        raise
    except ValueError as error:  # also a number of too many digits
        raise DataInvalid(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataInvalid(f"must be an object, got {_kind(value)}")
    return value


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    got = dict(pairs)
    if len(got) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DataInvalid("the key is given twice", param=_shown(next(k for k, n in counts.items() if n > 1)))
    return got


def _no_constant(name: str) -> object:
    raise DataInvalid(f"{name} is not JSON; give a finite number")


def _read_line(line: dict[str, object], tokenizer: Tokenizer, max_tokens: int) -> Unit:
    """Returns the example or pair of one line; its keys determine the kind."""
    if "input" in line or "preferred_output" in line or "non_preferred_output" in line:
        _check_keys(line, ("input", "preferred_output", "non_preferred_output"), (), "")
        answers = line["preferred_output"], line["non_preferred_output"]
        return preference_pair(tokenizer, line["input"], *answers, max_tokens=max_tokens)
    if "messages" in line:
        _check_keys(line, ("messages",), (), "")
        return chat_example(tokenizer, line["messages"], max_tokens=max_tokens)
    if "prompt" in line or "completion" in line:
        _check_keys(line, ("prompt", "completion"), (), "")
        return completion_example(tokenizer, line["prompt"], line["completion"], max_tokens=max_tokens)
    if "logprobs" in line or "advantages" in line:
        _check_keys(line, ("input_ids", "logprobs", "advantages"), ("weights", "sequence_ratio_mask"), "")
        return rollout_example(line, max_tokens=max_tokens, vocab=tokenizer.vocab_size)
    if "input_ids" in line or "weights" in line:
        _check_keys(line, ("input_ids", "weights"), (), "")
        return token_example(line["input_ids"], line["weights"], max_tokens=max_tokens, vocab=tokenizer.vocab_size)
    if "text" in line:
        _check_keys(line, ("text",), (), "")
        return text_example(tokenizer, line["text"], max_tokens=max_tokens)
    raise DataInvalid(
        f"keys {', '.join(_shown(k) for k in list(line)[:5]) or '(none)'} are of no known kind; give {'; or '.join(KINDS.values())}"
    )
