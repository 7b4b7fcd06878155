"""How large an adapter is, by hand: parameters against those of published models, bytes against arrays."""

import numpy as np
import pytest
from base_shapes import SMOLLM2

from jaxlora.core.adapter_size import AdapterSize, adapter_size
from jaxlora.core.lora import ALL_TARGETS, LoraSpec, ModuleException

BASE = 134_515_008  # of SmolLM2-135M, whose head is its embedding
QUERY, VALUE = 576 + 576, 576 + 192  # features in and out
HEAD = 576 + 49_152


def size(**spec) -> AdapterSize:
    return adapter_size(SMOLLM2, LoraSpec(**{"alpha": 1.0} | spec))


def test_the_line_is_the_one_that_peft_prints_of_this_model():
    told = str(size(rank=8, targets=("q_proj", "v_proj")))
    assert told == (
        "trainable params: 460,800 || all params: 134,975,808 || trainable%: 0.3414 || bytes: 1,843,200"
    )  # 30 layers x 8 x (1,152 + 768); four bytes each


def test_all_targets_and_the_head():
    found = size(rank=2, targets=ALL_TARGETS)
    layer = 2 * QUERY + 2 * VALUE + 3 * (576 + 1536)
    assert found.trainable_parameters == 2 * (30 * layer + HEAD)
    assert found.all_parameters == BASE + found.trainable_parameters
    assert found.nbytes == 4 * found.trainable_parameters


def test_modules_count_at_their_own_rank_and_take_bytes_at_the_largest():
    exceptions = (
        ModuleException(target="q_proj", layer=3, rank=0, alpha=1.0),
        ModuleException(target="v_proj", layer=29, rank=6, alpha=1.0),
    )
    found = size(rank=4, targets=("q_proj", "v_proj"), exceptions=exceptions)
    assert found.trainable_parameters == 4 * (29 * QUERY + 29 * VALUE) + 6 * VALUE
    held = [np.zeros((30, 6, n), np.float32) for n in (576, 576, 576, 192)]
    assert found.nbytes == sum(array.nbytes for array in held)


def test_a_size_comes_back_from_json_among_other_values():
    found = size(rank=3)
    assert AdapterSize.from_json(found.to_json() | {"form": "merged"}) == found
    assert found.to_json()["trainable_percent"] == pytest.approx(
        100 * found.trainable_parameters / (BASE + found.trainable_parameters)
    )
