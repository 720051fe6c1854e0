"""The former place of `dynamic_llava.tiny.world.dataset`, for code that imports from here."""

from dynamic_llava.tiny.world.dataset import Truth, build_world, image_path, load_truth

__all__ = ["Truth", "build_world", "image_path", "load_truth"]
