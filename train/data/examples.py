"""Examples, preference pairs, their shuffled order, and packed lanes.  Pure: no jax here.

Shape letters: J positions in a lane.  An Example of n tokens has n - 1 predictions: inputs tokens[:-1], targets tokens[1:].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxlora.core.errors import DataInvalid

PADDING = 0  # segment number of positions that hold no example; real segments count from 1


@dataclass(frozen=True, eq=False, slots=True)
class Rollout:
    """Sampler's data for each token of an Example, for reinforcement-learning losses; entry 0 belongs to no prediction.

    Raises DataInvalid when the arrays disagree or a number is not finite.
    """

    logprobs: np.ndarray  # float32 [n] log-probability of token i when it was sampled
    advantages: np.ndarray  # float32 [n]
    ratio_mask: np.ndarray  # bool [n]: the token counts in the ratio of the sequence (gspo)

    def __post_init__(self) -> None:
        for name, dtype in (("logprobs", np.float32), ("advantages", np.float32), ("ratio_mask", np.bool_)):
            _check_flat(getattr(self, name), name, dtype)
        lengths = {len(self.logprobs), len(self.advantages), len(self.ratio_mask)}
        if len(lengths) > 1:
            raise DataInvalid(
                f"logprobs, advantages and ratio_mask differ in length: {sorted(lengths)}", param="logprobs"
            )
        if not (np.isfinite(self.logprobs).all() and np.isfinite(self.advantages).all()):
            raise DataInvalid("logprobs and advantages must be finite", param="logprobs")


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """One training sequence of one tenant.

    Raises DataInvalid when the arrays disagree, fewer than two tokens are given, a weight is not finite, or no
    prediction has a weight (then the example would train nothing).
    """

    tokens: np.ndarray  # int32 [n] vocabulary ids
    weights: (
        np.ndarray
    )  # float32 [n]; weights[i] weighs the prediction OF token i; weights[0] is 0, nothing predicts it
    rollout: Rollout | None = None  # None: the sequence was not sampled

    def __post_init__(self) -> None:
        _check_flat(self.tokens, "tokens", np.int32)
        _check_flat(self.weights, "weights", np.float32)
        if len(self.tokens) != len(self.weights):
            raise DataInvalid(
                f"{len(self.tokens)} tokens but {len(self.weights)} weights; give one each", param="weights"
            )
        if len(self.tokens) < 2:
            raise DataInvalid(
                f"{len(self.tokens)} token(s); an example needs at least 2, one to predict from", param="tokens"
            )
        if not np.isfinite(self.weights).all() or self.weights[0] != 0:
            raise DataInvalid("weights must be finite, and weights[0] must be 0", param="weights")
        if not self.weights.any():
            raise DataInvalid("no trainable token: every weight is 0", param="weights")
        if self.rollout is not None and len(self.rollout.logprobs) != len(self.tokens):
            raise DataInvalid(
                f"{len(self.tokens)} tokens but {len(self.rollout.logprobs)} logprobs; give one each", param="logprobs"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def predictions(self) -> int:
        """Returns the number of positions the example takes in a lane."""
        return len(self.tokens) - 1

    @property
    def segments(self) -> tuple[Example, ...]:
        """Returns the example itself: the segments it takes in a lane."""
        return (self,)


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Pair:
    """Two completions of one prompt, of which the first is preferred.  They lie side by side in one lane.

    Raises DataInvalid when the two are the same, which would train nothing.
    """

    chosen: Example
    rejected: Example

    def __post_init__(self) -> None:
        if np.array_equal(self.chosen.tokens, self.rejected.tokens):
            raise DataInvalid("the preferred and the other answer are the same", param="preferred_output")

    @property
    def predictions(self) -> int:
        """Returns the number of positions the pair takes in a lane."""
        return self.chosen.predictions + self.rejected.predictions

    @property
    def segments(self) -> tuple[Example, ...]:
        """Returns both completions, the preferred one first: the segments the pair takes in a lane."""
        return (self.chosen, self.rejected)


type Unit = Example | Pair  # what is shuffled, packed and counted in a batch

KINDS = {
    "example": "examples (messages; conversations; instruction and output; prompt and completion; text; input_ids and "
    "weights)",
    "pair": "preference pairs (input, preferred_output and non_preferred_output; prompt, chosen and rejected)",
    "rollout": "sampled sequences (input_ids, logprobs and advantages)",
}


def kind_of_unit(unit: Unit) -> str:
    """Returns the key of KINDS that the data is of."""
    return "pair" if isinstance(unit, Pair) else "example" if unit.rollout is None else "rollout"


def check_kind(unit: Unit, loss: str) -> None:
    """Raises DataInvalid when the data is of another kind than the loss trains on."""
    wanted = {"cross_entropy": "example", "dpo": "pair"}.get(loss, "rollout")
    got = kind_of_unit(unit)
    if got != wanted:
        raise DataInvalid(f"loss {loss} trains on {KINDS[wanted]}, but this is one of the {KINDS[got]}", param="loss")


def _check_flat(array: np.ndarray, name: str, dtype: type) -> None:
    if array.ndim != 1 or array.dtype != dtype:
        raise DataInvalid(f"{name} must be a flat {np.dtype(dtype)} array, got {array.dtype} {array.shape}", param=name)


# Order and packing.


class ExampleStream:
    """Endless stream of examples or pairs, shuffled by (seed, epoch) only; `cursor` resumes it exactly.

    The shuffle sorts raw Philox draws, so it is the same under every NumPy version and on every machine.
    """

    def __init__(self, examples: Sequence[Unit], seed: int, cursor: int = 0):
        """Raises DataInvalid when there are no examples, or for a negative seed or cursor."""
        if not examples:
            raise DataInvalid("no examples to train on; give at least one")
        if seed < 0 or cursor < 0:
            raise DataInvalid(f"seed and cursor must not be negative, got seed {seed} and cursor {cursor}")
        self.examples = tuple(examples)
        self.seed = seed
        self._cursor = cursor
        self._epoch: int | None = None
        self._order: np.ndarray = np.empty(0, np.int64)

    def shuffled(self) -> ExampleStream:
        """Returns the stream with its present epoch in order: that takes time in proportion to the examples, once an epoch."""
        self.peek(1)
        return self

    @property
    def cursor(self) -> int:
        """Returns the number of examples consumed, over all epochs."""
        return self._cursor

    def peek(self, count: int) -> list[Unit]:
        """Returns the next `count` examples without consuming them."""
        return [self._at(self._cursor + i) for i in range(count)]

    def take(self, count: int) -> list[Unit]:
        """Returns the next `count` examples and moves the cursor past them."""
        taken = self.peek(count)
        self._cursor += count
        return taken

    def _at(self, place: int) -> Unit:
        epoch, index = divmod(place, len(self.examples))
        if epoch != self._epoch:
            raw = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(len(self.examples))
            self._epoch, self._order = epoch, np.argsort(raw, kind="stable")
        return self.examples[self._order[index]]


@dataclass(frozen=True, eq=False, slots=True)
class Lane:
    """One packed row of one tenant: whole examples side by side, each its own segment, then padding (all zeros)."""

    units: tuple[Unit, ...]  # its examples and pairs, in order
    number: int  # its place among the lanes of its batch
    token_J: np.ndarray  # int32 input ids
    target_J: np.ndarray  # int32 ids to predict
    weight_J: np.ndarray  # float32 weight of each prediction
    position_J: np.ndarray  # int32 place of the token in its example, from 0
    segment_J: np.ndarray  # int32 example number in this lane, from 1; PADDING elsewhere
    reference_J: np.ndarray  # float32 log-probability when sampled
    advantage_J: np.ndarray  # float32
    ratio_J: np.ndarray  # bool: counts in the ratio of its sequence
    pair_J: np.ndarray  # int32 1 in a preferred completion, -1 in the rejected one (the next segment); 0 elsewhere


def first_fit_decreasing(sizes: Sequence[int] | np.ndarray, capacity: int) -> list[np.ndarray]:
    """Returns the indices of the sizes, int64, in groups that fit the capacity: first-fit, largest first, ties in given order.

    One size after the other: where one of a size does not fit, no later one of that size does.  Costs a sort and, for
    each different size, a look at the groups that still have room; never a look at every group for every item.
    """
    size_N = np.asarray(sizes, np.int64)
    rank_N = np.argsort(-size_N, kind="stable")
    values, counts = np.unique(size_N, return_counts=True)
    smallest = int(values[0]) if len(values) else 0
    group_O, room_O = np.empty(0, np.int64), np.empty(0, np.int64)  # of the O groups that are open: number, room left
    placed: list[np.ndarray] = []  # the group of each item, in the order of rank_N
    groups = 0
    for value, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        fits_O = room_O // value
        taken_O = np.minimum(fits_O, np.maximum(count - (np.cumsum(fits_O) - fits_O), 0))
        room_O -= taken_O * value
        rest, each = count - int(taken_O.sum()), capacity // value
        opened = -(-rest // each)
        new = np.full(opened, each, np.int64)
        new[opened - 1 :] = rest - each * (opened - 1)
        number = np.arange(groups, groups + opened)
        placed += [np.repeat(group_O, taken_O), np.repeat(number, new)]
        groups += opened
        group_O, room_O = np.concatenate([group_O, number]), np.concatenate([room_O, capacity - new * value])
        group_O, room_O = group_O[room_O >= smallest], room_O[room_O >= smallest]
    if not groups:
        return []
    placed_N = np.concatenate(placed)
    order = np.argsort(placed_N, kind="stable")
    return np.split(rank_N[order], np.cumsum(np.bincount(placed_N, minlength=groups))[:-1])


def check_length(units: Sequence[Unit], length: int) -> None:
    """Raises DataInvalid when an example or a pair does not fit a lane of `length` positions."""
    for i, unit in enumerate(units):
        if unit.predictions > length:
            what = " and ".join(str(len(e)) for e in unit.segments)
            count = len(unit.segments)
            raise DataInvalid(
                f"{'pair' if isinstance(unit, Pair) else 'example'} {i} has {what} tokens, but a lane of {length} positions "
                f"holds at most {length + count}; shorten it or use longer lanes",
                param="tokens",
            )


def fitting_length(lengths: Sequence[int], units: Sequence[Unit]) -> int:
    """Returns the first of these lane lengths, in rising order, that holds each of the units; the last where none does."""
    longest = max((unit.predictions for unit in units), default=0)
    return next((length for length in lengths if longest <= length), lengths[-1])


def fill_lane(units: Sequence[Unit], length: int, number: int = 0) -> Lane:
    """Returns a lane of `length` positions that holds the examples and pairs in this order; they must fit."""
    lane = Lane(
        units=tuple(units),
        number=number,
        token_J=np.zeros(length, np.int32),
        target_J=np.zeros(length, np.int32),
        weight_J=np.zeros(length, np.float32),
        position_J=np.zeros(length, np.int32),
        segment_J=np.full(length, PADDING, np.int32),
        reference_J=np.zeros(length, np.float32),
        advantage_J=np.zeros(length, np.float32),
        ratio_J=np.zeros(length, np.bool_),
        pair_J=np.zeros(length, np.int32),
    )
    sides = [
        (side, e) for u in units for side, e in zip((1, -1) if isinstance(u, Pair) else (0,), u.segments, strict=True)
    ]
    start = 0
    for segment, (side, example) in enumerate(sides, start=1):
        here = slice(start, start + example.predictions)
        lane.token_J[here] = example.tokens[:-1]
        lane.target_J[here] = example.tokens[1:]
        lane.weight_J[here] = example.weights[1:]
        lane.position_J[here] = np.arange(example.predictions)
        lane.segment_J[here] = segment
        lane.pair_J[here] = side
        if example.rollout is not None:
            lane.reference_J[here] = example.rollout.logprobs[1:]
            lane.advantage_J[here] = example.rollout.advantages[1:]
            lane.ratio_J[here] = example.rollout.ratio_mask[1:]
        start = here.stop
    return lane


@dataclass(frozen=True, eq=False, slots=True)
class CheckedExamples:
    """Examples or pairs that `loss` trains on and lanes of `length` positions hold.  To make one is to check them.

    It takes time in proportion to the examples, so it is made where they are read, and passed on.
    Raises DataInvalid for one that is too long or of another kind.
    """

    units: Sequence[Unit]  # a tuple once it is made
    loss: str
    length: int
    size_N: np.ndarray = field(init=False)  # int64 predictions of each

    def __post_init__(self) -> None:
        check_length(self.units, self.length)
        for unit in self.units:
            check_kind(unit, self.loss)
        object.__setattr__(self, "units", tuple(self.units))
        object.__setattr__(self, "size_N", np.fromiter((u.predictions for u in self.units), np.int64, len(self.units)))

    def __len__(self) -> int:
        return len(self.units)


@dataclass(frozen=True, eq=False, slots=True)
class PackedExamples:
    """Checked examples, each once, in lanes by first-fit decreasing; a lane is filled when it is needed."""

    examples: CheckedExamples
    groups: list[np.ndarray] = field(init=False)  # int64 indices of the examples of each lane

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", first_fit_decreasing(self.examples.size_N, self.examples.length))

    def __len__(self) -> int:
        return len(self.groups)

    def lane(self, number: int) -> Lane:
        """Returns one of the lanes."""
        units = self.examples.units
        return fill_lane([units[i] for i in self.groups[number]], self.examples.length)


def pair_margins(lane: Lane, logprob_J: np.ndarray, reference_J: np.ndarray) -> np.ndarray:
    """Returns float64 [pairs]: how much more than the reference the model prefers each pair's chosen completion."""
    with np.errstate(invalid="ignore"):  # a diverged model gives NaN, which is reported elsewhere
        change_J = np.where(lane.weight_J != 0, lane.pair_J * lane.weight_J * (logprob_J - reference_J), 0.0)
    return np.bincount((lane.segment_J - 1) // 2 + 1, change_J, 1 + len(lane.units))[1:]  # 0 is padding


def real_tokens(lanes: Sequence[Lane]) -> int:
    """Returns the number of positions that hold an example: what a step computes and a tenant is charged for."""
    return sum(int(np.count_nonzero(lane.segment_J != PADDING)) for lane in lanes)
