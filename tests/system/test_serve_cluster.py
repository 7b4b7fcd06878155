"""`jaxlora up`: a front, two replicas and a keeper of this machine behind one address, with the same answers as one server."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
from adapters_world import answer, seeded, upload, zip_of
from cluster_world import CONFIG, running, until
from small_world import tiny_path
from test_house_kill import STEPS, finished, job_of

from benchmarks import streams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]
MODEL = tiny_path("tiny-llama-tied")
ASKED = (
    ("POST", "/v1/completions", {"prompt": [5, 9, 20], "max_tokens": 6, "temperature": 0, "logprobs": 2}),
    ("POST", "/v1/completions", {"prompt": [5, 9, 20], "max_tokens": 6, "temperature": 0, "stream": True}),
    ("POST", "/v1/completions", {"prompt": [7], "max_tokens": 0}),
    ("POST", "/v1/completions", {"prompt": [10**9]}),
    ("POST", "/v1/completions", {"prompt": [5], "nonsense": 1}),
    ("POST", "/v1/completions", {"prompt": [5], "model": "nobody"}),
    ("POST", "/v1/completions", {"prompt": [5], "model": "ft:tiny-llama-tied:acme:x:012345678901"}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/nobody", None),
    ("GET", "/v1/files", None),
    ("GET", "/v1/adapters", None),
    ("GET", "/v1/fine_tuning/jobs/ftjob-none", None),
    ("DELETE", "/v1/files/file-none", None),
    ("GET", "/nowhere", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
)


def plain(response: httpx2.Response):
    """What a client reads, but for ids, times, and where the server that answers has an adapter just now."""
    text = re.sub(r'"state":"(device|host|disk)"', '"state":…', response.text)
    text = re.sub(r'("(?:id|created|created_at)": ?)("(?:cmpl|chatcmpl|req)[^"]*"|[0-9.]+)', r"\1…", text)
    headers = {k: v for k, v in response.headers.items() if k not in ("date", "x-request-id", "content-length")}
    return response.status_code, headers, text


def ask_all(url: str):
    with httpx2.Client(base_url=url, timeout=60) as client:
        base = client.get("/v1/models").json()["data"][0]["id"]
        return [plain(client.request(m, p, json=b if b is None else {"model": base} | b)) for m, p, b in ASKED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def direct(folder):
    """What one server says, with an adapter that it keeps in the folder."""
    with running("serve", folder, MODEL) as one:
        with httpx2.Client(base_url=one.url, timeout=60) as client:
            assert upload(client, "kept", zip_of(seeded(1))).status_code == 200
            said, hop = answer(client, "kept"), latency(client)
        answers = ask_all(one.url)
        assert one.stop() == 0
    return answers, said, hop


@pytest.fixture(scope="module")
def cluster(folder, direct):
    with running("up", folder, MODEL) as up:
        yield up


@pytest.fixture
def client(cluster):
    with httpx2.Client(base_url=cluster.url, timeout=60) as client:
        yield client


def latency(client: httpx2.Client) -> float:
    """Median seconds of a request that computes next to nothing."""

    def once() -> float:
        began = time.perf_counter()
        assert client.post("/detokenize", json={"tokens": []}).status_code in (200, 400)
        return time.perf_counter() - began

    return statistics.median(once() for _ in range(200))


def test_it_listens_on_this_machine_alone(cluster):
    """Every process below: the front, the servers and all of Ray's."""
    ours = cluster.below()
    assert len(ours) > 6
    inodes = set()
    for pid in ours:
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].partition(":")[0])
    assert listening
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set(listening) <= loopback


def test_answers_are_those_of_one_server(cluster, direct, client):
    answers, said, _ = direct
    assert ask_all(cluster.url) == answers
    assert answer(client, "kept") == said


def test_the_client_library(cluster):
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0) as client:
        base = client.models.list().data[0].id
        whole = client.completions.create(model=base, prompt=[5, 9, 20], max_tokens=6, temperature=0)
        parts = client.completions.create(model=base, prompt=[5, 9, 20], max_tokens=6, temperature=0, stream=True)
        assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt=[5])
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=base, prompt=[10**9])


def test_an_adapter_is_there_for_all_once_it_is_answered(client):
    """Each replica is asked at once, by more requests than one would get."""
    said = []
    for seed in (2, 3):
        assert upload(client, "new", zip_of(seeded(seed))).status_code == 200
        said.append({answer(client, "new") for _ in range(6)})
    assert [len(texts) for texts in said] == [1, 1]
    assert said[0] != said[1]
    pinned = {answer(client, "new@1") for _ in range(4)}
    assert pinned == said[0]
    assert client.delete("/v1/adapters/new").status_code == 200
    body = {"model": "new", "prompt": [5]}
    assert {client.post("/v1/completions", json=body).status_code for _ in range(6)} == {404}


def test_a_file_larger_than_a_part_arrives_whole(client):
    line = json.dumps({"prompt": "say", "completion": " word" * 200}) + "\n"
    data = (line * 9000).encode()
    assert len(data) > 8 * 2**20
    file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("x.jsonl", data)}).json()
    assert client.get(f"/v1/files/{file['id']}/content").content == data


@pytest.mark.parametrize("count", [50, 500])
def test_streams_stay_whole(cluster, client, count):
    base = client.get("/v1/models").json()["data"][0]["id"]
    port = int(cluster.url.rsplit(":", 1)[1])
    began = time.monotonic()
    outcomes = asyncio.run(streams.crowd("127.0.0.1", port, base, count, 16, again=True))
    told = {name: n for name, n in streams.told(outcomes, 16).items() if n}
    print(f"{count} streams in {time.monotonic() - began:.1f} s: {told}")
    told.pop("refusals", None)
    assert told == {"length": count}


def test_the_hop(client, direct):
    """What the front adds to a request, measured; the bound is for a machine that is busy."""
    through = latency(client)
    print(f"direct {direct[2] * 1e3:.2f} ms, through the front {through * 1e3:.2f} ms")
    assert through < 0.03
    assert direct[2] < 0.03


class Asking:
    """Threads that ask an adapter again and again, and keep what they got."""

    def __init__(self, url: str, said: str, threads: int = 6):
        self.url, self.said = url, said
        self.right, self.wrong, self.errors = 0, [], []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self):
        body = {"model": "kept", "prompt": [5, 9, 20], "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        with httpx2.Client(base_url=self.url, timeout=60) as client:
            while not self._over.is_set():
                try:
                    response = client.post("/v1/completions", json=body)
                except httpx2.TransportError as error:
                    self.errors.append(repr(error))
                    time.sleep(0.1)
                    continue
                if response.status_code != 200:
                    self.errors.append((response.status_code, response.headers.get("retry-after"), response.text))
                elif response.json()["choices"][0]["text"] == self.said:
                    self.right += 1
                else:
                    self.wrong.append(response.text)


def test_a_replica_that_is_killed_costs_no_answer(cluster, client, direct):
    """Its requests had no byte yet, so others answer them; it is there again, and answers right."""
    before = until(lambda: len(cluster.pids("reads")) == 2 and cluster.pids("reads"), 60)
    with Asking(cluster.url, direct[1]) as asking:
        until(lambda: asking.right > 20, 60)
        os.kill(before[0], signal.SIGKILL)
        after = asking.right
        until(lambda: asking.right > after + 50, 60)
    assert (asking.wrong, asking.errors) == ([], [])
    began = time.monotonic()
    until(lambda: len(cluster.pids("reads")) == 2, 120)
    print(f"{asking.right} right answers; a new replica began after {time.monotonic() - began:.1f} s")


def test_answers_go_on_without_the_keeper_which_comes_back(cluster, client, direct):
    (keeper,) = cluster.pids("writes")
    os.kill(keeper, signal.SIGKILL)
    with Asking(cluster.url, direct[1]) as asking:
        refused = until(lambda: (r := client.get("/v1/files")).status_code != 200 and r, 10)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        until(lambda: client.get("/v1/files").status_code == 200, 120)
    assert (asking.wrong, asking.errors) == ([], [])
    assert asking.right > 10
    assert upload(client, "later", zip_of(seeded(4))).status_code == 200
    assert answer(client, "later")


def test_a_job_goes_on_after_the_keeper_was_killed(cluster, folder):
    """Its client asks again as long as it is told to; its model is asked by the name that its job gave it."""
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", timeout=60, max_retries=60) as client:
        job = job_of(client, folder)
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "running", 60)
        for pid in cluster.pids("writes"):
            os.kill(pid, signal.SIGKILL)
        job = finished(client, job.id)
        steps = {e.data["step"] for e in client.fine_tuning.jobs.list_events(job.id, limit=100) if e.type == "metrics"}
        assert max(steps) == STEPS
        assert client.completions.create(model=job.fine_tuned_model, prompt="say 3", max_tokens=4).usage is not None
        listed = [card.id for card in client.models.list()]
        assert len(listed) > 2
        for name in listed:  # the replicas have the job's, too
            assert client.completions.create(model=name, prompt="say 3", max_tokens=4).usage is not None


def test_a_front_that_is_killed_comes_back_where_it_was(cluster, client, direct):
    (front,) = cluster.pids("answers")
    os.kill(front, signal.SIGKILL)

    def answers() -> bool:
        try:
            return client.get("/ready").status_code == 200
        except httpx2.TransportError:
            return False

    until(answers, 60)
    assert answer(client, "kept") == direct[1]


def test_it_ends_in_order(cluster, client):
    """The last test with this cluster: an answer that is open is complete, and no process is left."""
    base, ours = client.get("/v1/models").json()["data"][0]["id"], cluster.below()
    body = {"model": base, "prompt": [5], "max_tokens": 100, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        data = response.iter_text()
        text = next(data)
        cluster.process.send_signal(signal.SIGTERM)
        text += "".join(data)
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in text
    assert cluster.process.wait(120) == 0
    assert [pid for pid in ours if Path(f"/proc/{pid}").exists()] == []


def test_nothing_is_left_of_one_that_is_killed(folder, direct):
    """Neither servers nor Ray; the next start finds the folder free."""
    with running("up", folder, MODEL) as up:
        ours = up.below()
        assert len(up.pids("reads")) >= 2
    # Two of Ray's try for a minute to tell the others that they end.
    until(lambda: not [pid for pid in ours if Path(f"/proc/{pid}").exists()], 120)
    with running("serve", folder, MODEL) as one:
        refused = up_on(folder)
        assert one.stop() == 0
    assert (refused.returncode, refused.stdout.count("Traceback")) == (2, 0)
    assert "is in use by another server; stop that one" in refused.stderr


def up_on(folder: Path) -> subprocess.CompletedProcess[str]:
    """`jaxlora up` on settings that are in the folder, which are refused."""
    command = [sys.executable, "-m", "serve.cli.main", "up", str(folder / "serve.toml")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


def test_trainers_and_object_storage_are_refused_together(tmp_path):
    (tmp_path / "serve.toml").write_text(
        CONFIG.format(model=MODEL) + 'most_trainers = 1\n[blobs]\nurl = "s3://bucket/x"\n'
    )
    refused = up_on(tmp_path)
    assert (refused.returncode, "leave out [blobs]" in refused.stderr) == (2, True)


def test_adapters_in_object_storage(tmp_path):
    """Each replica has copies of its own; a new version is everywhere soon after it is answered, and a deleted one nowhere."""
    (tmp_path / "blobs").mkdir()
    blobs = f'[blobs]\nurl = "file://{tmp_path}/blobs"\n'
    with running("up", tmp_path, MODEL, more=blobs) as up, httpx2.Client(base_url=up.url, timeout=60) as client:
        said = []
        for version in (1, 2):
            assert upload(client, "far", zip_of(seeded(version))).status_code == 200
            began = time.monotonic()
            until(lambda name=f"far@{version}": {answers(client, name) for _ in range(6)} == {200}, 60)
            print(f"a version is on all replicas after {time.monotonic() - began:.2f} s")
            said.append({answer(client, "far") for _ in range(6)})
        assert ([len(texts) for texts in said], said[0] != said[1]) == ([1, 1], True)
        copies = sorted(path.name for path in (tmp_path / "adapters.copies").iterdir())
        assert copies == ["0", "1"]
        assert client.delete("/v1/adapters/far").status_code == 200
        until(lambda: {answers(client, "far") for _ in range(6)} == {404}, 60)
        assert up.stop() == 0


def answers(client: httpx2.Client, model: str) -> int:
    """The status of a request to it."""
    return client.post("/v1/completions", json={"model": model, "prompt": [5], "max_tokens": 1}).status_code
