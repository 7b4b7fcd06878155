"""The harness that compares us with others: what it measures of processes, how rounds go, and what its tables say."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers.cases import CASES, PROMPT_TOKENS, TEAM, Sample, Serving, Training, Work, shortened
from benchmarks.peers.environments import Unavailable, run
from benchmarks.peers.measure import prepare, rounds, team_rounds
from benchmarks.peers.processes import Tree, machine_cpu_s, wait_quiet, wait_ready
from benchmarks.peers.processes import running as started
from benchmarks.peers.report import Run, agreement, others_told, paired_ratios
from benchmarks.peers.servers import Asked, Jaxlora, LlamaCpp
from benchmarks.peers.workers import Peft, Worker
from benchmarks.peers.world import World
from serve.bench.client import Server

pytest_plugins = ["wire_fixtures"]
WORLD = World(Path("nowhere"), vocab=5000)
BASE, ADAPTERS, TRAIN = (next(c for c in CASES if c.name == name) for name in ("base-8", "8-over-8", "train-alone"))

# ---- processes

SPINNING_CHILD = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.3: pass"])
print("spun", flush=True)
sys.stdin.read()
"""
MIB = 2**20


def test_cpu_time_counts_children_that_have_ended():
    with subprocess.Popen([sys.executable, "-c", SPINNING_CHILD], stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"spun\n"
        assert Tree(process.pid).cpu_s() >= 0.3
        assert Tree(process.pid).cpu_s() < machine_cpu_s()


def test_memory_counts_children_and_a_peak_can_be_reset():
    child = "import sys\nb'x' * 64_000_000\nprint('held', flush=True)\nsys.stdin.read()"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as process:
        assert process.stdout.readline() == b"held\n"
        tree = Tree(process.pid)
        assert len(tree.pids()) == 2
        peak = tree.memory().peak
        tree.reset_peak()
        after = tree.memory()
        process.stdin.close()
    assert peak - after.peak > 50 * MIB
    assert 0 < after.private < after.peak
    assert after.shared > 0


def test_a_server_that_ends_is_unavailable_with_its_last_words(tmp_path):
    with (
        started([sys.executable, "-c", "raise SystemExit('no such flag')"], tmp_path / "log") as process,
        pytest.raises(Unavailable, match="no such flag"),
    ):
        wait_ready(process, "http://127.0.0.1:1/", tmp_path / "log")


def test_nobody_below_a_process_is_left_behind(tmp_path):
    code = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    with started([sys.executable, "-c", code], tmp_path / "log") as process:
        while len(pids := Tree(process.pid).pids()) < 2:
            time.sleep(0.01)
    until = time.monotonic() + 5
    while Path(f"/proc/{pids[1]}/cmdline").exists() and Path(f"/proc/{pids[1]}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_command_that_fails_is_unavailable_with_its_last_words(tmp_path):
    with pytest.raises(Unavailable, match="no wheel for this machine"):
        run(sys.executable, "-c", "raise SystemExit('no wheel for this machine')", cwd=tmp_path)
    with pytest.raises(Unavailable, match="no-such-program"):
        run("no-such-program", cwd=tmp_path)


def test_a_command_without_end_ends_with_its_children(tmp_path):
    child = "import time\nopen('child', 'w').close()\ntime.sleep(0.7)\nopen('late', 'w').close()"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(Unavailable, match=r"no end after 0\.5 s"):
        run(sys.executable, "-c", code, cwd=tmp_path, limit_s=0.5)
    time.sleep(0.8)
    assert not (tmp_path / "late").exists()


def test_nobody_waits_longer_for_quiet_than_is_said():
    began_s = time.monotonic()
    wait_quiet(0.0, 0.2)
    assert time.monotonic() - began_s < 3


# ---- what is asked


def test_all_peers_get_the_same_prompts_and_each_round_others():
    first, again, later = (WORLD.prompts(ADAPTERS, n) for n in (1, 1, 2))
    assert first == again
    assert not {tuple(p) for p in first} & {tuple(p) for p in later}
    assert {len(p) for p in first} == {PROMPT_TOKENS}
    assert len({tuple(p) for p in first}) == 8


def test_adapters_take_turns():
    case = Serving(name="x", clients=4, adapters=2, requests=4)
    assert WORLD.asked(case) == ["a00", "a01", "a00", "a01"]
    assert WORLD.asked(BASE) == [None] * 8


def test_a_short_run_asks_for_less():
    assert shortened(BASE, 4).answer == 4
    assert shortened(TRAIN, 1).steps == 1


def test_who_takes_what():
    peft = Peft("peft", "bfloat16", "3.11")
    assert peft.takes(ADAPTERS)
    assert peft.takes(TRAIN)
    assert not peft.takes(Training(name="t", tenants=16, lanes=1))
    assert not LlamaCpp("llama.cpp", "BF16").takes(TRAIN)


@pytest.mark.parametrize("peer", [Jaxlora("jaxlora", "bfloat16"), LlamaCpp("llama.cpp", "BF16")], ids=lambda p: p.name)
def test_a_server_is_asked_for_whole_answers(running, backend, peer, monkeypatch):
    """Over HTTP: as many requests as the case has, greedy, from as many clients."""
    monkeypatch.setattr("benchmarks.peers.world.FIRST_ID", 10)
    tiny = World(Path("nowhere"), vocab=250)
    backend.adapters = {"base": 1}
    done = Asked(Tree(os.getpid()), Server.at(running[1]), peer).work(shortened(BASE, 3), tiny, 1)
    if peer.name == "llama.cpp":  # whose words for an adapter are no words of ours
        assert len(done.failed) == 8
        assert "lora" in done.failed[0]
        return
    assert (done.tokens, len(done.first_s), len(done.between_s), done.failed) == (24, 8, 16, [])
    assert sorted(r.prompt for r in backend.requests) == sorted(map(tuple, tiny.prompts(BASE, 1)))
    assert {(r.params.max_tokens, r.params.temperature, r.params.ignore_eos) for r in backend.requests} == {
        (3, 0, True)
    }


def test_llama_cpp_is_told_for_the_base_too_which_adapters_not_to_apply():
    peer = LlamaCpp("llama.cpp", "BF16")
    assert peer.request(None)["lora"] == [{"id": 0, "scale": 0.0}]
    assert peer.request("a07")["lora"] == [{"id": 7, "scale": 1.0}]


ECHO = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("seed") == 9: sys.exit("lost")
    print(json.dumps({"wall_s": 1.0, "tokens": asked["lanes"] * asked["tokens"]}), flush=True)
"""


def test_a_worker_is_told_a_case_and_its_end_is_said(tmp_path):
    with started([sys.executable, "-c", ECHO], tmp_path / "log", pipes=True) as process:
        worker = Worker(Tree(process.pid), process, tmp_path / "log")
        assert worker.work(TRAIN, WORLD, 1).tokens == 4 * 128
        with pytest.raises(Unavailable, match="lost"):
            worker.work(TRAIN, WORLD, 9)


# ---- rounds


class Fake:
    """A peer that does everything at once, or fails."""

    def __init__(self, name, *, install=None, start=None, fails_in=None, takes=(Serving, Training)):
        self.name, self._install, self._start, self._fails_in, self._takes = name, install, start, fails_in, takes
        self.tree = Tree(os.getpid())
        self.done, self.up = [], 0

    def takes(self, case):
        return isinstance(case, self._takes)

    def prepare(self, cache, world):
        if self._install:
            raise Unavailable(self._install)
        return "1.0"

    @contextlib.contextmanager
    def start(self, size, world, logs):
        if self._start:
            raise Unavailable(self._start)
        self.up += 1
        self.size = size
        yield self
        self.up -= 1

    def work(self, case, world, round):
        self.done.append((case.name, round))
        failed = ["HTTP 503"] if round == self._fails_in else []
        return Work(wall_s=2.0, tokens=10, first_s=[0.1], between_s=[], texts=["x"], failed=failed)


def go(*peers, cases=(BASE, ADAPTERS, TRAIN), count=2):
    prepared = prepare(peers, Path("nowhere"), WORLD, lambda _: None)
    return prepared, list(rounds(prepared, cases, WORLD, Path("nowhere"), count, 0.0, lambda _: None))


def test_every_peer_does_every_case_it_takes_in_every_round():
    all_of_it, server = Fake("a"), Fake("b", takes=(Serving,))
    _, samples = go(all_of_it, server)
    names = ["base-8", "8-over-8", "train-alone"]
    assert all_of_it.done == [(name, round) for round in range(3) for name in names]
    assert [(s.round, s.case) for s in samples if s.peer == "b"] == [(n, c) for n in (1, 2) for c in names[:2]]
    assert {(s.tokens, s.tokens_s, s.first_s[0]) for s in samples} == {(10, 5.0, 0.1)}
    assert (all_of_it.size.adapters, all_of_it.size.rows) == (8, 8)
    assert all_of_it.up == server.up == 0


def test_who_cannot_be_had_is_skipped_with_the_reason():
    prepared, samples = go(Fake("a"), Fake("b", install="no wheel"), Fake("c", start="died"), Fake("d", fails_in=1))
    assert {s.peer for s in samples} == {"a"}
    assert set(prepared.versions) == {"a", "c", "d"}
    assert prepared.skipped == {"b": "no wheel", "c": "died", "d": "1 requests of base-8 failed: HTTP 503"}
    text = Run(about={"cpu": "x"}, versions=prepared.versions, skipped=prepared.skipped, samples=samples).markdown()
    assert "- b: no wheel\n" in text
    assert "- cpu: x\n" in text


def test_an_interruption_ends_the_peers_and_what_they_do():
    class Slow(Fake):
        ended = threading.Event()

        @contextlib.contextmanager
        def start(self, size, world, logs):
            try:
                yield self
            finally:
                self.ended.set()

        def work(self, case, world, round):
            to_main = threading.main_thread().ident, signal.SIGINT
            threading.Timer(0.1, signal.pthread_kill, to_main).start()
            self.ended.wait(30)
            raise Unavailable("the server has gone")

    began_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        go(Slow("a"))
    assert time.monotonic() - began_s < 10


def test_teams_run_at_once_and_are_summed():
    peer = Fake("p")
    (sample,) = team_rounds(peer, TEAM, 3, WORLD, Path("nowhere"), 1, 0.0, lambda _: None)
    assert (sample.peer, sample.tokens, sample.tokens_s) == ("p x 3", 30, 15.0)
    assert (peer.size.adapters, peer.size.rows) == (1, 1)
    assert peer.done == [("teams", 0)] * 3 + [("teams", 1)] * 3


# ---- tables

SAMPLE = Sample(
    peer="jaxlora",
    case="base-8",
    round=1,
    wall_s=1.0,
    cpu_s=1.0,
    client_cpu_s=0.0,
    others_cpu_s=0.0,
    tokens=100,
    tokens_s=100.0,
    tokens_cpu_s=50.0,
    peak_bytes=10**9,
    private_bytes=8 * 10**8,
    shared_bytes=10**8,
    first_s=[0.2],
    between_s=[0.01, 0.03],
    texts=["the same answer", "one answer"],
)
THEIRS = replace(SAMPLE, peer="other", tokens_s=50.0, texts=["the same answer", "two answers"])


def told(samples):
    return Run(about={}, versions={s.peer: "1" for s in samples}, skipped={}, samples=samples)


def test_ratios_are_of_the_same_round():
    samples = [SAMPLE, replace(SAMPLE, round=2, tokens_s=40.0), THEIRS, replace(THEIRS, round=2, tokens_s=80.0)]
    assert paired_ratios(samples, "other", "base-8", lambda s: s.tokens_s) == [2.0, 0.5]
    assert "**1.25** (0.88–1.62)" in told(samples).markdown()


def test_training_is_compared_with_the_trainer_in_bfloat16():
    ours = replace(SAMPLE, peer="jaxlora-trainer", case="train-alone")
    float32 = replace(ours, peer="jaxlora-trainer-float32", tokens_s=25.0)
    theirs = replace(THEIRS, case="train-alone")
    assert paired_ratios([ours, float32, theirs], "other", "train-alone", lambda s: s.tokens_s) == [2.0]


def test_agreement_compares_answers_of_one_request():
    assert agreement([SAMPLE, THEIRS], "other", "base-8") == 0.5
    assert agreement([SAMPLE, replace(THEIRS, texts=[])], "other", "base-8") is None


def test_samples_with_others_beside_them_are_told():
    line = others_told([SAMPLE, replace(SAMPLE, others_cpu_s=0.5)])
    assert "0.25 cores busy (median; most 0.50); 1 of 2 samples" in line
    assert line in told([SAMPLE, replace(SAMPLE, others_cpu_s=0.5)]).markdown()


def test_memory_of_teams_is_private_times_teams_and_shared_once():
    """Ours is what one server has; three processes of another hold 0.8 GB of their own and 0.1 together."""
    text = told([SAMPLE, replace(THEIRS, peer="other x 3", tokens_cpu_s=5.0)]).teams_markdown(3)
    whole = 0.8 * 32 / 3 + 0.1
    assert "| jaxlora | 0.80 | 0.10 | 0.90 | 50.0 | 1.000 | 1.00 |" in text
    assert f"| other x 3 | 0.80 | 0.10 | {whole:.2f} | 5.0 | {0.9 / whole:.3f} | 10.00 |" in text
