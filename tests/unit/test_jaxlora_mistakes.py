"""What a settings file says of its mistakes: each with its line, all in one message; and others' words for settings."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
from base_shapes import sized, sized_run

from jaxlora.config.base import ModelSection
from jaxlora.config.key_lines import key_lines
from jaxlora.config.serving import NamedLimits, ServeConfig, Tuning
from jaxlora.config.template import EXAMPLES, template
from jaxlora.config.toml import item_of, load, section_of, types_of
from jaxlora.config.training import Recipe, TrainConfig
from jaxlora.config.words import OTHERS, did_you_mean, in_our_words, meant
from jaxlora.core.errors import ConfigInvalid, InvalidRequest


def load_text(folder: Path, text: str, cls: type = ServeConfig):
    path = folder / "c.toml"
    path.write_text(text)
    return load(path, cls)


# ---- defaults


def test_a_server_starts_from_a_base_alone(tmp_path):
    config = load_text(tmp_path, '[model]\npath = "smollm2"\n')
    assert (config.adapters, config.data) == (tmp_path / "adapters", tmp_path / "data")
    assert (config.slots, config.training.lanes, config.tuning) == (None, None, Tuning())
    whole = sized(config)
    assert None not in [getattr(whole, f.name) for f in dataclasses.fields(whole) if f.type in ("int", "float")]
    assert None not in (whole.training.slots, whole.training.lanes, whole.training.lane_tokens, whole.training.max_rank)


def test_training_starts_from_a_base_and_data_alone(tmp_path):
    text = '[model]\npath = "smollm2"\n[[tenant]]\nname = "a"\ntrain = "a.jsonl"\n[[tenant]]\nname = "b"\ntrain = "b"\nr = 4\n'
    config = load_text(tmp_path, text, TrainConfig)
    assert (config.out, config.slots, config.steps) == (tmp_path / "runs", None, None)
    assert sized_run(config).buckets == [(16, 2)]


def test_slots_of_buckets_are_not_counted_again(tmp_path):
    text = '[model]\npath = "m"\n[[bucket]]\nrank = 8\nslots = 1\n'
    tenants = "".join(f'[[tenant]]\nname = "t{r}"\ntrain = "a"\nrank = {r}\n' for r in (4, 16, 32))
    assert sized_run(load_text(tmp_path, text + tenants, TrainConfig)).buckets == [(8, 1), (32, 2)]


def test_sizes_that_are_given_stay(tmp_path):
    config = sized(load_text(tmp_path, 'slots = 3\n[model]\npath = "m"\n[training]\nlanes = 7\n'))
    assert (config.slots, config.training.lanes) == (3, 7)


def test_a_server_may_take_no_jobs(tmp_path):
    config = load_text(tmp_path, 'training = false\n[model]\npath = "m"\n')
    assert config.training is sized(config).training is None
    with pytest.raises(ConfigInvalid, match=r"c.toml:1: training: must be a table, got True"):
        load_text(tmp_path, 'training = true\n[model]\npath = "m"\n')


# ---- ten files with one to five mistakes each

MODEL = '[model]\npath = "smollm2"\n'
TENANT = '[[tenant]]\nname = "a"\ntrain = "a.jsonl"\n'
TEN = {
    "one misspelt": (ServeConfig, f"slot = 4\n{MODEL}", ["1: slot: unknown key; did you mean slots?"]),
    "no base, and a wrong port": (
        ServeConfig,
        "\nport = 70000\n",
        ["1: model: missing; wanted a table [model] with path", "2: port must be in [0, 65535], got 70000"],
    ),
    "keys of other tables": (
        ServeConfig,
        f"quantum_ms = 100\n{MODEL}port = 8001\nzzz = 1\n",
        [
            "1: quantum_ms: unknown key; it belongs under [tuning]",
            "4: model.port: unknown key; it belongs to the top of the file, above the first [table]",
            "5: model.zzz: unknown key; known here: path, dtype, precision, quantization",
        ],
    ),
    "four sections, each with its own": (
        ServeConfig,
        f'{MODEL}dtype = "bf16"\n[tuning]\nquantum_ms = 0\n[http]\nconnections = 0\n[retention]\njobs_days = -1\n',
        [
            "3: model.dtype: must be 'float32', 'bfloat16' or 'auto', got 'bf16'",
            "5: tuning: quantum_ms must be positive and finite, got 0.0",
            "7: http: connections must be at least 1, got 0",
            "9: retention: jobs_days must be positive and finite, got -1.0",
        ],
    ),
    "types, a misspelt key with a wrong value, and what goes together": (
        ServeConfig,
        f'slots = 4\nrows = "8"\nmax_rnk = 0\nkv_pages = 1.5\n{MODEL}[tuning]\nactive_slots = 5\n[training]\nlanes = 0\n',
        [
            "2: rows: must be a valid integer, got '8'",
            "3: max_rank must be at least 1, got 0",
            "3: max_rnk: unknown key; did you mean max_rank?",
            "4: kv_pages: must be a valid integer, got 1.5",
            "8: active_slots must be in [1, 4], got 5",
            "10: training: lanes must be at least 1, got 0",
        ],
    ),
    "of slots, all that go together": (
        ServeConfig,
        f"slots = 6\nslot_sizes = [4, 16, 8]\n{MODEL}[tuning]\nslots = 5\nactive_slots = 17\npin = ['a', 'b', 'c', 'd']\n",
        [
            "1: slots must be one of slot_sizes = [4, 16, 8], got 6",
            "2: slot_sizes must be rising numbers of slots, each at least 1, got [4, 16, 8]",
            "6: slots must be one of slot_sizes = [4, 16, 8], got 5",
            "7: active_slots must be in [1, 16], got 17",
            "8: pin takes at most 3 adapters of 4 active slots, got 4",
        ],
    ),
    "in arrays of tables": (
        ServeConfig,
        f"""{MODEL}[[load]]
name = "a"
path = "x"
[[load]]
name = "a"
[[limits.tenant]]
name = "b/c"
jobs = 0
""",
        [
            "6: load[1].path: missing; wanted a path",
            "7: names under [[load]] must be distinct; more than one is called a",
            "9: limits.tenant[0]: name must be 1 to 64 letters, digits, '.', '_' or '-' and start with a letter or "
            "digit; got 'b/c'",
            "10: limits.tenant[0]: jobs must be at least 1, got 0",
        ],
    ),
    "several in one tenant": (
        TrainConfig,
        f"{MODEL}{TENANT}rank = 0\nalpha = 0\nlearning_rate = -1\nbatch_size = 0\nb1 = 1\n",
        [
            "6: tenant[0]: lora rank must be at least 1, got 0",
            "7: tenant[0]: lora alpha must be finite and not zero, got 0.0",
            "8: tenant[0]: lr must be finite and not negative, got -1.0",
            "9: tenant[0]: batch must be at least 1, got 0",
            "10: tenant[0]: b1 must be in [0, 1), got 1.0",
        ],
    ),
    "two words for the same": (
        TrainConfig,
        f"steps = 10\nmax_steps = 10\n{MODEL}{TENANT}r = 4\nrank = 8\nlearning_rat = 1e-3\n",
        [
            "2: max_steps: means the same as steps, which is given, too; leave one out",
            "8: tenant[0].r: means the same as rank, which is given, too; leave one out",
            "10: tenant[0].learning_rat: unknown key; did you mean lr?",
        ],
    ),
    "what tenants and the file ask of each other": (
        TrainConfig,
        f"max_rank = 8\nsteps = 5\nlane_tokens = 33\n{MODEL}{TENANT}rank = 16\n{TENANT}rank = 4\nwarmup_steps = 9\n",
        [
            "3: lane_tokens must be a multiple of 32 or smaller than that, such as 32 or 64; got 33",
            "9: tenant a has rank 16, more than max_rank = 8; raise max_rank or lower it",
            "11: tenant names must be distinct; more than one is called a",
            "14: tenant a: warmup_steps must be in [0, 5], the total_steps, got 9",
        ],
    ),
    "dotted, inline and quoted": (
        TrainConfig,
        f"""model = {{path = "smollm2", dtyp = "auto"}}
mesh.data = 0
"mesh".fsdp = "x"
{TENANT}schedule = "linaer"
targets = [
  "q_proj",
  3,
]
""",
        [
            "1: model.dtyp: unknown key; did you mean dtype?",
            "2: mesh: data must be at least 1, got 0",
            "3: mesh.fsdp: must be a valid integer, got 'x'",
            "7: tenant[0].schedule: must be 'constant', 'linear' or 'cosine', got 'linaer'; did you mean 'linear'?",
            "10: tenant[0].targets[1]: must be a valid string, got 3",
        ],
    ),
}


@pytest.mark.parametrize("name", TEN)
def test_every_mistake_is_told_at_once_with_its_line(name, tmp_path):
    cls, text, wanted = TEN[name]
    with pytest.raises(ConfigInvalid) as e:
        load_text(tmp_path, text, cls)
    head = [f"{tmp_path}/c.toml: {len(wanted)} mistakes"] if len(wanted) > 1 else []
    assert e.value.message.splitlines() == [*head, *(f"{tmp_path}/c.toml:{line}" for line in wanted)]


def test_the_page_shows_what_is_told(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    text = 'slot = 4\nport = 80000\nmodel.path = "smollm2"\n[tuning]\nquantum_ms = 0\n'
    monkeypatch.chdir(tmp_path)
    Path("server.toml").write_text(text)
    with pytest.raises(ConfigInvalid) as e:
        load(Path("server.toml"), ServeConfig)
    assert f"```\njaxlora: {e.value.message}\n```\n" in page


@pytest.mark.parametrize(
    ("text", "line"),
    [("a = 1\nb = \n", 2), ("a = 1\n\na = 2\n", 3), ('a = "x\n', 1), ('a = 1\nb = """x\ny\n', 3), ("[a\n", 1)],
)
def test_where_it_is_not_toml(text, line, tmp_path):
    with pytest.raises(ConfigInvalid, match=rf"c.toml:{line}: is not TOML: "):
        load_text(tmp_path, text)


# ---- lines

LINES = '''a = 1  # b = 2
"q.r".'s t' = "x = 1 # no comment"
text = """
k = 1 \\"""
k = 2""""
raw = \'\'\'
[k]\'\'\'
list = [1, 2.5, # one
  1979-05-27 07:32:00, {x = 1, y.z = [true, {}]}, "]",
]
[t.u]
v = {}
[[w]]
x = -inf
[[w]]
x.y = 1
[w.s]
k = 1
[[w.v]]
[[w.v]]
k = 1
'''


def places(value: object, at: tuple = ()):
    """All places in a table that tomllib has read."""
    yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def test_each_key_has_its_line():
    lines = key_lines(LINES)
    assert set(lines) == set(places(tomllib.loads(LINES))) - {()}
    wanted = {
        ("a",): 1,
        ("q.r", "s t"): 2,
        ("text",): 3,
        ("raw",): 6,
        ("list", 1): 8,
        ("list", 2): 9,
        ("list", 3, "y", "z", 1): 9,
        ("list", 4): 9,
        ("t", "u", "v"): 12,
        ("w", 0, "x"): 14,
        ("w", 1): 15,
        ("w", 1, "x", "y"): 16,
        ("w", 1, "s", "k"): 18,
        ("w", 1, "v", 0): 19,
        ("w", 1, "v", 1, "k"): 21,
    }
    assert {place: lines[place] for place in wanted} == wanted


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[2].glob("configs/*.toml")), ids=lambda p: p.stem)
def test_the_examples_have_a_line_for_each_key(file):
    assert set(key_lines(file.read_text())) == set(places(tomllib.loads(file.read_text()))) - {()}


# ---- words


def test_others_words_are_taken(tmp_path):
    text = f"""output_dir = "o"
{MODEL}[[tenant]]
name = "a"
training_file = "a.jsonl"
validation_file = "h.jsonl"
learning_rate = 1e-3
r = 4
lora_alpha = 8
lora_dropout = 0.1
target_modules = ["q_proj"]
use_rslora = true
batch_size = 2
max_steps = 9
lr_scheduler_type = "cosine"
max_grad_norm = 2
adam_beta1 = 0.8
"""
    config = load_text(tmp_path, text, TrainConfig)
    (tenant,) = config.tenant
    recipe = Recipe(
        lr=1e-3, rank=4, alpha=8, dropout=0.1, targets=("q_proj",), rslora=True, batch=2, steps=9, schedule="cosine",
        clip=2, b1=0.8,
    )  # fmt: skip
    assert {f.name: getattr(tenant, f.name) for f in dataclasses.fields(Recipe)} == dataclasses.asdict(recipe)
    assert (config.out, tenant.train, tenant.heldout) == (tmp_path / "o", tmp_path / "a.jsonl", tmp_path / "h.jsonl")


def test_each_word_means_one_thing():
    others = [word for words in OTHERS.values() for word in words]
    assert len(set(others)) == len(others)
    assert not set(others) & set(OTHERS)


@pytest.mark.parametrize(
    ("word", "wanted"),
    [("learning_rat", "lr"), ("lerning-rate", "lr"), ("Rank", "rank"), ("alhpa", "alpha"), ("q", None)],
)
def test_what_a_misspelt_word_means(word, wanted):
    assert meant(word, ["lr", "rank", "alpha"]) == wanted


def test_python_says_what_is_known():
    @in_our_words
    def add(name: str, *, lr: float = 0.0, rank: int = 1) -> tuple[str, float, int]:
        return name, lr, rank

    assert add("a", learning_rate=0.5, r=2) == ("a", 0.5, 2)
    with pytest.raises(InvalidRequest, match=r"no argument is called learning_rat; did you mean lr\?"):
        add("a", learning_rat=0.5)
    with pytest.raises(InvalidRequest, match="no argument is called zzz; known here: name, lr, rank"):
        add("a", zzz=0.5)
    with pytest.raises(InvalidRequest, match="r means the same as rank, which is given, too"):
        add("a", r=1, rank=1)


def test_nothing_close_tells_all_that_is_known():
    assert did_you_mean("zzz", ["lr", "rank"]) == "known here: lr, rank"


@pytest.mark.parametrize("name", ["smolm2", "SmolLM2", "smollm"])
def test_a_name_close_to_the_demo_model_is_not_looked_up(name):
    with pytest.raises(ConfigInvalid, match="did you mean smollm2"):
        ModelSection(path=name)


def test_a_folder_may_have_a_name_close_to_the_demo_model(tmp_path, monkeypatch):
    (tmp_path / "smollm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert ModelSection(path="smollm").path == "smollm"


# ---- files to begin with

BOTH = pytest.mark.parametrize("cls", [ServeConfig, TrainConfig])
ONE_LOSS_EACH = ("beta", "clip_low", "clip_high")  # which no single loss takes together


def same(one, other) -> bool:
    return dataclasses.asdict(one) == dataclasses.asdict(other)


@BOTH
def test_a_file_to_begin_with_holds_the_defaults(cls, tmp_path):
    text = template(cls, "jaxlora command")
    bare = re.sub(r"\s*#.*", "", text)
    tenant = TENANT.replace('"a"', '"support"').replace("a.jsonl", "train.jsonl") if cls is TrainConfig else ""
    least = load_text(tmp_path, MODEL + tenant, cls)
    assert same(load_text(tmp_path, text, cls), least)
    assert same(load_text(tmp_path, bare, cls), least)


@BOTH
def test_a_file_to_begin_with_shows_every_setting(cls, tmp_path):
    """With the # taken away, each is a setting that there is, with a value that it may have."""
    text = template(cls, "jaxlora command")
    shown = re.sub(r"^# (?=[a-z_0-9]+ = |\[)", "", text, flags=re.MULTILINE)
    shown = "".join(line for line in shown.splitlines(True) if not line.startswith(ONE_LOSS_EACH))
    shown = re.sub(r"\[\[rank_class\]\]\n(?:\w.*\n)+", "", shown)  # not together with slot_sizes
    config = load_text(tmp_path, shown, cls)
    table = tomllib.loads(shown)

    def check(section: type, table: dict, value: object) -> None:
        for name, kind in types_of(section).items():
            if name in (*ONE_LOSS_EACH, "rank_class"):
                assert re.search(rf"^# (?:\[\[{name}\]\]|{name} = )", text, re.MULTILINE)
                continue
            assert name in table, (section, name)
            if (inner := section_of(kind)) is not None:
                check(inner, table[name], getattr(value, name))
            elif (item := section_of(item_of(kind))) is not None:
                check(item, table[name][0], getattr(value, name)[0])
            else:
                assert getattr(value, name) is not None

    check(cls, table, config)


def test_no_example_is_of_a_setting_that_is_gone():
    known = {f.name for c in (ServeConfig, TrainConfig) for f in all_fields(c)}
    assert {name.split(".")[-1] for name in EXAMPLES} <= known


def all_fields(section: type):
    yield from dataclasses.fields(section)
    for kind in types_of(section).values():
        inner = section_of(kind) or section_of(item_of(kind))
        if inner is not None:
            yield from all_fields(inner)


def test_a_comment_beside_a_field_is_in_the_file():
    text = template(ServeConfig, "jaxlora serve serve.toml")
    assert "# port = 8000                             # 0: any free port\n" in text
    assert "#   jaxlora serve serve.toml\n" in text
    assert "None" not in text
    assert NamedLimits.__doc__ is not None
    assert f"# {NamedLimits.__doc__}\n# [[limits.tenant]]\n" in text
