"""How a processor may be called: transformers' calling convention, sorted and checked before anything is made.

Whatever transformers' LlavaProcessor takes is taken, or refused with the argument's name and a way out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynamic_llava.files import brief_text
from dynamic_llava.processing.image_processor import ImageInput, as_images
from dynamic_llava.processing.prompts import IMAGE_PLACE, ImageCutError, image_places

PADDING_SIDES = ("left", "right")
TENSORS = ("pt", "np", None)
"""What `return_tensors` may be: torch, numpy, or lists."""
MODALITIES = ("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs")
_LONGEST, _TO_LENGTH, _NOT = (True, "longest"), "max_length", (False, None, "do_not_pad")
_CUT, _WHOLE = (True, "longest_first", "only_first"), (False, None, "do_not_truncate")
_READ = (
    "padding", "padding_side", "pad_to_multiple_of", "truncation", "max_length", "add_special_tokens",
    "return_attention_mask", "return_mm_token_type_ids", "return_tensors", "verbose",
)  # fmt: skip
_UNLIMITED = 10**9
"""transformers' own `model_max_length` where a tokenizer has none is larger."""


@dataclass(frozen=True)
class TextOptions:
    """What becomes of the rows of ids; the words are those of transformers' tokenizers."""

    padding: Any = True
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    """Length that `padding="max_length"` pads to and truncation cuts to."""
    truncates: bool = False
    truncation_side: str = "right"
    add_special_tokens: bool = True
    return_attention_mask: bool = True
    return_mm_token_type_ids: bool = False
    return_tensors: str | None = "pt"

    def cut(self, row: list[int], image_token_id: int) -> list[int]:
        """Return a row that is no longer than max_length. Raises ImageCutError where an image would lose tokens."""
        if not self.truncates or self.max_length is None or len(row) <= self.max_length:
            return row
        keeps_end = self.truncation_side == "left"
        lost = row[: -self.max_length] if keeps_end else row[self.max_length :]
        if image_token_id in lost:
            raise ImageCutError(
                f"a row has {len(row)} tokens and truncation to max_length={self.max_length} would cut an image; raise "
                "max_length, or give max_length=None or truncation=False"
            )
        return row[-self.max_length :] if keeps_end else row[: self.max_length]

    def width(self, lengths: Sequence[int]) -> int | None:
        """Return the length that all rows are padded to; None where they stay as they are."""
        if self.padding in _NOT:
            return None
        longest = max(lengths)
        width = max(longest, self.max_length or 0) if self.padding == _TO_LENGTH else longest
        step = self.pad_to_multiple_of or 1
        return -(-width // step) * step


def sort_inputs(given: Sequence[Any], images: Any, text: Any) -> tuple[Any, Any]:
    """Return (images, text) of what was given by place, in either order, and by name.

    By place images come first, as in transformers; a text is recognised by its type, and where both are strings (an
    image may be a file's name) by its `<image>`. Raises ValueError for more than is offered.
    """
    if len(given) > 2:
        raise ValueError(
            f"{len(given)} inputs were given by place; give images and text, videos and audio are not read"
        )
    named = [name for name, value in (("images", images), ("text", text)) if value is not None]
    if len(given) + len(named) > 2:
        raise ValueError(f"{len(given)} inputs were given by place, and {' and '.join(named)} by name; give each once")
    if not given:
        return images, text
    if len(given) == 1:
        is_empty = isinstance(given[0], list | tuple) and not given[0]
        is_text = text is None and (is_empty or _is_text(given[0]))
        return (images, given[0]) if is_text else (_free(images, given[0]), text)
    first, second = given
    if first is None or second is None:
        present = second if first is None else first
        return (None, present) if _is_text(present) else (present, None)
    swapped = _is_text(first) and (not _is_text(second) or (_asks(first) and not _asks(second)))
    return (second, first) if swapped else (first, second)


def _free(images: Any, given: Any) -> Any:
    if images is not None:
        raise ValueError("images were given twice, by place and by name; give the text by place or as text=...")
    return given


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(one, str) for one in value)
    )


def _asks(value: Any) -> bool:
    return any(IMAGE_PLACE in text for text in ([value] if isinstance(value, str) else value))


def read_texts(text: Any) -> list[str] | None:
    """Return the texts as a list. Raises ValueError for anything but a text or a list of them."""
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        raise ValueError(
            f"text is {_kind(text)}; give a text or a list of texts (chat messages go to apply_chat_template)"
        )
    if not texts:
        raise ValueError("an empty list of texts was given; give at least one")
    return list(texts)


def read_images(texts: Sequence[str] | None, images: Any) -> list[ImageInput]:
    """Return the images as one flat list after comparing them with the `<image>` places of the texts."""
    given = as_images(images)
    if texts is None:
        return [image for row in given for image in (row if isinstance(row, list) else [row])]
    wanted = [image_places(text) for text in texts]
    if any(isinstance(row, list) for row in given):
        counts = [len(row) for row in given]
        if counts != wanted:
            raise ValueError(
                f"images per row {counts} do not match the {IMAGE_PLACE} places per text {wanted}; "
                "give one list of images per text, as long as the text has places"
            )
        return [image for row in given for image in row]
    if len(given) != sum(wanted):
        raise ValueError(
            f"{len(given)} images were given for {sum(wanted)} {IMAGE_PLACE} places (per text: {wanted}); "
            f"write one {IMAGE_PLACE} per image into the texts"
        )
    return given


def merge(processor: Any, arguments: Mapping[str, Any]) -> tuple[TextOptions, dict[str, Any]]:
    """Return what becomes of text, and the arguments about images, of a call's keyword arguments.

    They are merged by the library's own rules: by name, in `text_kwargs` and `images_kwargs`, in `common_kwargs`, then
    the tokenizer's. Raises ValueError that names an argument which is unknown, wrong, or asks for what is not made.
    """
    kinds = processor.valid_processor_kwargs.__annotations__
    known = set(kinds).union(*(kinds[name].__annotations__ for name in MODALITIES if name in kinds))
    for name, value in arguments.items():
        if name in ("videos", "audio", "videos_kwargs", "audio_kwargs") and value:
            raise ValueError(f"{name} was given, and images are all that is read here; leave it out")
        if name not in known | {"common_kwargs", "videos", "audio"}:
            raise ValueError(f"{name}={value!r} is no argument of a processor; known are {', '.join(sorted(known))}")
        if name in MODALITIES and not isinstance(value, Mapping):
            raise ValueError(f"{name} is {_kind(value)}; give a dict of arguments")
    given = {name: value for name, value in arguments.items() if name not in ("videos", "audio")}
    try:
        merged = processor._merge_kwargs(
            processor.valid_processor_kwargs, tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **given
        )
    except Exception as error:  # transformers has classes of its own for a value of the wrong kind
        raise ValueError(brief_text(" ".join(str(error).split()))) from None
    text = dict(merged["text_kwargs"])
    for name in ("return_mm_token_type_ids", "return_text_replacement_offsets"):  # newer releases keep them apart
        if merged.get(name):
            text[name] = True
    for name, value in text.items():
        if name not in _READ and value not in (None, False, 0):
            raise ValueError(
                f"{name}={value!r} is not offered where texts hold images; leave it out, or give a text without images "
                "to processor.tokenizer"
            )
    return _text_options(processor.tokenizer, text), dict(merged["images_kwargs"])


def _text_options(tokenizer: Any, text: Mapping[str, Any]) -> TextOptions:
    padding, truncation, length = text.get("padding", True), text.get("truncation"), text.get("max_length")
    padding, truncation = (getattr(value, "value", value) for value in (padding, truncation))
    side = text.get("padding_side") or tokenizer.padding_side
    tensors = getattr(text.get("return_tensors", "pt"), "value", text.get("return_tensors", "pt"))
    for name, value, allowed in (
        ("padding", padding, (*_LONGEST, _TO_LENGTH, *_NOT)),
        ("truncation", truncation, (*_CUT, *_WHOLE)),
        ("padding_side", side, PADDING_SIDES),
        ("return_tensors", tensors, TENSORS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")
    for name in ("max_length", "pad_to_multiple_of"):
        number = text.get(name)
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"{name}={number!r} is no length; give a whole number of 1 or more")
    # As tokenizers do: a max_length alone, without a word about padding and truncation, is what rows are cut to.
    alone = length is not None and truncation is None and "padding" not in text
    if length is None and tokenizer.model_max_length < _UNLIMITED:
        length = tokenizer.model_max_length if truncation in _CUT or padding == _TO_LENGTH else None
    if padding == _TO_LENGTH and length is None:
        raise ValueError("padding='max_length' needs max_length, because the tokenizer has none; give it")
    return TextOptions(
        padding=padding,
        padding_side=side,
        pad_to_multiple_of=text.get("pad_to_multiple_of"),
        max_length=length,
        truncates=truncation in _CUT or alone,
        truncation_side=tokenizer.truncation_side,
        add_special_tokens=text.get("add_special_tokens", True) is not False,
        return_attention_mask=text.get("return_attention_mask", True) is not False,
        return_mm_token_type_ids=bool(text.get("return_mm_token_type_ids")),
        return_tensors=tensors,
    )


def pad_rows(rows: Sequence[Sequence[int]], value: int, options: TextOptions, width: int | None) -> list[list[int]]:
    """Return the rows with `value` at the padding places; as they are where width is None."""
    if width is None:
        return [list(row) for row in rows]
    padded = []
    for row in rows:
        fill = [value] * (width - len(row))
        padded.append([*fill, *row] if options.padding_side == "left" else [*row, *fill])
    return padded


def tensors_of(rows: list[list[int]], options: TextOptions) -> Any:
    """Return rows of whole numbers as `return_tensors` asks. Raises ValueError for unequal rows in a tensor."""
    if options.return_tensors is None:
        return rows
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(
            f"padding=False, but the rows have {lengths} tokens; leave it out to pad them, or give return_tensors=None"
        )
    return torch.tensor(rows, dtype=torch.int64) if options.return_tensors == "pt" else np.array(rows, dtype=np.int64)


def _kind(value: Any) -> str:
    return f"of type {type(value).__name__}"
