"""Each app that tests serve, behind the front of a cluster whose three replicas and keeper it is: `pytest --through-front`.

What goes between the front and a server is pickled, as between processes.  Servers that a test starts as processes of
their own have no front.
"""

from __future__ import annotations

import pickle
from dataclasses import replace

from fastapi import FastAPI

from jaxlora.config.cluster import RouterSection
from serve.access.body_rate import BodyRate
from serve.cluster.answers import answered
from serve.cluster.relay import Peers, Relay
from serve.cluster.replica_view import Report
from serve.cluster.router import Router
from serve.http.errors import ErrorShapes
from serve.http.json_bodies import JsonBodies
from serve.server.app import MOST_VALUES
from serve.server.gate import Gate

IDLE = Report(asked_s=0.0, slots=2, rows=4, running_rows=0, running_tokens=0, waiting_tokens=0, adapters={})


def copied(value):
    return pickle.loads(pickle.dumps(value))


class AppPeer:
    """A server of the cluster: the app."""

    def __init__(self, app):
        self.app = app

    async def answer(self, scope, body):
        body = [part if isinstance(part, bytes) else await part for part in body]
        async for messages in answered(self.app, copied(scope), copied(body)):
            yield copied(messages)


def in_front(app):
    """The front before an app of ours; another app as it is."""
    if not isinstance(app, FastAPI):
        return app
    config = next(one.kwargs["config"] for one in app.user_middleware if one.cls is Gate)
    peers = Peers(Router(RouterSection()))
    for name in "abc":
        peers.report(name, AppPeer(app), IDLE)
    peers.keeper = AppPeer(app)

    async def keep(data):
        async def part():
            return data

        return part()

    async def find(model):
        return None

    relay = Relay(peers, base_name="base", default_max_tokens=config.default_max_tokens, keep=keep, find=find)
    rate, uploads = BodyRate(config.limits.json_bytes_per_second), config.body_limits.keys()
    bodies = JsonBodies(relay, rate=rate, uploads=uploads, most_values=MOST_VALUES)
    return Gate(bodies, replace(config, routers=(), listeners=()), ErrorShapes(config.error_shapes))
