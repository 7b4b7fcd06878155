"""From what a client asks of a fine-tuning job to all that decides it: every "auto" filled in.  Pure: no HTTP, no jax.

request (JSON, as it came) + how many examples there are ─▶ Resolved ─▶ JobRequest
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jaxlora.config.training import LOSSES, PASSES, Loss, Optimizer, Recipe
from jaxlora.core.errors import InvalidRequest
from jaxlora.core.lora import ALL_TARGETS, Adapter, LoraSpec
from train.jobs.job import JobRequest

DEFAULT = Recipe()  # of a job that names none; but for the warm-up, which OpenAI's jobs do not have

type Json = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """All that decides a job, in JSON's types: it is stored, and a job that is resumed is made of it again."""

    method: str  # supervised or dpo
    beta: float | None
    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    beta1: float
    beta2: float
    eps: float
    total_steps: int
    checkpoint_every: int
    eval_every: int | None
    seed: int
    spec: dict[str, object]
    weight: float
    publish: bool
    patience: int | None
    min_delta: float
    keep_best: bool

    def to_json(self) -> dict[str, object]:
        """For the database."""
        return asdict(self)

    @staticmethod
    def from_json(stored: Json) -> Resolved:
        """What `to_json` gave."""
        return Resolved(**{f.name: stored[f.name] for f in fields(Resolved)})  # ty: ignore[invalid-argument-type]

    def job_request(
        self, *, owner: str, name: str, data: Path, heldout: Path | None, start: Adapter | None
    ) -> JobRequest:
        """The job of these files.  Raises InvalidRequest, ConfigInvalid for values that no base could make right."""
        return JobRequest(
            owner=owner,
            name=name,
            data=data,
            heldout=heldout,
            start=start,
            spec=LoraSpec.from_json(self.spec),
            optimizer=Optimizer(
                lr=self.learning_rate,
                schedule=self.lr_schedule,
                warmup_steps=self.warmup_steps,
                total_steps=self.total_steps,
                weight_decay=self.weight_decay,
                b1=self.beta1,
                b2=self.beta2,
                eps=self.eps,
                clip=self.max_grad_norm,
            ),
            batch_size=self.batch_size,
            loss=Loss(name="dpo", beta=self.beta) if self.method == "dpo" else Loss(),
            seed=self.seed,
            weight=self.weight,
            evaluate_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            patience=self.patience,
            min_delta=self.min_delta,
            keep_best=self.keep_best,
        )


def given[T](source: Json, name: str, default: T) -> T:
    """A field, or the default where it is absent, null or "auto"."""
    value = source.get(name)
    return default if value is None or value == "auto" else value  # ty: ignore[invalid-explicit-return]


def part(source: Json, name: str) -> Json:
    """An object in a field, empty where it is absent."""
    value = source.get(name)
    return value if isinstance(value, Mapping) else {}


def method_of(request: Json) -> tuple[str, Json]:
    """The method and its hyperparameters.  Raises InvalidRequest when they are said twice, or of another method."""
    method = part(request, "method")
    kind = given(method, "type", "supervised")
    old = part(request, "hyperparameters")
    if method and old:
        raise InvalidRequest(
            "hyperparameters stand in method; leave out the ones beside it, which are deprecated",
            param="hyperparameters",
        )
    for other in ("supervised", "dpo"):
        if other != kind and method.get(other) is not None:
            raise InvalidRequest(f"method.{other} has no meaning with type {kind}; leave it out", param="method")
    return kind, part(part(method, kind), "hyperparameters") if method else old


def check(request: Json) -> None:
    """Raises InvalidRequest for fields that contradict each other, before a file is read."""
    _, numbers = method_of(request)
    if request.get("learning_rate") is not None and given(numbers, "learning_rate_multiplier", None) is not None:
        raise InvalidRequest(
            "learning_rate is absolute, learning_rate_multiplier is of the server's own; give one of them",
            param="learning_rate",
        )
    if request.get("validation_file") is None:
        for name in ("eval_every", "early_stopping", "keep_best"):
            if request.get(name):
                raise InvalidRequest(f"{name} needs a validation_file", param=name)
    targets = part(request, "lora").get("target_modules")
    unknown = [t for t in targets if t not in ALL_TARGETS] if isinstance(targets, list) else []
    if unknown:
        raise InvalidRequest(
            f"lora.target_modules may hold {', '.join(ALL_TARGETS)}, or be all-linear; got {unknown[0][:40]!r}",
            param="lora.target_modules",
        )


def spec_of(request: Json) -> LoraSpec:
    """The adapter that is asked for.  Raises InvalidRequest or AdapterInvalid for one that cannot be."""
    lora = part(request, "lora")
    targets = given(lora, "target_modules", "all-linear")
    return LoraSpec(
        rank=given(lora, "r", DEFAULT.rank),
        alpha=float(given(lora, "alpha", DEFAULT.alpha)),
        rslora=given(lora, "use_rslora", DEFAULT.rslora),
        dropout=float(given(lora, "dropout", DEFAULT.dropout)),
        targets=DEFAULT.targets if targets == "all-linear" else tuple(dict.fromkeys(targets)),
    )


def resolve(request: Json, *, examples: int, seed: int, base_lr: float, spec: LoraSpec) -> Resolved:
    """Everything that decides a job of so many examples.  seed, base_lr: where the request names none.

    Raises InvalidRequest for fields that contradict each other.
    """
    check(request)
    method, numbers = method_of(request)
    batch = given(numbers, "batch_size", min(DEFAULT.batch, examples))
    epochs, epoch = given(numbers, "n_epochs", PASSES), math.ceil(examples / batch)
    total = given(request, "max_steps", epochs * epoch)
    multiplier = float(given(numbers, "learning_rate_multiplier", 1.0))
    betas = given(request, "betas", [DEFAULT.b1, DEFAULT.b2])
    early = part(request, "early_stopping")
    every = given(request, "eval_every", epoch) if request.get("validation_file") is not None else None
    return Resolved(
        method=method,
        beta=float(given(numbers, "beta", LOSSES["dpo"]["beta"])) if method == "dpo" else None,
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=multiplier,
        learning_rate=float(given(request, "learning_rate", base_lr * multiplier)),
        lr_schedule=given(request, "lr_schedule", DEFAULT.schedule),
        warmup_steps=math.ceil(float(given(request, "warmup_ratio", 0.0)) * total),
        weight_decay=float(given(request, "weight_decay", DEFAULT.weight_decay)),
        max_grad_norm=float(given(request, "max_grad_norm", DEFAULT.clip)),
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        eps=float(given(request, "eps", DEFAULT.eps)),
        total_steps=total,
        checkpoint_every=given(request, "checkpoint_every", epoch),
        eval_every=every,
        seed=given(request, "seed", seed),
        spec=spec.to_json(),
        weight=float(given(request, "priority", 1.0)),
        publish=given(request, "publish", True),
        patience=given(early, "patience", None),
        min_delta=float(given(early, "min_delta", 0.0)),
        keep_best=given(request, "keep_best", False),
    )
