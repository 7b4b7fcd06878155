"""Parses a PEFT adapter_config.json: every field is supported, known to have no effect, or a reason to refuse.

`targets.py` determines which modules of a given base the config selects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

from jaxlora.peft.reasons import Reasons, shown

MAX_ALPHA = 1e6
MAX_RANK = 2**20  # beyond any base's features; a server's own limit is lower

HONOURED = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "init_lora_weights",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "base_model_name_or_path",
)
BOOKKEEPING = (
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "runtime_config",
)  # in every folder; has no meaning here
WITHOUT_EFFECT = (
    "revision",
    "eva_config",
    "loftq_config",
    "qalora_group_size",
)
REFUSED_WHEN_SET = (
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "corda_config",
    "lora_ga_config",
    "ensure_weight_tying",
)
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # these leave the base unchanged
SHIFTING_INITS = re.compile(r"(pissa(_niter_\d+)?|olora|corda|loftq|lora_ga)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftConfig:
    """The fields that determine what an adapter computes."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    targets: str | tuple[str, ...] | None  # regex, names or full paths; None: not in the file
    exclude: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_name: str | None
    ignored: tuple[str, ...]  # fields that are set and have no effect on a loaded adapter


def read_config(raw: Mapping[str, object], reasons: Reasons) -> PeftConfig | None:
    """Returns the config, or None where it is not LoRA or a field of the wrong type leaves the modules unknown.

    Adds to `reasons` every unsupported feature and every impossible value.
    """
    if raw.get("peft_type") != "LORA":
        reasons.unsupported(f"peft_type {shown(raw.get('peft_type'))} is not supported; only LORA")
        return None
    _refuse_features(raw, reasons)
    wrong = Reasons()
    rank = _rank(raw.get("r", 8), "r", wrong)
    alpha = _alpha(raw.get("lora_alpha", 8), "lora_alpha", wrong)
    if alpha == 0:
        wrong.add("lora_alpha must not be 0: the adapter would do nothing")
    dropout = raw.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        wrong.add(f"lora_dropout must be a number in [0, 1), got {shown(dropout)}")
        dropout = 0.0
    targets = _names(raw.get("target_modules"), "target_modules", wrong)
    exclude = _names(raw.get("exclude_modules"), "exclude_modules", wrong) or ()
    layers = _layers(raw.get("layers_to_transform"), wrong)
    layers_pattern = _names(raw.get("layers_pattern"), "layers_pattern", wrong) or ()
    layers_pattern = (layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern
    if isinstance(targets, str) and (layers is not None or layers_pattern):
        wrong.add("layers_to_transform and layers_pattern cannot be combined with a target_modules string")
    if layers_pattern and layers is None:
        wrong.add("layers_pattern needs layers_to_transform")
    base_name = raw.get("base_model_name_or_path")
    found = PeftConfig(
        rank=rank,
        alpha=alpha,
        rslora=bool(_flag(raw, "use_rslora", wrong)),
        dropout=float(dropout),
        targets=targets,
        exclude=exclude,
        layers=layers,
        layers_pattern=layers_pattern,
        rank_pattern=_pattern(raw.get("rank_pattern"), "rank_pattern", _rank, wrong),
        alpha_pattern=_pattern(raw.get("alpha_pattern"), "alpha_pattern", _alpha, wrong),
        base_name=base_name if isinstance(base_name, str) else None,
        ignored=_ignored(raw, reasons),
    )
    reasons.extend(wrong)
    return None if wrong else found


def _refuse_features(raw: Mapping[str, object], reasons: Reasons) -> None:
    """Adds a reason for each feature that changes more than A and B of linear layers."""
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        reasons.unsupported(f"task_type {shown(raw.get('task_type'))} is not supported; only CAUSAL_LM")
    if raw.get("use_dora"):
        reasons.unsupported(DORA)
    if raw.get("lora_bias"):
        reasons.unsupported(LORA_BIAS)
    if raw.get("bias") not in (None, "none"):
        reasons.unsupported(f"trained biases are not supported (bias={shown(raw['bias'])})")
    if raw.get("modules_to_save"):
        reasons.unsupported(replaces_base(raw["modules_to_save"]))
    if raw.get("trainable_token_indices"):
        reasons.unsupported(TRAINABLE_TOKENS)
    if raw.get("target_parameters"):
        reasons.unsupported(TARGET_PARAMETERS)
    if raw.get("fan_in_fan_out"):
        reasons.unsupported("fan_in_fan_out is not supported for this base")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and SHIFTING_INITS.fullmatch(init):
        reasons.unsupported(
            f"init_lora_weights={init} changes the base weights; re-save the adapter with "
            "path_initial_model_for_weight_conversion"
        )
    elif not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in PLAIN_INITS)):
        reasons.unsupported(f"init_lora_weights={shown(init)} is not known; it may change the base weights")
    for name in REFUSED_WHEN_SET:
        if raw.get(name):
            reasons.unsupported(f"{name} is not supported")


DORA = "DoRA adapters are not supported (use_dora)"
LORA_BIAS = "LoRA bias is not supported (lora_bias)"
EMBEDDING_LORA = "LoRA on embed_tokens is not supported"
HEAD_LORA = "LoRA on lm_head is not supported by this server"
TRAINABLE_TOKENS = "trainable_token_indices is not supported"
TARGET_PARAMETERS = "target_parameters is not supported"


def replaces_base(names: object) -> str:
    """Returns the message for full weight tensors."""
    names = sorted(str(n) for n in names) if isinstance(names, list | tuple | set) else names
    return f"modules_to_save {shown(names)} is not supported: it replaces base weights"


def not_linear(path: str) -> str:
    """Returns the message for a module that this base lacks or that has no matrix."""
    return f"{path[:200]} is not a linear layer of this base"


def _ignored(raw: Mapping[str, object], reasons: Reasons) -> tuple[str, ...]:
    ignored = []
    for name, value in raw.items():
        if name in (*HONOURED, *REFUSED_WHEN_SET, *BOOKKEEPING) or not value:
            continue
        if name in WITHOUT_EFFECT or name.startswith("megatron_"):
            ignored.append(name)
        else:
            reasons.add(f"{shown(name)} is not a known field of a LoRA config, and it is set")
    return tuple(sorted(ignored))


def _is_number(value: object) -> TypeGuard[int | float]:
    if isinstance(value, int) and not isinstance(value, bool):
        return True  # a huge one does not fit a float, but it can be compared
    return isinstance(value, float) and math.isfinite(value)


def _rank(value: object, what: str, reasons: Reasons) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK:
        return value
    reasons.add(f"{what} must be an integer in [1, {MAX_RANK}], got {shown(value)}")
    return 1


def _alpha(value: object, what: str, reasons: Reasons) -> float:
    if _is_number(value) and abs(value) <= MAX_ALPHA:
        return float(value)
    reasons.add(f"{what} must be a number of at most {MAX_ALPHA:g}, got {shown(value)}")
    return 1.0


def _flag(raw: Mapping[str, object], name: str, reasons: Reasons) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        reasons.add(f"{name} must be true or false, got {shown(value)}")
    return bool(value)


def _names(value: object, what: str, reasons: Reasons) -> str | tuple[str, ...] | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, list) and all(isinstance(v, str) and v for v in value):
        if what == "target_modules" and not value:
            reasons.add("target_modules is empty: name at least one module")
        return tuple(dict.fromkeys(value))
    reasons.add(f"{what} must be a string or a list of strings, got {shown(value)}")
    return None


def _layers(value: object, reasons: Reasons) -> tuple[int, ...] | None:
    values = value if isinstance(value, list) else [] if value is None else [value]
    numbers = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    if len(numbers) == len(values):
        return tuple(numbers) or None
    reasons.add(f"layers_to_transform must be a layer number or a list of them, got {shown(value)}")
    return None


def _pattern[T](value: object, what: str, check: Callable[[object, str, Reasons], T], reasons: Reasons) -> dict[str, T]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        reasons.add(f"{what} must be an object, got {shown(value)}")
        return {}
    return {key: check(entry, f"{what} of {shown(key)}", reasons) for key, entry in value.items()}
