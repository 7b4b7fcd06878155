"""Where the processes of `jaxlora up` run, on a Ray cluster of two nodes: the front beside `up`, as its address is told."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]


class Where:
    """Tells on which node it is."""

    def node(self):
        import ray

        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def nodes(monkeypatch):
    """The identifiers of this process's node and of another one."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 2**27}
    cluster = Cluster(initialize_head=True, head_node_args=options | {"include_dashboard": False})
    try:
        other = cluster.add_node(**options)
        ray.init(cluster.address, namespace="jaxlora")
        yield ray.get_runtime_context().get_node_id(), other.node_id
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_what_must_be_here_is_here_though_another_node_is_free(nodes):
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from serve.cluster.ray_servers import RayCluster

    here, other = nodes
    assert here != other
    away = ray.remote(Where).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(other, soft=False))
    assert ray.get(away.remote().node.remote()) == other
    cluster = RayCluster("joined by the fixture", cpus=0)
    fronts = [cluster.start(f"front-{n}", Where, cpus=0, gpus=0, calls=1, here=True) for n in range(4)]
    assert {front.call("node", within_s=60) for front in fronts} == {here}
    servers = [cluster.start(f"server-{n}", Where, cpus=1, gpus=0, calls=1) for n in range(2)]
    assert {server.call("node", within_s=60) for server in servers} == {here, other}
