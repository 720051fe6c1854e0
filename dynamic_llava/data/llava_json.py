"""LLaVA-format files: a JSON list of samples, each with its images and its conversation, and an image folder.

A sample is written in LLaVA's words or in those of chat messages; both give the same training sample:

    {"id": ..., "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                      {"from": "gpt", "value": "A cat."}]}
    {"id": ..., "images": ["a/b.jpg"], "messages": [{"role": "user", "content": "<image>\\nWhat is it?"},
                                                    {"role": "assistant", "content": "A cat."}]}

`image` and `images` take a path or a list of paths. A `content` may be a list of parts {"type": "text", "text": ...}
and {"type": "image"}; an image part is a place, and may name its image itself under "image", "path" or "url". A first
message from "system" replaces the system text. Other keys are left alone, except where a sample without images has one
that looks as if it named an image, a video or a sound: such a sample is refused, not taken for text.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dynamic_llava.data.json_stream import stream_list
from dynamic_llava.files import brief_text
from dynamic_llava.processing.images import check_header
from dynamic_llava.processing.messages import IMAGE_SOURCES
from dynamic_llava.processing.prompts import IMAGE_PLACE, Turn, image_places

BAD_FIELD = "missing or wrong field"
BAD_ROLE = "role out of order"
BAD_PLACES = "images and <image> places differ"
OUTSIDE = "image path leaves the folder"
MISSING = "missing image"
UNREADABLE = "unreadable image"
BROKEN_KINDS = (MISSING, UNREADABLE)
"""Kinds whose samples `data.broken: skip` leaves out."""

IMAGE_KEYS = ("image", "images")
CONVERSATION_KEYS = ("conversations", "messages")
MEDIA = re.compile(r"image|img|picture|photo|video|audio|sound|frame", re.IGNORECASE)
FILE_NAME = re.compile(r"\S+[/\\]\S+|\S+\.\w{2,5}")
"""Patterns of a key and of its value that may name an image, a video or a sound: no caption, number or size."""
SHOWN = 80
"""Characters of a wrong value that a message shows."""


class Words(NamedTuple):
    """The keys of a message, and its two speakers."""

    speaker: str
    text: str
    questioner: str
    answerer: str


LLAVA = Words("from", "value", "human", "gpt")
CHAT = Words("role", "content", "user", "assistant")
SYSTEM_SPEAKER = "system"


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
    system: str | None = None
    """A system text of its own; None: the model's."""
    is_chat: bool = False
    """Whether the sample was written as role/content messages."""


@dataclass
class _Reading:
    """A raw sample as far as it can be read, whatever is wrong with it."""

    images: list[str] = field(default_factory=list)
    words: Words = LLAVA
    system: str | None = None
    first: int = 0
    """Place of the first question: a system text and an answer that nobody asked for come before it."""
    speakers: list[Any] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    """Of the messages from the first question on; an image part is an `<image>` place. What is no str is no text."""
    problems: list[SampleError] = field(default_factory=list)
    """Why it cannot be read; what its messages say is judged afterwards."""

    @property
    def places(self) -> int:
        """Return how many images are asked for, by whichever messages that are no answers."""
        spoken = zip(self.speakers, self.texts, strict=True)
        return sum(image_places(text) for speaker, text in spoken if speaker != self.words.answerer)

    @property
    def is_text(self) -> bool:
        """Whether every message is a text."""
        return all(isinstance(text, str) for text in self.texts)


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
    """Return whether a raw sample is a conversation that neither names an image nor asks for one.

    A sample that cannot be read, and one whose image is not where images are looked for, is none: it has problems.
    """
    if not isinstance(sample, dict):
        return False
    reading = _read(sample)
    is_read = not reading.problems and reading.is_text
    return is_read and not (reading.images or reading.places or _media_keys(sample))


def parse_sample(sample: Any, index: int, image_folder: str | Path) -> LlavaSample:
    """Check one raw sample and return it. Raises the first of its `find_problems`, a SampleError."""
    for problem in find_problems(sample, image_folder):
        raise problem
    return sound_sample(sample, index)


def sound_sample(sample: dict[str, Any], index: int) -> LlavaSample:
    """Return a raw sample that has no problems."""
    reading = _read(sample)
    pairs = zip(reading.texts[::2], reading.texts[1::2], strict=True)
    turns = tuple((_image_first(question), answer) for question, answer in pairs)
    name, is_chat = str(sample.get("id", index)), reading.words is CHAT
    return LlavaSample(index, name, tuple(reading.images), turns, reading.system, is_chat)


def find_problems(
    sample: Any, image_folder: str | Path, look: Callable[[Path], object] = check_header
) -> list[SampleError]:
    """Return all that keeps one raw sample from being trained on: fields, roles, places and files of its images.

    `look` is called with each image file and raises ValueError or OSError for one that cannot be read: by default the
    header alone is read. A blank answer is no problem (the published mixture has one): it is not learned.
    """
    if not isinstance(sample, dict):
        return [SampleError(BAD_FIELD, f"a sample is a JSON object, this one is a {type(sample).__name__}")]
    reading = _read(sample)
    found = reading.problems or list(_message_problems(reading)) or list(_place_problems(reading, sample))
    for image in reading.images:
        try:
            file = resolve_image(image_folder, image)
        except FileNotFoundError as error:
            found.append(SampleError(MISSING, str(error)))
        except ValueError as error:
            found.append(SampleError(OUTSIDE, str(error)))
        else:
            found += _file_problems(file, look)
    if not all(map(_is_text, [str(sample.get("id")), *reading.images])):
        found.append(SampleError(BAD_FIELD, "'id' or 'image' holds half a character (an unpaired surrogate)"))
    return found


def resolve_image(image_folder: str | Path, image: str) -> Path:
    """Return the file of an image path as written in the data; asks the file system once, for an ordinary file.

    Raises ValueError when it is absolute or leaves the image folder (by `..` or through a symbolic link), and
    FileNotFoundError when there is no such file.
    """
    top = os.path.abspath(image_folder)
    leaves = ValueError(f"image path {brief_text(image)!r} leaves the image folder {top}; give a path inside it")
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
        raise ValueError(
            f"image path {brief_text(image)!r} is no path of a file ({error}); give a path inside {top}"
        ) from None
    raise FileNotFoundError(f"image {brief_text(image)!r} is missing from the image folder {top}")


@lru_cache(maxsize=4096)
def _resolve_folders(top: str, parent: str) -> tuple[Path, Path]:
    """Return the image folder and a folder below it without symbolic links; samples share few folders."""
    return Path(top).resolve(), Path(top, parent).resolve()


def _read(sample: dict[str, Any]) -> _Reading:
    """Read a raw sample in either way of writing it; what is wrong is noted, never raised."""
    reading = _Reading()
    images = _value_of(sample, IMAGE_KEYS, reading)
    reading.images = [images] if isinstance(images, str) else [] if images is None else images
    if not isinstance(reading.images, list) or not all(isinstance(image, str) and image for image in reading.images):
        key = next(key for key in IMAGE_KEYS if sample.get(key) is images)
        reading.images = []
        reading.problems.append(SampleError(BAD_FIELD, f"{key!r} is {_short(images)}; give a path or a list of paths"))
    messages = _value_of(sample, CONVERSATION_KEYS, reading)
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        _read_messages(reading, messages)
    else:
        why = "'conversations' is missing or no list of messages, and so is 'messages'"
        reading.problems.append(SampleError(BAD_FIELD, why))
    return reading


def _value_of(sample: dict[str, Any], keys: tuple[str, ...], reading: _Reading) -> Any:
    """Return the value under the one of `keys` that has any; null, "" and an empty list stand for none."""
    given = [key for key in keys if sample.get(key) not in (None, "", [])]
    if len(given) > 1:
        both = " and ".join(map(repr, given))
        reading.problems.append(SampleError(BAD_FIELD, f"{both} are both given and mean the same; keep one of them"))
    if given:
        return sample[given[0]]
    return [] if any(sample.get(key) == [] for key in keys) else None


def _read_messages(reading: _Reading, messages: list[dict[str, Any]]) -> None:
    is_chat = any(CHAT.speaker in message or CHAT.text in message for message in messages)
    reading.words = words = CHAT if is_chat else LLAVA
    in_parts: list[Any] = []
    speakers = [message.get(words.speaker) for message in messages]
    texts = [_text(message.get(words.text), in_parts) if is_chat else message.get(words.text) for message in messages]
    if speakers[:1] == [SYSTEM_SPEAKER]:
        reading.first, reading.system = 1, texts[0]
        reading.problems += _text_problems(texts[0], 0, words, "a system text")
    if speakers[reading.first : reading.first + 1] == [words.answerer]:
        reading.first += 1  # LLaVA leaves it out, too
    reading.speakers, reading.texts = speakers[reading.first :], texts[reading.first :]
    named = [image for image in in_parts if image is not None]
    if not all(isinstance(image, str) and image for image in named):
        wrong = next(image for image in named if not isinstance(image, str) or not image)
        sources = ", ".join(map(repr, IMAGE_SOURCES))
        why = f"an image part names its image as {_short(wrong)}; give a path under one of {sources}"
        reading.problems.append(SampleError(BAD_FIELD, why))
    elif named and (reading.images or len(named) < len(in_parts)):
        why = "some images are named in the messages and others are not; name all of them there, or all under 'images'"
        reading.problems.append(SampleError(BAD_FIELD, why))
    else:
        reading.images = [*reading.images, *named]


def _text(content: Any, in_parts: list[Any]) -> Any:
    """Return a chat message's text, its parts on lines of their own as the processor has them; note their images."""
    if not isinstance(content, list):
        return content
    lines = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            lines.append(part["text"])
        elif kind == "image":
            sources = [part[key] for key in part if key != "type"]
            is_named = len(sources) == 1 and any(key in part for key in IMAGE_SOURCES)
            in_parts.append(sources[0] if is_named else part if sources else None)
            lines.append(IMAGE_PLACE)
        else:
            return part  # which is no text, and named as such
    return "\n".join(lines)


def _message_problems(reading: _Reading) -> Iterator[SampleError]:
    words, speakers = reading.words, reading.speakers
    expected = [words.answerer if number % 2 else words.questioner for number in range(len(speakers))]
    wrong = [number for number, speaker in enumerate(speakers) if speaker != expected[number]]
    if wrong:  # the first only: one message too many displaces all that follow
        given, due = _short(speakers[wrong[0]]), expected[wrong[0]]
        yield SampleError(BAD_ROLE, f"message {wrong[0] + reading.first} is from {given} where {due!r} is due")
    elif not speakers or len(speakers) % 2:
        count = f"{len(speakers)} messages make no whole questions and answers"
        yield SampleError(BAD_ROLE, f"{count}; end with a {words.answerer!r} message")
    for number, text in enumerate(reading.texts):
        yield from _text_problems(text, number + reading.first, words, "an answer" if number % 2 else None)


def _text_problems(text: Any, number: int, words: Words, without_images: str | None) -> Iterator[SampleError]:
    """Yield what is wrong with the text of message `number`; `without_images` names what may hold no image."""
    if not isinstance(text, str):
        given = "" if text is None else f" but {_short(text)}"
        yield SampleError(BAD_FIELD, f"message {number} has no text in {words.text!r}{given}")
    elif not _is_text(text):
        yield SampleError(BAD_FIELD, f"message {number} holds half a character (an unpaired surrogate)")
    elif without_images and IMAGE_PLACE in text:
        why = f"message {number} is {without_images} that holds {IMAGE_PLACE}; images belong into questions"
        yield SampleError(BAD_PLACES, why)


def _place_problems(reading: _Reading, sample: dict[str, Any]) -> Iterator[SampleError]:
    """Yield why the images do not fit the places in the questions, and what may be meant to name them."""
    unread = "" if reading.images else " and ".join(map(repr, _media_keys(sample)))
    if len(reading.images) != reading.places:
        why = f"{len(reading.images)} images are named for {reading.places} {IMAGE_PLACE} places in the questions"
        hint = f"; {unread} is not read: name images under 'image'" if unread else ""
        yield SampleError(BAD_PLACES, why + hint)
    elif unread:
        why = f"{unread} is not read: name images under 'image', and leave out samples with a video or a sound"
        yield SampleError(BAD_FIELD, why)


def _media_keys(values: dict[str, Any]) -> list[str]:
    """Return the keys of a sample that seem to name a file of an image, a video or a sound and are not read."""
    read = (*IMAGE_KEYS, *CONVERSATION_KEYS)
    named = [key for key, value in values.items() if key not in read and MEDIA.search(key) and _names_file(value)]
    for key, value in values.items():
        if key not in read and isinstance(value, dict):
            named += [f"{key}.{inner}" for inner in value if MEDIA.search(inner) and _names_file(value[inner])]
    return named


def _names_file(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_names_file, value))
    if isinstance(value, dict):
        return any(map(_names_file, value.values()))
    return isinstance(value, str) and FILE_NAME.fullmatch(value) is not None


def _file_problems(file: Path, look: Callable[[Path], object]) -> Iterator[SampleError]:
    try:
        look(file)
    except (ValueError, OSError) as error:
        yield SampleError(UNREADABLE, str(error))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


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
