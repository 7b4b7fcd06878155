"""What an operator changes on a running server takes effect with the next steps, compiles nothing, changes no answer."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from serve_world import BASE, CONFIG, SLOTS, Answer, ask, check_idle, step

from jaxlora.config.serving import TenantWeight, Tuning
from jaxlora.core.errors import InvalidRequest
from jaxlora.core.lora import AdapterRef
from jaxlora.model.compile_cache import CompileCounter
from serve.engine.engine import Engine
from serve.runtime.device_thread import DeviceThread
from serve.runtime.reload import retuned_by_hangup

pytest_plugins = ["serve_fixtures"]
EXAMPLE = Path(__file__).parents[2] / "configs/serve_smollm2.toml"
AT_ONCE, NEVER = 1e-6, 1e9  # quanta in ms: an adapter leaves at the next step; it stays as long as it has work
LONG = 40  # tokens of an answer that outlasts the changes


@pytest.fixture(scope="module")
def rows(world):
    """Of each adapter, as a trainer holds them."""
    return [world.device_rows(a) for a in world.adapters]


@pytest.fixture
def tuned(world, rows):
    """A runner that is stepped by hand: nothing compiles from here on, and nobody is left over."""
    runner = DeviceThread(world.engine(), base_name=BASE)
    runner.engine.warm_up()
    runner.publisher.rehearse(rows[0])
    with CompileCounter() as counter:
        yield runner
    assert not counter.retraced, counter
    runner.tune(Tuning(quantum_ms=NEVER))  # without pins
    check_idle(runner.engine)


class Traffic:
    """Requests that came and the answers so far."""

    def __init__(self, world, engine: Engine):
        self.world, self.engine = world, engine
        self.asked, self.answers = [], defaultdict(Answer)

    def come(self, adapters, max_tokens: int = LONG, prompt: int = 5, tenant: str = "acme") -> None:
        for adapter in adapters:
            self.asked.append(ask(f"t{len(self.asked)}", adapter, prompt, max_tokens, tenant))
            self.engine.submit(self.asked[-1])

    def steps(self, count: int) -> None:
        for _ in range(count):
            step(self.engine, self.answers)

    def finish(self) -> None:
        """All answers are those of an undisturbed model."""
        while self.engine.has_work:
            step(self.engine, self.answers)
        for request in self.asked:
            assert self.answers[request.id].tokens == self.world.greedy(request), request.id


@pytest.fixture
def traffic(world, tuned):
    it = Traffic(world, tuned.engine)
    yield it
    it.finish()


def test_the_quantum_changes_under_traffic(world, tuned, traffic):
    active = tuned.engine.scheduler.active
    tuned.tune(Tuning(quantum_ms=NEVER))
    traffic.come(world.adapters)  # five for three slots
    traffic.steps(12)
    assert active.swaps == 0
    tuned.tune(Tuning(quantum_ms=AT_ONCE))
    traffic.steps(6)
    swaps = active.swaps
    assert swaps >= 4
    tuned.tune(Tuning(quantum_ms=NEVER))
    traffic.steps(6)
    assert active.swaps == swaps


def test_fewer_slots_and_more_of_them_take_effect_with_the_next_step(world, tuned, traffic):
    """An adapter past its quantum or not: a lower number is a decision, not a turn."""
    active = tuned.engine.scheduler.active
    tuned.tune(Tuning(quantum_ms=NEVER))
    traffic.come(world.adapters)
    traffic.steps(4)
    assert len(active.entered) == SLOTS
    for count in (1, 2, SLOTS, 1):
        tuned.tune(Tuning(quantum_ms=NEVER, active_slots=count))
        traffic.steps(1 if count == 1 else 4)  # one that enters must be read first
        assert len(active.entered) == count
    tuned.tune(Tuning(quantum_ms=NEVER))
    traffic.steps(4)
    assert len(active.entered) == SLOTS


@pytest.mark.parametrize("lanes", [1, 3, None])
def test_so_many_prompt_chunks_join_a_step_in_which_others_decode(world, tuned, traffic, lanes):
    engine = tuned.engine
    traffic.come([world.adapters[0]])
    traffic.steps(5)
    assert engine.decoded_tokens > 0
    tuned.tune(Tuning(quantum_ms=NEVER, prefill_lanes_while_decoding=lanes))
    traffic.come([world.adapters[0]] * 3, prompt=23)
    before = engine.prefilled_tokens
    traffic.steps(1)
    chunks = min(lanes or CONFIG.prefill_lanes, 8)
    assert engine.prefilled_tokens - before == CONFIG.prefill_tokens * chunks - (2 if chunks == 8 else 0)


def test_a_heavier_tenant_gets_more_slots_and_more_tokens(world, tuned, traffic):
    """Both the slots of its adapters and the rows of its requests go by the new weights."""
    engine, others = tuned.engine, [twin(world, i) for i in range(3)]
    tuned.tune(Tuning(quantum_ms=AT_ONCE))
    slots = Counter()

    def count_slots(steps: int) -> Counter:
        slots.clear()
        for _ in range(steps):
            traffic.steps(1)
            slots.update(ref.tenant for ref in engine.scheduler.active.entered)
        return slots

    traffic.come([a for pair in zip(world.adapters[:3], others, strict=True) for a in pair])
    traffic.steps(3)
    assert count_slots(8)["acme"] == 2 * slots["zoo"]  # of equals the first in the alphabet has the odd one
    tuned.tune(Tuning(quantum_ms=AT_ONCE, tenant=(TenantWeight(name="zoo", weight=3.0),)))
    traffic.steps(3)
    assert count_slots(8)["zoo"] == 2 * slots["acme"]
    shares = engine.scheduler.shares
    served = shares.served("zoo")
    shares.add("zoo", 3, 0)
    assert shares.served("zoo") == served + 1
    tuned.tune(Tuning(quantum_ms=NEVER))
    shares.add("zoo", 3, 0)
    assert shares.served("zoo") == served + 4


def twin(world, number: int):
    """An adapter of another tenant."""
    ref = world.store.latest("zoo", f"twin{number}") or world.store.mint("zoo", f"twin{number}")
    return world.add(f"of-zoo{number}", seed=number + 50, ref=ref)


def test_a_pinned_adapter_never_leaves_and_takes_its_turns_again_afterwards(world, tuned, traffic):
    active, (first, *_) = tuned.engine.scheduler.active, [a.ref for a in world.adapters]
    traffic.come(world.adapters)
    traffic.steps(3)
    assert first in active.entered
    tuned.tune(Tuning(quantum_ms=AT_ONCE, pin=(first.name,)))
    swaps = active.swaps
    for _ in range(12):
        traffic.steps(1)
        assert first in active.entered
    assert active.swaps > swaps + 4
    tuned.tune(Tuning(quantum_ms=AT_ONCE))
    left = 0
    for _ in range(6):
        traffic.steps(1)
        left += first not in active.entered
    assert left


def test_a_pin_goes_on_to_a_version_that_is_published(world, rows, tuned, traffic):
    """The old one keeps its slot only for its turns, and answers with its own weights to the end."""
    active, source = tuned.engine.scheduler.active, world.adapters[2]
    old = publish(tuned, source, rows[2])
    tuned.tune(Tuning(quantum_ms=AT_ONCE, pin=("pinned",)))
    traffic.come([old, *world.adapters])
    traffic.steps(6)
    assert old in active.entered
    new = publish(tuned, world.adapters[0], rows[0])
    assert (new.name, new.version) == (old.name, old.version + 1)
    traffic.steps(4)
    for _ in range(8):
        traffic.steps(1)
        assert new in active.entered  # with nothing to do
    assert active.pinned == {new}
    traffic.come([new], max_tokens=5)


def publish(runner: DeviceThread, adapter, rows) -> AdapterRef:
    return runner.publisher.publish("acme", "pinned", adapter.spec, rows)


def test_a_pin_without_work_is_on_the_device_after_a_few_steps_of_others(world, tuned, traffic):
    tuned.tune(Tuning(quantum_ms=NEVER, pin=("bot4", "acme/bot3")))
    traffic.come([world.adapters[0]])
    traffic.steps(6)
    assert {tuned.engine.slots.find(a.ref) is not None for a in world.adapters[3:]} == {True}


def test_a_pinned_adapter_that_cannot_be_read_is_pinned_no_more(world, tuned, traffic, caplog):
    foreign = world.add("foreign", seed=3, base_hash="another")
    tuned.tune(Tuning(quantum_ms=NEVER, pin=("foreign", "bot0")))
    traffic.come([world.adapters[1]])
    traffic.steps(8)
    assert tuned.engine.scheduler.active.pinned == {world.adapters[0].ref}
    assert caplog.text.count("adapter foreign cannot be read, and is pinned no more: adapter foreign was made for") == 1
    world.store.delete("acme", foreign.ref.name)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"active_slots": SLOTS + 1}, "active_slots must be in [1, 3], got 4"),
        ({"prefill_lanes_while_decoding": 9}, "prefill_lanes_while_decoding must be in [1, 8], got 9"),
        ({"pin": ("bot0", "bot1", "bot2")}, "pin takes at most 2 adapters of 3 active slots, got 3"),
        ({"pin": ("bot0", "bot1"), "active_slots": 2}, "pin takes at most 1 adapters of 2 active slots, got 2"),
        ({"pin": ("nobody",)}, "pin: The model `nobody` does not exist."),
        ({"pin": (BASE,)}, "pin: owner/tiny is the base model, which needs no slot; leave it out"),
    ],
)
def test_what_the_server_does_not_have_is_refused_by_name_and_changes_nothing(world, tuned, wrong, message):
    good = Tuning(
        quantum_ms=5.0,
        active_slots=2,
        prefill_lanes_while_decoding=3,
        pin=("bot1",),
        tenant=(TenantWeight(name="zoo", weight=2.0),),
    )
    tuned.tune(good)
    before = state(tuned.engine)
    assert before == (0.005, 2, 3, {world.adapters[1].ref}, {"zoo": 2.0}, {"zoo": 2.0})
    with pytest.raises(InvalidRequest) as caught:
        tuned.tune(replace(Tuning(quantum_ms=7.0), **wrong))
    assert caught.value.message == message
    assert state(tuned.engine) == before
    tuned.tune(Tuning(quantum_ms=7.0))
    assert state(tuned.engine) == (0.007, SLOTS, CONFIG.prefill_lanes, set(), {}, {})


def state(engine: Engine) -> tuple:
    scheduler, active = engine.scheduler, engine.scheduler.active
    pinned, weights = set(active.pinned), (dict(scheduler.shares.weights), dict(active.weights))
    return active.quantum_s, active.limit, scheduler.prefill_lanes, pinned, *weights


def test_a_storm_of_changes_compiles_nothing_and_changes_no_answer(world, tuned, traffic):
    rng = np.random.default_rng(0)
    for _ in range(60):
        limit = int(rng.integers(1, SLOTS + 1))
        pins = rng.permutation(5)[: rng.integers(limit)].tolist()
        weights = tuple(TenantWeight(name=t, weight=float(rng.uniform(0.1, 9))) for t in ("acme", "zoo"))
        tuned.tune(
            Tuning(
                quantum_ms=float(rng.choice([AT_ONCE, 1.0, NEVER])),
                active_slots=limit,
                prefill_lanes_while_decoding=int(rng.integers(1, 9)),
                pin=tuple(f"bot{i}" for i in pins),
                tenant=weights,
            )
        )
        if len(traffic.engine._sequences) < 12:
            picks = [[*world.adapters, None][i] for i in rng.integers(0, 6, 4)]
            traffic.come(picks, int(rng.integers(1, 30)), int(rng.integers(1, 30)), "acme")
        traffic.steps(int(rng.integers(1, 6)))
    tuned.tune(Tuning(quantum_ms=AT_ONCE))


# --- by a signal


def settings(file: Path, tuning: str, **changes: str) -> None:
    """The example's settings with these lines under [tuning], written whole: the server may read at any time."""
    text = EXAMPLE.read_text().replace("quantum_ms = 200 ", tuning + "\n#")
    for key, value in changes.items():
        text = text.replace(f"\n{key} = ", f"\n{key} = {value} #")
    file.with_suffix(".new").write_text(text)
    os.replace(file.with_suffix(".new"), file)


def hang_up(until) -> None:
    signal.raise_signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_hangup_has_the_file_read_again_and_an_error_changes_nothing(world, runner, tmp_path, caplog, capfd):
    file, engine = tmp_path / "serve.toml", runner.engine
    shutil.copy(EXAMPLE, file)
    before = signal.getsignal(signal.SIGHUP)
    with retuned_by_hangup(runner, file):
        settings(file, 'quantum_ms = 7\nactive_slots = 2\npin = ["bot1"]')
        hang_up(lambda: runner.call(lambda: state(engine))[:2] == (0.007, 2))
        assert engine.scheduler.active.pinned == {world.adapters[1].ref}
        for wrong, said in (
            ("quantum_ms = -1", "not tuned"),
            ('quantum_ms = 8\npin = ["nobody"]', "pin: The model `nobody` does not exist"),
            ("quantum_ms = 8\nactive_slots = 5", "active_slots must be in [1, 3], got 5"),
        ):
            settings(file, wrong)
            hang_up(lambda said=said: said in caplog.text)
            assert runner.call(lambda: state(engine))[:2] == (0.007, 2)
        settings(file, "quantum_ms = 9", rows="4", port="8001")
        hang_up(lambda: "port, rows changed; start the server again for that" in caplog.text)
        assert runner.call(lambda: state(engine)) == (0.009, SLOTS, CONFIG.prefill_lanes, set(), {}, {})
    assert capfd.readouterr().out.count(f"tuned by {file}\n") == 2
    assert signal.getsignal(signal.SIGHUP) == before
