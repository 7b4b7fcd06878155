"""Publications while others sample: who ends on which version, what each answer says of it, and that nobody else notices.

Version n makes one of two tokens that are its own, whatever comes before: so a token tells its version.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serve_world import (
    BASE,
    CONFIG,
    Answer,
    ask,
    check_engine,
    check_idle,
    run_all,
    watch_programs,
    with_pages,
    with_resident,
)
from train_world import assert_same_bits, host

from jaxlora.config.training import Optimizer
from jaxlora.core.lora import LoraSpec
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.model.lora_pool import PoolSpec
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import LiveTraining
from train.data.examples import Example
from train.step.microsteps import MicrostepSizes
from train.trainer import Trainer

pytest_plugins = ["serve_fixtures"]
SPEC, KINDS = LoraSpec(rank=1, alpha=1.0, targets=("lm_head",)), 150


class Publisher:
    """A server that is not started, one adapter of it that is published again and again, and the log of that."""

    def __init__(self, world, name):
        self.runner, self.name = DeviceThread(world.engine(), base_name=BASE), name
        self.engine = self.runner.engine
        self.zero = jax.tree.map(jnp.zeros_like, world.device_rows(world.adapters[0]))
        self.newest = None

    def publish(self, keep=2):
        """A version; the next number's tokens are known before it is minted."""
        version = 1 if self.newest is None else self.newest.version + 1
        head = self.zero["lm_head"]
        b = np.zeros(head.b_LSRY.shape, np.float32)
        b[0, 0, 2 * token_pair(version)], b[0, 0, 2 * token_pair(version) + 1] = 5000.0, -5000.0
        rows = self.zero | {
            "lm_head": dataclasses.replace(
                head, a_LSRX=head.a_LSRX + 1.0, b_LSRY=jax.device_put(b), scale_LS=head.scale_LS + 1.0
            )
        }
        self.newest = self.runner.publisher.publish("acme", self.name, SPEC, rows, keep=keep)
        assert self.newest.version == version
        return self.newest

    def ask(self, id, follow, **changes):
        request = ask(id, self.newest, **changes)
        return dataclasses.replace(request, follow=follow)


def token_pair(version: int) -> int:
    return 2 + version % KINDS


@pytest.fixture
def publisher(world, request):
    name = request.node.name.removeprefix("test_").replace("_", "-").replace("[", "-").replace("]", "")
    it = Publisher(world, name[:50].strip("-"))
    it.publish()
    yield it
    check_idle(it.engine)


@pytest.mark.fault("T4")
@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_answer_mixes_versions_and_followers_state_what_the_log_says(publisher, count):
    rng, asked, live = np.random.default_rng(0), {}, {}
    engine, seen = publisher.engine, defaultdict(set)
    while publisher.newest.version < count or engine.has_work:
        if publisher.newest.version < count and len(live) < 12 and rng.random() < 0.5:
            id = f"r{len(asked)}"
            asked[id] = live[id] = publisher.ask(
                id, bool(rng.random() < 0.5), prompt=int(rng.integers(1, 12)), max_tokens=int(rng.integers(1, 12))
            )
            engine.submit(asked[id])
        if publisher.newest.version < count and rng.random() < 0.6:
            publisher.publish()
        for delta in engine.step():
            request = asked[delta.request_id]
            wanted = publisher.newest if request.follow else request.adapter
            assert delta.error is None
            assert delta.adapter == wanted
            assert delta.tokens[0] // 2 == token_pair(wanted.version)
            seen[request.id].add(wanted.version)
            if delta.finish is not None:
                del live[request.id]
        check_engine(engine)
    assert live == {}
    followed = [len(versions) for id, versions in seen.items() if asked[id].follow]
    assert max(followed) > 3, "no request met a publication: the test says nothing"
    assert all(len(versions) == 1 for id, versions in seen.items() if not asked[id].follow)
    publisher.publish()  # and nobody uses an older one any more
    assert len(engine.store.versions("acme", publisher.name)) == 2


def test_a_new_version_speaks_within_one_step_and_the_prompt(publisher):
    engine = publisher.engine
    engine.submit(publisher.ask("pinned", False, max_tokens=30))
    engine.submit(publisher.ask("follows", True, max_tokens=30))
    for _ in range(5):
        engine.step()
    old, new = publisher.newest, publisher.publish()
    engine.submit(publisher.ask("asks", False, prompt=CONFIG.prefill_tokens, max_tokens=2))
    said = {d.request_id: d.adapter for d in engine.step()}
    assert said == {"pinned": old, "follows": new, "asks": new}
    for id in ("pinned", "follows", "asks"):
        engine.cancel(id)


def test_freshness_counts_from_the_update_to_the_first_token(publisher, monkeypatch):
    runner, engine = publisher.runner, publisher.engine
    now = 100.0
    monkeypatch.setattr("serve.runtime.device_thread.time.monotonic", lambda: now)
    for learned_s in (98.0, 99.3):
        publisher.newest = runner.publisher.publish("acme", publisher.name, SPEC, publisher.zero, learned_s=learned_s)
    for id in ("one", "two"):
        engine.submit(publisher.ask(id, False, max_tokens=2))
    now = 100.1
    while engine.has_work:
        for delta in engine.step():
            runner._deliver([delta])
    assert (runner.publisher.freshness.total, runner.publisher.freshness.sum) == (
        1,
        pytest.approx(0.8),
    )  # of the version that spoke, once


def test_a_follower_that_is_in_line_never_gets_less_than_the_newest(publisher):
    engine = publisher.engine
    early = publisher.ask("early", True, max_tokens=3)
    new = publisher.publish()
    assert early.adapter != new
    answers = [d.adapter for d in _all_deltas(engine, early)]
    assert answers == [new] * 3


def _all_deltas(engine, *requests):
    for r in requests:
        engine.submit(r)
    out = []
    while engine.has_work:
        out += engine.step()
    return out


def test_a_follower_shares_no_prefix_with_anybody(publisher):
    engine = publisher.engine
    prompt = list(range(10, 30))
    engine.submit(publisher.ask("first", True, prompt=prompt, max_tokens=2))
    first = engine._sequences["first"]
    run_all(engine)
    assert engine.scheduler.pages.match(("acme", publisher.newest), prompt) == []
    _all_deltas(engine, publisher.ask("pinned", False, prompt=prompt, max_tokens=2))
    engine.submit(publisher.ask("second", True, prompt=prompt, max_tokens=2))
    second = engine._sequences["second"]
    engine.submit(publisher.ask("pinned again", False, prompt=prompt, max_tokens=2))
    again = engine._sequences["pinned again"]
    run_all(engine)
    assert (first.cached_tokens, second.cached_tokens, again.cached_tokens) == (0, 0, 16)


def test_following_an_adapter_that_stays_the_same_loses_and_repeats_nothing(world):
    """Publications of equal weights, with pages for one sequence and a half: KV is dropped and computed again."""
    adapter = world.add("follow-same", seed=41)
    rows = world.device_rows(adapter)
    engine = with_pages(world.engine(), 14)
    runner = DeviceThread(engine, base_name=BASE)
    engine.scheduler.limits = dataclasses.replace(engine.scheduler.limits, host_pages=0)
    requests = [dataclasses.replace(ask(f"same{i}", adapter, 6, 30), follow=True) for i in range(3)]

    def publish(count):
        if count % 4 == 1:
            runner.publisher.publish("acme", "follow-same", adapter.spec, rows, keep=2)

    answers = run_all(engine, requests, publish)
    for r in requests:
        assert answers[r.id].tokens == world.greedy(
            dataclasses.replace(r, adapter=world.store.latest("acme", "follow-same"))
        )
    assert engine.scheduler.recomputed_tokens > 0


def test_publications_change_no_bit_of_other_tenants_streams(world, publisher):
    def others():
        return [
            ask(f"other{i}", a, 4 + i, 20, tenant="bolt", logprobs=3) for i, a in enumerate([None, world.adapters[0]])
        ]

    def run(between):
        publisher.runner = DeviceThread(world.engine(), base_name=BASE)
        engine = publisher.engine = publisher.runner.engine
        with_resident(engine, world.adapters[0], world.store.get(publisher.newest))
        ran = watch_programs(engine)
        requests = [*others(), publisher.ask("follower", True, max_tokens=40)]
        return run_all(engine, requests, between), ran

    quiet, quiet_ran = run(None)
    stormy, stormy_ran = run(lambda count: publisher.publish() if count < 30 else None)
    assert len(set(stormy["follower"].tokens)) > 5
    for r in others():
        assert stormy_ran[r.id] == quiet_ran[r.id]
        assert stormy[r.id] == quiet[r.id]
    assert isinstance(quiet["other0"], Answer)


def test_a_new_version_is_served_while_storage_hangs(publisher, world):
    """Its bytes are saved behind; the number alone is on disk before."""
    with world.store._disk:  # whoever saves waits for it
        new = publisher.publish(keep=None)
        deltas = _all_deltas(publisher.engine, publisher.ask("asks", False, max_tokens=4))
        assert [d.adapter for d in deltas] == [new] * 4
        assert not world.store._files._folder(new).exists()
    world.store.flush()
    assert world.store._files._folder(new).exists()


class Trained:
    """A started server and a trainer of two tenants in parts beside it."""

    def __init__(self, world):
        self.runner = DeviceThread(world.engine(), base_name=BASE)
        spec = PoolSpec(slots=2, rank=2, dtype="float32", targets=("q_proj",))
        sizes = MicrostepSizes(lanes=1, layers=1, targets=16)
        self.trainer = Trainer(
            world.base, world.mesh, [spec], lanes=2, lane_tokens=16, base_hash=world.base_hash, parts=sizes
        )
        self.published = []
        self.live = LiveTraining(
            self.trainer,
            self.runner.publisher,
            publish_every=1,
            on_step=lambda _reports: None,
            on_publish=lambda ref, _step: self.published.append(ref),
        )

    def add(self, name, steps=10_000):
        tokens = np.random.default_rng(len(name)).integers(4, 300, 8).astype(np.int32)
        spec, numbers = (
            LoraSpec(rank=2, alpha=4.0, targets=("q_proj",)),
            Optimizer(lr=0.01, total_steps=steps, warmup_steps=0),
        )
        self.trainer.add(name, spec, numbers, [Example(tokens, np.float32([0] + [1] * 7))], batch_size=1, seed=1)


def test_serving_publishing_and_following_beside_training_compile_nothing(world):
    it = Trained(world)
    it.runner.start()
    it.runner.call(it.trainer.warm_up)
    it.runner.call(lambda: it.add("live-a"))
    it.runner.call(it.live.step)
    it.runner.call(lambda: it.add("live-b"))
    with CompileCounter() as counter:
        it.runner.call(lambda: setattr(it.runner, "trainer", it.live))
        for i in itertools.count():
            if i >= 6 and len(it.published) > 3:  # how much is trained meanwhile is a matter of time
                break
            ref = it.runner.resolve(None, "live-a")
            requests = [ask(f"pinned{i}", ref, 5, 12), dataclasses.replace(ask(f"follows{i}", ref, 5, 12), follow=True)]
            it.runner.complete([*requests, ask(f"other{i}", world.adapters[i % 5], 20, 4, temperature=0.5, seed=i)])
        it.runner.call(lambda: it.trainer.remove("live-b"))
        it.runner.complete([ask("last", None, 3, 3)])
    assert (counter.compiles, counter.traces) == (0, 0)
    assert it.runner.publisher.freshness.total >= 1
    it.runner.stop()


@pytest.mark.fault("N8")
def test_sampling_any_version_changes_no_byte_of_the_training_state(world):
    it = Trained(world)
    it.add("state-a")
    for _ in range(3):
        it.live.step()
    before = host(it.trainer.states)
    refs = [it.runner.resolve(None, "state-a"), it.published[0], None]
    _all_deltas(it.runner.engine, *[ask(f"s{i}", ref, 5, 12) for i, ref in enumerate(refs)])
    assert_same_bits(host(it.trainer.states), before)
