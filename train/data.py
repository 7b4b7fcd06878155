"""From lines of text to packed lanes: JSONL → Example → Lane, and the order in which examples come.  Pure: no jax here.

Shape letters: J positions in a lane.  An Example of n tokens has n - 1 predictions: inputs tokens[:-1], targets tokens[1:].
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxlora.errors import DataInvalid, JaxLoraError

PADDING = 0  # segment number of positions that hold no example; real segments count from 1
ROLES = ("system", "user", "assistant")
SHOWN_PROBLEMS = 5  # of a bad file; reading stops there


class Tokenizer(Protocol):
    """What training needs of a tokenizer: the same calls that serving makes, so that prompts agree token for token."""

    @property
    def eos_ids(self) -> Collection[int]:
        """Ids that end a turn or a text; the first one ends a completion."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of a conversation under the model's chat template."""


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One sequence of one tenant.

    Raises DataInvalid when the two arrays disagree, fewer than two tokens are given, a weight is not finite, or no
    prediction has a weight (then the example would train nothing).
    """

    tokens: np.ndarray  # int32 [n] vocabulary ids
    weights: (
        np.ndarray
    )  # float32 [n]; weights[i] weighs the prediction OF token i; weights[0] is 0, nothing predicts it

    def __post_init__(self) -> None:
        for name, dtype in (("tokens", np.int32), ("weights", np.float32)):
            array = getattr(self, name)
            if array.ndim != 1 or array.dtype != dtype:
                raise DataInvalid(
                    f"{name} must be a flat {np.dtype(dtype)} array, got {array.dtype} {array.shape}", param=name
                )
        if len(self.tokens) != len(self.weights):
            raise DataInvalid(
                f"{len(self.tokens)} tokens but {len(self.weights)} weights; give one each", param="weights"
            )
        if len(self.tokens) < 2:
            raise DataInvalid(
                f"{len(self.tokens)} token(s); an example needs at least 2, one to predict from", param="tokens"
            )
        if not np.isfinite(self.weights).all() or self.weights[0] != 0:
            raise DataInvalid("weights must be finite, and weights[0] must be 0", param="weights")
        if not self.weights.any():
            raise DataInvalid("no trainable token: every weight is 0", param="weights")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predictions(self) -> int:
        """Positions the example takes in a lane."""
        return len(self.tokens) - 1


# Examples of each kind.  A problem is a DataInvalid whose `param` is the field.


def chat_example(tokenizer: Tokenizer, messages: object, *, max_tokens: int) -> Example:
    """A conversation; trains every assistant turn whose `weight` is not 0: its content and its end-of-turn token.

    Each trained turn follows exactly the tokens that serving would prompt with.  What comes after the last trained
    token is dropped: it could change nothing.
    Raises DataInvalid for a malformed conversation, one that does not end with the assistant, one over max_tokens, or
    one the chat template cannot train (see `_check_prefix`).
    """
    turns, trained = _read_messages(messages)
    tokens = _render(tokenizer, turns, add_generation_prompt=False)
    weights = np.zeros(len(tokens), np.float32)
    for i in trained:
        field = f"messages[{i}]"
        prompt = _render(tokenizer, turns[:i], add_generation_prompt=True)
        through = _render(tokenizer, turns[: i + 1], add_generation_prompt=False)
        _check_prefix(prompt, through, field, "of its own prompt")
        _check_prefix(through, tokens, field, "when later turns follow")
        ends = [at for at in range(len(prompt), len(through)) if through[at] in tokenizer.eos_ids]
        if not ends:
            raise DataInvalid(
                "the chat template ends the assistant's turn with no end-of-sequence token, so the model would never "
                "learn to stop; use a base whose template has one",
                param=field,
            )
        weights[len(prompt) : ends[-1] + 1] = 1.0
    if not weights.any():
        raise DataInvalid("no trainable token: every assistant turn has weight 0", param="messages")
    last = int(np.flatnonzero(weights)[-1]) + 1
    return _example(tokens[:last], weights[:last], max_tokens, "messages")


def completion_example(tokenizer: Tokenizer, prompt: object, completion: object, *, max_tokens: int) -> Example:
    """A prompt, then a completion and the end-of-sequence token, which are trained.

    The two are tokenised apart, so that the prompt's tokens are the ones serving sees.
    Raises DataInvalid for a field that is not text, and for more than max_tokens tokens.
    """
    before = tokenizer.encode(_text(prompt, "prompt"))
    after = tokenizer.encode(_text(completion, "completion"), add_special_tokens=False)
    if not tokenizer.eos_ids:
        raise DataInvalid("the tokenizer has no end-of-sequence token to end a completion with", param="completion")
    after.append(next(iter(tokenizer.eos_ids)))
    weights = np.concatenate([np.zeros(len(before), np.float32), np.ones(len(after), np.float32)])
    return _example(before + after, weights, max_tokens, "completion")


def text_example(tokenizer: Tokenizer, text: object, *, max_tokens: int) -> Example:
    """A text, all of it trained but its first token; no end-of-sequence token is added.

    Raises DataInvalid when it is not text, has fewer than two tokens or more than max_tokens.
    """
    tokens = tokenizer.encode(_text(text, "text"))
    return _example(tokens, np.ones(len(tokens), np.float32), max_tokens, "text")


def token_example(input_ids: object, weights: object, *, max_tokens: int, vocab: int) -> Example:
    """Ready token ids with one weight each: weights[i] weighs the prediction of token i, weights[0] is ignored.

    Raises DataInvalid for an id outside [0, vocab), a weight that is no finite number, or arrays of unequal lengths.
    """
    if not isinstance(input_ids, list) or not all(type(i) is int and 0 <= i < vocab for i in input_ids):
        raise DataInvalid(f"must be a list of whole numbers in [0, {vocab})", param="input_ids")
    if not isinstance(weights, list) or not all(type(w) in (int, float) and _fits_float32(w) for w in weights):
        raise DataInvalid("must be a list of finite numbers", param="weights")
    if len(weights) != len(input_ids):
        raise DataInvalid(f"{len(input_ids)} input_ids but {len(weights)} weights; give one each", param="weights")
    return _example(input_ids, np.array(weights, np.float32), max_tokens, "input_ids")


def _read_messages(messages: object) -> tuple[list[dict[str, str]], list[int]]:
    """(messages without their weights, indices of the assistant turns to train)."""
    if not isinstance(messages, list) or not messages:
        raise DataInvalid(f"must be a list of at least one message, got {_kind(messages)}", param="messages")
    turns: list[dict[str, str]] = []
    trained: list[int] = []
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        if not isinstance(message, dict):
            raise DataInvalid(f"must be an object with role and content, got {_kind(message)}", param=field)
        _check_keys(message, ("role", "content"), ("weight",), field + ".")
        role = message["role"]
        if role not in ROLES:
            raise DataInvalid(f"must be one of {', '.join(ROLES)}, got {_shown(str(role))!r}", param=f"{field}.role")
        turns.append({"role": role, "content": _text(message["content"], f"{field}.content")})
        weight = message.get("weight", 1)
        if type(weight) is not int or weight not in (0, 1) or ("weight" in message and role != "assistant"):
            raise DataInvalid("must be 0 or 1, and only on an assistant's message", param=f"{field}.weight")
        if role == "assistant" and weight == 1:
            trained.append(i)
    if turns[-1]["role"] != "assistant":
        raise DataInvalid("the last message must be an assistant's", param=f"messages[{len(turns) - 1}].role")
    return turns, trained


def _render(tokenizer: Tokenizer, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
    """Tokens of the turns.  A refusal by the template (order of roles, no system message) becomes a DataInvalid."""
    try:
        return tokenizer.chat(turns, add_generation_prompt=add_generation_prompt)
    except JaxLoraError as error:
        raise DataInvalid(f"the chat template refuses it: {error.message}", param="messages") from error


def _check_prefix(prefix: list[int], whole: list[int], field: str, when: str) -> None:
    """Raises DataInvalid unless `whole` starts with `prefix`: else training would see tokens that serving never does."""
    if whole[: len(prefix)] != prefix:
        raise DataInvalid(
            f"the tokens of this turn change {when}: the chat template rewrites it, or white space at the start of the "
            "answer merges with the prompt; strip the answer, or put each turn to train on a line of its own, last",
            param=field,
        )


def _example(tokens: Sequence[int], weights: np.ndarray, max_tokens: int, field: str) -> Example:
    if len(tokens) > max_tokens:
        raise DataInvalid(f"{len(tokens)} tokens, more than the {max_tokens} allowed; shorten it", param=field)
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
    """At most 40 characters of it, fit for any output: half surrogates are escaped."""
    return text[:40].encode(errors="backslashreplace").decode()


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
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


def load_jsonl(path: Path | str, tokenizer: Tokenizer, *, max_tokens: int) -> list[Example]:
    """The examples of a JSONL file, in its order.  Each line is one object of one of these kinds:

        {"messages": [{"role", "content", "weight"?: 0 | 1}, …]}      {"prompt": text, "completion": text}
        {"input_ids": [id, …], "weights": [number, …]}                {"text": text}

    Raises DataInvalid, naming the file, and line and field of the first problems, also when it cannot be read or holds no
    example.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataInvalid(f"{path} cannot be read ({error.strerror}); give the path of a JSONL file") from error
    examples: list[Example] = []
    problems: list[str] = []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            line = _parse_line(raw, first=number == 1)
            examples.append(_read_line(line, tokenizer, max_tokens))
        except DataInvalid as error:
            field = f", {error.param}" if error.param else ""
            problems.append(f"line {number}{field}: {error.message}")
            if len(problems) == SHOWN_PROBLEMS:
                problems.append("reading stopped here")
                break
    if problems:
        raise DataInvalid(f"{path} is not valid:\n" + ";\n".join(problems))
    if not examples:
        raise DataInvalid(f"{path} has no examples; give one JSON object a line")
    return examples


def _parse_line(raw: bytes, *, first: bool) -> dict[str, object]:
    """The JSON object of one line."""
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
        names = [key for key, _ in pairs]
        raise DataInvalid("the key is given twice", param=_shown(next(k for k in names if names.count(k) > 1)))
    return got


def _no_constant(name: str) -> object:
    raise DataInvalid(f"{name} is not JSON; give a finite number")


def _read_line(line: dict[str, object], tokenizer: Tokenizer, max_tokens: int) -> Example:
    """The example of one line; the kind is told by its keys."""
    if "messages" in line:
        _check_keys(line, ("messages",), (), "")
        return chat_example(tokenizer, line["messages"], max_tokens=max_tokens)
    if "prompt" in line or "completion" in line:
        _check_keys(line, ("prompt", "completion"), (), "")
        return completion_example(tokenizer, line["prompt"], line["completion"], max_tokens=max_tokens)
    if "input_ids" in line or "weights" in line:
        _check_keys(line, ("input_ids", "weights"), (), "")
        return token_example(line["input_ids"], line["weights"], max_tokens=max_tokens, vocab=tokenizer.vocab_size)
    if "text" in line:
        _check_keys(line, ("text",), (), "")
        return text_example(tokenizer, line["text"], max_tokens=max_tokens)
    raise DataInvalid(
        f"keys {', '.join(_shown(k) for k in list(line)[:5]) or '(none)'} are of no known kind; give messages, prompt and completion, "
        "input_ids and weights, or text"
    )


# Order and packing.


class ExampleStream:
    """Endless examples in a shuffled order that depends on (seed, epoch) only; `cursor` resumes it exactly.

    The shuffle sorts raw Philox draws, so it is the same under every NumPy version and on every machine.
    """

    def __init__(self, examples: Sequence[Example], seed: int, cursor: int = 0):
        """Raises DataInvalid for no examples, a negative seed or a negative cursor."""
        if not examples:
            raise DataInvalid("no examples to train on; give at least one")
        if seed < 0 or cursor < 0:
            raise DataInvalid(f"seed and cursor must not be negative, got seed {seed} and cursor {cursor}")
        self.examples = tuple(examples)
        self.seed = seed
        self._cursor = cursor
        self._epoch: int | None = None
        self._order: np.ndarray = np.empty(0, np.int64)

    @property
    def cursor(self) -> int:
        """Examples consumed in all, over all epochs."""
        return self._cursor

    def peek(self, count: int) -> list[Example]:
        """The next `count` examples, not consumed."""
        return [self._at(self._cursor + i) for i in range(count)]

    def take(self, count: int) -> list[Example]:
        """The next `count` examples; the cursor moves past them."""
        taken = self.peek(count)
        self._cursor += count
        return taken

    def _at(self, place: int) -> Example:
        epoch, index = divmod(place, len(self.examples))
        if epoch != self._epoch:
            raw = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(len(self.examples))
            self._epoch, self._order = epoch, np.argsort(raw, kind="stable")
        return self.examples[self._order[index]]


@dataclass(frozen=True, eq=False, slots=True)
class Lane:
    """One packed row of one tenant: whole examples side by side, each its own segment, then padding (all zeros)."""

    token_J: np.ndarray  # int32 input ids
    target_J: np.ndarray  # int32 ids to predict
    weight_J: np.ndarray  # float32 weight of each prediction
    position_J: np.ndarray  # int32 place of the token in its example, from 0
    segment_J: np.ndarray  # int32 example number in this lane, from 1; PADDING elsewhere


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the sizes, grouped so that each group's sum fits the capacity; largest first, ties in given order."""
    groups: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for g, room in enumerate(free):
            if sizes[i] <= room:
                groups[g].append(i)
                free[g] -= sizes[i]
                break
        else:
            groups.append([i])
            free.append(capacity - sizes[i])
    return groups


def check_length(examples: Sequence[Example], length: int) -> None:
    """Raises DataInvalid when an example does not fit a lane of `length` positions."""
    for i, example in enumerate(examples):
        if example.predictions > length:
            raise DataInvalid(
                f"example {i} has {len(example)} tokens, but a lane of {length} positions holds at most {length + 1}; "
                "shorten it or use longer lanes",
                param="tokens",
            )


def fill_lane(examples: Sequence[Example], length: int) -> Lane:
    """A lane of `length` positions that holds the examples in this order; they must fit."""
    lane = Lane(
        token_J=np.zeros(length, np.int32),
        target_J=np.zeros(length, np.int32),
        weight_J=np.zeros(length, np.float32),
        position_J=np.zeros(length, np.int32),
        segment_J=np.full(length, PADDING, np.int32),
    )
    start = 0
    for segment, example in enumerate(examples, start=1):
        here = slice(start, start + example.predictions)
        lane.token_J[here] = example.tokens[:-1]
        lane.target_J[here] = example.tokens[1:]
        lane.weight_J[here] = example.weights[1:]
        lane.position_J[here] = np.arange(example.predictions)
        lane.segment_J[here] = segment
        start = here.stop
    return lane


def pack(examples: Sequence[Example], length: int) -> list[Lane]:
    """The examples in lanes of `length` positions, first-fit decreasing; every example once and whole.

    Raises DataInvalid when an example has more than `length` + 1 tokens.
    """
    check_length(examples, length)
    groups = first_fit_decreasing([e.predictions for e in examples], length)
    return [fill_lane([examples[i] for i in group], length) for group in groups]


def real_tokens(lanes: Sequence[Lane]) -> int:
    """Positions that hold an example: what a step computes and a tenant pays for."""
    return sum(int(np.count_nonzero(lane.segment_J != PADDING)) for lane in lanes)
