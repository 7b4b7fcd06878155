"""The device thread: it alone touches the engine and the trainer; all other threads send it messages.

While sequences run and adapters train, `Budget` decides before each engine step whether a part of a training step goes
first.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from jaxlora.config.serving import Tuning
from jaxlora.core.errors import AdapterNotFound, DeviceLost, InvalidRequest, JaxLoraError, Unavailable
from jaxlora.core.lora import AdapterRef
from jaxlora.core.progress import Counted, uncounted
from serve.engine.engine import Engine
from serve.engine.grammar import Grammars
from serve.engine.request import Delta, Request
from serve.runtime.backend import ModelCard
from serve.runtime.bodies import told
from serve.runtime.budget import Budget, BudgetSettings
from serve.runtime.catalog import Catalog
from serve.runtime.delta_stream import DeltaStream, Mail
from serve.runtime.publisher import Publisher
from serve.runtime.watchdog import Watch

LOG = logging.getLogger("serve")
GONE = "the server stopped before the answer was complete; retry when it is up again"
LOST = "the device thread failed or hung before the answer was complete"
END_S = 10.0  # for the present step to end, before requests are ended without the device thread


@dataclass(frozen=True, slots=True)
class Submission:
    """The message that submits a request."""

    request: Request
    listener: Callable[[Delta], None]
    admit: Callable[[Request, Callable[[Delta], None]], None]

    def __call__(self) -> None:
        """Submits the request.  Device thread only."""
        self.admit(self.request, self.listener)


class Trainer(Protocol):
    """What the device thread runs of a trainer."""

    @property
    def has_work(self) -> bool:
        """Whether a step would train anything."""
        ...

    @property
    def part(self) -> str:
        """The name of the part that `advance` runs next; parts of one name take about as long."""
        ...

    def advance(self) -> None:
        """Runs the next part of a training step and waits for it; it may publish through `Publisher`."""
        ...


@dataclass(slots=True)
class Completion:
    """A complete answer."""

    request_id: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    last: Delta | None = None


class DeviceThread:
    """The server behind the routes (serve.runtime.backend.Backend), and its device thread."""

    def __init__(self, engine: Engine, *, base_name: str, budget: BudgetSettings | None = None):
        """budget: how serving and training share the device; `budget.settings` changes it at any time."""
        self.engine, self.base_name, self.budget = engine, base_name, Budget(budget)
        # Replaced, never changed: any thread may read it.
        self.tuning = Tuning(quantum_ms=engine.config.quantum_s * 1000)
        self.started = time.time()
        self.grammars = Grammars(engine.tokenizer)
        self.catalog = Catalog(engine.store, engine.slots, base_name, self.started)
        self.publisher = Publisher(engine, self.catalog)
        self.watch = Watch(engine)
        self.trainer: Trainer | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, Callable[[Delta], None]] = {}
        self._mail = Mail()
        self._drain = threading.Lock()  # held to put a message, and to close the inbox
        self._closed = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._given_up = False  # it hangs, and no thread waits for it any more
        self._compiled = False  # every program
        self._compiling: Counted = uncounted
        self._thread = threading.Thread(target=self._run, name="jaxlora-device", daemon=True)

    # ---- life -----------------------------------------------------------------------------------------------------

    def start(self, compiling: Counted = uncounted) -> None:
        """Starts the thread and waits until every program is compiled.  compiling: see `Engine.warm_up`.

        Raises Unavailable when it is ended meanwhile.
        """
        self._compiling = compiling
        ready = threading.Event()
        self._inbox.put(ready.set)
        self._thread.start()
        ready.wait()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends the device thread after its present step; open requests get an error."""
        self.end(None)
        self.engine.store.flush()

    def end(self, within_s: float | None) -> bool:
        """Does the same without saving; returns False when the device is lost, by an error or a step that does not end in time."""
        if self._thread.is_alive() and not self._given_up:
            self._stopping |= not self._compiled
            self._inbox.put(self._stop_now)
            self._thread.join(within_s)
            if self._thread.is_alive():
                self._give_up()
        return not self.lost

    @property
    def lost(self) -> bool:
        """Whether the device thread has failed or was given up: nothing on the device can be read any more."""
        return self._failure is not None or self._given_up

    def call[R](self, work: Callable[[], R]) -> R:
        """Runs `work` on the device thread between two steps.  Returns what it returns and raises what it raises."""
        if threading.current_thread() is self._thread:
            return work()
        answer: queue.SimpleQueue[tuple[R | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((work(), None))
            except BaseException as error:
                answer.put((None, error))

        self._check_alive()
        self._send(run)
        while True:
            try:
                result, error = answer.get(timeout=1.0)
                break
            except queue.Empty:
                self._check_alive()
        if error is not None:
            raise error
        return result  # ty: ignore[invalid-explicit-return]

    def wake(self) -> None:
        """Has the device thread look for work, if it sleeps.  From any thread."""
        with contextlib.suppress(Unavailable):  # ended: there is none
            self._send(lambda: None)

    def _check_alive(self) -> None:
        if self._closed or not self._thread.is_alive():
            raise Unavailable("the server has stopped; retry when it is up again")

    def _send(self, message: Callable[[], None]) -> None:
        """Raises Unavailable when the device thread reads no more messages."""
        with self._drain:
            if self._closed:
                raise Unavailable("the server has stopped; retry when it is up again")
            self._inbox.put(message)

    def _stop_now(self) -> None:
        self._stopping = True

    def _before_program(self, number: int, of: int) -> None:
        """Tells who started the thread; raises Unavailable, before a program is compiled, when the thread is to end."""
        if self._stopping:
            raise Unavailable(GONE)
        self._compiling(number, of)

    def _run(self) -> None:
        try:
            with told("serving", self.engine.mesh.devices.flat[0].platform):
                self.engine.warm_up(self._before_program)
            self._compiled = True
            while not self._stopping:
                self._turn()
        except BaseException as error:  # every waiting request must learn of it
            if self._compiled or not self._stopping:
                LOG.exception("the device thread has ended")
            self._failure = error
        with self._drain:
            self._closed = True
        try:
            while not self._inbox.empty():  # messages that came meanwhile must not wait for ever
                self._inbox.get()()
        finally:
            self._end_listeners()

    def _give_up(self) -> None:
        """Ends every request in place of a device thread that hangs, and has the thread end should it come back."""
        LOG.error("the device thread hangs; nobody waits for it any more")
        with self._drain:
            self._closed = self._given_up = True
        self._stopping = True
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, Submission):  # `call` and `complete` check by themselves
                    message.listener(Delta(request_id=message.request.id, error=self.end_error()))
        self._end_listeners()

    def end_error(self) -> Unavailable:
        """Returns the error of requests that are open when the server ends."""
        return DeviceLost(LOST) if self.lost else Unavailable(GONE)

    def _end_listeners(self) -> None:
        """Ends every open request with an error."""
        for request_id, listener in list(self._listeners.items()):
            listener(Delta(request_id=request_id, error=self.end_error()))
        self._listeners.clear()

    def _turn(self) -> None:
        """Handles messages, then runs an engine step or a part of a training step."""
        engine, trainer = self.engine, self.trainer
        first = None
        if not engine.has_work and (trainer is None or not trainer.has_work):
            self.watch.rest()
            first = self._inbox.get()
        self.watch.turn()
        if first is not None:
            first()
        while not self._inbox.empty():
            self._inbox.get()()
        trainer = self.trainer
        training, serving = trainer is not None and trainer.has_work, engine.has_work
        start = time.monotonic()
        if trainer is not None and training:
            part = trainer.part
            if not serving or self.budget.trains(start, part, urgent=engine.urgent):
                trainer.advance()
                self.budget.trained(start, time.monotonic(), part, beside=serving)
                return
        if serving:
            decoded, prefilled = engine.decoded_tokens, engine.prefilled_tokens
            # Parts of a training step go between two steps, and are reckoned by what a step takes: it waits for its tokens.
            engine.waits = training
            self._deliver(engine.step(self._deliver))
            decoded = engine.decoded_tokens > decoded and engine.prefilled_tokens == prefilled
            self.budget.served(start, time.monotonic(), decoded=decoded, beside=training)

    def _deliver(self, deltas: list[Delta]) -> None:
        with self._mail.gather():
            for delta in deltas:
                if delta.adapter is not None:
                    self.publisher.observe_token(delta.adapter)
                ended = delta.finish is not None or delta.error is not None
                listeners = self._listeners
                listener = listeners.pop(delta.request_id, None) if ended else listeners.get(delta.request_id)
                if listener is not None:
                    listener(delta)

    # ---- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> DeltaStream:
        """Submits a request and returns its stream.  A refusal comes as the first and only delta, with `error`."""
        self._check_alive()
        stream = DeltaStream(request.id, self.cancel, self._mail)
        self._send(Submission(request, stream.deliver, self.admit))
        return stream

    def admit(self, request: Request, listener: Callable[[Delta], None]) -> None:
        """Puts a request in the queue from the device thread; the listener runs there too and must not wait for it."""
        try:
            self.engine.submit(request)
        except JaxLoraError as error:
            listener(Delta(request_id=request.id, error=error))
        except BaseException:  # an internal error, or a panic of the grammar library; nothing has changed yet
            LOG.exception("request %s cannot be admitted", request.id)
            error = JaxLoraError("this request cannot be admitted; the log has the reason")
            listener(Delta(request_id=request.id, error=error))
        else:
            self._listeners[request.id] = listener

    def cancel(self, request_id: str) -> None:
        """Frees everything a request holds, between this step and the next."""

        def work() -> None:
            self._listeners.pop(request_id, None)
            self.engine.cancel(request_id)

        with contextlib.suppress(Unavailable):  # ended: it holds nothing
            self._send(work)

    def end_all(self) -> None:
        """Ends every open request with Unavailable, and frees what they hold.  From any thread but the device's.

        If the device thread hangs, they end with DeviceLost.
        """
        ended = threading.Event()

        def work() -> None:
            for request_id in list(self._listeners):
                self.engine.cancel(request_id)
            self._end_listeners()
            ended.set()

        with contextlib.suppress(Unavailable):  # it has ended: so has each of them
            self._send(work)
            if not ended.wait(max(END_S, self.watch.hang_s)):
                self._give_up()

    def complete(
        self, requests: Sequence[Request], answered: Callable[[int], None] = lambda count: None
    ) -> list[Completion]:
        """Runs the requests and returns their answers in order, for callers without an event loop (not on the device thread).

        answered: called with how many are complete, whenever one more is.
        Raises the first request's error, if one failed.
        """
        assert threading.current_thread() is not self._thread
        news: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        answers = {r.id: Completion(r.id) for r in requests}

        def admit() -> None:
            for request in requests:
                self.admit(request, news.put)

        self._check_alive()
        self._send(admit)
        open_ids = set(answers)
        while open_ids:
            try:
                delta = news.get(timeout=1.0)
            except queue.Empty:
                self._check_alive()
                continue
            answer = answers[delta.request_id]
            answer.text += delta.text
            answer.tokens += delta.tokens
            if delta.finish is not None or delta.error is not None:
                answer.last = delta
                open_ids.discard(delta.request_id)
                answered(len(answers) - len(open_ids))
        for answer in answers.values():
            if answer.last is not None and answer.last.error is not None:
                raise answer.last.error
        return list(answers.values())

    def tune(self, tuning: Tuning) -> None:
        """Applies these settings from the next step on.  Device thread only, or before it starts.

        A pinned name is its newest version: of an adapter that is published, the pin goes on to the new one, and the
        old one takes its turns with the requests that still use it.
        Raises InvalidRequest, and changes nothing, for a name of no adapter and for more than the compiled shapes have.
        """
        try:
            pins = [(name, self.resolve(None, name)) for name in tuning.pin]
        except AdapterNotFound as error:
            raise InvalidRequest(f"pin: {error.message}", param="pin") from error
        if base := [name for name, ref in pins if ref is None]:
            raise InvalidRequest(f"pin: {base[0]} is the base model, which needs no slot; leave it out", param="pin")
        refs = dict.fromkeys(ref for _, ref in pins if ref is not None)
        self.engine.tune(tuning, refs.keys())
        # By whole names: another tenant may get an adapter of that name.
        self.tuning = replace(tuning, pin=tuple(f"{ref.tenant}/{ref.name}" for ref in refs))

    # ---- what the routes read ---------------------------------------------------------------------------------------

    def resolve(self, tenant: str | None, model: str) -> AdapterRef | None:
        """See `Catalog.resolve`."""
        return self.catalog.resolve(tenant, model)

    def models(self, tenant: str | None) -> list[ModelCard]:
        """See `Catalog.models`."""
        return self.catalog.models(tenant)

    def model(self, tenant: str | None, model: str) -> ModelCard:
        """See `Catalog.model`."""
        return self.catalog.model(tenant, model)

    @property
    def context(self) -> int:
        """Tokens of one sequence, prompt and answer together."""
        return self.engine.config.max_tokens

    @property
    def waiting_requests(self) -> int:
        """Requests that have no row yet."""
        return self.engine.scheduler.counts()[2]

    @property
    def tokenizer(self):
        """The base model's tokenizer."""
        return self.engine.tokenizer

    def health(self) -> str:
        """ "ok", or that the device thread has ended or hangs."""
        if self._closed or not self._thread.is_alive():
            return "the device thread has ended"
        hangs_s = self.watch.hangs_s()
        return "ok" if hangs_s is None else f"the device thread has been in one step for {hangs_s:.0f} s"
