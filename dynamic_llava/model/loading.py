"""Loading that never leaves a tensor random by accident: only both predictors together may be missing."""

import logging
from typing import Any

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
