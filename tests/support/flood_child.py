"""Loops that post one body over and over, as fast as the answers come, in a process of their own: python flood_child.py URL LOOPS HEADERS

The body comes over stdin.  It prints a line when it begins, and ends with its stdin's writer: at the second line, the count of
answers by status is printed.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
from collections import Counter
from urllib.parse import urlsplit


def main(url: str, loops: int, headers: dict[str, str], body: bytes) -> None:
    """Posts until a line comes."""
    to, answers, over = urlsplit(url), Counter(), threading.Event()

    def loop() -> None:
        connection = http.client.HTTPConnection(to.hostname, to.port, timeout=20)
        while not over.is_set():
            try:
                connection.request("POST", to.path, body, headers)
                answer = connection.getresponse()
                answer.read()
                answers[answer.status] += 1
            except OSError:  # the server has answered and closed before all was sent
                answers[0] += 1
                connection.close()

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(loops)]
    for thread in threads:
        thread.start()
    print("began", flush=True)
    sys.stdin.readline()
    over.set()
    print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    size = int(sys.stdin.buffer.readline())
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.stdin.buffer.read(size))
