"""Long descriptions of a scene (50 to 100 tokens) in two styles, and the way back from text to attributes.

The wording of the request decides the style, so nothing in an answer has to be guessed. Objects come left to right.
"""

import re
from dataclasses import dataclass

import numpy as np

from dynamic_llava.tiny.world.questions import NUMBERS, article
from dynamic_llava.tiny.world.scenes import COLORS, SHAPES, SIZES, Scene, SceneObject

STYLES = ("list", "tell")
REQUESTS: dict[str, tuple[str, ...]] = {
    "list": ("Describe the image in detail.", "List every object in the image."),
    "tell": ("What can you see in this picture?", "Tell me about the picture."),
}
_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Description:
    """text, and spans (start, end, object index): the characters that state something about one object."""

    text: str
    spans: tuple[tuple[int, int, int], ...]


class _Writer:
    """Collects text and remembers which characters speak of which object."""

    def __init__(self) -> None:
        self._text = ""
        self._spans: list[tuple[int, int, int]] = []

    def say(self, text: str) -> "_Writer":
        self._text += text
        return self

    def state(self, text: str, index: int) -> "_Writer":
        self._spans.append((len(self._text), len(self._text) + len(text), index))
        return self.say(text)

    def finish(self) -> Description:
        return Description(self._text, tuple(self._spans))


def describe(scene: Scene, style: str) -> Description:
    """The reference description. With one or two objects each gets a second sentence, to stay above 50 tokens.

    Raises ValueError for an unknown style.
    """
    if style not in _SENTENCES:
        raise ValueError(f"unknown style {style!r}; allowed: {', '.join(STYLES)}")
    opening, sentence, extra, alone, closing = _SENTENCES[style]
    out, objects = _Writer(), scene.objects
    opening(out, scene)
    for i, obj in enumerate(objects):
        sentence(out, i, obj)
        if len(objects) <= 2:
            extra(out, i, obj)
    if len(objects) == 1:
        alone(out, objects[0])
    out.say(closing)
    for i, obj in enumerate(objects):
        if i:
            out.say(" and" if i == len(objects) - 1 else ",")
        out.say(f" {article(obj.color)}").state(f" {obj.color} {obj.shape}", i)
    return out.say(".").finish()


def request_style(request: str) -> str:
    """The style that a request asks for; ValueError where it is not one of REQUESTS."""
    for style, requests in REQUESTS.items():
        if request in requests:
            return style
    raise ValueError(f"unknown request {request!r}; allowed: {[r for requests in REQUESTS.values() for r in requests]}")


def sample_request(rng: np.random.Generator) -> tuple[str, str]:
    """(style, request), uniformly."""
    style = STYLES[int(rng.integers(len(STYLES)))]
    return style, REQUESTS[style][int(rng.integers(len(REQUESTS[style])))]


def parse_attributes(text: str) -> set[tuple[str, str, str]]:
    """(size, color, shape) of every object that `text` names with all three, in either style."""
    found = {(m[0], m[1], m[2]) for m in _SIZE_FIRST.findall(text)}
    return found | {(m[2], m[0], m[1]) for m in _SIZE_LAST.findall(text)}


def scene_attributes(scene: Scene) -> set[tuple[str, str, str]]:
    """The truth that `parse_attributes` of a perfect description returns."""
    return {(o.size, o.color, o.shape) for o in scene.objects}


def attribute_recall(text: str, truth: set[tuple[str, str, str]]) -> float:
    """Share of the scene's (size, color, shape) triples that the description names; the truth must not be empty."""
    if not truth:
        raise ValueError("attribute recall needs at least one object; got an empty truth")
    return len(truth & parse_attributes(text)) / len(truth)


def _list_opening(out: _Writer, scene: Scene) -> None:
    count = len(scene.objects)
    out.say(f"The image shows {NUMBERS[count]} object{'s' if count > 1 else ''} on a {scene.background} background.")


def _list_sentence(out: _Writer, i: int, obj: SceneObject) -> None:
    out.say(f" {_ORDINALS[i].capitalize()}, there is a").state(f" {obj.size} {obj.color} {obj.shape}", i)
    out.say(" at the").state(f" {obj.row} {obj.column}", i).say(".")


def _list_extra(out: _Writer, i: int, obj: SceneObject) -> None:
    out.say(" This").state(f" {obj.shape}", i).say(" is").state(f" {obj.color}", i)
    out.say(" and it is").state(f" {obj.size}", i).say(" in size.")


def _list_alone(out: _Writer, obj: SceneObject) -> None:
    out.say(" Nothing else can be seen around the").state(f" {obj.color} {obj.shape}", 0).say(" in the image.")


def _tell_opening(out: _Writer, scene: Scene) -> None:
    count = len(scene.objects)
    verb, plural = ("are", "s") if count > 1 else ("is", "")
    out.say(f"On a {scene.background} background there {verb} {NUMBERS[count]} object{plural}.")


def _tell_sentence(out: _Writer, i: int, obj: SceneObject) -> None:
    out.say(f" The {_ORDINALS[i]} is {article(obj.color)}").state(f" {obj.color} {obj.shape}", i)
    out.say(" of").state(f" {obj.size}", i).say(" size near the").state(f" {obj.row} {obj.column}", i).say(".")


def _tell_extra(out: _Writer, i: int, obj: SceneObject) -> None:
    out.say(" The").state(f" {obj.color}", i).say(" one has the shape of a").state(f" {obj.shape}", i)
    out.say(" and it is").state(f" {obj.size}", i).say(".")


def _tell_alone(out: _Writer, obj: SceneObject) -> None:
    out.say(" No other object is next to the").state(f" {obj.color} {obj.shape}", 0).say(".")


_SENTENCES = {
    "list": (_list_opening, _list_sentence, _list_extra, _list_alone, " Overall we see"),
    "tell": (_tell_opening, _tell_sentence, _tell_extra, _tell_alone, " To sum up, there is"),
}
_SIZE, _COLOR, _SHAPE = (f"({'|'.join(words)})" for words in (SIZES, COLORS, SHAPES))
_SIZE_FIRST = re.compile(rf"\b{_SIZE} {_COLOR} {_SHAPE}\b")
_SIZE_LAST = re.compile(rf"\b{_COLOR} {_SHAPE} of {_SIZE} size\b")
