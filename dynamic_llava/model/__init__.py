"""Dynamic-LLaVA on transformers 5: configuration, model, generation. Importing registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from dynamic_llava.engine.cache import AdmissionCache, cache_of
from dynamic_llava.engine.record import SparsityRecord
from dynamic_llava.model.base_model import DynamicLlavaModel
from dynamic_llava.model.configuration import DynamicLlavaConfig
from dynamic_llava.model.llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.model.outputs import DynamicLlavaOutput

AutoConfig.register("dynamic_llava", DynamicLlavaConfig)
AutoModel.register(DynamicLlavaConfig, DynamicLlavaModel)
AutoModelForImageTextToText.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(DynamicLlavaConfig, DynamicLlavaForConditionalGeneration)
# The pipelines ask these tables of names, which `register` does not fill, whether they serve a model.
for names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    names.setdefault("dynamic_llava", "DynamicLlavaForConditionalGeneration")
# A class of another name does not inherit LLaVA's tensor names: without these two lines a dense checkpoint would load
# with a randomly initialised head. LLaVA-NeXT's are LLaVA's, and its newline.
register_checkpoint_conversion_mapping("DynamicLlavaModel", get_checkpoint_conversion_mapping("LlavaModel"))
register_checkpoint_conversion_mapping(
    "DynamicLlavaForConditionalGeneration", get_checkpoint_conversion_mapping("llava_next")
)

__all__ = [
    "AdmissionCache",
    "DynamicLlavaConfig",
    "DynamicLlavaForConditionalGeneration",
    "DynamicLlavaModel",
    "DynamicLlavaOutput",
    "SparsityRecord",
    "cache_of",
]
