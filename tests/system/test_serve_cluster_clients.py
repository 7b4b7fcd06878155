"""The official clients and the adapters' routes, the same tests for one server and for a front of three replicas and a keeper.

What needs no process of its own runs once more as it is, behind a front: `pytest --through-front` of the suites of each wire.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import openai
import pytest
from adapters_world import answer, error_of, seeded, upload, zip_of
from cluster_world import running, until
from gradient_world import API, gradientai
from gradientai.openapi.client import exceptions as told
from small_world import tiny_path

TESTS = Path(__file__).parents[1]
SUITES = {
    "openai": ("test_serve_openai_*.py", "test_serve_responses.py", "test_serve_tools.py", "test_serve_streams.py"),
    "gradient": ("test_serve_gradient_*.py",),
    "adapters": ("test_serve_adapters_api.py",),
    # Not those of files: the front reads a whole upload before the keeper hears of it, so they see none under way there.
    "events of jobs": ("test_serve_followers.py",),
}
pytestmark = pytest.mark.slow
MODEL = tiny_path("tiny-llama-tied")
HI = [{"role": "user", "content": "hi"}]
TIMES = 9  # asked one after the other, so that each of three replicas is asked


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_pass_behind_a_front(suite):
    files = [path for pattern in SUITES[suite] for path in sorted((TESTS / "system").glob(pattern))]
    assert len(files) >= len(SUITES[suite])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "--through-front",
        "-p",
        "no:cacheprovider",
        *map(str, files),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=TESTS.parent)
    print(ran.stdout.splitlines()[-1])
    assert ran.returncode == 0, ran.stdout[-5000:]


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    with running("serve", tmp_path_factory.mktemp("serve"), MODEL) as one:
        yield one.url


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    with running("up", tmp_path_factory.mktemp("up"), MODEL, replicas=3, publish_every=12) as cluster:
        yield cluster.url


@pytest.fixture(scope="module", params=["serve", "up"])
def url(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def http(url):
    with httpx2.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as it:
        yield it


@pytest.fixture
def base(client):
    return client.models.list().data[0].id


@pytest.fixture
def through(up):
    with httpx2.Client(base_url=up, timeout=60) as client:
        yield client


def test_completions_whole_and_in_parts(client, base):
    asked = {"model": base, "prompt": ["say", "so"], "max_tokens": 9, "temperature": 0, "logprobs": 2, "n": 2}
    whole = client.completions.create(**asked, seed=3)
    parts = list(client.completions.create(**asked, seed=3, stream=True, stream_options={"include_usage": True}))
    for index in range(4):
        text = "".join(c.text for p in parts for c in p.choices if c.index == index)
        assert text == whole.choices[index].text
    assert parts[-1].usage == whole.usage
    scored = client.completions.create(model=base, prompt="say so", max_tokens=0, echo=True, logprobs=1)
    assert len(scored.choices[0].logprobs.token_logprobs) == scored.usage.prompt_tokens


def test_a_chat_and_a_response(client, base):
    asked = {"model": base, "messages": HI, "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
    asked = {"model": base, "input": "hi", "max_output_tokens": 9, "temperature": 0}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.usage == whole.usage


def test_structured_output(client, base):
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "light", "schema": schema}}
    said = client.chat.completions.create(model=base, messages=HI, max_tokens=60, temperature=0, response_format=form)
    assert set(json.loads(said.choices[0].message.content)) == {"on"}


def test_errors_are_the_clients_exceptions(client, base):
    for wrong, raised, code in (
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"model": "ft:tiny-llama-tied:acme:x:012345678901"}, openai.NotFoundError, "model_not_found"),
        ({"model": "ft:tiny-llama-tied:acme:x:012345678901:latest"}, openai.NotFoundError, "model_not_found"),
        ({"model": base, "prompt": [10**9]}, openai.BadRequestError, "invalid_value"),
        ({"model": base, "prompt": [5] * 999}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": base, "extra_body": {"nonsense": 1}}, openai.BadRequestError, "unknown_parameter"),
    ):
        with pytest.raises(raised) as caught:
            client.completions.create(**{"prompt": [5]} | wrong)
        assert caught.value.code == code


def test_a_job_and_all_names_of_what_it_makes(client, base):
    """Its models can be asked by every name as soon as it has succeeded, of every replica; all of a version say the same."""
    lines = [json.dumps({"prompt": f"say {i}", "completion": f" word{i}"}) for i in range(8)]
    file = client.files.create(file=("train.jsonl", "\n".join(lines).encode()), purpose="fine-tune")
    assert client.files.content(file.id).text == "\n".join(lines)
    how = {"lora": {"r": 2}, "max_steps": 20, "checkpoint_every": 5, "learning_rate": 0.02}
    jobs = client.fine_tuning.jobs
    job = jobs.create(model=base, training_file=file.id, seed=5, suffix="trained", extra_body=how)
    while (job := jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        time.sleep(0.05)
    assert job.status == "succeeded"

    def say(model: str) -> str:
        asked = {"model": model, "prompt": "say 3", "max_tokens": 0, "echo": True, "logprobs": 0}
        return str(client.completions.create(**asked).choices[0].logprobs.token_logprobs)

    names = {job.fine_tuned_model, job.fine_tuned_model + ":latest", f"{base}:{job.fine_tuned_model}", "trained"}
    assert len({say(name) for name in names for _ in range(TIMES)}) == 1
    checkpoints = [c.fine_tuned_model_checkpoint for c in jobs.checkpoints.list(job.id)]
    assert len(checkpoints) == 4
    said = {name: {say(name) for _ in range(TIMES)} for name in checkpoints}
    assert [len(texts) for texts in said.values()] == [1] * 4
    assert len(set.union(*said.values())) == 4
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    assert client.models.retrieve(checkpoints[0]).id == checkpoints[0]
    client.models.delete(f"trained@{client.models.retrieve(job.fine_tuned_model).model_extra['version']}")
    assert {say(job.fine_tuned_model) for _ in range(TIMES)} == said[checkpoints[1]]
    client.models.delete("trained")
    for name in (*names, *checkpoints):
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name, prompt="x")
    client.files.delete(file.id)


def test_while_a_job_runs_its_name_means_the_newest_checkpoint(client, base):
    """Of every replica, and it never goes back to an older one."""
    file = client.files.create(file=("t.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 8), purpose="fine-tune")
    how = {"lora": {"r": 2}, "max_steps": 60, "checkpoint_every": 3, "learning_rate": 0.01}
    jobs = client.fine_tuning.jobs
    job, seen = jobs.create(model=base, training_file=file.id, suffix="going", extra_body=how), []
    while (job := jobs.retrieve(job.id)).status not in ("succeeded", "failed"):
        told_ = [c.fine_tuned_model_checkpoint for c in jobs.checkpoints.list(job.id, limit=1)]
        if not told_:
            continue
        name, _, step = told_[0].partition(":ckpt-step-")
        least = client.models.retrieve(told_[0]).model_extra["version"]
        seen.append(client.completions.create(model=name, prompt="a", max_tokens=1).model_extra["adapter_version"])
        assert seen[-1] >= least, f"the checkpoint of step {step} was told"
    assert job.status == "succeeded"
    assert len(set(seen)) > 2
    assert seen == sorted(seen)
    client.models.delete("going")


def test_the_life_of_a_gradient_adapter(url, http):
    """Each call is answered by what the one before has made."""
    with gradientai.Gradient(access_token="any", workspace_id="lab", host=url + API) as sdk:
        base = sdk.list_models(only_base=True)[0]
        adapter = base.create_model_adapter(name="gradient", rank=4, learning_rate=0.002)
        asked = {"query": "Q: 2+2? A:", "auto_template": False, "temperature": 0, "max_generated_token_count": 6}
        plain = base.complete(**asked).generated_output
        assert {adapter.complete(**asked).generated_output for _ in range(TIMES)} == {plain}
        losses, scored = (
            [],
            {"model": "gradient", "prompt": "Q: 2+2? A: 4", "max_tokens": 0, "echo": True, "logprobs": 0},
        )
        for version in range(2, 7):
            losses.append(adapter.fine_tune(samples=[{"inputs": "Q: 2+2? A: 4"}]).sum_loss)
            said = [http.post("/v1/completions", json=scored).json() for _ in range(3)]
            assert [one["adapter_version"] for one in said] == [version] * 3
            now = -sum(said[0]["choices"][0]["logprobs"]["token_logprobs"][1:])
            assert now < losses[-1]
            assert len({adapter.complete(**asked).generated_output for _ in range(TIMES)}) == 1
        assert losses == sorted(losses, reverse=True)
        assert sdk.get_model_adapter(model_adapter_id=adapter.id).name == "gradient"
        assert [m.id for m in sdk.list_models(only_base=False)] == [base.id, adapter.id]
        adapter.delete()
        for _ in range(TIMES):
            with pytest.raises(told.NotFoundException):
                adapter.complete(**asked)


def test_the_adapters_routes(http):
    assert [upload(http, "bot", zip_of(seeded(i))).json()["version"] for i in (1, 2)] == [1, 2]
    assert len({answer(http, "bot") for _ in range(TIMES)} | {answer(http, "bot@2")}) == 1
    assert answer(http, "bot@1") != answer(http, "bot@2")
    assert [one["id"] for one in http.get("/v1/adapters/bot/versions").json()["data"]] == ["bot@2", "bot@1"]
    again = upload(http, "copy", http.get("/v1/adapters/bot@1/download").content)
    assert again.json()["version"] == 1
    assert answer(http, "copy") == answer(http, "bot@1")
    assert http.post("/v1/adapters/bot/pin").status_code == 200
    assert http.get("/v1/adapters/bot").json()["pinned"]
    assert http.post("/v1/adapters/bot/unpin").status_code == 200
    assert http.delete("/v1/adapters/bot@2").status_code == 200
    assert {answer(http, "bot") for _ in range(TIMES)} == {answer(http, "copy")}
    assert error_of(http.post("/v1/completions", json={"model": "bot@2", "prompt": [5]}))[:2] == (
        404,
        "model_not_found",
    )
    assert upload(http, "bot", zip_of(seeded(2))).json()["version"] == 3
    for name in ("bot", "copy"):
        assert http.delete(f"/v1/adapters/{name}").status_code == 200
    codes = {http.post("/v1/completions", json={"model": "bot", "prompt": [5]}).status_code for _ in range(TIMES)}
    assert codes == {404}


# ---- versions of a cluster


def test_versions_are_everywhere_within_a_second_and_never_go_back(through):
    """A job publishes every few steps; each version is told by the keeper and asked of the replicas.

    Replicas see a version once the keeper has saved it, one after the other; this model makes steps faster than any real one.
    """
    file = {"file": ("t.jsonl", b'{"prompt": "a", "completion": "b"}\n' * 8)}
    file = through.post("/v1/files", data={"purpose": "fine-tune"}, files=file).json()["id"]
    how = {"lora": {"r": 2}, "max_steps": 180, "checkpoint_every": 1000, "suffix": "seen"}
    body = how | {"model": "tiny-llama-tied", "training_file": file}
    job = through.post("/v1/fine_tuning/jobs", json=body).json()
    asked, over = [], threading.Event()  # (began, ended, version)

    def ask() -> None:
        with httpx2.Client(base_url=through.base_url, timeout=60) as client:
            while not over.is_set():
                began = time.monotonic()
                response = client.post("/v1/completions", json={"model": "seen", "prompt": [5], "max_tokens": 1})
                ended = time.monotonic()
                time.sleep(0.02)
                if response.status_code == 200:
                    asked.append((began, ended, response.json()["adapter_version"]))

    threads, told_ = [threading.Thread(target=ask) for _ in range(3)], {}
    for thread in threads:
        thread.start()
    try:
        while through.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["status"] not in ("succeeded", "failed"):
            listed = through.get("/v1/adapters/seen/versions").json().get("data", [])
            for one in listed:
                told_.setdefault(one["version"], time.monotonic())
    finally:
        time.sleep(1.5)
        over.set()
        for thread in threads:
            thread.join()
    assert len(told_) >= 10
    lags = []
    for version, at in told_.items():
        after = [began for began, _, answered in asked if answered >= version]
        late = [began - at for began, _, answered in asked if answered < version]
        lags.append(max([0.0, *late]))
        assert after, f"version {version} was never answered by"
    print(f"{len(told_)} versions, {len(asked)} answers; an older one answered at most {max(lags):.2f} s later")
    assert statistics.median(lags) < 1.0
    assert max(lags) < 10.0  # a busy machine stands still
    newest = 0
    ends = sorted(asked, key=lambda one: one[1])
    for began, _, version in sorted(asked):
        while ends[0][1] < began:
            newest = max(newest, ends.pop(0)[2])
        assert version >= newest
    assert through.delete("/v1/adapters/seen").status_code == 200


def test_a_version_that_is_deleted_under_requests(through):
    """Those that have it go on with it, those that wait for it get it or a clear error; nobody gets another's weights."""
    names = [f"gone{i}" for i in range(12)]
    for seed, name in enumerate(names):
        assert upload(through, name, zip_of(seeded(seed))).status_code == 200
    body = {"prompt": [5, 9], "max_tokens": 110, "temperature": 0, "ignore_eos": True}
    right = {
        name: through.post("/v1/completions", json=body | {"model": name}).json()["choices"][0]["text"]
        for name in names
    }
    assert len(set(right.values())) == len(names)
    said, begun = {}, itertools.count()

    def ask(name: str, number: int) -> None:
        text, error, whole = "", None, False
        with httpx2.Client(base_url=through.base_url, timeout=60) as client:
            asked = body | {"model": name, "stream": True}
            with client.stream("POST", "/v1/completions", json=asked) as response:
                next(begun)
                for line in response.iter_lines():
                    if line.startswith("{"):
                        error = json.loads(line)["error"]["code"]
                    if not line.startswith("data: {"):
                        continue
                    part = json.loads(line.removeprefix("data: "))
                    if "error" in part:
                        error = part["error"]["code"]
                        continue
                    text += part["choices"][0]["text"]
                    whole |= part["choices"][0]["finish_reason"] == "length"
        said[name, number] = text, error, whole

    threads = [threading.Thread(target=ask, args=(name, number)) for number in range(3) for name in names]
    for thread in threads:
        thread.start()
    until(lambda: len(said) > 2, 60)
    for name in names:
        assert through.delete(f"/v1/adapters/{name}@1").status_code == 200
    for thread in threads:
        thread.join()
    outcomes = {}
    for (name, _), (text, error, whole) in said.items():
        outcomes[error or whole] = outcomes.get(error or whole, 0) + 1
        assert text == right[name] if whole else right[name].startswith(text)
    print(f"{len(threads)} streams: {outcomes}")
    assert set(outcomes) <= {True, "model_not_found"}
    assert {through.post("/v1/completions", json=body | {"model": name}).status_code for name in names} == {404}
