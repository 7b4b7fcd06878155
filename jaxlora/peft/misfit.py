"""Says in one sentence which base an adapter was made for, by the name in its file and the sizes of its tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import PurePath

from jaxlora.checkpoints.safetensors import StoredTensor
from jaxlora.core.lora import ALL_TARGETS
from jaxlora.core.model_config import ModelConfig, target_features
from jaxlora.peft.reasons import shown

SIZES = {  # target → what its features in and out are called, the most telling size of a base first
    "q_proj": ("hidden", "query width"),
    "k_proj": ("hidden", "key width"),
    "v_proj": ("hidden", "key width"),
    "o_proj": ("query width", "hidden"),
    "gate_proj": ("hidden", "MLP"),
    "up_proj": ("hidden", "MLP"),
    "down_proj": ("MLP", "hidden"),
    "lm_head": ("hidden", "vocabulary"),
}
assert SIZES.keys() == set(ALL_TARGETS)
ORDER = ("hidden", "MLP", "query width", "key width", "vocabulary", "layers")
LAYER = re.compile(r"layers\.(\d{1,6})\.")
CACHED = re.compile(r"models--[^/]+--(?P<name>[^/]+)/snapshots/")


def another_base(
    pairs: Mapping[str, Mapping[str, StoredTensor]],
    made_for: object,
    reasons: list[str],
    config: ModelConfig,
    name: str,
) -> str:
    """Returns the sentence that stands for `reasons`, which mean another base.

    pairs: path → "A" or "B" → tensor.  made_for: what the file calls its base.  name: what the base here is called.
    """
    theirs, ours = made_for_name(made_for), name or f"a {config.family}"
    if (differs := _first_difference(pairs, config)) is not None:
        what, got, here = differs
        return (
            f"it was made for {theirs or 'another base'} ({what} {got}), the base here is {ours} ({what} {here}); "
            "serve it over its own base"
        )
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return reasons[0] + more + (f"; its file names {theirs} as its base, the base here is {ours}" if theirs else "")


def made_for_name(made_for: object) -> str:
    """Returns the short name of a base out of a hub id, a folder, or a folder of the hub's cache; "" where there is none."""
    if not isinstance(made_for, str):
        return ""
    path = made_for.replace("\\", "/")
    cached = CACHED.search(path)
    return shown(cached["name"] if cached else PurePath(path).name)


def _first_difference(
    pairs: Mapping[str, Mapping[str, StoredTensor]], config: ModelConfig
) -> tuple[str, int, int] | None:
    """Returns (size, what most tensors have, what the base here has) of the first of ORDER that differs."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    here = {"layers": config.layers}
    layers = 0
    for path, pair in pairs.items():
        target = path.rpartition(".")[2]
        if target not in SIZES:
            continue
        if number := LAYER.search(path):
            layers = max(layers, int(number[1]) + 1)
        for what, features, half, axis in zip(
            SIZES[target], target_features(config, target), "AB", (1, 0), strict=True
        ):
            here[what] = features
            if half in pair and len(pair[half].shape) == 2:
                found[what][pair[half].shape[axis]] += 1
    if layers > config.layers:  # fewer is no sign: an adapter may leave some out
        found["layers"][layers] += 1
    for what in ORDER:
        if found[what] and (most := found[what].most_common(1)[0][0]) != here[what]:
            return what, most, here[what]
    return None
