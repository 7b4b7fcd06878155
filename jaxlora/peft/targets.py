"""Selects the linear layers of a base that a PEFT config adapts, with rank and alpha, by PEFT's own matching rules.

    target_modules list     the path is the entry, or ends with "." + entry
    target_modules string   a regular expression for the whole path; "all-linear" is every linear but lm_head
    exclude_modules         the same two forms; wins
    layers_to_transform     keeps paths by their first number; a target that is a whole path is not filtered
    rank_pattern …          first key with re.match("(.*\\.)?(KEY)$", path) decides

Patterns come from users: their length, their number and the total matching time are limited.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import regex

from jaxlora.core.errors import BaseMismatch
from jaxlora.core.lora import ALL_TARGETS, ATTENTION_TARGETS, HEAD_TARGET, LAYER_TARGETS, LoraSpec, ModuleException
from jaxlora.core.model_config import ModelConfig, target_features
from jaxlora.peft.config import EMBEDDING_LORA, PeftConfig, not_linear
from jaxlora.peft.reasons import Reasons, shown

MAX_PATTERN_CHARS = 4096
MAX_PATTERN_KEYS = 512  # or the number of modules, where that is more: exporters write one key per module
MATCH_SECONDS = 1.0
EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class Module:
    """One adaptable linear of a base: its path in the Transformers model, our name for it, its features."""

    path: str
    target: str
    layer: int
    features_in: int
    features_out: int


def linear_modules(config: ModelConfig) -> dict[str, Module]:
    """Returns path → Module of every adaptable linear, layer by layer, then lm_head."""
    table = {}
    for layer in range(config.layers):
        for target in LAYER_TARGETS:
            block = "self_attn" if target in ATTENTION_TARGETS else "mlp"
            path = f"model.layers.{layer}.{block}.{target}"
            table[path] = Module(path, target, layer, *target_features(config, target))
    table[HEAD_TARGET] = Module(HEAD_TARGET, HEAD_TARGET, 0, *target_features(config, HEAD_TARGET))
    return table


def other_modules(config: ModelConfig) -> list[str]:
    """Returns the paths of modules that are not adaptable linears: matching one is an error, as in PEFT."""
    parts = ["", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm"]
    if config.qk_norm:
        parts += [".self_attn.q_norm", ".self_attn.k_norm"]
    blocks = [f"model.layers.{layer}{part}" for layer in range(config.layers) for part in parts]
    return ["model", "model.layers", "model.norm", "model.rotary_emb", *blocks]


class Clock:
    """Time limit shared by all patterns of one file."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds left.  Raises TimeoutError when none are left."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def make_spec(peft: PeftConfig, modules: dict[str, tuple[int, float]], config: ModelConfig) -> LoraSpec:
    """Returns the adapted modules' spec: the file's own rank and alpha where a module uses them, else the commonest."""
    table = linear_modules(config)
    by_place = {(table[p].target, table[p].layer): value for p, value in modules.items()}
    targets = tuple(t for t in ALL_TARGETS if any(target == t for target, _ in by_place))
    base = (peft.rank, peft.alpha)
    if base not in by_place.values():
        counts = Counter(value for value in by_place.values() if value[1] != 0)
        base = counts.most_common(1)[0][0] if counts else (max(r for r, _ in by_place.values()), peft.alpha)
    exceptions = []
    for module in table.values():
        if module.target in targets:
            rank, alpha = by_place.get((module.target, module.layer), (0, base[1]))
            if (rank, alpha) != base:
                exceptions.append(
                    ModuleException(target=module.target, layer=module.layer, rank=rank, alpha=float(alpha))
                )
    return LoraSpec(
        rank=base[0],
        alpha=base[1],
        targets=targets,
        rslora=peft.rslora,
        dropout=peft.dropout,
        exceptions=tuple(exceptions),
    )


def choose_modules(
    peft: PeftConfig, config: ModelConfig, present: Iterable[str], reasons: Reasons
) -> dict[str, tuple[int, float]] | None:
    """Returns path → (rank, alpha) of each module that must have tensors, or None where it cannot be determined.

    present: the paths that have tensors, which are selected when the file has no target_modules.
    """
    modules, clock = linear_modules(config), Clock(MATCH_SECONDS)
    try:
        return _choose(peft, config, modules, set(present), clock, reasons)
    except TimeoutError:
        reasons.add(f"the patterns of this file take longer than {MATCH_SECONDS:g} s to match: write simpler ones")
        return None


def _choose(
    peft: PeftConfig, config: ModelConfig, modules: dict[str, Module], present: set[str], clock: Clock, reasons: Reasons
) -> dict[str, tuple[int, float]] | None:
    wrong = Reasons()
    others = other_modules(config)
    if peft.layers:
        for layer in dict.fromkeys(peft.layers):
            if not 0 <= layer < config.layers:
                message = not_linear(f"model.layers.{layer} (layers_to_transform)")
                wrong.add(message, error=BaseMismatch)
    if peft.targets is None:
        chosen = [path for path in modules if path in present]
    else:
        matched = _targeted(peft, [*modules, EMBEDDING, *others], clock, wrong)
        excluded = _excluded(peft, matched, clock, wrong)
        chosen = []
        for path in matched:
            if path in excluded:
                continue
            if path == EMBEDDING:
                wrong.unsupported(EMBEDDING_LORA)
            elif path not in modules:
                wrong.add(not_linear(path), error=BaseMismatch)
            else:
                chosen.append(path)
        if not chosen and not wrong:
            wrong.add(f"target_modules {shown(peft.targets)} matches no linear layer of this base", error=BaseMismatch)
    ranks = _by_pattern(peft.rank_pattern, "rank_pattern", modules, clock, wrong)
    alphas = _by_pattern(peft.alpha_pattern, "alpha_pattern", modules, clock, wrong)
    reasons.extend(wrong)
    return None if wrong else {p: (ranks.get(p, peft.rank), alphas.get(p, peft.alpha)) for p in chosen}


def _targeted(peft: PeftConfig, paths: list[str], clock: Clock, reasons: Reasons) -> list[str]:
    if isinstance(peft.targets, str):
        if peft.targets.lower() == "all-linear":
            return [p for p in paths if p != HEAD_TARGET and p.rpartition(".")[2] in LAYER_TARGETS]
        pattern = _compile(peft.targets, peft.targets, "target_modules", reasons)
        return [p for p in paths if pattern and pattern.fullmatch(p, timeout=clock.left())]
    assert peft.targets is not None  # None selects all present modules, before this function
    whole, matched = set(peft.targets), _by_entry(peft.targets, paths)
    endings = {ending for path in paths for ending in _endings(path)}
    for entry in peft.targets:
        if entry not in endings:
            reasons.add(not_linear(entry), error=BaseMismatch)
    if peft.layers is None:
        return matched
    keep = []
    for pattern in peft.layers_pattern or (r"[^.]*",):
        # Without a layers_pattern PEFT requires a segment before the number's own; with one it may be missing.
        prefix = r"(?:^|.*?\.)" if peft.layers_pattern else r".*?\."
        compiled = _compile(pattern, rf"{prefix}{pattern}\.(?P<idx>\d+)\.", "layers_pattern", reasons)
        if compiled:
            keep.append(compiled)
    return [p for p in matched if p in whole or _first_number(p, keep, clock) in peft.layers]


def _first_number(path: str, patterns: list[regex.Pattern], clock: Clock) -> int | None:  # ty: ignore[invalid-type-form]
    for pattern in patterns:
        if match := pattern.match(path, timeout=clock.left()):
            return int(match["idx"])
    return None


def _excluded(peft: PeftConfig, paths: list[str], clock: Clock, reasons: Reasons) -> set[str]:
    if isinstance(peft.exclude, str):
        pattern = _compile(peft.exclude, peft.exclude, "exclude_modules", reasons)
        return {p for p in paths if pattern and pattern.fullmatch(p, timeout=clock.left())}
    return set(_by_entry(peft.exclude, paths))


def _by_entry(entries: tuple[str, ...], paths: list[str]) -> list[str]:
    """Returns the paths that are an entry or end with "." + entry."""
    wanted = set(entries)
    return [path for path in paths if not wanted.isdisjoint(_endings(path))]


def _endings(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _by_pattern[T](
    table: Mapping[str, T], what: str, modules: dict[str, Module], clock: Clock, reasons: Reasons
) -> dict[str, T]:
    """Returns path → value of the first key that matches it."""
    limit = max(MAX_PATTERN_KEYS, len(modules))
    if len(table) > limit:
        reasons.add(f"{what} has {len(table)} keys; at most {limit} are read")
        return {}
    found: dict[str, T] = {}
    for key, value in table.items():
        pattern = _compile(key, rf"(.*\.)?({key})$", f"{what} key", reasons)
        if pattern is None:
            continue
        matched = [p for p in modules if pattern.match(p, timeout=clock.left())]
        if not matched:
            reasons.add(f"{what} key {shown(key)} matches no module")
        for path in matched:
            found.setdefault(path, value)
    return found


def _compile(source: str, whole: str, what: str, reasons: Reasons) -> regex.Pattern | None:  # ty: ignore[invalid-type-form]
    """Compiles a pattern; None adds a reason.  `re` decides validity, as in PEFT; `regex` matches: it can time out."""
    if len(source) > MAX_PATTERN_CHARS:
        reasons.add(f"{what} {shown(source)} is longer than {MAX_PATTERN_CHARS} characters")
        return None
    try:
        re.compile(whole)
        return regex.compile(whole)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError) as e:
        reasons.add(f"{what} {shown(source)} is not a valid pattern: {str(e)[:100]}")
        return None
