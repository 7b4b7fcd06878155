"""From what a client asks of a fine-tuning job to all that decides it: everything left to the server is decided.  Pure: no HTTP, no jax."""

from __future__ import annotations

import math
from pathlib import Path

from jaxlora.config.training import LOSSES, PASSES, Loss, Optimizer, Recipe, TooLong
from jaxlora.core.errors import InvalidRequest
from jaxlora.core.lora import ALL_TARGETS, Adapter, LoraSpec
from serve.db.job_spec import JobSpec, LoraChoice, Plan
from train.jobs.job import JobRequest

DEFAULT = Recipe()  # of a job that names none; but for the warm-up, which OpenAI's jobs do not have


def chosen[T](value: T | None, default: T) -> T:
    """The value, or the default where the server decides."""
    return default if value is None else value


def too_long(asked: JobSpec) -> TooLong:
    """What becomes of examples that a lane does not hold."""
    return chosen(asked.too_long, DEFAULT.too_long)


def check(asked: JobSpec) -> None:
    """Raises InvalidRequest for fields that contradict each other, before a file is read."""
    method = asked.method
    if method is not None and asked.hyperparameters is not None:
        raise InvalidRequest(
            "hyperparameters stand in method; leave out the ones beside it, which are deprecated",
            param="hyperparameters",
        )
    if method is not None:
        name, other = ("supervised", method.supervised) if method.type == "dpo" else ("dpo", method.dpo)
        if other is not None:
            raise InvalidRequest(f"method.{name} has no meaning with type {method.type}; leave it out", param="method")
    if asked.learning_rate is not None and asked.numbers.learning_rate_multiplier is not None:
        raise InvalidRequest(
            "learning_rate is absolute, learning_rate_multiplier is of the server's own; give one of them",
            param="learning_rate",
        )
    if asked.validation_file is None:
        for name in ("eval_every", "early_stopping", "keep_best"):
            if getattr(asked, name):
                raise InvalidRequest(f"{name} needs a validation_file", param=name)
    targets = () if asked.lora is None else asked.lora.target_modules or ()
    unknown = [t for t in targets if t not in ALL_TARGETS]
    if unknown:
        raise InvalidRequest(
            f"lora.target_modules may hold {', '.join(ALL_TARGETS)}, or be all-linear; got {unknown[0][:40]!r}",
            param="lora.target_modules",
        )


def spec_of(asked: JobSpec, max_rank: int) -> LoraSpec:
    """The adapter that is asked for.  max_rank: of the server, and of a job that asks for none where it is below the usual.

    Raises InvalidRequest or AdapterInvalid for one that cannot be.
    """
    lora = asked.lora or LoraChoice()
    return LoraSpec(
        rank=chosen(lora.r, min(DEFAULT.rank, max_rank)),
        alpha=chosen(lora.alpha, DEFAULT.alpha),
        rslora=chosen(lora.use_rslora, DEFAULT.rslora),
        dropout=chosen(lora.dropout, DEFAULT.dropout),
        targets=tuple(dict.fromkeys(chosen(lora.target_modules, DEFAULT.targets))),
    )


def plan(asked: JobSpec, *, examples: int, base_lr: float, spec: LoraSpec) -> Plan:
    """Everything that decides a job of so many examples.  base_lr: where it names none.

    Raises InvalidRequest for fields that contradict each other.
    """
    check(asked)
    numbers = asked.numbers
    batch = chosen(numbers.batch_size, min(DEFAULT.batch, examples))
    epochs, epoch = chosen(numbers.n_epochs, PASSES), math.ceil(examples / batch)
    total = chosen(asked.max_steps, epochs * epoch)
    multiplier = chosen(numbers.learning_rate_multiplier, 1.0)
    betas = chosen(asked.betas, (DEFAULT.b1, DEFAULT.b2))
    early = asked.early_stopping
    return Plan(
        method=asked.method_name,
        beta=chosen(numbers.beta, float(LOSSES["dpo"]["beta"])) if asked.method_name == "dpo" else None,
        n_epochs=epochs,
        batch_size=batch,
        learning_rate_multiplier=multiplier,
        learning_rate=chosen(asked.learning_rate, base_lr * multiplier),
        lr_schedule=chosen(asked.lr_schedule, DEFAULT.schedule),
        warmup_steps=math.ceil(chosen(asked.warmup_ratio, 0.0) * total),
        weight_decay=chosen(asked.weight_decay, DEFAULT.weight_decay),
        max_grad_norm=chosen(asked.max_grad_norm, DEFAULT.clip),
        beta1=betas[0],
        beta2=betas[1],
        eps=chosen(asked.eps, DEFAULT.eps),
        total_steps=total,
        checkpoint_every=chosen(asked.checkpoint_every, epoch),
        eval_every=None if asked.validation_file is None else chosen(asked.eval_every, epoch),
        spec=spec,
        weight=chosen(asked.priority, 1.0),
        publish=chosen(asked.publish, True),
        patience=None if early is None else early.patience,
        min_delta=0.0 if early is None else chosen(early.min_delta, 0.0),
        keep_best=bool(asked.keep_best),
    )


def job_request(
    plan: Plan,
    *,
    owner: str,
    name: str,
    data: Path,
    heldout: Path | None,
    start: Adapter | None,
    seed: int,
    too_long: TooLong,
) -> JobRequest:
    """The job of these files.  Raises InvalidRequest, ConfigInvalid for values that no base could make right."""
    return JobRequest(
        owner=owner,
        name=name,
        data=data,
        heldout=heldout,
        start=start,
        spec=plan.spec,
        optimizer=Optimizer(
            lr=plan.learning_rate,
            schedule=plan.lr_schedule,
            warmup_steps=plan.warmup_steps,
            total_steps=plan.total_steps,
            weight_decay=plan.weight_decay,
            b1=plan.beta1,
            b2=plan.beta2,
            eps=plan.eps,
            clip=plan.max_grad_norm,
        ),
        batch_size=plan.batch_size,
        loss=Loss() if plan.beta is None else Loss(name="dpo", beta=plan.beta),
        seed=seed,
        weight=plan.weight,
        evaluate_every=plan.eval_every,
        checkpoint_every=plan.checkpoint_every,
        patience=plan.patience,
        min_delta=plan.min_delta,
        keep_best=plan.keep_best,
        too_long=too_long,
    )
