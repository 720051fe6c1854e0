"""The tiny world's test split as queries, with the truth about objects that only evaluation may see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynamic_llava.eval.predict import Query

DESCRIPTION = "description"
"""Kind of the queries that ask for a description."""
EXISTENCE = "exist"
"""Kind of the yes/no questions."""


@dataclass(frozen=True)
class TestSet:
    """Unseen images with questions, descriptions and the truth about their objects."""

    __test__ = False  # the name begins like a test class of pytest

    questions: Sequence[Query]
    descriptions: Sequence[Query]
    attributes: Mapping[Path, frozenset[tuple[str, str, str]]]
    """(size, colour, shape) of each image's objects."""
    object_patches: Mapping[Path, Sequence[Sequence[int]]]
    """Per image, per object, the numbers of the patches it covers."""

    def first(self, questions: int, descriptions: int) -> "TestSet":
        """The first queries of each kind, with the same truth."""
        return replace(self, questions=self.questions[:questions], descriptions=self.descriptions[:descriptions])
