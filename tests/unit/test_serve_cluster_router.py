"""The router of a cluster: few adapters move, hot ones spread, the overloaded are passed over; and its simulation."""

from __future__ import annotations

import csv
import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import cluster
from jaxlora.config.cluster import RouterSection
from jaxlora.core.errors import ConfigInvalid, Unavailable
from serve.cluster.rendezvous import draw, smallest, stable_hash
from serve.cluster.replica_view import AdapterKey, Ask, Report, Sent
from serve.cluster.router import Router

CONFIG = RouterSection(copy_tokens=100, margin_tokens=10, spill_tokens=50, rise_s=1, fall_s=10)
ROWS, SLOTS = 4, 3
NAMES = tuple("abcdefgh")


def says(
    asked_s: float = 0.0,
    *,
    running: int = 0,
    tokens: int = 0,
    waiting: int = 0,
    adapters: Mapping[AdapterKey, int] | None = None,
) -> Report:
    return Report(
        asked_s=asked_s,
        slots=SLOTS,
        rows=ROWS,
        running_rows=running,
        running_tokens=tokens,
        waiting_tokens=waiting,
        adapters=adapters or {},
    )


def router_of(
    names: Iterable[str], weights: Mapping[str, float] | None = None, config: RouterSection = CONFIG
) -> Router:
    router = Router(config)
    for name in names:
        router.join(name, (weights or {}).get(name, 1.0), says(), 0.0)
    return router


def ask(adapter: str | None = "bot", tokens: int = 20, beginning: str = "", tenant: str = "acme") -> Ask:
    return Ask(tenant=tenant, adapter=adapter, tokens=tokens, beginning=beginning)


def home(names: Iterable[str], adapter: str, weights: Mapping[str, float] | None = None) -> str:
    """Where an adapter's requests go while nobody is busy."""
    return router_of(names, weights).send(ask(adapter), 0.0).replica


def order(names: Iterable[str], adapter: str) -> list[str]:
    """An adapter's order: its home, its home without that one, and so on."""
    left, found = list(names), []
    while left:
        found.append(home(left, adapter))
        left.remove(found[-1])
    return found


# ---- who comes first


def drawn_by_hand(key: int, node: int, weight: float) -> float:
    mixed = (key ^ node) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 32) * 0x94D049BB133111EB % 2**64
    return -math.log((mixed | 1) / 2**64) / weight


WORDS = st.integers(0, 2**64 - 1)


@given(WORDS, st.lists(st.tuples(WORDS, st.floats(0.1, 10)), min_size=1, max_size=20, unique_by=lambda n: n[0]))
def test_numbers_are_drawn_as_by_hand(key, nodes):
    hashes = np.array([node for node, _ in nodes], np.uint64)
    weights = np.array([weight for _, weight in nodes])
    expected = [drawn_by_hand(key, node, weight) for node, weight in nodes]
    found = draw(key, hashes, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-12)  # logarithms of two libraries
    for count in (1, 3, len(nodes), len(nodes) + 1):
        assert sorted(found)[:count] == found[smallest(found, count)].tolist()


def test_hashes_are_those_of_every_process_and_tell_parts_apart():
    assert stable_hash("acme", "bot") == int(hashlib.blake2b(b"acme\0bot", digest_size=8).hexdigest(), 16)
    assert stable_hash("ab", "c") != stable_hash("a", "bc")
    assert stable_hash("acme", "\ud800")  # JSON lets one in


@given(st.sets(st.sampled_from(NAMES), min_size=2), st.data())
def test_a_replica_that_leaves_moves_only_what_it_had(names, data):
    gone = data.draw(st.sampled_from(sorted(names)))
    for adapter in map(str, range(20)):
        before, after = home(names, adapter), home(names - {gone}, adapter)
        assert after == before or before == gone


def test_the_rest_of_the_order_stays_when_one_fails():
    router = router_of(NAMES)
    for adapter in map(str, range(30)):
        first, second = order(NAMES, adapter)[:2]
        sent = router.send(ask(adapter), 0.0)
        assert sent.replica == first
        router.leave(first, 0.0)
        assert router.send(ask(adapter), 0.0).replica == second
        router = router_of(NAMES)


def test_weights_are_respected():
    """Of 2,000 adapters a replica of weight 3 beside 1 gets 1,500; four deviations are 78."""
    router = router_of("ab", {"a": 3.0})
    counts: Counter[str] = Counter()
    for adapter in map(str, range(2000)):
        sent = router.send(ask(adapter), 0.0)
        counts[sent.replica] += 1
        router.end(sent, 0.0)
    assert abs(counts["a"] - 1500) < 78


# ---- the least loaded of its own, and prefixes


def test_the_base_goes_to_the_least_loaded_and_a_prefix_to_its_replica_within_the_margin():
    router = router_of(NAMES)
    prefix = ask(None, tokens=0, beginning="You are a pirate.")
    first = router.send(prefix, 0.0).replica
    assert {router.send(prefix, 0.0).replica for _ in range(9)} == {first}
    others = {router.send(ask(None, 0, "You are a pirate.", f"t{i}"), 0.0).replica for i in range(40)}
    assert len(others) > 4  # no tenant's place tells another what it asked
    router.report(first, says(0.0, running=1, tokens=10 * ROWS), 0.0)
    assert router.send(prefix, 0.0).replica == first
    router.report(first, says(0.0, running=1, tokens=10 * ROWS + 1), 0.0)
    assert router.send(prefix, 0.0).replica != first
    for name in NAMES[1:]:
        router.report(name, says(0.0, running=1, tokens=100 * ROWS), 0.0)
    assert router.send(prefix, 0.0).replica == "a"


def test_only_the_beginning_of_a_prompt_counts():
    begins = "x" * CONFIG.prefix_chars
    assert len({router_of(NAMES).send(ask(None, beginning=begins + str(i)), 0.0).replica for i in range(20)}) == 1
    assert len({router_of(NAMES).send(ask(None, beginning=begins[1:] + str(i)), 0.0).replica for i in range(20)}) > 1


def test_what_was_sent_since_the_report_counts_until_it_ends_or_is_reported():
    router = router_of("ab")
    first = router.send(ask(None, 100), 1.0)
    assert router.send(ask(None, 1), 1.0).replica != first.replica
    router.report(first.replica, says(0.5), 1.1)  # it was asked before
    assert router.send(ask(None, 1), 1.2).replica != first.replica
    router.report(first.replica, says(1.5, running=1, tokens=4), 1.6)
    sent = [router.send(ask(None, 100), 1.7).replica for _ in range(2)]
    assert sorted(sent) == ["a", "b"]
    router.end(first, 1.8)  # is in no report any more: nothing to take off
    router.report(first.replica, says(1.4, waiting=10**6), 1.9)  # older than what is known
    assert Counter(router.send(ask(None, 100), 2.0).replica for _ in range(10)) == {"a": 5, "b": 5}


# ---- copies


class Load:
    """One adapter's requests under way; replicas report twice a second, and keep it where it once was."""

    def __init__(self, router: Router):
        self.router, self.now_s = router, 0.0
        self.open: list[Sent] = []
        self.held: set[str] = set()

    def hold(self, requests: int, seconds: float) -> list[int]:
        """Keeps so many under way, each for two seconds; returns by how many replicas they are served, each second."""
        served = []
        for _ in range(round(seconds)):
            for _ in range(2):
                self.now_s += 0.5
                for sent in [s for s in self.open if self.now_s - s.at_s >= 2]:
                    self.open.remove(sent)
                    self.router.end(sent, self.now_s)
                for name in NAMES:
                    here = [s for s in self.open if s.replica == name]
                    tokens = sum(s.ask.tokens for s in here)
                    adapters = {("acme", "bot"): tokens} if name in self.held else {}
                    running = min(len(here), ROWS)
                    self.router.report(
                        name, says(self.now_s, running=running, tokens=tokens, adapters=adapters), self.now_s
                    )
                while len(self.open) < requests:
                    self.open.append(self.router.send(ask(tokens=100), self.now_s))
                    self.held.add(self.open[-1].replica)
            served.append(len({s.replica for s in self.open}))
        return served


CALM = RouterSection(copy_tokens=100, margin_tokens=10, spill_tokens=10**9, rise_s=1, fall_s=10)


def test_a_hot_adapter_spreads_at_once_and_comes_back_slowly():
    """A copy is for 100 tokens a row of four: for four requests.  Eleven are worth three."""
    load = Load(router_of(NAMES, config=CALM))
    assert load.hold(1, 5) == [1] * 5
    assert load.hold(11, 20)[6:] == [3] * 14
    assert {s.replica for s in load.open} == set(order(NAMES, "bot")[:3])
    back = load.hold(2, 60)
    assert back[8] > 1
    assert back[-20:] == [1] * 20
    assert {s.replica for s in load.open} == {order(NAMES, "bot")[0]}


def test_a_copy_stays_while_most_of_its_load_does():
    """Five requests are worth two copies, three only one; but a copy goes when less than 0.7 of the other's is left."""
    load = Load(router_of(NAMES, config=CALM))
    assert load.hold(3, 20)[-1] == 1
    assert load.hold(5, 20)[-1] == 2
    assert load.hold(3, 60)[-1] == 2
    assert load.hold(2, 60)[-1] == 1


def test_adapters_without_a_load_are_forgotten():
    router = router_of(NAMES)
    for i in range(5000):
        router.end(router.send(ask(f"a{i}"), float(i)), float(i) + 0.5)
    assert len(router._demand) < 2500


# ---- who holds it already


def test_nobody_loads_what_another_holds_and_has_room_for():
    first, second, third, *_ = order(NAMES, "bot")
    router = router_of(NAMES)
    held = {("acme", "bot"): 0}
    router.report(third, says(0.0, running=ROWS - 1, tokens=40 * ROWS, adapters=held), 0.0)
    sent = router.send(ask(), 0.0)
    assert sent.replica == third
    assert router.send(ask(), 0.0).replica == first  # its last row is taken
    router.end(sent, 0.0)
    router.leave(first, 0.0)  # and what it was loading
    assert router.send(ask(), 0.0).replica == third
    router.report(third, says(1.0, running=ROWS - 1, waiting=1, adapters=held), 1.0)  # somebody waits for a slot
    assert router.send(ask(), 1.0).replica == third
    router.report(third, says(2.0, running=ROWS, adapters=held), 2.0)
    assert router.send(ask(), 2.0).replica == second


def test_the_router_knows_what_it_has_sent_for_loading():
    """Between two reports a second request follows the first, though no report says yet that the adapter lies there."""
    router = router_of(NAMES)
    for i in range(20):
        sent = router.send(ask(f"a{i}"), 1.0)
        router.join("late", 100.0, says(), 1.0)  # is now the first of nearly all
        again = router.send(ask(f"a{i}"), 1.0)
        assert again.replica == sent.replica
        router.end(sent, 1.0)
        router.end(again, 1.0)
        router.leave("late", 1.0)


def test_an_adapter_that_has_left_its_slot_is_not_held():
    router = router_of(NAMES)
    first, second, *_ = order(NAMES, "bot")
    router.report(second, says(1.0, adapters={("acme", "bot"): 0}), 1.0)
    assert router.send(ask(), 1.0).replica == second
    router.report(second, says(2.0), 2.0)
    assert router.send(ask(), 2.0).replica == first


def test_names_of_tenants_are_apart():
    router = router_of(NAMES)
    first, second, *_ = order(NAMES, "bot")
    router.report(second, says(1.0, adapters={("other", "bot"): 0}), 1.0)
    assert router.send(ask(), 1.0).replica == first


# ---- overload


def test_an_adapter_spills_to_another_holder_else_to_the_next_that_is_not_overloaded():
    first, second, third, fourth, *_ = order(NAMES, "bot")
    router = router_of(NAMES)
    over = says(1.0, running=ROWS, waiting=50 * ROWS + 1)
    router.report(first, says(1.0, running=ROWS, waiting=50 * ROWS), 1.0)
    assert router.send(ask(tokens=0), 1.0).replica == first
    router.report(first, over, 1.0)
    assert router.send(ask(tokens=0), 1.0).replica == second
    router = router_of(NAMES)
    router.report(first, over, 1.0)
    router.report(second, over, 1.0)
    router.report(fourth, says(1.0, running=ROWS, waiting=1, adapters={("acme", "bot"): 0}), 1.0)
    assert router.send(ask(tokens=0), 1.0).replica == fourth
    router.leave(fourth, 1.0)
    assert router.send(ask(tokens=0), 1.0).replica == third


def test_where_all_are_overloaded_an_adapter_stays():
    first, second, *_ = order(NAMES, "bot")
    router = router_of(NAMES)
    for name in NAMES:
        router.report(name, says(1.0, running=ROWS, waiting=1000 + 1000 * (name == first)), 1.0)
    assert router.send(ask(), 1.0).replica == first
    router.report(second, says(2.0, running=ROWS, waiting=1000, adapters={("acme", "bot"): 0}), 2.0)
    assert router.send(ask(), 2.0).replica == first  # the holder is no better off


def test_in_a_crowd_a_copy_stays_where_it_is_unless_another_place_is_much_better():
    """Worth two copies by now, one of which nobody has loaded; all rows are taken everywhere."""
    for better, moves in ((49, False), (51, True)):
        first, second, *_ = order(NAMES, "bot")
        router = router_of(NAMES)
        held = {("acme", "bot"): 150 * ROWS}
        router.report(first, says(0.0, running=ROWS, waiting=150 * ROWS, adapters=held), 0.0)
        for name in NAMES:
            waiting = {first: 150, second: 150 - better}.get(name, 200) * ROWS
            adapters = held if name == first else {}
            router.report(name, says(20.0, running=ROWS, waiting=waiting, adapters=adapters), 20.0)
        assert router.send(ask(), 20.0).replica == (second if moves else first)


def test_ties_are_broken_by_name():
    for names in (NAMES, NAMES[::-1]):
        router = router_of(names)
        for name in names:
            router.report(name, says(running=ROWS, waiting=100 * ROWS), 0.0)
        assert router.send(ask(None), 0.0).replica == "a"


def test_a_replica_without_a_free_slot_is_passed_over():
    first, second, *_ = order(NAMES, "bot")
    router = router_of(NAMES)
    busy = {("acme", f"other{i}"): 1 for i in range(SLOTS)}
    router.report(first, says(1.0, adapters=busy), 1.0)
    assert router.send(ask(), 1.0).replica == second
    router = router_of(NAMES)
    router.report(first, says(1.0, adapters={**dict(list(busy.items())[1:]), ("acme", "bot"): 1}), 1.0)
    router.report(second, says(1.0, adapters={("acme", "bot"): 0}), 1.0)
    assert router.send(ask(), 1.0).replica == first  # has a slot for this one
    router.report(first, says(2.0, adapters=dict.fromkeys(busy, 0)), 2.0)  # idle ones make room
    router.report(second, says(2.0), 2.0)
    assert router.send(ask(), 2.0).replica == first


def test_requests_beyond_the_free_rows_wait():
    first, second, *_ = order(NAMES, "bot")
    config = RouterSection(copy_tokens=10**9, margin_tokens=10, spill_tokens=50)
    router = router_of(NAMES, config=config)
    sent = [router.send(ask(tokens=100), 0.0).replica for _ in range(ROWS + 3)]
    assert sent == [first] * (ROWS + 3)  # three wait: 300 tokens over four rows, so the next goes elsewhere
    assert router.send(ask(tokens=100), 0.0).replica == second


def test_what_other_fronts_have_sent_is_taken_to_be_as_much():
    """Of two fronts' eight requests four wait: 400 tokens over four rows."""
    first, second, *_ = order(NAMES, "bot")
    config = RouterSection(copy_tokens=10**9, margin_tokens=10, spill_tokens=99, fronts=2)
    router = router_of(NAMES, config=config)
    sent = [router.send(ask(tokens=100), 0.0).replica for _ in range(ROWS + 1)]
    assert sent == [first] * ROWS + [second]
    router = router_of(NAMES, config=config)
    router.report(second, says(1.0, adapters={("acme", "bot"): 0}), 1.0)
    assert [router.send(ask(), 1.0).replica for _ in range(3)] == [second, second, first]


# ---- replicas come and go


@given(st.sets(st.sampled_from(NAMES), min_size=2), st.data())
def test_a_draining_replica_gets_nothing_while_there_are_others(names, data):
    router = router_of(names)
    draining = data.draw(st.permutations(sorted(names)))
    for i, name in enumerate(draining):
        router.report(name, says(0.0, adapters={("acme", "held"): 0}), 0.0)
        router.drain(name)
        left = set(draining[i + 1 :])
        for adapter in ("held", *map(str, range(10)), None):
            assert router.send(ask(adapter), 1.0).replica in (left or names)


def test_those_that_were_tried_are_not_chosen_again():
    names = [f"replica-{i}" for i in range(20)]
    router = router_of(names)
    tried: list[str] = []
    for _ in names:
        tried.append(router.send(ask(), 0.0, tried).replica)
    assert tried == order(names, "bot")
    for adapter in ("bot", None):
        with pytest.raises(Unavailable):
            router.send(ask(adapter), 0.0, tried)
        with pytest.raises(Unavailable):
            Router(CONFIG).send(ask(adapter), 0.0)


def test_one_that_left_is_forgotten_until_it_joins_again():
    router = router_of("ab")
    first, second = order("ab", "bot")
    sent = router.send(ask(), 0.0)
    router.leave(first, 1.0)
    router.report(first, says(2.0, adapters={("acme", "bot"): 0}), 2.0)
    router.drain(first)
    router.end(sent, 2.0)
    assert router.send(ask(), 2.0).replica == second
    router.leave(second, 3.0)
    router.join(second, 1.0, says(3.0), 3.0)
    router.join(first, 1.0, says(3.0), 3.0)
    assert router.send(ask(), 3.0).replica == first


def test_the_last_one_may_leave():
    router = router_of("a")
    router.send(ask(), 0.0)
    router.leave("a", 5.0)
    with pytest.raises(Unavailable):
        router.send(ask(), 6.0)
    router.join("a", 1.0, says(7.0), 7.0)
    assert router.send(ask(), 7.0).replica == "a"


ACTIONS = st.lists(st.tuples(st.sampled_from(["send", "send", "send", "end", "report", "leave", "drain"]), WORDS))


def play(router: Router, actions: list[tuple[str, int]]) -> list[str]:
    """Where the requests went, among reports and replicas that come and go."""
    open_, went, now_s = [], [], 0.0
    for action, number in actions:
        now_s += 0.25
        rng = random.Random(number)
        name, adapter = rng.choice(NAMES), rng.choice(("x", "y", "z", None))
        if action == "send":
            open_.append(router.send(ask(adapter, rng.randrange(200), rng.choice("pq")), now_s))
            went.append(open_[-1].replica)
        elif action == "end" and open_:
            router.end(open_.pop(rng.randrange(len(open_))), now_s)
        elif action == "report":
            adapters = {("acme", a): rng.randrange(2) * 100 for a in rng.sample("xyz", rng.randrange(4))}
            waiting = rng.choice((0, 0, 100, 1000))
            report = says(now_s - 0.5, running=rng.randrange(ROWS + 1), waiting=waiting, adapters=adapters)
            router.report(name, report, now_s)
        elif action == "leave" and name != "a":
            router.leave(name, now_s)
            router.join(name, 1.0 + number % 3, says(now_s), now_s)
        elif action == "drain" and name != "a":
            router.drain(name)
        check(router)
    return went


def check(router: Router) -> None:
    """What is kept for each adapter and in arrays is what the replicas' views say."""
    views = router._replicas.values()
    held = {key: {v for v in views if key in v.adapters} for v in views for key in v.adapters}
    assert router._holders == held
    tokens = {key: sum(v.adapters[key] for v in those) for key, those in held.items()}
    assert {key: d.tokens for key, d in router._demand.items() if d.tokens} == {k: n for k, n in tokens.items() if n}
    assert all(n >= 0 for v in views for n in v.adapters.values())
    for place, view in enumerate(router._placed):
        measured = (router._loads[place], router._waiting[place], router._full[place])
        assert (view.place, *measured) == (place, view.load, view.waiting, view.is_full)


@settings(deadline=None)
@given(ACTIONS)
def test_routers_that_know_the_same_decide_the_same(actions):
    assert play(router_of(NAMES), actions) == play(router_of(reversed(NAMES)), actions)


@pytest.mark.parametrize(
    "name", ["copy_tokens", "margin_tokens", "spill_tokens", "rise_s", "fall_s", "prefix_chars", "fronts"]
)
def test_numbers_that_mean_nothing_are_refused(name):
    with pytest.raises(ConfigInvalid, match=f"{name}.*positive and finite.*0"):
        RouterSection(**{name: 0})


def test_replicas_without_rows_or_weight_are_refused():
    with pytest.raises(ValueError, match="at least 1 row"):
        Report(asked_s=0.0, slots=1, rows=0, running_rows=0, running_tokens=0, waiting_tokens=0, adapters={})
    with pytest.raises(ValueError, match="weight must be positive"):
        Router(CONFIG).join("a", 0.0, says(), 0.0)


# ---- the simulation

SIZES = cluster.Sizes(
    replicas=8, slots=4, rows=4, adapters=200, requests=1500, load=0.6, mean_tokens=40, fronts=2, seed=1
)


@pytest.mark.parametrize("trouble", cluster.Trouble)
def test_every_simulated_request_is_answered_cut_or_under_way(trouble):
    for make in cluster.ROUTINGS.values():
        jobs = list(cluster.by_zipf(SIZES, 1.0))
        world = cluster.World(SIZES, make)
        result = world.run(jobs, trouble)
        counted = sum(job.counted for job in jobs)
        assert len(result.waits_s) == counted
        assert 0 <= result.arrivals - counted <= result.rerouted
        assert result.failed == (trouble is cluster.Trouble.FAILURES)
        assert (result.restarted > 0) == (trouble is cluster.Trouble.ROLLOUT)
        assert all(len(m.slots) <= SIZES.slots and len(m.running) <= SIZES.rows for m in world.machines.values())


def test_the_router_loads_less_and_less_twice_than_round_robin():
    def run(routing: str) -> cluster.Result:
        return cluster.World(SIZES, cluster.ROUTINGS[routing]).run(
            list(cluster.by_zipf(SIZES, 1.0)), cluster.Trouble.NONE
        )

    ours, theirs = run("router"), run("round robin")
    assert ours.hits > 1.5 * theirs.hits
    assert ours.loads < 0.75 * theirs.loads
    assert np.mean(ours.twice) < 0.6 * np.mean(theirs.twice)


def test_few_slots_and_a_hot_adapter_keep_their_bounds(capsys):
    assert cluster.main(["--parts", "small", "hot"]) == 0
    assert capsys.readouterr().out.count("| 64 over 3 x 4 slots |") == 4


def test_a_trace_is_replayed(tmp_path, capsys):
    file = tmp_path / "busy.csv"
    with file.open("w", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(["tenant", "adapter", "time", "tokens"])
        rows.writerows(["acme", f"a{i % 5}", i / 10, 20] for i in range(300))
    assert cluster.main(["--parts", "cluster", "--replicas", "3", "--slots", "2", "--trace", str(file)]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in table if len(row) > 1] == [["| busy.csv", name] for name in cluster.ROUTINGS]
