"""LLaVA-format files: a JSON list of samples with `image` (a path or a list) and `conversations`, and an image folder.

A sample: {"id": ..., "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A cat."}]}. Other keys are left alone.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dynamic_llava.data.json_stream import stream_list
from dynamic_llava.processing.prompts import IMAGE_PLACE, Turn, image_places

QUESTIONER, ANSWERER = "human", "gpt"

BAD_FIELD = "missing or wrong field"
BAD_ROLE = "role out of order"
BAD_PLACES = "images and <image> places differ"
OUTSIDE = "image path leaves the folder"
MISSING = "missing image"


class SampleError(ValueError):
    """A sample that cannot be trained on; `kind` is one of the kinds above."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class LlavaSample:
    """One checked sample: its place in the file, its id, image paths relative to the image folder, and its turns."""

    index: int
    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def read_samples(path: str | Path) -> Iterator[Any]:
    """Yield the raw samples of a LLaVA-format JSON file, unchecked, with little of the file in memory.

    Raises FileNotFoundError when there is no such file, and ValueError when it is no JSON list (cut off, JSON lines).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}; give a LLaVA-format JSON file")
    with path.open("rb") as file:
        yield from stream_list(file, str(path))


def is_text_only(sample: Any) -> bool:
    """Return whether a raw sample names no image."""
    return isinstance(sample, dict) and not sample.get("image")


def parse_sample(sample: Any, index: int, image_folder: str | Path) -> LlavaSample:
    """Check one raw sample and return it. Raises the first of its `find_problems`, a SampleError."""
    for problem in find_problems(sample, image_folder):
        raise problem
    return sound_sample(sample, index)


def sound_sample(sample: dict[str, Any], index: int) -> LlavaSample:
    """Return a raw sample that has no problems."""
    messages = [message["value"] for message in _asked(sample["conversations"])]
    turns = [(_image_first(question), answer) for question, answer in zip(messages[::2], messages[1::2], strict=True)]
    return LlavaSample(index, str(sample.get("id", index)), tuple(_images(sample)), tuple(turns))


def find_problems(sample: Any, image_folder: str | Path) -> list[SampleError]:
    """Return all that keeps one raw sample from being trained on: fields, roles, places and files of its images.

    Images are looked for, not opened. A blank answer is no problem (the published mixture has one): it is not learned.
    """
    if not isinstance(sample, dict):
        return [SampleError(BAD_FIELD, f"a sample is a JSON object, this one is a {type(sample).__name__}")]
    messages, images = sample.get("conversations"), _images(sample)
    found = list(_message_problems(messages))
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        return [*found, SampleError(BAD_FIELD, f"'image' is {images!r}; give a path or a list of paths")]
    if not found:
        places = sum(image_places(message["value"]) for message in _asked(messages))
        if places != len(images):
            wrong = f"{len(images)} images are named for {places} {IMAGE_PLACE} places in the questions"
            found.append(SampleError(BAD_PLACES, wrong))
    for image in images:
        try:
            resolve_image(image_folder, image)
        except FileNotFoundError as error:
            found.append(SampleError(MISSING, str(error)))
        except ValueError as error:
            found.append(SampleError(OUTSIDE, str(error)))
    if not all(map(_is_text, [str(sample.get("id")), *images])):
        found.append(SampleError(BAD_FIELD, "'id' or 'image' holds half a character (an unpaired surrogate)"))
    return found


def resolve_image(image_folder: str | Path, image: str) -> Path:
    """Return the file of an image path as written in the data; asks the file system once, for an ordinary file.

    Raises ValueError when it is absolute or leaves the image folder (by `..` or through a symbolic link), and
    FileNotFoundError when there is no such file.
    """
    top = os.path.abspath(image_folder)
    leaves = ValueError(f"image path {image!r} leaves the image folder {top}; give a path inside it")
    try:
        parent, name = os.path.split(image)
        folder, inside = _resolve_folders(top, parent)
        path = inside / name
        if os.path.isabs(image) or not inside.is_relative_to(folder):
            raise leaves
        if stat.S_ISREG(path.lstat().st_mode):
            return path
        path = path.resolve()
        if not path.is_relative_to(folder):
            raise leaves
        if path.is_file():
            return path
    except OSError:
        pass  # a missing folder and an overlong name are missing files, too
    except (ValueError, RuntimeError) as error:  # a null character; symbolic links in a circle
        if error is leaves:
            raise
        raise ValueError(f"image path {image!r} is no path of a file ({error}); give a path inside {top}") from None
    raise FileNotFoundError(f"image {image!r} is missing from the image folder {top}")


@lru_cache(maxsize=4096)
def _resolve_folders(top: str, parent: str) -> tuple[Path, Path]:
    """Return the image folder and a folder below it without symbolic links; samples share few folders."""
    return Path(top).resolve(), Path(top, parent).resolve()


def _images(sample: dict[str, Any]) -> Any:
    images = sample.get("image") or []
    return [images] if isinstance(images, str) else images


def _asked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out a first answer that nobody asked for, as LLaVA does."""
    return messages[1:] if messages and messages[0].get("from") == ANSWERER else messages


def _message_problems(messages: Any) -> Iterator[SampleError]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        yield SampleError(BAD_FIELD, "'conversations' is missing or no list of messages")
        return
    messages = _asked(messages)
    expected = [ANSWERER if number % 2 else QUESTIONER for number in range(len(messages))]
    wrong = [number for number, message in enumerate(messages) if message.get("from") != expected[number]]
    if wrong:  # the first only: one message too many displaces all that follow
        given = messages[wrong[0]].get("from")
        yield SampleError(BAD_ROLE, f"message {wrong[0]} is from {given!r} where {expected[wrong[0]]!r} is due")
    elif not messages or len(messages) % 2:
        count = f"{len(messages)} messages make no whole questions and answers"
        yield SampleError(BAD_ROLE, f"{count}; end with a '{ANSWERER}' message")
    for number, message in enumerate(messages):
        text = message.get("value")
        if not isinstance(text, str):
            yield SampleError(BAD_FIELD, f"message {number} has no text in 'value'")
        elif not _is_text(text):
            yield SampleError(BAD_FIELD, f"message {number} holds half a character (an unpaired surrogate)")
        elif number % 2 and IMAGE_PLACE in text:
            wrong_place = f"message {number} is an answer that holds {IMAGE_PLACE}; images belong into questions"
            yield SampleError(BAD_PLACES, wrong_place)


def _is_text(text: str) -> bool:
    """Return whether `text` can be written; JSON can spell halves of characters that no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image_first(question: str) -> str:
    """Move a single `<image>` to the front, on its own line, as LLaVA does; several stay where they are written."""
    if image_places(question) != 1:
        return question
    return f"{IMAGE_PLACE}\n{question.replace(IMAGE_PLACE, '').strip()}".strip()
