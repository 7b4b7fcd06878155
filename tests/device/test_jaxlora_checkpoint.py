"""Training state: bit for bit, numbered, never overwritten, placed as asked."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlora.core.errors import AlreadyExists, StateInvalid, StorageFailed
from jaxlora.storage import checkpoints
from jaxlora.storage.checkpoints import read_meta, restore_state, save_state


def make_state(seed: int = 0) -> dict:
    """Every dtype a trainer keeps, with the values that are easily lost: -0.0, the smallest, the largest."""
    key = jax.random.key_data(jax.random.key(seed))
    normal = jax.random.normal(jax.random.key(seed + 1), (3, 5))
    return {
        "pool": {"q_proj": (normal.at[0, 0].set(-0.0).at[0, 1].set(1e-45), normal * 1e30)},
        "moments": [normal.astype(jnp.bfloat16), None],
        "step_S": jnp.array([0, -1, 2**31 - 1], jnp.int32),
        "key": key,
        "done": jnp.array(True),
    }


def same(x, y) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(y) and all(
        p.dtype == q.dtype and p.shape == q.shape and np.asarray(p).tobytes() == np.asarray(q).tobytes()
        for p, q in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    )


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.parametrize("form", [lambda x: x, shapes], ids=["arrays", "shapes"])
def test_round_trip_is_bit_for_bit(form, tmp_path):
    state, meta = make_state(), {"cursor": 12, "loss": 0.1, "name": "ä", "list": [1, None]}
    assert state["key"].dtype == jnp.uint32
    save_state(tmp_path / "run", 7, state, meta)
    restored = restore_state(tmp_path / "run", form(state))
    assert (restored.step, restored.meta) == (7, meta)
    assert same(restored.arrays, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.arrays))


def test_the_newest_meta_is_read_without_the_arrays(tmp_path):
    assert read_meta(tmp_path / "none") is None
    assert read_meta(tmp_path) is None
    for step in (1, 2):
        save_state(tmp_path, step, make_state(), {"cursor": step})
    for file in (tmp_path / "2" / "arrays" / "d").iterdir():
        file.unlink()
    assert read_meta(tmp_path) == {"cursor": 2}
    (tmp_path / "2" / "meta" / "metadata").write_text("{")
    with pytest.raises(StorageFailed, match="meta cannot be read"):
        read_meta(tmp_path)


def test_optimizer_state_keeps_its_structure(tmp_path):
    params = {"a": jnp.ones((2, 3))}
    state = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    save_state(tmp_path, 1, state, {})
    assert same(restore_state(tmp_path, state).arrays, state)


def test_what_cannot_be_held_is_refused(tmp_path):
    for arrays in ({"x": jnp.zeros((0, 4))}, {}):
        with pytest.raises(StateInvalid, match="arrays without elements"):
            save_state(tmp_path, 1, arrays, {})
    assert restore_state(tmp_path, make_state()) is None


def test_nothing_saved(tmp_path):
    assert restore_state(tmp_path / "run", make_state()) is None
    (tmp_path / "run").mkdir()
    assert restore_state(tmp_path / "run", make_state()) is None


def test_newest_is_restored_and_older_are_removed(tmp_path):
    for step in (1, 2, 10):
        save_state(tmp_path, step, make_state(step), {"step": step}, keep=2)
    restored = restore_state(tmp_path, make_state())
    assert restored.step == 10
    assert same(restored.arrays, make_state(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "2"]


def test_a_step_is_never_overwritten(tmp_path):
    save_state(tmp_path, 5, make_state(1), {})
    with pytest.raises(AlreadyExists, match="step 5"):
        save_state(tmp_path, 5, make_state(2), {})
    with pytest.raises(StateInvalid, match="step 4 is older than step 5"):
        save_state(tmp_path, 4, make_state(2), {})
    with pytest.raises(StateInvalid, match="keep must be at least 1"):
        save_state(tmp_path, 6, make_state(2), {}, keep=0)
    assert same(restore_state(tmp_path, make_state()).arrays, make_state(1))


def test_leftovers_of_a_killed_save_are_ignored_and_cleared(tmp_path):
    save_state(tmp_path, 1, make_state(1), {})
    save_state(tmp_path, 2, make_state(2), {})
    (tmp_path / "2").rename(tmp_path / "2.orbax-checkpoint-tmp")
    assert restore_state(tmp_path, make_state()).step == 1
    save_state(tmp_path, 2, make_state(3), {})
    assert same(restore_state(tmp_path, make_state()).arrays, make_state(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "/secret"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: writing \"/secret\" [os_error_code='28']"), "No space left on device"),
        (ValueError("no number"), "no number"),
    ],
    ids=["the system's", "tensorstore's", "another"],
)
def test_failed_save_leaves_the_last_one_and_no_rest(tmp_path, monkeypatch, error, said):
    save_state(tmp_path, 1, make_state(1), {})

    def fail(*_, **__):
        (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp.CheckpointManager, "save", fail)
        with pytest.raises(StorageFailed) as caught:
            save_state(tmp_path, 2, make_state(2), {})
    assert caught.value.message == f"step 2 of {tmp_path.name} could not be written: {said}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
    assert same(restore_state(tmp_path, make_state()).arrays, make_state(1))
    save_state(tmp_path, 2, make_state(2), {})
    assert restore_state(tmp_path, make_state()).step == 2


def test_a_file_that_is_in_the_way_is_an_error_of_the_tree(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageFailed, match="step 1 of run could not be written: File exists"):
        save_state(tmp_path / "run", 1, make_state(), {})


def test_the_best_stays_beside_the_newest(tmp_path):
    for step in range(1, 7):
        save_state(tmp_path, step, make_state(step), {"step": step}, keep=2, best=3 if step >= 3 else None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "5", "6"]
    assert same(restore_state(tmp_path, make_state(), step=3).arrays, make_state(3))
    assert restore_state(tmp_path, make_state(), step=4) is None
    like = jax.tree.map(np.asarray, make_state())
    restored = restore_state(tmp_path, like, step=5).arrays
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert same(restored, make_state(5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"step_S": jnp.zeros(4, jnp.int32)}, r"\['step_S'\]: saved \[\[3\], 'int32'\], wanted \[\[4\]"),
        (lambda s: s | {"step_S": jnp.zeros(3, jnp.float32)}, r"wanted \[\[3\], 'float32'\]"),
        (lambda s: s | {"more": jnp.zeros(3)}, r"\['more'\]: saved nothing"),
        (lambda s: {k: v for k, v in s.items() if k != "key"}, r"\['key'\]: saved .* wanted nothing"),
    ],
    ids=["shape", "dtype", "more", "fewer"],
)
def test_another_configuration_is_refused(change, message, tmp_path):
    save_state(tmp_path, 1, make_state(), {})
    with pytest.raises(StateInvalid, match=message):
        restore_state(tmp_path, change(make_state()))


def test_unknown_format_and_damage(tmp_path):
    save_state(tmp_path, 1, make_state(), {})
    path = tmp_path / "1" / "meta" / "metadata"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"format": 3}))
    with pytest.raises(StorageFailed, match="has format 3; this build reads format 1"):
        restore_state(tmp_path, make_state())
    path.write_text("{")
    with pytest.raises(StorageFailed, match="meta cannot be read"):
        restore_state(tmp_path, make_state())
    path.write_text(text)
    for file in (tmp_path / "1" / "arrays" / "d").iterdir():
        file.unlink()
    with pytest.raises(StorageFailed, match="cannot be read"):
        restore_state(tmp_path, make_state())


def test_arrays_come_back_with_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((len(jax.devices()),), ("slots",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("slots"))
    value = jnp.arange(len(jax.devices()) * 6, dtype=jnp.float32).reshape(-1, 3)
    save_state(tmp_path, 1, {"x": value}, {})
    like = {"x": jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)}
    restored = restore_state(tmp_path, like).arrays
    assert restored["x"].sharding == sharding
    assert same(restored, {"x": value})
    placed = restore_state(tmp_path, {"x": jax.device_put(value, sharding)}).arrays
    assert placed["x"].sharding == sharding
