"""A server's sizes come from its base and the memory there is; what cannot fit names one setting and its largest value."""

from __future__ import annotations

import ctypes
import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from base_shapes import SMOLLM2

from jaxlora.config.base import ModelSection
from jaxlora.config.serving import RankClassSection, ServeConfig, TrainingSection
from jaxlora.config.training import TenantSection, TrainConfig
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.host_memory import MemoryLimit, give_back, host_limit
from jaxlora.core.lora import LAYER_TARGETS
from jaxlora.core.model_config import ModelConfig
from jaxlora.model.memory_needs import PART_KEYS, PROMPT_PART_KEYS, BaseShape, Machine, attention_bytes
from jaxlora.model.memory_plan import plan_server, plan_training
from pallas_kernels import tiling_cuda

GIB = 2**30
QWEN3 = replace(
    SMOLLM2,
    family="qwen3",
    layers=28,
    d_model=1024,
    d_ff=3072,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocab=151936,
    context=40960,
    qk_norm=True,
)
EMPTY = ServeConfig(model=ModelSection(path="base"))
GIVEN = replace(
    EMPTY,
    memory_share=1.0,
    slots=4,
    max_rank=8,
    rows=4,
    kv_pages=32,
    prefill_lanes=2,
    prefill_tokens=16,
    max_waiting_tokens=1000,
    host_adapters_gb=0.25,
    host_kv_gb=0.125,
    host_states_gb=0.125,
    limits=replace(EMPTY.limits, read_memory_bytes=10**8),
    training=TrainingSection(slots=1, lanes=1, lane_tokens=64, max_rank=8),
)


def shape(config: ModelConfig = SMOLLM2, dtype: str = "float32") -> BaseShape:
    return BaseShape(config=config, dtype=dtype, kv_dtype=dtype, name="base")


def machine(nbytes: float, *, own: bool = True, cores: int = 2) -> Machine:
    limit = MemoryLimit(nbytes=int(nbytes), origin="memory_gb", own=own)
    return Machine(platform="cpu", cores=cores, device=limit, host=None, devices=1, parts={}, rows=1)


def accelerator(nbytes: float, **split: int) -> Machine:
    host = MemoryLimit(nbytes=16 * 10**9, origin="the machine's available memory", own=False)
    parts = {"heads": split.get("tensor", 1), "kv_heads": split.get("tensor", 1), "mlp": split.get("tensor", 1)}
    parts |= {"vocab": split.get("tensor", 1), "embed": split.get("fsdp", 1)}
    whole = replace(machine(nbytes, cores=8), platform="gpu", host=host, parts=parts)
    return replace(whole, rows=split.get("fsdp", 1))


# ---- classes of slots ----


@pytest.mark.parametrize(
    ("given", "on", "divides"),
    [
        ({}, accelerator(40e9), True),
        ({"max_rank": 32}, accelerator(40e9), True),
        ({"slots": 8}, accelerator(40e9), False),
        ({"rank_class": (RankClassSection(rank=8, slots=4),)}, accelerator(40e9), False),
        ({"slots": 8, "slot_sizes": (4, 8)}, accelerator(40e9), False),
        ({}, machine(24e9), False),
    ],
)
def test_the_store_divides_the_slots_of_an_accelerator_that_no_setting_gives(given, on, divides):
    plan = plan_server(replace(EMPTY, **given), shape(), on)
    assert plan.config.classes_from_store == divides
    assert ("which the start divides by the ranks in the store" in plan.lines()[1]) == divides


# ---- slots that change ----


@pytest.mark.parametrize("base", [shape(), shape(QWEN3, "bfloat16")], ids=["smollm2", "qwen3"])
@pytest.mark.parametrize("on", [machine(24e9), accelerator(40e9), accelerator(40e9, tensor=2, fsdp=2)])
def test_each_number_of_slots_has_the_pages_that_the_same_memory_holds(base, on):
    given = replace(EMPTY, slots=8, max_rank=16, slot_sizes=(4, 8, 16))
    plan = plan_server(given, base, on)
    assert sum(plan.needs.values()) <= 0.9 * on.device.nbytes
    if on.host is None:
        fixed = plan_server(replace(given, slot_sizes=()), base, on)
        assert plan.needs["process"] - fixed.needs["process"] == 2 * 80 * 10**6  # programs of two more sizes
    itemsize = 4 if base.dtype == "float32" else 2
    scales = 4 * (7 * base.config.layers + 1)
    slot = 16 * base.rank_bytes(on, itemsize=itemsize) + scales
    page = plan.config.page_tokens * base.token_bytes(on)
    whole = 8 * slot + plan.config.kv_pages * page
    assert [size.slots for size in plan.config.sizes] == [4, 8, 16]
    assert plan.config.sizes[1].pages == plan.config.kv_pages
    for size in plan.config.sizes:
        assert 0 <= whole - size.slots * slot - size.pages * page < page
        assert f"{size.slots} beside {size.pages:,} pages" in plan.lines()[1]
    assert "(slot_sizes)" not in plan_server(EMPTY, base, on).lines()[1]


def test_slots_that_leave_too_little_kv_are_refused_with_what_would_go():
    given = replace(EMPTY, slots=4, max_rank=32, rows=8, kv_pages=128, slot_sizes=(4, 40))

    def refused(**changes: object) -> str:
        with pytest.raises(ConfigInvalid, match=r"slot_sizes: \d+ slots leave less than") as caught:
            plan_server(replace(given, **changes), shape(), machine(24e9))
        assert caught.value.param == "slot_sizes"
        return str(caught.value)

    found = re.search(r"take at most (\d+) slots, or raise kv_pages to at least (\d+)$", refused())
    assert found is not None
    most, pages = int(found[1]), int(found[2])
    assert most > 4
    slot, page = 32 * shape().rank_bytes(machine(24e9)), 64 * shape().token_bytes(machine(24e9))
    for fitting, wrong in (
        ({"slot_sizes": (4, most)}, {"slot_sizes": (4, most + 1)}),
        ({"kv_pages": pages}, {"kv_pages": pages - 1}),
    ):
        size = plan_server(replace(given, **fitting), shape(), machine(24e9)).config.sizes[-1]
        assert size.pages >= 8  # a page for each row
        assert size.pages * page + page > 4 * slot  # those that stay lie there while slots change
        refused(**wrong)
    assert "take at most" not in refused(kv_pages=32)


# ---- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gb", [2, 4, 8, 24])
@pytest.mark.parametrize(
    ("config", "dtype", "least"),
    [(SMOLLM2, "float32", 2), (SMOLLM2, "bfloat16", 2), (QWEN3, "bfloat16", 4), (QWEN3, "float32", 8)],
    ids=["smollm2-float32", "smollm2-bfloat16", "qwen3-bfloat16", "qwen3-float32"],
)
def test_a_limit_is_used_and_kept(config, dtype, least, gb):
    if gb < least:
        with pytest.raises(ConfigInvalid, match=r"does not fit: .*give it [\d.]+ GB \(memory_gb\)"):
            plan_server(EMPTY, shape(config, dtype), machine(gb * 1e9))
        return
    plan = plan_server(EMPTY, shape(config, dtype), machine(gb * 1e9))
    assert 0.88 * gb * 1e9 < sum(plan.needs.values()) <= 0.9 * gb * 1e9
    assert min(plan.needs.values()) > 0
    assert plan.config.kv_pages * plan.config.page_tokens >= plan.config.rows * 128


def test_training_lanes_are_as_long_as_was_asked_or_as_memory_holds():
    def lengths(gb: float = 64, **given: int) -> tuple[int, ...]:
        settings = replace(EMPTY, training=TrainingSection(**given))
        training = plan_server(settings, shape(), machine(gb * 1e9)).config.training
        assert training is not None
        return training.lengths

    assert lengths(lane_tokens=128) == (128,)
    assert lengths(lane_tokens=128, longest_tokens=2048) == (128, 512, 2048)
    assert lengths(longest_tokens=640) == (256, 640)
    assert lengths(longest_tokens=64) == (64,)
    assert lengths() == (256, 1024)
    assert lengths(gb=2)[-1] < 1024
    with pytest.raises(ConfigInvalid, match=r"lower training\.longest_tokens to at most"):
        lengths(gb=2, longest_tokens=8192)
    with pytest.raises(ConfigInvalid, match="longest_tokens must be at least lane_tokens = 128, got 64"):
        TrainingSection(lane_tokens=128, longest_tokens=64)


def test_more_memory_never_gives_less():
    plans = [plan_server(EMPTY, shape(), machine(gb * 1e9)).config for gb in (2.1, 2.5, 3, 4, 6, 8, 16)]
    for less, more in itertools.pairwise(plans):
        for key in ("rows", "slots", "max_rank", "prefill_lanes"):
            assert getattr(less, key) <= getattr(more, key)
        assert less.training.lane_tokens <= more.training.lane_tokens


def test_on_a_machine_that_others_use_it_stays_about_what_it_was():
    sized = plan_server(EMPTY, shape(), machine(15e9, own=False)).config
    assert (sized.rows, sized.prefill_lanes, sized.prefill_tokens, sized.slots, sized.max_rank) == (8, 8, 32, 8, 32)
    assert (sized.training.slots, sized.training.lanes, sized.training.lane_tokens) == (4, 4, 256)
    assert sized.training.lengths == (256, 1024)
    assert sized.kv_pages * sized.page_tokens == 8 * 2048
    assert sized.host_adapters_gb <= 2


def test_what_is_given_stays():
    plan = plan_server(replace(EMPTY, rows=3, kv_pages=50, training=TrainingSection(lanes=3)), shape(), machine(8e9))
    assert (plan.config.rows, plan.config.kv_pages, plan.config.training.lanes) == (3, 50, 3)
    assert plan_server(GIVEN, shape(), machine(8e9)).config.host_adapters_gb == 0.25


def test_the_start_says_where_memory_goes_and_which_keys_change_it():
    where, sizes = plan_server(EMPTY, shape(), machine(8e9)).lines()
    assert re.fullmatch(
        r"memory: (\w+ \d+\.\d \+ )+\w+ \d+\.\d = 7\.2 of 8\.0 GB, memory_gb \(memory_gb, memory_share\)", where
    )
    assert {"weights", "slots", "KV", "training", "steps", "caches", "readers", "process"} <= set(where.split())
    for words in ("8 rows x ", "(rows, kv_pages)", "8 slots of rank 32 (slots, max_rank)", "4 lanes x 256 tokens"):
        assert words in sizes


def test_a_mesh_holds_parts():
    one = plan_server(EMPTY, shape(QWEN3, "bfloat16"), accelerator(20e9))
    two = plan_server(EMPTY, shape(QWEN3, "bfloat16"), accelerator(20e9, tensor=2))
    four = plan_server(EMPTY, shape(QWEN3, "bfloat16"), accelerator(20e9, tensor=2, fsdp=2))
    assert one.needs["weights"] > 1.9 * two.needs["weights"] > 3.6 * four.needs["weights"]
    assert one.config.kv_pages < two.config.kv_pages
    assert four.config.rows % 2 == four.config.training.lanes % 2 == 0
    assert "process" not in one.needs


def test_an_accelerator_decodes_more_rows_than_a_cpu():
    assert plan_server(EMPTY, shape(), accelerator(40e9)).config.rows > 8
    assert plan_server(EMPTY, shape(), machine(24e9, cores=32)).config.rows > 8


# ---- what does not fit --------------------------------------------------------------------------------------------


def test_a_gpu_has_memory_for_the_parts_that_its_attention_joins():
    """What the kernels make is compiled in tests/device/test_pallas_kernels_aot_cuda.py."""
    assert (PART_KEYS, PROMPT_PART_KEYS) == (tiling_cuda.PART_KEYS, tiling_cuda.PROMPT_PART_KEYS)
    base = shape(QWEN3, "bfloat16")
    assert attention_bytes(64, PART_KEYS, base, accelerator(20e9)) == 4 * 40 * 64 * 16 * 129
    assert attention_bytes(64, PART_KEYS, base, accelerator(20e9, tensor=8)) == 4 * 40 * 64 * 2 * 129
    assert attention_bytes(64, PART_KEYS, base, replace(accelerator(20e9), platform="tpu")) == 0
    assert attention_bytes(512, PROMPT_PART_KEYS, shape(), accelerator(20e9)) == 0  # one part: nothing to join


def test_one_byte_too_much_is_told():
    nbytes = sum(plan_server(GIVEN, shape(), machine(8e9)).needs.values())
    assert plan_server(GIVEN, shape(), machine(nbytes)).config.kv_pages == 32
    with pytest.raises(ConfigInvalid, match=r"lower \S+ to at most \d") as told:
        plan_server(GIVEN, shape(), machine(nbytes - 1))
    assert "\n" not in told.value.message


@pytest.mark.parametrize(
    "given",
    [
        {"kv_pages": 5000},
        {"slots": 1000},
        {"rows": 4000},
        {"max_rank": 4096},
        {"prefill_lanes": 5000},
        {"host_adapters_gb": 50.0},
        {"training": TrainingSection(slots=2000)},
        {"training": TrainingSection(lane_tokens=32 * 1000)},
    ],
    ids=lambda given: str(given)[:30],
)
def test_the_largest_value_that_fits_is_named(given):
    with pytest.raises(ConfigInvalid) as told:
        plan_server(replace(EMPTY, **given), shape(), machine(8e9))
    key, most = re.search(r"lower (\S+) to at most ([\d.]+)$", told.value.message).groups()
    assert told.value.param == key
    assert not key.endswith("lane_tokens") or int(most) % 32 == 0

    def with_value(value: float) -> ServeConfig:
        if key.startswith("training."):
            return replace(EMPTY, training=TrainingSection(**{key.removeprefix("training."): int(value)}))
        return replace(EMPTY, **{key: value if key.endswith("_gb") else int(value)})

    plan_server(with_value(float(most)), shape(), machine(8e9))
    more = 0.01 if key.endswith("_gb") else 32 if key.endswith("lane_tokens") else 1
    with pytest.raises(ConfigInvalid):
        plan_server(with_value(float(most) + more), shape(), machine(8e9))


def test_where_no_single_setting_helps_all_are_named():
    both = replace(EMPTY, kv_pages=5000, slots=1000)
    with pytest.raises(ConfigInvalid, match="leave out kv_pages, slots, and what fits is chosen"):
        plan_server(both, shape(), machine(8e9))


def test_a_server_that_fits_without_jobs_is_told_so():
    needs = plan_server(GIVEN, shape(), machine(8e9)).needs
    bare = replace(EMPTY, training=None)
    least = next(n for n in range(10**9, 3 * 10**9, 10**7) if _fits(bare, n))
    assert not _fits(EMPTY, least)
    with pytest.raises(ConfigInvalid, match="or set training = false: then it fits"):
        plan_server(EMPTY, shape(), machine(least))
    assert "training" not in plan_server(bare, shape(), machine(least)).needs
    assert "training" in needs


def _fits(config: ServeConfig, nbytes: int) -> bool:
    try:
        plan_server(config, shape(), machine(nbytes))
    except ConfigInvalid:
        return False
    return True


# ---- a training run -----------------------------------------------------------------------------------------------


def run(**settings: object) -> TrainConfig:
    tenants = tuple(TenantSection(name=f"t{i}", train=Path("t.jsonl"), rank=16) for i in range(3))
    return TrainConfig(model=ModelSection(path="base"), tenant=tenants, **settings)


def test_lanes_of_a_training_run_come_from_memory():
    assert plan_training(run(), LAYER_TARGETS, shape(), machine(8e9)).config.lanes == 4
    small = plan_training(run(), LAYER_TARGETS, shape(), machine(2e9)).config
    assert (small.slots, small.max_rank) == (3, 16)
    assert small.lanes * small.lane_tokens < 4 * 256
    assert plan_training(run(), LAYER_TARGETS, shape(), accelerator(40e9)).config.lane_tokens == 1024


def test_less_is_kept_and_more_fits():
    def lanes(**settings: object) -> int:
        return sum(
            plan_training(
                run(lanes=8, lane_tokens=512, **settings), LAYER_TARGETS, shape(), machine(64e9)
            ).needs.values()
        )

    assert lanes(remat="nothing") < lanes() < lanes(remat="everything")
    assert lanes(moments="uint8") < lanes(moments="bfloat16") < lanes()


def test_a_gpu_takes_as_few_passes_as_its_memory_allows_and_a_cpu_one():
    def passes(gb: float, on=accelerator, **settings: object) -> int:
        asked = run(lanes=16, lane_tokens=512, **settings)
        return plan_training(asked, LAYER_TARGETS, shape(), on(gb * 1e9)).config.passes

    assert [passes(gb) for gb in (64, 6, 4)] == [1, 2, 4]
    assert passes(64, passes=4) == 4
    assert passes(64, machine) == 1
    with pytest.raises(ConfigInvalid, match=r"lower lanes to at most \d+$"):
        passes(4, machine)
    with pytest.raises(ConfigInvalid, match="passes must be a number that divides the 16 lanes, got 3"):
        passes(64, passes=3)


def test_a_training_run_too_large_names_its_key():
    with pytest.raises(ConfigInvalid, match=r"lower lanes to at most \d+$"):
        plan_training(run(lanes=512, lane_tokens=256), LAYER_TARGETS, shape(), machine(8e9))


# ---- the memory there is ------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A machine with 10 GiB available, of which this process holds another GiB."""

    def write(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return tmp_path

    write("proc/meminfo", f"MemTotal:  {16 * 2**20} kB\nMemAvailable:  {10 * 2**20} kB\n")
    write("proc/self/status", f"Name:\tx\nRssAnon:\t {2**20} kB\n")
    return write


def test_without_a_limit_it_is_what_is_available_and_our_own(root):
    limit = host_limit(root("proc/self/cgroup", "0::/\n"))
    assert (limit.nbytes, limit.own) == (11 * GIB, False)


@pytest.mark.parametrize("inner", ["max", str(6 * GIB)])
def test_version_2_of_control_groups_and_outer_groups_count(root, inner):
    root("proc/self/cgroup", "0::/system.slice/jaxlora.service\n")
    root("sys/fs/cgroup/system.slice/memory.max", f"{4 * GIB}\n")
    limit = host_limit(root("sys/fs/cgroup/system.slice/jaxlora.service/memory.max", f"{inner}\n"))
    assert (limit.nbytes, limit.own) == (4 * GIB, True)


def test_version_1_of_control_groups_counts(root):
    root("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    root("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert host_limit(root("sys/fs/cgroup/memory/a/memory.limit_in_bytes", f"{3 * GIB}\n")).nbytes == 3 * GIB


def test_a_group_larger_than_the_machine_has_free_does_not_count(root):
    root("proc/self/cgroup", "0::/a\n")
    assert host_limit(root("sys/fs/cgroup/a/memory.max", f"{64 * GIB}\n")).nbytes == 11 * GIB


def test_resource_limits_count(root):
    text = f"Limit  Soft Limit  Hard Limit  Units\nMax data size   {2 * GIB}  unlimited  bytes\nMax address space unlimited unlimited bytes\n"
    limit = host_limit(root("proc/self/limits", text))
    assert (limit.nbytes, limit.origin) == (2 * GIB - 600 * 10**6, "ulimit -d less 0.6 GB reserved")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_what_was_freed_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def held() -> int:
        return int(re.findall(r"^RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) * 1024

    blocks = [libc.malloc(60_000) for _ in range(4000)]
    for block in blocks:
        ctypes.memset(block, 1, 60_000)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        libc.free(block)
    before = held()
    give_back()
    assert before - held() > 200 * 10**6
    libc.free(blocks[-1])
