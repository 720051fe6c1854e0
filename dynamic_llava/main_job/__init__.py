"""The tiny world's main job, an entry point: the place where training, evaluation and pictures meet."""

from dynamic_llava.main_job.job import main

__all__ = ["main"]
