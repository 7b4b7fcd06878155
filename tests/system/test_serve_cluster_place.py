"""Where the processes of `jaxlora up` run, on a Ray cluster of two nodes: the front beside `up`, as its address is told."""

from __future__ import annotations

import importlib.util

import pytest
from ray_world import ray_environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"),
]


def where_class():
    """A class that is pickled as a whole, as workers cannot import a test's modules."""

    class Where:
        def node(self):
            import ray

            return ray.get_runtime_context().get_node_id()

    return Where


@pytest.fixture
def nodes():
    """The identifiers of this process's node and of another one."""
    with ray_environment():
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

    (here, other), where = nodes, where_class()
    assert here != other
    away = ray.remote(where).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(other, soft=False))
    assert ray.get(away.remote().node.remote()) == other
    cluster = RayCluster("joined by the fixture", cpus=0)
    fronts = [cluster.start(f"front-{n}", where, cpus=0, gpus=0, calls=1, here=True) for n in range(4)]
    assert {front.call("node", within_s=60) for front in fronts} == {here}
    servers = [cluster.start(f"server-{n}", where, cpus=1, gpus=0, calls=1) for n in range(2)]
    assert {server.call("node", within_s=60) for server in servers} == {here, other}
