"""Writes a LoRA as a GGUF file with the `gguf` library, for llama.cpp beside a GGUF of the same base.

    general.type = adapter, adapter.type = lora, adapter.lora.alpha
    TENSOR.lora_a [R, X] and TENSOR.lora_b [Y, R] for each adapted TENSOR of the base

llama.cpp computes alpha / R * B A with one alpha for the file and the R of each tensor; where a module's scale differs
(rsLoRA, exceptions), B is scaled by the ratio.  Query and key rows of the llama architecture have its rope's order.

Shape letters: R LoRA rank, X features in, Y features out.
Source: the adapter files of llama.cpp, https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from jaxlora.checkpoints.gguf import TENSOR_NAMES, to_gguf_rows
from jaxlora.core.errors import AdapterInvalid
from jaxlora.core.lora import HEAD_TARGET, Adapter
from jaxlora.core.model_config import ModelConfig
from jaxlora.peft.folder import adapted, held

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def write_gguf_lora(path: Path, config: ModelConfig, adapter: Adapter, *, dtype: str) -> None:
    """Writes the adapter as a GGUF file with tensors of this dtype, float32 or float16.

    Raises AdapterInvalid for LoRA on a tied head, for which llama.cpp has no tensor, and for values outside `dtype`.
    """
    if config.tied and HEAD_TARGET in adapter.spec.targets:
        raise AdapterInvalid(
            "the adapter changes lm_head, but a GGUF of this base has no head of its own (it is the embedding); "
            "export it as `merged` instead"
        )
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.family])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.spec.alpha)
    writer.add_name(str(adapter.ref))
    for name, value in _tensors(config, adapter).items():
        writer.add_tensor(name, held(value, np.dtype(dtype), name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(config: ModelConfig, adapter: Adapter) -> dict[str, np.ndarray]:
    """Returns name → float32 tensor of its true rank."""
    tensors = {}
    for module, a_RX, b_YR in adapted(adapter, config):
        # 1 except for rsLoRA and exceptions.
        rest = adapter.spec.scale(module.target, module.layer) * len(a_RX) / adapter.spec.alpha
        name = TENSOR_NAMES["head" if module.target == HEAD_TARGET else module.target].format(module.layer)
        tensors[f"{name}.lora_a"] = a_RX
        tensors[f"{name}.lora_b"] = to_gguf_rows(config, module.target, np.float32(rest) * b_YR)
    return tensors
