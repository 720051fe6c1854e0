"""Which parameters are trained, at which learning rate, and how their gradients are clipped."""

from typing import Any

import torch
from torch import nn

from dynamic_llava.config import SparsityConfig, TrainConfig
from dynamic_llava.config.run import RunConfig
from dynamic_llava.model.switches import choose_method
from dynamic_llava.sparsity.predictors import Predictor

LANGUAGE_MODEL = "language_model"
PROJECTOR, VISION_TOWER = "projector", "vision_tower"
ADAPTERS, REPLACED = "adapters", "replaced"
"""Only with LoRA: the adapters, and the frozen originals of modules of which a copy is trained."""

_PART_OF_NAME = {
    "vision_tower": VISION_TOWER,
    "multi_modal_projector": PROJECTOR,
    "lora_A": ADAPTERS,
    "lora_B": ADAPTERS,
    "original_module": REPLACED,
}
"""Parts by the last name of their module; the last three are peft's."""


def prepare(model: Any, config: RunConfig) -> Any:
    """Return the model as the run trains it: with adapters if it has a `lora` section, frozen, recomputing if asked.

    Beside a frozen language model of half precision what learns is kept in float32, where small steps are not lost;
    DeepSpeed has float32 copies of its own. Raises ValueError for a start that its predictors cannot have.
    """
    if config.train.start_keep_rate is not None:
        start_predictors(model, config.train)
    if config.lora is not None:
        from dynamic_llava.train.lora import add_adapters  # needs peft

        model = add_adapters(model, config.lora, config.train)
    freeze(model, config.train)
    if config.train.tune != "full" and config.train.deepspeed is None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if config.train.gradient_checkpointing:
        recompute_activations(model)
    return model


def start_predictors(model: Any, config: TrainConfig) -> None:
    """Let new predictors begin by keeping the share `config.start_keep_rate` of all tokens, through their last bias.

    Raises ValueError where the base holds trained ones, and for learned parts without such a bias.
    """
    from dynamic_llava.train.distributed import whole  # needs accelerate

    rate = config.start_keep_rate
    assert rate is not None
    decoder = next(module for module in model.modules() if hasattr(module, "learner"))
    for part in choose_method(model.config.sparsity, **config.switches).used_parts:
        predictor = getattr(decoder, part)
        if part not in model.config.untrained_predictors:
            raise ValueError(
                f"train.start_keep_rate={rate} is where new predictors begin, and the base holds a trained {part}; "
                "leave it out, or start from a base without predictors"
            )
        if not isinstance(predictor, Predictor):
            raise ValueError(
                f"train.start_keep_rate={rate} sets the last bias of a predictor (sparsity/predictors.py), and {part} "
                f"is a {type(predictor).__name__}; leave it out"
            )
        with whole(predictor.last_bias):
            predictor.start_at(rate)


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the model's parameters by part; the head belongs to the language model. Every parameter has one part.

    What a method has learned is a part for each of the method's `parts`, under its name.
    """
    owner: dict[int, str] = {}
    own = learned_modules(model)
    for name, module in model.named_modules():  # from the outside inwards: the innermost part counts
        part = own.get(id(module)) or _PART_OF_NAME.get(name.rsplit(".", 1)[-1])
        if part is not None:
            owner.update((id(parameter), part) for parameter in module.parameters())
    found: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        found.setdefault(owner.get(id(parameter), LANGUAGE_MODEL), []).append(parameter)
    return found


def learned_modules(model: nn.Module) -> dict[int, str]:
    """Return the names of the method's learned parts by the identity of their modules, or of peft's wraps of them."""
    decoder = next(module for module in model.modules() if hasattr(module, "learner"))
    return {id(getattr(decoder, part)): part for part in decoder.learner.parts}


def learning_rates(config: TrainConfig, settings: SparsityConfig) -> dict[str, float]:
    """Return the parts that a run trains, of a checkpoint with these settings, with their peak learning rates.

    Raises ValueError where nothing would learn.
    """
    rates = config.learning_rates(choose_method(settings, **config.switches).used_parts)
    if not rates:
        raise ValueError(f"train.tune={config.tune!r} trains nothing with this method; choose another tune")
    return rates


def freeze(model: Any, config: TrainConfig) -> None:
    """Freeze what the run does not train: always the vision tower, unused predictors, and what `tune` leaves alone."""
    rates = learning_rates(config, model.config.sparsity)
    for part, parameters in parts(model).items():
        for parameter in parameters:
            parameter.requires_grad_(part in rates)


def build_optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with one parameter group per trained part, named by it (A.2: no weight decay)."""
    by_part = parts(model)
    groups: list[dict[str, Any]] = [
        {"name": part, "params": [p for p in by_part[part] if p.requires_grad], "lr": rate}
        for part, rate in learning_rates(config, model.config.sparsity).items()
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def clip_separately(model: nn.Module, limit: float) -> dict[str, torch.Tensor]:
    """Clip the gradient of each learned part, and of everything else together, to `limit`; return the norms before."""
    own = set(learned_modules(model).values())
    shares: dict[str, list[nn.Parameter]] = {}
    for part, parameters in parts(model).items():
        share = part if part in own else LANGUAGE_MODEL
        shares.setdefault(share, []).extend(p for p in parameters if p.grad is not None)
    return {part: nn.utils.clip_grad_norm_(share, limit) for part, share in shares.items() if share}


def recompute_activations(model: Any) -> None:
    """Switch gradient checkpointing on, without gradients at the inputs.

    transformers' own switch also makes the embeddings of tokens and patches require gradients, which only its reentrant
    variant needs: the frozen vision tower and frozen layers below the predictors would all run backward, for nothing.
    """
    # Renamed within transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()
