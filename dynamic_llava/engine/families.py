"""The families of decoders that can be sparse: one row each, transformers' own model class with the sparse decoder.

A family's layers must hand keyword arguments on to transformers' attention interface, and see every earlier token.
"""

from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from dynamic_llava.engine.decoder import SparseDecoder


class DynamicLlamaModel(SparseDecoder, LlamaModel):
    """Sparse Llama, the decoder of LLaVA-1.5 (Vicuna)."""


class DynamicMistralModel(SparseDecoder, MistralModel):
    """Sparse Mistral without a sliding window, as from version 0.2 on."""


class DynamicQwen2Model(SparseDecoder, Qwen2Model):
    """Sparse Qwen2 (and Qwen2.5): queries, keys and values have biases."""


class DynamicQwen3Model(SparseDecoder, Qwen3Model):
    """Sparse Qwen3: queries and keys are normed, and a head's width is its own."""


FAMILIES: dict[str, type[SparseDecoder]] = {
    "llama": DynamicLlamaModel,
    "mistral": DynamicMistralModel,
    "qwen2": DynamicQwen2Model,
    "qwen3": DynamicQwen3Model,
}
"""model_type of a text_config -> the decoder that carries it."""
