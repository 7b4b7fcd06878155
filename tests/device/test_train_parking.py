"""Parking: bit for bit in RAM and on disk, within its budget, and nothing lost when the disk fails."""

from __future__ import annotations

import errno

import jax
import numpy as np
import pytest
from train_world import assert_same_bits, examples, host, lora, make_trainer, optimizer, strong_rows

from jaxlora.core.errors import NotFound, StorageFailed
from train.jobs import states as parking_module
from train.jobs.states import Parking
from train.step.optimizer import Moments
from train.step.state import SlotState, fresh_seat


def make_state(seed: int) -> SlotState:
    """Weights and moments far from zero, with the values that are easily lost."""
    state = fresh_seat(strong_rows(lora(5), seed))
    mu = {t: (a + np.float32(seed), b - np.float32(0.0)) for t, (a, b) in state.moments.mu.items()}
    first = mu["q_proj"][0]
    first[0, 0, :4] = [np.nan, -0.0, np.inf, 1e-45]
    return SlotState(rows=state.rows, moments=Moments(mu=mu, nu=state.moments.nu, count=np.int32(seed)))


SIZE = sum(x.nbytes for x in jax.tree.leaves(make_state(1)))


def files(parking: Parking) -> list[str]:
    return sorted(p.name for p in parking.folder.iterdir())


@pytest.mark.parametrize("host_bytes", [0, 10 * SIZE], ids=["disk", "ram"])
def test_states_come_back_bit_for_bit(tmp_path, host_bytes):
    parking = Parking(tmp_path, host_bytes=host_bytes)
    for seed in range(3):
        parking.put(f"job{seed}.state", make_state(seed))
        parking.spill()
    assert parking.ram_bytes == (0 if host_bytes == 0 else 3 * SIZE)
    assert len(files(parking)) == (3 if host_bytes == 0 else 0)
    for seed in range(3):
        assert_same_bits(parking.get(f"job{seed}.state"), make_state(seed))
    parking.put("job1.state", make_state(7))  # in place of the other
    parking.spill()
    assert_same_bits(parking.get("job1.state"), make_state(7))
    for seed in range(3):
        parking.discard(f"job{seed}.state")
    parking.discard("job0.state")  # again: nothing happens
    assert (len(parking), parking.ram_bytes, files(parking)) == (0, 0, [])


def test_the_budget_holds_and_the_least_recently_used_leave_first(tmp_path):
    parking = Parking(tmp_path, host_bytes=2 * SIZE)
    for key in "ab":
        parking.put(key, make_state(1))
    parking.spill()
    assert files(parking) == []
    parking.get("a")
    parking.put("c", make_state(1))
    assert parking.ram_bytes == 3 * SIZE
    parking.spill()
    assert (parking.ram_bytes, files(parking)) == (2 * SIZE, ["b.parked"])
    parking.put("b", make_state(2))  # back in RAM; its file is gone
    parking.spill()
    assert (parking.ram_bytes, files(parking)) == (2 * SIZE, ["a.parked"])
    assert [key in parking for key in "abcd"] == [True, True, True, False]


def test_what_an_earlier_process_left_is_removed(tmp_path):
    (tmp_path / "old.parked").write_bytes(b"x")
    (tmp_path / ".old.parked.123.tmp").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    assert files(Parking(tmp_path, host_bytes=0)) == ["notes.txt"]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    parking = Parking(tmp_path, host_bytes=0)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parking_module, "replace_file", full)
        parking.put("a", make_state(1))
        with pytest.raises(StorageFailed, match="over the limit of 0, and a could not be moved to a file: No space"):
            parking.spill()
    assert (parking.ram_bytes, files(parking)) == (SIZE, [])
    assert_same_bits(parking.get("a"), make_state(1))
    parking.spill()
    assert (parking.ram_bytes, files(parking)) == (0, ["a.parked"])


def test_damage_and_loss_are_noticed(tmp_path):
    parking = Parking(tmp_path, host_bytes=0)
    parking.put("a", make_state(1))
    parking.spill()
    path = tmp_path / "a.parked"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageFailed, match="a is damaged"):
        parking.get("a")
    path.unlink()
    with pytest.raises(StorageFailed, match="a cannot be read: No such file"):
        parking.get("a")
    parking.discard("a")
    with pytest.raises(NotFound, match="nothing is parked as a"):
        parking.get("a")


def test_a_parked_state_takes_its_seat_again(tmp_path):
    """What a trainer gives up and takes back through a file is what it had."""
    trainer, parking = make_trainer(), Parking(tmp_path, host_bytes=0)
    state = make_state(3)
    trainer.add("t", lora(5), optimizer(), examples(1, 3), batch_size=1, seed=1, resume=(state, 3, 3))
    parking.put("t", host(trainer.unseat("t")))
    parking.spill()
    trainer.remove("t")
    trainer.add("t", lora(5), optimizer(), examples(1, 3), batch_size=1, seed=1, resume=(parking.get("t"), 3, 3))
    assert_same_bits(host(trainer.unseat("t")), state)
