"""The suffix of a parameter is its contract: what breaks it is refused by name, when the op is traced."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import op as attention
from pallas_kernels.cross_entropy import op as cross_entropy
from pallas_kernels.gathered_lora import op as gathered_lora
from pallas_kernels.gathered_lora.pool_rows import of_slots
from pallas_kernels.paged_attention import op as paged_attention
from pallas_kernels.segmented_lora import op as segmented_lora
from pallas_kernels.shapes import shaped


@shaped
def expand(h_TR, b_SRY, slot_T=None, *, scale_S=None, rank=0, y_t=None, XY=None):
    """Docs stay."""
    return h_TR.shape, rank


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_right_shapes_pass_through():
    assert expand(zeros(2, 3), zeros(5, 3, 4), zeros(2), scale_S=zeros(5), rank=7) == ((2, 3), 7)
    assert (expand.__name__, expand.__doc__) == ("expand", "Docs stay.")


def test_none_and_absent_arguments_are_skipped():
    assert expand(zeros(2, 3), zeros(5, 3, 4), None, scale_S=None) == ((2, 3), 0)
    assert expand(zeros(2, 3), zeros(5, 3, 4)) == ((2, 3), 0)


def test_names_without_a_capital_suffix_are_no_contract():
    assert expand(zeros(2, 3), zeros(5, 3, 4), rank=zeros(9, 9), y_t=zeros(9), XY=zeros(9, 9, 9))[0] == (2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        pytest.param((zeros(2), zeros(5, 3, 4)), {}, ["expand: h_TR", "T·R", "(2,)"], id="axis missing"),
        pytest.param((zeros(2, 3), zeros(5, 3)), {}, ["expand: b_SRY", "S·R·Y", "(5, 3)"], id="axis missing, second"),
        pytest.param((zeros(2, 3, 1), zeros(5, 3, 4)), {}, ["h_TR", "(2, 3, 1)"], id="axis too many"),
        pytest.param(
            (zeros(2, 3), zeros(5, 8, 4)), {}, ["axis R is 8 in b_SRY (5, 8, 4)", "3 in h_TR"], id="sizes differ"
        ),
        pytest.param(
            (zeros(2, 3), zeros(5, 3, 4), zeros(1)), {}, ["axis T is 1 in slot_T"], id="one does not broadcast"
        ),
        pytest.param((zeros(2, 3), zeros(5, 3, 4)), {"scale_S": zeros(4)}, ["axis S is 4 in scale_S"], id="by keyword"),
        pytest.param((), {"b_SRY": zeros(5, 3, 4), "h_TR": zeros(2, 9)}, ["axis R is 3 in b_SRY"], id="all by keyword"),
    ],
)
def test_a_broken_suffix_is_refused_by_name(args, kwargs, words):
    with pytest.raises(ValueError, match="expand") as error:
        expand(*args, **kwargs)
    for word in words:
        assert word in str(error.value)


def test_a_letter_twice_in_one_suffix_is_one_size():
    @shaped
    def square(m_TT):
        return m_TT.shape

    assert square(zeros(3, 3)) == (3, 3)
    with pytest.raises(ValueError, match="axis T is 4 in m_TT"):
        square(zeros(3, 4))


def test_the_check_runs_when_traced_and_costs_a_compiled_call_nothing():
    checks = []

    class Watched:
        def __init__(self, x):
            self.x = x

        @property
        def shape(self):
            checks.append(self.x.shape)
            return self.x.shape

    @jax.jit
    def step(x):
        expand(Watched(x), Watched(jnp.zeros((5, 3, 4))))
        return x + 1

    step(jnp.zeros((2, 3)))
    seen = len(checks)
    step(jnp.ones((2, 3)))
    assert len(checks) == seen > 0
    with pytest.raises(ValueError, match="axis R"):
        step(jnp.zeros((2, 4)))


@pytest.mark.parametrize(
    ("op", "args", "words"),
    [
        pytest.param(
            attention.packed_attention,
            (zeros(2, 4, 6, 8), zeros(2, 4, 3, 8), zeros(2, 4, 3, 8), zeros(2, 5)),
            "axis J is 5 in segment_GJ",
            id="packed_attention",
        ),
        pytest.param(
            paged_attention.paged_attention,
            (zeros(2, 1, 6, 8), zeros(1, 9, 4, 24), zeros(1, 8, 4, 24), 0, zeros(2, 3), zeros(2, 1)),
            "axis P is 8 in v_LPZF",
            id="paged_attention",
        ),
        pytest.param(
            cross_entropy.target_logprob,
            (zeros(2, 4, 8), zeros(8, 9), zeros(8, 9), zeros(2, 4, 1), zeros(2, 4), None),
            "axis V is 8 in back_VD",
            id="target_logprob",
        ),
        pytest.param(
            gathered_lora.gathered_lora,
            (zeros(4, 8), [of_slots(zeros(1, 2, 3, 8), zeros(1, 2, 3, 5), zeros(1, 2))], 0, zeros(3)),
            "slot_G has 3 lanes, which do not divide the 4 tokens",
            id="gathered_lora",
        ),
        pytest.param(
            segmented_lora.segmented_lora,
            (zeros(4, 8), [(zeros(2, 3, 8), zeros(2, 3, 5), zeros(2))]),
            "x_GJX must have axes",
            id="segmented_lora",
        ),
    ],
)
def test_public_ops_check_their_suffixes(op, args, words):
    """A slot per token too few would be read as the last one's: a gather past the end clamps."""
    extra = {"window": None} if "window" in inspect.signature(op).parameters else {}
    extra |= {"chunk": 4, "tied": False} if "chunk" in inspect.signature(op).parameters else {}
    with pytest.raises(ValueError, match=words):
        op(*args, **extra)
