"""`jaxlora chat`: talk to the adapters of a running server, and see one beside the base."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jaxlora.core.errors import InvalidRequest, JaxLoraError
from serve.cli.chat_columns import Columns, beside, clean
from serve.cli.http_client import AnswerFailed, ApiClient, Model

SHOWN = 30  # adapters of a list
OURS = ("model", "messages", "stream", "n")  # of a request's fields, those that are not settings
# What small models answer best with (SmolLM2's makers name it): at the API's default of 1 they ramble, at 0 they loop.
DEFAULTS = {"temperature": 0.2, "top_p": 0.9}
HELP = """\
TEXT                     ask; the conversation so far goes with it
/adapters [TEXT]         the adapters, or those with TEXT in their names
/use NAME[@VERSION]      talk to this adapter, or to the base
/compare TEXT            ask the base and the adapter, side by side; the conversation stays as it is
/system [TEXT]           what the conversation begins with
/set NAME=VALUE ...      of each request, e.g. temperature=1 max_tokens=500 seed=1; NAME= leaves it to the server
/set                     what is set
/reset                   forget the conversation
/help                    this
/quit                    leave; so does Ctrl-D.  Ctrl-C stops an answer"""

PICK_HELP = """\
NUMBER or NAME[@VERSION]   talk to this one; nothing means the base
/adapters [TEXT]           the list again, or those with TEXT in their names
/quit                      leave; so does Ctrl-D.  More commands follow when you have chosen"""
QUIT = ("/quit", "/exit")


@dataclass(slots=True)
class Chat:
    """One conversation."""

    server: ApiClient
    base: str
    model: str  # whom we talk to
    live: bool  # a person at a terminal, not a pipe
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=lambda: dict(DEFAULTS))

    def spoken(self, text: str) -> list[dict[str, str]]:
        """The messages that ask this."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages, {"role": "user", "content": text}]

    async def say(self, text: str) -> None:
        """Asks, and prints the answer as it comes.  A question of which nothing was answered is not kept."""
        answer, ends = "", []
        try:
            answering = self.server.answer(self.model, self.spoken(text), self.settings, ends.append)
            async with contextlib.aclosing(answering) as pieces:
                async for piece in pieces:
                    answer += piece
                    print(clean(piece), end="", flush=True)
        finally:
            if answer:
                print()
                if self.live and "length" in ends:
                    print("(cut off here; /set max_tokens=NUMBER allows more)")
                self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    async def compare(self, text: str) -> None:
        """Asks the base and the adapter at once; each row is printed when it is complete in both columns."""
        if not text:
            raise InvalidRequest("/compare needs a question")
        if self.model == self.base:
            raise InvalidRequest("you are talking to the base; choose an adapter with /use")
        columns = Columns(shutil.get_terminal_size().columns - 1)
        names, changed = (self.base, self.model), asyncio.Event()

        async def read(side: int) -> None:
            try:
                answer = self.server.answer(names[side], self.spoken(text), self.settings)
                async with contextlib.aclosing(answer) as pieces:
                    async for piece in pieces:
                        columns.add(side, piece)
                        changed.set()
            finally:
                columns.ended[side] = True
                changed.set()

        print(beside(*names, columns.width))
        print("─" * (2 * columns.width + 3), flush=True)
        with Rows(columns, self.live) as rows:
            async with asyncio.TaskGroup() as tasks:
                for side in (0, 1):
                    tasks.create_task(read(side))
                while not all(columns.ended):
                    await changed.wait()
                    changed.clear()
                    rows.show()


class Rows:
    """Prints two columns as they grow: each row once, when it can change no more; a person sees the rest below it, too."""

    def __init__(self, columns: Columns, live: bool):
        size = shutil.get_terminal_size()
        self._columns, self._printed, self._height = columns, 0, max(size.lines - 2, 1)
        self._console = Console(highlight=False, markup=False, width=size.columns)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if live else None

    def __enter__(self) -> Rows:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What is left is printed, however it ended."""
        if self._live is not None:
            self._live.stop()
        self._print(self._columns.rows())

    def show(self) -> None:
        """What is new."""
        rows, settled = self._columns.rows(), self._columns.settled()
        self._print(rows[:settled])
        if self._live is not None:
            self._live.update(Text("\n".join(rows[settled:][-self._height :]), no_wrap=True), refresh=True)

    def _print(self, rows: list[str]) -> None:
        for row in rows[self._printed :]:
            self._console.print(row, soft_wrap=True)
        self._printed = max(self._printed, len(rows))


class Conversation:
    """Lines in, commands and questions out, until the end of the input."""

    def __init__(self, loop: asyncio.Runner, chat: Chat):
        self._loop, self.chat = loop, chat
        self.failed = 0
        self._told = False  # what /compare is for
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapters": self.adapters,
            "/use": self.use,
            "/compare": lambda text: self._loop.run(self.chat.compare(text)),
            "/system": self.system,
            "/set": self.set,
            "/reset": self.reset,
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Until /quit or the end of the input."""
        while True:
            self._tell_of_compare()
            try:
                line = input(f"{self.chat.model}> " if self.chat.live else "")
            except EOFError:
                if self.chat.live:
                    print()
                return
            except KeyboardInterrupt:
                if not self.chat.live:
                    raise
                print()  # as a shell does: the line is given up
                continue
            line = line.encode(errors="replace").decode().strip()
            if line in QUIT:
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """A command or a question.  An error is one line; Ctrl-C stops what it began."""
        try:
            word, _, rest = line.partition(" ")
            if not line.startswith("/"):
                self._loop.run(self.chat.say(line))
            elif word in self._commands:
                self._commands[word](rest.strip())
            else:
                raise InvalidRequest(unknown(word, [*self._commands, *QUIT]))
        except KeyboardInterrupt:
            if not self.chat.live:
                raise
            print("(stopped)", flush=True)
        except BaseExceptionGroup as group:  # of the two answers that are compared
            errors = [e for e in group.exceptions if isinstance(e, JaxLoraError)]
            if len(errors) < len(group.exceptions):
                raise
            self._tell(errors[0])
        except JaxLoraError as error:
            self._tell(error)

    def _tell_of_compare(self) -> None:
        """Says once, to a person who talks to an adapter, how to see it beside the base."""
        if self.chat.live and not self._told and self.chat.model != self.chat.base:
            self._told = True
            print(f"/compare QUESTION asks {clean(self.chat.base)} and {clean(self.chat.model)} side by side")

    def _tell(self, error: JaxLoraError) -> None:
        self.failed += 1
        sys.stdout.flush()
        print("error:", clean(" ".join(error.message.split())), file=sys.stderr, flush=True)

    def adapters(self, part: str) -> None:
        """Prints the base and the adapters with this in their names."""
        show(self.chat.server.models(), self.chat.model, part)

    def use(self, name: str) -> None:
        """From now on the questions go to this model; the conversation goes on."""
        if not name:
            raise InvalidRequest("/use needs a name; /adapters lists them")
        self.chat.model = self.chat.server.model(name).id

    def system(self, text: str) -> None:
        """What comes before everything else; nothing when it is empty."""
        self.chat.system = text

    def set(self, text: str) -> None:
        """Fields of the requests to come; without any, those that are set."""
        changes = {}
        for pair in text.split():
            name, equals, value = pair.partition("=")
            if not equals or not name.isidentifier():
                raise InvalidRequest(f"/set takes NAME=VALUE, got {pair}")
            if name in OURS:
                raise InvalidRequest(f"{name} is not a setting; /help lists what changes it")
            try:
                changes[name] = json.loads(value) if value else None
            except ValueError:
                changes[name] = value
        merged = self.chat.settings | changes
        self.chat.settings = {name: value for name, value in merged.items() if value is not None}
        if not text:
            print(shown(self.chat.settings) or "nothing is set")

    def reset(self, _: str) -> None:
        """Nothing has been said."""
        self.chat.messages = []


def shown(settings: Mapping[str, object]) -> str:
    """The settings as /set takes them."""
    return " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


def show(models: list[Model], current: str, part: str = "") -> None:
    """Prints a numbered list; the base is 0."""
    found = [(i, m) for i, m in enumerate(models) if part in m.id]
    for i, m in found[:SHOWN]:
        of = "base" if m.parent is None else f"version {m.version}, rank {m.rank}, on {m.state}"
        print(f"{'*' if m.id == current else ' '} {i:>3}  {clean(m.id)}  ({of})")
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN} more; /adapters TEXT lists those with TEXT in their names")


def unknown(word: str, commands: Sequence[str]) -> str:
    """What is said of a command that is none."""
    near = difflib.get_close_matches(word, commands, n=1)
    return f"there is no command {word}; {f'did you mean {near[0]}? ' if near else ''}/help lists them"


def pick(models: list[Model]) -> str | None:
    """Asks which one: a number, a name, or the base when nothing is said; None at the end of the input."""
    show(models, models[0].id)
    while True:
        try:
            said = input("which one? [0] ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return None
        word, _, rest = said.partition(" ")
        if word in QUIT:
            return None
        if word == "/help":
            print(PICK_HELP)
        elif word == "/adapters":
            show(models, models[0].id, rest.strip())
        elif word.startswith("/"):
            print(clean(unknown(word, ["/adapters", "/help", *QUIT])))
        elif said.isdecimal() and int(said) >= len(models):
            print(f"there is no number {said}; the last is {len(models) - 1}")
        else:
            return models[int(said)].id if said.isdecimal() else said or models[0].id


def main(*, url: str, key: str | None, name: str | None) -> None:
    """`jaxlora chat`.  Raises AnswerFailed when no server answers, and, of lines from a pipe, when one of them failed."""
    live = sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if live:
        importlib.import_module("readline")  # from now on `input` edits and remembers lines
    with asyncio.Runner() as loop, ApiClient(url, key) as server:
        models = server.models()
        base = models[0].id
        chosen = name or (pick(models) if live and len(models) > 1 else base)
        if chosen is None:
            return
        chat = Chat(server, base, server.model(chosen).id, live)
        if live:
            print(f"/help lists the commands, Ctrl-D leaves; {shown(chat.settings)} (/set changes them)")
        conversation = Conversation(loop, chat)
        conversation.run()
    if conversation.failed and not live:
        raise AnswerFailed(f"{conversation.failed} of the lines failed; each said why")
