"""What every test shares: a CPU unless told otherwise, no network, no silent broadcasting, compiled programs kept, Ctrl-C."""

from __future__ import annotations

import os
import signal

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # so in processes of pytest-xdist; ours and their children take Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import jax

from jaxlora import compile_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
compile_cache.enable(None)
