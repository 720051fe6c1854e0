"""The tiny world's main job: where training, evaluation and pictures meet; and what its numbers and pages are."""
