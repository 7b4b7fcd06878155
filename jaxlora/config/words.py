"""One vocabulary: the word that is documented for each setting, what others call it, and what a misspelt one may mean."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches

from jaxlora.core.errors import InvalidRequest

# Documented word → words of other libraries that are accepted in its place.
OTHERS = {
    "alpha": ("lora_alpha",),
    "b1": ("beta1", "adam_beta1"),
    "b2": ("beta2", "adam_beta2"),
    "batch": ("batch_size", "per_device_train_batch_size"),
    "clip": ("max_grad_norm",),
    "dropout": ("lora_dropout",),
    "eps": ("epsilon", "adam_epsilon"),
    "heldout": ("validation", "validation_file", "eval"),
    "lr": ("learning_rate",),
    "max_rank": ("max_lora_rank",),
    "memory_share": ("gpu_memory_utilization",),
    "out": ("output_dir",),
    "rank": ("r", "lora_r", "lora_rank"),
    "rows": ("max_num_seqs",),
    "rslora": ("use_rslora",),
    "save_every": ("save_steps",),
    "schedule": ("lr_schedule", "lr_scheduler_type"),
    "slots": ("max_loras",),
    "steps": ("max_steps",),
    "targets": ("target_modules",),
    "train": ("training", "training_file"),
}
OURS = {other: ours for ours, others in OTHERS.items() for other in others}


def our_word(word: str, known: Collection[str]) -> str:
    """Returns the documented word for a word that is not known itself, if that is; else the word."""
    ours = OURS.get(word, word)
    return ours if word not in known and ours in known else word


def meant(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word that a misspelt one is close to, also by way of others' words for it."""
    words = {w: ours for ours in known for w in (*OTHERS.get(ours, ()), ours)}
    close = get_close_matches(word.lower().replace("-", "_"), words, n=1, cutoff=0.7)
    return words[close[0]] if close else None


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Returns what to say of an unknown word: the one it is close to, else all that are known."""
    close = meant(word, known)
    return f"did you mean {close}?" if close else f"known here: {', '.join(known) or 'none'}"


def in_our_words[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Has a function accept others' words for its keyword arguments, and say of an unknown one which are known.

    It then raises InvalidRequest, also for two words for the same.
    """
    known = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        for word in [word for word in kwargs if word not in known]:
            ours = our_word(word, known)
            if ours not in known:
                raise InvalidRequest(f"no argument is called {word}; {did_you_mean(word, known)}", param=word)
            if ours in kwargs:
                raise InvalidRequest(f"{word} means the same as {ours}, which is given, too; leave one out", param=word)
            kwargs[ours] = kwargs.pop(word)  # ty: ignore[invalid-assignment]  it is a dict
        return function(*args, **kwargs)

    return called
