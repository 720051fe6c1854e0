"""The entry point `lmms_eval.models`: lmms-eval finds the model `dynamic_llava` here; nothing heavy is imported."""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """Return what lmms-eval registers; the class is imported only when the model is asked for."""
    return ModelManifest(
        model_id="dynamic_llava",
        simple_class_path="dynamic_llava.integrations.lmms_eval_model.DynamicLlavaLMM",
    )
