"""LLaVA-format files: a JSON list of samples with `image` (a path or a list) and `conversations`, and an image folder.

A sample: {"id": ..., "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A cat."}]}. Other keys are left alone.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamic_llava.processing.prompts import IMAGE_PLACE, Turn, image_places

QUESTIONER, ANSWERER = "human", "gpt"
REPORTED_ERRORS = 5
"""How many bad samples an error message shows; it counts the others."""


@dataclass(frozen=True)
class LlavaSample:
    """One checked sample: its place in the file, its id, image paths relative to the image folder, and its turns."""

    index: int
    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """Return the raw samples of a LLaVA-format JSON file, unchecked.

    Raises FileNotFoundError when there is no such file, and ValueError when it is no JSON list (cut off, JSON lines).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}; give a LLaVA-format JSON file")
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}; was it cut off, or is it one sample per line?") from None
    if not isinstance(samples, list):
        raise ValueError(f"{path} holds a {type(samples).__name__}; a LLaVA-format file holds a list of samples")
    if not samples:
        raise ValueError(f"{path} holds an empty list; there is nothing to train on")
    return samples


def is_text_only(sample: Any) -> bool:
    """Return whether a raw sample names no image."""
    return isinstance(sample, dict) and not sample.get("image")


def check_samples(
    samples: Sequence[dict[str, Any]], path: str | Path, image_folder: str | Path, *, skip_text_only: bool
) -> Iterator[LlavaSample]:
    """Yield the checked samples in file order; text-only ones are left out with `skip_text_only`.

    After the last one, raises one ValueError that counts the bad samples and shows the first of them with file, index
    and id: missing fields, roles out of order, an image count that differs from the `<image>` places, an image path
    that leaves the image folder, a missing image.
    """
    errors = []
    for index, sample in enumerate(samples):
        if skip_text_only and is_text_only(sample):
            continue
        try:
            yield parse_sample(sample, index, image_folder)
        except (ValueError, FileNotFoundError) as error:
            name = sample.get("id") if isinstance(sample, dict) else None
            errors.append(f"  index {index}, id {name!r}: {error}")
    if errors:
        shown = "\n".join(errors[:REPORTED_ERRORS])
        more = f"\n  ... and {len(errors) - REPORTED_ERRORS} more" if len(errors) > REPORTED_ERRORS else ""
        raise ValueError(f"{path}: {len(errors)} of {len(samples)} samples cannot be used:\n{shown}{more}")


def parse_sample(sample: Any, index: int, image_folder: str | Path) -> LlavaSample:
    """Check one raw sample and return it. Raises ValueError or FileNotFoundError that says what is wrong with it."""
    if not isinstance(sample, dict):
        raise ValueError(f"a sample is a JSON object, this one is a {type(sample).__name__}")
    images = sample.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(f"'image' is {images!r}; give a path or a list of paths")
    turns = _parse_turns(sample.get("conversations"))
    places = sum(image_places(question) for question, _ in turns)
    if places != len(images):
        raise ValueError(f"{len(images)} images are named for {places} {IMAGE_PLACE} places in the questions")
    for image in images:
        resolve_image(image_folder, image)
    return LlavaSample(index, str(sample.get("id", index)), tuple(images), tuple(turns))


def resolve_image(image_folder: str | Path, image: str) -> Path:
    """Return the file of an image path as written in the data.

    Raises ValueError when it is absolute or leaves the image folder (by `..` or through a symbolic link), and
    FileNotFoundError when there is no such file.
    """
    folder = Path(image_folder).resolve()
    path = (folder / image).resolve()
    if Path(image).is_absolute() or not path.is_relative_to(folder):
        raise ValueError(f"image path {image!r} leaves the image folder {folder}; give a path inside it")
    if not path.is_file():
        raise FileNotFoundError(f"image {image!r} is missing from the image folder {folder}")
    return path


def _parse_turns(messages: Any) -> list[Turn]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("'conversations' is missing or no list of messages")
    if messages and messages[0].get("from") == ANSWERER:
        messages = messages[1:]  # LLaVA skips an answer that nobody asked for
    if not messages or len(messages) % 2:
        raise ValueError(
            f"{len(messages)} messages make no whole questions and answers; end with a '{ANSWERER}' message"
        )
    for number, message in enumerate(messages):
        expected = ANSWERER if number % 2 else QUESTIONER
        if message.get("from") != expected:
            raise ValueError(f"message {number} is from {message.get('from')!r} where {expected!r} is due")
        if not isinstance(message.get("value"), str):
            raise ValueError(f"message {number} has no text in 'value'")
        if number % 2 and IMAGE_PLACE in message["value"]:
            raise ValueError(f"message {number} is an answer that holds {IMAGE_PLACE}; images belong into questions")
    values = [message["value"] for message in messages]
    return [(_image_first(question), answer) for question, answer in zip(values[::2], values[1::2], strict=True)]


def _image_first(question: str) -> str:
    """Move a single `<image>` to the front, on its own line, as LLaVA does; several stay where they are written."""
    if image_places(question) != 1:
        return question
    return f"{IMAGE_PLACE}\n{question.replace(IMAGE_PLACE, '').strip()}".strip()
