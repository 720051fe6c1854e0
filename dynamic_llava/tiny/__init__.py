"""The embedded tiny world: scenes, questions, descriptions, a tiny LLaVA and its shipped dense base."""

from pathlib import Path

BASE_WEIGHTS = Path(__file__).parent / "weights"
"""The shipped dense base: a llava-hf folder, trained by `python -m dynamic_llava.tiny.train_base`."""
