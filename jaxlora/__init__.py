"""Base models, adapters and their files; the configuration of training and serving.
Imports pallas_kernels only, and knows no request and no job; it hands out the notebook's `Session`, which lies above.
Folders point one way: core, config and storage, model, checkpoints, peft."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.session import Session


def __getattr__(name: str) -> type[Session]:
    """Returns `Session`, imported when it is first asked for.

    No file of a user's hides the name jaxlora, as a train.py or serve.py beside a script hides those packages.  Raises
    PackageHidden, an ImportError, which says so.
    """
    if name != "Session":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jaxlora.neighbours import check_neighbours

    check_neighbours()
    from serve.session import Session

    return Session
