"""`jaxlora up` that drains its trainer of this name when it is sent SIGUSR1: up_child.py NAME up FILE."""

from __future__ import annotations

import signal
import sys
import threading

from serve.cli.main import main


def drain(name: str) -> None:
    import ray

    from serve.cluster.ray_servers import RayServers

    ray.get(RayServers().keeper()._actor.drain_trainer.remote(name))
    print(f"{name} is drained", file=sys.stderr, flush=True)


if __name__ == "__main__":
    drained = sys.argv.pop(1)
    signal.signal(signal.SIGUSR1, lambda *_: threading.Thread(target=drain, args=(drained,)).start())
    main()
