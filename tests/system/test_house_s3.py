"""Object storage that speaks S3's protocol: `tests/run_s3.sh`."""

from __future__ import annotations

import os
import urllib.request
import uuid

import pytest
from store_world import LARGE, put, same

from jaxlora.core.errors import ConfigInvalid, NotFound, StateInvalid
from jaxlora.storage.adapter_store import AdapterStore
from jaxlora.storage.disk_cache import DiskCopies
from jaxlora.storage.followed_adapters import FollowedVersions
from jaxlora.storage.lease import Lease
from jaxlora.storage.object_store import Blobs
from jaxlora.storage.remote_adapters import CHANGES, RemoteVersions

pytestmark = pytest.mark.s3


@pytest.fixture
def url():
    """A place in a bucket of its own."""
    bucket = uuid.uuid4().hex
    server = os.environ["JAXLORA_TEST_S3"]
    urllib.request.urlopen(urllib.request.Request(f"{server}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}/some/prefix"


def test_objects_of_all_sizes_come_back_and_go(url, tmp_path):
    blobs = Blobs(url, timeout_s=20)
    for size in (0, 1, 30_000_000):
        data = os.urandom(size)
        (tmp_path / "file").write_bytes(data)
        blobs.put("files/acme/one", tmp_path / "file")
        blobs.put_folder("folders/one", tmp_path, tmp_path.parent)
        assert blobs.list("files/") == {"files/acme/one": size}
        blobs.get("files/acme/one", tmp_path / "back", tmp_path)
        assert (tmp_path / "back").read_bytes() == data
        (tmp_path / "back").unlink()
        blobs.get_folder("folders/one", tmp_path / "out/one", tmp_path)
        assert (tmp_path / "out/one/file").read_bytes() == data
        (tmp_path / "out/one").rename(tmp_path.parent / f"seen{size}")
    blobs.delete(["files/acme/one", "folders/one.zip", "files/acme/never"])
    assert blobs.list("") == {}
    assert blobs.get_bytes("files/acme/one") is None
    with pytest.raises(NotFound):
        blobs.get("files/acme/one", tmp_path / "back", tmp_path)


def test_more_objects_than_one_answer_lists_or_one_call_removes(url):
    blobs = Blobs(url, timeout_s=60)
    keys = [f"deleted/acme/bot{i}/1" for i in range(1100)]
    for key in keys:
        blobs.put_bytes(key, b"x")
    assert sorted(blobs.list("deleted/")) == sorted(keys)
    blobs.delete(keys)
    assert blobs.list("") == {}


def test_a_missing_bucket_is_refused(url):
    with pytest.raises(ConfigInvalid, match="there is no such bucket"):
        Blobs("s3://" + uuid.uuid4().hex, timeout_s=20)


def test_another_machine_has_what_one_stored(url, tmp_path):
    adapters = []
    for machine in ("one", "two"):
        remote = RemoteVersions(Blobs(url, timeout_s=20), DiskCopies(None))
        store = AdapterStore(tmp_path / machine, host_bytes=LARGE, remote=remote)
        if machine == "one":
            adapters = [put(store), put(store), put(store, name="gone")]
            store.flush()
            store.delete("acme", "gone")
        else:
            assert store.list(None) == [adapters[1].ref]
            assert all(same(store.get(a.ref), a) for a in adapters[:2])
        store.close()


def test_another_process_follows_what_one_stores(url, tmp_path):
    store = AdapterStore(
        tmp_path / "one", host_bytes=LARGE, remote=RemoteVersions(Blobs(url, timeout_s=20), DiskCopies(None))
    )
    first = put(store)
    store.flush()
    blobs = Blobs(url, timeout_s=20, reads=True)
    reader = AdapterStore(
        tmp_path / "two", host_bytes=LARGE, remote=FollowedVersions(blobs, DiskCopies(None)), reads=True
    )
    version = blobs.get_with_version(CHANGES)[1]
    assert blobs.get_if_changed(CHANGES, version) is None
    assert same(reader.get(first.ref), first)
    second = put(store)
    store.flush()
    assert reader.take_news() == [second.ref]
    assert same(reader.get(second.ref), second)
    store.delete("acme", "bot")
    store.flush()
    assert (reader.take_news(), reader.list(None)) == ([], [])
    with pytest.raises(StateInvalid, match="only read here"):
        blobs.put_bytes(CHANGES, b"")
    reader.close()
    store.close()


def test_one_server_at_a_time(url, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlora.storage.lease.SPAN_S", 6.0)
    monkeypatch.setattr("jaxlora.storage.lease.CLOCK_S", 0.2)
    first = Lease(Blobs(url, timeout_s=20), tmp_path / "one")
    with pytest.raises(StateInvalid, match="in use by"):
        Lease(Blobs(url, timeout_s=20), tmp_path / "two")
    first.close()
    Lease(Blobs(url, timeout_s=20), tmp_path / "two").close()
