"""What Ray reads from the environment as it is imported, and its processes after it."""

from __future__ import annotations

import os
import secrets

USAGE_STATS, AUTH_MODE, AUTH_TOKEN = "RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
UV = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"  # under `uv run` makes environments of its own for workers, without our extras
DEDUPLICATES = "RAY_DEDUP_LOGS"  # leaves out what several processes log alike
# Whether other machines may join; without them all of Ray listens on 127.0.0.1.  It works on Linux too.
JOINS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def set_environment(address: str | None) -> None:
    """Has Ray tell nobody that it runs, run workers as we run and pass on all that they log.  Before `import ray`.

    A cluster of our own answers on this machine alone, and to who knows a token.
    address: of a cluster that is there, whose token is for its operator to set; None: one is made.
    """
    for name in (USAGE_STATS, DEDUPLICATES, UV):
        os.environ.setdefault(name, "0")
    if address is None:
        os.environ[JOINS] = "0"
        os.environ[AUTH_MODE], os.environ[AUTH_TOKEN] = "token", secrets.token_hex(32)
