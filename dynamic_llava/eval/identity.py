"""What a model's answers depend on, as settings that two runs can be compared by, key by key: contents, not names."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.reading import shown
from dynamic_llava.eval.tasks import Question
from dynamic_llava.files import file_digest
from dynamic_llava.methods import METHODS, Dynamic, Method, print_method
from dynamic_llava.model.loading import checkpoint_files
from dynamic_llava.processing import DynamicLlavaProcessor

READERS = 4
"""Threads that read images."""
IMAGE = "image"
"""Field of an answer's metadata: a digest of the image that was asked about."""
DIGITS = 16
"""Hexadecimal digits that stand for a digest."""
LATER: dict[str, Any] = {"prompt_threshold": None, "image_threshold": 0.0, "output_window": 0, "output_sinks": 0}
"""Settings of methods that answers of earlier versions do not know, with the value that says the same: left out."""


def model_settings(model: Any, processor: DynamicLlavaProcessor, source: str) -> dict[str, Any]:
    """Return configuration, data type, tokenizer and image settings, and digests of the checkpoint's tensors.

    The folder's name is not in it: a checkpoint may be moved while its answers are made.
    """
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    return {
        "config": config | {"sparsity": _uncalibrated(config["sparsity"])},
        "dtype": str(model.dtype).removeprefix("torch."),
        "end_token": model.generation_config.eos_token_id,
        "processor": {
            "tokenizer": _digest(processor.tokenizer.backend_tokenizer.to_str().encode()),
            "image_size": processor.image_size,
            "patch_size": processor.patch_size,
            "image_mean": processor.image_mean,
            "image_std": processor.image_std,
        },
        "weights": {path.name: file_digest(path)[:DIGITS] for path in checkpoint_files(source)},
    }


def _uncalibrated(sparsity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's settings without its calibration: what it has chosen stands in the method's settings."""
    return {name: value for name, value in sparsity.items() if name != "calibration"}


def method_settings(method: Method, config: SparsityConfig) -> dict[str, Any]:
    """Return what decides: `sparsity` where a checkpoint's own settings do, else `method` with all of its settings.

    Of a class that is not this library's, the content of its file belongs to it.
    """
    if method.is_dense:
        return {"sparsity": "none"}
    if isinstance(method, Dynamic) and method == Dynamic.from_config(config, method.sparsity):
        return {"sparsity": method.sparsity}
    found: dict[str, Any] = {"method": _as_before(print_method(method))}
    source = inspect.getsourcefile(type(method))
    if found["method"]["name"] not in METHODS and source is not None:
        found["method"] |= {"file": file_digest(Path(source))[:DIGITS]}
    return found


def _as_before(printed: Mapping[str, Any]) -> dict[str, Any]:
    """Return a printed method without what is `LATER` in it, or in a method of its settings."""
    said = {name: value for name, value in printed.items() if name not in LATER or value != LATER[name]}
    return {name: _as_before(value) if isinstance(value, Mapping) else value for name, value in said.items()}


def question_settings(questions: Sequence[Question]) -> dict[str, Any]:
    """Return number and digest of a task's questions and of the images' names; their contents: `check_images`."""
    lines = [
        [one.id, one.text, one.logged_prompt, None if one.image is None else one.image.name, dict(one.extra)]
        for one in questions
    ]
    return {"count": len(questions), "digest": _digest(json.dumps(lines, default=str).encode())}


def image_digest(question: Question) -> str | None:
    """Return what an answer line records of the content of its question's image; None without one.

    OSError or ValueError where it cannot be read.
    """
    return None if question.image is None else question.image.digest()[:DIGITS]


def check_images(
    file: Path, done: Mapping[int, AnswerLine], places: Sequence[int], questions: Sequence[Question]
) -> None:
    """Raise ValueError when an image at one of the places is another than the one that was answered about.

    Images of questions without an answer may change, so that a broken one can be mended. `done` is place -> answer, and
    `file` holds the answers.
    """
    asked = [place for place in places if place in done and IMAGE in done[place].metadata]

    def changed(place: int) -> bool:
        try:
            return image_digest(questions[place]) != done[place].metadata[IMAGE]
        except (OSError, ValueError):
            return True

    with ThreadPoolExecutor(READERS) as pool:
        others = [place for place, other in zip(asked, pool.map(changed, asked), strict=True) if other]
    if others:
        names = dict.fromkeys(questions[place].image.name for place in others)
        raise ValueError(
            f"images are others than those that were answered about ({file}), or cannot be read any more: "
            f"{shown(names)}; put them back, or choose another output folder"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
