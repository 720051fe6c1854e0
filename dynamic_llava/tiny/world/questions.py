"""Short questions about a scene with one-word answers: six kinds, existence in POPE's manner.

Relations ("left of") are left out on purpose: a dense model of this size stays at chance on them.
"""

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


@dataclass(frozen=True)
class Question:
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
) -> Question | None:
    """A random question of `kind`, or None where the scene allows none (say, no shape occurs exactly once).

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


def _ask_color(scene: Scene, rng: np.random.Generator) -> Question | None:
    chosen = _unique(scene, "shape")
    if not chosen:
        return None
    i = int(rng.choice(chosen))
    obj = scene.objects[i]
    return Question("color", _fill("color", rng, shape=obj.shape), obj.color, (i,))


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    chosen = _unique(scene, "color")
    if not chosen:
        return None
    i = int(rng.choice(chosen))
    obj = scene.objects[i]
    return Question("shape", _fill("shape", rng, color=obj.color), obj.shape, (i,))


def _ask_size(scene: Scene, rng: np.random.Generator) -> Question:
    i = int(rng.integers(len(scene.objects)))
    obj = scene.objects[i]
    return Question("size", _fill("size", rng, color=obj.color, shape=obj.shape), obj.size, (i,))


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question:
    count = len(scene.objects)
    return Question("count", _fill("count", rng), NUMBERS[count], tuple(range(count)))


def _ask_count_by(scene: Scene, rng: np.random.Generator) -> Question:
    attribute, values = (("shape", SHAPES), ("size", SIZES), ("color", COLORS))[int(rng.choice(3, p=(0.4, 0.4, 0.2)))]
    if rng.random() < 0.75:
        value = getattr(scene.objects[int(rng.integers(len(scene.objects)))], attribute)
    else:
        value = values[int(rng.integers(len(values)))]
    referents = tuple(i for i, o in enumerate(scene.objects) if getattr(o, attribute) == value)
    template = "count_by_shape" if attribute == "shape" else "count_by"
    return Question("count_by", _fill(template, rng, value=value), NUMBERS[len(referents)], referents)


def _ask_exist(scene: Scene, rng: np.random.Generator, present: bool | None, negative: str | None) -> Question:
    if negative is not None and negative not in NEGATIVES:
        raise ValueError(f"unknown kind of negative {negative!r}; allowed: {', '.join(NEGATIVES)}")
    if rng.random() < 0.5 if present is None else present:
        i = int(rng.integers(len(scene.objects)))
        obj = scene.objects[i]
        return Question("exist", _existence(obj.color, obj.shape, rng), "Yes", (i,))
    kind = negative or NEGATIVES[int(rng.choice(3, p=(0.2, 0.2, 0.6)))]
    color, shape = _absent_pair(scene, kind, rng)
    return Question("exist", _existence(color, shape, rng), "No", (), kind)


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


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "size": _ask_size,
    "count": _ask_count,
    "count_by": _ask_count_by,
    "exist": lambda scene, rng: _ask_exist(scene, rng, None, None),
}
