"""Texts about a scene: short questions with one-word answers, and long descriptions.

There are six kinds of questions, existence in POPE's manner. Relations ("left of") are left out on purpose: a dense
model of this size stays at chance on them. Descriptions (50 to 100 tokens) come in two styles, with the way back from
text to attributes. The wording of the request decides the style, so nothing in an answer has to be guessed; objects
come left to right.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dynamic_llava.tiny.world.scenes import COLOR_WEIGHTS, COLORS, SHAPE_WEIGHTS, SHAPES, SIZES, Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four")

KINDS = ("color", "shape", "size", "count", "count_by", "exist")

NEGATIVES = ("random", "popular", "adversarial")
"""How POPE draws the absent object: uniformly, among the most frequent, or among what goes with a present one."""

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "color": ("What color is the {shape}?", "What is the color of the {shape}?"),
    "shape": ("What shape is the {color} object?", "Which shape is {color}?"),
    "size": ("What size is the {color} {shape}?", "How big is the {color} {shape}?"),
    "count": ("How many objects are there?", "How many objects do you see?"),
    "count_by": ("How many objects are {value}?", "How many objects in the image are {value}?"),
    "count_by_shape": ("How many objects look like a {value}?", "How many objects have the shape of a {value}?"),
    "exist": ("Is there {article} {color} {shape} in the image?", "Do you see {article} {color} {shape}?"),
}

_POPULAR = 12  # the most frequent (colour, shape) pairs count as popular

STYLES = ("list", "tell")

REQUESTS: dict[str, tuple[str, ...]] = {
    "list": ("Describe the image in detail.", "List every object in the image."),
    "tell": ("What can you see in this picture?", "Tell me about the picture."),
}

_ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class ShortQuestion:
    """A question with its answer.

    referents: indices of the objects it is about (grounding in the base's training, evaluation; never a model input).
    negative: how the absent object of an existence question was drawn, None where the answer is not "No".
    """

    kind: str
    text: str
    answer: str
    referents: tuple[int, ...]
    negative: str | None = None


def article(word: str) -> str:
    """The indefinite article of an attribute word."""
    return "an" if word[0] in "aeiou" else "a"


def ask(
    scene: Scene, kind: str, rng: np.random.Generator, *, present: bool | None = None, negative: str | None = None
) -> ShortQuestion | None:
    """A random question of `kind`, or None where the scene allows none (no shape occurs once, no word for a number).

    For kind "exist", `present` fixes the answer and `negative` the way an absent object is drawn.
    Raises ValueError for an unknown kind or negative.
    """
    if kind not in _ASKERS:
        raise ValueError(f"unknown question kind {kind!r}; allowed: {', '.join(KINDS)}")
    if kind == "exist":
        return _ask_exist(scene, rng, present, negative)
    return _ASKERS[kind](scene, rng)


def _fill(template: str, rng: np.random.Generator, **values: str) -> str:
    options = _TEMPLATES[template]
    return options[int(rng.integers(len(options)))].format(**values)


def _unique(scene: Scene, attribute: str) -> list[int]:
    values = [getattr(o, attribute) for o in scene.objects]
    return [i for i, value in enumerate(values) if values.count(value) == 1]


def _ask_color(scene: Scene, rng: np.random.Generator) -> ShortQuestion | None:
    chosen = _unique(scene, "shape")
    if not chosen:
        return None
    i = int(rng.choice(chosen))
    obj = scene.objects[i]
    return ShortQuestion("color", _fill("color", rng, shape=obj.shape), obj.color, (i,))


def _ask_shape(scene: Scene, rng: np.random.Generator) -> ShortQuestion | None:
    chosen = _unique(scene, "color")
    if not chosen:
        return None
    i = int(rng.choice(chosen))
    obj = scene.objects[i]
    return ShortQuestion("shape", _fill("shape", rng, color=obj.color), obj.shape, (i,))


def _ask_size(scene: Scene, rng: np.random.Generator) -> ShortQuestion:
    i = int(rng.integers(len(scene.objects)))
    obj = scene.objects[i]
    return ShortQuestion("size", _fill("size", rng, color=obj.color, shape=obj.shape), obj.size, (i,))


def _ask_count(scene: Scene, rng: np.random.Generator) -> ShortQuestion | None:
    count = len(scene.objects)
    if count >= len(NUMBERS):
        return None
    return ShortQuestion("count", _fill("count", rng), NUMBERS[count], tuple(range(count)))


def _ask_count_by(scene: Scene, rng: np.random.Generator) -> ShortQuestion | None:
    attribute, values = (("shape", SHAPES), ("size", SIZES), ("color", COLORS))[int(rng.choice(3, p=(0.4, 0.4, 0.2)))]
    if rng.random() < 0.75:
        value = getattr(scene.objects[int(rng.integers(len(scene.objects)))], attribute)
    else:
        value = values[int(rng.integers(len(values)))]
    referents = tuple(i for i, o in enumerate(scene.objects) if getattr(o, attribute) == value)
    if len(referents) >= len(NUMBERS):
        return None
    template = "count_by_shape" if attribute == "shape" else "count_by"
    return ShortQuestion("count_by", _fill(template, rng, value=value), NUMBERS[len(referents)], referents)


def _ask_exist(scene: Scene, rng: np.random.Generator, present: bool | None, negative: str | None) -> ShortQuestion:
    if negative is not None and negative not in NEGATIVES:
        raise ValueError(f"unknown kind of negative {negative!r}; allowed: {', '.join(NEGATIVES)}")
    if rng.random() < 0.5 if present is None else present:
        i = int(rng.integers(len(scene.objects)))
        obj = scene.objects[i]
        return ShortQuestion("exist", _existence(obj.color, obj.shape, rng), "Yes", (i,))
    kind = negative or NEGATIVES[int(rng.choice(3, p=(0.2, 0.2, 0.6)))]
    color, shape = _absent_pair(scene, kind, rng)
    return ShortQuestion("exist", _existence(color, shape, rng), "No", (), kind)


def _existence(color: str, shape: str, rng: np.random.Generator) -> str:
    return _fill("exist", rng, article=article(color), color=color, shape=shape)


def _absent_pair(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[str, str]:
    here = {(o.color, o.shape) for o in scene.objects}
    if kind == "random":
        options = [(c, s) for c in COLORS for s in SHAPES]
    elif kind == "popular":
        options = _popular_pairs()
    else:
        options = _adversarial_pairs(scene.objects, mixed=rng.random() < 0.5)
    absent = [pair for pair in options if pair not in here]
    return absent[int(rng.integers(len(absent)))]


def _popular_pairs() -> list[tuple[str, str]]:
    weight = {
        (c, s): wc * ws
        for c, wc in zip(COLORS, COLOR_WEIGHTS, strict=True)
        for s, ws in zip(SHAPES, SHAPE_WEIGHTS, strict=True)
    }
    return sorted(weight, key=lambda pair: -weight[pair])[:_POPULAR]


def _adversarial_pairs(objects: tuple[SceneObject, ...], mixed: bool) -> list[tuple[str, str]]:
    """Pairs sharing an attribute with a present object; `mixed` asks for the colour of one on the shape of another."""
    here = {(o.color, o.shape) for o in objects}
    crossed = [(a.color, b.shape) for a in objects for b in objects if (a.color, b.shape) not in here]
    if mixed and crossed:
        return crossed
    return [(o.color, s) for o in objects for s in SHAPES] + [(c, o.shape) for o in objects for c in COLORS]


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], ShortQuestion | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "count_by": _ask_count_by,
    "exist": lambda scene, rng: _ask_exist(scene, rng, None, None),
}


@dataclass(frozen=True)
class Description:
    """text, and spans (start, end, object index): the characters that state something about one object."""

    text: str
    spans: tuple[tuple[int, int, int], ...]


class DescriptionWriter:
    """Collects text and remembers which characters speak of which object."""

    def __init__(self) -> None:
        self._text = ""
        self._spans: list[tuple[int, int, int]] = []

    def say(self, text: str) -> "DescriptionWriter":
        """Add words about no object."""
        self._text += text
        return self

    def state(self, text: str, index: int) -> "DescriptionWriter":
        """Add words that state something about an object."""
        self._spans.append((len(self._text), len(self._text) + len(text), index))
        return self.say(text)

    def finish(self) -> Description:
        """Return what was written."""
        return Description(self._text, tuple(self._spans))


def describe(scene: Scene, style: str) -> Description:
    """The reference description. With one or two objects each gets a second sentence, to stay above 50 tokens.

    Raises ValueError for an unknown style.
    """
    if style not in _SENTENCES:
        raise ValueError(f"unknown style {style!r}; allowed: {', '.join(STYLES)}")
    opening, sentence, extra, alone, closing = _SENTENCES[style]
    out, objects = DescriptionWriter(), scene.objects
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


def _list_opening(out: DescriptionWriter, scene: Scene) -> None:
    count = len(scene.objects)
    out.say(f"The image shows {NUMBERS[count]} object{'s' if count > 1 else ''} on a {scene.background} background.")


def _list_sentence(out: DescriptionWriter, i: int, obj: SceneObject) -> None:
    out.say(f" {_ORDINALS[i].capitalize()}, there is a").state(f" {obj.size} {obj.color} {obj.shape}", i)
    out.say(" at the").state(f" {obj.row} {obj.column}", i).say(".")


def _list_extra(out: DescriptionWriter, i: int, obj: SceneObject) -> None:
    out.say(" This").state(f" {obj.shape}", i).say(" is").state(f" {obj.color}", i)
    out.say(" and it is").state(f" {obj.size}", i).say(" in size.")


def _list_alone(out: DescriptionWriter, obj: SceneObject) -> None:
    out.say(" Nothing else can be seen around the").state(f" {obj.color} {obj.shape}", 0).say(" in the image.")


def _tell_opening(out: DescriptionWriter, scene: Scene) -> None:
    count = len(scene.objects)
    verb, plural = ("are", "s") if count > 1 else ("is", "")
    out.say(f"On a {scene.background} background there {verb} {NUMBERS[count]} object{plural}.")


def _tell_sentence(out: DescriptionWriter, i: int, obj: SceneObject) -> None:
    out.say(f" The {_ORDINALS[i]} is {article(obj.color)}").state(f" {obj.color} {obj.shape}", i)
    out.say(" of").state(f" {obj.size}", i).say(" size near the").state(f" {obj.row} {obj.column}", i).say(".")


def _tell_extra(out: DescriptionWriter, i: int, obj: SceneObject) -> None:
    out.say(" The").state(f" {obj.color}", i).say(" one has the shape of a").state(f" {obj.shape}", i)
    out.say(" and it is").state(f" {obj.size}", i).say(".")


def _tell_alone(out: DescriptionWriter, obj: SceneObject) -> None:
    out.say(" No other object is next to the").state(f" {obj.color} {obj.shape}", 0).say(".")


_SENTENCES = {
    "list": (_list_opening, _list_sentence, _list_extra, _list_alone, " Overall we see"),
    "tell": (_tell_opening, _tell_sentence, _tell_extra, _tell_alone, " To sum up, there is"),
}

_SIZE, _COLOR, _SHAPE = (f"({'|'.join(words)})" for words in (SIZES, COLORS, SHAPES))

_SIZE_FIRST = re.compile(rf"\b{_SIZE} {_COLOR} {_SHAPE}\b")

_SIZE_LAST = re.compile(rf"\b{_COLOR} {_SHAPE} of {_SIZE} size\b")
