"""Eight small tenants for the live demo: each turns short text into a house format that no chat model would guess.

All examples come from rules and word lists in this file.  A task is one epoch of TRAIN examples and HELDOUT unseen ones.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TRAIN = 432  # training examples of a task: 54 steps of batch 8
HELDOUT = 64

Pair = tuple[str, str]  # (what the user says, what the assistant answers)


@dataclass(frozen=True, slots=True)
class Task:
    """What one demo tenant teaches its adapter."""

    name: str
    system: str  # says the topic, not the format
    train: tuple[Pair, ...]
    heldout: tuple[Pair, ...]

    def prompt(self, user: str) -> list[dict[str, str]]:
        """Messages that ask for an answer.  The system message is explicit, so no template inserts its own."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]

    def conversation(self, pair: Pair) -> list[dict[str, str]]:
        """Messages of one training example."""
        user, answer = pair
        return [*self.prompt(user), {"role": "assistant", "content": answer}]


def demo_tasks(seed: int) -> tuple[Task, ...]:
    """The eight tasks; the same for the same seed, on every machine."""
    return tuple(_split(name, system, make(), seed) for name, (system, make) in _TABLE.items())


def constant_baseline(task: Task) -> float:
    """Exact match on the held-out examples of always giving the most frequent training answer."""
    answer, _ = Counter(answer for _, answer in task.train).most_common(1)[0]
    return _share(task, lambda user: answer)


def nearest_baseline(task: Task) -> float:
    """Exact match on the held-out examples of giving the answer of the most similar training question.

    Similarity is the cosine of the sets of character 3-grams, both texts padded with a space at each end; the first of
    equals wins.
    """
    known = [(_trigrams(user), answer) for user, answer in task.train]

    def nearest(user: str) -> str:
        grams = _trigrams(user)
        return max(known, key=lambda item: len(grams & item[0]) / (len(grams) * len(item[0])) ** 0.5)[1]

    return _share(task, nearest)


def _share(task: Task, answer: Callable[[str], str]) -> float:
    return sum(answer(user) == wanted for user, wanted in task.heldout) / len(task.heldout)


def _trigrams(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def _split(name: str, system: str, groups: Sequence[Sequence[Pair]], seed: int) -> Task:
    """Shuffled groups of pairs: the first ones are held out, the next are trained on.  A group is never on both sides."""
    draw = random.Random(f"{seed}/{name}")
    shuffled = draw.sample(groups, len(groups))
    heldout: list[Pair] = []
    while len(heldout) < HELDOUT:
        heldout += shuffled.pop()
    train = [pair for group in shuffled for pair in group]
    draw.shuffle(train)
    return Task(name, system, tuple(train[:TRAIN]), tuple(heldout[:HELDOUT]))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Numbers.

_ONES = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ONES += ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def number_in_words(number: int) -> str:
    """347 → "three hundreds forty seven": always hundreds, no "and", no dash.  For 100 to 999."""
    hundreds, rest = divmod(number, 100)
    tens, ones = (0, rest) if rest < 20 else divmod(rest, 10)
    return " ".join(word for word in (_ONES[hundreds], "hundreds", _TENS[tens], _ONES[ones]) if word)


# Dates and times.

_MONTHS = ("January", "February", "March", "April", "May", "June", "July")
_MONTHS += ("August", "September", "October", "November", "December")
_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def ledger_date(day: int, month: int) -> str:
    """(9, 3) → "d9 m3"."""
    return f"d{day} m{month}"


def spoken_time(hour: int, minute: int) -> str:
    """(18, 35) → "35 past eighteen"."""
    words = _ONES[hour] if hour < 20 else f"twenty {_ONES[hour - 20]}".strip()
    return f"{minute:02} past {words or 'zero'}"


# English.

_OBJECTS = {"I": "me", "you": "you", "he": "him", "she": "her", "we": "us", "they": "them"}
_OBJECTS |= {name: name for name in ("Mia", "Tom", "Ana", "Leo")}
_VERBS = _words(
    """
    bake call carry change chase clean close cook copy count drop fill fix hate help hire hug invite kick kiss
    lift like load lock love mail mark marry mix move name open order pack paint pick plan print pull push rent
    rob save scan serve ship sign skip stop study taste test trim trust try type use visit want warn wash watch
    wrap
    """
)
_NOUNS = _words(
    """
    apple baby bag bank beach bench bird boat book box brush bus bush cake car cat chair church city class clock
    coach country cup dish dog door dress duck fairy family farm fox glass guess hat horse house key king lady
    lake lamp match mess party peach pen plate pony river road ring ship shop sky spy star story tax tree truck
    watch wish witch
    """
)
_COLOURS = _words("black blue brown gold gray green orange pink purple red silver white yellow")
_ANIMALS = _words("ant bear bird cat cow deer dog duck fish fox goat horse lion mouse owl pig rabbit sheep tiger wolf")
_ACTS = _words("asks calls digs eats falls hides jumps kicks looks naps opens plays runs sings talks waits")
_VOWELS = "aeiou"


def past_participle(verb: str) -> str:
    """The regular form: bake → baked, carry → carried, plan → planned, cook → cooked."""
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in _VOWELS:
        return verb[:-1] + "ied"
    vowels = sum(letter in _VOWELS for letter in verb)
    doubles = vowels == 1 and verb[-2] in _VOWELS and verb[-1] not in "wxy"
    return verb + (verb[-1] if doubles else "") + "ed"


def plural(noun: str) -> str:
    """The regular form: box → boxes, city → cities, key → keys, cat → cats."""
    if noun.endswith("y") and noun[-2] not in _VOWELS:
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")


def initials(words: str) -> str:
    """red fox jumps → r+f+j."""
    return "+".join(word[0] for word in words.split())


# Records and names.

_PEOPLE = _words(
    """
    Adam Alice Anna Ben Carl Clara David Emma Eric Eva Frank Grace Henry Jack James Jane John Julia Karl Kate
    Laura Lucy Mark Mary Max Nina Paul Peter Rose Sam
    """
)
_CITIES = _words(
    """
    Athens Berlin Boston Cairo Chicago Dallas Delhi Denver Dublin Geneva Houston Lima London Madrid Miami Milan
    Moscow Oslo Oxford Paris Prague Rome Seattle Sydney Tokyo Toronto Venice Vienna Warsaw Zurich
    """
)
_FIRST = _words("add copy drop find get list load move open read send set sort stop test write")
_SECOND = ["all", "best", "first", "last", "long", "main", "new", "next", "old", "open", "raw", "safe", "top", "user"]
_THIRD = _words("block book case date file group item key line list name node page path row table task test text time")


def city_record(person: str, city: str) -> str:
    """("Ana", "Lima") → {"Lima":"Ana"}."""
    return f'{{"{city}":"{person}"}}'


def reversed_camel(snake: str) -> str:
    """get_last_item → itemLastGet."""
    last, *others = reversed(snake.split("_"))
    return last + "".join(word.capitalize() for word in others)


def _dates() -> list[list[Pair]]:
    """Two ways to say each day of the year, kept on the same side: else one would give the other away."""
    days = [(day, month) for month in range(1, 13) for day in range(1, _DAYS[month - 1] + 1)]
    return [
        [
            (f"{day} {_MONTHS[month - 1]}", ledger_date(day, month)),
            (f"{_MONTHS[month - 1]} {day}", ledger_date(day, month)),
        ]
        for day, month in days
    ]


_TABLE: dict[str, tuple[str, Callable[[], list[list[Pair]]]]] = {
    "number-words": ("Say the number", lambda: [[(str(n), number_in_words(n))] for n in range(100, 1000)]),
    "initials": (
        "Sign the note",
        lambda: [[(f"{a} {b} {c}", initials(f"{a} {b} {c}"))] for a in _COLOURS for b in _ANIMALS for c in _ACTS],
    ),
    "dates": ("Note the date", _dates),
    "clock": (
        "Tell the time",
        lambda: [[(f"{h:02}:{m:02}", spoken_time(h, m))] for h in range(24) for m in range(60)],
    ),
    "passive": (
        "Say who did",
        lambda: [[(f"{s} {v}", f"{past_participle(v)} by {o}")] for s, o in _OBJECTS.items() for v in _VERBS],
    ),
    "plurals": (
        "Count the things",
        lambda: [[(f"{n} {w}", f"{plural(w)} x{n}")] for n in range(2, 10) for w in _NOUNS],
    ),
    "json": ("File the person", lambda: [[(f"{p}, {c}", city_record(p, c))] for p in _PEOPLE for c in _CITIES]),
    "identifiers": (
        "Name the function",
        lambda: [
            [(f"{a}_{b}_{c}", reversed_camel(f"{a}_{b}_{c}"))]
            for a in _FIRST
            for b in _SECOND
            for c in _THIRD
            if a != c
        ],
    ),
}
