"""What a supervisor starts in tests, in place of a server: it answers /health with a status, and dies or hangs as it is told.

python supervised_child.py FOLDER LIFE…   a child; the first one lives by the first word, the last word is for all others:
    up          well, until a signal
    once:N      well, until it has been looked at; then exit code N
    exit:N      ends with this exit code before it answers
    sick        says 503            silent      says nothing
    mute        never answers       stubborn    says 503 and does not listen to SIGTERM
    patient     well, until a signal: then it says 503 and waits for a second one

What happens to it stands in FOLDER/log.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from serve import supervised

SECOND_SIGNAL_EXIT = 7


def main(folder: Path, lives: list[str]) -> None:
    """One child."""
    log = folder / "log"
    number = log.read_text().count("start") if log.exists() else 0
    kind, _, code = lives[min(number, len(lives) - 1)].partition(":")

    def note(text: str) -> None:
        with log.open("a") as file:
            file.write(f"{text}\n")

    seen: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        note(signal.Signals(number).name)
        seen.append(number)
        if number == signal.SIGHUP or kind == "stubborn" or (kind == "patient" and len(seen) == 1):
            return
        sys.exit(SECOND_SIGNAL_EXIT if kind == "patient" else 0)

    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(one, on_signal)
    supervised.LAST_S = 0.2
    tell = supervised.attach(0.0)
    note(f"start {os.getpid()}")
    if kind == "exit":
        sys.exit(int(code))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if kind != "mute":
            tell(f"http://127.0.0.1:{listener.getsockname()[1]}")
        note("answers")
        while kind in ("silent", "mute"):
            time.sleep(10)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                unwell = kind in ("sick", "stubborn") or seen
                status = "503 Service Unavailable" if unwell else "200 OK"
                connection.sendall(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
            if kind == "once":
                sys.exit(int(code))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
