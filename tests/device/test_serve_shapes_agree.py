"""One request in each of the four serving programs, after preemption and after prefix hits: as close as rounding allows.

Bits are promised within one program only, and across programs where `dispatch.SHAPE_INDEPENDENT` says so; there they are
demanded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_checks import BF16, F32, assert_close, assert_same_bits, floats
from perturbed import exact_run, perturbed_run
from serve_world import CONFIG, RANK, Answer, World, ask, run_all, step, watch_programs, with_resident
from test_serve_engine_paths import PATHS

from jaxlora.model.decoder import load_base
from pallas_kernels.attention.op import packed_attention
from pallas_kernels.cross_entropy.op import target_logprob
from pallas_kernels.dispatch import SHAPE_INDEPENDENT, TABLE
from pallas_kernels.gathered_lora.op import gathered_lora
from pallas_kernels.gathered_lora.pool_rows import of_slots
from pallas_kernels.native.library import instruction_set
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.product.op import Packed, pack, packed_shape, product, product_back
from pallas_kernels.rows.op import logsumexp, rms_norm, row_summary, top_k
from pallas_kernels.sampling.op import Choices
from pallas_kernels.sampling.op import draw as draw_tokens
from pallas_kernels.segmented_lora.op import segmented_lora
from serve.engine.engine import Engine
from serve.engine.request import Request
from serve.engine.sequence import Status
from train.step.optimizer import IDLE, Hyper, Moments
from train.step.update import update_slots

pytest_plugins = ["serve_fixtures"]
PROMPT, TOKENS, TOP = 13, 6, 5  # at most two lanes, also with half of the tokens: a quarter program
QUARTER = CONFIG.rows // 4
SERVING = ("product", "gathered_lora", "segmented_lora", "paged_attention")  # what a step computes with
NATIVE = instruction_set() is not None
# Natively, prompts take `gathered_lora` too.
BITS = NATIVE or all(SHAPE_INDEPENDENT[op]["cpu"]["xla"] for op in SERVING)


# --- one request, in every program


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def world_of_dtype(world, request) -> Iterator[World]:
    """The world in either dtype: base, pool and KV."""
    if request.param == "float32":
        yield world
        return
    base = load_base(world.source, world.mesh, dtype="bfloat16")
    yield replace(world, base=base, spec=replace(world.spec, dtype="bfloat16"))


def tolerance(world: World, magnitude: float) -> float:
    """How far apart a log-probability of two programs may be, by rounding alone.

    A sum of n terms that is taken in another order differs by a random walk of n roundings: sqrt(n) * u of its size, with
    u = 2**-24 as sums are in float32.  On the way to a logit a token meets, in each layer, sums over D five times (q, k and
    v; gate and up), over the heads' features twice (scores, o_proj), over all places and over F, and LoRA's sums over R
    at all seven projections; then one sum over D.  In each layer about a dozen results are rounded to the dtype of the
    activations, with u of that dtype: 2**-24 or 2**-9.  The squares of both walks add up, and those of the two programs;
    logits are of `magnitude`, and four standard deviations leave out one case in ten thousand.
    """
    c, u = world.base.config, float(jnp.finfo(world.base.dtype).eps) / 2
    terms = c.layers * (5 * c.d_model + 2 * c.heads * c.head_dim + CONFIG.max_tokens + c.d_ff + 7 * RANK) + c.d_model
    walk = np.sqrt(terms * 2.0**-48 + 12 * c.layers * u**2)
    return float(4 * np.sqrt(2) * magnitude * walk)


def asked(world: World, id: str) -> Request:
    return ask(id, world.adapters[0], [*range(40, 40 + PROMPT)], TOKENS, logprobs=TOP)


def company(count: int, tokens: int, name: str = "company") -> list[Request]:
    return [ask(f"{name}{i}", None, 5, tokens) for i in range(count)]


@dataclass(frozen=True)
class Case:
    """How a request is run, and the lanes of its prefill and decode programs."""

    run: Callable[[World, Engine, Request], Answer]
    prefill: int
    decode: int


def alone(world: World, engine: Engine, request: Request) -> Answer:
    return run_all(engine, [request])[request.id]


def beside_many(world: World, engine: Engine, request: Request) -> Answer:
    return run_all(engine, [request, *company(5, TOKENS + 4)])[request.id]


def prompt_alone(world: World, engine: Engine, request: Request) -> Answer:
    """The others' prompts have been computed when it comes."""
    answers: dict[str, Answer] = defaultdict(Answer)
    for other in company(5, TOKENS + 4):
        engine.submit(other)
    step(engine, answers)
    engine.submit(request)
    while engine.has_work:
        step(engine, answers)
    return answers[request.id]


def decoded_alone(world: World, engine: Engine, request: Request) -> Answer:
    """Others end with their first token."""
    return run_all(engine, [request, *company(5, 1)])[request.id]


def preempted(path: str) -> Callable[[World, Engine, Request], Answer]:
    def run(world: World, engine: Engine, request: Request) -> Answer:
        answers: dict[str, Answer] = defaultdict(Answer)
        engine.submit(request)
        sequence = engine._sequences[request.id]
        while len(answers[request.id].tokens) < TOKENS // 2:
            step(engine, answers)
        PATHS[path](engine, sequence)
        assert sequence.status in (Status.PREEMPTED, Status.OFFLOADED)
        while engine.has_work:
            step(engine, answers)
        return answers[request.id]

    return run


def found_in_cache(world: World, engine: Engine, request: Request) -> Answer:
    run_all(engine, [replace(request, id="before")])
    hits = engine.scheduler.pages.hits
    answer = run_all(engine, [request])[request.id]
    assert engine.scheduler.pages.hits > hits
    return answer


CASES = {
    "beside_many": Case(beside_many, CONFIG.rows, CONFIG.rows),
    "prompt_alone": Case(prompt_alone, QUARTER, CONFIG.rows),
    "decoded_alone": Case(decoded_alone, CONFIG.rows, QUARTER),
    "found_in_cache": Case(found_in_cache, QUARTER, QUARTER),
    **{path: Case(preempted(path), QUARTER, QUARTER) for path in PATHS},
}


def watched(world: World, case: Case, id: str) -> Answer:
    """The case's answer of a fresh engine, which ran it in the programs that the case names."""
    engine = with_resident(world.engine(), world.adapters[0])
    ran = watch_programs(engine)
    answer = case.run(world, engine, asked(world, id))
    assert {r.lanes for r in ran[id] if r.tokens > 1} == {case.prefill}
    assert {r.lanes for r in ran[id] if r.tokens == 1} == {case.decode}
    return answer


def differences(one: Answer, other: Answer) -> list[float]:
    """Of the log-probabilities of tokens that both report, up to the first token where the answers part: there both were
    as likely, but for rounding."""
    found: list[float] = []
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        tops, others = ({t.token: t.logprob, **dict(t.top)} for t in (a, b))
        found += [abs(tops[token] - others[token]) for token in tops.keys() & others.keys()]
        if a.token != b.token:
            found += [abs(tops[a.token] - others[b.token])]
            break
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_request_has_the_same_answer_in_every_program_but_for_rounding(world_of_dtype, name):
    world = world_of_dtype
    reference = watched(world, Case(alone, QUARTER, QUARTER), name)
    answer = watched(world, CASES[name], name)
    assert len(answer.tokens) == TOKENS
    if BITS and Engine._run is not perturbed_run:
        assert (answer.tokens, answer.logprobs) == (reference.tokens, reference.logprobs)
        return
    adapter = world.adapters[0]
    logits = world.plain.logits([*asked(world, name).prompt], world.plain.merged(adapter))
    found = differences(reference, answer)
    assert len(found) >= TOP
    assert max(found) <= tolerance(world, np.abs(logits).max())


def test_the_tolerance_tells_another_adapter(world_of_dtype):
    """Else the test above could not fail."""
    world = world_of_dtype
    engine = with_resident(world.engine(), *world.adapters[:2])
    requests = [replace(asked(world, f"r{i}"), adapter=a.ref) for i, a in enumerate(world.adapters[:2])]
    one, other = run_all(engine, requests).values()
    logits = world.plain.logits([*requests[0].prompt], world.plain.merged(world.adapters[0]))
    assert max(differences(one, other), default=np.inf) > tolerance(world, np.abs(logits).max())


def test_the_same_programs_give_the_same_bits(world_of_dtype):
    """Whatever the engine, its pool and its pages: the promise that holds everywhere."""
    world = world_of_dtype
    one, other = (watched(world, CASES["beside_many"], "same") for _ in range(2))
    assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


# --- the perturbation that stands for other CPUs


def test_a_perturbed_program_has_other_last_bits_and_only_these(world):
    """In each shape but the full decode one, which is the reference."""

    def run(program) -> dict[str, Answer]:
        with patch.object(Engine, "_run", program):
            return {n: watched(world, CASES[n], n) for n in CASES} | {
                "alone": watched(world, Case(alone, 2, 2), "alone")
            }

    exact, turned = run(exact_run), run(perturbed_run)
    logits = world.plain.logits([*asked(world, "").prompt], world.plain.merged(world.adapters[0]))
    for name, answer in exact.items():
        found = differences(answer, turned[name])
        assert answer.tokens == turned[name].tokens
        assert 0 < max(found) <= tolerance(world, np.abs(logits).max()), name


def test_each_program_is_perturbed_in_a_way_of_its_own(world, engine):
    seen = []
    with patch("perturbed.exact_run", lambda engine, *_: seen.append(engine.base)):
        for lanes, tokens in engine.shapes():
            idle = engine._edits.make(lanes, tokens=False, allowed=False)
            perturbed_run(engine, (engine._idle.make(lanes, tokens),), idle)
    bits = [{name: np.asarray(x).tobytes() for name, x in (base.arrays | base.layers).items()} for base in seen]
    exact = {name: np.asarray(x).tobytes() for name, x in (world.base.arrays | world.base.layers).items()}
    changed = [{name for name in exact if b[name] != exact[name]} for b in bits]
    assert changed == [{"attn_norm", "mlp_norm", "norm"}] * 3 + [set()]  # the last is the full decode program
    assert len({b["norm"] for b in bits}) == 4
    assert engine.base is world.base


def test_the_option_perturbs_every_engine(request):
    assert (Engine._run is perturbed_run) == request.config.getoption("--perturb-shapes")


# --- one op at a time


@dataclass(frozen=True)
class Op:
    """An op of some rows: the result of `run` is cut as these arrays are, along the first axis."""

    rows: tuple[np.ndarray, ...]
    run: Callable[..., object]


def op_case(name: str, dtype: str, draw: np.random.Generator) -> Op:
    """Arrays of a model whose products differ from shape to shape with AVX-512."""
    D, Y, R, G, J, K, H, V = 576, 192, 16, 8, 32, 3, 64, 320

    def some(*shape: int):
        return jnp.asarray(floats(draw, *shape) / shape[-1] ** 0.5, dtype)

    def places(*shape: int, top: int) -> np.ndarray:
        return draw.integers(0, top, shape).astype(np.int32)

    scale = jnp.ones((2, 4), jnp.float32)
    match name:
        case "product" | "product_back":
            w_YD = some(Y, D)
            blocks = np.empty((1, *packed_shape(D, Y, dtype)), jnp.dtype(dtype))
            pack(np.asarray(w_YD).T, blocks[0])
            packed = Packed(blocks=jnp.asarray(blocks), features_in=D, features_out=Y)
            if name == "product_back":
                return Op((some(64, Y),), partial(product_back, weight=packed, layer=jnp.int32(0)))
            native = partial(product, weights=[packed], layer=jnp.int32(0), dtype=jnp.float32)
            plain = partial(jnp.dot, b=w_YD.T, preferred_element_type=jnp.float32)
            return Op((some(64, D),), native if NATIVE else plain)
        case "gathered_lora":
            rows = [of_slots(some(2, 4, R, D), some(2, 4, R, Y), scale)]
            return Op((some(64, D), places(64, top=5) - 1), lambda x, slot: gathered_lora(x, rows, jnp.int32(1), slot))
        case "segmented_lora":
            arrays = some(G, J, D), some(G, R, D), some(G, R, Y), jnp.ones(G)
            return Op(arrays, lambda x, a, b, scale: segmented_lora(x, [(a, b, scale)]))
        case "paged_attention":
            k, v = some(2, G * 4, 16, K * H), some(2, G * 4, 16, K * H)
            page = np.arange(G * 4, dtype=np.int32).reshape(G, 4)
            position = np.arange(J, dtype=np.int32) + places(G, 1, top=64 - J)
            return Op(
                (some(G, J, 3 * K, H), page, position),
                lambda q, page, position: paged_attention(q, k, v, jnp.int32(1), page, position, window=None),
            )
        case "packed_attention":
            arrays = some(G, J, 3 * K, H), some(G, J, K, H), some(G, J, K, H), np.sort(places(G, J, top=3), 1)
            return Op(arrays, lambda q, k, v, segment: packed_attention(q, k, v, segment, window=None))
        case "rms_norm":
            weight = some(32)
            return Op((some(64, 32),), lambda x: rms_norm(x, weight, 1e-5))
        case "logsumexp":
            return Op((some(64, V).astype(jnp.float32),), logsumexp)
        case "row_summary":
            return Op((some(64, V).astype(jnp.float32),), lambda x: row_summary(x).logsumexp_T)
        case "top_k":
            return Op((some(64, V).astype(jnp.float32),), lambda x: top_k(x, 5)[0])
        case "draw":
            uniform_T = np.random.default_rng(9).uniform(size=64).astype(np.float32)

            def drawn(x_TV: jax.Array, uniform_T: jax.Array) -> jax.Array:
                same = dict.fromkeys(("temperature_B", "top_p_B"), jnp.full(uniform_T.shape, 0.9))
                none = {"top_k_B": jnp.zeros(uniform_T.shape, jnp.int32), "min_p_B": jnp.zeros(uniform_T.shape)}
                return draw_tokens(x_TV, x_TV.max(1), Choices(uniform_B=uniform_T, **same, **none), filtered=True)[0]

            return Op((some(64, V).astype(jnp.float32), uniform_T), drawn)
        case "adamw":

            def updated(grad_SRX: jax.Array) -> jax.Array:
                S = grad_SRX.shape[0]
                grad = {"q_proj": (grad_SRX[None], grad_SRX[None])}
                none = jax.tree.map(jnp.zeros_like, grad)
                moments = Moments(mu=none, nu=none, count=jnp.zeros(S, jnp.int32))
                hyper = Hyper.stack([IDLE | {"lr": 0.1}] * S)
                return update_slots(none, grad, moments, hyper, jnp.arange(S))[0]["q_proj"][0][0]

            return Op((some(8, 4, D).astype(jnp.float32),), updated)
        case "target_logprob":
            head = some(V, D)
            return Op(
                (some(G, J, D), places(G, J, 1, top=V), np.ones((G, J), bool)),
                lambda x, t, w: target_logprob(x, head.T, head, t, w, None, chunk=J, tied=True)[0],
            )
    raise AssertionError(name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPE_INDEPENDENT)
def test_an_op_has_the_bits_that_the_table_promises_of_fewer_rows(name, dtype):
    """All rows, a quarter and two of them; the tolerances are those of the ops' own tests."""
    op = op_case(name, dtype, np.random.default_rng(5))
    whole = jax.jit(op.run)(*op.rows)
    for count in (len(op.rows[0]) // 4, 2):
        some = jax.jit(op.run)(*(x[:count] for x in op.rows))
        head = jax.tree.map(lambda x, count=count: x[:count], whole)
        if SHAPE_INDEPENDENT[name]["cpu"][TABLE[name]["cpu"].body if NATIVE else "xla"]:
            assert_same_bits(some, head)
        else:
            assert_close(some, head, {"float32": F32, "bfloat16": BF16 | {"atol": F32["atol"]}}[dtype])


def test_the_table_has_every_body_of_every_op():
    bodies = {op: {p: {r.body, r.otherwise} for p, r in routes.items()} for op, routes in TABLE.items()}
    assert {op: {p: set(b) for p, b in platforms.items()} for op, platforms in SHAPE_INDEPENDENT.items()} == bodies
