"""A training's end: whether inference keeps what training has sampled, and what keep rates are worth (calibration).

Every process passes the same samples, so that weights which lie in parts over all of them (ZeRO-3) come together.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from dynamic_llava.config.run import RunConfig
from dynamic_llava.data import SftDataset
from dynamic_llava.methods import Dynamic
from dynamic_llava.model.margins import calibration_of, margins_of
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.train.failures import agree_on_failure
from dynamic_llava.train.trainer import DynamicLlavaTrainer, tokens_of_rates

log = logging.getLogger(__name__)

COMPARED = 64
"""Samples whose keep rates are compared, evenly spread over the data."""


def held_samples(config: RunConfig, processor: DynamicLlavaProcessor) -> SftDataset | None:
    """Return the samples that the model is to be calibrated by; None where it is not.

    Raises ValueError or FileNotFoundError for unusable samples, as the training's own do.
    """
    held = config.train.calibrate
    if held is None:
        return None
    folder = config.data.image_folder if held.image_folder is None else held.image_folder
    return SftDataset(replace(config.data, json=held.json, image_folder=folder), processor)


def finish_rates(config: RunConfig, trainer: DynamicLlavaTrainer, held: SftDataset | None) -> None:
    """Say where sampled and inferred keep rates differ, and calibrate the model if the run asks for it.

    What goes wrong is told, and the model stays as it is trained: it is yet to be saved. Every process calls it.
    """
    try:
        if config.train.hard_rate_tolerance < 1:
            _compare(config, trainer)
        if held is not None:
            _calibrate(config, trainer, held)
    except Exception as error:  # whatever it is, the model has been trained and is still to be saved
        if trainer.is_world_process_zero():
            log.warning(
                "the keep rates of the trained model could not be measured (%s: %s), and it is saved without a "
                "calibration; python -m dynamic_llava.calibrate makes up for it",
                type(error).__name__,
                error,
            )


@torch.no_grad()
def measured_rates(trainer: DynamicLlavaTrainer, samples: SftDataset) -> dict[str, tuple[float, float]]:
    """Return, of each rate that training aims at, the shares of the same tokens that training and inference keep.

    Training's are sampled at the temperature of the last step; tokens that training leaves alone do not count.
    """
    step = max(1, len(samples) // COMPARED)
    chosen = Subset(samples, range(0, len(samples), step)[:COMPARED])
    names = trainer.method.keep_rates(trainer.settings)
    totals: dict[str, Tensor] = {}
    for batch in _batches(trainer, chosen):
        batch.pop("unread", None)  # fillers stand in for them
        key = trainer.sample_key(batch.pop("sample_ids"))
        trainer.model.train()
        sampled = trainer.model(**batch, **trainer.switches(), tau=trainer.tau(), sample_key=key, use_cache=False)
        trainer.model.eval()
        inferred = trainer.model(**batch, method=trainer.method, use_cache=False)
        for name, where in tokens_of_rates(sampled.sparsity).items():
            kept = [(record.keep_mask * where).sum() for record in (sampled.sparsity, inferred.sparsity)]
            counts = torch.stack([*kept, where.sum()]).double()
            totals[name] = totals[name] + counts if name in totals else counts
    shares = {name: (counts[:2] / counts[2]).tolist() for name, counts in totals.items() if counts[2] > 0}
    return {name: (shares[name][0], shares[name][1]) for name in names if name in shares}


def _compare(config: RunConfig, trainer: DynamicLlavaTrainer) -> None:
    tolerance = config.train.hard_rate_tolerance
    for name, (sampled, inferred) in measured_rates(trainer, trainer.train_dataset).items():
        if not trainer.is_world_process_zero():
            continue
        log.info("%s at the end: %.3f as training samples, %.3f as inference decides", name, sampled, inferred)
        if abs(sampled - inferred) > tolerance:
            log.warning(
                "%s: training ends with samples that keep %.2f of the tokens, and inference keeps %.2f of them, which "
                "differ by more than train.hard_rate_tolerance=%g; %s",
                name,
                sampled,
                inferred,
                tolerance,
                _remedy(config, trainer, name),
            )


def _remedy(config: RunConfig, trainer: DynamicLlavaTrainer, name: str) -> str:
    """Return what to do about a rate that inference does not meet."""
    method = trainer.method
    decides = {"image_keep_rate": "image_selection", "output_keep_rate": "output_selection"}.get(name)
    if not isinstance(method, Dynamic) or decides is None or getattr(method, decides) != "threshold":
        return "train longer, or raise sparsity.keep_rate_weight"
    ask = f"ask for a rate in each call, such as {name}={trainer.method.keep_rates(trainer.settings)[name]:g}"
    if config.train.calibrate is not None:
        return ask
    return f"calibrate the model (train.calibrate, or python -m dynamic_llava.calibrate), and {ask}"


def _calibrate(config: RunConfig, trainer: DynamicLlavaTrainer, held: SftDataset) -> None:
    """Put the quantiles of the held margins into the settings that are saved with the model."""
    assert config.train.calibrate is not None
    chosen = Subset(held, range(min(config.train.calibrate.samples, len(held))))
    least = config.sparsity.output_min_length
    trainer.model.eval()
    found = margins_of(trainer.model, _batches(trainer, chosen), least, config.train.sparsity_mode)
    if "output" in found and len(found["output"]) < 2:
        raise ValueError(
            f"{config.train.calibrate.json} has {len(found['output'])} answers of {least} tokens among {len(chosen)} "
            "samples, and two are needed"
        )
    settings = trainer.accelerator.unwrap_model(trainer.model).config
    settings.sparsity = replace(settings.sparsity, calibration=calibration_of(found))
    if trainer.is_world_process_zero():
        log.info("%s: calibrated by %d samples of %s", config.run_name, len(chosen), config.train.calibrate.json)


def _batches(trainer: DynamicLlavaTrainer, samples: Subset[Any]) -> Iterator[dict[str, Any]]:
    """Yield batches on the device, `unread` beside them; what goes wrong in one process is raised in all of them."""
    batches = iter(DataLoader(samples, trainer.args.train_batch_size, collate_fn=trainer.data_collator))
    while True:
        batch, failure = None, None
        try:
            batch = next(batches, None)
        except Exception as error:
            failure = error
        agree_on_failure(failure)
        if batch is None:
            return
        unread = {"unread": batch.pop("unread")} if "unread" in batch else {}
        yield {**trainer.on_device(batch), **unread}
