"""Training: the Trainer's subclass, its callbacks, and `run`, which turns a RunConfig into a trained checkpoint."""
