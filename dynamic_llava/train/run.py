"""One training run: from a base checkpoint and LLaVA-format data to a sparse checkpoint."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainingArguments, set_seed

import dynamic_llava.tiny
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.train.callbacks import KeepRateWarning, MetricsFile, Progress, SeparateClipping
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.optimizer import freeze
from dynamic_llava.train.trainer import DynamicLlavaTrainer

log = logging.getLogger(__name__)

_RECOMPUTE = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
"""Gradient checkpointing was renamed within transformers 5."""
TINY_BASE = "tiny"
"""Name of the base checkpoint that ships inside the package."""


@dataclass(frozen=True)
class RunResult:
    """Where a run's files are, and its numbers."""

    folder: Path
    """The trained checkpoint: safetensors, config.json and processor files; `from_pretrained` loads it."""
    run_folder: Path
    """The run's folder: config.yaml, metrics.jsonl and the checkpoint."""
    metrics: dict[str, float]
    """Values of the last logged window, plus train_seconds and steps."""
    history: list[dict[str, float]]
    """Every logged line."""


def run(config: RunConfig) -> RunResult:
    """Train as `config` says and save the result; prints its progress.

    Raises ValueError or FileNotFoundError for a missing base or data file, unusable samples and settings that do not
    fit the model.
    """
    for name, value in (("model.base", config.model.base), ("data.json", config.data.json)):
        if not value:
            raise ValueError(f"{name} is not set; give it in the configuration file or as --{name} on the command line")
    set_seed(config.train.seed)
    model, processor = load(config)
    dataset = SftDataset(config.data, processor)
    freeze(model, config.train)
    config.folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, model, processor, dataset)
    if trainer.is_world_process_zero():
        log.info("%s: %s", config.name, dataset.counts)
        write_config(config, config.folder / "config.yaml")
    outcome = trainer.train()
    folder = config.folder / "model"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        processor.save_pretrained(folder)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same
    history = [line for line in trainer.state.log_history if "lm_loss" in line]
    metrics = {**(history[-1] if history else {}), "steps": outcome.global_step}
    metrics["train_seconds"] = outcome.metrics["train_runtime"]
    return RunResult(folder, config.folder, metrics, history)


def load(config: RunConfig) -> tuple[DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor]:
    """Return the base model with the run's sparsity settings, and its processor."""
    base = config.model.base
    if base == TINY_BASE:
        base = str(Path(dynamic_llava.tiny.__file__).parent / "weights")
    model = DynamicLlavaForConditionalGeneration.from_pretrained(
        base, sparsity=config.sparsity.to_dict(), dtype=getattr(torch, config.model.dtype)
    )
    return model, DynamicLlavaProcessor.from_pretrained(base)


def build_trainer(
    config: RunConfig,
    model: DynamicLlavaForConditionalGeneration,
    processor: DynamicLlavaProcessor,
    dataset: SftDataset,
) -> DynamicLlavaTrainer:
    """Return the trainer of a run; nothing is written before its `train()`."""
    settings = config.train
    clips_separately = settings.clip_predictors_separately and settings.max_grad_norm > 0
    trainer = DynamicLlavaTrainer(
        model=model,
        args=TrainingArguments(**training_arguments(config)),
        train_dataset=dataset,
        data_collator=Collator(processor, config.sparsity.output_segments),
        train_config=settings,
        callbacks=[
            MetricsFile(config.folder / "metrics.jsonl"),
            Progress(config.name),
            KeepRateWarning(settings, config.sparsity),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if clips_separately:
        if trainer.is_deepspeed_enabled:
            raise ValueError("train.clip_predictors_separately needs whole gradients, which DeepSpeed keeps in parts")
        trainer.add_callback(SeparateClipping(trainer.clip_separately))
    return trainer


def training_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the keyword arguments of transformers' TrainingArguments that a run's settings amount to."""
    settings = config.train
    return {
        "output_dir": str(config.folder),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps if settings.max_steps is not None else -1,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup_ratio,
        "max_grad_norm": 0.0 if settings.clip_predictors_separately else settings.max_grad_norm,
        "bf16": settings.bf16,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "dataloader_num_workers": config.data.workers,
        "use_cpu": not torch.accelerator.is_available(),  # otherwise two CPU processes would silently train apart
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "ddp_find_unused_parameters": False,  # every trained parameter takes part in every step
        "remove_unused_columns": False,
        "logging_steps": settings.log_every,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "label_names": ["labels"],
        **({_RECOMPUTE: True} if settings.gradient_checkpointing else {}),
    }


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML; reading the file gives the same configuration."""
    values = asdict(config)
    if config.tiny is None:
        del values["tiny"]
    path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
