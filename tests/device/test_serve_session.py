"""Sessions: what a notebook calls, on the tiny model; and the example of docs/training.md on the real one."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from serve_world import MODEL
from small_world import tiny_path

from jaxlora.config.training import Recipe, default_lr
from jaxlora.core.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AlreadyExists,
    ConfigInvalid,
    DataInvalid,
    InvalidRequest,
    JaxLoraError,
    ModelInvalid,
    NotFound,
    StateInvalid,
    Unavailable,
)
from jaxlora.core.lora import AdapterRef
from jaxlora.model.compile_cache import CompileCounter
from jaxlora.storage.adapter_store import AdapterStore
from serve.session import Session, is_watched
from train.data.examples import Example

ROOT = Path(__file__).resolve().parents[2]
LINES = [{"prompt": f"say {w}", "completion": w} for w in "abcdefgh"]
CHATS = [{"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]} for w in "abcd"]
PAIR = {
    "input": {"messages": [{"role": "user", "content": "hi"}]},
    "preferred_output": [{"role": "assistant", "content": "a"}],
    "non_preferred_output": [{"role": "assistant", "content": "b"}],
}
SIZES = {"dtype": "float32", "slots": 3, "max_rank": 16, "lanes": 4, "lane_tokens": 64}


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    with Session.open(tiny_path(MODEL), **SIZES) as session:
        yield session


@pytest.fixture
def session(shared) -> Iterator[Session]:
    """A session in which nobody trains, before and after."""
    yield shared
    for name in list(shared.tenants):
        shared.remove(name)


def greedy(session: Session, model: str, prompt: str = "say c") -> str:
    return session.sample(model, prompt, max_tokens=8, temperature=0)


def test_a_tenant_that_says_nothing_learns_by_the_recipe(session):
    tenant = session.add_tenant("plain", LINES)
    peak = default_lr(session.opened.base.config)
    assert tenant.optimizer == Recipe().optimizer(
        default_steps=3, default_lr=peak
    )  # three passes: 24 examples in eights
    assert (tenant.spec, tenant.loss, tenant.stream.seed) == (Recipe().spec, Recipe().objective, 0)
    assert [r.tokens > 0 for r in session.step(99)] == [True] * 3
    assert tenant.status == "done"


def test_every_setting_reaches_the_trainer(session):
    given = {
        "rank": 3,
        "alpha": 5.0,
        "targets": ("q_proj",),
        "rslora": True,
        "dropout": 0.25,
        "lr": 0.5,
        "schedule": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.125,
        "clip": 3.0,
        "loraplus_ratio": 4.0,
        "batch": 1,
        "steps": 7,
        "seed": 11,
    }
    recipe = Recipe(loss="dpo", beta=0.2, **given)
    tenant = session.add_tenant("all", [PAIR], loss="dpo", beta=0.2, **given)
    assert (tenant.spec, tenant.loss, tenant.stream.seed) == (recipe.spec, recipe.objective, 11)
    assert tenant.optimizer == recipe.optimizer(default_steps=1, default_lr=1.0)
    assert [r.lr for r in session.step(2)] == [0.25, 0.5]


OTHERWISE = {
    "rank": 3,
    "alpha": 5.0,
    "targets": ("q_proj",),
    "rslora": True,
    "dropout": 0.5,
    "lr": 0.5,
    "schedule": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.5,
    "clip": 1e-3,
    "loraplus_ratio": 4.0,
    "batch": 1,
    "steps": 5,
    "seed": 11,
}
OF_ANOTHER_LOSS = {
    "loss": ("dpo", "preference"),
    "beta": (0.2, "beta"),
    "clip_low": (0.5, "clip_low"),
    "clip_high": (2.0, "clip_high"),
}


@pytest.mark.fault("N6")
def test_no_setting_is_accepted_and_ignored(session, caplog):
    """Each, changed alone, teaches other weights, or is refused by name; without a change they are the same bits."""

    def learned(name: str, lines=LINES, **changed) -> dict[str, tuple[bytes, bytes]]:
        session.add_tenant(name, lines, **({"batch": 4, "lr": 0.1, "steps": 4} | changed))
        session.step(4)
        weights = session._trainer.adapter(name).weights
        session.remove(name)
        return {target: (a.tobytes(), b.tobytes()) for target, (a, b) in weights.items()}

    plain = learned("plain")
    assert learned("same") == plain
    assert [field for field, value in OTHERWISE.items() if learned(field, **{field: value}) == plain] == []
    for field, (value, word) in OF_ANOTHER_LOSS.items():
        with pytest.raises(JaxLoraError, match=word):
            session.add_tenant(field, LINES, **{field: value})
    longer = [{"text": "so much " * 600}, *LINES]
    with pytest.raises(
        DataInvalid, match=r"lane_tokens = 64 holds \(example 0\); lane_tokens = \d+ would hold all; or set"
    ):
        session.add_tenant("too_long", longer)
    with caplog.at_level("WARNING", logger="serve"):
        assert learned("skip", longer, too_long="skip") == plain
        assert learned("truncate", longer, too_long="truncate") != plain
    assert ["left out (example 0)" in caplog.text, "cut (example 0)" in caplog.text] == [True, True]
    with pytest.raises(JaxLoraError, match="too_long must be error, skip or truncate"):
        session.add_tenant("too_long", LINES, too_long="cut")
    settings = inspect.signature(session.add_tenant).parameters.keys() - {"name", "data", "heldout", "too_long"}
    assert settings == OTHERWISE.keys() | OF_ANOTHER_LOSS.keys(), "a setting that nobody tries"


def test_tenants_learn_together_and_answer_while_they_do(session):
    for name, seed in (("ant", 1), ("bee", 2)):
        session.add_tenant(name, LINES, heldout=LINES, lr=0.02, batch=4, steps=40, seed=seed)
    before = greedy(session, "tiny-llama-tied")
    assert greedy(session, "ant") == before  # nothing learned yet
    session.step(20)
    half = greedy(session, "ant")
    session.step(20)
    assert half != before
    assert greedy(session, "ant@3") == half  # of the versions of steps 0, 10, 20, 30 and 40 the last three stay
    with pytest.raises(AdapterNotFound):
        greedy(session, "ant@2")
    base, tuned = session.evaluate("bee", tuned=False), session.evaluate("bee")
    assert tuned.nll < base.nll / 2
    assert session.evaluate("bee", [LINES[0]]).tokens < tuned.tokens
    assert len(session.tenants["ant"].losses) == 40


def test_joining_publishing_and_leaving_compile_nothing(session):
    session.add_tenant("first", LINES, steps=30)
    session.step(1)
    greedy(session, "first")
    with CompileCounter() as compiles:
        session.add_tenant("second", CHATS, rank=4, lr=0.1, batch=2, steps=5, schedule="constant")
        session.step(2)
        session.publish("second")
        greedy(session, "second")
        session.remove("second")
        session.step(1)
    assert compiles.compiles == 0


def test_others_do_not_change_what_a_tenant_learns(session, tmp_path):
    for name, others in (("alone", []), ("among", ["x", "y"])):
        for i, other in enumerate(others):
            session.add_tenant(other, CHATS, lr=0.5, batch=2, steps=9, seed=i)
        session.add_tenant(name, LINES, batch=4, steps=5, seed=3)
        while session.tenants[name].status == "running":
            session.step()
        session.save(name, tmp_path / name)
        for tenant in (*others, name):
            session.remove(tenant)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("alone", "among"))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[k], other[k]) for k in one)


def test_training_goes_on_in_the_background(session):
    session.add_tenant("back", LINES, batch=2, steps=60)
    session.start()
    answers = [greedy(session, "back") for _ in range(3)]
    session.wait()
    assert session.tenants["back"].status == "done"
    assert all(isinstance(a, str) for a in answers)
    session.add_tenant("later", LINES)
    assert session.tenants["later"].step == 0  # `wait` has ended the background


def test_threads_may_ask_while_another_steps(session):
    session.add_tenant("busy", LINES, batch=2, steps=20)
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.extend(greedy(session, "busy") for _ in range(3)))
    asking.start()
    assert len(session.step(20)) == 20
    asking.join()
    assert len(answers) == 3


def test_save_writes_what_is_sampled(session, tmp_path):
    session.add_tenant("kept", LINES, rank=4, steps=9)
    session.step(2)
    written = session.save("kept", tmp_path / "out")
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 4
    first = load_file(tmp_path / "out/adapter_model.safetensors")
    trained = session.size("kept")
    assert trained.trainable_parameters == written.trainable_parameters == sum(v.size for v in first.values())
    assert trained.nbytes == sum(v.nbytes for v in first.values()) < written.nbytes
    session.step(1)
    with pytest.raises(AlreadyExists):
        session.save("kept", tmp_path / "out")
    session.save("kept", tmp_path / "out", replace=True)
    second = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any((first[k] != second[k]).any() for k in first)


def test_a_removed_tenant_still_answers_and_its_name_is_free(session):
    session.add_tenant("gone", LINES, lr=0.05, batch=4, steps=20)
    session.step(20)
    learned = greedy(session, "gone")
    session.remove("gone")
    assert greedy(session, "gone") == learned
    session.add_tenant("gone", LINES)
    assert greedy(session, "gone") == greedy(session, "tiny-llama-tied") != learned


def test_data_may_be_a_file_messages_or_ready_examples(session, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in CHATS))
    ready = Example(np.arange(4, 9, dtype=np.int32), np.float32([0, 1, 1, 1, 1]))
    session.add_tenant("file", str(path), heldout=path, batch=4)
    session.add_tenant("lists", (line for line in CHATS), heldout=[ready], batch=4)
    assert session.evaluate("file", CHATS) == session.evaluate("file")
    assert session.evaluate("lists").tokens == 4
    base = session.evaluate("file", tuned=False).nll
    assert {r.tenant: r.loss for r in session.step(2) if r.step == 1} == pytest.approx({"file": base, "lists": base})
    assert session.sample("file", CHATS[0]["messages"][:1], max_tokens=2, seed=1) == session.sample(
        "file", CHATS[0]["messages"][:1], max_tokens=2, seed=1
    )


REFUSED = [
    ("base", {"name": "tiny-llama-tied"}, InvalidRequest, "is the base model; give the adapter another name"),
    ("name", {"name": "../x"}, InvalidRequest, "name must be 1 to 64 letters"),
    ("taken", {"name": "here"}, AlreadyExists, "tenant here is already training"),
    ("empty", {"data": []}, DataInvalid, "data has no examples"),
    (
        "word",
        {"data": ["x"]},
        DataInvalid,
        "example 0: must be an object, such as a line of a JSONL file holds, got str",
    ),
    ("key", {"data": [{1: 2}]}, DataInvalid, "example 0: must be an object, such as a line"),
    (
        "role",
        {"data": [*CHATS, {"messages": [{"role": "x", "content": ""}]}]},
        DataInvalid,
        "example 4, messages[0].role",
    ),
    ("long", {"data": [{"text": "word " * 99}]}, DataInvalid, "example 0, text: "),
    ("kind", {"loss": "dpo"}, DataInvalid, "example 0, loss: loss dpo trains on preference pairs"),
    ("held", {"heldout": [PAIR]}, DataInvalid, "example 0, loss: loss cross_entropy trains on examples"),
    ("file", {"data": "none.jsonl"}, DataInvalid, "none.jsonl cannot be read"),
    ("rank", {"rank": 17}, AdapterInvalid, "rank 17 exceeds the limit 16"),
    ("rank 0", {"rank": 0}, AdapterInvalid, "lora rank must be at least 1, got 0"),
    ("head", {"targets": ("lm_head",)}, AdapterInvalid, "LoRA on lm_head is not supported"),
    ("lr", {"lr": -1.0}, ConfigInvalid, "lr must be finite and not negative, got -1.0"),
    ("loss", {"loss": "sft"}, ConfigInvalid, "loss must be one of cross_entropy"),
    ("beta", {"beta": 0.1}, ConfigInvalid, "loss cross_entropy has no beta"),
    ("batch", {"batch": 0}, ConfigInvalid, "batch must be at least 1, got 0"),
    ("large batch", {"batch": 4097}, InvalidRequest, "batch_size must be in [1, 4096]"),
    ("steps", {"steps": 0}, ConfigInvalid, "steps must be at least 1"),
    ("seed", {"seed": -1}, ConfigInvalid, "seed must be in"),
    ("others' word", {"learning_rate": -1.0}, ConfigInvalid, "lr must be finite and not negative, got -1.0"),
    ("two words", {"learning_rate": 1.0, "lr": 1.0}, InvalidRequest, "learning_rate means the same as lr"),
    ("misspelt", {"learning_rat": 1.0}, InvalidRequest, "no argument is called learning_rat; did you mean lr?"),
    ("several", {"batch": 0, "seed": -1}, ConfigInvalid, "batch must be at least 1, got 0; seed must be in"),
    ("warm-up", {"warmup_steps": 5, "batch": 8}, ConfigInvalid, "warmup_steps must be in [0, 3]"),
]


@pytest.mark.parametrize(
    ("changed", "error", "says"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_cannot_join_changes_nothing(session, changed, error, says):
    session.add_tenant("here", LINES)
    with pytest.raises(error, match=re.escape(says)) as raised:
        session.add_tenant(**{"name": "new", "data": LINES} | changed)
    assert isinstance(raised.value, JaxLoraError)
    assert list(session.tenants) == ["here"]


def test_calls_about_nobody_say_so(session, tmp_path):
    for call in (session.remove, session.publish, session.evaluate):
        with pytest.raises(NotFound, match="no tenant nobody in training"):
            call("nobody")
    for call in (greedy, lambda s, name: s.save(name, tmp_path / "x")):
        with pytest.raises(AdapterNotFound, match="`nobody` does not exist"):
            call(session, "nobody")
    with pytest.raises(InvalidRequest, match="tiny-llama-tied is the base model; name a tenant"):
        session.save("tiny-llama-tied", tmp_path / "x")
    with pytest.raises(StateInvalid):
        session.step()
    with pytest.raises(NotFound, match="no tenant here in training"):
        session.size("here")
    session.add_tenant("here", LINES)
    with pytest.raises(InvalidRequest, match="tenant here has no held-out examples; give `data`"):
        session.evaluate("here")
    with pytest.raises(InvalidRequest, match="temperature must be in"):
        session.sample("here", "x", temperature=3)
    with pytest.raises(InvalidRequest):
        session.sample("here", [{"text": "no role"}])
    for name in ("b", "c"):
        session.add_tenant(name, LINES)
    with pytest.raises(StateInvalid, match="all 3 training slots are taken"):
        session.add_tenant("d", LINES)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"model": "no-such-model"}, ModelInvalid),
        ({"model": " "}, ConfigInvalid),
        ({"slots": 0}, AdapterInvalid),
        ({"lanes": 0}, ConfigInvalid),
        ({"publish_every": 0}, InvalidRequest),
        ({"lane_tokens": 33}, ConfigInvalid),
    ],
)
def test_what_cannot_be_opened(changed, error):
    with pytest.raises(error):
        Session.open(**{"model": tiny_path(MODEL)} | SIZES | changed)


def test_somebody_watches_at_a_terminal_and_in_a_notebook(monkeypatch):
    assert not is_watched()
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert is_watched()
    monkeypatch.delitem(sys.modules, "ipykernel")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert is_watched()


def test_a_store_keeps_the_versions_and_a_closed_session_says_that_it_is(tmp_path, capsys):
    session = Session.open(tiny_path(MODEL), store=tmp_path / "store", progress=True, **SIZES)
    told = [line for line in capsys.readouterr().err.splitlines() if ": " in line]  # the last line of each stage
    assert [re.sub(r"\d+(\.\d)?", "N", line) for line in told] == [
        f"opening {MODEL}: N s",
        "compiling N serving programs: N s",
        "compiling N training programs: N s",
    ]
    session.add_tenant("kept", LINES)
    session.step(1)
    ref = session.publish("kept")
    session.close()
    session.close()
    with pytest.raises(Unavailable):
        greedy(session, "kept")
    store = AdapterStore(tmp_path / "store", host_bytes=10**8)
    assert store.latest("kept", "kept") == ref == AdapterRef("kept", "kept", 1)
    store.close()


def example(page: str) -> str:
    """The block of a document that opens a session; test_house_docs knows that there is one a page."""
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL) if "Session" in b]
    return code


@pytest.mark.slow
def test_the_example_of_the_notebook_page(tmp_path, monkeypatch, capsys):
    """On the real model: the held-out loss falls, and the saved folder is a PEFT folder."""
    monkeypatch.chdir(tmp_path)
    exec(example("docs/training.md"), {})
    shown = capsys.readouterr().out
    before, after = (float(x) for x in re.findall(r"Evaluation\(nll=([0-9.]+)", shown))
    assert after < before / 2
    assert json.loads((tmp_path / "dates-adapter/adapter_config.json").read_text())["r"] == 16


OPENED = {  # what documents do with a session of their own, done with the one that is open
    'Session.open("smollm2", lanes=2, lane_tokens=96)': "opened",
    'Session.open("smollm2")': "contextlib.nullcontext(opened)",
    '"smollm2"': f'"{MODEL}"',
    "session.close()": "",
}


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_examples_of_the_documents(page, session, tmp_path, monkeypatch, capsys):
    """On the tiny model, where a loss may rise in so few steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in CHATS))
    code = example(page)
    for own, ours in OPENED.items():
        code = code.replace(own, ours)
    exec(code, {"opened": session, "contextlib": contextlib})
    assert capsys.readouterr().out
    assert all(tenant.losses for tenant in session.tenants.values())
    assert ("dates-adapter" in code) == (tmp_path / "dates-adapter/adapter_config.json").exists()
