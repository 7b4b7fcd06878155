"""Samples of the Gradient wire as examples to train on.  No HTTP and no jax here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxlora.checkpoints.tokenizer import Tokenizer
from jaxlora.core.errors import InvalidRequest
from serve.api.gradient.schemas import Sample
from train.data.examples import Example


def examples_of(tokenizer: Tokenizer, samples: Sequence[Sample], longest: int) -> list[Example]:
    """An example for each sample: its spans' tokens one after the other, begun as the base begins a text.

    A token is trained if its span is and something predicts it; its weight is the sample's multiplier, which may be
    negative.  Raises InvalidRequest, naming the sample, for one that is too long, trains nothing, or has no such multiplier.
    """
    opening = [i for i in tokenizer.encode("")[:1] if i not in tokenizer.eos_ids]
    return [_example(tokenizer, sample, f"samples[{i}]", longest, opening) for i, sample in enumerate(samples)]


def _example(tokenizer: Tokenizer, sample: Sample, where: str, longest: int, opening: list[int]) -> Example:
    with np.errstate(over="ignore"):  # reported below
        multiplier = np.float32(sample.multiplier)
    if multiplier == 0 or not np.isfinite(multiplier):
        field = f"{where}.fineTuningParameters.multiplier"
        raise InvalidRequest(f"{field} must not be 0, and within float32; got {sample.multiplier}", param=field)
    ids, trains = list(opening), [False] * len(opening)
    for span in sample.spans:
        parses = span.parse_special_tokens is not False
        piece = tokenizer.encode(span.value, add_special_tokens=False, parse_special=parses)
        ids += piece
        trains += [span.trainable is not False] * len(piece)
    if len(ids) > longest:
        raise InvalidRequest(
            f"{where} has {len(ids)} tokens, this server trains on at most {longest}; shorten it", param=where
        )
    weights = np.where(trains, multiplier, 0).astype(np.float32)
    weights[:1] = 0  # nothing predicts it
    if not weights.any():
        raise InvalidRequest(
            f"{where} has no token to train: one must stand in a trainable span and not be the first", param=where
        )
    return Example(np.array(ids, np.int32), weights)
