"""The long world: four to seven objects, and descriptions of 100 to 250 tokens whose ends need their beginnings.

Such a description lists the objects from left to right, tells of each what it stands between, and closes with counts by
column and by size. Relations and counts follow from the list, some 50 to 200 tokens before, which a window of the last
tokens does not hold. All words are the default world's, so the shipped tokenizer has them; numbers end at four, so
no column and no size has more objects.
"""

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

from dynamic_llava.tiny.world.scenes import COLORS, COLUMNS, SHAPES, SIZES, Scene, sample_crowd
from dynamic_llava.tiny.world.texts import KINDS, NUMBERS, Description, DescriptionWriter

LONG = "long"
"""The one style of the long world's descriptions."""

LONG_REQUESTS = ("Describe every object in the picture.", "Tell me about every object in detail.")

LONG_KINDS = tuple(kind for kind in KINDS if kind != "count")
"""Kinds of the long world's short questions: the words have no number for all objects of a scene."""

_MOST = len(NUMBERS) - 1

_NUMBER, _OBJECT = f"({'|'.join(NUMBERS)})", f"(?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)})"

STATEMENTS: Mapping[str, re.Pattern[str]] = {
    "count": re.compile(
        rf"\b{_NUMBER} (?:(?:{'|'.join(SIZES)}) objects?|objects? (?:on|in) the (?:{'|'.join(COLUMNS)}))\b"
    ),
    "relation": re.compile(rf"\bThe {_OBJECT} is between the ({_OBJECT}) and the ({_OBJECT})\b"),
}
"""What a long description states late, by name: each match is a statement, its groups are the words that tell it."""


def sample_long_scene(rng: np.random.Generator) -> Scene:
    """Four to seven objects, at most four of a size and of a column."""
    return sample_crowd(rng, fewest=_MOST, most=7, alike=_MOST)


def sample_long_request(rng: np.random.Generator) -> tuple[str, str]:
    """(style, request), uniformly."""
    return LONG, LONG_REQUESTS[int(rng.integers(len(LONG_REQUESTS)))]


def describe_long(scene: Scene, style: str = LONG) -> Description:
    """The reference description. ValueError for an unknown style."""
    if style != LONG:
        raise ValueError(f"unknown style {style!r}; allowed in the long world: {LONG}")
    out = DescriptionWriter().say(f"The image shows objects on a {scene.background} background.")
    for i, obj in enumerate(scene.objects):
        out.say(" The next is a" if i else " First, there is a").state(f" {obj.size} {obj.color} {obj.shape}", i)
        out.say(" at the").state(f" {obj.row} {obj.column}", i).say(".")
    _tell_neighbours(out, scene)
    _tell_counts(out, scene)
    return out.finish()


def _tell_neighbours(out: DescriptionWriter, scene: Scene) -> None:
    names = [f" {obj.color} {obj.shape}" for obj in scene.objects]
    last = len(names) - 1
    out.say(" Nothing is on the left of the").state(names[0], 0).say(".")
    for i in range(1, last):
        out.say(" The").state(names[i], i).say(" is between the").state(names[i - 1], i - 1)
        out.say(" and the").state(names[i + 1], i + 1).say(".")
    out.say(" Nothing is on the right of the").state(names[last], last).say(".")


def _tell_counts(out: DescriptionWriter, scene: Scene) -> None:
    columns, sizes = (Counter(getattr(obj, name) for obj in scene.objects) for name in ("column", "size"))
    left, center, right = (_objects(columns[column]) for column in COLUMNS)
    small, medium, large = (_objects(sizes[size], size) for size in SIZES)
    out.say(f" Overall there {_verb(left)} {left} on the left, {center} in the center and {right} on the right.")
    out.say(f" To sum up, there {_verb(small)} {small}, {medium} and {large}.")


def _objects(count: int, size: str = "") -> str:
    return f"{NUMBERS[count]} {size + ' ' if size else ''}object{'' if count == 1 else 's'}"


def _verb(counted: str) -> str:
    return "is" if counted.startswith("one ") else "are"
