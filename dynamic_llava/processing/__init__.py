"""From text and images to model inputs: vicuna_v1 prompts, LLaVA's image preparation, and the processor of both."""

from dynamic_llava.processing.image_processor import DynamicLlavaImageProcessor
from dynamic_llava.processing.processor import DynamicLlavaProcessor

__all__ = ["DynamicLlavaImageProcessor", "DynamicLlavaProcessor"]
