"""A process that a supervisor started: it says where it answers, and ends when its supervisor is gone.  Pure.

The two hold the ends of a socket.  Whatever way the supervisor dies, its end closes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

LOG = logging.getLogger("serve")
SOCKET = "JAXLORA_SUPERVISOR_FD"  # environment variable: the child's end of the socket
LAST_S = 60.0  # for an orderly end after the grace time


def attach(grace_s: float) -> Callable[[str], None]:
    """What to call with the URL once the server answers; without a supervisor it does nothing.

    When the supervisor is gone this process gets SIGTERM, and ends in any case when its grace time and LAST_S are over.
    """
    descriptor = os.environ.pop(SOCKET, None)  # whom we start is not supervised
    if descriptor is None:
        return lambda url: None
    ours = socket.socket(fileno=int(descriptor))
    os.set_inheritable(ours.fileno(), False)

    def watch() -> None:
        with contextlib.suppress(OSError):  # it left before it read what we said
            while ours.recv(1):
                pass
        LOG.error("the supervisor is gone; the server ends")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s + LAST_S)
        os._exit(1)

    threading.Thread(target=watch, name="jaxlora-supervised", daemon=True).start()

    def tell(url: str) -> None:
        with contextlib.suppress(OSError):  # it is gone, and so will we be
            ours.sendall(f"{url}\n".encode())

    return tell
