"""A run's folder that holds a finished model: what it was trained with, and whether that is what is asked for now."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynamic_llava.config.run import NOT_COMPARED, RunConfig, flat
from dynamic_llava.files import replace_file, writing
from dynamic_llava.train.config import (
    COMPARED_BY_CONTENT,
    SAMPLES_PER_STEP,
    changed_inputs,
    changes,
    compared_settings,
)

log = logging.getLogger(__name__)

MODEL_SETTINGS = "run.yaml"
"""In a trained model's folder: the settings it was trained with (the run's config.yaml: those of the latest start)."""
MODEL_RECORD = "trained_with.json"
"""Beside it: the settings as they are compared, the number of processes, and what the files held."""


@dataclass(frozen=True)
class RunResult:
    """Where a run's files are, and its numbers."""

    folder: Path
    """The trained checkpoint: safetensors, config.json and processor files; `from_pretrained` loads it."""
    run_folder: Path
    """The run's folder: config.yaml, environment.json, metrics.jsonl, checkpoints to resume from, and the model."""
    metrics: dict[str, float]
    """Values of the last logged window, plus train_seconds and steps."""
    history: list[dict[str, float]]
    """Every logged line."""


def is_finished(folder: Path) -> bool:
    """Whether a run's folder holds a model, which appears in it only when it is whole."""
    return (folder / "model" / "config.json").is_file()


def write_record(model: Path, config: RunConfig, processes: int, inputs: Mapping[str, str]) -> None:
    """Write what a model was trained with into its folder."""
    record = {"settings": compared_settings(config, processes), "processes": processes, "inputs": dict(inputs)}
    replace_file(model / MODEL_RECORD, json.dumps(record, indent=1) + "\n")


def trained_otherwise(config: RunConfig, inputs: Mapping[str, str], processes: int | None = None) -> list[str]:
    """Return in what the model of a run's folder differs from what `config` and `inputs` ask for, a line each.

    `inputs` (`file_inputs` or all of `run_inputs`) are compared as far as they are given, but for the
    DeepSpeed file, which changes no finished model; `processes` None stands for as many as there were then. Raises
    ValueError when the folder does not say how the model was trained.
    """
    model = config.folder / "model"
    then, before, recorded = _record(model)
    now = compared_settings(config, before if processes is None else processes)
    if recorded is None:
        now[SAMPLES_PER_STEP] = then.get(SAMPLES_PER_STEP, now[SAMPLES_PER_STEP])
        return changes(then, now)
    kinds = {name.split("/")[0] for name in inputs if not name.startswith("train.deepspeed")}
    old, new = ({n: v for n, v in some.items() if n.split("/")[0] in kinds} for some in (recorded, inputs))
    return [*changes(then, now, leave_out=COMPARED_BY_CONTENT & kinds), *changed_inputs(old, new)]


def finished_result(config: RunConfig, inputs: Mapping[str, str], processes: int) -> RunResult:
    """Return the result of the finished run whose folder this is.

    Raises ValueError, naming every difference, when it was trained with other settings or inputs.
    """
    if found := trained_otherwise(config, inputs, processes):
        raise ValueError(
            f"{config.folder} holds a finished model of another run: {'; '.join(found)}. Choose another name (--name "
            "NEW), or train over it with train.overwrite: true (--train.overwrite): model and checkpoints are removed"
        )
    lines = _lines(config.folder / "metrics.jsonl")
    history = [line for line in lines if "lm_loss" in line]
    seconds = next((line["train_runtime"] for line in reversed(lines) if "train_runtime" in line), 0.0)
    metrics = {**(history[-1] if history else {}), "train_seconds": seconds}
    metrics["steps"] = metrics.get("step", 0)
    anew = "train.overwrite: true (--train.overwrite) trains it anew"
    log.info("%s: finished already, nothing to do; the model is %s; %s", config.run_name, config.folder / "model", anew)
    return RunResult(config.folder / "model", config.folder, metrics, history)


def remove_finished(folder: Path) -> None:
    """Remove a finished run's model and adapter."""
    with writing(folder):
        for name in ("model", "adapter"):
            if (folder / name).exists():
                log.warning("train.overwrite is true: %s is removed", folder / name)
                shutil.rmtree(folder / name)


def _record(model: Path) -> tuple[dict[str, Any], int, dict[str, str] | None]:
    """Return settings, processes and inputs of a model; the inputs are None where they were not recorded yet."""
    record, settings = model / MODEL_RECORD, model / MODEL_SETTINGS
    try:
        if record.is_file():
            found = json.loads(record.read_text(encoding="utf-8"))
            settled, processes, inputs = found["settings"], found["processes"], found["inputs"]
            if not isinstance(settled, dict) or not isinstance(processes, int) or not isinstance(inputs, dict):
                raise TypeError("settings and inputs are no objects, or processes is no whole number")
            return settled, processes, inputs
        if settings.is_file():
            values = flat(yaml.safe_load(settings.read_text(encoding="utf-8")))
            batch = values.get("train.batch_size", 1) * values.get("train.gradient_accumulation", 1)
            return {n: v for n, v in values.items() if n not in NOT_COMPARED} | {SAMPLES_PER_STEP: batch}, 1, None
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        file = record if record.is_file() else settings
        raise ValueError(
            f"{file} does not say how the model was trained: {type(error).__name__}, {error}; move {model.parent} away"
        ) from None
    raise ValueError(f"{model} has no {MODEL_SETTINGS} that says how it was trained; move {model.parent} away")


def _lines(file: Path) -> list[dict[str, float]]:
    if not file.is_file():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # cut off
    return found
