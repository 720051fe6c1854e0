"""The weights of a learned method inside the language model: whose they are, where they lie, and who has trained them.

A checkpoint holds the weights of one method (`SparsityConfig.method`), as modules of the language model named by the
method's `parts`. Everything else here and elsewhere asks for those names.
"""

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import initialization as init

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import PartCosts
from dynamic_llava.methods import Method, checkpoint_method

logger = logging.getLogger(__name__)

HOME = "model.language_model"
"""Where the parts lie in a checkpoint."""


def parts_of(settings: SparsityConfig) -> tuple[str, ...]:
    """Return the names of a checkpoint's learned parts."""
    return checkpoint_method(settings).parts


def prefixes(settings: SparsityConfig) -> dict[str, str]:
    """Return the beginning of the tensors' names of each learned part, by the part's name."""
    return {part: f"{HOME}.{part}." for part in parts_of(settings)}


def added_tokens(settings: SparsityConfig) -> int:
    """Return how many learned tokens stand behind those of each image, by a checkpoint's settings."""
    # Nothing is parsed where Dynamic-LLaVA decides, so that a compiler can follow.
    return 0 if settings.method is None else checkpoint_method(settings).added_tokens


def attach(decoder: Any, settings: SparsityConfig, width: int) -> None:
    """Build the checkpoint's method into `decoder`, a language model of hidden size `width`, as its `learner`."""
    decoder.learner = method = checkpoint_method(settings)
    built = method.build(width, settings)
    if built is None:
        raise ValueError(
            f"sparsity.method={settings.method!r} learns nothing, so a checkpoint cannot hold its weights; give it "
            "as `method` of a call, and leave it out of the checkpoint's settings"
        )
    single = len(method.parts) == 1
    for part in method.parts:
        if hasattr(decoder, part):
            raise ValueError(
                f"method {settings.method!r} calls one of its parts {part!r}, and the language model has something of "
                "that name; give the part another name in `parts`"
            )
        decoder.add_module(part, built if single else built.get_submodule(part))
    whole = {type(getattr(decoder, part)).__name__ for part in method.parts}
    decoder._no_split_modules = [*(decoder._no_split_modules or ()), *sorted(whole)]


def learned_of(decoder: Any) -> Any:
    """Return what hooks are given as `learned`: the one part, or, of several, a module with them as children."""
    parts = decoder.learner.parts
    return getattr(decoder, parts[0]) if len(parts) == 1 else decoder


def learned_costs(settings: SparsityConfig, width: int, chosen: Method | None = None) -> dict[str, PartCosts]:
    """Return what the learned parts of a checkpoint cost, for hidden states of `width`.

    The parts that the method `chosen` uses count as learning; by default those that the checkpoint's own method uses.
    """
    own = checkpoint_method(settings)
    used = (own if chosen is None else chosen).used_parts
    return {name: replace(part, learns=name in used) for name, part in own.costs(width, settings).items()}


def check_weights(method: Method, own: Method) -> None:
    """Raise ValueError for a method that decides by weights of its own where a checkpoint holds those of `own`.

    And for one that adds another number of tokens to an image than the checkpoint's has been trained to.
    """
    if type(method).build not in (Method.build, type(own).build) or not set(method.used_parts) <= set(own.parts):
        raise ValueError(
            f"method {method.name!r} decides by weights of its own, and this checkpoint holds those of {own.name!r}; "
            "load a checkpoint that was trained with it (sparsity.method in the training's configuration)"
        )
    if method.added_tokens not in (0, own.added_tokens):
        raise ValueError(
            f"method {method.name!r} is to add {method.added_tokens} tokens to an image, and this checkpoint was made "
            f"for {own.added_tokens}; leave the number out, or load a checkpoint that was trained with it"
        )


def initialize_rest(decoder: Any, module: nn.Module) -> None:
    """Give what transformers has no rule for, in a new learned part, the values that the method builds it with.

    Any other module of the decoder is left alone, and so is what came from a checkpoint (transformers'
    `initialization`).
    """
    parts = () if decoder.learner is None else decoder.learner.parts
    part = next((name for name in parts if getattr(decoder, name) is module), None)
    ruled = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    rest = [
        (child, path, name)
        for path, child in (module.named_modules() if part is not None else ())
        if not isinstance(child, ruled)
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]
        if tensor is not None
    ]
    if not rest:
        return
    built = decoder.learner.build(decoder.config.hidden_size, decoder.settings)
    fresh = built if len(parts) == 1 else built.get_submodule(part)
    for child, path, name in rest:
        init.copy_(getattr(child, name), getattr(fresh.get_submodule(path), name))


def check_names(names: Any, parts: Collection[str]) -> list[str]:
    """Return a configuration's `untrained_predictors` as a list. ValueError for other names than the parts'."""
    names = list(names or ())
    if not set(names) <= set(parts):
        known = " and ".join(parts)
        raise ValueError(f"untrained_predictors={names} may only name {known}; correct it in config.json")
    return names


def untrained_in(config: Any, method: Method) -> list[str]:
    """Return the newly initialised parts that `method` would let decide."""
    return [name for name in config.untrained_predictors if name in method.used_parts]


def warn_untrained(config: Any, method: Method) -> None:
    """Log a warning where newly initialised weights are about to decide what a model sees."""
    names = untrained_in(config, method)
    if names:
        logger.warning(
            "sparse inference with newly initialised predictors (%s): what they keep is arbitrary. Train them first "
            "(python -m dynamic_llava.train CONFIG.yaml), or pass sparsity='none'",
            ", ".join(names),
        )
