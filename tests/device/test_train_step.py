"""The compiled step against a dense model with the adapter merged in, one unpacked example at a time.

Tolerances: both sides are float32 and sum in another order, over at most 30 tokens and a few hundred features.  Losses
agree to 1e-5 of themselves, gradients to 2e-5 of the largest gradient of their array.
"""

import dataclasses
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_world import tiny_expected, tiny_path
from train_world import (
    CONFIG,
    LANES,
    SPEC,
    OneBucket,
    RandomSource,
    assert_same_bits,
    batch_of,
    examples,
    host,
    lora,
    plain_loss,
    small_base,
    strong_rows,
)

from jaxlora.checkpoints.hf import HfSource
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.model.decoder import load_base
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.mesh import make_mesh
from pallas_kernels import NO_ADAPTER
from train.data.examples import Example
from train.step.batch import idle_batch
from train.step.optimizer import IDLE, Hyper
from train.step.state import SlotState, empty_state, fresh_seat, halves
from train.step.step import make_programs

LOSS, GRAD = 1e-5, 2e-5
SPECS = {0: lora(3), 2: lora(8), 5: lora(2, ("q_proj", "lm_head")), 8: lora(1, ("down_proj",))}  # by slot


def seat(programs, state, slot, rows):
    return programs.seat(state, jax.device_put(np.int32(slot)), jax.device_put(fresh_seat(rows)))


@pytest.fixture
def it():
    """The programs, and a state with a strong adapter in each slot of SPECS."""
    base, mesh = small_base(), make_mesh()
    state = empty_state(base, SPEC, mesh)
    programs = OneBucket(state, mesh)
    for slot, spec in SPECS.items():
        state = seat(programs, state, slot, strong_rows(spec, slot))
    return SimpleNamespace(base=base, programs=programs, state=state)


def slot_of(tree, slot):
    """A slot's part of a state or of halves, on the host."""
    return host(jax.tree.map(lambda x: x[:, slot] if x.ndim > 1 else x[slot], tree))


def accumulate(it, lanes):
    """(gradients, sums) of these lanes, on the host; the state is kept."""
    state = jax.tree.map(jnp.copy, it.state)
    state, sums = it.programs.accumulate(it.base, state, jax.device_put(lanes))
    return host(state.grads), host(sums)


def hyper_of(rows):
    return jax.device_put(Hyper.stack([IDLE | r for r in rows] + [IDLE] * (LANES - len(rows))))


def slots_of(slots):
    return jax.device_put(np.array(list(slots) + [NO_ADAPTER] * (LANES - len(slots)), np.int32))


@jax.jit
def plain(weights, scale, tokens, token_weights):
    return jax.value_and_grad(plain_loss)(weights, scale, tokens, token_weights)


def by_hand(it, slot, inside):
    """(summed loss, summed gradients) of the plain model under a slot's adapter."""
    rows = {} if slot == NO_ADAPTER else slot_of(it.state.pool, slot)
    weights = {t: (r.a_LSRX, r.b_LSRY) for t, r in rows.items()}
    scale = {t: r.scale_LS for t, r in rows.items()}
    got = [plain(weights, scale, e.tokens, e.weights) for e in inside]
    return sum(float(loss) for loss, _ in got), jax.tree.map(lambda *g: np.sum(g, axis=0), *[g for _, g in got])


def close_gradients(got, expected):
    for target, pair in expected.items():
        for half, g, e in zip("ab", got[target], pair, strict=True):
            np.testing.assert_allclose(g, e, rtol=0, atol=GRAD * np.abs(e).max(), err_msg=f"{target} {half}")


def same_length(seed, count, n=9):
    return examples(seed, count, n, n)


# loss and gradient


def test_a_gradient_takes_the_rows_of_one_layer_at_a_time(it):
    """Of five lanes, a number that nothing else has: nothing that is held is of all layers and lanes."""
    batch = jax.device_put(idle_batch(5, 32))
    program = it.programs.all.accumulate.lower(it.base, (it.state,), batch)
    text = program.compile().as_text()
    taken = [[int(n) for n in shape.split(",")] for shape in re.findall(r" = f32\[([0-9,]+)\]\S* gather\(", text)]
    lanes = {math.prod(shape[:-2]) for shape in taken if shape[-2:] == [SPEC.rank, it.base.config.d_model]}
    assert lanes == {5}
    assert f"[{it.base.config.layers},5,{SPEC.rank}," not in text


def test_gradients_of_many_tenants_are_those_of_merged_weights(it):
    """Four tenants and the base in one batch; slot 2 owns three lanes, its examples packed two and three to a lane."""
    data = {slot: same_length(slot % 100, 7) for slot in (*SPECS, NO_ADAPTER)}
    lanes = [
        (2, data[2][:3]),
        (0, data[0][:1]),
        (2, data[2][3:5]),
        (NO_ADAPTER, data[-1][:2]),
        (5, data[5][:2]),
        (8, data[8][:3]),
        (2, data[2][5:6]),
    ]
    grads, sums = accumulate(it, batch_of(lanes))
    for slot in SPECS:
        inside = [e for s, packed in lanes if s == slot for e in packed]
        loss, expected = by_hand(it, slot, inside)
        here = [g for g, (s, _) in enumerate(lanes) if s == slot]
        np.testing.assert_allclose(sums.loss_G[here].sum(), loss, rtol=LOSS)
        got = slot_of(grads, slot)
        close_gradients(got, expected)
        for target, (a, b) in got.items():
            rank = SPECS[slot].rank if target in SPECS[slot].targets else 0
            assert all(np.abs(a[:, :rank]).max((0, 2)) > 0), f"no gradient in A of {target}"
            assert all(np.abs(b[:, :rank]).max((0, 2)) > 0), f"no gradient in B of {target}"
            assert not a[:, rank:].any()
            assert not b[:, rank:].any()
    base_loss, _ = by_hand(it, NO_ADAPTER, data[-1][:2])
    np.testing.assert_allclose(sums.loss_G[3], base_loss, rtol=LOSS)
    for slot in set(range(SPEC.slots)) - set(SPECS):
        assert not any(g.any() for g in jax.tree.leaves(slot_of(grads, slot)))


def test_gradient_is_the_slope_of_the_reported_loss(it):
    """Central differences along a random direction; float32 leaves about 1e-3 of the slope."""
    batch = batch_of([(2, same_length(1, 3)), (2, same_length(2, 2))])
    grads, _ = accumulate(it, batch)
    check_slope(it, SPEC, CONFIG, batch, grads, slot=2, seed=3)


def check_slope(it, spec, config, batch, grads, *, slot, seed, step=1e-2, rtol=3e-3):
    """Differences of fourth order: the step may be large beside what float32 rounds off the loss."""
    direction = halves(strong_rows(lora(spec.rank, spec.targets), seed, config, spec))
    size = np.sqrt(sum(float((d**2).sum()) for d in jax.tree.leaves(direction)))

    def loss(shift):
        pool = {}
        for target, rows in it.state.pool.items():
            a, b = (shift / size * d for d in direction[target])
            pool[target] = dataclasses.replace(
                rows, a_LSRX=rows.a_LSRX.at[:, slot].add(a), b_LSRY=rows.b_LSRY.at[:, slot].add(b)
            )
        moved = SimpleNamespace(**vars(it) | {"state": dataclasses.replace(it.state, pool=pool)})
        return float(accumulate(moved, batch)[1].loss_G.sum())

    slope = (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)
    products = jax.tree.map(lambda g, d: float((g.astype("f8") * d).sum()), slot_of(grads, slot), direction)
    expected = sum(jax.tree.leaves(products)) / size
    assert abs(expected) > 0.05, "a direction that says nothing: choose another seed"
    np.testing.assert_allclose(slope, expected, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-mistral", "tiny-qwen2"])
def test_every_family_has_the_loss_transformers_gives_and_its_slope(name):
    """Lanes of 64 tokens: two blocks of attention, two chunks of the head.  A window, biases, q/k norms."""
    source = HfSource(tiny_path(name))
    mesh = make_mesh()
    base = load_base(source, mesh, dtype="float32")
    spec = PoolSpec(slots=2, rank=2, dtype="float32", targets=ALL_TARGETS)
    state = empty_state(base, spec, mesh)
    programs = OneBucket(state, mesh)
    rows = strong_rows(lora(2), 0, base.config, spec)
    pool = jax.device_put(jax.tree.map(lambda x: np.stack([np.zeros_like(x), x], 1), rows))  # in slot 1
    it = SimpleNamespace(base=base, programs=programs, state=dataclasses.replace(state, pool=pool))
    expected = tiny_expected(name)[1:]  # 7, 24 and 60 tokens
    inside = [Example(e.ids_T, np.r_[0, np.ones(len(e.ids_T) - 1)].astype(np.float32)) for e in expected]
    batch = batch_of([(NO_ADAPTER, inside[:2]), (NO_ADAPTER, inside[2:]), (1, inside[2:])], 3, 64)
    grads, sums = accumulate(it, batch)
    losses = []
    for e in expected:
        logits = e.logits_TV[:-1].astype("f8")
        logprob = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprob -= logits.max(-1, keepdims=True)
        losses.append(-logprob[np.arange(len(logits)), e.ids_T[1:]].sum())
    # 3e-4 nats a token: what two float32 models leave after rounding, see the tests of logits
    np.testing.assert_allclose(sums.loss_G[:2], [losses[0] + losses[1], losses[2]], atol=3e-4 * 60)
    only_tuned = dataclasses.replace(batch, weight_GJ=batch.weight_GJ * (batch.slot_G == 1)[:, None])
    check_slope(it, spec, base.config, only_tuned, grads, slot=1, seed=5, rtol=1e-2)


@pytest.mark.slow
def test_a_bfloat16_base_trains_float32_rows_along_nearly_the_same_gradient(it):
    """bfloat16 keeps 3 digits: the gradients point the same way to 1 %, and an update of 1e-5 is not lost."""
    base, mesh = load_base(RandomSource(), make_mesh(), dtype="bfloat16"), make_mesh()
    state = empty_state(base, SPEC, mesh)
    programs = OneBucket(state, mesh)
    half = SimpleNamespace(base=base, programs=programs, state=seat(programs, state, 0, strong_rows(SPECS[0], 0)))
    batch = batch_of([(0, same_length(1, 3))])
    got, expected = (
        np.concatenate([g.ravel() for g in jax.tree.leaves(accumulate(x, batch)[0])]).astype("f8") for x in (half, it)
    )
    assert got @ expected / np.linalg.norm(got) / np.linalg.norm(expected) > 0.99
    assert {x.dtype for x in jax.tree.leaves((half.state.pool, half.state.grads, half.state.moments.mu))} == {
        np.dtype(np.float32)
    }
    before = slot_of(half.state.pool, 0)
    state, *_ = programs.train_step(
        base, half.state, jax.device_put(batch), hyper_of([{"lr": 1e-5, "eps": 1e-12}]), slots_of([0])
    )
    moved = slot_of(state.pool, 0)["q_proj"].a_LSRX[:, :3] - before["q_proj"].a_LSRX[:, :3]
    np.testing.assert_allclose(np.abs(moved), 1e-5, rtol=0.02)


# packing and weights


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_example_packed_beside_others_is_as_alone(it, place):
    """Only one example of the lane has weight; its loss and gradient are those of the example in a lane of its own."""
    one, two, three = same_length(4, 3)
    quiet = [dataclasses.replace(e, weights=e.weights * np.float32(1e-30)) for e in (two, three)]
    for e in quiet:
        e.weights[:] = 0  # an Example without weights cannot be made
    packed = [*quiet[:place], one, *quiet[place:]]
    alone, alone_sums = accumulate(it, batch_of([(2, [one])]))
    beside, beside_sums = accumulate(it, batch_of([(2, packed)]))
    np.testing.assert_allclose(beside_sums.loss_G[0], alone_sums.loss_G[0], rtol=LOSS)
    close_gradients(slot_of(beside, 2), slot_of(alone, 2))
    assert (beside_sums.weight_G[0], beside_sums.hit_G[0]) == (alone_sums.weight_G[0], alone_sums.hit_G[0])


@pytest.mark.fault("N3")
def test_what_has_no_weight_is_not_trained_and_padding_is_nothing(it):
    """Other targets where the weight is 0, other ids and positions in the padding: not a bit changes."""
    batch = batch_of([(2, same_length(1, 2)), (0, same_length(2, 1))])
    expected = accumulate(it, batch)
    rng = np.random.default_rng(0)
    untrained = batch.weight_GJ == 0
    padding = batch.segment_GJ == 0
    assert (untrained & ~padding).any()
    other = dataclasses.replace(
        batch,
        target_GJ=np.where(untrained, rng.integers(0, CONFIG.vocab, untrained.shape), batch.target_GJ).astype(np.int32),
        token_GJ=np.where(padding, rng.integers(0, CONFIG.vocab, padding.shape), batch.token_GJ).astype(np.int32),
        position_GJ=np.where(padding, 7, batch.position_GJ).astype(np.int32),
    )
    assert_same_bits(accumulate(it, other), expected)


def test_tokens_after_the_last_weight_change_no_bit(it):
    """Nothing looks ahead."""
    (example,) = same_length(1, 1)
    example.weights[5:] = 0
    expected = accumulate(it, batch_of([(2, [example])]))
    other = example.tokens.copy()
    other[6:] = 3
    assert_same_bits(accumulate(it, batch_of([(2, [Example(other, example.weights)])])), expected)


def test_a_prompt_does_condition_what_follows(it):
    """The counterpart: the loss on the completion depends on the prompt, which itself has no weight."""
    (example,) = same_length(1, 1)
    assert not example.weights[:3].any()
    other = example.tokens.copy()
    other[0] = (other[0] + 1) % CONFIG.vocab
    first, second = (accumulate(it, batch_of([(2, [Example(t, example.weights)])])) for t in (example.tokens, other))
    assert first[1].loss_G[0] != second[1].loss_G[0]


def test_no_weights_at_all_give_exactly_nothing(it):
    batch = batch_of([(2, same_length(1, 2))])
    grads, sums = accumulate(it, dataclasses.replace(batch, weight_GJ=np.zeros_like(batch.weight_GJ)))
    assert not any(g.any() for g in jax.tree.leaves(grads))
    assert not any(x.any() for x in jax.tree.leaves(sums))


@pytest.mark.parametrize("factor", [8.0, 0.25, -1.0])
def test_sums_and_gradients_scale_with_the_weights(it, factor):
    """The step divides by nothing.  A power of two scales every bit; so does the sign."""
    batch = batch_of([(2, same_length(1, 2))])
    grads, sums = accumulate(it, batch)
    scaled = dataclasses.replace(batch, weight_GJ=batch.weight_GJ * np.float32(factor))
    got_grads, got_sums = accumulate(it, scaled)
    for got, expected in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(got, factor * expected)
    np.testing.assert_array_equal(got_sums.loss_G, factor * sums.loss_G)
    np.testing.assert_array_equal(got_sums.weight_G, factor * sums.weight_G)
    np.testing.assert_array_equal(got_sums.hit_G, sums.hit_G)
    np.testing.assert_array_equal(got_sums.count_G, sums.count_G)


def test_sums_count_weights_targets_and_hits(it):
    """Targets that are the likeliest token, made so with the model's own choice, are hits; the others are not."""
    (example,) = same_length(1, 1)
    example.weights[:] = [0, 0, 0, 0.5, 0.25, 1, 1, 2, -1]
    batch = batch_of([(2, [example])])
    _, sums = accumulate(it, batch)
    assert (sums.weight_G[0], sums.count_G[0]) == (3.75, 6)
    found = []
    for j in range(2, 8):  # try every token as target of this position
        hits = 0
        for start in range(0, CONFIG.vocab, LANES):
            tries = [Example(example.tokens.copy(), example.weights.copy()) for _ in range(LANES)]
            guess = batch_of([(2, [e]) for e in tries])
            guess.weight_GJ[:] = 0
            guess.weight_GJ[:, j] = 1
            guess.target_GJ[:, j] = (start + np.arange(LANES)) % CONFIG.vocab
            hit = np.asarray(it.programs.evaluate(it.base, it.state.pool, jax.device_put(guess)).hit_G)
            new = (start + np.arange(LANES) < CONFIG.vocab) & (hit > 0)
            hits += int(new.sum())
            found += [(j, int(start + g)) for g in np.flatnonzero(new)]
        assert hits == 1
    for j, token in found[:3]:
        batch.target_GJ[0, j] = token
    for j, token in found[3:]:
        batch.target_GJ[0, j] = (token + 1) % CONFIG.vocab
    _, sums = accumulate(it, batch)
    assert sums.hit_G[0] == 3


# accumulation and the two halves of the step


@pytest.mark.fault("N5")
def test_accumulating_twice_then_applying_is_one_step_of_both(it):
    """Windows add up bit for bit: two micro-batches, and both lanes in one batch."""
    one, two = (2, same_length(1, 3)), (2, same_length(2, 1))
    other = (0, same_length(3, 2))
    hyper, due = hyper_of([{"lr": 0.1, "decay": 0.2, "clip": 1.0, "divisor": 20.0}]), slots_of([2])
    state = jax.tree.map(jnp.copy, it.state)
    for lanes in ([one, other], [two]):
        state, _ = it.programs.accumulate(it.base, state, jax.device_put(batch_of(lanes)))
    split, split_report = it.programs.apply(state, hyper, due)
    state, _ = it.programs.accumulate(it.base, it.state, jax.device_put(batch_of([one, other, two])))
    whole, whole_report = it.programs.apply(state, hyper, due)
    assert_same_bits(host((split, split_report)), host((whole, whole_report)))
    assert not any(g.any() for g in jax.tree.leaves(slot_of(split.grads, 2)))  # the window is closed
    assert all(g[:, :3].any() for g in jax.tree.leaves(slot_of(split.grads, 0)))  # slot 0 was not due: it goes on


def test_lanes_in_passes_have_the_gradients_and_sums_of_one_pass(it):
    """Another program for the same sums, so rounding may differ.  Each slot has lanes in both, and sums keep their order."""
    batch = batch_of([((2, 0, 5)[g % 3], same_length(g, 1 + g % 4 % 3)) for g in range(LANES)])
    grads, sums = accumulate(it, batch)
    programs = make_programs((it.state,), make_mesh(), passes=2)
    (state,), in_passes = programs.accumulate(it.base, (it.state,), jax.device_put(batch))
    for g, e in zip(jax.tree.leaves(host((state.grads, in_passes))), jax.tree.leaves((grads, sums)), strict=True):
        np.testing.assert_allclose(g, e, rtol=2e-5, atol=1e-5)
    assert sums.weight_G[0] != sums.weight_G[LANES // 2]  # another order would not pass


@pytest.mark.fault("N5")
@pytest.mark.slow
@pytest.mark.parametrize("ways", [1, 2, 3, 6])
def test_a_batch_split_over_lanes_or_steps_has_one_gradient(it, ways):
    """Six examples of different lengths, in one lane, in several, and in as many micro-batches."""
    inside = examples(7, 6, 6)
    _, expected = by_hand(it, 2, inside)
    parts = [inside[i::ways] for i in range(ways)]
    side_by_side, _ = accumulate(it, batch_of([(2, p) for p in parts]))
    state = it.state
    for p in parts:
        state, _ = it.programs.accumulate(it.base, state, jax.device_put(batch_of([(2, p)])))
    close_gradients(slot_of(side_by_side, 2), expected)
    close_gradients(slot_of(state.grads, 2), expected)


def test_train_step_is_accumulate_and_apply(it):
    """Two programs for the same thing, so rounding may differ: weights to 1e-5 of the learning rate."""
    batch = jax.device_put(batch_of([(0, same_length(1, 2)), (2, same_length(2, 3)), (5, same_length(3, 1))]))
    hyper, due = hyper_of([{"lr": 0.1, "eps": 1e-4}, {"lr": 0.1, "eps": 1e-4, "clip": 0.1}]), slots_of([2, 0])
    state, sums = it.programs.accumulate(it.base, jax.tree.map(jnp.copy, it.state), batch)
    state, report = it.programs.apply(state, hyper, due)
    expected = host((state, sums, report))
    got = host(it.programs.train_step(it.base, it.state, batch, hyper, due))
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=2e-5, atol=1e-5)
    assert got[2].finite_U[:2].all()


def test_evaluate_is_the_loss_of_the_step_that_follows(it):
    batch = jax.device_put(batch_of([(0, same_length(1, 2)), (2, same_length(2, 3)), (NO_ADAPTER, same_length(3, 1))]))
    evaluated = host(it.programs.evaluate(it.base, it.state.pool, batch))
    pool = slot_of(it.state.pool, 2)
    state, sums, _ = it.programs.train_step(it.base, it.state, batch, hyper_of([{"lr": 0.1}]), slots_of([2]))
    np.testing.assert_allclose(evaluated.loss_G, sums.loss_G, rtol=1e-6)
    np.testing.assert_array_equal(evaluated.hit_G, sums.hit_G)
    after = host(it.programs.evaluate(it.base, state.pool, batch))
    assert after.loss_G[1] < evaluated.loss_G[1] - 0.1  # the due slot learns
    np.testing.assert_array_equal(after.loss_G[[0, 2]], evaluated.loss_G[[0, 2]])  # nobody else moves
    assert not np.array_equal(slot_of(state.pool, 2)["q_proj"].a_LSRX, pool["q_proj"].a_LSRX)


# lanes without an adapter, seats


def test_lanes_without_an_adapter_change_nothing_and_read_no_slot(it):
    """Their loss is the base's, with every slot full of NaN too, and no gradient goes anywhere."""
    batch = batch_of([(NO_ADAPTER, same_length(1, 3)), (NO_ADAPTER, same_length(2, 1))])
    before = host(it.state)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), it.state.pool)
    state, sums = it.programs.accumulate(it.base, it.state, jax.device_put(batch))
    assert_same_bits(host(state), before)
    assert_same_bits(host(it.programs.evaluate(it.base, poisoned, jax.device_put(batch))), host(sums))
    state, _, report = it.programs.train_step(it.base, state, jax.device_put(batch), hyper_of([]), slots_of([]))
    assert_same_bits(host(state), before)
    assert not report.norm_U.any()


def random_seat(seed):
    """A whole SlotState of noise."""
    rng = np.random.default_rng(seed)
    like = fresh_seat(strong_rows(lora(8), 0))
    noise = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)
    return dataclasses.replace(noise, moments=dataclasses.replace(noise.moments, count=np.int32(41)))


@pytest.mark.parametrize("slot", [0, 4, 8])
def test_a_seat_comes_back_bit_for_bit_and_touches_no_other_slot(it, slot):
    """Scale and count too; the open window of whoever sat there is gone."""
    state, _ = it.programs.accumulate(
        it.base, it.state, jax.device_put(batch_of([(s, same_length(s, 1)) for s in SPECS]))
    )
    before = [slot_of(state, s) for s in range(SPEC.slots)]
    given, number = random_seat(slot), jax.device_put(np.int32(slot))
    state = it.programs.seat(state, number, jax.device_put(given))
    got = it.programs.unseat(state, number)
    assert isinstance(got, SlotState)
    assert_same_bits(host(got), host(given))
    assert not any(g.any() for g in jax.tree.leaves(slot_of(state.grads, slot)))
    for s in set(range(SPEC.slots)) - {slot}:
        assert_same_bits(slot_of(state, s), before[s])


def test_a_copy_that_was_unseated_stays_what_it_was(it):
    """Later steps donate the state, never the copy."""
    copy = it.programs.unseat(it.state, jax.device_put(np.int32(2)))
    before = host(copy)
    state = it.state
    for _ in range(2):
        batch = jax.device_put(batch_of([(2, same_length(1, 2))]))
        state, *_ = it.programs.train_step(it.base, state, batch, hyper_of([{"lr": 1.0}]), slots_of([2]))
    assert_same_bits(host(copy), before)
    assert not np.array_equal(slot_of(state.pool, 2)["q_proj"].a_LSRX, before.rows["q_proj"].a_LSRX)
