"""A checkpoint behind somebody else's evaluation: what the classes of lmms-eval and VLMEvalKit have in common.

Both choose the method by the same arguments, ask in finished prompts, and may be told what an answer cost.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from dynamic_llava.config import nested_method
from dynamic_llava.costs import decoder_shape
from dynamic_llava.eval.answering import facts
from dynamic_llava.eval.efficiency import Counted, mean_kv_bytes
from dynamic_llava.eval.predict import Held, Prediction, QueryBatch, read_predictions, to_device
from dynamic_llava.methods import import_named
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.image_processor import ImageInput
from dynamic_llava.processing.messages import read_chat
from dynamic_llava.processing.prompts import IMAGE_PLACE, image_places
from dynamic_llava.projectors import import_projector

DTYPES = ("auto", "float32", "bfloat16", "float16")
SWITCHES = ("sparsity", "method", "image_keep_rate", "output_threshold", "output_keep_rate")
"""Model arguments that go to `generate`, all optional: without them the checkpoint's own settings hold."""


class Harness:
    """What both classes inherit beside the harness' own base class."""

    model: Any
    processor: DynamicLlavaProcessor
    method: Any
    """The method that decides which tokens are kept."""

    def open(
        self,
        pretrained: str,
        device: torch.device,
        dtype: str,
        projector: str | None,
        switches: Mapping[str, Any],
        others: str,
    ) -> None:
        """Read a checkpoint. `switches` are those of `SWITCHES` and settings of the method, as "method.layer": 3.

        Raises ValueError for any other argument, naming the known ones and `others`, before any weight is read.
        """
        import_projector(projector)
        chosen = dict(switches)
        settings = [
            (name.removeprefix("method."), chosen.pop(name)) for name in [*chosen] if name.startswith("method.")
        ]
        if unknown := sorted(set(chosen) - set(SWITCHES)):
            raise ValueError(
                f"unknown model arguments {unknown}; the known ones are pretrained, dtype, projector, "
                f"{', '.join(SWITCHES)}, and {others}"
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known; choose one of {', '.join(map(repr, DTYPES))}")
        if settings:
            named = [("name", chosen["method"])] if "method" in chosen else []
            chosen["method"] = nested_method([*named, *settings])
        import_named(chosen.get("method"))
        self.method = choose_method(DynamicLlavaConfig.from_pretrained(pretrained).sparsity, **chosen)
        self.processor = DynamicLlavaProcessor.from_pretrained(pretrained)
        model = DynamicLlavaForConditionalGeneration.load_for(self.method, pretrained, dtype=dtype)
        self.model = model.to(device).eval()

    def answer(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[ImageInput]],
        settings: Mapping[str, Any],
        keys: Sequence[int],
    ) -> list[Prediction]:
        """Answer finished prompts in one call, as GenerationConfig's `settings` say; random methods draw by `keys`."""
        inputs = dict(self.processor(text=list(prompts), images=[list(row) for row in images], padding_side="left"))
        inputs["sample_key"] = torch.tensor(keys)
        held = Held(self.model, self.method) if self.method.evicts else None
        watched = {} if held is None else {"cache": held.cache, "logits_processor": LogitsProcessorList([held])}
        output = self.model.generate(
            **to_device(inputs, self.model.device),
            generation_config=GenerationConfig(**settings, pad_token_id=self.processor.pad_token_id),
            method=self.method,
            return_dict_in_generate=True,
            **watched,
        )
        return read_predictions(
            output, QueryBatch(tuple(range(len(prompts))), inputs), self.processor, self.model, held
        )

    def cache_bytes(self, said: Prediction) -> int:
        """Return the bytes of keys and values of an answer's own row when its last token is said."""
        shape, each = decoder_shape(self.model.config), self.processor.tokens_per_image
        counted = Counted.read(facts(said), self.method, shape.layers, each, "an answer")
        return int(mean_kv_bytes(shape, self.method, [counted], each, self.model.dtype.itemsize))


def chat_prompt(
    processor: DynamicLlavaProcessor, messages: Sequence[Mapping[str, Any]]
) -> tuple[str, list[ImageInput]]:
    """Return the prompt of chat messages that end in a question, and its images in their order.

    A part is {"type": "text", "text": ...} or {"type": "image", "url": ...}. Parts stand on lines of their own, images
    side by side on one. Where a message's text says `<image>` itself, its images stand there. Raises ValueError for
    other parts, for places that are not one for each image, and for messages that end in an answer.
    """
    images: list[ImageInput] = []
    texts: Any = messages
    if isinstance(messages, list | tuple):
        texts = [{**one, "content": _content(one["content"], images)} if _is_message(one) else one for one in messages]
    chat = read_chat(texts)
    if chat.turns[-1][1] is not None:
        raise ValueError("the last message is the assistant's; end in a user message, to which an answer is due")
    return processor.conversation_prompt(chat.turns, chat.system), images


def _is_message(message: Any) -> bool:
    """Whether there is a content to read; what is wrong with others is said by `read_chat`."""
    return isinstance(message, Mapping) and {"role", "content"} <= set(message)


def _content(content: Any, images: list[ImageInput]) -> Any:
    """Return the text of a message with its `<image>` places, and append its images."""
    if not isinstance(content, list | tuple):
        return content
    pieces: list[str] = []
    said: list[str] = []
    own: list[ImageInput] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and isinstance(part.get("url"), ImageInput):
            own.append(part["url"])
            pieces.append(IMAGE_PLACE)
        elif kind == "text" and isinstance(part.get("text"), str):
            said.append(part["text"])
            pieces.append(part["text"])
        else:
            raise ValueError(
                f"a message holds a part of type {kind!r}; this model reads texts and images (Pillow images or files), "
                "no video and no sound"
            )
    images += own
    places = sum(map(image_places, said))
    if not places:
        return _lines(pieces)
    if places != len(own):
        raise ValueError(f"a message has {places} {IMAGE_PLACE} places for {len(own)} images; it needs one per image")
    return "\n".join(said)


def _lines(pieces: Sequence[str]) -> str:
    """Return pieces on lines of their own, images beside images on one."""
    text = ""
    for place, piece in enumerate(pieces):
        beside = piece == IMAGE_PLACE and place and pieces[place - 1] == IMAGE_PLACE
        text += (" " if beside else "\n" if place else "") + piece
    return text
