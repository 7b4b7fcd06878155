import json

import pytest

from serve.demo.tasks import (
    HELDOUT,
    TRAIN,
    Task,
    city_record,
    constant_baseline,
    demo_tasks,
    initials,
    ledger_date,
    nearest_baseline,
    number_in_words,
    past_participle,
    plural,
    reversed_camel,
    spoken_time,
)

TASKS = demo_tasks(0)
NAMES = [task.name for task in TASKS]
STEPS, BATCH = 54, 8  # of the demo, for each tenant


@pytest.mark.parametrize(
    ("rule", "given", "wanted"),
    [
        (number_in_words, (347,), "three hundreds forty seven"),
        (number_in_words, (500,), "five hundreds"),
        (number_in_words, (812,), "eight hundreds twelve"),
        (number_in_words, (120,), "one hundreds twenty"),
        (number_in_words, (901,), "nine hundreds one"),
        (initials, ("red fox jumps",), "r+f+j"),
        (ledger_date, (9, 3), "d9 m3"),
        (ledger_date, (31, 12), "d31 m12"),
        (spoken_time, (18, 35), "35 past eighteen"),
        (spoken_time, (0, 5), "05 past zero"),
        (spoken_time, (20, 0), "00 past twenty"),
        (spoken_time, (23, 59), "59 past twenty three"),
        (past_participle, ("bake",), "baked"),
        (past_participle, ("carry",), "carried"),
        (past_participle, ("plan",), "planned"),
        (past_participle, ("cook",), "cooked"),
        (past_participle, ("fix",), "fixed"),
        (past_participle, ("open",), "opened"),
        (past_participle, ("wash",), "washed"),
        (past_participle, ("trust",), "trusted"),
        (plural, ("box",), "boxes"),
        (plural, ("city",), "cities"),
        (plural, ("key",), "keys"),
        (plural, ("church",), "churches"),
        (plural, ("glass",), "glasses"),
        (plural, ("cat",), "cats"),
        (city_record, ("Ana", "Lima"), '{"Lima":"Ana"}'),
        (reversed_camel, ("get_last_item",), "itemLastGet"),
    ],
)
def test_rules_by_hand(rule, given, wanted):
    assert rule(*given) == wanted


def test_there_are_eight_different_tenants():
    assert len(set(NAMES)) == len({task.system for task in TASKS}) == 8


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_training_and_heldout_share_no_user_turn(seed):
    for task in demo_tasks(seed):
        train, heldout = ({user for user, _ in pairs} for pairs in (task.train, task.heldout))
        assert not train & heldout, task.name
        assert len(train) == len(task.train) == TRAIN >= STEPS * BATCH >= 420, task.name
        assert len(heldout) == len(task.heldout) == HELDOUT >= 64, task.name


def test_tasks_depend_on_the_seed_only():
    assert demo_tasks(5) == demo_tasks(5)
    assert all(a.train != b.train for a, b in zip(demo_tasks(5), demo_tasks(6), strict=True))
    assert TASKS[0].heldout[:2] == GOLDEN  # the same on every machine and Python


GOLDEN = (("805", "eight hundreds five"), ("347", "three hundreds forty seven"))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_no_shortcut_solves_a_task(seed):
    """Neither a constant nor copying the nearest training answer passes for learning."""
    for task in demo_tasks(seed):
        assert constant_baseline(task) <= 0.2, task.name
        assert nearest_baseline(task) <= 0.2, task.name


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_heldout_needs_no_unseen_piece(task):
    """Every character of a held-out answer occurs in training: the rest is a rule, not knowledge."""
    seen = set("".join(answer for _, answer in task.train))
    assert set("".join(answer for _, answer in task.heldout)) <= seen


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_system_message_is_short_and_gives_no_answer_away(task):
    assert 2 <= len(task.system.split()) <= 5
    pieces = {piece for _, answer in task.train for piece in answer.lower().split()}
    assert not pieces & set(task.system.lower().split())


def test_conversation_gives_the_system_message_and_ends_with_the_answer():
    task = Task("t", "Say it", (("a", "b"),), (("c", "d"),))
    assert task.prompt("a") == [{"role": "system", "content": "Say it"}, {"role": "user", "content": "a"}]
    assert task.conversation(task.train[0]) == [*task.prompt("a"), {"role": "assistant", "content": "b"}]


def test_json_task_answers_are_json():
    task = TASKS[NAMES.index("json")]
    for user, answer in task.train:
        person, city = user.split(", ")
        assert json.loads(answer) == {city: person}


def test_constant_baseline_by_hand():
    task = Task("t", "s", (("a", "x"), ("b", "y"), ("c", "y")), (("d", "y"), ("e", "x"), ("f", "z"), ("g", "y")))
    assert constant_baseline(task) == 0.5


def test_nearest_baseline_by_hand():
    train = (("red apple", "fruit"), ("blue whale", "animal"))
    heldout = (("green apple", "fruit"), ("grey whale", "animal"), ("red whales", "fruit"))
    assert nearest_baseline(Task("t", "s", train, heldout)) == pytest.approx(2 / 3)  # "red whales" is nearer to a whale


def test_tokens_stay_within_the_budget_of_the_demo():
    """With the real tokenizer and template: mean of at most 30 tokens each, under 100,000 for all steps of all tenants."""
    base_files = pytest.importorskip("jaxlora.checkpoints.load")
    gguf, tokenizers = (
        pytest.importorskip("jaxlora.checkpoints.gguf"),
        pytest.importorskip("jaxlora.checkpoints.tokenizer"),
    )
    from train.data.records import chat_example

    tokenizer = tokenizers.Tokenizer.from_gguf(gguf.GgufSource(base_files.smollm2_path()).metadata)
    total = 0
    for task in TASKS:
        lengths = [len(chat_example(tokenizer, task.conversation(pair), max_tokens=64)) for pair in task.train]
        assert sum(lengths) / len(lengths) <= 30, task.name
        total += sum(lengths)
    assert total * STEPS * BATCH / TRAIN < 100_000
