"""Structured output: a grammar constrains the next tokens.  Pure: no jax here.

A request's JSON schema, regular expression, choice or grammar is compiled on threads of its own, under limits of size,
work and time, and cached.  Each answer has a state of its own on the host, which stays with it while it is
preempted or computed again, and gives the device one bit a token.  Source: llguidance, which does all of it.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from
from llguidance.numpy import fill_next_token_bitmask

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import InvalidRequest, Overloaded
from jaxlora.core.tenant_threads import TenantThreads

MAX_SOURCE_BYTES = 2**16  # of a grammar as text
MAX_MULTIPLE = 10_000  # product of all multipleOf of a schema: so many states the automaton of a number has
COMPILE_S = 5.0  # a grammar that takes longer is refused
THREADS = 2  # that compile; one whose caller timed out ends by the library's limits
KEPT = 64  # compiled grammars
TOKEN_S = 0.002  # of the device thread for a token, on average over some of them
TOO_SLOW = f"takes over {TOKEN_S * 1000:g} ms of every token, for all who are served here; simplify it"
TOKENS_OVER_S = 0.05  # beyond that: the first ones take longer, as they build what the next ones use
MOST_S = 0.01  # that one token counts: a machine that stands still for a moment is not the grammar's work
# About a millisecond of work for a token's mask, and tens of megabytes for an answer; far beyond what schemas need.
LIMITS = LLParserLimits(
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    verbose_errors=False,
)
HEADER = "%llguidance {}"  # of a grammar that was GBNF
# The library looks ahead for text that must come, and some grammars of two endless terminals have it look for ever.
NO_FORCING = '%llguidance {"no_forcing": true}\n'
# As json.dumps writes: with free white space a small model may generate it for ever.
JSON_FORM = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "lenient": False,
    "coerce_one_of": False,
}
JSON_LEXEME = re.compile(r'"[^"]*"|[{}]|[:,] ')


@dataclass(frozen=True, kw_only=True, slots=True)
class GrammarSource:
    """The constraint on an answer, as the client wrote it."""

    # A JSON schema; all of it; one of these; Lark or GBNF; calls of functions, see `_calls`.
    kind: Literal["json", "regex", "choice", "grammar", "calls"]
    text: str  # JSON of a schema, of a list of strings or of calls, a regular expression, a grammar
    param: str  # the field of the request, for messages
    compact: bool = False  # JSON without any white space
    answer: GrammarSource | None = None  # beside calls: a JSON schema of what may stand there instead of them


class Grammar:
    """A compiled grammar; each answer starts its own state."""

    def __init__(self, matcher: LLMatcher, vocab: int):
        self.matcher, self.vocab = matcher, vocab
        self.slow = False  # an answer of it has kept the device thread too long

    def start(self) -> GrammarState:
        """Returns the state before the first token."""
        return GrammarState(self)


class GrammarState:
    """The state of one answer in its grammar.

    It works on the device thread, and every answer waits for it: it may take TOKEN_S a token, and TOKENS_OVER_S more.
    """

    def __init__(self, grammar: Grammar):
        self._grammar, self._matcher = grammar, grammar.matcher.deep_copy()
        self._over_s = 0.0  # what the last tokens in a row took beyond TOKEN_S each
        self._slow = grammar.slow
        self._words = -(-grammar.vocab // 32)

    def allow(self, bits_W: np.ndarray) -> None:
        """Sets the bits (uint32) of the allowed tokens, and clears all others.  Check `error` after it."""
        if self._slow:
            return
        bits_W[self._words :] = 0
        began = time.thread_time()  # what other threads take of the processor is not the grammar's
        fill_next_token_bitmask(self._matcher, bits_W[None, : self._words].view(np.int32))
        self._took(time.thread_time() - began - TOKEN_S)

    def take(self, token: int) -> bool:
        """Advances by one allowed token.  Returns whether it was the last.  Check `error` after it."""
        began = time.thread_time()
        self._matcher.consume_token(token)
        self._took(time.thread_time() - began)
        return self._matcher.is_stopped()

    def _took(self, over_s: float) -> None:
        self._over_s = max(self._over_s + min(over_s, MOST_S), 0.0)
        self._slow = self._grammar.slow = self._grammar.slow or self._over_s > TOKENS_OVER_S

    @property
    def error(self) -> InvalidRequest | None:
        """The error of a grammar that has reached a limit, or takes too long, or None."""
        if self._slow:
            return InvalidRequest(f"the answer's grammar {TOO_SLOW}")
        if not self._matcher.is_error():
            return None
        return InvalidRequest(
            f"the answer's grammar is too complex at this token ({_said(self._matcher)}); simplify it"
        )


class Grammars:
    """Compiles grammars over one tokenizer.  Thread-safe."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._threads = TenantThreads(THREADS, "grammar")
        self._lock = threading.Lock()  # over the two below
        self._built: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[object, ...], Grammar] = OrderedDict()  # the one used last is last

    async def compile(self, source: GrammarSource, tenant: str) -> Grammar:
        """Compiles a grammar, off the loop's thread; one of each tenant at a time.

        Raises InvalidRequest for a bad grammar and one over the limits, Overloaded when others keep the threads busy.
        """
        work = self._threads.submit(tenant, self.compile_now, source)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(work), COMPILE_S)
        except TimeoutError:
            if work.cancelled():  # before it began
                raise Overloaded("other grammars are being compiled; retry later") from None
            message = f"{source.param} takes over {COMPILE_S:g} s to compile; simplify it"
            raise InvalidRequest(message, param=source.param) from None

    def compile_now(self, source: GrammarSource) -> Grammar:
        """Compiles a grammar on this thread.  Raises InvalidRequest."""
        key = source.kind, source.text, source.compact, source.answer
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                if self._kept[key].slow:
                    raise InvalidRequest(f"{source.param} {TOO_SLOW}", param=source.param)
                return self._kept[key]
            self._built = self._built or llguidance_tokenizer(self._tokenizer)
        matcher = LLMatcher(self._built, _written(source), log_level=0, limits=LIMITS)
        vocab = self._tokenizer.vocab_size
        grammar = Grammar(matcher, vocab)
        if not matcher.is_error():
            trial = matcher.deep_copy()
            fill_next_token_bitmask(trial, np.zeros((1, -(-vocab // 32)), np.int32))
            matcher = trial if trial.is_error() else matcher
        if matcher.is_error():
            raise InvalidRequest(f"{source.param} cannot be used: {_said(matcher)}", param=source.param)
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return grammar


class _Ours:
    """Our tokenizer under the names that llguidance reads."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids), None
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def llguidance_tokenizer(tokenizer: Tokenizer) -> LLTokenizer:
    """Returns our tokenizer for llguidance: the same bytes for every id, special tokens never part of a text."""
    ends = list(tokenizer.eos_ids)
    return LLTokenizer(TokenizerWrapper(_Ours(tokenizer)), n_vocab=tokenizer.vocab_size, eos_token=ends)


def _written(source: GrammarSource) -> str:
    """Returns the source in llguidance's form.  Raises InvalidRequest for sources that it does not take."""

    def refuse(why: str) -> InvalidRequest:
        return InvalidRequest(f"{source.param} {why}", param=source.param)

    if (size := len(source.text.encode())) > MAX_SOURCE_BYTES:
        raise refuse(f"has {size} bytes; at most {MAX_SOURCE_BYTES} are compiled")
    if source.answer is not None and (error := LLMatcher.validate_grammar(_written(source.answer))):
        raise InvalidRequest(f"{source.answer.param} cannot be used: {_line(error)}", param=source.answer.param)
    if source.kind == "regex":
        return LLMatcher.grammar_from_regex(source.text)
    for word, instead in (("%json", "give a JSON schema by itself"), ("%llguidance", "leave it out")):
        if source.kind == "grammar" and word in source.text:
            raise refuse(f"must not hold {word}; {instead}")
    if source.kind == "calls":
        return _calls(json.loads(source.text), refuse, None if source.answer is None else _json(source.answer))
    if source.kind == "json":
        return LLMatcher.grammar_from_json_schema(json.dumps(_json(source)))
    try:
        return NO_FORCING * (source.kind == "grammar") + grammar_from(source.kind, source.text).removeprefix(HEADER)
    except ValueError as error:
        raise refuse(f"cannot be used: {str(error)[:200]}") from None


def _json(source: GrammarSource) -> dict[str, object]:
    """Returns the JSON schema, with how its white space is written.  Raises InvalidRequest."""

    def refuse(why: str) -> InvalidRequest:
        return InvalidRequest(f"{source.param} {why}", param=source.param)

    try:
        schema = json.loads(source.text)
    except (ValueError, RecursionError):
        raise refuse("must be JSON, nested at most some hundred times") from None
    if not isinstance(schema, dict):
        raise refuse("must be a JSON schema: an object")
    _check_multiples(schema, refuse)
    form = JSON_FORM | ({"item_separator": ",", "key_separator": ":"} if source.compact else {})
    return schema | {"x-guidance": form}


def _check_multiples(schema: object, refuse: Callable[[str], InvalidRequest]) -> None:
    if _multiples(schema) > MAX_MULTIPLE:
        raise refuse(f"asks for multipleOf numbers whose product is over {MAX_MULTIPLE}; use smaller ones")


def _calls(said: dict, refuse: Callable[[str], InvalidRequest], answer: dict[str, object] | None) -> str:
    """Returns the Lark grammar of calls.

    said: `calls`, each with its `opening` up to the arguments and their `schema`; `closing` after them; `begin`, the mark
    that a call begins with, if there is one; `free`, whether text may stand instead of calls and before them; `many`,
    whether there may be several.  answer: the schema of what may stand instead of calls; with it no other text may.
    """
    begin, free, closing = said["begin"], said["free"] and answer is None, json.dumps(said["closing"])
    names = " | ".join(f"call_{i}" for i in range(len(said["calls"])))
    rules = ["%llguidance {}", f"call: {names}"]
    if free and begin:
        # A lazy head: once the mark stands there, it is the head of a call and nothing else.
        rules += [f"head[lazy]: TEXT {json.dumps(begin)}", r"TEXT: /(.|\n)*/"]
        rules.append("start: call* TEXT" if said["many"] else "start: call | TEXT")
    elif free:
        rules += [r"OTHER: /([^{ \t\r\n](.|\n)*)?/", "start: call | OTHER"]
    else:
        calls = r'call ("\n" call)*' if said["many"] else "call"
        rules.append(f"start: {calls}" if answer is None else f"start: {calls} | answer")
    if answer is not None:
        rules.append(f"answer: %json {json.dumps(answer)}")
    for i, call in enumerate(said["calls"]):
        _check_multiples(call["schema"], refuse)
        opening = json.dumps(call["opening"].removeprefix(begin) if free else call["opening"])
        if not begin:  # as the lexemes of JSON: an answer may begin alike, and the lexer does not go back
            opening = " ".join(json.dumps(lexeme) for lexeme in JSON_LEXEME.findall(call["opening"]))
        rules.append(f"call_{i}: {'head ' if free and begin else ''}{opening} arguments_{i} {closing}")
        rules.append(f"arguments_{i}: %json {json.dumps(call['schema'] | {'x-guidance': JSON_FORM})}")
    return "\n".join(rules)


def _multiples(schema: object) -> int:
    """Returns the product of all multipleOf in a schema, each as a whole number of its last decimal."""
    found: set[int] = set()
    todo: list[object] = [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            number = value.get("multipleOf")
            if isinstance(number, int | float) and not isinstance(number, bool) and number > 0:
                share = Fraction(str(number))
                found.add(share.numerator * share.denominator)
            todo += value.values()
        elif isinstance(value, list):
            todo += value
    product = 1
    for number in found:
        product = min(product * number, 10**9)
    return product


def _said(matcher: LLMatcher) -> str:
    return _line(matcher.get_error())


def _line(error: str) -> str:
    """Returns the library's reason in one line."""
    return error.strip().split("\n")[0][:300]
