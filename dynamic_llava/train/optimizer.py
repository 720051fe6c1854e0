"""Which parameters are trained, at which learning rate, and how their gradients are clipped."""

from typing import Any

import torch
from torch import nn

from dynamic_llava.config import TrainConfig
from dynamic_llava.config.run import RunConfig
from dynamic_llava.model.recomputation import recompute_activations
from dynamic_llava.sparsity.predictors import ImagePredictor, OutputPredictor
from dynamic_llava.train.lora import add_adapters

LANGUAGE_MODEL, IMAGE_PREDICTOR, OUTPUT_PREDICTOR = "language_model", "image_predictor", "output_predictor"
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
    DeepSpeed has float32 copies of its own.
    """
    if config.lora is not None:
        model = add_adapters(model, config.lora, config.train)
    freeze(model, config.train)
    if config.train.tune != "full" and config.train.deepspeed is None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if config.train.gradient_checkpointing:
        recompute_activations(model)
    return model


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the model's parameters by part; the head belongs to the language model. Every parameter has one part."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules():  # from the outside inwards: the innermost part counts
        part = _PART_OF_NAME.get(name.rsplit(".", 1)[-1])
        if part is None and isinstance(module, ImagePredictor):
            part = IMAGE_PREDICTOR
        elif part is None and isinstance(module, OutputPredictor):
            part = OUTPUT_PREDICTOR
        if part is not None:
            owner.update((id(parameter), part) for parameter in module.parameters())
    found: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        found.setdefault(owner.get(id(parameter), LANGUAGE_MODEL), []).append(parameter)
    return found


def freeze(model: nn.Module, config: TrainConfig) -> None:
    """Freeze what the run does not train: always the vision tower, unused predictors, and what `tune` leaves alone."""
    for part, parameters in parts(model).items():
        for parameter in parameters:
            parameter.requires_grad_(part in config.learning_rates)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with one parameter group per trained part, named by it (A.2: no weight decay)."""
    by_part = parts(model)
    groups: list[dict[str, Any]] = [
        {"name": part, "params": [p for p in by_part[part] if p.requires_grad], "lr": rate}
        for part, rate in config.learning_rates.items()
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def clip_separately(model: nn.Module, limit: float) -> dict[str, torch.Tensor]:
    """Clip the gradient of each predictor, and of everything else together, to `limit`; return the norms before."""
    shares: dict[str, list[nn.Parameter]] = {}
    for part, parameters in parts(model).items():
        share = part if part in (IMAGE_PREDICTOR, OUTPUT_PREDICTOR) else LANGUAGE_MODEL
        shares.setdefault(share, []).extend(p for p in parameters if p.grad is not None)
    return {part: nn.utils.clip_grad_norm_(share, limit) for part, share in shares.items() if share}
