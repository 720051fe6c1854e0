"""Loading that never leaves a tensor random by accident: only both predictors together may be missing."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

logger = logging.getLogger(__name__)

PREDICTOR_PREFIXES = ("model.language_model.image_predictor.", "model.language_model.output_predictor.")


class CheckedLoading:
    """`from_pretrained` that checks every tensor, and `save_pretrained` with the module's own names."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a llava-hf folder (predictors newly initialised, and said so) or one of ours.

        Raises ValueError when any other tensor is missing, has no place or has another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError("ignore_mismatched_sizes would leave tensors random; repair the checkpoint instead")
        # Mismatches are let through here only to be named in the error below.
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        source = str(args[0]) if args else str(kwargs.get("pretrained_model_name_or_path"))
        check_loaded(source, info)
        return (model, info) if wants_info else model

    @classmethod
    def check_checkpoint(cls, source: str | Path, **kwargs: Any) -> None:
        """Raise ValueError unless the tensors of a checkpoint fit, from their names and shapes: no value is read.

        For loading in parts (ZeRO-3), where transformers reports neither tensors without a place nor, on every process,
        wrong shapes. It comes before transformers knows of DeepSpeed. `kwargs` are those of the configuration.
        """
        config = cls.config_class.from_pretrained(source, **kwargs)  # type: ignore[attr-defined]
        shapes = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(source).items()}
        _, info = super().from_pretrained(  # type: ignore[misc]
            None,
            config=config,
            state_dict=shapes,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        check_loaded(str(source), info)

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        # New predictors depend on torch's seed alone, not on what was drawn while the model was built: ZeRO-3 builds it
        # in another way, and they shall be the same.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            super()._initialize_missing_keys(*args, **kwargs)  # type: ignore[misc]

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # transformers has initialised the missing tensors by now; one clear line replaces its table of them.
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        predictors = {name for name in self.state_dict() if name.startswith(PREDICTOR_PREFIXES)}  # type: ignore[attr-defined]
        if predictors and predictors <= set(loading_info.missing_keys):
            loading_info.missing_keys -= predictors
            logger.warning(
                "a dense checkpoint: the %d predictor tensors are newly initialised; train before sparse inference",
                len(predictors),
            )

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> Any:
        """Save as transformers does, but under the module's own names, which resuming a Trainer needs."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]


def checkpoint_files(source: str | Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder or hub name. OSError where there are none."""
    single = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, "model.safetensors.index.json")
    files, _ = get_checkpoint_shard_files(source, index)
    return [Path(file) for file in files]


def tensor_shapes(source: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint folder or hub name, from the heads of its safetensors files."""
    shapes = {}
    for file in checkpoint_files(source):
        with safe_open(file, framework="pt") as opened:
            shapes.update((name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys())  # noqa: SIM118
    return shapes


def check_loaded(source: str, info: dict[str, Any]) -> None:
    """Raise ValueError unless the loading report of `source` is empty: nothing missing, left over or misshapen."""
    findings = {
        "missing tensors": info["missing_keys"],
        "tensors without a place": info["unexpected_keys"],
        "wrongly shaped tensors": info.get("mismatched_keys", ()),
    }
    problems = [f"{what} {_some(sorted(map(str, names)))}" for what, names in findings.items() if names]
    if problems:
        raise ValueError(
            f"{source} is not a LLaVA-1.5 checkpoint of this configuration: {'; '.join(problems)}. Only both "
            "predictors as a whole may be missing; check that the folder is complete and in llava-hf layout"
        )


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
