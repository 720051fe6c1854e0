"""LoRA: adapters in the language model's linear maps, saved as one folder, and merged into an ordinary checkpoint.

An adapter folder is self-contained beside its base: adapter_model.safetensors holds the adapters and what the method
has learned (the projector too, if it was trained), config.json the sparsity settings. It loads by plain peft:

    config = DynamicLlavaConfig.from_pretrained(adapter)
    base = DynamicLlavaForConditionalGeneration.from_pretrained(base, config=config)  # a dense LLaVA-1.5 will do
    model = PeftModel.from_pretrained(base, adapter)
"""

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from torch import Tensor
from transformers import Trainer

from dynamic_llava.config import LoraConfig, TrainConfig
from dynamic_llava.engine.learned import parts_of
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor

TARGETS = r".*\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""Names of the maps that get an adapter: the seven of each decoder layer; no predictor, no head, no vision tower."""
PROJECTOR = "multi_modal_projector"


def add_adapters(model: DynamicLlavaForConditionalGeneration, config: LoraConfig, train: TrainConfig) -> peft.PeftModel:
    """Return the model with new adapters (their product is 0) and trainable copies of what its method has learned.

    The projector is copied too where it has a learning rate. Initial values depend on train.seed alone.
    """
    copied = [*parts_of(model.config.sparsity), *([PROJECTOR] if train.projector_learning_rate is not None else [])]
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=TARGETS,
        modules_to_save=copied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(train.seed)
        return peft.get_peft_model(model, settings, autocast_adapter_dtype=False)


def save_lora(trainer: Trainer, processor: DynamicLlavaProcessor, folder: Path) -> None:
    """Write `adapter`, self-contained beside its base, and `model`, the merged checkpoint, into the run's folder.

    Every rank calls it: under ZeRO-3 the weights are gathered from all of them.
    """
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    base, settings = model.get_base_model(), model.peft_config["default"]
    adapter = folder / "adapter"
    model.save_pretrained(adapter, state_dict=weights, save_embedding_layers=False)
    (adapter / "README.md").unlink(missing_ok=True)  # an empty form of peft's
    base.config.save_pretrained(adapter)
    processor.save_pretrained(adapter)
    merged = merged_weights(weights, settings.lora_alpha / settings.r)
    base.save_pretrained(folder / "model", state_dict=merged)


def merged_weights(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the tensors of the unwrapped model: W + scale B A in W's dtype, and copies instead of their originals."""
    merged = {}
    for name, tensor in weights.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        if ".base_layer." in name:
            inner, outer = (weights[name.replace(".base_layer.", f".lora_{side}.default.")].float() for side in "AB")
            tensor = (tensor.float() + scale * (outer @ inner)).to(tensor.dtype)
        own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        merged[own.replace(".modules_to_save.default.", ".")] = tensor
    return merged
