"""A small backend without a model: bytes are tokens, answers come from a function, and everything asked is on record."""

import asyncio
import codecs
import contextlib
import re
import socket
import threading
import time
from dataclasses import dataclass, field, replace

import uvicorn

from jaxlora.checkpoints.chat_template import ChatTemplate
from jaxlora.core.errors import AdapterNotFound, InvalidRequest
from jaxlora.core.lora import AdapterRef
from serve.engine.grammar import Grammars
from serve.engine.output import StopStrings
from serve.engine.request import Delta, FinishReason, PromptLogprob, TokenLogprob
from serve.runtime.backend import ModelCard

EOS, BOS, MARK = 256, 257, 258
BASE = "org/base"
HI = [{"role": "user", "content": "hi"}]


class ByteTokenizer:
    """Ids 0 to 255 are bytes; then end, begin, and the mark before each turn.  Special tokens decode to nothing."""

    vocab_size = 259
    eos_ids = frozenset({EOS})
    special_ids = frozenset({EOS, BOS, MARK})
    names = ("<eos>", "<bos>", "<turn>")
    max_token_bytes = max(map(len, names))

    def encode(self, text, *, add_special_tokens=True, parse_special=True):
        ids = list(text.encode())
        if parse_special:
            ids = [i for part in re.split("(<turn>)", text) for i in ([MARK] if part == "<turn>" else part.encode())]
        return [BOS] * add_special_tokens + ids

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    chat_template = None  # text of a template; without one, turns are written between marks
    special_texts = {"eos_token": "<eos>", "bos_token": "<bos>"}  # noqa: RUF012

    def chat(self, messages, *, add_generation_prompt=True, continue_final_message=False, tools=None, variables=None):
        asked = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
        asked |= {"tools": tools, "variables": variables}
        if self.chat_template is not None:
            return list(ChatTemplate(self.chat_template, self.special_texts).render(messages, **asked).encode())
        ChatTemplate("", {}).render(messages, **asked | {"continue_final_message": False})  # for its checks
        if messages[0]["role"] == "assistant":
            raise InvalidRequest("a conversation must not begin with the assistant", param="messages")
        ids = []
        for message in messages:
            ids += [MARK, *f"{message['role']}:{message['content']}".encode(), EOS]
        if continue_final_message:
            ids.pop()
        return ids + ([MARK, *b"assistant:"] if add_generation_prompt else [])

    def token_text(self, id):
        return bytes([id]).decode(errors="replace") if id < 256 else self.names[id - 256]

    def token_bytes(self, id):
        return bytes([id]) if id < 256 else self.names[id - 256].encode()


def echo_seed(request):
    """The default answer: differs by choice and seed, and has two-byte and four-byte characters."""
    return f"Grüße 🌍 {request.params.seed or 0}.{request.params.choice}"


@dataclass(kw_only=True)
class FakeBackend:
    """Deterministic.  Behaviour is set by assigning fields; `hang_after` and `fail_after` count tokens."""

    base_name: str = BASE
    context: int = 200
    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    grammars: Grammars = field(default_factory=lambda: Grammars(ByteTokenizer()))
    started: float = 1_700_000_000.0
    reply: object = echo_seed
    end: bool = True  # say EOS after the reply
    pace_s: float = 0.0  # between two tokens
    versions: object = None  # of the adapter, by the number of the token; None: the request's
    hang_after: int | None = None
    fail_after: int | None = None
    failure: Exception | None = None
    submit_error: Exception | None = None
    admit: int | None = None  # submits before submit_error
    state: str = "ok"
    requests: list = field(default_factory=list)
    streams: list = field(default_factory=list)
    adapters: dict = field(default_factory=lambda: {"support": 7, "ft:base:acme:x:1": 2})

    def models(self, tenant):
        if tenant == "stranger":
            return [self._base()]
        return [*(self._card(n, n, v) for n, v in self.adapters.items()), self._base()]

    def model(self, tenant, model):
        ref = self.resolve(tenant, model)
        return self._base() if ref is None else self._card(model, model.partition("@")[0], ref.version)

    def _base(self):
        return ModelCard(
            id=BASE, created=1, owned_by="org", parent=None, root=BASE, version=None, rank=None, state="base"
        )

    def _card(self, id, name, version):
        created = 100 + list(self.adapters).index(name)
        return ModelCard(
            id=id, created=created, owned_by="acme", parent=BASE, root=name, version=version, rank=16, state="host"
        )

    def resolve(self, tenant, model):
        name, _, version = model.partition("@")
        if model == BASE:
            return None
        if name not in self.adapters or tenant == "stranger":
            raise AdapterNotFound(f"The model `{model[:80]}` does not exist.", param="model")
        return AdapterRef("acme", name.replace(":", "-"), int(version or self.adapters[name]))

    def submit(self, request):
        if self.submit_error is not None and len(self.requests) >= (self.admit or 0):
            raise self.submit_error
        self.requests.append(request)
        self.streams.append(FakeStream(self, request))
        return self.streams[-1]

    def health(self):
        return self.state


class FakeStream:
    """One answer, a token at a time."""

    def __init__(self, backend, request):
        self.request = request
        self.cancelled = threading.Event()
        self.ended = False
        self._pace_s = backend.pace_s
        self._deltas = self._generate(backend, request)

    def __aiter__(self):
        return self

    async def __anext__(self):
        await asyncio.sleep(self._pace_s)
        return await anext(self._deltas)

    def cancel(self):
        if not self.ended:
            self.cancelled.set()

    async def _generate(self, backend, request):
        p = request.params
        stops, decoder = StopStrings(p.stop, p.include_stop), codecs.getincrementaldecoder("utf-8")("replace")
        tokens = [*backend.reply(request).encode(), *([EOS] if backend.end else [])]
        scores = fake_scores(request.prompt, p.prompt_logprobs)
        if p.max_tokens == 0:
            self.ended = True
            yield Delta(request_id=request.id, finish=FinishReason.LENGTH, prompt_logprobs=scores)
            return
        # With ignore_eos the answer begins anew after the end token, until max_tokens.
        for i, token in enumerate(tokens * 50):
            if i == backend.hang_after:
                await asyncio.Event().wait()
            if i == backend.fail_after:
                if backend.failure is not None:
                    self.ended = True
                    yield Delta(request_id=request.id, error=backend.failure)
                return
            eos = token == EOS and not p.ignore_eos
            stop_id = token in p.stop_token_ids
            text, hit = stops.push("" if token >= 256 or stop_id else decoder.decode(bytes([token])))
            finish = FinishReason.STOP if eos or stop_id or hit else None
            if finish is None and i + 1 == p.max_tokens:
                finish = FinishReason.LENGTH
            if finish is not None and not hit:
                tail, hit = stops.push(decoder.decode(b"", final=True))
                text += tail + stops.flush()
            delta = Delta(
                request_id=request.id, text=text, tokens=(token,), logprobs=fake_logprobs(token, i, p.logprobs)
            )
            self.ended = finish is not None
            made_by = request.adapter
            if backend.versions is not None and made_by is not None:
                made_by = replace(made_by, version=backend.versions(i))
            yield replace(delta, finish=finish, adapter=made_by, prompt_logprobs=() if i else scores)
            if finish is not None:
                return


def fake_logprobs(token, place, top):
    """The chosen token at -place/4 and, below it, the ids after it; the fourth is impossible."""
    if top is None:
        return ()
    others = [((token + k) % 256, -place / 4 - k if k < 3 else float("-inf")) for k in range(1, top)]
    pairs = ([(token, -place / 4), *others])[:top]
    return (TokenLogprob(token=token, logprob=-place / 4, top=tuple(pairs)),)


def fake_scores(prompt, top):
    """Each prompt token but the first at minus its place, and above it ids that follow it."""
    if top is None:
        return ()
    return tuple(
        PromptLogprob(token=t, logprob=-float(i), rank=3, top=tuple(((t + k + 1) % 256, -k / 8) for k in range(top)))
        for i, t in enumerate(prompt)
        if i
    )


class Before:
    """What `serving` puts before each app: nothing, or with `--through-front` the front of a cluster."""

    put = staticmethod(lambda app: app)


@contextlib.contextmanager
def serving(app):
    """The app under uvicorn on an ephemeral loopback port; yields its root URL."""
    app = Before.put(app)
    # By name TCP, as asyncio asks a socket before it sends small answers at once: else each waits 40 ms.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app, http="h11", loop="asyncio", log_level="warning", timeout_graceful_shutdown=1, lifespan="off"
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 10
        while not server.started:
            if time.monotonic() > deadline:
                raise TimeoutError("uvicorn did not start within 10 s")
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def events(response):
    """The data of each event; every line of the body is data, comment or empty."""
    lines = response.text.split("\n")
    assert all(line == "" or line.startswith(("data: ", ": ")) for line in lines)
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
