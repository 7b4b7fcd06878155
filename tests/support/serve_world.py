"""A tiny model behind a real engine, and the slow, plain model it is checked against.

Every engine of a session with the same shapes shares its compiled programs.  The fixtures are in serve_fixtures.py.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from small_world import tiny_path

from jaxlora.checkpoints.load import Opened
from jaxlora.core.lora import ALL_TARGETS, Adapter, AdapterRef, LoraSpec
from jaxlora.core.model_config import ModelConfig, target_features
from jaxlora.model.lora_pool import PoolSpec, Rows, host_rows
from jaxlora.storage.adapter_store import AdapterStore
from serve.engine.engine import Engine, EngineConfig
from serve.engine.page_cache import PageAllocator
from serve.engine.request import Delta, PromptLogprob, Request, SamplingParams, TokenLogprob
from serve.engine.sequence import Status
from serve.engine.step import StepPrograms
from serve.runtime.device_thread import DeviceThread

MODEL = "tiny-llama-tied"
BASE = "owner/tiny"  # what its server calls it
SLOTS, RANK = 3, 6
CONFIG = EngineConfig(
    rows=8,
    prefill_lanes=8,
    prefill_tokens=8,
    pages=64,
    page_tokens=4,
    max_tokens=64,
    max_waiting=64,
    max_waiting_tokens=4096,
    host_bytes=10**6,
    quantum_s=1000.0,
)

ONE_SHAPE = replace(CONFIG, rows=4, prefill_lanes=4, pages=32)  # of prompts, of decoding, and of both in one program


class PlainModel:
    """The decoder in NumPy float64, one sequence at a time, no cache, adapters merged into the weights."""

    def __init__(self, source):
        c = self.config = source.config
        layer_names = ("attn_norm", "mlp_norm", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
        self.embed = source.read("embed", None).astype("f8")
        self.norm = source.read("norm", None).astype("f8")
        self.layers = [
            {n: source.read(n, i).astype("f8") for n in (*layer_names, "down_proj")} for i in range(c.layers)
        ]

    def merged(self, adapter: Adapter | None) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
        """(weights of each layer, head) with scale * A.T B added."""
        layers, head = [dict(w) for w in self.layers], self.embed.T.copy()
        for target, (a, b) in ({} if adapter is None else adapter.weights).items():
            scale = adapter.spec.alpha / adapter.spec.rank
            for i in range(len(a)):
                delta = scale * a[i].astype("f8").T @ b[i].astype("f8")
                if target == "lm_head":
                    head = head + delta
                else:
                    layers[i][target] = layers[i][target] + delta
        return layers, head

    def logits(self, tokens: list[int], weights: tuple[list[dict[str, np.ndarray]], np.ndarray]) -> np.ndarray:
        """[V] after the last token."""
        c, (layers, head) = self.config, weights
        T, H, group = len(tokens), c.head_dim, c.heads // c.kv_heads
        x = self.embed[tokens]
        angle = np.arange(T)[:, None] / c.rope_theta ** (np.arange(0, H, 2) / H)

        def norm(x, weight):
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * weight

        def turn(x):
            one, two = x[..., : H // 2], x[..., H // 2 :]
            cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
            return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

        for w in layers:
            h = norm(x, w["attn_norm"])
            q = turn((h @ w["q_proj"]).reshape(T, c.heads, H))
            k = turn((h @ w["k_proj"]).reshape(T, c.kv_heads, H))
            v = (h @ w["v_proj"]).reshape(T, c.kv_heads, H)
            out = np.zeros((T, c.heads, H))
            for n in range(c.heads):
                score = q[:, n] @ k[:, n // group].T / np.sqrt(H)
                score[np.triu_indices(T, 1)] = -np.inf
                share = np.exp(score - score.max(-1, keepdims=True))
                out[:, n] = share / share.sum(-1, keepdims=True) @ v[:, n // group]
            x = x + out.reshape(T, -1) @ w["o_proj"]
            h = norm(x, w["mlp_norm"])
            gate = h @ w["gate_proj"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"])) @ w["down_proj"]
        return norm(x, self.norm)[-1] @ head

    def greedy(self, prompt: Iterable[int], count: int, adapter: Adapter | None) -> list[int]:
        """The tokens that follow, end-of-sequence or not.  Refuses a choice that rounding could turn."""
        weights, tokens, new = self.merged(adapter), list(prompt), []
        for _ in range(count):
            logits = self.logits(tokens, weights)
            second, best = np.sort(logits)[-2:]
            assert best - second > 1e-4, "too close to call: choose another seed"
            new.append(int(logits.argmax()))
            tokens.append(new[-1])
        return new


@dataclass
class Answer:
    """All that came back for one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprob] = field(default_factory=list)
    finish: object = None
    error: Exception | None = None
    deltas: int = 0

    def take(self, delta: Delta) -> None:
        assert self.finish is None, "news after the end"
        assert self.error is None, "news after the end"
        self.tokens += delta.tokens
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs
        self.finish, self.error = delta.finish, delta.error
        self.deltas += 1


@dataclass
class World:
    """What the tests of engine, runner and wire share."""

    source: object
    base: object
    mesh: object
    tokenizer: object
    base_hash: str
    store: AdapterStore
    plain: PlainModel
    adapters: list[Adapter]
    spec: PoolSpec

    def engine(self, config: EngineConfig = CONFIG) -> Engine:
        """A fresh engine: nothing resident, nobody running."""
        return Engine(self.base, self.mesh, config, self.spec, self.store, self.tokenizer, self.base_hash)

    def opened(self, weights_hash: str = "") -> Opened:
        """The base as a server opens it."""
        return Opened(
            name="tiny",
            path=tiny_path(MODEL),
            base=self.base,
            base_hash=self.base_hash,
            weights_hash=weights_hash,
            mesh=self.mesh,
            tokenizer=self.tokenizer,
        )

    def add(self, name: str, seed: int, rank: int = 3, targets: tuple[str, ...] = ALL_TARGETS, **changes) -> Adapter:
        """A new version in the store.  `changes` replace fields of the Adapter."""
        ref = self.store.mint("acme", name)
        fields = {"ref": ref, "spec": LoraSpec(rank=rank, alpha=2.0 * rank, targets=targets)}
        fields |= {"base_hash": self.base_hash, "weights": random_weights(self.base.config, rank, targets, seed)}
        adapter = Adapter(**fields | changes)
        self.store.put(adapter)
        return adapter

    def device_rows(self, adapter: Adapter) -> Rows:
        """The adapter as a trainer holds it: one slot of a float32 pool of the same shape."""
        spec = PoolSpec(slots=2, rank=RANK, dtype="float32", targets=ALL_TARGETS)
        return jax.device_put(host_rows(self.base.config, spec, adapter))

    def greedy(self, request: Request) -> list[int]:
        """What the plain model answers."""
        adapter = None if request.adapter is None else self.store.get(request.adapter)
        return self.plain.greedy(request.prompt, request.params.max_tokens, adapter)


def with_pages(engine: Engine, pages: int) -> Engine:
    """The engine with only these of its KV pages: the compiled shapes stay."""
    engine.scheduler.pages = PageAllocator(pages, CONFIG.page_tokens)
    return engine


def random_weights(config: ModelConfig, rank: int, targets: tuple[str, ...], seed: int) -> dict:
    """Weights strong enough that every adapter says something else."""
    rng, weights = np.random.default_rng(seed), {}
    for target in targets:
        L, (x, y) = 1 if target == "lm_head" else config.layers, target_features(config, target)
        a, b = rng.normal(size=(L, rank, x)), rng.normal(size=(L, rank, y))
        weights[target] = ((a * 0.3).astype(np.float32), (b * 0.15).astype(np.float32))
    return weights


def ask(
    id: str,
    adapter: Adapter | AdapterRef | None = None,
    prompt: Iterable[int] | int = 5,
    max_tokens: int = 8,
    tenant: str = "acme",
    **params,
) -> Request:
    """A request; greedy and deaf to end tokens unless told otherwise.  A number of tokens gives a prompt of its own."""
    if isinstance(prompt, int):
        prompt = np.random.default_rng(sum(map(ord, id))).integers(4, 320, prompt).tolist()
    settings = {"temperature": 0.0, "ignore_eos": True} | params
    return Request(
        id=id,
        tenant=tenant,
        adapter=adapter.ref if isinstance(adapter, Adapter) else adapter,
        prompt=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **settings),
    )


def check_engine(engine: Engine) -> None:
    """Rows, pages, pins and the tables of the engine agree."""
    scheduler = engine.scheduler
    scheduler.check()
    assert set(engine._sequences) == set(engine._processors)
    assert len(engine._sequences) == sum(scheduler.counts())
    assert set(engine._saved) == {id for id, s in engine._sequences.items() if s.status is Status.OFFLOADED}


def check_idle(engine: Engine) -> None:
    """Nothing is held for anybody."""
    check_engine(engine)
    assert not engine.has_work
    assert engine.scheduler.pages.free == engine.scheduler.pages.pages
    engine.scheduler.settle()
    assert engine.slots.pinned() == []


def step(engine: Engine, answers: dict[str, Answer]) -> None:
    """One step, with all invariants checked after it."""
    for delta in engine.step():
        answers[delta.request_id].take(delta)
    check_engine(engine)


def run_all(
    engine: Engine, requests: Iterable[Request] = (), between: Callable[[int], None] | None = None
) -> dict[str, Answer]:
    """Submits, then steps until nobody is left.  `between` is called with the number of each step after it."""
    answers: dict[str, Answer] = defaultdict(Answer)
    for request in requests:
        engine.submit(request)
    count = 0
    while engine.has_work:
        step(engine, answers)
        if between is not None:
            between(count)
        count += 1
        assert count < 20_000, "the engine does not come to an end"
    check_idle(engine)
    return answers


def with_resident(engine: Engine, *adapters: Adapter) -> Engine:
    """The engine with these adapters on the device: which step they are read by is not for a test to know."""
    run_all(engine, [ask(f"load {a.ref}", a, 1, 1) for a in adapters])
    return engine


def mixing(engine: Engine) -> Engine:
    """The engine, which runs the programs of an accelerator, ahead of the host."""
    engine._programs = StepPrograms(engine.mesh, one=False)
    engine.runs_ahead = engine.mixes = True
    return engine


def forget_pages(engine: Engine) -> None:
    """Empties the prefix cache."""
    for salt in engine.scheduler.pages.salts:
        engine.scheduler.pages.forget(salt)


def read_all(engine: Engine) -> None:
    """Waits until all adapters that are on their way have been read, so that the next step's plan is not a matter of time."""
    wait(engine._loads._loads.values())


@dataclass(frozen=True)
class Ran:
    """A program that computed some tokens of a request."""

    lanes: int
    tokens: int  # of a lane: 1 in a decode program
    start: int  # where the request's own tokens began
    count: int


def watch_programs(engine: Engine) -> dict[str, list[Ran]]:
    """Which programs compute each request from now on, in order, by its id.

    An answer has the same bits where the same programs compute the same places of it; nothing else is promised
    (`dispatch.SHAPE_INDEPENDENT`).  So a test that compares bits compares these first.
    """
    ran: dict[str, list[Ran]] = defaultdict(list)
    run, start = engine._run, engine._start
    started: list[list[tuple[str, int, int]]] = []  # by the batches of the program that is being started

    def watched_start(chunks, sequences):
        parts = (
            [(c.sequence.request.id, c.start, c.count) for c in chunks],
            [(s.request.id, s.done, 1) for s in sequences],
        )
        started[:] = [part for part in parts if part]
        return start(chunks, sequences)

    def watched_run(packed, edits):
        for batch, places in zip(packed, started, strict=False):  # none were started in a warm-up
            for id, begin, count in places:
                ran[id].append(Ran(batch.lanes, batch.tokens, begin, count))
        started.clear()
        return run(packed, edits)

    engine._start, engine._run = watched_start, watched_run
    return ran


def settle(runner: DeviceThread) -> None:
    """Waits until the engine has nothing to do."""
    deadline = time.monotonic() + 10
    while runner.call(lambda: runner.engine.has_work):
        assert time.monotonic() < deadline, "requests are left over"


async def stream_greedy(client, model: str, prompt: str, max_tokens: int) -> tuple[list[int], str]:
    """(tokens, text) of one streamed completion of an `openai.AsyncOpenAI`, a chunk at a time."""
    tokens, text = [], ""
    answer = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        logprobs=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )
    async for chunk in answer:
        for choice in chunk.choices:
            text += choice.text
            if choice.logprobs is not None:
                tokens += [int(t.removeprefix("token_id:")) for t in choice.logprobs.tokens]
    return tokens, text
