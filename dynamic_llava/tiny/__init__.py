"""The embedded tiny world: scenes, questions, descriptions, a tiny LLaVA and its shipped dense base."""

from dynamic_llava.config import SHIPPED

BASE_WEIGHTS = SHIPPED["tiny"]
"""The shipped dense base: a llava-hf folder, trained by `python -m dynamic_llava.tiny.train_base`."""
