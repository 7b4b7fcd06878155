"""The bodies of the Gradient wire: camelCase, and null asks for the default wherever a field may be left out."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasGenerator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

from serve.api.document import Closed
from serve.http.schema import Strict, Text

MAX_SAMPLES = 4096
MAX_SPANS = 1024
MAX_NAME = 256
Name = Annotated[Text, Field(min_length=1, max_length=MAX_NAME)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Camel(Strict):
    model_config = ConfigDict(alias_generator=AliasGenerator(alias=to_camel))


class LoraHyperparameters(Camel):
    """rank, and beside it what the SDK does not know."""

    rank: Annotated[int | None, Field(ge=1, le=1024)] = None
    alpha: Annotated[float | None, Field(gt=0, le=1e6)] = None
    use_rslora: bool | None = None
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1, max_length=16)] | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None


class TrainingArguments(Camel):
    """learningRate, and beside it what the SDK does not know."""

    learning_rate: Annotated[float | None, Field(gt=0, lt=1)] = None
    weight_decay: Annotated[float | None, Field(ge=0, le=10)] = None
    max_grad_norm: Annotated[float | None, Field(gt=0, le=1e6)] = None


class InitialHyperparameters(Camel):
    lora_hyperparameters: LoraHyperparameters | None = None
    training_arguments: TrainingArguments | None = None


class NewModel(Camel):
    base_model_id: Name
    name: Name


class CreateBody(Camel):
    """POST /models."""

    model: NewModel
    initial_hyperparameters: InitialHyperparameters | None = None


class Span(Camel):
    """A part of a sample."""

    value: Text
    trainable: bool | None = None  # as all null: the default, true
    parse_special_tokens: bool | None = None


class FineTuningParameters(Camel):
    multiplier: Finite | None = None


class Sample(Camel):
    inputs: Annotated[Text, Field(min_length=1)] | Annotated[list[Span], Field(min_length=1, max_length=MAX_SPANS)]
    fine_tuning_parameters: FineTuningParameters | None = None

    @property
    def spans(self) -> list[Span]:
        """The parts, in order."""
        return [Span(value=self.inputs)] if isinstance(self.inputs, str) else self.inputs

    @property
    def multiplier(self) -> float:
        """The factor of its loss."""
        given = None if self.fine_tuning_parameters is None else self.fine_tuning_parameters.multiplier
        return 1.0 if given is None else given


class FineTuneBody(Camel):
    """POST /models/{id}/fine-tune."""

    samples: Annotated[list[Sample], Field(min_length=1, max_length=MAX_SAMPLES)]


class Guidance(Camel):
    type: Literal["choice"]
    value: Annotated[list[Annotated[Text, Field(min_length=1, max_length=32)]], Field(min_length=1, max_length=10)]


class Rag(Camel):
    collection_id: Name


class CompleteBody(Camel):
    """POST /models/{id}/complete."""

    query: Annotated[Text, Field(min_length=1)]
    auto_template: bool | None = None
    max_generated_token_count: Annotated[int | None, Field(ge=1, lt=2**31)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_k: Annotated[int | None, Field(ge=-1, lt=2**31)] = None  # -1 and 0 are off, as null is
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    guidance: Guidance | None = None
    rag: Rag | None = None


Capability = Literal["complete", "fineTune"]


class BaseModelObject(Closed):
    type: Literal["baseModel"]
    id: str
    name: str
    slug: str
    capabilities: list[Capability]


class ModelAdapterObject(Closed):
    type: Literal["modelAdapter"]
    id: str
    name: str
    baseModelId: str
    latestUpdateTime: str


class Models(Closed):
    models: list[BaseModelObject | ModelAdapterObject]


class Created(Closed):
    id: str


class Nothing(Closed):
    """An empty object."""


class FineTunedObject(Closed):
    numberOfTrainableTokens: int
    sumLoss: float


class Completion(Closed):
    finishReason: Literal["stop", "length"]
    generatedOutput: str


class EmbeddingsModels(Closed):
    embeddingsModels: list[Nothing]


def lower(value: object) -> object:
    """A query's text in lower case."""
    return value.lower() if isinstance(value, str) else value


class ModelsQuery(BaseModel):
    """Query of GET /models; text, so not strict.  Booleans may be written as Python does."""

    model_config = ConfigDict(extra="forbid", alias_generator=AliasGenerator(alias=to_camel))
    capability: Literal["any", "fineTune", "complete"] = "any"
    only_base: Annotated[Literal["true", "false"], BeforeValidator(lower)] = "false"
