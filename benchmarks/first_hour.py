"""The first hour, typed at a terminal: from an empty folder to a team's model that answers, and the mistakes on the way.

    uv run python benchmarks/first_hour.py [--out docs/first-hour.md] [--model smollm2]

Every command runs as its own process on a pseudo-terminal, the server too.  Printed: what a reader would see, how long each took,
its exit code and its longest silence.  Exit code 1 when an exit code is not the one expected, or a command that works was
silent for more than 5 s.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST_SILENT_S = 5.0
COLUMNS, LINES = 100, 40
# What a terminal does not print: moves up (1), erased lines (2), other escapes; ends of lines and their beginnings are texts.
ESCAPE = re.compile(r"\x1b\[([0-9]*)A|(\x1b\[2K)|\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][AB0]|\x1b[=>]|\x1b\][^\x07]*\x07")
SERVING = r"serving .* on (http://[0-9.:]+)/v1"


@dataclass(slots=True)
class Terminal:
    """A command on a pseudo-terminal of its own, and what it has printed."""

    command: list[str]
    folder: Path
    env: dict[str, str]
    master: int = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)
    raw: bytearray = field(default_factory=bytearray)
    began: float = 0.0
    heard: float = 0.0  # when it last printed
    silent: float = 0.0  # the longest it printed nothing while it worked
    typed: int = 0  # what had been printed when something was last typed
    reading: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, env=self.env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.began = self.heard = time.monotonic()
        self.reading = threading.Thread(target=self.read, daemon=True)
        self.reading.start()

    def read(self) -> None:
        """Takes what it prints until its end, on a thread of its own."""
        while True:
            readable, _, _ = select.select([self.master], [], [], 0.1)
            now = time.monotonic()
            self.silent = max(self.silent, now - self.heard)
            if not readable:
                continue
            try:
                more = os.read(self.master, 2**16)
            except OSError:  # its end
                return
            if not more:
                return
            self.raw += more
            self.heard = now

    def until(self, pattern: str, within_s: float) -> re.Match[str]:
        """Waits until the text since something was typed has the pattern."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            found = re.search(pattern, plain(bytes(self.raw[self.typed :])))
            if found:
                return found
            if not self.reading.is_alive():
                raise SystemExit(f"{self.command} ended without {pattern!r}:\n{self.text}")
            time.sleep(0.1)
        raise SystemExit(f"{self.command} did not say {pattern!r} in {within_s:.0f} s:\n{self.text}")

    def send(self, text: str) -> None:
        """Types.  Waiting for a person is no silence."""
        self.typed = len(self.raw)
        os.write(self.master, text.encode())
        self.heard = time.monotonic()

    def rest(self) -> None:
        """What it does from now on is measured; a server that nobody asks may be silent."""
        self.heard, self.silent = time.monotonic(), 0.0

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, within_s: float) -> int:
        """Waits for its end; returns the exit code."""
        try:
            self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise SystemExit(f"{self.command} did not end in {within_s:.0f} s:\n{self.text}") from None
        self.reading.join(5)
        return self.process.returncode

    @property
    def text(self) -> str:
        """What a reader sees in the end."""
        return plain(bytes(self.raw))


def plain(raw: bytes) -> str:
    """What a terminal shows in the end: without escapes, and of what was written over the last form."""
    lines, row, column, text = [""], 0, 0, raw.decode(errors="replace")
    place = 0
    while place < len(text):
        escape = ESCAPE.match(text, place)
        if escape:
            place = escape.end()
            if escape[1] is not None:
                row = max(row - int(escape[1] or 1), 0)
            elif escape[2]:
                lines[row] = ""
            continue
        letter, place = text[place], place + 1
        if letter == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif letter == "\r":
            column = 0
        elif letter >= " ":
            lines[row] = lines[row].ljust(column)[:column] + letter + lines[row][column + 1 :]
            column += 1
    return "\n".join(line.rstrip() for line in lines)


class Hour:
    """The session so far."""

    def __init__(self, folder: Path, model: str):
        self.folder, self.model = folder, model
        self.home = folder / "home"
        self.home.mkdir()
        self.env = os.environ | {"HOME": str(self.home), "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
        self.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), self.env["PATH"]])
        self.pages: list[str] = []
        self.wrong: list[str] = []
        self.started: list[Terminal] = []

    def start(self, *words: str) -> Terminal:
        """A command that goes on."""
        self.started.append(Terminal(["jaxlora", *words], self.folder, self.env))
        return self.started[-1]

    def close(self) -> None:
        """Ends what still runs."""
        for terminal in self.started:
            if terminal.process.poll() is None:
                terminal.process.kill()

    def keep(self, terminal: Terminal, code: int | None, wanted: int | None, note: str = "") -> None:
        """Writes a command down and judges it."""
        took = time.monotonic() - terminal.began
        typed = " ".join(terminal.command)
        text = terminal.text.strip("\n")
        lines = text.split("\n")
        if len(lines) > 40:
            lines = [*lines[:28], f"… ({len(lines) - 36} lines)", *lines[-8:]]
        said = f"exit code {code}, " if code is not None else ""
        self.pages.append(
            f"```\n$ {typed}\n"
            + "\n".join(lines).replace(str(self.folder), "~/first").replace(str(ROOT), "~/jaxlora")
            + "\n```\n\n"
            f"_{said}{took:.1f} s, longest silence {terminal.silent:.1f} s{note}_\n"
        )
        print(f"$ {typed}\n{text}\n  [{said}{took:.1f} s, longest silence {terminal.silent:.1f} s]\n", flush=True)
        if wanted is not None and code != wanted:
            self.wrong.append(f"{typed}: exit code {code}, wanted {wanted}")
        if terminal.silent > MOST_SILENT_S:
            self.wrong.append(f"{typed}: silent for {terminal.silent:.1f} s")

    def run(self, *words: str, wanted: int = 0, within_s: float = 300.0) -> str:
        """A command from start to end; returns what it printed."""
        terminal = self.start(*words)
        code = terminal.end(within_s)
        self.keep(terminal, code, wanted)
        return terminal.text

    def title(self, text: str) -> None:
        """A heading."""
        self.pages.append(f"## {text}\n")
        print(f"--- {text}\n", flush=True)


def examples(count: int, start: int = 0) -> list[dict]:
    """Lines of a task that a small model learns: the harbour's shorthand for a berth."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"berth {i % 9 + 1} dock {'ABCD'[i % 4]}"},
                {"role": "assistant", "content": f"{'ABCD'[i % 4]}-{i % 9 + 1:02d}"},
            ]
        }
        for i in range(start, start + count)
    ]


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def the_hour(hour: Hour) -> None:
    """Types it all."""
    folder, model = hour.folder, hour.model
    (folder / "harbor.jsonl").write_text(lines(examples(60)))
    (folder / "harbor.held.jsonl").write_text(lines(examples(8, 60)))
    (folder / "long.jsonl").write_text(lines([*examples(3), {"prompt": "word " * 5000, "completion": "x"}]))
    (folder / "broken.jsonl").write_text(lines(examples(2)) + '{"prompt": 3}\nnot json\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "wrong.toml").write_text(f'slotz = 3\nport = "x"\n[model]\npath = "{model}"\ndtype = "float12"\n')

    hour.title("What is this machine")
    hour.run("doctor")
    hour.title("A server's settings")
    hour.run("init", "serve", "server.toml")
    hour.run("serve", "wrong.toml", wanted=2)
    hour.run("serve", "--model", "smolm2", wanted=2)
    text = (folder / "server.toml").read_text()
    assert model in text, "init's model is the demo's"

    hour.title("Check the data")
    hour.run("files", "check", "harbor.jsonl", "--model", model)
    hour.run("files", "check", "long.jsonl", "--model", model, wanted=1)
    hour.run("files", "check", "broken.jsonl", "--model", model, wanted=1)
    hour.run("files", "check", "empty.jsonl", "--model", model, wanted=1)

    hour.title("Serve")
    server = hour.start("serve", "server.toml", "--port", "0")
    at = ["--url", server.until(SERVING, 300)[1]]
    hour.keep(server, None, None, " so far")
    hour.run("files", "upload", "harbor.jsonl", *at)
    hour.run("files", "upload", "broken.jsonl", *at, wanted=1)

    hour.title("A job by name, and its model asked while it trains")
    job = hour.start("jobs", "create", "harbor.jsonl", "--heldout", "harbor.held.jsonl", "--model", model, "--name", "harbor",
                     "--steps", "24", "--lr", "2e-3", "--follow", *at)  # fmt: skip
    job.until(r"Checkpoint created", 120)
    chat = hour.start("chat", "harbor", *at)
    chat.until(r"harbor>$", 60)
    chat.send("berth 3 dock B\n")
    chat.until(r"\nharbor>$", 30)
    chat.send("/help\n")
    chat.until(r"\nharbor>$", 30)
    chat.send("/exit\n")
    hour.keep(chat, chat.end(30), 0)
    hour.keep(job, job.end(300), 0)
    found = re.search(r"ftjob-[0-9A-Za-z]+", job.text)
    assert found, job.text
    hour.run("jobs", "show", found[0], *at)
    hour.run("jobs", "create", "harbor.jsonl", "--model", model, "--name", "harbor", *at, wanted=2)
    hour.run("jobs", "create", "long.jsonl", "--model", model, "--name", "longish", "--follow", *at, wanted=1)
    hour.run("adapters", "list", *at)
    hour.run("chat", "harbro", *at, wanted=2)

    hour.title("Stop the server while a job runs, start it again")
    more = hour.start("jobs", "create", "harbor.jsonl", "--model", model, "--name", "harbor-2", "--steps", "120", *at)
    hour.keep(more, more.end(60), 0)
    time.sleep(5)
    server.raw.clear()
    server.rest()
    server.interrupt()
    hour.keep(server, server.end(90), 130, " (Ctrl-C)")
    server = hour.start("serve", "server.toml", "--port", "0")
    at = ["--url", server.until(SERVING, 300)[1]]
    hour.run("jobs", "list", *at)
    server.rest()
    server.interrupt()
    hour.keep(server, server.end(90), 130, " (Ctrl-C)")

    hour.title("Train from a file, stop, go on")
    hour.run("init", "train", "train.toml")
    (folder / "mine.toml").write_text(
        f'out = "runs"\nsteps = 40\n[model]\npath = "{model}"\n[[tenant]]\nname = "harbor"\ntrain = "harbor.jsonl"\n'
        'heldout = "harbor.held.jsonl"\nlr = 2e-3\n'
    )
    train = hour.start("train", "mine.toml")
    train.until(r"[4-9]/40", 240)
    train.interrupt()
    hour.keep(train, train.end(90), 130, " (Ctrl-C)")
    hour.run("train", "mine.toml")


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, help="where the transcript is written")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-") as folder:
        hour = Hour(Path(folder), args.model)
        try:
            the_hour(hour)
        finally:
            hour.close()
            if args.out is not None:
                head = "# The first hour, as it was typed\n\nWritten by `benchmarks/first_hour.py`; every command is run as it stands here.\n"
                args.out.write_text("\n".join([head, *hour.pages]))
    for line in hour.wrong:
        print(f"WRONG: {line}")
    return int(bool(hour.wrong))


if __name__ == "__main__":
    sys.exit(main())
