"""Pictures of what was kept and dropped: patches of images, words of answers, curves of a training run."""
