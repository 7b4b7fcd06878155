"""What a client asks of a fine-tuning job, and what the server has decided: as values, and as the JSON that is stored.  Pure.

    body ─▶ JobSpec ─with the number of its examples─▶ Plan ─▶ JobRequest of the trainer

The JSON of a JobSpec is that of the API, with or without its nulls and "auto"s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Literal

from pydantic import BeforeValidator, TypeAdapter

from jaxlora.config.training import TooLong
from jaxlora.core.lora import AdapterRef, LoraSpec

type MethodName = Literal["supervised", "dpo"]
type Json = Mapping[str, object]
Auto = BeforeValidator(lambda value: None if value in ("auto", "all-linear") else value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """Numbers of a method.  None, here and below: the server decides."""

    n_epochs: Annotated[int | None, Auto] = None
    batch_size: Annotated[int | None, Auto] = None
    learning_rate_multiplier: Annotated[float | None, Auto] = None
    beta: Annotated[float | None, Auto] = None  # of dpo


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodPart:
    """What belongs to one method."""

    hyperparameters: Hyperparameters | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """How a job trains."""

    type: MethodName
    supervised: MethodPart | None = None
    dpo: MethodPart | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraChoice:
    """The adapter that a job makes."""

    r: int | None = None
    alpha: float | None = None
    use_rslora: bool | None = None
    target_modules: Annotated[tuple[str, ...] | None, Auto] = None
    dropout: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStopping:
    """When a job ends before its last step."""

    patience: int  # held-out losses in a row without a better one
    min_delta: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """How each version of a job is scored by what it generates."""

    file: str
    metrics: tuple[str, ...]
    max_tokens: int | None = None
    samples: int | None = None  # the first so many examples


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSpec:
    """What a client asks of a job."""

    model: str
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None  # of supervised, where OpenAI's clients once gave them
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    lora: LoraChoice | None = None
    learning_rate: float | None = None
    lr_schedule: str | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    max_steps: int | None = None
    checkpoint_every: int | None = None
    eval_every: int | None = None
    publish: bool | None = None
    early_stopping: EarlyStopping | None = None
    keep_best: bool | None = None
    priority: float | None = None
    evaluation: Evaluation | None = None
    too_long: TooLong | None = None  # what becomes of examples that a lane does not hold

    @property
    def method_name(self) -> MethodName:
        """The method that is asked for."""
        return "supervised" if self.method is None else self.method.type

    @property
    def numbers(self) -> Hyperparameters:
        """The hyperparameters of that method."""
        if self.method is None:
            return self.hyperparameters or Hyperparameters()
        part = self.method.dpo if self.method.type == "dpo" else self.method.supervised
        return (None if part is None else part.hyperparameters) or Hyperparameters()

    @property
    def files(self) -> dict[str, str]:
        """Ids of the files that the job reads, by the field that names them."""
        scored = None if self.evaluation is None else self.evaluation.file
        given = {
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "evaluation.file": scored,
        }
        return {field: id for field, id in given.items() if id is not None}

    def to_json(self) -> dict:
        """For the database: what `from_json` makes an equal one of."""
        return SPEC.dump_python(self, mode="json", exclude_none=True)

    @staticmethod
    def from_json(data: Json) -> JobSpec:
        """What a body, once checked, or a database says; of fields that ask for nothing, nothing is kept."""
        return SPEC.validate_python(data)


SPEC = TypeAdapter(JobSpec)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that decides a job, beside its seed and its start: a job that is resumed is made of it again."""

    method: MethodName
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
    spec: LoraSpec
    weight: float
    publish: bool
    patience: int | None
    min_delta: float
    keep_best: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """What the server has decided about a job so far."""

    seed: int
    start: AdapterRef | None = None  # the adapter that it goes on from
    plan: Plan | None = None  # None until its files are read

    def to_json(self) -> dict:
        """For the database: what `from_json` makes an equal one of."""
        start = {} if self.start is None else {"start": [self.start.tenant, self.start.name, self.start.version]}
        plan = {} if self.plan is None else asdict(self.plan) | {"spec": self.plan.spec.to_json()}
        return {"seed": self.seed} | start | plan

    @staticmethod
    def from_json(data: Mapping) -> Resolved:
        """What `to_json` gave."""
        plan = None
        if "total_steps" in data:
            others = {f.name: data[f.name] for f in fields(Plan) if f.name != "spec"}
            plan = Plan(spec=LoraSpec.from_json(data["spec"]), **others)
        start = AdapterRef(*data["start"]) if "start" in data else None
        return Resolved(seed=data["seed"], start=start, plan=plan)
