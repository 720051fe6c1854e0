"""Predictors that nobody has trained: what a checkpoint says about them, and the warning to a call that uses them."""

import logging
from typing import Any

from dynamic_llava.methods import Dynamic, Method

logger = logging.getLogger(__name__)

PREDICTORS = ("image_predictor", "output_predictor")
"""Names of the two predictors, as modules of the language model and in `untrained_predictors` of a configuration."""


def check_names(names: Any) -> list[str]:
    """Return a configuration's `untrained_predictors` as a list. ValueError for other names than the predictors'."""
    names = list(names or ())
    if not set(names) <= set(PREDICTORS):
        known = " and ".join(PREDICTORS)
        raise ValueError(f"untrained_predictors={names} may only name {known}; correct it in config.json")
    return names


def untrained_in(config: Any, method: Method) -> list[str]:
    """Return the newly initialised predictors that `method` would let decide."""
    if not isinstance(method, Dynamic):
        return []
    used = {"image_predictor": method.sparsifies_image, "output_predictor": method.sparsifies_output}
    return [name for name in config.untrained_predictors if used[name]]


def warn_untrained(config: Any, method: Method) -> None:
    """Log a warning where newly initialised predictors are about to decide what a model sees."""
    names = untrained_in(config, method)
    if names:
        logger.warning(
            "sparse inference with newly initialised predictors (%s): what they keep is arbitrary. Train them first "
            "(python -m dynamic_llava.train CONFIG.yaml), or pass sparsity='none'",
            ", ".join(names),
        )
