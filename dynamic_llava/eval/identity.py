"""What a model's answers depend on, as settings that two runs can be compared by, key by key."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dynamic_llava.eval.tasks import Question
from dynamic_llava.model.loading import checkpoint_files
from dynamic_llava.processing import DynamicLlavaProcessor

READ_WHOLE = 2**28
"""Largest file of tensors, in bytes, that is read for its digest; of a larger one head, size and date stand for it."""


def model_settings(model: Any, processor: DynamicLlavaProcessor, source: str) -> dict[str, Any]:
    """Return configuration, data type, tokenizer and image settings, and digests of the checkpoint's tensors.

    The folder's name is not in it: a checkpoint may be moved (with its files' dates) while its answers are made.
    """
    config = model.config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        config.pop(name, None)
    return {
        "config": config,
        "dtype": str(model.dtype).removeprefix("torch."),
        "end_token": model.generation_config.eos_token_id,
        "processor": {
            "tokenizer": _digest(processor.tokenizer.backend_tokenizer.to_str().encode()),
            "image_size": processor.image_size,
            "patch_size": processor.patch_size,
            "image_mean": processor.image_mean,
            "image_std": processor.image_std,
        },
        "weights": {path.name: file_digest(path) for path in checkpoint_files(source)},
    }


def question_settings(questions: list[Question]) -> dict[str, Any]:
    """Return number and digest of a task's questions; which images they name belongs to it, the pixels do not."""
    lines = [
        [one.id, one.text, one.logged_prompt, None if one.image is None else one.image.name, dict(one.extra)]
        for one in questions
    ]
    return {"count": len(questions), "digest": _digest(json.dumps(lines, default=str).encode())}


def file_digest(path: Path) -> str:
    """Return what tells a safetensors file from another: a digest of its bytes, or, of a large one, of its head.

    A large one's size and date come with it. Every tensor's name, shape and place stand in the head.
    """
    found = path.stat()
    if found.st_size <= READ_WHOLE:
        return _digest(path.read_bytes())
    with path.open("rb") as file:
        head = file.read(int.from_bytes(file.read(8), "little"))
    return f"{_digest(head)} of its head, {found.st_size} bytes, changed {found.st_mtime_ns}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
