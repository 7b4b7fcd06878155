"""AdamW over slots against a plain NumPy loop; learning rate schedules; settings that cannot be."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from train_world import assert_same_bits, host, optimizer

from jaxlora.core.errors import ConfigInvalid
from train.step.optimizer import IDLE, NO_CLIP, Hyper, Moments, Optimizer
from train.step.update import update_slots

SHAPES = {"q_proj": ((2, 3, 5), (2, 3, 4)), "lm_head": ((1, 3, 6), (1, 3, 7))}  # (a_LRX, b_LRY)
ROWS = [
    {"lr": 0.1},
    {"lr": 0.02, "decay": 0.5},
    {"lr": 0.03, "clip": 0.01},
    {"lr": 0.05, "b1": 0.0, "b2": 0.0, "eps": 0.1},
    {"lr": 0.01, "b1": 0.5, "b2": 0.9, "divisor": 37.5, "clip": 0.7},
    {"lr": 0.2, "divisor": -3.0},
    {"lr": 0.0, "decay": 0.3},
    {"lr": 0.04, "decay": 0.1, "clip": 1e6, "eps": 1e-4},
]
FULL_ROWS = [IDLE | row for row in ROWS]
STEPS = 4


def draw(rng, size=1.0):
    """One tenant's halves."""
    return {t: tuple((size * rng.normal(size=s)).astype(np.float32) for s in pair) for t, pair in SHAPES.items()}


def stacked(trees):
    """Slot axis 1, as the pool has it."""
    return jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs], 1), *trees)


def zeros_like(tree):
    return jax.tree.map(np.zeros_like, tree)


@jax.jit
def over_slots(weights, grads, moments, hyper):
    """(new weights, new moments, norms, finite) of all slots."""
    slots = jnp.arange(moments.count.shape[0])
    weights, grads, moments, report = update_slots(weights, grads, moments, hyper, slots)
    return weights, moments, report.norm_U, report.finite_U


def by_hand(weights, gradients, row):
    """One tenant, float64, step by step from its list of summed gradients: (weights, m, v, norms)."""
    h = {k: float(np.float32(v)) for k, v in row.items()}
    keys = [(t, i) for t in SHAPES for i in (0, 1)]
    w = {k: weights[k[0]][k[1]].astype("f8") for k in keys}
    m, v = ({k: np.zeros_like(w[k]) for k in keys} for _ in "mv")
    norms = []
    for n, summed in enumerate(gradients, start=1):
        g = {k: summed[k[0]][k[1]].astype("f8") / h["divisor"] for k in keys}
        norms.append(math.sqrt(sum(float((x * x).sum()) for x in g.values())))
        shrink = min(1.0, h["clip"] / norms[-1])
        for k in keys:
            m[k] = h["b1"] * m[k] + (1 - h["b1"]) * g[k] * shrink
            v[k] = h["b2"] * v[k] + (1 - h["b2"]) * (g[k] * shrink) ** 2
            m_hat, v_hat = m[k] / (1 - h["b1"] ** n), v[k] / (1 - h["b2"] ** n)
            w[k] = w[k] - h["lr"] * (m_hat / (np.sqrt(v_hat) + h["eps"]) + h["decay"] * w[k])
    return w, m, v, norms


def run(rows, weights, gradients, moments=None, count=0):
    """The real one: `gradients` is a list of steps, each a list with one tree per slot."""
    w = stacked(weights)
    zero = jax.tree.map(jnp.zeros_like, w)
    moments = moments or Moments(mu=zero, nu=zero, count=jnp.full(len(rows), count, jnp.int32))
    norms, finite = [], []
    for step in gradients:
        w, moments, norm, ok = over_slots(w, stacked(step), moments, jax.device_put(Hyper.stack(rows)))
        norms.append(np.asarray(norm))
        finite.append(np.asarray(ok))
    return w, moments, norms, finite


def test_adamw_of_every_slot_is_what_a_loop_computes():
    rng = np.random.default_rng(0)
    weights = [draw(rng) for _ in ROWS]
    gradients = [[draw(rng, 0.3) for _ in ROWS] for _ in range(STEPS)]
    got, moments, norms, finite = run(FULL_ROWS, weights, gradients)
    assert np.all(finite)
    assert moments.count.tolist() == [STEPS] * len(ROWS)
    for u, row in enumerate(FULL_ROWS):
        w, m, v, expected_norms = by_hand(weights[u], [g[u] for g in gradients], row)
        for (target, half), expected in w.items():
            # 1 - b2^n is near 0.001: float32 leaves 1e-4 of an update, whose size is about lr a step.
            atol = 1e-4 * row["lr"] * STEPS + 1e-6
            np.testing.assert_allclose(got[target][half][:, u], expected, rtol=0, atol=atol, err_msg=f"slot {u}")
            np.testing.assert_allclose(moments.mu[target][half][:, u], m[target, half], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(moments.nu[target][half][:, u], v[target, half], rtol=2e-5, atol=1e-9)
        np.testing.assert_allclose([n[u] for n in norms], expected_norms, rtol=1e-6)


def test_loraplus_moves_b_by_its_own_lr_decay_included():
    """A as with lr, B as with ratio times lr: bit for bit, the ratio being a power of two."""
    rng = np.random.default_rng(8)
    weights, gradients = draw(rng), draw(rng)
    row = IDLE | {"lr": 0.25, "decay": 0.5}
    got, *_ = run([row | {"b_ratio": 4.0}], [weights], [[gradients]])
    plain, *_ = run([row], [weights], [[gradients]])
    for target, (a, b) in got.items():
        w_b = weights[target][1]
        assert_same_bits(host(a), host(plain[target][0]))
        moved, step = np.asarray(b)[:, 0] - w_b, np.asarray(plain[target][1])[:, 0] - w_b
        np.testing.assert_allclose(moved, 4 * step, rtol=1e-5, atol=1e-6)


def test_slots_do_not_see_each_other():
    """Another slot's gradient, NaN too, changes no bit of this one."""
    rng = np.random.default_rng(1)
    weights = [draw(rng) for _ in ROWS]
    gradients = [draw(rng) for _ in ROWS]
    calm = run(FULL_ROWS, weights, [gradients])
    wild = [jax.tree.map(lambda x: x * np.float32(np.nan), g) if u % 2 else g for u, g in enumerate(gradients)]
    stormy = run(FULL_ROWS, weights, [wild])
    for u in range(0, len(ROWS), 2):
        take = jax.tree.map(lambda x, u=u: np.asarray(x)[:, u], (calm[0], calm[1].mu, calm[1].nu))
        assert_same_bits(
            jax.tree.map(lambda x, u=u: np.asarray(x)[:, u], (stormy[0], stormy[1].mu, stormy[1].nu)), take
        )


def test_bias_correction_counts_the_slots_own_steps():
    """With zero moments and n - 1 updates behind it, the first moment is divided by 1 - b1^n."""
    rng = np.random.default_rng(2)
    weights, gradients = draw(rng), draw(rng)
    zero = jax.tree.map(jnp.zeros_like, stacked([weights] * 3))
    counts = [0, 1, 9]
    moments = Moments(mu=zero, nu=zero, count=jnp.array(counts, jnp.int32))
    row = IDLE | {"lr": 1.0, "b1": 0.9, "b2": 0.5, "eps": 1e-12}
    got, new, _, _ = run([row] * 3, [weights] * 3, [[gradients] * 3], moments)
    assert new.count.tolist() == [1, 2, 10]
    for u, n in enumerate(c + 1 for c in counts):
        size = 0.1 / (1 - 0.9**n) / math.sqrt(0.5 / (1 - 0.5**n))  # |m_hat| / sqrt(v_hat)
        moved = weights["q_proj"][0] - np.asarray(got["q_proj"][0][:, u])
        np.testing.assert_allclose(moved, size * np.sign(gradients["q_proj"][0]), rtol=1e-4, atol=1e-5)


def test_an_update_takes_no_more_memory_than_a_slot():
    """Whatever the number of slots, and of those that are due: nothing of all slots is copied."""
    slots, rng = 64, np.random.default_rng(9)
    one = {"q_proj": tuple(rng.normal(size=(3, 8, x)).astype(np.float32) for x in (96, 64))}
    weights, zero = stacked([one] * slots), stacked([zeros_like(one)] * slots)
    moments = Moments(mu=zero, nu=zero, count=jnp.zeros(slots, jnp.int32))
    args = (
        weights,
        stacked([one] * slots),
        moments,
        jax.device_put(Hyper.stack(FULL_ROWS)),
        jnp.arange(len(FULL_ROWS)),
    )
    program = jax.jit(update_slots, donate_argnums=(0, 1, 2)).lower(*args).compile()
    of_slot = 4 * sum(x.nbytes for x in one["q_proj"])  # weights, gradients and moments
    assert program.memory_analysis().temp_size_in_bytes < of_slot


def test_a_zero_gradient_is_a_finite_update_of_norm_zero():
    """No 0/0 in the clip; decay still acts, and the step counts."""
    rng = np.random.default_rng(3)
    weights = draw(rng)
    rows = [IDLE | {"lr": 0.1}, IDLE | {"lr": 0.1, "decay": 0.5, "clip": 1.0}]
    got, moments, norms, finite = run(rows, [weights] * 2, [[zeros_like(weights)] * 2])
    assert norms[0].tolist() == [0, 0]
    assert finite[0].tolist() == [True, True]
    assert moments.count.tolist() == [1, 1]
    w = weights["q_proj"][0]
    np.testing.assert_array_equal(got["q_proj"][0][:, 0], w)
    np.testing.assert_allclose(got["q_proj"][0][:, 1], w * (1 - 0.1 * 0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "changes"),
    [
        (np.nan, {}),
        (np.inf, {}),
        (-np.inf, {"clip": 1.0}),
        (3e38, {"clip": 1.0}),  # each finite, their norm not
        (None, {"lr": np.inf}),
        (None, {"decay": np.inf}),
        (None, {"divisor": 0.0}),
        (None, {"divisor": np.nan}),
    ],
)
def test_what_is_not_finite_keeps_weights_moments_and_count(value, changes):
    rng = np.random.default_rng(4)
    weights, first, bad = draw(rng), draw(rng), draw(rng)
    before = run([IDLE | {"lr": 0.1}], [weights], [[first]])
    if value is not None:
        bad["lm_head"][1][0, 1, 2] = value
        if value == 3e38:
            bad["lm_head"][1][0, 1, 3] = value
    w = jax.tree.map(lambda x: np.asarray(x)[:, 0], before[0])
    after = run([IDLE | {"lr": 0.1} | changes], [w], [[bad]], before[1])
    assert not after[3][0][0]
    assert_same_bits(host(after[:2]), host(before[:2]))


# schedules


@pytest.mark.parametrize(
    ("schedule", "warmup", "total", "expected"),
    [
        ("constant", 0, 3, [8, 8, 8, 8, 8]),
        ("linear", 0, 4, [8, 6, 4, 2, 0, 0]),
        ("cosine", 0, 4, [8, 4 + 4 * math.sqrt(0.5), 4, 4 - 4 * math.sqrt(0.5), 0, 0]),
        ("constant", 4, 6, [2, 4, 6, 8, 8, 8]),
        ("linear", 2, 6, [4, 8, 8, 6, 4, 2, 0]),
        ("cosine", 1, 3, [8, 8, 4, 0]),
        ("linear", 3, 3, [8 / 3, 16 / 3, 8, 8, 0]),  # nothing but warm-up; what comes after never runs
        ("linear", 0, 1, [8, 0]),
        ("cosine", 1, 1, [8, 8, 0]),
    ],
)
def test_learning_rates(schedule, warmup, total, expected):
    o = Optimizer(lr=8.0, schedule=schedule, warmup_steps=warmup, total_steps=total)
    np.testing.assert_allclose([o.lr_at(n) for n in range(len(expected))], expected, atol=1e-12)
    assert all(o.lr_at(n) > 0 for n in range(total))  # every step that runs trains


def test_a_row_holds_every_field_of_hyper():
    o = optimizer(
        lr=4.0,
        weight_decay=0.25,
        b1=0.5,
        b2=0.75,
        eps=1e-3,
        clip=2.0,
        schedule="linear",
        total_steps=4,
        loraplus_ratio=16,
    )
    row = o.row(1, 7.0)
    expected = {
        "lr": 3.0,
        "decay": 0.25,
        "b1": 0.5,
        "b2": 0.75,
        "eps": 1e-3,
        "clip": 2.0,
        "b_ratio": 16,
        "divisor": 7.0,
    }
    assert row == expected
    assert optimizer(clip=None).row(0, 1.0)["clip"] == NO_CLIP
    rows = Hyper.stack([row, IDLE])
    for field in dataclasses.fields(Hyper):
        value = getattr(rows, field.name)
        assert value.dtype == np.float32
        assert value.tolist() == [np.float32(row[field.name]), np.float32(IDLE[field.name])]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", -1e-9),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", 1e39),
        ("schedule", "quadratic"),
        ("total_steps", 0),
        ("warmup_steps", -1),
        ("warmup_steps", 101),
        ("b1", 1.0),
        ("b1", -0.1),
        ("b1", math.nan),
        ("b2", 1.0),
        ("b2", -0.1),
        ("b2", 0.99999999999),  # 1 in float32
        ("eps", 0.0),
        ("eps", 1e-60),  # 0 in float32, and 0 / 0 in every padded row
        ("eps", math.nan),
        ("eps", math.inf),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("clip", 0.0),
        ("clip", -1.0),
        ("clip", math.inf),
        ("clip", math.nan),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigInvalid, match=field) as caught:
        optimizer(**{field: value})
    assert caught.value.param == field
    assert str(value) in caught.value.message


@pytest.mark.parametrize(
    "settings",
    [{"lr": 0.0}, {"b1": 0.0, "b2": 0.0}, {"weight_decay": 0.0}, {"warmup_steps": 100}, {"clip": 1e-9}, {"clip": None}],
)
def test_settings_at_their_limits_are_accepted(settings):
    optimizer(**settings)
