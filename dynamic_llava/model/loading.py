"""Loading that never leaves a tensor random by accident: only predictors may be missing from a checkpoint."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

PREDICTOR_PREFIXES = ("model.language_model.image_predictor.", "model.language_model.output_predictor.")


class CheckedLoading:
    """`from_pretrained` that checks every tensor, and `save_pretrained` with the module's own names."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a llava-hf folder (predictors newly initialised, and said so) or one of ours.

        Raises ValueError when a tensor other than a predictor's is missing, has no place or has another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("ignore_mismatched_sizes"):
            raise ValueError("ignore_mismatched_sizes would leave tensors random; repair the checkpoint instead")
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except RuntimeError as error:
            if "ismatch" not in str(error):
                raise
            raise ValueError(f"the checkpoint does not fit the model: {error}") from error
        source = str(args[0]) if args else str(kwargs.get("pretrained_model_name_or_path"))
        check_loaded(source, info)
        return (model, info) if wants_info else model

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> Any:
        """Save as transformers does, but under the module's own names, which resuming a Trainer needs."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]


def check_loaded(source: str, info: dict[str, Any]) -> None:
    """Raise ValueError unless the loading report of `source` shows nothing wrong; log newly initialised predictors."""
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if not name.startswith(PREDICTOR_PREFIXES)]
    problems = [f"missing tensors {_some(lost)}"] if lost else []
    if info["unexpected_keys"]:
        problems.append(f"tensors without a place {_some(sorted(info['unexpected_keys']))}")
    if info.get("mismatched_keys"):
        problems.append(f"wrongly shaped tensors {_some(sorted(map(str, info['mismatched_keys'])))}")
    if problems:
        raise ValueError(
            f"{source} is not a LLaVA-1.5 checkpoint of this configuration: {'; '.join(problems)}. Only predictor "
            "tensors may be missing; check that the folder is complete and in llava-hf layout"
        )
    if missing:
        logger.warning(
            "%s is a dense checkpoint: its %d predictor tensors are newly initialised; train before sparse inference",
            source,
            len(missing),
        )


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
