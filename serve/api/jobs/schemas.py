"""What the fine-tuning wire answers, for the served document alone: nothing is checked or built with it, the tests hold us to it.

The request bodies of the fine-tuning wire: OpenAI's fields, and ours beside them.  Each is honoured or refused."""

from __future__ import annotations

import re
from typing import Annotated, Literal, NotRequired

from pydantic import BeforeValidator, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from jaxlora.config.training import TooLong
from serve.api.document import Closed
from serve.http.pagination import Listed, PageQuery
from serve.http.schema import Only, Strict, Text, Unbuilt, few_fields
from train.jobs.status import JobStatus

Auto = Literal["auto"]


class Numbers(Closed):
    n_epochs: int | Auto
    batch_size: int | Auto
    learning_rate_multiplier: float | Auto


class DpoNumbers(Numbers):
    beta: float | Auto


class SupervisedObject(Closed):
    hyperparameters: Numbers


class DpoObject(Closed):
    hyperparameters: DpoNumbers


class MethodObject(Closed):
    type: Literal["supervised", "dpo"]
    supervised: NotRequired[SupervisedObject]
    dpo: NotRequired[DpoObject]


class LoraObject(Closed):
    rank: int
    alpha: float
    targets: list[str]
    rslora: bool
    dropout: float
    exceptions: list[tuple[str, int, int, float]]  # (target, layer, rank, alpha)


class SizeObject(Closed):
    trainable_parameters: int
    all_parameters: int  # of the base and the adapter
    trainable_percent: float
    bytes: int  # of a version, in host memory and on disk
    slot_bytes: int  # that it takes on the device while it is served


class ProgressObject(Closed):
    step: int
    total_steps: int | None
    tokens: int
    train_loss: float | None
    valid_loss: float | None
    adapter_version: int | None


class JobError(Closed):
    code: str
    message: str
    param: str | None


class JobObject(Closed):
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
    adapter: str
    trained_tokens: int | None
    seed: int
    error: JobError | None
    hyperparameters: Numbers
    method: MethodObject
    integrations: list[JsonValue]
    metadata: dict[str, str] | None
    estimated_finish: None
    lora: LoraObject | None
    size: SizeObject | None
    learning_rate: float | None
    progress: ProgressObject


class EventObject(Closed):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue] | None


class CheckpointMetrics(Closed, total=False):
    step: int
    train_loss: float
    train_mean_token_accuracy: float
    valid_loss: float
    valid_mean_token_accuracy: float


class CheckpointObject(Closed):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics
    adapter: str
    adapter_version: int


JobList = Listed[JobObject]
EventList = Listed[EventObject]
CheckpointList = Listed[CheckpointObject]


Metric = Literal["exact_match", "contains", "regex", "json_equal", "choice_accuracy"]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]
MetaKey = Annotated[Text, Field(min_length=1, max_length=64)]
METADATA = re.compile(r"metadata\[.{1,64}\]")
MetaValue = Annotated[Text, Field(max_length=512)]


class Hyperparameters(Strict):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] | None = None


class DpoHyperparameters(Hyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, le=100)] | None = None


class Supervised(Strict):
    hyperparameters: Hyperparameters | None = None


class Dpo(Strict):
    hyperparameters: DpoHyperparameters | None = None


class Method(Strict):
    type: Annotated[str, Only(("supervised", "dpo"), "choose one of them")]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Unbuilt = None


class LoraBody(Strict):
    r: Annotated[int | None, Field(ge=1, le=1024)] = None
    alpha: Annotated[float | None, Field(gt=0, le=1e6)] = None
    use_rslora: bool | None = None
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1, max_length=16)] | None = None
    dropout: Annotated[float | None, Field(ge=0, lt=1)] = None
    init: Annotated[str | None, Only(("default",))] = None


class EarlyStopping(Strict):
    metric: Annotated[str | None, Only(("valid_loss",))] = None
    patience: Annotated[int, Field(ge=1, le=1000)]
    min_delta: Annotated[float | None, Field(ge=0, le=1000)] = None


class Scoring(Strict):
    """Each version is scored by what it generates for the prompts of a file."""

    file: Text
    metrics: Annotated[list[Metric], Field(min_length=1, max_length=5)]
    max_tokens: Annotated[int | None, Field(ge=1, le=4096)] = None
    samples: Annotated[int | None, Field(ge=1, le=1000)] = None  # the first so many examples


class JobBody(Strict):
    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[Text | None, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = None
    seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None
    metadata: Annotated[dict[MetaKey, MetaValue] | None, Field(max_length=16), BeforeValidator(few_fields)] = None
    integrations: Annotated[JsonValue, Only(([],))] = None

    lora: LoraBody | None = None
    learning_rate: Annotated[float | None, Field(gt=0, le=10)] = None
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    warmup_ratio: Annotated[float | None, Field(ge=0, le=1)] = None
    weight_decay: Annotated[float | None, Field(ge=0, le=10)] = None
    max_grad_norm: Annotated[float | None, Field(gt=0, le=1e6)] = None
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]] | None, Field(min_length=2, max_length=2)] = None
    eps: Annotated[float | None, Field(gt=0, le=1)] = None
    max_steps: Steps | None = None
    checkpoint_every: Steps | None = None
    eval_every: Steps | None = None
    publish: bool | None = None
    early_stopping: EarlyStopping | None = None
    keep_best: bool | None = None  # deliver the weights of the best held-out loss
    priority: Annotated[float | None, Field(gt=0, le=100)] = None
    evaluation: Scoring | None = None
    # What becomes of examples that a lane does not hold: the job fails, they are left out, or cut.
    too_long: TooLong | None = None


class LimitedQuery(PageQuery):
    """Query of the lists."""

    limit: Annotated[int | None, Field(ge=1, le=100)] = None


class JobsQuery(LimitedQuery):
    """`metadata[KEY]=VALUE` besides: only jobs with that."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _only_metadata(self) -> JobsQuery:
        other = [k for k in self.model_extra or {} if not METADATA.fullmatch(k)]
        if other:
            raise PydanticCustomError("query", "has no parameter {name}", {"name": other[0][:64]})
        return self

    @property
    def metadata(self) -> dict[str, str]:
        """What is asked of the metadata."""
        return {k[len("metadata[") : -1]: str(v) for k, v in (self.model_extra or {}).items()}


class EventsQuery(LimitedQuery):
    stream: bool | None = None
