"""An error of ours in one request's answer ends that request: the others say what they say alone, and the device thread goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from serve_world import ask, check_idle, run_all, settle

from jaxlora.core.errors import JaxLoraError
from serve.engine.grammar import GrammarSource, GrammarState
from serve.engine.logit_edits import RowEdits
from serve.engine.output import OutputProcessor
from serve.engine.request import FinishReason
from serve.runtime.device_thread import DeviceThread

pytest_plugins = ["serve_fixtures"]
LETTERS = GrammarSource(kind="regex", text="[a-z ]{200}", param="x")


class Panic(BaseException):
    """What a panic of a library in Rust becomes."""


def broken[**P, R](real: Callable[P, R], after: int, error: BaseException) -> Callable[P, R]:
    """The function, which raises after so many calls."""
    calls = 0

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return real(*args, **kwargs)

    return call


def only(id: str, real: Callable, error: BaseException) -> Callable:
    """The method of an OutputProcessor, which raises for this request."""

    def call(self: OutputProcessor, *args):
        if self._id == id:
            raise error
        return real(self, *args)

    return call


@pytest.fixture
def grammar(world):
    runner = DeviceThread(world.engine(), base_name="x")  # it is never started
    return runner.grammars.compile_now(LETTERS)


@pytest.fixture(params=["its edits", "its grammar", "its grammar's end", "its text", "its scores"])
def bad(request, world, grammar, monkeypatch):
    """A request whose answer fails in this place, and after how many tokens."""
    error = Panic("no")
    match request.param:
        case "its edits":
            monkeypatch.setattr(RowEdits, "fill", broken(RowEdits.fill, 2, ValueError("no")))
            return ask(
                "bad", world.adapters[0], 5, 20, presence_penalty=0.5
            ), 3  # there is nothing to edit for the first
        case "its grammar":
            monkeypatch.setattr(GrammarState, "allow", broken(GrammarState.allow, 3, error))
            return ask("bad", None, 5, 20, grammar=grammar), 3
        case "its grammar's end":
            monkeypatch.setattr(GrammarState, "take", broken(GrammarState.take, 1, error))
            return ask("bad", None, 5, 20, grammar=grammar), 1
        case "its scores":
            monkeypatch.setattr("serve.engine.output.PromptLogprob", broken(dict, 0, TypeError("no")))
            return ask("bad", world.adapters[1], 20, 20, prompt_logprobs=1), 0
    monkeypatch.setattr(OutputProcessor, "_text", only("bad", OutputProcessor._text, RuntimeError("no")))
    return ask("bad", world.adapters[0], 5, 20), 0


@pytest.mark.fault("C4")
def test_an_answer_that_fails_fails_alone(world, engine, bad, caplog):
    request, tokens = bad
    good = [ask(f"good{i}", [None, *world.adapters][i], 4 + 3 * i, 12) for i in range(3)]
    answers = run_all(engine, [good[0], request, *good[1:]])
    for one in good:
        assert answers[one.id].tokens == world.greedy(one)
        assert answers[one.id].finish is FinishReason.LENGTH
    error = answers["bad"].error
    assert isinstance(error, JaxLoraError)
    assert (error.status, len(answers["bad"].tokens)) == (500, tokens)
    assert "answer bad failed" in caplog.text
    assert engine.telemetry.ended["error"] == 1


def test_a_request_that_cannot_be_admitted_ends_alone(world, runner, monkeypatch, caplog):
    monkeypatch.setattr(GrammarState, "__init__", broken(GrammarState.__init__, 0, Panic("no")))
    bad = ask("bad", None, 5, 4, grammar=runner.grammars.compile_now(LETTERS))

    async def error_of():
        return (await anext(runner.submit(bad))).error

    error = asyncio.run(error_of())
    assert (type(error), error.status) == (JaxLoraError, 500)
    good = ask("good", world.adapters[0])
    assert runner.complete([good])[0].tokens == world.greedy(good)
    assert runner.health() == "ok"
    settle(runner)
    runner.call(lambda: check_idle(runner.engine))
