"""Adapters over HTTP: vLLM's two routes, ours, and who may do what.  A real engine answers."""

from __future__ import annotations

import io
import time
import zipfile
from dataclasses import replace

import httpx2
import numpy as np
import openai
import peft_world
import pytest
from adapters_world import (
    BASE,
    MEMBERS,
    adapter_files,
    answer,
    error_of,
    fixture_files,
    seeded,
    tar_of,
    upload,
    write_files,
    zip_of,
)
from safetensors.numpy import load

from jaxlora.config.serving import LimitsSection, NamedLimits
from serve.api.adapters import server_folder, service

pytest_plugins = ["adapters_fixtures"]
ON_LLAMA = [n for n in peft_world.ACCEPTED if peft_world.load_fixture(n).base == "llama"]


def ids(response: httpx2.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [entry["id"] for entry in response.json()["data"]]


# ---- in


@pytest.mark.parametrize("name", ON_LLAMA)
def test_a_loaded_folder_answers_as_peft_does(shelf, root, name):
    """The log-probabilities of the fixture's own tokens, to what float32 sums allow."""
    fixture = peft_world.load_fixture(name)
    folder = write_files(shelf.root / name, fixture_files(name))
    response = root.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
    assert (response.status_code, response.text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    assert response.headers["content-type"].startswith("text/plain")
    for tokens, logits in zip(fixture.tokens, fixture.logits, strict=True):
        body = {"model": name, "prompt": tokens.tolist(), "max_tokens": 0, "echo": True, "logprobs": 0}
        told = root.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["token_logprobs"]
        raw = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        raw -= logits.max(-1, keepdims=True)
        wanted = [raw[i, t] for i, t in enumerate(tokens[1:])]
        assert np.abs(np.array(told[1:]) - wanted).max() < 1e-4


@pytest.mark.parametrize("form", ["zip", "stored zip", "tar", "tar.gz", "nested zip", "files", "files with a path"])
def test_every_form_of_an_upload_gives_the_same_adapter(shelf, acme, form, bot):
    files = fixture_files("plain")
    body = {
        "zip": lambda: zip_of(files | {"README.md": b"# x"}),
        "stored zip": lambda: zip_of(files, zipfile.ZIP_STORED),
        "tar": lambda: tar_of({f"./{n}": d for n, d in files.items()}),
        "tar.gz": lambda: tar_of(files, "w:gz"),
        "nested zip": lambda: zip_of({f"my adapter/{n}": d for n, d in files.items()} | {"__MACOSX/._x": b"?"}),
        "files": lambda: files,
        "files with a path": lambda: {f"C:\\x\\{n}": d for n, d in files.items()} | {"README.md": b"# x"},
    }[form]()
    response = upload(acme, bot, body)
    assert response.status_code == 200, response.text
    told = response.json()
    assert (told["object"], told["name"], told["tenant"], told["version"]) == ("adapter", bot, "acme", 1)
    assert told["base_verified"] is False
    assert told["left_out"] == {"zip": ["README.md"], "nested zip": ["._x"], "files with a path": ["README.md"]}.get(
        form, []
    )
    truth = peft_world.load_fixture("plain").modules
    assert {m["module"]: [m["rank"], m["scale"]] for m in told["modules"]} == truth
    wanted, _ = peft_world.read_folder(peft_world.FIXTURES / "accepted" / "plain")
    got = shelf.store.get(shelf.store.latest("acme", bot))
    assert got.spec == wanted.spec
    assert all(
        np.array_equal(x, y) for t in wanted.weights for x, y in zip(got.weights[t], wanted.weights[t], strict=True)
    )


def test_an_upload_under_a_name_that_is_taken_is_its_next_version(shelf, acme, bot):
    assert [upload(acme, bot, zip_of(seeded(i))).json()["version"] for i in (1, 2)] == [1, 2]
    assert answer(acme, bot) == answer(acme, f"{bot}@2") != answer(acme, f"{bot}@1")
    versions = acme.get(f"/v1/adapters/{bot}/versions")
    assert ids(versions) == [f"{bot}@2", f"{bot}@1"]
    assert ids(acme.get(f"/v1/adapters/{bot}/versions?limit=1&after={bot}@2")) == [f"{bot}@1"]


def test_what_is_answered_is_on_disk_and_survives_a_kill(shelf, acme, bot):
    upload(acme, bot, zip_of(seeded(1)))
    folder = shelf.store._files._root / f"adapters/acme/{bot}/1"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["meta", "weights"]


def test_a_download_goes_in_again_and_is_of_this_base(shelf, acme, root, bot):
    upload(acme, bot, zip_of(fixture_files("rank-pattern")))
    response = acme.get(f"/v1/adapters/{bot}@1/download")
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == f'attachment; filename="{bot}-1.zip"'
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors", "jaxlora.json"]
        weights = load(archive.read("adapter_model.safetensors"))
    original = load(fixture_files("rank-pattern")["adapter_model.safetensors"])
    assert all(np.array_equal(weights[k], original[k]) for k in original)
    again = upload(acme, bot, response.content)
    assert (again.json()["version"], again.json()["base_verified"]) == (2, True)
    assert answer(acme, f"{bot}@1") == answer(acme, f"{bot}@2")
    half = acme.get(f"/v1/adapters/{bot}/download?dtype=bfloat16")
    assert len(half.content) < 0.8 * len(response.content)
    assert error_of(acme.get(f"/v1/adapters/{bot}/download?dtype=int8"))[:2] == (400, "invalid_value")


# ---- lists


def test_lists_are_paged_by_id_newest_first(shelf, acme, zoo, root, monkeypatch):
    clock = iter(range(1000, 2000))
    monkeypatch.setattr("jaxlora.storage.adapter_store.time.time", lambda: next(clock))
    for name in ("one", "two", "three"):
        upload(acme, name, zip_of(adapter_files()))
    upload(zoo, "two", zip_of(adapter_files()))
    assert ids(acme.get("/v1/adapters")) == ["three", "two", "one"]
    page = acme.get("/v1/adapters?limit=2").json()
    assert (page["has_more"], page["last_id"]) == (True, "two")
    assert ids(acme.get("/v1/adapters?limit=2&after=two")) == ["one"]
    assert ids(acme.get("/v1/adapters?prefix=t")) == ["three", "two"]
    assert ids(root.get("/v1/adapters")) == ["zoo/two", "three", "acme/two", "one"]
    assert ids(zoo.get("/v1/adapters")) == ["two"]
    for wrong in ("after=nobody", "limit=0", "limit=1001", "limit=x", "order=asc"):
        assert acme.get(f"/v1/adapters?{wrong}").status_code == 400, wrong


# ---- away


def test_a_deleted_name_is_free_at_once_and_says_something_else(shelf, root, acme, bot):
    upload(acme, bot, zip_of(seeded(1)))
    first = answer(acme, bot)
    assert acme.delete(f"/v1/adapters/{bot}").json() == {"id": bot, "object": "adapter", "deleted": True}
    assert error_of(acme.get(f"/v1/adapters/{bot}"))[:2] == (404, "model_not_found")
    assert error_of(acme.post("/v1/completions", json={"model": bot, "prompt": "x"}))[0] == 404
    assert upload(acme, bot, zip_of(seeded(2))).json()["version"] == 2
    assert answer(acme, bot) != first


def test_a_version_is_deleted_alone(shelf, acme, bot):
    for i in (1, 2, 3):
        upload(acme, bot, zip_of(seeded(i)))
    second = answer(acme, f"{bot}@2")
    assert acme.delete(f"/v1/adapters/{bot}@3").json()["id"] == f"{bot}@3"
    assert ids(acme.get(f"/v1/adapters/{bot}/versions")) == [f"{bot}@2", f"{bot}@1"]
    assert answer(acme, bot) == second
    assert acme.delete(f"/v1/adapters/{bot}@3").status_code == 404
    assert ("acme", bot) not in shelf.deleted


def test_openai_s_client_deletes_a_model_and_not_the_base(shelf, acme, bot):
    upload(acme, bot, zip_of(seeded(1)))
    with openai.OpenAI(base_url=shelf.url + "/v1", api_key="acme", max_retries=0) as client:
        deleted = client.models.delete(bot)
        assert (deleted.id, deleted.object, deleted.deleted) == (bot, "model", True)
        assert ("acme", bot) in shelf.deleted
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.delete(bot)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="is the base model, which stays"):
            client.models.delete(BASE)


# ---- vLLM's table of cases


def load_lora(client: httpx2.Client, **body) -> tuple[int, str, str]:
    return error_of(client.post("/v1/load_lora_adapter", json=body))


def test_the_cases_of_vllm(shelf, root):
    folder = str(write_files(shelf.root / "good", seeded(1)))
    bad = str(write_files(shelf.root / "bad", adapter_files(use_dora=True)))
    for empty in ({"lora_name": "", "lora_path": folder}, {"lora_name": "a", "lora_path": ""}):
        assert load_lora(root, **empty) == (400, "invalid_value", "Both 'lora_name' and 'lora_path' must be provided.")
    assert load_lora(root, lora_path=folder) == (400, "invalid_value", "lora_name is required")
    assert load_lora(root, lora_name=BASE, lora_path=folder)[0] == 400
    assert load_lora(root, lora_name="a", lora_path=str(shelf.root / "none"))[:2] == (404, "not_found")
    status, code, message = load_lora(root, lora_name="a", lora_path=bad)
    assert (status, code) == (400, "adapter_invalid")
    assert "DoRA adapters are not supported" in message
    assert shelf.store.list(None) == []
    good = {"lora_name": "a", "lora_path": folder}
    assert root.post("/v1/load_lora_adapter", json=good | {"is_3d_lora_weight": False}).status_code == 200
    status, code, message = load_lora(root, **good)
    assert (status, code) == (400, "invalid_value")
    assert "has already been loaded" in message
    assert "load_inplace" in message
    assert load_lora(root, **good, is_3d_lora_weight=True)[:2] == (400, "unsupported_parameter")
    assert load_lora(root, **good, hub="x")[:2] == (400, "unknown_parameter")
    assert (
        root.post("/v1/load_lora_adapter", content=b"{", headers={"content-type": "application/json"}).status_code
        == 400
    )
    response = root.post("/v1/unload_lora_adapter", json={"lora_name": "a", "lora_int_id": None})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    for name, status in (("a", 404), ("", 400), ("a@1", 400), (BASE, 400)):
        assert root.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == status, name


def test_a_reload_in_place_is_a_new_version_and_one_that_fails_changes_nothing(shelf, root, bot):
    folder = write_files(shelf.root / "place", seeded(1))
    body = {"lora_name": f"acme/{bot}", "lora_path": str(folder), "load_inplace": True}
    assert root.post("/v1/load_lora_adapter", json=body).status_code == 200
    before = answer(root, bot)
    write_files(folder, adapter_files(tensors=peft_world.plain_tensors() | {"x": np.zeros(3, np.float32)}))
    assert load_lora(root, **body)[:2] == (400, "adapter_invalid")
    assert answer(root, bot) == before
    write_files(folder, seeded(2))
    assert root.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert answer(root, bot) != before  # the prompt's pages were cached under the old version
    assert answer(root, f"{bot}@1") == before
    assert [r.version for r in shelf.store.versions("acme", bot)] == [1, 2]


def test_what_is_swapped_for_a_link_after_the_check_is_not_read(shelf, root, tmp_path, monkeypatch):
    """Who may write below a root puts a link to another's file there, just before the file is opened or read."""
    folder, outside = shelf.root / "swap", write_files(tmp_path / "outside", seeded(2))
    weights = folder / MEMBERS[1]

    def swap() -> None:
        weights.unlink()
        weights.symlink_to(outside / MEMBERS[1])

    def loaded(name: str) -> dict:
        body = {"lora_name": name, "lora_path": str(folder)}
        assert root.post("/v1/load_lora_adapter", json=body).status_code == 200
        return shelf.store.get(shelf.store.latest("root", name)).weights

    write_files(folder, seeded(1))
    wanted = loaded("plain")
    with monkeypatch.context() as patched:
        read = service.import_peft
        patched.setattr(service, "import_peft", lambda *a, **k: (swap(), read(*a, **k))[1])
        got = loaded("read")
    assert all(np.array_equal(x, y) for t in wanted for x, y in zip(wanted[t], got[t], strict=True))
    weights.unlink()
    write_files(folder, seeded(1))
    opened = server_folder.open_inside
    monkeypatch.setattr(server_folder, "open_inside", lambda r, p: (p == weights and swap(), opened(r, p))[1])
    assert load_lora(root, lora_name="opened", lora_path=str(folder))[0] == 404
    assert shelf.store.latest("root", "opened") is None


@pytest.mark.parametrize("part", ["folder", "file"])
def test_a_way_with_a_link_in_it_is_not_opened(tmp_path, part):
    inside, outside = tmp_path / "root" / "a" / "b", tmp_path / "outside"
    for place in (inside, outside):
        place.mkdir(parents=True)
        (place / "file").write_bytes(place.name.encode())
    with open(server_folder.open_inside(tmp_path / "root", inside / "file"), "rb") as file:
        assert file.read() == b"b"
    if part == "file":
        (inside / "file").unlink()
        (inside / "file").symlink_to(outside / "file")
    else:
        inside.rename(tmp_path / "away")
        inside.symlink_to(outside)
    with pytest.raises(OSError, match=r"symbolic link|Not a directory"):
        server_folder.open_inside(tmp_path / "root", inside / "file")


# ---- who may


ADMINS = [
    ("POST", "/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/x"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "bot"}),
    ("POST", "/v1/adapters/bot/pin", None),
    ("POST", "/v1/adapters/bot/unpin", None),
]


@pytest.mark.parametrize(("method", "path", "body"), ADMINS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_tenant_s_key_does_nothing_that_is_an_admin_s(shelf, acme, method, path, body, bot):
    upload(acme, bot, zip_of(seeded(1)))
    assert error_of(acme.request(method, path, json=body))[:2] == (403, "insufficient_scope")
    assert len(shelf.store.list(None)) == 1


OF_ONE = [
    ("GET", "/v1/adapters/{}"),
    ("GET", "/v1/adapters/{}/versions"),
    ("GET", "/v1/adapters/{}@1"),
    ("GET", "/v1/adapters/{}@1/download"),
    ("GET", "/v1/adapters/{}/download"),
    ("DELETE", "/v1/adapters/{}"),
    ("DELETE", "/v1/adapters/{}@1"),
    ("DELETE", "/v1/models/{}"),
    ("GET", "/v1/models/{}"),
]


@pytest.mark.parametrize(("method", "path"), OF_ONE)
def test_another_tenant_s_adapter_is_the_404_of_an_unknown_one_T1(shelf, acme, zoo, method, path, bot):
    upload(acme, bot, zip_of(seeded(1)))
    for name, unknown in ((bot, "none"), (f"acme/{bot}", "acme/none")):
        theirs, nobodys = (zoo.request(method, path.format(n)) for n in (name, unknown))
        assert theirs.status_code == nobodys.status_code == 404
        assert theirs.text.replace(name, unknown) == nobodys.text
    assert [str(r) for r in shelf.store.list(None)] == [f"acme/{bot}@1"]
    assert upload(zoo, f"acme/{bot}", zip_of(seeded(1))).status_code == 403
    assert upload(acme, f"acme/{bot}", zip_of(seeded(1))).json()["version"] == 2


def test_an_admin_uploads_for_a_tenant_and_names_it(shelf, root, acme, bot):
    told = upload(root, f"acme/{bot}", zip_of(seeded(1))).json()
    assert (told["id"], told["tenant"], told["name"]) == (f"acme/{bot}@1", "acme", bot)
    assert ids(acme.get("/v1/adapters")) == [bot]
    assert root.get(f"/v1/adapters/acme/{bot}@1").json()["version"] == 1


def test_no_key_no_answer(shelf, bot):
    with httpx2.Client(base_url=shelf.url, timeout=10) as client:
        for method, path in [
            *((m, p) for m, p, _ in ADMINS),
            *OF_ONE,
            ("GET", "/v1/adapters"),
            ("POST", "/v1/adapters"),
        ]:
            assert client.request(method, path.format(bot)).status_code == 401, path


# ---- limits


def test_a_full_tenant_gets_no_new_name_and_still_new_versions(shelf, acme, bot):
    upload(acme, bot, zip_of(seeded(1)))
    shelf.quota.limits = LimitsSection(adapters=1)
    response = upload(acme, "another", zip_of(seeded(1)))
    assert error_of(response)[:2] == (429, "insufficient_quota")
    assert response.headers["x-should-retry"] == "false"
    assert upload(acme, bot, zip_of(seeded(2))).json()["version"] == 2


def test_bytes_of_all_versions_are_bounded(shelf, acme, root, zoo, bot):
    upload(acme, bot, zip_of(seeded(1)))
    each = shelf.store.get(shelf.store.latest("acme", bot)).nbytes
    write_files(shelf.root / bot, seeded(3))
    shelf.quota.limits = LimitsSection(tenant=(NamedLimits(name="acme", adapter_bytes=3 * each - 1),))
    assert upload(acme, bot, zip_of(seeded(2))).status_code == 200
    load = {"lora_name": f"acme/{bot}", "lora_path": str(shelf.root / bot), "load_inplace": True}
    for response in (
        upload(acme, bot, zip_of(seeded(2))),
        upload(acme, "another", zip_of(seeded(2))),
        root.post("/v1/load_lora_adapter", json=load),
    ):
        status, code, message = error_of(response)
        assert (status, code) == (429, "insufficient_quota")
        assert f"{3 * each - 1} bytes together; {each - 1} are left, and this one has {each}" in message
        assert response.headers["x-should-retry"] == "false"
    assert len(shelf.store.versions("acme", bot)) == 2
    assert upload(zoo, bot, zip_of(seeded(2))).status_code == 200
    acme.delete(f"/v1/adapters/{bot}@1")
    assert root.post("/v1/load_lora_adapter", json=load).status_code == 200


@pytest.mark.parametrize("limit", ["MAX_TRANSFERS", "MAX_TRANSFERS_OF_TENANT"])
def test_only_so_many_uploads_at_once(shelf, acme, monkeypatch, limit):
    monkeypatch.setattr(f"serve.api.adapters.routes.{limit}", 0)
    response = upload(acme, "bot", zip_of(seeded(1)))
    assert error_of(response)[:2] == (503, "overloaded")
    assert int(response.headers["retry-after"]) >= 1


def test_a_download_that_nobody_reads_ends_and_gives_its_place_back(shelf, acme, bot, monkeypatch, caplog):
    """The file is larger than what the sockets hold, so that the server must wait for the client."""
    upload(acme, bot, zip_of(seeded(1)))
    export, size = shelf.service.export, 2**25

    def large(*args):
        exported = export(*args)
        exported.file.close()
        return replace(exported, file=io.BytesIO(bytes(size)), nbytes=size)

    monkeypatch.setattr(shelf.service, "export", large)
    monkeypatch.setattr("serve.api.adapters.routes.MAX_TRANSFERS_OF_TENANT", 1)
    path = f"/v1/adapters/{bot}/download"
    with acme.stream("GET", path, headers={"x-request-timeout-s": "0.5"}) as response:
        assert response.headers["content-length"] == str(size)
        assert acme.get(path).status_code == 503
        time.sleep(0.7)
        with pytest.raises(httpx2.RemoteProtocolError):
            response.read()
    assert len(acme.get(path).content) == size


FORMS = {
    "name": {"file": ("a.zip", b"x")},
    "file": {"name": (None, b"bot")},
    "mode": {"name": (None, b"bot"), "mode": (None, b"x"), "file": ("a.zip", b"x")},
    "weights": {"name": (None, b"bot"), "weights": ("a.zip", b"x")},
    "allow_base_mismatch": {"name": (None, b"bot"), "file": ("a", b"x"), "allow_base_mismatch": (None, b"yes")},
}


@pytest.mark.parametrize("field", FORMS)
def test_a_form_is_taken_as_it_is_meant_or_refused_by_field(shelf, acme, field):
    response = acme.post("/v1/adapters", files=FORMS[field])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x\r\n",
        b"not a form",
        b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nbot',
        b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\n\xff\xfe\r\n--x--\r\n',
        b"--x\r\nA: " + b"b" * 100_000 + b"\r\n\r\n--x--\r\n",
        b"--x\r\nA: b\r\n\r\n--x--\r\n",
    ],
    ids=["empty", "begun", "no form", "cut", "no UTF-8", "long header", "no name"],
)
def test_a_body_that_is_no_form_is_refused(shelf, acme, body):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(acme.post("/v1/adapters", content=body, headers=headers))[0] == 400
    assert error_of(acme.post("/v1/adapters", json={"name": "bot"}))[0] == 400
