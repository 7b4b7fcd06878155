"""One request of the engine: admission, cancel, text and stops, logprobs and seeds, against the plain model."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from serve_world import CONFIG, Answer, ask, check_engine, check_idle, run_all, step, with_pages

from jaxlora.core.errors import AlreadyExists, ContextLengthExceeded, InvalidRequest, Overloaded
from serve.engine.request import FinishReason
from serve.engine.sequence import Plan, Status

pytest_plugins = ["serve_fixtures"]

# --- admission


@pytest.mark.fault("R3")
def test_what_does_not_fit_is_refused_with_the_numbers(engine):
    engine.submit(ask("fits", None, 60, 4))
    with pytest.raises(ContextLengthExceeded, match=r"60 tokens .* 5; .* at most 64") as caught:
        engine.submit(ask("large", None, 60, 5))
    assert caught.value.param == "max_tokens"
    assert list(engine._sequences) == ["fits"]
    run_all(engine)


def test_what_never_fits_the_pages_and_what_comes_too_late(world):
    engine = with_pages(world.engine(replace(CONFIG, max_waiting=2)), 10)
    with pytest.raises(InvalidRequest, match="41 tokens, this server holds 40"):
        engine.submit(ask("large", None, 40, 1))
    engine.submit(ask("a"))
    engine.submit(ask("b"))
    with pytest.raises(Overloaded):
        engine.submit(ask("c"))
    check_engine(engine)
    assert set(run_all(engine)) == {"a", "b"}


def test_an_id_in_use_is_refused_and_harms_nobody(world, engine):
    first = ask("same", world.adapters[0])
    engine.submit(first)
    with pytest.raises(AlreadyExists, match="same"):
        engine.submit(ask("same", None))
    check_engine(engine)
    assert run_all(engine)["same"].tokens == world.greedy(first)
    run_all(engine, [first])  # ended: the id is free


# --- cancel


@pytest.mark.fault("R5")
@pytest.mark.parametrize("state", ["waiting", "loading", "prefill", "decode", "preempted", "saved", "ended", "unknown"])
def test_cancel_in_every_state_gives_everything_back(world, engine, state, monkeypatch):
    gate = threading.Event()
    others = [ask(f"o{i}", world.adapters[(0, 1, 3)[i]], 4, 12) for i in range(3 if state == "waiting" else 2)]
    victim = ask("victim", world.adapters[2], 40, 20)
    answers: dict[str, Answer] = defaultdict(Answer)
    for r in others:
        engine.submit(r)
    while state == "waiting" and len(engine.scheduler.running) < len(others):
        step(engine, answers)  # then every slot has an adapter in its quantum
    engine.submit(victim)
    sequence = engine._sequences["victim"]
    match state:
        case "waiting":
            step(engine, answers)
            assert sequence.status is Status.WAITING
        case "preempted" | "saved":
            while len(answers["victim"].tokens) < 5:
                step(engine, answers)
            plan = Plan()
            engine.scheduler._preempt(sequence, engine.clock())
            if state == "saved":
                engine.scheduler._offload_or_drop(engine.scheduler._preempted.pop(sequence.number), plan)
                engine._move(plan)
                assert "victim" in engine._saved
        case "loading":
            get = engine.store.get
            monkeypatch.setattr(
                engine.store,
                "get",
                lambda ref, *how: (ref == victim.adapter and gate.wait(20) and None) or get(ref, *how),
            )
            while len(engine.scheduler.running) < len(others):
                step(engine, answers)
            assert engine._loads
            assert sequence.status is Status.WAITING
        case "prefill":
            engine.scheduler.limits = replace(engine.scheduler.limits, lanes=3)
            engine.scheduler.prefill_lanes = 3
            while sequence.done == 0:
                step(engine, answers)
            assert 0 < sequence.done < 40
        case "decode":
            while len(answers["victim"].tokens) < 5:
                step(engine, answers)
        case "ended":
            while engine.has_work:
                step(engine, answers)
    engine.cancel("nobody" if state == "unknown" else "victim")
    engine.cancel("victim")
    gate.set()
    check_engine(engine)
    assert sequence.pages == []
    engine.scheduler.settle()
    assert victim.adapter not in engine.slots.pinned()
    assert engine.scheduler.host_pages == 0
    rest = run_all(engine)
    assert rest["victim"].tokens == []
    for r in others:
        assert answers[r.id].tokens + rest[r.id].tokens == world.greedy(r), r.id
    assert sequence.status is Status.FINISHED
    check_idle(engine)


# --- text and stops


def expected_text(world, tokens):
    return world.tokenizer.decode(tokens)


def test_text_is_the_tokens_decoded(world, engine):
    requests = [ask(f"t{i}", [None, *world.adapters][i], 5, 20) for i in range(6)]
    answers = run_all(engine, requests)
    for r in requests:
        assert answers[r.id].text == expected_text(world, world.greedy(r)), r.id


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_there(world, engine, include):
    free = ask("stop", world.adapters[0], 9, 20)
    text = expected_text(world, world.greedy(free))
    at = next(i for i in range(6, len(text) - 2) if text.find(text[i : i + 2]) == i and "�" not in text[i : i + 2])
    stop = text[at : at + 2]
    answer = run_all(engine, [ask("stop", world.adapters[0], 9, 20, stop=(stop, "never"), include_stop=include)])[
        "stop"
    ]
    assert answer.text == text[: at + (2 if include else 0)]
    assert answer.finish is FinishReason.STOP
    assert answer.tokens == world.greedy(free)[: len(answer.tokens)]
    assert len(answer.tokens) < 20


def test_text_held_back_for_a_stop_string_comes_at_the_end(world, engine):
    free = ask("held", world.adapters[0], 9, 20)
    text = expected_text(world, world.greedy(free))
    answer = run_all(engine, [replace_params(free, stop=(text[-3:] + "x",))])["held"]
    assert (answer.text, answer.finish) == (text, FinishReason.LENGTH)


def replace_params(request, **changes):
    return replace(request, params=replace(request.params, **changes))


def test_stop_tokens_and_end_tokens(world, engine):
    free = ask("ids", world.adapters[0], 9, 20)
    tokens = world.greedy(free)
    at = next(i for i in range(4, 19) if tokens[i] not in tokens[:i])
    answer = run_all(engine, [replace_params(free, stop_token_ids=(tokens[at], 5))])["ids"]
    assert answer.tokens == tokens[: at + 1]
    assert answer.finish is FinishReason.STOP
    assert answer.text == expected_text(world, tokens[:at])  # the stop token is not text


def test_end_of_sequence_ends_unless_it_is_ignored(world, engine, monkeypatch):
    free = ask("eos", world.adapters[0], 9, 20)
    tokens = world.greedy(free)
    at = next(i for i in range(4, 19) if tokens[i] not in tokens[:i])
    monkeypatch.setattr(engine.tokenizer, "eos_ids", (tokens[at],))
    for ignore in (False, True):
        answer = run_all(engine, [replace_params(free, ignore_eos=ignore)])["eos"]
        assert answer.tokens == (tokens if ignore else tokens[: at + 1])
        assert answer.finish is (FinishReason.LENGTH if ignore else FinishReason.STOP)


@pytest.mark.parametrize("count", [1, 2, 13])
def test_max_tokens_is_exact(world, engine, count):
    request = ask("m", world.adapters[1], 8, count)
    answer = run_all(engine, [request])["m"]
    assert (answer.tokens, answer.finish) == (world.greedy(request), FinishReason.LENGTH)


def test_logprobs_are_those_of_the_plain_model(world, engine):
    requests = [ask(f"l{i}", [None, *world.adapters][i], 9, 6, logprobs=4) for i in range(6)]
    requests.append(ask("none", None, 9, 6))
    requests.append(ask("chosen", world.adapters[0], 9, 6, logprobs=0, temperature=1.7, top_k=40, seed=1))
    answers = run_all(engine, requests)
    assert answers["none"].logprobs == []
    for r in requests:
        if r.id == "none":
            continue
        adapter = None if r.adapter is None else world.store.get(r.adapter)
        weights, tokens = world.plain.merged(adapter), list(r.prompt)
        assert len(answers[r.id].logprobs) == 6
        for got, token in zip(answers[r.id].logprobs, answers[r.id].tokens, strict=True):
            logits = world.plain.logits(tokens, weights)
            logprob = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            best = np.argsort(-logprob, kind="stable")[: r.params.logprobs]
            assert got.token == token
            np.testing.assert_allclose(got.logprob, logprob[token], atol=1e-4)
            assert [t for t, _ in got.top] == best.tolist()
            np.testing.assert_allclose([p for _, p in got.top], logprob[best], atol=1e-4)
            tokens.append(token)


# --- chance


def test_a_seed_gives_the_same_tokens_beside_anyone(world):
    mine = [
        ask(f"mine{i}", a, 7, 12, temperature=1.0, top_p=0.9, seed=2**40 + 5) for i, a in enumerate(world.adapters[:2])
    ]
    seen = []
    for case in range(3):
        others = [
            ask(f"o{case}{i}", [None, *world.adapters[:3]][i % 4], 3 + i, 9, temperature=1.5) for i in range(case * 4)
        ]
        answers = run_all(world.engine(), [*others, *mine])
        seen.append([answers[r.id].tokens for r in mine])
    assert seen[0] == seen[1] == seen[2]


def test_seeds_choices_and_no_seed_differ(world, engine):
    prompt = range(200, 203)  # many tokens are likely after it
    requests = [ask(f"seed{i}", None, prompt, 12, temperature=2.0, seed=i) for i in range(3)]
    requests += [ask(f"choice{i}", None, prompt, 12, temperature=2.0, seed=0, choice=i) for i in range(3)]
    requests += [ask(f"none{i}", None, prompt, 12, temperature=2.0) for i in range(2)]
    answers = {id: tuple(a.tokens) for id, a in run_all(engine, requests).items()}
    assert answers["seed0"] == answers["choice0"]
    assert len(set(answers.values())) == len(requests) - 1


def test_a_draw_depends_on_the_place_in_the_text_and_not_on_the_step(world, engine):
    whole = ask("whole", world.adapters[0], 6, 20, temperature=1.0, seed=77)
    tokens = run_all(engine, [whole])["whole"].tokens
    for cut in (1, 9, 19):
        rest = ask(f"rest{cut}", world.adapters[0], [*whole.prompt, *tokens[:cut]], 20 - cut, temperature=1.0, seed=77)
        assert run_all(engine, [rest])[rest.id].tokens == tokens[cut:]


def test_every_place_has_a_draw_of_its_own(world, engine):
    tokens = run_all(engine, [ask("r", None, 6, 50, temperature=2.0, seed=5)])["r"].tokens
    assert len(set(tokens)) > 20
