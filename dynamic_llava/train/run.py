"""One training run: from a base checkpoint and LLaVA-format data to a sparse checkpoint."""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PrinterCallback, TrainingArguments, set_seed

from dynamic_llava.config.run import RunConfig
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.data.prepare import BROKEN, base_processor, write_broken
from dynamic_llava.files import Lock, replace_file
from dynamic_llava.methods import import_named
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.projectors import import_projector
from dynamic_llava.provenance import environment, versions
from dynamic_llava.train.callbacks import (
    Beginning,
    KeepRateWarning,
    MetricsFile,
    Progress,
    Saving,
    SeparateClipping,
    WandbLog,
)
from dynamic_llava.train.checkpoints import Checkpoints, compared_settings, least_bytes, published
from dynamic_llava.train.config import run_inputs, run_method
from dynamic_llava.train.distributed import join, on_main, read_deepspeed, together, wait_for_all, zero_stage
from dynamic_llava.train.failures import train
from dynamic_llava.train.finished import (
    MODEL_SETTINGS,
    RunResult,
    finished_result,
    is_finished,
    remove_finished,
    write_record,
)
from dynamic_llava.train.health import Proving
from dynamic_llava.train.lora import save_lora
from dynamic_llava.train.optimizer import learning_rates, prepare
from dynamic_llava.train.rates import finish_rates, held_samples
from dynamic_llava.train.stopping import NotFinite, Stopped, StopRequest
from dynamic_llava.train.trainer import DynamicLlavaTrainer

log = logging.getLogger(__name__)


def run(config: RunConfig) -> RunResult:
    """Train as `config` says and save the result; prints its progress. Every process of the run calls it.

    Goes on from the newest complete checkpoint in the run's folder, if there is one; a run that has finished already is
    returned as it is. Raises ValueError or FileNotFoundError for a missing base or data file, unusable samples,
    settings that do not fit the model, a checkpoint or model of other settings or inputs, and a folder in which another
    process trains; WriteError (SaveError) when the disk is full; NotFinite at the first loss, gradient or weight that
    is not finite; Stopped after a signal, with a checkpoint written; and what `failures.train` raises when training
    fails in the middle, with a checkpoint written where the state is sound.
    """
    for name, value in (("model.base", config.model.base), ("data.json", config.data.json)):
        if not value:
            raise ValueError(f"{name} is not set; give it in the configuration file or as --{name} on the command line")
    run_method(config)  # what cannot be is said before anything is read
    import_projector(config.model.projector)
    arguments = training_arguments(config)
    if zero_stage(arguments.get("deepspeed")) == 3:
        # Loading in parts overlooks what does not fit; from the names and shapes alone it is found at once.
        DynamicLlavaForConditionalGeneration.check_checkpoint(config.model.source, sparsity=asdict(config.sparsity))
    joined = join(arguments)
    with together(Lock(config.folder / "run.lock", f"training in {config.folder}")):
        set_seed(config.train.seed)
        processor = base_processor(config.model, config.sparsity)
        check_projector(config)
        dataset, held = SftDataset(config.data, processor), held_samples(config, processor)
        inputs = on_main(lambda: run_inputs(config, config.model.source, dataset))
        if is_finished(config.folder) and not config.train.overwrite:
            return on_main(lambda: finished_result(config, inputs, joined.world_size))
        return _train(config, processor, dataset, held, inputs, joined)


def _train(
    config: RunConfig,
    processor: DynamicLlavaProcessor,
    dataset: SftDataset,
    held: SftDataset | None,
    inputs: dict[str, str],
    joined: TrainingArguments,
) -> RunResult:
    checkpoints = Checkpoints(
        config.folder,
        compared_settings(config, joined.world_size),
        joined.world_size,
        zero_stage(joined.deepspeed),
        config.train.keep_checkpoints,
        inputs,
        config.train.accept_changed_inputs,
    )
    goes_on = config.train.resume and not is_finished(config.folder)
    start = checkpoints.resume_point(resume=True) if goes_on else None
    model, _ = load(config)
    model = prepare(model, config)
    trainer = build_trainer(config, model, processor, dataset, joined)
    trainer.checkpoints = checkpoints
    if not goes_on:  # nothing is removed before everything that could be wrong has been found
        checkpoints.resume_point(resume=False)
        on_main(lambda: remove_finished(config.folder))
    if trainer.is_world_process_zero():
        log.info("%s: %s", config.run_name, dataset.counts)
        _list_broken(config.folder / BROKEN, dataset, fresh=start is None)
        write_config(config, config.folder / "config.yaml")
    with StopRequest() as request:
        saves = Saving(config.train.save_every, request)
        trainer.add_callback(saves)
        trainer.add_callback(Proving(checkpoints))
        try:
            outcome = train(trainer, start)
            trainer.check_weights()
        except NotFinite as error:
            raise NotFinite(f"{error}; {checkpoints.after_illness(trainer.state.global_step)}") from None
    if saves.stops:
        raise _stopped(trainer)
    finish_rates(config, trainer, held)
    save(config, trainer, processor, inputs)
    history = [line for line in trainer.state.log_history if "lm_loss" in line]
    metrics = {**(history[-1] if history else {}), "steps": outcome.global_step}
    metrics["train_seconds"] = outcome.metrics["train_runtime"]
    return RunResult(config.folder / "model", config.folder, metrics, history)


def check_projector(config: RunConfig) -> None:
    """Raise ValueError where a run would put a new projector into its base, and could not train or store it."""
    wanted = config.model.projector
    there = DynamicLlavaConfig.from_pretrained(config.model.source).projector
    if wanted in (None, there):
        return
    new = f"model.projector={wanted!r} is newly initialised, for the base has {there!r}"
    if config.train.projector_learning_rate is None:
        raise ValueError(f"{new}, and train.projector_learning_rate is null, so it would stay random; give a rate")
    if config.lora is not None:
        raise ValueError(
            f"{new}, and adapters (train.tune: lora) are stored without their base; train the projector before "
            "(train.tune: predictors, train.sparsity_mode: none), and adapters over the model that comes of it"
        )


def load(config: RunConfig) -> tuple[DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor]:
    """Return the base model with the run's sparsity settings and projector, and its processor."""
    base, projector = config.model.source, config.model.projector
    import_named(config.sparsity.method)
    processor = base_processor(config.model, config.sparsity)  # first: what it refuses is known before weights are read
    model = DynamicLlavaForConditionalGeneration.from_pretrained(
        base, sparsity=asdict(config.sparsity), dtype=getattr(torch, config.model.dtype)
    )
    if projector not in (None, model.config.projector):
        model.model.exchange_projector(projector)
    return model, processor


def build_trainer(
    config: RunConfig,
    model: DynamicLlavaForConditionalGeneration,
    processor: DynamicLlavaProcessor,
    dataset: SftDataset,
    joined: TrainingArguments | None = None,
) -> DynamicLlavaTrainer:
    """Return the trainer of a run; nothing is written before its `train()`. `joined` is what `join` has returned."""
    settings = config.train
    method = choose_method(config.sparsity, **settings.switches)
    trainer = DynamicLlavaTrainer(
        model=model,
        args=joined if joined is not None else join(training_arguments(config)),
        train_dataset=dataset,
        data_collator=Collator(processor, config.sparsity.output_segments, config.data.text_only == "sparse"),
        train_config=settings,
        lora=config.lora,
        callbacks=[
            MetricsFile(config.folder / "metrics.jsonl"),
            Progress(config.run_name),
            KeepRateWarning(settings, method.keep_rates(config.sparsity)),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Beginning(partial(_begin, config, trainer)))
    if settings.clip_predictors_separately and settings.max_grad_norm > 0:
        trainer.add_callback(SeparateClipping(trainer.clip_separately))
    if settings.report_to == "wandb":
        trainer.add_callback(WandbLog(config.run_name, asdict(config), config.folder))
    return trainer


def save(
    config: RunConfig, trainer: DynamicLlavaTrainer, processor: DynamicLlavaProcessor, inputs: Mapping[str, str]
) -> None:
    """Write the trained model into the run's folder, where it appears when it is whole; every process calls it.

    `inputs` is what it was trained on (`run_inputs`), which is recorded beside it.
    """
    settings = trainer.accelerator.unwrap_model(trainer.model).config
    learned = learning_rates(config.train, settings.sparsity)
    settings.untrained_predictors = [name for name in settings.untrained_predictors if name not in learned]
    with published(config.folder, least_bytes(trainer.model, optimizer=False)) as unfinished:
        folder = unfinished / "model"
        if config.lora is None:
            trainer.save_model(str(folder))
        else:
            save_lora(trainer, processor, unfinished)
        if trainer.is_world_process_zero():
            processor.save_pretrained(folder)
            write_config(config, folder / MODEL_SETTINGS)
            write_record(folder, config, trainer.args.world_size, inputs)
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same


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
        "logging_nan_inf_filter": False,  # it would write 0 where the loss is NaN; training ends there
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "label_names": ["labels"],
        **({} if settings.deepspeed is None else {"deepspeed": read_deepspeed(settings.deepspeed)}),
    }


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as YAML; reading the file gives the same configuration."""
    replace_file(path, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))


def _list_broken(file: Path, dataset: SftDataset, *, fresh: bool) -> None:
    """Write the samples that are left out for their images into the run's list, and say so; training may add others."""
    if fresh:
        file.unlink(missing_ok=True)
    if dataset.broken:
        write_broken(file, dataset.broken)
        log.warning("%d samples with a broken or missing image are left out; %s lists them", len(dataset.broken), file)


def _begin(config: RunConfig, trainer: DynamicLlavaTrainer) -> None:
    """Say how the run trains, and write environment.json: what its numbers depend on beside config.yaml."""
    trainer.restart_meter()
    if not trainer.is_world_process_zero():
        return
    arguments, step = trainer.args, trainer.state.global_step
    facts = {
        **environment(),
        **versions("accelerate", "deepspeed", "peft", "datasets", "safetensors"),
        "seed": config.train.seed,
        "device": _device_name(arguments.device),
        "processes": arguments.world_size,
        "wrapper": type(trainer.model_wrapped).__name__,
        "zero_stage": zero_stage(arguments.deepspeed),
        "command": sys.orig_argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "resumed_from_step": step or None,
    }
    replace_file(config.folder / "environment.json", json.dumps(facts, indent=1) + "\n")
    where = f"{facts['processes']} process(es) on {facts['device']}, model wrapped as {facts['wrapper']}"
    log.info("%s: training from step %d to %d in %s", config.run_name, step, trainer.state.max_steps, where)


def _stopped(trainer: DynamicLlavaTrainer) -> Stopped:
    state = trainer.state
    message = (
        f"stopped as asked after step {state.global_step} of {state.max_steps}; the same command goes on from there"
    )
    if trainer.is_world_process_zero():
        log.warning(message)
    wait_for_all()  # a launcher ends the other processes when the first one has gone
    return Stopped(message)


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.get_device_module(device).get_device_name(device))
