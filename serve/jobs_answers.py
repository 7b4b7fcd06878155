"""What the fine-tuning wire answers, for the served document alone: nothing is checked or built with it, the tests hold us to it."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from pydantic import JsonValue, with_config

from serve.openai_answers import CLOSED
from serve.records import JobStatus

Auto = Literal["auto"]


@with_config(CLOSED)
class Numbers(TypedDict):
    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


@with_config(CLOSED)
class DpoNumbers(Numbers):
    beta: float | Auto


@with_config(CLOSED)
class SupervisedObject(TypedDict):
    hyperparameters: Numbers


@with_config(CLOSED)
class DpoObject(TypedDict):
    hyperparameters: DpoNumbers


@with_config(CLOSED)
class MethodObject(TypedDict):
    type: Literal["supervised", "dpo"]
    supervised: NotRequired[SupervisedObject]
    dpo: NotRequired[DpoObject]


@with_config(CLOSED)
class LoraObject(TypedDict):
    rank: int
    alpha: float
    targets: list[str]
    rslora: bool
    dropout: float
    exceptions: list[tuple[str, int, int, float]]  # (target, layer, rank, alpha)


@with_config(CLOSED)
class ProgressObject(TypedDict):
    step: int
    total_steps: int | None
    tokens: int
    train_loss: float | None
    valid_loss: float | None
    adapter_version: int | None


@with_config(CLOSED)
class JobError(TypedDict):
    code: str
    message: str
    param: str | None


@with_config(CLOSED)
class JobObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    model: str
    organization_id: str
    status: JobStatus
    training_file: str
    validation_file: str | None
    result_files: list[str]
    fine_tuned_model: str | None
    trained_tokens: int | None
    seed: int
    error: JobError | None
    hyperparameters: Numbers
    method: MethodObject
    integrations: list[JsonValue]
    metadata: dict[str, str] | None
    estimated_finish: None
    lora: LoraObject | None
    learning_rate: float | None
    progress: ProgressObject


@with_config(CLOSED)
class EventObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue] | None


@with_config(CLOSED)
class CheckpointMetrics(TypedDict, total=False):
    step: int
    train_loss: float
    train_mean_token_accuracy: float
    valid_loss: float
    valid_mean_token_accuracy: float


@with_config(CLOSED)
class CheckpointObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    adapter_version: int


@with_config(CLOSED)
class JobList(TypedDict):
    object: Literal["list"]
    data: list[JobObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


@with_config(CLOSED)
class EventList(TypedDict):
    object: Literal["list"]
    data: list[EventObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


@with_config(CLOSED)
class CheckpointList(TypedDict):
    object: Literal["list"]
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
