"""How large an adapter is beside its base: trainable parameters, their share, bytes.  Pure: no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxlora.core.lora import LoraSpec
from jaxlora.core.model_config import ModelConfig, layer_count, parameter_count, target_features


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSize:
    """Parameters of an adapter beside all of the model, and the bytes of what holds them."""

    trainable_parameters: int  # values of A and B, each module at its own rank
    all_parameters: int  # of the base and the adapter; a tied head counts once, as the embedding
    nbytes: int  # of a stored version's weights, on disk; of an export: of its files

    @property
    def trainable_percent(self) -> float:
        """Returns the share of the trainable parameters in all, in percent, as PEFT counts it."""
        return 100 * self.trainable_parameters / self.all_parameters

    def __str__(self) -> str:
        """Returns the line that PEFT prints of a model, then the bytes."""
        return (
            f"trainable params: {self.trainable_parameters:,} || all params: {self.all_parameters:,} || "
            f"trainable%: {self.trainable_percent:.4f} || bytes: {self.nbytes:,}"
        )

    def to_json(self) -> dict:
        """Returns a JSON object that `from_json` converts back."""
        return {
            "trainable_parameters": self.trainable_parameters,
            "all_parameters": self.all_parameters,
            "trainable_percent": self.trainable_percent,
            "bytes": self.nbytes,
        }

    @staticmethod
    def from_json(data: Mapping[str, int]) -> AdapterSize:
        """Parses what `to_json` returned, also among other values.  Raises KeyError for a missing one."""
        return AdapterSize(
            trainable_parameters=data["trainable_parameters"],
            all_parameters=data["all_parameters"],
            nbytes=data["bytes"],
        )


def adapter_size(config: ModelConfig, spec: LoraSpec) -> AdapterSize:
    """Returns the size of a version of such an adapter, whose weights are float32 at its largest rank."""
    trainable = rows = 0
    for target in spec.targets:
        features, layers = sum(target_features(config, target)), layer_count(config, target)
        rows += layers * features
        trainable += features * sum(spec.module(target, layer)[0] for layer in range(layers))
    return AdapterSize(
        trainable_parameters=trainable,
        all_parameters=parameter_count(config) + trainable,
        nbytes=4 * spec.max_rank * rows,
    )
