"""Hostile adapters, row by row of the fault table (A1 to A5, A9 to A12): refused in one shape, nothing changed.

Names and places (A6 to A8) are test_house_faults_places, archives (A6) test_jaxlora_archives, every reason of PEFT's own
test_jaxlora_peft_refused.
"""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import peft_world
import pytest
from adapters_world import (
    BASE,
    SLOTS,
    adapter_files,
    answer,
    error_of,
    seeded,
    upload,
    write_files,
    zip_of,
)

from jaxlora.core.errors import AdapterInvalid
from jaxlora.model.lora_pool import host_rows
from jaxlora.peft.folder import export_peft

pytest_plugins = ["adapters_fixtures"]
KEY = "base_model.model.model.layers.0.self_attn.q_proj"
MIB = 2**20


def with_tensor(key: str, value: np.ndarray) -> dict[str, np.ndarray]:
    return peft_world.plain_tensors() | {key: value}


# ---- A1: pickles


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def canary(tmp_path):
    """(a pickle that makes a folder, the folder)."""
    import pickle  # only here: what our code must never do

    yield pickle.dumps(Canary(str(tmp_path / "canary")))
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("A1")
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors", "weights.pkl"])
@pytest.mark.parametrize("form", ["zip", "files", "alone", "folder"])
def test_a_pickle_is_refused_by_name_and_by_its_first_bytes(shelf, acme, root, unchanged, canary, form, name):
    files = {"adapter_config.json": adapter_files()["adapter_config.json"], name: canary}
    if form == "folder":
        folder = write_files(shelf.root / f"pickle-{name}", files)
        response = root.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(folder)})
        if name == "weights.pkl":
            files = {}
    else:
        body = {"zip": lambda: zip_of(files), "files": lambda: files, "alone": lambda: {name: canary}}[form]()
        response = upload(acme, "x", body)
    status, code, message = error_of(response)
    assert (status, code) == (400, "adapter_invalid")
    if not (form == "alone" and name.endswith("safetensors")):  # that one lacks its config
        assert "pickle weights are not accepted" in message


# ---- A2, A12: values


@pytest.mark.fault("A2", "A12")
@pytest.mark.parametrize(
    ("value", "code"),
    [(np.nan, "adapter_not_finite"), (np.inf, "adapter_not_finite"), (1e30, "adapter_invalid")],
    ids=["NaN", "infinite", "finite bomb"],
)
def test_weights_that_would_make_infinities_are_refused(acme, unchanged, value, code):
    tensors = with_tensor(f"{KEY}.lora_B.weight", np.full((32, 2), value, np.float32))
    assert error_of(upload(acme, "x", zip_of(adapter_files(tensors=tensors))))[:2] == (400, code)


@pytest.mark.fault("A12")
def test_a_huge_A_beside_a_tiny_B_is_refused(acme, unchanged):
    """Their product is small, but what stands between them is not."""
    tensors = with_tensor(f"{KEY}.lora_A.weight", np.full((2, 32), 1e37, np.float32))
    tensors |= {f"{KEY}.lora_B.weight": np.full((32, 2), 1e-38, np.float32)}
    status, code, message = error_of(upload(acme, "x", zip_of(adapter_files(tensors=tensors))))
    assert (status, code) == (400, "adapter_invalid")
    assert "norm(A) is 8e+37, more than 1e+06" in message


@pytest.mark.fault("A12")
@pytest.mark.parametrize("alpha", [1e9, -1e9, 10**400, 1e308])
def test_a_huge_alpha_is_refused(acme, unchanged, alpha):
    status, code, message = error_of(upload(acme, "x", zip_of(adapter_files(lora_alpha=alpha))))
    assert (status, code) == (400, "adapter_invalid")
    assert "lora_alpha must be a number of at most" in message


@pytest.mark.fault("A3")
def test_one_poisoned_slot_reaches_nobody_beside_it(shelf, acme, bot):
    """NaN that gets past every check, as a broken memory would bring it: the others' answers are the same text."""
    names = [f"{bot}-{i}" for i in range(SLOTS)]
    for i, name in enumerate(names):
        upload(acme, name, zip_of(seeded(i)))
    prompts = [tuple(np.random.default_rng(i).integers(1, 126, 20).tolist()) for i in range(6)]
    alone = {n: [answer(acme, n, 12, p) for p in prompts] for n in (*names[1:], BASE)}
    engine = shelf.runner.engine

    def poison():
        ref = shelf.store.latest("acme", names[0])
        rows = host_rows(engine.base.config, engine.pool_spec, shelf.store.get(ref))
        engine._write(engine.slots.find(ref), jax.tree.map(lambda x: np.full_like(x, np.nan), rows))

    answer(acme, names[0], 1)
    shelf.runner.call(poison)
    fresh = [(n, p) for p in range(len(prompts)) for n in (*names, BASE)]

    def ask(pair: tuple[str, int]) -> str:
        with shelf.client("acme") as client:
            body = {"model": pair[0], "prompt": list(prompts[pair[1]]), "max_tokens": 12, "temperature": 0}
            return client.post("/v1/completions", json=body | {"ignore_eos": True}).text

    with ThreadPoolExecutor(8) as pool:
        got = dict(zip(fresh, pool.map(ask, fresh), strict=True))
    for (name, p), body in got.items():
        if name != names[0]:
            assert json.loads(body)["choices"][0]["text"] == alone[name][p], (name, p)


# ---- A4, A5: headers that lie


def header_file(entries: dict, data: bytes = b"") -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(shape, begin=0, end=256, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "rank above its config": (adapter_files(r=1), "tensors have rank 2, config says 1"),
    "rank below its config": (adapter_files(r=8), "tensors have rank 2, config says 8"),
    "rank above the server's": (seeded(1, rank=16), "rank 16 of model.layers.0.self_attn.q_proj exceeds the limit 8"),
    "huge rank": (adapter_files(r=10**9), "r must be an integer in"),
    "rank beyond numbers": (adapter_files(r=10**300), "r must be an integer in"),
    "rank by pattern": (adapter_files(rank_pattern={"q_proj": 2**20}), "config says 1048576"),
    "no such layer": (adapter_files(tensors=peft_world.plain_tensors(layers=(0, 1, 99))), "layers.99.self_attn"),
    "missing": (adapter_files(target_modules=["q_proj", "v_proj", "o_proj"]), "missing tensor: "),
    "extra": (adapter_files(target_modules=["q_proj"]), "unexpected tensor: "),
    "other shape": (adapter_files(tensors=with_tensor(f"{KEY}.lora_A.weight", np.zeros((2, 33), np.float32))), "33"),
}


@pytest.mark.fault("A4")
@pytest.mark.parametrize("name", LIES)
def test_shapes_that_lie_are_refused_with_what_is_wrong(acme, unchanged, name):
    files, message = LIES[name]
    status, _, told = error_of(upload(acme, "x", files))
    assert status == 400
    assert message in told


@pytest.mark.fault("A4")
def test_nothing_is_allocated_before_the_header_is_checked(shelf, root, tmp_path):
    """A server folder with 4 GiB of weights of a rank of a million: a sparse file, so only a reader would notice."""
    folder = write_files(shelf.root / "huge", adapter_files(r=2**20))
    rows = {
        f"{KEY}.lora_A.weight": entry([2**20, 32], 0, 2**27),
        f"{KEY}.lora_B.weight": entry([2**25, 32], 2**27, 2**32 + 2**27),
    }
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(header_file(rows))
        file.truncate(file.tell() + 2**32 + 2**27)
    tracemalloc.start()
    response = root.post("/v1/load_lora_adapter", json={"lora_name": "huge", "lora_path": str(folder)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error_of(response)[0] == 400
    assert "has more than" in response.text
    assert peak < 50 * MIB


BOMBS = {
    "a shape of a hundred thousand axes": header_file({"a": entry([99] * 200_000)}),
    "numbers of four thousand digits": header_file({"a": entry([10**4000] * 8, 0, 10**4000)}),
    "offsets of four thousand digits": header_file({"a": entry([10**4298], 0, 4 * 10**4298)}),
    "numbers beyond what is read": header_file({"a": 0}).replace(b"0}", b"9" * 5000 + b"}"),
    "many tiny tensors": header_file({f"{i}": entry([0], 0, 0) for i in range(14_000)}),
    "deep": (lambda t: len(t).to_bytes(8, "little") + t)(b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}"),
    "a header of 2^60 bytes": (2**60).to_bytes(8, "little") + b"{}",
    "a header over its limit": header_file({"a": "x" * 1_000_001}),
    "a key twice": header_file({"a": entry([64]), "b": entry([64])}, bytes(256)).replace(b'"b"', b'"a"'),
    "overlap": header_file({"a": entry([64]), "b": entry([64])}, bytes(256)),
}


@pytest.mark.fault("A5")
@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_is_a_bomb_is_refused_within_two_seconds(acme, unchanged, name):
    files = adapter_files() | {"adapter_model.safetensors": BOMBS[name]}
    began_s = time.process_time()  # the server is a thread of this process; a busy machine is not its fault
    response = upload(acme, "x", files)
    assert time.process_time() - began_s < 2
    assert error_of(response)[:2] == (400, "adapter_invalid")
    assert len(response.json()["error"]["message"]) < 3000
    assert len(response.content) < MIB


@pytest.mark.fault("A5")
def test_a_file_with_any_bytes_changed_is_read_right_or_refused(tmp_path):
    """Headers and configs, a few bytes at a time: no other error comes out."""
    random, good = np.random.default_rng(11), adapter_files()
    refused = 0
    for i in range(200):
        files = {n: bytearray(d) for n, d in good.items()}
        data = files[list(files)[i % 2]]
        for place in random.integers(0, min(len(data), 900), 1 + i % 4):
            data[place] = (
                random.choice(np.frombuffer(b'"{}[],:0129eE-.\x00\xff', np.uint8)) if i % 3 else random.integers(256)
            )
        write_files(tmp_path, files)
        try:
            peft_world.read_folder(tmp_path)
        except AdapterInvalid:
            refused += 1
    assert refused > 50


# ---- A9: configs and templates


@pytest.mark.fault("A9")
@pytest.mark.parametrize(
    "config",
    [
        b"[" * 500_000,
        b'{"peft_type": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"target_modules": ' + b'["q_proj",' * 300 + b'"v_proj"' + b"]" * 300 + b', "peft_type": "LORA"}',
        b'{"peft_type": "LORA", "peft_type": "LORA"}',
        b'{"peft_type": "LORA", "r": 1' + b"0" * 5000 + b"}",
        b'{"peft_type": "LORA", "lora_alpha": 1e999}',
        b" " * 1_000_001,
        b"\xff\xfe{}",
        b"null",
        b"",
    ],
    ids=["deep", "deep value", "deep list", "twice", "long number", "infinite", "large", "no UTF-8", "null", "empty"],
)
def test_a_hostile_config_is_refused(acme, unchanged, config):
    files = adapter_files() | {"adapter_config.json": config}
    assert error_of(upload(acme, "x", files))[:2] == (400, "adapter_invalid")


@pytest.mark.fault("A9")
def test_code_that_a_config_names_is_not_imported(acme, unchanged, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for field in ("auto_mapping", "auto_map", "parent_library", "custom_module"):
        value = {"base_model_class": "evil.Model", "parent_library": "evil"}
        upload(acme, "evil", adapter_files(**{field: value}))
        acme.delete("/v1/adapters/evil")
    assert not (tmp_path / "imported").exists()


@pytest.mark.fault("A9")
def test_a_template_and_a_tokenizer_that_come_with_an_adapter_are_left_out(shelf, acme, bot):
    files = seeded(1)
    plain = upload(acme, bot, zip_of(files))
    hostile = {"chat_template.jinja": b"{{''.__class__}}", "tokenizer_config.json": b'{"chat_template": "{{1/0}}"}'}
    response = upload(acme, bot, zip_of(files | hostile))
    assert (plain.status_code, response.status_code) == (200, 200)
    assert response.json()["left_out"] == list(hostile)
    assert answer(acme, f"{bot}@1") == answer(acme, f"{bot}@2")
    body = {"model": bot, "messages": [{"role": "user", "content": "x"}], "chat_template": "{{''.__class__}}"}
    assert acme.post("/v1/chat/completions", json=body).status_code == 400


@pytest.mark.fault("A10")
def test_a_gguf_file_is_no_adapter(acme, unchanged):
    """Checkpoints in GGUF are the operator's alone; their offsets are test_jaxlora_gguf's."""
    assert error_of(upload(acme, "x", {"adapter.gguf": b"GGUF" + bytes(100)}))[:2] == (400, "adapter_invalid")


# ---- A11: another base


@pytest.mark.fault("A11")
def test_an_adapter_of_another_base_is_refused_but_for_an_admin_who_knows_better(shelf, acme, root, bot, tmp_path):
    upload(acme, bot, zip_of(seeded(1)))
    adapter = shelf.store.get(shelf.store.latest("acme", bot))
    foreign = type(adapter)(ref=adapter.ref, spec=adapter.spec, base_hash="sha256:other", weights=adapter.weights)
    export_peft(foreign, tmp_path / "out", shelf.runner.engine.base.config, base_name="org/other")
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert error_of(upload(acme, "x", files))[:2] == (400, "base_mismatch")
    assert error_of(upload(acme, "x", files, allow_base_mismatch="true"))[:2] == (403, "insufficient_scope")
    told = upload(root, "acme/x", files, allow_base_mismatch="true").json()
    assert told["base_verified"] is False
    assert told["notes"] == ["the file records another base: only names and shapes were compared"]
    assert answer(acme, "x") == answer(acme, bot)
    folder = str(write_files(shelf.root / "foreign", files))
    body = {"lora_name": "y", "lora_path": folder}
    assert error_of(root.post("/v1/load_lora_adapter", json=body))[:2] == (400, "base_mismatch")
    assert root.post("/v1/load_lora_adapter", json=body | {"allow_base_mismatch": True}).status_code == 200
    files["adapter_model.safetensors"] = seeded(2)["adapter_model.safetensors"]
    assert error_of(upload(root, "z", files, allow_base_mismatch="true"))[:2] == (400, "adapter_invalid")
