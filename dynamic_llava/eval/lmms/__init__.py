"""The plug-in of lmms-eval, whose entry point `lmms_eval.models` finds the model `dynamic_llava` here."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Return what lmms-eval registers; a class is imported only when the model is asked for.

    lmms-eval takes the chat class, and the simple one with --force_simple.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="dynamic_llava",
        simple_class_path="dynamic_llava.eval.lmms.model.DynamicLlavaLMM",
        chat_class_path="dynamic_llava.eval.lmms.model.DynamicLlavaChatLMM",
    )
