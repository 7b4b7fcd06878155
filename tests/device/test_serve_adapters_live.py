"""Adapters that change under a server's feet: requests that run, those that follow, and pins."""

from __future__ import annotations

import threading
import time

import openai
import pytest
from adapters_world import (
    BASE,
    Shelf,
    answer,
    error_of,
    seeded,
    upload,
    write_files,
    zip_of,
)

pytest_plugins = ["adapters_fixtures"]


# ---- while requests run


class Stream(threading.Thread):
    """A completion that is read while other things happen; an answer of so many tokens is slow enough."""

    def __init__(self, shelf: Shelf, model: str, **extra):
        super().__init__(daemon=True)
        self.client = openai.OpenAI(base_url=shelf.url + "/v1", api_key="root", max_retries=0, timeout=30)
        self.model, self.extra, self.text = model, extra, ""
        self.began = threading.Event()
        self.start()
        assert self.began.wait(20)

    def run(self):
        with self.client:
            for chunk in self.client.completions.create(
                model=self.model,
                prompt=[5, 9, 20],
                max_tokens=48,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, **self.extra},
            ):
                self.text += chunk.choices[0].text
                self.began.set()


@pytest.fixture
def slow(shelf):
    """A step takes a while, so that an answer is under way when something happens."""
    step = shelf.runner.engine.step
    shelf.runner.engine.step = lambda deliver: time.sleep(0.02) or step(deliver)
    yield
    shelf.runner.engine.step = step


@pytest.mark.parametrize("then", ["reload", "unload", "delete the version"])
def test_requests_under_way_end_on_their_version(shelf, root, slow, then, bot):
    folder = write_files(shelf.root / bot, seeded(1))
    body = {"lora_name": bot, "lora_path": str(folder)}
    assert root.post("/v1/load_lora_adapter", json=body).status_code == 200
    whole = answer(root, bot, 48)
    streams = [Stream(shelf, bot) for _ in range(3)]
    if then == "reload":
        write_files(folder, seeded(2))
        assert root.post("/v1/load_lora_adapter", json=body | {"load_inplace": True}).status_code == 200
        assert answer(root, bot, 4) != whole[:4]
    elif then == "unload":
        assert root.post("/v1/unload_lora_adapter", json={"lora_name": bot}).status_code == 200
        write_files(folder, seeded(3))
        assert root.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert answer(root, bot, 4) != whole[:4]
    else:
        assert root.delete(f"/v1/adapters/{bot}@1").status_code == 200
    assert all(s.is_alive() for s in streams)
    for s in streams:
        s.join(30)
        assert s.text == whole
    assert shelf.store._ram._orphans == {}


def test_who_follows_its_adapter_goes_on_under_the_version_that_comes_in(shelf, root, slow, bot):
    folder = write_files(shelf.root / "follow", seeded(1))
    body = {"lora_name": bot, "lora_path": str(folder), "load_inplace": True}
    root.post("/v1/load_lora_adapter", json=body)
    alone = answer(root, bot, 48)
    stream = Stream(shelf, bot, adapter_update="follow")
    write_files(folder, seeded(2))
    assert root.post("/v1/load_lora_adapter", json=body).status_code == 200
    stream.join(30)
    assert stream.text != alone
    assert stream.text[0] == alone[0]  # it began under the first one


# ---- pins


def test_a_pin_holds_for_later_versions_and_falls_with_its_adapter(shelf, root, acme, bot):
    active = shelf.runner.engine.scheduler.active
    upload(acme, bot, zip_of(seeded(1)))
    assert root.post(f"/v1/adapters/acme/{bot}/pin").json()["pinned"] is True
    assert {str(r) for r in active.pinned} == {f"acme/{bot}@1"}
    assert root.post(f"/v1/adapters/{bot}/pin").status_code == 200  # again, by its short name
    upload(acme, bot, zip_of(seeded(2)))
    assert {str(r) for r in active.pinned} == {f"acme/{bot}@2"}
    acme.delete(f"/v1/adapters/{bot}@2")
    assert {str(r) for r in active.pinned} == {f"acme/{bot}@1"}
    for name in ("one", "two"):
        upload(acme, name, zip_of(seeded(3)))
    assert root.post("/v1/adapters/one/pin").status_code == 200
    status, code, message = error_of(root.post("/v1/adapters/two/pin"))
    assert (status, code, message) == (400, "invalid_value", "pin takes at most 2 adapters of 3 active slots, got 3")
    assert root.post("/v1/adapters/one/unpin").json()["pinned"] is False
    acme.delete(f"/v1/adapters/{bot}")
    assert active.pinned == set()
    assert shelf.runner.tuning.pin == ()
    (number,) = [r.version for r in shelf.store.versions("acme", "two")]
    assert root.post(f"/v1/adapters/two@{number}/pin").status_code == 400
    assert root.post(f"/v1/adapters/{BASE}/pin").status_code == 404


def test_of_two_versions_that_come_at_once_the_newer_one_is_pinned(shelf, root, acme, bot, monkeypatch):
    """The older one is slow to be saved: it must not take the pin back when it is."""
    upload(acme, bot, zip_of(seeded(1)))
    root.post(f"/v1/adapters/acme/{bot}/pin")
    wait, held = shelf.store.wait_saved, threading.Event()
    monkeypatch.setattr(shelf.store, "wait_saved", lambda ref, *_: (ref.version == 2 and held.wait(20), wait(ref)))
    with shelf.client("acme") as other:
        slow = threading.Thread(target=upload, args=(other, bot, zip_of(seeded(2))))
        slow.start()
        deadline = time.monotonic() + 10
        while len(shelf.store.versions("acme", bot)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert upload(acme, bot, zip_of(seeded(3))).json()["version"] == 3
        held.set()
        slow.join(20)
    assert {str(r) for r in shelf.runner.engine.scheduler.active.pinned} == {f"acme/{bot}@3"}


def test_a_deletion_that_hangs_in_object_storage_holds_up_no_upload(shelf, acme, bot, monkeypatch):
    upload(acme, bot, zip_of(seeded(1)))
    delete, hanging, held = shelf.store.delete, threading.Event(), threading.Event()

    def hang(tenant, name):
        hanging.set()
        held.wait(30)
        delete(tenant, name)

    monkeypatch.setattr(shelf.store, "delete", hang)
    deleting = threading.Thread(target=shelf.service.delete, args=("acme", bot))
    deleting.start()
    assert hanging.wait(10)
    try:
        with shelf.client("other") as other:
            other.timeout = 10
            assert upload(other, "theirs", zip_of(seeded(2))).status_code == 200
        assert deleting.is_alive()
    finally:
        held.set()
        deleting.join()
    assert shelf.store.versions("acme", bot) == []
