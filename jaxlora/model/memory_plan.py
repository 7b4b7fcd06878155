"""Chooses the sizes of a server or a training run from its base and the memory there is.  Pure host code: no jax.

    what a base needs ─┐
    sizes given ───────┼─▶ the largest of a few steps that fits ─▶ KV and caches take what is left ─▶ Plan
    memory there is ───┘

A plan counts everything that takes memory: weights, slots, KV pages, training, the arrays of a step, caches of the host,
the processes that read files, and Python with XLA.

Shape letters: L layers, R LoRA rank, X Y features in, out, J tokens of a lane, V vocabulary, D model, F MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from jaxlora.config.base import completed
from jaxlora.config.serving import (
    READ_MEMORY_BYTES,
    ServeConfig,
    SizedConfig,
    SizedTraining,
    SlotSize,
    TrainingSection,
)
from jaxlora.config.training import LANE_BLOCK, SizedTrainConfig, TrainConfig
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.host_memory import MemoryLimit
from jaxlora.model.memory_needs import (
    GB,
    BaseShape,
    Machine,
    Needs,
    host_needs,
    live_training_bytes,
    pool_bytes,
    serving_needs,
    training_needs,
)
from jaxlora.model.size_ladder import ACCELERATOR, CPU, MANY_CORES, Sizes
from pallas_kernels.gathered_lora.rank_classes import ROW_TILE

# ---- what is chosen besides the ladder ----
ADAPTERS_HELD = 4  # versions that the host has room for at least
WAITING_TOKENS = 131_072
READ_PART = 32  # of the memory: what a process may take to read one file
KV_FULL = 16  # times all rows at the whole context: more KV pages are of no use, however much memory there is
LONGEST = {"cpu": 1024, "accelerator": 4096}  # tokens of a training example: longer lanes make neighbours wait longer
SHARED_ROW_TOKENS = 2048  # KV tokens of a row on a machine that others use


# ---- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan[Config]:
    """Sizes that fit, and what they take."""

    config: Config
    needs: Needs  # of one device; on a CPU of the host as well
    limit: MemoryLimit  # of which memory_share may be used
    sizes: str  # in words, with the keys that change them

    def lines(self) -> tuple[str, str]:
        """Returns what a start prints: where the memory goes, and the sizes."""
        parts = " + ".join(f"{name} {nbytes / GB:.1f}" for name, nbytes in _by_size(self.needs))
        total = sum(self.needs.values()) / GB
        return (
            f"memory: {parts} = {total:.1f} of {self.limit.nbytes / GB:.1f} GB, {self.limit.origin} "
            "(memory_gb, memory_share)",
            f"sizes: {self.sizes}",
        )


def _by_size(needs: Needs) -> list[tuple[str, int]]:
    return sorted(needs.items(), key=lambda item: -item[1])


def usable_bytes(limit: MemoryLimit, share: float) -> int:
    """Returns the bytes that may be planned with."""
    return math.floor(limit.nbytes * share + 0.5)


def plan_server(config: ServeConfig, base: BaseShape, machine: Machine) -> Plan[SizedConfig]:
    """Returns the plan of a server: what is left out is chosen, what is given stays.

    Raises ConfigInvalid, naming a setting to lower and the largest value that fits, when it cannot be; as `slot_sizes` does.
    """
    usable = usable_bytes(machine.device, config.memory_share)
    ladder = CPU if machine.platform == "cpu" else ACCELERATOR + CPU
    if machine.cores >= MANY_CORES:
        ladder = (ACCELERATOR[-1], *ladder)

    def least(config: ServeConfig) -> SizedConfig | None:
        """Returns the largest step of the ladder that fits with the least KV and caches."""
        for step in ladder:
            sized = with_sizes(config, step, base, machine, usable)
            if sum(serving_needs(sized, base, machine).values()) <= usable:
                return sized
        return None

    sized = least(config)
    if sized is None:
        smallest = with_sizes(config, ladder[-1], base, machine, usable)
        raise _too_large(
            serving_needs(smallest, base, machine),
            base,
            machine.device,
            config.memory_share,
            list(_given_to_serve(config)),
            lambda config: least(config) is not None,
            _without_sizes(config),
            None if config.training is None else replace(config, training=None),
        )
    sized = with_the_rest(config, sized, base, machine, usable)
    sized = replace(sized, sizes=slot_sizes(sized, base, machine))
    return Plan(
        config=sized,
        needs=serving_needs(sized, base, machine),
        limit=machine.device,
        sizes=_sizes_in_words(sized, base),
    )


def with_sizes(config: ServeConfig, step: Sizes, base: BaseShape, machine: Machine, usable: int) -> SizedConfig:
    """Returns the settings with a step's sizes where none are given, and the least KV and caches."""

    def whole(rows: int) -> int:
        return -(-rows // machine.rows) * machine.rows

    rows = whole(step.rows) if config.rows is None else config.rows
    rank = step.max_rank if config.max_rank is None else config.max_rank
    tokens = rows * min(step.row_tokens, base.config.context)
    least_gb = ADAPTERS_HELD * rank * base.rank_bytes(machine) * machine.devices / GB
    host_bytes = usable if machine.host is None else usable_bytes(machine.host, config.memory_share)
    sizes = {
        "slots": step.slots,
        # A CPU keeps one class, as XLA's body for it runs a loop for each.
        "classes_from_store": machine.platform != "cpu" and config.slots is None and not config.rank_class,
        "max_rank": rank,
        "rows": rows,
        "kv_pages": -(-tokens // config.page_tokens),
        "prefill_lanes": whole(step.prefill_lanes),
        "prefill_tokens": step.prefill_tokens,
        "max_waiting_tokens": WAITING_TOKENS,
        "host_adapters_gb": least_gb,
        "host_kv_gb": 0.0,
        "host_states_gb": 0.0,
    }
    training = config.training
    if training is not None:
        sized = {
            "slots": step.training_slots,
            "lanes": whole(step.lanes),
            "lane_tokens": min(step.lane_tokens, training.longest_tokens or step.lane_tokens),
            "max_rank": min(step.max_rank, rank),
        }
        sized["longest_tokens"] = training.lane_tokens or sized["lane_tokens"]
        training = completed(SizedTraining, training, sized)
    limits = config.limits
    if limits.read_memory_bytes is None:
        limits = replace(limits, read_memory_bytes=min(READ_MEMORY_BYTES, host_bytes // READ_PART))
    return replace(completed(SizedConfig, config, sizes), training=training, limits=limits)


def with_the_rest(
    config: ServeConfig, sized: SizedConfig, base: BaseShape, machine: Machine, usable: int
) -> SizedConfig:
    """Returns the settings whose longest training lanes, KV and caches take what is left, as far as they were left out.

    On memory of our own all of it; on a machine that others use no more than is of use.
    """
    left = usable - sum(serving_needs(sized, base, machine).values())
    if sized.training is not None and config.training is not None and config.training.lane_tokens is None:
        sized = replace(sized, training=_with_longer_lanes(config.training, sized.training, base, machine, left // 2))
        left = usable - sum(serving_needs(sized, base, machine).values())
    host = left
    if machine.host is not None:
        host = usable_bytes(machine.host, config.memory_share) - sum(host_needs(sized).values())
    own = machine.device.own if machine.host is None else machine.host.own
    more: dict[str, float] = {}
    for name, share, most_gb in (
        ("host_adapters_gb", 0.1, 2.0),
        ("host_kv_gb", 0.04, 0.5),
        ("host_states_gb", 0.04, 2.0),
    ):
        if getattr(config, name) is None:
            most = math.inf if own else max(most_gb - getattr(sized, name), 0)
            more[name] = getattr(sized, name) + math.floor(max(min(host * share / GB, most), 0) * 1e3) / 1e3
    sized = replace(sized, **more)
    if config.kv_pages is None:
        left = usable - sum(serving_needs(sized, base, machine).values())
        page = config.page_tokens * base.token_bytes(machine)
        full = sized.rows * -(-base.config.context // config.page_tokens)  # every row at the whole context
        most = KV_FULL * full if machine.device.own else min(full, sized.rows * SHARED_ROW_TOKENS // config.page_tokens)
        pages = min(sized.kv_pages + max(left, 0) // page, max(most, sized.kv_pages))
        sized = replace(sized, kv_pages=pages)
    if config.max_waiting_tokens is None:
        sized = replace(sized, max_waiting_tokens=max(WAITING_TOKENS, 4 * sized.kv_pages * sized.page_tokens))
    return sized


def _with_longer_lanes(
    given: TrainingSection, sized: SizedTraining, base: BaseShape, machine: Machine, left: int
) -> SizedTraining:
    """Returns the training whose longest examples are as long as this memory has room for, if that was left out."""
    longest = min(LONGEST["cpu" if machine.platform == "cpu" else "accelerator"], base.config.context)
    while given.longest_tokens is None and longest > sized.lane_tokens:
        longer = replace(sized, longest_tokens=longest)
        more = live_training_bytes(longer, base, machine) - live_training_bytes(sized, base, machine)
        if more <= left:
            return longer
        longest //= 2
    return sized


def slot_sizes(sized: SizedConfig, base: BaseShape, machine: Machine) -> tuple[SlotSize, ...]:
    """Returns `slot_sizes` with the pages that lie beside them in the memory of `slots` and `kv_pages`; of none, none.

    What stays in slots lies beside the new ones while they change, in the memory of the KV, which must hold it.
    Raises ConfigInvalid, naming the most slots and the least pages that go, for a size that leaves less, or no page for
    each row.
    """

    def pool(slots: int) -> int:
        return pool_bytes(((slots, sized.max_rank),), base, machine)

    slot, page = pool(ROW_TILE) // ROW_TILE, sized.page_tokens * base.token_bytes(machine)
    whole, found, before = pool(sized.slots) + sized.kv_pages * page, [], 0
    for slots in sized.slot_sizes:
        least = max(sized.rows * page, before * slot)
        if pool(slots) + least > whole:
            most, pages = (whole - least) // slot, sized.kv_pages - (whole - least - pool(slots)) // page
            fewer = f"take at most {most} slots, or " * (most > before)
            raise ConfigInvalid(
                f"slot_sizes: {slots} slots leave less than the {least / GB:.2f} GB of KV that rows = {sized.rows} and the "
                f"{before} slots that move there need, of the {whole / GB:.2f} GB of slots = {sized.slots} and kv_pages = "
                f"{sized.kv_pages}; {fewer}raise kv_pages to at least {pages}",
                param="slot_sizes",
            )
        found, before = [*found, SlotSize(slots=slots, pages=(whole - pool(slots)) // page)], slots
    return tuple(found)


def _sizes_in_words(sized: SizedConfig, base: BaseShape) -> str:
    tokens = sized.kv_pages * sized.page_tokens
    words = [
        f"{sized.rows} rows x {tokens // sized.rows:,} tokens (rows, kv_pages)",
        f"{' and '.join(f'{n} slots of rank {rank}' for n, rank in sized.rank_classes)} (slots, max_rank)",
        f"prompts {sized.prefill_lanes} x {sized.prefill_tokens} (prefill_lanes, prefill_tokens)",
    ]
    if sized.classes_from_store:
        words[1] += ", which the start divides by the ranks in the store ([[rank_class]])"
    if sized.sizes:
        among = ", ".join(f"{size.slots} beside {size.pages:,} pages" for size in sized.sizes)
        words.insert(2, f"which change among {among} (slot_sizes)")
    if (t := sized.training) is not None:
        words.append(
            f"training {t.slots} slots of rank {t.max_rank}, {t.lanes} lanes x {t.lane_tokens} tokens, examples of "
            f"{t.longest_tokens} at most ([training] slots, max_rank, lanes, lane_tokens, longest_tokens)"
        )
    caches = (sized.host_adapters_gb, sized.host_kv_gb, sized.host_states_gb)
    words.append(
        f"caches {caches[0]:.1f} + {caches[1]:.1f} + {caches[2]:.1f} GB (host_adapters_gb, host_kv_gb, host_states_gb)"
    )
    return "; ".join(words)


# ---- what cannot be ---------------------------------------------------------------------------------------------------

SERVING_KEYS = ("kv_pages", "rows", "slots", "max_rank", "prefill_lanes", "prefill_tokens")
TRAINING_KEYS = ("slots", "lanes", "lane_tokens", "longest_tokens", "max_rank")
CACHE_KEYS = ("host_adapters_gb", "host_kv_gb", "host_states_gb")

type Given[Config] = tuple[str, float, Callable[[float], Config]]  # key, value, the settings with another value


def _too_large[Config](
    needs: Needs,
    base: BaseShape,
    limit: MemoryLimit,
    share: float,
    given: Sequence[Given[Config]],
    fits: Callable[[Config], bool],
    free: Config,
    alone: Config | None = None,
) -> ConfigInvalid:
    """Returns the error that names one setting to lower, the one that has to give way least.

    needs: of the least sizes beside those given.  free: the settings without any size.
    alone: those of a server that does not train.
    """
    best: tuple[float, str, float] | None = None
    for key, value, with_value in given:
        unit = (
            LANE_BLOCK if key.endswith(("lane_tokens", "longest_tokens")) else 0.01 if isinstance(value, float) else 1
        )
        found = _largest(value, unit, lambda v, with_value=with_value: _possible(fits, with_value, v))
        if found is not None and (best is None or found / value > best[0]):
            best = (found / value, key, found)
    total = sum(needs.values())
    parts = " + ".join(f"{name} {nbytes / GB:.2f}" for name, nbytes in _by_size(needs) if nbytes)
    told = (
        f"{base.name} in {base.dtype}{' with weights of 8 bits' * base.quantized} does not fit: {parts} = {total / GB:.2f} GB at least, and "
        f"{usable_bytes(limit, share) / GB:.2f} GB may be planned with (memory_share {share:g} of "
        f"{limit.nbytes / GB:.2f} GB, {limit.origin})"
    )
    if best is not None:
        return ConfigInvalid(f"{told}; lower {best[1]} to at most {best[2]:g}", param=best[1])
    if given and fits(free):
        keys = [key for key, *_ in given]
        return ConfigInvalid(f"{told}; leave out {', '.join(keys)}, and what fits is chosen", param=keys[0])
    wanted = math.ceil(total / share / GB * 100) / 100
    if alone is not None and fits(alone):
        return ConfigInvalid(
            f"{told}; give it {wanted:g} GB (memory_gb), or set training = false: then it fits, and takes no jobs",
            param="training",
        )
    others = '[model] dtype = "bfloat16", ' * (base.dtype == "float32")
    others += 'on a CPU [model] quantization = "int8", ' * (not base.quantized)
    told = f"{told}; give it {wanted:g} GB (memory_gb), or choose {others}a smaller base"
    return ConfigInvalid(told, param="memory_gb")


def _given_to_serve(config: ServeConfig) -> Iterator[Given[ServeConfig]]:
    for key in (*SERVING_KEYS, *CACHE_KEYS):
        if value := getattr(config, key):
            yield key, value, lambda v, key=key: replace(config, **{key: v})
    if (training := config.training) is None:
        return
    for key in TRAINING_KEYS:
        if value := getattr(training, key):
            yield (
                f"training.{key}",
                value,
                lambda v, key=key: replace(config, training=replace(training, **{key: v})),
            )


def _without_sizes(config: ServeConfig) -> ServeConfig:
    training = config.training
    if training is not None:
        training = replace(training, **dict.fromkeys(TRAINING_KEYS))
    return replace(config, **dict.fromkeys((*SERVING_KEYS, *CACHE_KEYS)), training=training)


def _largest(value: float, unit: float, fits: Callable[[float], bool]) -> float | None:
    """Returns the largest multiple of `unit` below the value that fits; None: not even the least."""

    def at(count: int) -> float:
        return round(count * unit, 2) if isinstance(unit, float) else count * unit

    low, high = 0, math.ceil(value / unit)  # low fits, or is nothing; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    return at(low) if low else None


def _possible[Config](fits: Callable[[Config], bool], with_value: Callable[[float], Config], value: float) -> bool:
    try:
        return fits(with_value(value))
    except ValueError:  # such as max_rank below that of training
        return False


# ---- a training run ---------------------------------------------------------------------------------------------------

LANES = {"cpu": (), "accelerator": ((8, 1024), (8, 512))}  # lanes and their tokens, before those of every machine
SMALL_LANES = ((4, 256), (2, 256), (1, 256), (1, 128), (1, 64), (1, 32))


def plan_training(
    config: TrainConfig, targets: Sequence[str], base: BaseShape, machine: Machine
) -> Plan[SizedTrainConfig]:
    """Returns the plan of a training run: ranks and slots that the tenants need, and lanes for which there is memory.

    targets: those that a slot holds.  Raises ConfigInvalid as `plan_server` does.
    """
    usable = usable_bytes(machine.device, config.memory_share)
    ladder = (*LANES["cpu" if machine.platform == "cpu" else "accelerator"], *SMALL_LANES)

    def tried(config: TrainConfig) -> Iterator[SizedTrainConfig]:
        """Yields the ladder's steps, on accelerators each in more and more passes."""
        more = config.passes is None and machine.platform != "cpu"
        for step in ladder:
            yield (found := sized(config, *step))
            while more and found.lanes // machine.rows % (2 * found.passes) == 0:
                yield (found := replace(found, passes=2 * found.passes))

    def sized(config: TrainConfig, lanes: int, lane_tokens: int) -> SizedTrainConfig:
        ranks = [t.rank for t in config.tenant]
        small = max((b.rank for b in config.bucket), default=0)
        together = machine.rows * (config.passes or 1)
        sizes = {
            "lanes": -(-lanes // together) * together,
            "lane_tokens": lane_tokens,
            "passes": 1,
            "max_rank": max(*ranks, small + 1),
            "slots": max(sum(rank > small for rank in ranks), 1),
        }
        return completed(SizedTrainConfig, config, sizes)

    def least(config: TrainConfig) -> SizedTrainConfig | None:
        fits = (f for f in tried(config) if sum(training_needs(f, targets, base, machine).values()) <= usable)
        return next(fits, None)

    found = least(config)
    if found is None:
        *_, smallest = tried(config)
        needs = training_needs(smallest, targets, base, machine)
        given = [
            (key, value, lambda v, key=key: replace(config, **{key: v}))
            for key in TRAINING_KEYS
            if (value := getattr(config, key, None))
        ]
        free = replace(config, lanes=None, lane_tokens=None)
        raise _too_large(
            needs, base, machine.device, config.memory_share, given, lambda config: least(config) is not None, free
        )
    sizes = (
        f"{found.slots} slots of rank {found.max_rank} (slots, max_rank); {found.lanes} lanes x {found.lane_tokens} "
        f"tokens (lanes, lane_tokens){f' in {found.passes} passes (passes)' * (found.passes > 1)}"
    )
    return Plan(config=found, needs=training_needs(found, targets, base, machine), limit=machine.device, sizes=sizes)
