"""`jaxlora chat` over real HTTP: from a pipe, and from a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from fake_backend import BASE

from jaxlora.core.errors import InvalidRequest
from serve.cli import chat
from serve.cli.chat_columns import Columns
from serve.cli.http_client import AnswerFailed, Model

pytest_plugins = ["wire_fixtures"]
ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "support"
FOREIGN = "ft:base:acme:x:1"


def told(request) -> str:
    """The messages of a request, as the fake template writes them."""
    return bytes(t for t in request.prompt if t < 256).decode()


@pytest.fixture
def talk(running, backend, monkeypatch, capsys):
    """(lines, adapter) → what was printed, from a pipe; also `talk.out`, and `talk.errors` of stderr."""

    def run(*lines: str, name: str | None = ADAPTER) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        try:
            chat.main(url=running[1], key=None, name=name)
        finally:
            run.out, run.errors = capsys.readouterr()
        return run.out

    return run


def test_a_pipe_gets_plain_lines_and_a_conversation_is_kept(talk, backend):
    backend.reply = lambda request: f"answer {len(backend.requests)}"
    assert talk("one", "two", "/reset", "three") == "answer 1\nanswer 2\nanswer 3\n"
    conversations = [told(r) for r in backend.requests]
    assert conversations == [
        "user:oneassistant:",
        "user:oneassistant:answer 1user:twoassistant:",
        "user:threeassistant:",
    ]
    assert {r.adapter.name for r in backend.requests} == {ADAPTER}
    assert talk.errors == ""


def test_the_base_answers_where_no_adapter_is_named(talk, backend):
    talk("hi", f"/use {ADAPTER}@3", "hi", "/use " + BASE, "hi", name=None)
    assert [r.adapter and (r.adapter.name, r.adapter.version) for r in backend.requests] == [None, (ADAPTER, 3), None]


def test_settings_and_system_text_go_with_every_request(talk, backend):
    out = talk(
        "/set temperature=0.25 max_tokens=9 stop=Z", "/set", "/system Be brief", "a", "/set stop= seed=4", "b", "/set"
    )
    first, second = backend.requests
    assert (first.params.temperature, first.params.max_tokens, first.params.stop) == (0.25, 9, ("Z",))
    assert (second.params.temperature, second.params.seed, second.params.stop) == (0.25, 4, ())
    assert told(first) == "system:Be briefuser:aassistant:"
    assert 'temperature=0.25 top_p=0.9 max_tokens=9 stop="Z"\n' in out
    assert out.endswith("temperature=0.25 top_p=0.9 max_tokens=9 seed=4\n")


def test_what_nobody_sets_suits_a_small_model_and_can_be_left_to_the_server(talk, backend):
    assert talk("/set", "a", "/set temperature= top_p=", "/set", "b").startswith("temperature=0.2 top_p=0.9\n")
    assert "nothing is set\n" in talk.out
    assert [(r.params.temperature, r.params.top_p) for r in backend.requests] == [(0.2, 0.9), (1.0, 1.0)]


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        (["/help", ""], BASE),
        (["/adapters support", "2"], ADAPTER),
        (["/hepl", "3", "0"], BASE),
        (["support@3"], "support@3"),
        (["/help", "/quit"], None),
        (["/what"], None),  # and then the end of the input
    ],
)
def test_help_is_there_before_anything_is_chosen(said, chosen, monkeypatch, capsys):
    models = [Model(BASE, None, None, None, ""), Model("a", BASE, 1, 8, "host"), Model(ADAPTER, BASE, 7, 8, "host")]
    answers = iter(said)

    def read(prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert chat.pick(models) == chosen
    out = capsys.readouterr().out
    assert ("nothing means the base" in out) == ("/help" in said)
    assert ("there is no command /hepl; did you mean /help? /help lists them\n" in out) == ("/hepl" in said)
    assert ("there is no command /what; /help lists them\n" in out) == ("/what" in said)
    assert ("there is no number 3; the last is 2\n" in out) == ("3" in said)
    assert out.count(f"  2  {ADAPTER}") == 1 + ("/adapters support" in said)


def test_the_adapters_are_listed(talk, backend, monkeypatch):
    assert talk("/adapters").splitlines() == [
        f"    0  {BASE}  (base)",
        f"    1  {FOREIGN}  (version 2, rank 16, on host)",
        f"*   2  {ADAPTER}  (version 7, rank 16, on host)",
    ]
    assert talk("/adapters acme").splitlines() == [f"    1  {FOREIGN}  (version 2, rank 16, on host)"]
    monkeypatch.setattr(chat, "SHOWN", 1)
    assert "  and 2 more; /adapters TEXT lists those" in talk("/adapters")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/use nobody", "error: The model `nobody` does not exist.\n"),
        ("/use suport", "error: The model `suport` does not exist. Did you mean support?\n"),
        ("/use", "error: /use needs a name; /adapters lists them\n"),
        ("/nonsense x", "error: there is no command /nonsense; /help lists them\n"),
        ("/comapre x", "error: there is no command /comapre; did you mean /compare? /help lists them\n"),
        ("/set temperature", "error: /set takes NAME=VALUE, got temperature\n"),
        ("/set model=x", "error: model is not a setting; /help lists what changes it\n"),
        ("/compare", "error: /compare needs a question\n"),
    ],
)
def test_an_error_is_one_line_and_the_rest_goes_on(talk, backend, line, error):
    with pytest.raises(AnswerFailed, match="1 of the lines failed"):
        talk(line, "hi")
    assert talk.errors == error
    assert len(backend.requests) == 1


def test_what_the_server_refuses_is_told_and_forgotten(talk, backend):
    backend.reply = lambda request: "yes"
    with pytest.raises(AnswerFailed):
        talk("/set temperature=99", "hot", "/set temperature=", "cold")
    assert talk.errors.startswith("error: temperature")
    assert talk.errors.count("\n") == 1
    assert [told(r) for r in backend.requests] == ["user:coldassistant:"]


def test_an_error_in_the_middle_of_an_answer_is_told_after_what_was_said(talk, backend):
    backend.reply = lambda request: "all of it"
    backend.fail_after, backend.failure = 3, InvalidRequest("enough\nof it")
    with pytest.raises(AnswerFailed):
        talk("one", "two")
    assert talk.out == "all\nall\n"
    assert talk.errors == "error: enough of it\n" * 2
    assert told(backend.requests[1]) == "user:oneassistant:alluser:twoassistant:"


@pytest.mark.fault("T11")
def test_an_answer_cannot_steer_the_terminal(talk, backend):
    backend.reply = lambda request: "a\x1b[2J\x07b"
    assert talk("hi") == "a�[2J�b\n"


def test_base_and_adapter_stand_side_by_side(talk, backend, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    backend.reply = lambda request: "the base says a lot more" if request.adapter is None else "日本語"
    out = talk("/compare what?", "again")
    assert out.splitlines() == [
        f"{BASE:<18} │ {ADAPTER}",
        "─" * 39,
        "the base says a    │ 日本語",
        "lot more           │",
        "日本語",
    ]
    assert sorted(told(r) for r in backend.requests) == ["user:againassistant:"] + ["user:what?assistant:"] * 2


def test_comparing_the_base_with_itself_is_refused(talk, backend):
    with pytest.raises(AnswerFailed):
        talk("/compare x", name=None)
    assert talk.errors == "error: you are talking to the base; choose an adapter with /use\n"


def test_an_error_of_one_column_is_one_line(talk, backend):
    backend.reply = lambda request: "abcdefgh"
    backend.fail_after, backend.failure = 5, InvalidRequest("no more")
    with pytest.raises(AnswerFailed):
        talk("/compare x")
    assert talk.errors == "error: no more\n"
    assert re.search(r"\babcde\b", talk.out)


def test_rows_are_printed_once_and_what_is_left_when_it_ends(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    columns = Columns(23)
    with chat.Rows(columns, live=False) as rows:
        columns.add(0, "a\nb")
        rows.show()
        assert capsys.readouterr().out == ""
        columns.add(1, "x\ny")
        rows.show()
        rows.show()
        assert capsys.readouterr().out == "a          │ x\n"
    assert capsys.readouterr().out == "b          │ y\n"


def test_where_no_server_is_the_command_ends_with_a_line(talk, running):
    for url, message in (
        ("http://127.0.0.1:1", "no server answers on http://127.0.0.1:1; start one with `jaxlora serve`"),
        ("nonsense://x", "nonsense://x: "),
        (running[1] + "/elsewhere", "Not Found"),
    ):
        with pytest.raises(AnswerFailed, match=re.escape(message)):
            chat.main(url=url, key=None, name=None)


def test_a_url_may_end_in_v1(running, backend, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    chat.main(url=running[1] + "/v1/", key=None, name=ADAPTER)
    assert len(backend.requests) == 1


class Terminal:
    """A chat in a terminal of its own, of 60 columns."""

    def __init__(self, *arguments: str):
        self.own, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
        # The terminal must be the process's own, or Ctrl-C would reach nobody.
        code = (
            "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from serve.cli.main import main; main()"
        )
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def sees(self, text: str, within_s: float) -> bool:
        """Whether this text has come, or comes in that time."""
        deadline = time.monotonic() + within_s
        while text not in self.seen:
            if not select.select([self.own], [], [], max(deadline - time.monotonic(), 0))[0]:
                return False
            self.seen += os.read(self.own, 4096).decode(errors="replace")
        return True

    def wait_for(self, text: str) -> str:
        """What came, up to this text, which is there within a while."""
        assert self.sees(text, 120), (text, self.seen)
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())


@pytest.fixture
def terminal(running, backend):
    it = Terminal("--url", running[1])
    yield it
    with contextlib.suppress(ProcessLookupError):
        it.process.send_signal(signal.SIGKILL)
    it.process.wait()
    os.close(it.own)


def test_a_conversation_in_a_terminal(terminal, backend):
    prompt = f"{ADAPTER}> "
    backend.reply = lambda request: "from the base" if request.adapter is None else "from support"
    assert f"0  {BASE}" in terminal.wait_for("which one? [0] ")
    terminal.type("/help\n")
    terminal.wait_for("nothing means the base")
    terminal.type("2\n")
    terminal.wait_for("temperature=0.2 top_p=0.9 (/set changes them)")
    terminal.wait_for(f"/compare QUESTION asks {BASE} and")  # the terminal breaks the line
    terminal.wait_for(prompt)
    terminal.type("hello\n")
    terminal.wait_for("from support")
    assert "/compare" not in terminal.wait_for(prompt)  # it is told once
    terminal.type("/help\n")
    terminal.wait_for("forget the conversation")
    terminal.wait_for(prompt)
    terminal.type("/compare both?\n")
    terminal.wait_for("from the base" + " " * 15 + " │ from support")
    terminal.wait_for(prompt)
    terminal.type("half a line")
    terminal.wait_for("half a line")
    for _ in range(60):  # Python's input() misses a signal that comes just before it waits
        terminal.type("\x03")
        if terminal.sees(prompt, 2):
            break
    terminal.wait_for(prompt)

    backend.hang_after = 4
    terminal.type("stop me\n")
    terminal.wait_for("from")
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for(prompt)
    assert backend.streams[-1].cancelled.wait(10)
    terminal.type("/compare stop us\n")
    terminal.wait_for("from")
    streams = backend.streams[-2:]
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for(prompt)
    assert [s.cancelled.wait(10) for s in streams] == [True, True]

    backend.hang_after = None
    terminal.type("more\n")
    terminal.wait_for("from support")
    terminal.wait_for(prompt)
    asked = told(backend.requests[-1])
    assert asked == "user:helloassistant:from supportuser:stop meassistant:fromuser:moreassistant:"
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
