"""Gradient checkpointing: activations are computed again in the backward pass instead of kept."""

from typing import Any


def recompute_activations(model: Any) -> None:
    """Switch gradient checkpointing on, without gradients at the inputs.

    transformers' own switch also makes the embeddings of tokens and patches require gradients, which only its reentrant
    variant needs: the frozen vision tower and frozen layers below the predictors would all run backward, for nothing.
    """
    # Renamed within transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
