"""Twenty kills of each kind of process in turn, Ray's head among them, under a mixed load: nothing is lost or wrong."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import os
import random
import re
import signal
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx2
import pytest
from adapters_world import answer, seeded, upload, zip_of
from cluster_world import Running, running, until
from small_world import tiny_path
from test_serve_cluster_scaling import heads

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]
MODEL = tiny_path("tiny-llama-tied")
HEAD = "Ray's head"
KINDS = {"reads": 2, "writes": 1, "trains": 1, "answers": 1, HEAD: 1}  # processes of each, as their logs name them
KILLS = 20
PAUSE_S = 0.1  # before a thread asks again: whoever starts again needs processors, too
HANGS_S = 60.0  # no request may take longer
SEEDS = 4  # of the weights that are uploaded again and again
TOKENS = 12
BROKEN = (httpx2.NetworkError, httpx2.RemoteProtocolError)  # of a connection; one that hangs raises another error
STEPS, KEPT_EVERY = 40, 7
ASKED = {"prompt": [5, 9, 20], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Asked:
    """How a request went."""

    kind: str
    began: float
    least: int  # version that had been answered before
    ended: float = 0.0
    version: int | None = None  # that answered
    text: str = ""
    whole: bool = False
    error: str | None = None  # that says to come again


@dataclass
class Load:
    """Threads that ask, upload and train until it is left; what they found is looked at afterwards."""

    url: str
    job: Callable[[httpx2.Client, str], bytes]
    versions: dict[int, int] = field(default_factory=dict)  # of `moving` → seed; also those whose answer was lost
    answered: list[int] = field(
        default_factory=list
    )  # those whose upload was answered; others may never have been there
    asked: list[Asked] = field(default_factory=list)
    jobs: list[bytes] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    at_kill: int = 0  # the newest version when something was killed last
    at_kill_right: int = 0  # and the right answers
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self.upload(0)
        works = [lambda: self.ask("whole"), lambda: self.ask("pinned"), lambda: self.ask("stream")] * 2
        works += [self.move, self.train]
        self.threads = [threading.Thread(target=self.kept, args=(work,)) for work in works]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def kept(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.wrong.append(repr(error))
            raise

    @property
    def newest(self) -> int:
        return self.answered[-1] if self.answered else 0

    @property
    def right(self) -> int:
        return sum(one.whole for one in self.asked)

    def upload(self, seed: int) -> None:
        """The next version of `moving`; its answer may be lost, so several may have come."""
        with httpx2.Client(base_url=self.url, timeout=HANGS_S) as client:
            version = patiently(lambda: upload(client, "moving", zip_of(seeded(seed)))).json()["version"]
        for lost in range(self.newest + 1, version + 1):
            self.versions[lost] = seed
        self.answered.append(version)

    def move(self) -> None:
        for number in itertools.count(1):
            if self.over.wait(1.0):
                return
            self.upload(number % SEEDS)

    def train(self) -> None:
        """One job after the other; whatever is accepted has its result in the end."""
        with httpx2.Client(base_url=self.url, timeout=HANGS_S) as client:
            for number in itertools.count():
                self.jobs.append(self.job(client, f"job{number}"))
                if self.over.is_set():
                    return

    def ask(self, kind: str) -> None:
        draw = random.Random(kind)
        with httpx2.Client(base_url=self.url, timeout=HANGS_S) as client:
            while not self.over.is_set():
                least = self.newest
                pin = draw.choice(self.answered[-8:]) if kind == "pinned" else None
                one = Asked(kind, time.monotonic(), least)
                try:
                    self.once(client, one, pin)
                except BROKEN as error:
                    one.error = type(error).__name__
                one.ended = time.monotonic()
                if pin is not None and one.version not in (None, pin):
                    self.wrong.append(f"moving@{pin} was answered by version {one.version}")
                self.asked.append(one)
                time.sleep(PAUSE_S)

    def once(self, client: httpx2.Client, one: Asked, pin: int | None) -> None:
        body = ASKED | {"model": "moving" if pin is None else f"moving@{pin}", "stream": one.kind == "stream"}
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = response.read().decode()
                assert response.status_code == 503, (response.status_code, text)
                assert response.headers["retry-after"], text
                one.error = "503"
            elif one.kind != "stream":
                said = json.loads(response.read())
                one.version, one.text = said["adapter_version"], said["choices"][0]["text"]
                one.whole = True
            else:
                for line in response.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    part = json.loads(line.removeprefix("data: "))
                    if "error" in part:
                        assert part["error"]["type"] == "server_error", part
                        one.error = "event"
                        continue
                    one.version = part["adapter_version"]
                    for choice in part["choices"]:
                        one.text += choice["text"]
                        one.whole |= choice["finish_reason"] == "length"
                assert one.whole or one.error, f"a stream was cut without a word after {one.text!r}"


def patiently(ask: Callable[[], httpx2.Response], within_s: float = 240.0) -> httpx2.Response:
    """The answer, asked for again as long as the error says so."""
    ends = time.monotonic() + within_s
    while True:
        assert time.monotonic() < ends, f"no answer within {within_s} s"
        try:
            response = ask()
        except BROKEN:
            pass
        else:
            if response.status_code != 503:
                assert response.status_code == 200, response.text
                return response
            assert response.headers["retry-after"]
        time.sleep(0.1)


def trained(client: httpx2.Client, name: str) -> bytes:
    """The weights that a job has made, which is always the same job but for its name."""
    lines = "\n".join(json.dumps({"prompt": f"say {i}", "completion": f" word{i}"}) for i in range(8))
    files = {"file": ("train.jsonl", lines.encode())}
    file = patiently(lambda: client.post("/v1/files", data={"purpose": "fine-tune"}, files=files)).json()
    how = {"lora": {"r": 2}, "max_steps": STEPS, "checkpoint_every": KEPT_EVERY, "learning_rate": 0.01, "seed": 5}
    body = how | {"model": "tiny-llama-tied", "training_file": file["id"], "suffix": name}
    key = {"Idempotency-Key": name}
    job = patiently(lambda: client.post("/v1/fine_tuning/jobs", json=body, headers=key)).json()
    path = f"/v1/fine_tuning/jobs/{job['id']}"
    ends = time.monotonic() + 480
    while (job := patiently(lambda: client.get(path)).json())["status"] != "succeeded":
        assert time.monotonic() < ends, job
        if job["status"] == "paused":  # it ran at three deaths of the keeper
            assert job["error"]["code"] == "server_died", job
            patiently(lambda: client.post(f"{path}/resume"))
        else:
            assert job["status"] in ("validating_files", "queued", "running"), job
        time.sleep(0.2)
    asked = {"model": job["fine_tuned_model"], "prompt": "say 3", "max_tokens": 4}
    assert patiently(lambda: client.post("/v1/completions", json=asked)).json()["usage"]
    archive = patiently(lambda: client.get(f"/v1/adapters/{name}/download")).content
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        return members.read("adapter_model.safetensors")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running("up", tmp_path_factory.mktemp("kills"), MODEL, trainers=1) as up:
        yield up


@pytest.fixture(scope="module")
def client(cluster):
    with httpx2.Client(base_url=cluster.url, timeout=60) as client:
        yield client


def pids(cluster: Running, kind: str) -> list[int]:
    """The processes of a kind."""
    return heads(cluster.below()) if kind == HEAD else cluster.pids(kind)


def ready(cluster: Running, load: Load, kind: str) -> bool:
    """Whether the processes of a kind do again what they are for."""
    if len(pids(cluster, kind)) != KINDS[kind]:
        return False
    if kind == "trains":
        return True
    if kind == HEAD and not all(ready(cluster, load, other) for other in KINDS if other != HEAD):
        return False
    if kind == "reads":
        log = cluster.log.read_text()
        return all(re.search(rf"pid={pid}\).* serving programs in float32: ", log) for pid in cluster.pids(kind))
    if kind == "writes":
        return load.newest > load.at_kill
    return load.right > load.at_kill_right


def test_nothing_accepted_is_lost_and_nothing_is_wrong(cluster, client):
    expected = {}
    for seed in range(SEEDS):
        assert upload(client, f"still{seed}", zip_of(seeded(seed))).status_code == 200
        expected[seed] = answer(client, f"still{seed}", TOKENS)
    assert len(set(expected.values())) == SEEDS
    undisturbed = trained(client, "undisturbed")
    draw, killed, waits = random.Random(17), Counter(), {kind: [] for kind in KINDS}
    began, at = time.monotonic(), {}
    with Load(cluster.url, trained) as load:

        def wait_for(kind: str) -> None:
            """The others may still be starting when the next one is killed."""
            until(lambda: load.wrong or ready(cluster, load, kind), 120)
            if kind in at:
                waits[kind].append(time.monotonic() - at.pop(kind))
            assert not load.wrong

        for kind in itertools.islice(itertools.cycle(KINDS), KILLS):
            wait_for(kind)
            before, seen = load.right, len(cluster.log.read_text())
            until(lambda before=before: load.wrong or load.right >= before + 10, 90)
            time.sleep(draw.uniform(0, 1))
            os.kill(draw.choice(pids(cluster, kind)), signal.SIGKILL)
            load.at_kill, load.at_kill_right, at[kind] = load.newest, load.right, time.monotonic()
            killed[kind] += 1
            if kind == HEAD:  # all end with it, five seconds later
                until(lambda seen=seen: load.wrong or "all servers are started" in cluster.log.read_text()[seen:], 120)
                wait_for(kind)
        for kind in KINDS:
            wait_for(kind)
    assert not load.wrong
    spent_s = time.monotonic() - began
    errors = Counter(f"{one.kind}: {one.error}" for one in load.asked if one.error)
    print(f"{killed.total()} kills in {spent_s:.0f} s: {dict(killed)}; begun again after {shown(waits)}")
    print(f"{load.right} right answers of {len(load.asked)}, {len(load.versions)} versions, {len(load.jobs)} jobs")
    print(f"errors to come again for: {dict(errors)}; the longest took {longest(load.asked):.1f} s")
    assert longest(load.asked) < HANGS_S / 2
    for one in load.asked:
        if one.version is not None:
            assert one.version >= one.least or one.kind == "pinned", f"{one} was told an older version"
            right = expected[load.versions[one.version]]
            assert one.text == right if one.whole else right.startswith(one.text), one
    for kind in ("whole", "stream"):  # what began after another one had ended saw no older version
        seen = sorted((one for one in load.asked if one.kind == kind and one.version), key=lambda one: one.began)
        done, newest = sorted(seen, key=lambda one: one.ended), 0
        for one in seen:
            while done and done[0].ended < one.began:
                newest = max(newest, done.pop(0).version)
            assert one.version >= newest, f"{one} after version {newest}"
    assert {bytes_ == undisturbed for bytes_ in load.jobs} == {True}
    assert {answer(client, f"still{seed}", TOKENS) == text for seed, text in expected.items()} == {True}


def longest(asked: list[Asked]) -> float:
    return max(one.ended - one.began for one in asked)


def shown(waits: dict[str, list[float]]) -> str:
    return ", ".join(f"{kind} {min(all_s):.1f} to {max(all_s):.1f} s" for kind, all_s in waits.items())
