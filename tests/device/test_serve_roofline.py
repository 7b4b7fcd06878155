"""`jaxlora bench roofline`: floors by hand, the program it times is the engine's step, and the figures of its report."""

import json
from dataclasses import replace

import numpy as np
import pytest
from serve_world import PlainModel
from small_world import tiny_path
from train_world import CONFIG, small_base
from typer.testing import CliRunner

from jaxlora.checkpoints.hf import HfSource
from jaxlora.checkpoints.load import open_base
from jaxlora.config.base import ONE_DEVICE, ModelSection
from jaxlora.core.lora import LoraSpec
from jaxlora.model.kv_cache import empty_pages
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.model.serving_pool import empty_serving_pool
from pallas_kernels.bench.run import Ceilings, Timing
from serve.bench import roofline
from serve.bench.roofline import PAGE, ServingBatch, StepReport, Work, serving_call, serving_work, training_work
from serve.cli import main as cli
from train.bench import TrainingSizes

TINY = str(tiny_path("tiny-llama-tied"))
DEVICE = Ceilings(read_bytes_s=1e9, flops_s=1e10)
SPEC = LoraSpec(rank=3, alpha=6.0)
# Of CONFIG: two layers of width 64, MLP 96, 8 query and 4 kv heads of 8, 128 words.
LAYERS = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96)
HEAD = 64 * 128
ADAPTER = 3 * 2 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 96))


def run(*arguments):
    return CliRunner(env={"NO_COLOR": "1"}).invoke(cli.app, ["bench", "roofline", *arguments])


class TestFloors:
    def test_decode(self):
        base = small_base()
        weights = roofline.weights_bytes(base)
        step = (ServingBatch(lanes=5, tokens=1, filled=9, adapters=2),)
        work = serving_work(base, step, SPEC)
        kv = 5 * 10 * 2 * 2 * 4 * 8 * 4  # rows, tokens, K and V, layers, heads, head, float32
        assert work.bytes == weights + kv + 2 * ADAPTER * 4
        attention = 5 * 10 * 2 * 2 * 2 * 8 * 8  # rows, keys, two products of multiply and add, layers, heads, head
        assert work.flops == 2 * 5 * (LAYERS + HEAD) + attention + 2 * 5 * ADAPTER

    def test_a_step_of_the_base_has_no_adapter(self):
        with_two = serving_work(small_base(), (ServingBatch(lanes=5, tokens=1, filled=9, adapters=2),), SPEC)
        alone = serving_work(small_base(), (ServingBatch(lanes=5, tokens=1, filled=9, adapters=0),), SPEC)
        assert with_two.bytes - alone.bytes == 2 * ADAPTER * 4
        assert with_two.flops - alone.flops == 2 * 5 * ADAPTER

    def test_prefill_computes_half_of_the_pairs_and_one_head_a_lane(self):
        base = small_base()
        work = serving_work(base, (ServingBatch(lanes=3, tokens=4, filled=0, adapters=0),), SPEC)
        attention = 3 * (1 + 2 + 3 + 4) * 2 * 2 * 2 * 8 * 8
        assert work.flops == 2 * 12 * LAYERS + 2 * 3 * HEAD + attention
        assert work.bytes == roofline.weights_bytes(base) + 12 * 2 * 2 * 4 * 8 * 4

    def test_chunks_and_rows_of_one_program_read_weights_and_adapters_once(self):
        base = small_base()
        chunks = ServingBatch(lanes=2, tokens=4, filled=0, adapters=2)
        rows = ServingBatch(lanes=5, tokens=1, filled=9, adapters=3)
        mixed, *alone = (serving_work(base, step, SPEC) for step in ((chunks, rows), (chunks,), (rows,)))
        assert mixed.flops == sum(work.flops for work in alone)
        assert mixed.bytes == sum(work.bytes for work in alone) - roofline.weights_bytes(base) - 2 * ADAPTER * 4

    def test_a_window_bounds_keys_and_pairs(self):
        windowed = replace(small_base(), config=replace(CONFIG, window=4))
        assert roofline.pairs(windowed, 6, 0) == 1 + 2 + 3 + 4 + 4 + 4
        step = (ServingBatch(lanes=1, tokens=1, filled=9, adapters=0),)
        whole, part = (serving_work(base, step, SPEC).bytes for base in (small_base(), windowed))
        assert whole - part == (9 - 4) * 2 * 2 * 4 * 8 * 4

    def test_training(self):
        base, sizes = small_base(), TrainingSizes(tenants=2, lanes=3, tokens=4, rank=3)
        work = training_work(base, sizes)
        assert (
            work.bytes == 2 * roofline.weights_bytes(base) + 2 * 2 * 4 * ADAPTER * 4
        )  # weights, gradient, two moments
        attention = 6 * (1 + 2 + 3 + 4) * 2 * 2 * 2 * 8 * 8
        assert work.flops == 4 * 24 * (LAYERS + HEAD) + 3 * attention + 6 * 24 * ADAPTER

    def test_weights_are_read_once_and_the_embedding_as_the_head_or_not(self):
        norms = 2 * 2 * 64 + 64
        assert roofline.weights_bytes(small_base()) == 4 * (LAYERS + HEAD + norms)  # packed or not
        base = replace(small_base(), packed={})
        arrays = {name: x for name, x in base.arrays.items() if name != "head"}
        tied, own = replace(base, arrays=arrays), replace(base, arrays=arrays | {"head": arrays["embed"].T})
        assert roofline.weights_bytes(tied) == roofline.weights_bytes(own)

    @pytest.mark.parametrize(
        ("work", "floor_s", "bound"),
        [(Work(bytes=3 * 10**9, flops=10**10), 3.0, "bytes"), (Work(bytes=10**9, flops=5 * 10**10), 5.0, "flops")],
    )
    def test_the_longer_of_two_times_is_the_floor(self, work, floor_s, bound):
        timing = Timing(cpu_s=np.array([8.0, 6.0]), wall_s=np.array([4.0, 7.0]))
        got = StepReport.of("it", work, DEVICE, timing)
        assert (got.floor_s, got.bound, got.measured_s, got.wall_s) == (floor_s, bound, 6.0, 4.0)
        assert got.ratio == 6.0 / floor_s


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunks", [0, 2], ids=["alone", "beside_chunks"])
def test_what_is_timed_gives_the_tokens_of_the_model(rows, chunks):
    """Rows are sequences of one token, chunks of four: what follows is what the plain model says."""
    opened = open_base(ModelSection(path=TINY, dtype="float32"), ONE_DEVICE)
    step = tuple(ServingBatch(lanes=chunks, tokens=4, filled=0, adapters=0) for _ in range(chunks > 0))
    step += (ServingBatch(lanes=rows, tokens=1, filled=0, adapters=0),)
    pool = empty_serving_pool(opened.base.config, PoolSpec(slots=2, rank=2, dtype="float32"), opened.mesh)
    kv = [empty_pages(opened.base.config, opened.mesh, pages=chunks + rows, page_tokens=PAGE, dtype=opened.base.dtype)]
    call, model = serving_call(opened, step, pool, kv), PlainModel(HfSource(tiny_path("tiny-llama-tied")))
    first, again = np.asarray(call()), np.asarray(call())
    vocab = opened.base.config.vocab
    prompts = [np.arange(4 * lane, 4 * lane + 4) * 37 % vocab for lane in range(chunks)]
    prompts += [np.array([row * 37 % vocab]) for row in range(rows)]
    assert first[: len(prompts)].tolist() == [model.greedy(prompt.tolist(), 1, None)[0] for prompt in prompts]
    assert first.tolist() == again.tolist()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(roofline, "ceilings", lambda dtype, rounds: DEVICE)
    options = ["--rows", "1", "--rows", "4", "--adapters", "2", "--rank", "2", "--context", "8"]
    return ["--model", TINY, "--dtype", "float32", *options, "--lanes", "2", "--tokens", "8", "--rounds", "1"]


def test_the_report_in_json_and_as_a_table(small):
    got = run(*small, "--json")
    assert got.exit_code == 0, got.output
    report = json.loads(got.stdout)
    assert [step["step"] for step in report["steps"]] == [
        "decode, rows 1",
        "decode, rows 4",
        "decode, rows 4, adapters 2",
        "prefill, lanes 2 x 8, adapters 2",
        "training, tenants 2 x 8",
    ]
    for step in report["steps"]:
        assert step["ratio"] == pytest.approx(step["measured_s"] / step["floor_s"])
        assert step["floor_s"] == pytest.approx(max(step["bytes"] / 1e9, step["flops"] / 1e10))
        assert step["measured_s"] > 0
    assert (report["read_bytes_s"], report["flops_s"], report["dtype"]) == (1e9, 1e10, "float32")
    table = run(*small).stdout.splitlines()
    assert table[1] == "this device: 1.0 GB/s, 10.0 GFLOP/s"
    assert len(table) == 3 + 5


def test_more_adapters_than_rows_are_refused_in_one_line(small):
    got = run(*small, "--adapters", "5")
    assert got.exit_code == cli.ERROR_EXIT
    assert got.stderr == "jaxlora: 5 adapters are not between 1 and 4, the most rows\n"
