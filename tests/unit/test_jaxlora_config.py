"""Settings: what the loader accepts and refuses, and what each section checks."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest
from base_shapes import LARGE, SHAPE, sized
from small_world import tiny_path

from jaxlora.checkpoints.hf import HfSource
from jaxlora.config.base import ModelSection
from jaxlora.config.serving import ServeConfig
from jaxlora.config.toml import PathOrName, TomlPath, TomlPathByDefault
from jaxlora.config.training import LOSSES, Loss, Optimizer, Recipe, TrainConfig, default_lr, load
from jaxlora.core.errors import ConfigInvalid
from jaxlora.core.host_memory import MemoryLimit
from jaxlora.core.lora import LAYER_TARGETS, LoraSpec
from jaxlora.model.memory_plan import plan_server

ROOT = Path(__file__).resolve().parents[2]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int
    ratio: float
    on: bool
    text: str
    place: TomlPath
    model: PathOrName
    kind: Literal["a", "b"]
    colour: Colour
    inner: Inner
    rows: tuple[Inner, ...]
    names: tuple[str, ...] = ("x",)
    limit: int | None = None


GOOD = {
    "count": "3",
    "ratio": "0.5",
    "on": "true",
    "text": '"t"',
    "place": '"here/f"',
    "model": '"org/name"',
    "kind": '"b"',
    "colour": '"blue"',
    "inner": "{size = 1}",
    "rows": "[{size = 2}, {size = 3}]",
}


def written(folder: Path, **changed: str | None) -> Path:
    """A TOML file of GOOD with some keys changed; None leaves a key out."""
    path = folder / "c.toml"
    path.write_text("".join(f"{k} = {v}\n" for k, v in {**GOOD, **changed}.items() if v is not None))
    return path


def refusal(path: Path, cls: type = Outer) -> str:
    with pytest.raises(ConfigInvalid) as e:
        load(path, cls)
    message = re.sub(rf"^{re.escape(str(path))}(:\d+)?: ", "", e.value.message)
    assert message != e.value.message
    return message


def test_every_kind_of_field(tmp_path):
    assert load(written(tmp_path), Outer) == Outer(
        count=3,
        ratio=0.5,
        on=True,
        text="t",
        place=tmp_path / "here/f",
        model="org/name",
        kind="b",
        colour=Colour.BLUE,
        inner=Inner(size=1),
        rows=(Inner(size=2), Inner(size=3)),
        names=("x",),
        limit=None,
    )


def test_float_accepts_an_integer_and_becomes_a_float(tmp_path):
    ratio = load(written(tmp_path, ratio="2"), Outer).ratio
    assert (ratio, type(ratio)) == (2.0, float)


def test_optional_field_takes_its_value(tmp_path):
    assert load(written(tmp_path, limit="4"), Outer).limit == 4


def test_absolute_path_stays(tmp_path):
    assert load(written(tmp_path, place='"/a/b"'), Outer).place == Path("/a/b")


@pytest.mark.parametrize("text", ["./m", "../m", "m.gguf", "sub/m.gguf"])
def test_path_or_name_that_is_a_path(tmp_path, text):
    assert load(written(tmp_path, model=f'"{text}"'), Outer).model == str(tmp_path / text)


def test_path_or_name_that_is_there(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load(written(tmp_path), Outer).model == str(tmp_path / "org" / "name")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"extra": "1"}, "extra: unknown key; known here: count, ratio, ", id="unknown"),
        pytest.param({"inner": "{size = 1, depth = 2}"}, "inner.depth: unknown key; known here: size", id="unknown-in"),
        pytest.param({"count": None}, "count: missing; wanted an integer", id="missing"),
        pytest.param({"inner": "{}"}, "inner.size: missing; wanted an integer", id="missing-in-table"),
        pytest.param({"rows": "[{size = 2}, {}]"}, "rows[1].size: missing", id="missing-in-array"),
        pytest.param({"count": "1.0"}, "count: must be a valid integer, got 1.0", id="int-float"),
        pytest.param({"count": "true"}, "count: must be a valid integer, got True", id="int-bool"),
        pytest.param({"ratio": "true"}, "ratio: must be a valid number, got True", id="float-bool"),
        pytest.param({"ratio": '"1"'}, "ratio: must be a valid number, got '1'", id="float-string"),
        pytest.param({"on": "1"}, "on: must be a valid boolean, got 1", id="bool-int"),
        pytest.param({"text": "1"}, "text: must be a valid string, got 1", id="string-int"),
        pytest.param({"place": "1"}, "place: must be a valid string, got 1", id="path-int"),
        pytest.param({"place": '""'}, "place: must be a path, got ''", id="path-empty"),
        pytest.param({"place": '"~no-such-user-here/f"'}, "place: '~no-such-user-here/f' has no home", id="path-home"),
        pytest.param({"model": "1"}, "model: must be a valid string", id="name-int"),
        pytest.param({"kind": '"c"'}, "kind: must be 'a' or 'b', got 'c'", id="literal"),
        pytest.param({"colour": '"green"'}, "colour: must be 'red' or 'blue', got 'green'", id="enum"),
        pytest.param({"inner": "1"}, "inner: must be a table, got 1", id="table-int"),
        pytest.param({"rows": "{size = 1}"}, "rows: must be a valid array, got {'size': 1}", id="array-table"),
        pytest.param({"rows": "[1]"}, "rows[0]: must be a table, got 1", id="array-of-int"),
        pytest.param({"names": '["a", 1]'}, "names[1]: must be a valid string, got 1", id="array-item"),
        pytest.param({"limit": "1.5"}, "limit: must be a valid integer, got 1.5", id="optional"),
        pytest.param({"inner": "{size = 0}"}, "inner: size must be at least 1, got 0", id="own-check"),
        pytest.param({"rows": "[{size = -1}]"}, "rows[0]: size must be at least 1, got -1", id="own-check-in-array"),
        pytest.param(
            {"text": "1979-05-27"}, "text: must be a valid string, got {'date or time': '1979-05-27'}", id="date"
        ),
        pytest.param({"text": "= 3"}, "is not TOML: ", id="syntax"),
    ],
)
def test_refused(tmp_path, changed, message):
    assert refusal(written(tmp_path, **changed)).startswith(message)


def test_refusal_carries_the_key(tmp_path):
    with pytest.raises(ConfigInvalid) as e:
        load(written(tmp_path, rows="[{size = 2}, {size = true}]"), Outer)
    assert e.value.param == "rows[1].size"


def test_file_that_is_not_there(tmp_path):
    assert refusal(tmp_path / "none.toml").startswith("cannot be read (No such file or directory)")


def test_file_that_is_a_folder(tmp_path):
    assert refusal(tmp_path).startswith("cannot be read (Is a directory)")


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "c.toml"
    path.write_bytes(b"a = \xff")
    assert refusal(path).startswith("is not UTF-8 text (byte 4)")


def test_long_values_are_cut_in_messages(tmp_path):
    assert len(refusal(written(tmp_path, count='"' + "x" * 10_000 + '"'))) < 200


def test_the_mistakes_of_a_file_are_told_at_once(tmp_path):
    path = written(tmp_path, count="1.5", inner="{size = 0, depth = 1}", rows="[{size = 1}, {}]", text=None)
    with pytest.raises(ConfigInvalid) as e:
        load(path, Outer)
    assert e.value.param == "count"
    assert e.value.message.splitlines() == [
        f"{path}: 5 mistakes",
        f"{path}:1: count: must be a valid integer, got 1.5",
        f"{path}:1: text: missing; wanted a string",
        f"{path}:8: inner: size must be at least 1, got 0",
        f"{path}:8: inner.depth: unknown key; known here: size",
        f"{path}:9: rows[1].size: missing; wanted an integer",
    ]


@pytest.mark.parametrize("cls", [TrainConfig, ServeConfig])
def test_every_path_of_the_settings_starts_at_their_file(cls):
    """A field of type Path would start where the process does."""
    todo, seen = [cls], []
    while todo:
        found = todo.pop()
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            todo += get_type_hints(found, include_extras=True).values()
        elif found in (TomlPath, TomlPathByDefault):
            seen.append(found)
        else:
            assert found is not Path
            todo += get_args(found)
    assert len(seen) >= 3


def test_example_train_config():
    c = load(ROOT / "configs/train_two_tenants.toml", TrainConfig)
    roman, plural = c.tenant
    assert (c.model.path, c.mesh.data * c.mesh.fsdp * c.mesh.tensor) == ("smollm2", 1)
    assert (roman.targets, roman.clip, roman.steps) == (LAYER_TARGETS, 1.0, None)
    assert (plural.spec.scale("q_proj", 0), plural.steps) == (4.0, 30)
    for file in (roman.train, roman.heldout, plural.train, plural.heldout):
        assert file is not None
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert all([m["role"] for m in line["messages"]] == ["system", "user", "assistant"] for line in lines)
        assert len(lines) == (16 if ".train." in file.name else 8)


def test_a_tenant_learns_by_the_optimizers_own_defaults(tmp_path):
    path = changed_example(tmp_path, "train_two_tenants.toml", "clip = 1.0", "clip = inf")
    roman, plural = (t.optimizer(default_steps=40, default_lr=1.0) for t in load(path, TrainConfig).tenant)
    assert roman == Optimizer(lr=2e-3, schedule="linear", warmup_steps=4, total_steps=40)
    assert (plural.clip, plural.total_steps) == (None, 30)


def test_a_tenant_that_only_names_its_data_learns_as_published(tmp_path):
    path = tmp_path / "least.toml"
    path.write_text("""
out = "out"
lanes = 4
lane_tokens = 64
slots = 1
max_rank = 16
steps = 70
save_every = 10
model = {path = "smollm2", dtype = "auto"}
tenant = [{name = "one", train = "one.jsonl"}]
""")
    (one,) = load(path, TrainConfig).tenant
    assert one.spec == LoraSpec(rank=16, alpha=32.0, targets=LAYER_TARGETS)
    assert len(one.targets) == 7
    optimizer = one.optimizer(default_steps=70, default_lr=1e-3)
    assert optimizer == Optimizer(lr=1e-3, schedule="linear", warmup_steps=3, total_steps=70)  # 3 % of 70 is 2.1
    assert (one.batch, one.seed, one.objective) == (8, 0, Loss())


@pytest.mark.parametrize(
    ("model", "width", "lr"),
    [
        ("tiny-llama-tied", 2000, 5e-4),
        ("tiny-llama-tied", 576, 1.3219e-3),  # SmolLM2-135M
        ("tiny-mistral", 4096, 2.8563e-4),
        ("tiny-qwen2", 896, 5.3210e-4),
        ("tiny-qwen3", 2560, 4.9053e-4),
    ],
)
def test_the_learning_rate_of_a_tenant_that_names_none_follows_the_width(model, width, lr):
    """The figures are worked out apart from the code: 5e-4 exp(p log(2000 / width)), p = 0.781 or 0.0775."""
    config = dataclasses.replace(HfSource(tiny_path(model)).config, d_model=width)
    assert default_lr(config) == pytest.approx(lr, rel=1e-4)


def test_what_a_recipe_says_is_never_replaced():
    given = Recipe(lr=0.5, warmup_steps=0, steps=9).optimizer(default_steps=4, default_lr=1.0)
    assert (given.lr, given.warmup_steps, given.total_steps) == (0.5, 0, 9)


def test_example_preference_config():
    (brief,) = load(ROOT / "configs/train_dpo.toml", TrainConfig).tenant
    assert brief.objective == Loss(name="dpo", beta=0.1)
    assert brief.objective.row() == Loss(name="dpo").row() == {"beta": 0.1, "clip_low": 0, "clip_high": 0}


def test_a_loss_has_its_own_numbers_and_defaults():
    """The defaults are those of the protocol that gives these losses their names."""
    bounds = {name: tuple(Loss(name=name).row().values()) for name in LOSSES}
    assert bounds == {
        "cross_entropy": (0, 0, 0),
        "dpo": (0.1, 0, 0),
        "importance_sampling": (0, 0, 0),
        "ppo": (0, 0.8, 1.2),
        "cispo": (0, 0, 4),
        "dro": (0.05, 0, 0),
        "gspo": (0, 0.8, 1.2),
    }
    assert Loss(name="ppo", clip_high=2).row() == {"beta": 0, "clip_low": 0.8, "clip_high": 2}
    with pytest.raises(ConfigInvalid, match=r"loss must be one of cross_entropy, dpo, .* got 'kto'"):
        Loss(name="kto")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('loss = "sft"', "tenant[0].loss: must be 'cross_entropy', 'dpo', 'importance_sampling',"),
        ("beta = 0.1", "tenant[0]: loss cross_entropy has no beta; it takes no numbers"),
        ('loss = "dpo"\nclip_low = 0.8', "tenant[0]: loss dpo has no clip_low; it takes beta"),
        ('loss = "ppo"\nbeta = 0.8', "tenant[0]: loss ppo has no beta; it takes clip_low and clip_high"),
        ('loss = "dpo"\nbeta = 0', "tenant[0]: beta must be positive and finite, got 0.0"),
        ('loss = "dro"\nbeta = inf', "tenant[0]: beta must be positive and finite, got inf"),
        ('loss = "ppo"\nclip_low = 1.5', "tenant[0]: clip_low and clip_high must be finite and 0 <= clip_low <="),
        ('loss = "cispo"\nclip_low = -0.1', "tenant[0]: clip_low and clip_high must be finite"),
        ('loss = "gspo"\nclip_high = nan', "tenant[0]: clip_low and clip_high must be finite"),
    ],
)
def test_a_loss_refuses(tmp_path, lines, message):
    path = changed_example(tmp_path, "train_two_tenants.toml", "seed = 0", f"seed = 0\n{lines}")
    assert refusal(path, TrainConfig).startswith(message)


@pytest.mark.parametrize("file", ["train_two_tenants.toml", "train_dpo.toml"])
def test_example_train_and_heldout_lines_differ(file):
    for tenant in load(ROOT / "configs" / file, TrainConfig).tenant:
        assert tenant.heldout is not None
        assert not set(tenant.train.read_text().splitlines()) & set(tenant.heldout.read_text().splitlines())


def test_example_serve_config_equals_the_defaults_and_fits_the_machine_that_it_names():
    c = load(ROOT / "configs/serve_smollm2.toml", ServeConfig)
    sizes = ("slots", "max_rank", "rows", "kv_pages", "prefill_lanes", "prefill_tokens", "max_waiting_tokens")
    training = dataclasses.replace(c.training, **dict.fromkeys(("slots", "lanes", "lane_tokens")))
    rest = dataclasses.replace(c, training=training, **dict.fromkeys(sizes))
    assert rest == ServeConfig(model=ModelSection(path="smollm2"), adapters=c.adapters, data=c.data)
    free = MemoryLimit(nbytes=4 * 10**9, origin="the machine's available memory", own=False)
    plan = plan_server(c, SHAPE, dataclasses.replace(LARGE, device=free))
    given = [getattr(sized(rest), name) for name in sizes if name != "kv_pages"]
    assert given == [getattr(plan.config, name) for name in sizes if name != "kv_pages"], (
        "what much memory would choose"
    )
    assert c.adapters.resolve() == ROOT / "runs/adapters"


def changed_example(tmp_path: Path, name: str, old: str, new: str) -> Path:
    source = (ROOT / "configs" / name).read_text()
    assert old in source
    path = tmp_path / name
    path.write_text(source.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr = 2e-3", "lr = -1e-3", "tenant[0]: lr must be finite and not negative, got -0.001"),
        ("lr = 2e-3", "lr = inf", "tenant[0]: lr must be finite and not negative, got inf"),
        ("lr = 2e-3", "lr = nan", "tenant[0]: lr must be finite and not negative, got nan"),
        ('schedule = "linear"', 'schedule = "step"', "tenant[0].schedule: must be 'constant', 'linear' or"),
        ("warmup_steps = 4", "warmup_steps = -1", "tenant[0]: warmup_steps must be in [0, "),
        ("warmup_steps = 4", "warmup_steps = 41", "tenant roman: warmup_steps must be in [0, 40]"),
        ("warmup_steps = 2", "warmup_steps = 31", "tenant[1]: warmup_steps must be in [0, 30]"),
        ("weight_decay = 0.01", "weight_decay = -0.1", "tenant[1]: weight_decay must be finite and not negative"),
        ("clip = 1.0", "clip = 0", "tenant[1]: clip must be positive"),
        ("clip = 1.0", "clip = -inf", "tenant[1]: clip must be positive"),
        ("batch = 4\n", "batch = 0\n", "tenant[1]: batch must be at least 1"),
        ("steps = 30", "steps = 0", "tenant[1]: steps must be at least 1, or left out"),
        ("seed = 1", "seed = -1", "tenant[1]: seed must be in [0, 2^32)"),
        ("seed = 1", "b1 = 1\nseed = 1", "tenant[1]: b1 must be in [0, 1), got 1.0"),
        ("seed = 1", "b2 = -0.1\nseed = 1", "tenant[1]: b2 must be in [0, 1)"),
        ("seed = 1", "eps = 0\nseed = 1", "tenant[1]: eps must be finite and at least"),
        ("rank = 8", "rank = 0", "tenant[0]: lora rank must be at least 1, got 0"),
        ("seed = 1", "loraplus_ratio = 0\nseed = 1", "tenant[1]: loraplus_ratio must be positive"),
        ("rank = 16\nalpha", "rank = 12\nalpha", "2 tenants of rank 1 to 12 need as many slots, but there are 1"),
        (
            "[model]",
            "[[bucket]]\nrank = 16\nslots = 1\n[model]",
            "the rank of each [[bucket]] must be its own and less than",
        ),
        ("[model]", "[[bucket]]\nrank = 0\nslots = 1\n[model]", "bucket[0]: rank must be at least 1"),
        ("rank = 8", "rank = 32", "tenant roman has rank 32, more than max_rank = 16"),
        ('"o_proj"]', '"oo_proj"]', "tenant[1]: lora targets must be distinct names"),
        ('name = "plural"', 'name = "roman"', "tenant names must be distinct; more than one is called roman"),
        ('name = "plural"', 'name = "../x"', "tenant[1]: name must be 1 to 64 letters"),
        ("lanes = 4 ", "lanes = 0", "lanes must be at least 1, got 0"),
        (
            "lane_tokens = 256",
            "lane_tokens = 100",
            "lane_tokens must be a multiple of 32 or smaller than that, such as 96 or",
        ),
        ("save_every = 20", "save_every = 0", "save_every must be at least 1"),
        ("[model]", "[mesh]\ndata = 0\nfsdp = 1\ntensor = 1\n[model]", "mesh: data must be at least 1"),
        ("[model]", "[mesh]\nfsdp = 0\n[model]", "mesh: fsdp must be at least 1"),
        ('path = "smollm2"', 'path = " "', "model: path must be"),
        ('dtype = "auto"', 'dtype = "float16"', "model.dtype: must be 'float32', 'bfloat16' or 'auto'"),
        ('dtype = "auto"', 'dtype = "auto"\nprecision = "max"', "model.precision: must be 'auto', 'default'"),
    ],
)
def test_train_config_refuses(tmp_path, old, new, message):
    assert refusal(changed_example(tmp_path, "train_two_tenants.toml", old, new), TrainConfig).startswith(message)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("port = 8000", "port = 65536", "port must be in [0, 65535], got 65536"),
        ('host = "127.0.0.1"', 'host = ""', "host must be an address"),
        ("max_waiting = 256", "max_waiting = 0", "max_waiting must be at least 1"),
        ("kv_pages = 128", "kv_pages = 0", "kv_pages must be at least 1"),
        (
            "[model]",
            '[[load]]\nname = "a"\npath = "x"\n[[load]]\nname = "a"\npath = "y"\n[model]',
            "names under [[load]] must be distinct; more than one is called a",
        ),
        ("quantum_ms = 200", "quantum_ms = 0", "tuning: quantum_ms must be positive"),
        ("# active_slots = 8", "active_slots = 9", "active_slots must be in [1, 8], got 9"),
        ("# active_slots = 8", "slots = 8", "slots must be left out where there are no slot_sizes, got 8"),
        ("kv_pages = 128", "slot_sizes = [8, 8]", "slot_sizes must be rising numbers of slots"),
        ("kv_pages = 128", "slot_sizes = [0, 8]", "slot_sizes must be rising numbers of slots"),
        ("kv_pages = 128", "slot_sizes = [4, 16]", "slots must be one of slot_sizes = [4, 16], got 8"),
        ("# active_slots = 8", "active_slots = 0", "active_slots must be in [1, 8], got 0"),
        ("# prefill_lanes_while_decoding = 8", "prefill_lanes_while_decoding = 9", "prefill_lanes_while_decoding must"),
        ('# pin = ["roman"]', 'pin = ["a@2"]', "tuning: pin must be names without @VERSION"),
        ('# pin = ["roman"]', 'pin = ["a", "a"]', "tuning: names under pin must be distinct"),
        ('# pin = ["roman"]', 'active_slots = 1\npin = ["a"]', "pin takes at most 0 adapters of 1 active slots, got 1"),
        ('# pin = ["roman"]', 'pins = ["a"]', "tuning.pins: unknown key"),
        ("# active_slots", '[[tuning.tenant]]\nname = "a"\nweight = 0\n#', "tuning.tenant[0]: weight must be positive"),
        ("# active_slots", '[[tuning.tenant]]\nname = "a"\nweight = inf\n#', "tuning.tenant[0]: weight must be"),
        ("[model]", '[[load]]\nname = "a/b"\npath = "x"\n[model]', "load[0]: name must be 1 to 64 letters"),
    ],
)
def test_serve_config_refuses(tmp_path, old, new, message):
    assert refusal(changed_example(tmp_path, "serve_smollm2.toml", old, new), ServeConfig).startswith(message)


def test_serve_config_loads_adapters_beside_the_file(tmp_path):
    path = changed_example(tmp_path, "serve_smollm2.toml", "[model]", '[[load]]\nname = "a"\npath = "x"\n[model]')
    assert [(a.name, a.path) for a in load(path, ServeConfig).load] == [("a", tmp_path / "x")]


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeConfig(model=ModelSection(path="smollm2")).port = 1  # ty: ignore[invalid-assignment]
