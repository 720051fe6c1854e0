"""Which parameters are trained, at which learning rate, and how their gradients are clipped."""

from typing import Any

import torch
from torch import nn

from dynamic_llava.config import SparsityMode, TrainConfig
from dynamic_llava.sparsity.predictors import ImagePredictor, OutputPredictor

LANGUAGE_MODEL, IMAGE_PREDICTOR, OUTPUT_PREDICTOR = "language_model", "image_predictor", "output_predictor"
PROJECTOR, VISION_TOWER = "projector", "vision_tower"


def parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the model's parameters by part; the head belongs to the language model. Every parameter has one part."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        part = {"vision_tower": VISION_TOWER, "multi_modal_projector": PROJECTOR}.get(last)
        if isinstance(module, ImagePredictor):
            part = IMAGE_PREDICTOR
        elif isinstance(module, OutputPredictor):
            part = OUTPUT_PREDICTOR
        if part is not None:
            owner.update((id(parameter), part) for parameter in module.parameters())
    found: dict[str, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        found.setdefault(owner.get(id(parameter), LANGUAGE_MODEL), []).append(parameter)
    return found


def freeze(model: nn.Module, config: TrainConfig) -> None:
    """Freeze what the run does not train: the vision tower, by default the projector, and unused predictors."""
    trained = trained_parts(config)
    for part, parameters in parts(model).items():
        for parameter in parameters:
            parameter.requires_grad_(part in trained)


def trained_parts(config: TrainConfig) -> dict[str, float]:
    """Return the trained parts with their learning rates."""
    rates = {LANGUAGE_MODEL: config.learning_rate}
    for predictor, modes in _MODES_OF.items():
        if config.sparsity_mode in modes:
            rates[predictor] = config.predictor_learning_rate
    if config.projector_learning_rate is not None:
        rates[PROJECTOR] = config.projector_learning_rate
    return rates


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW with one parameter group per trained part, named by it (A.2: no weight decay)."""
    by_part = parts(model)
    groups: list[dict[str, Any]] = [
        {"name": part, "params": [p for p in by_part[part] if p.requires_grad], "lr": rate}
        for part, rate in trained_parts(config).items()
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def clip_separately(model: nn.Module, limit: float) -> dict[str, torch.Tensor]:
    """Clip the gradient of each predictor, and of everything else together, to `limit`; return the norms before."""
    shares: dict[str, list[nn.Parameter]] = {}
    for part, parameters in parts(model).items():
        share = part if part in _MODES_OF else LANGUAGE_MODEL
        shares.setdefault(share, []).extend(p for p in parameters if p.grad is not None)
    return {part: nn.utils.clip_grad_norm_(share, limit) for part, share in shares.items() if share}


_MODES_OF: dict[str, tuple[SparsityMode, ...]] = {
    IMAGE_PREDICTOR: ("both", "image"),
    OUTPUT_PREDICTOR: ("both", "output"),
}
