"""The tiny world's test split as queries, with the truth about objects that only evaluation may see."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamic_llava.data.llava_json import parse_sample, read_samples, resolve_image
from dynamic_llava.tiny.job.asking import Query
from dynamic_llava.tiny.world.dataset import load_truth
from dynamic_llava.tiny.world.descriptions import scene_attributes

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


def read_test_set(folder: Path, questions: int, descriptions: int) -> TestSet:
    """Read `questions` and `descriptions` queries of a built world's test.json.

    Questions come in an order whose every first part holds the kinds, and POPE's subsets and answers, in the same
    proportions as the file. Raises ValueError when the file holds fewer than asked for.
    """
    found: dict[str, list[tuple[Hashable, Query]]] = {"questions": [], DESCRIPTION: []}
    for index, sample in enumerate(read_samples(folder / "test.json")):
        query = _query(sample, index, folder)
        group = (query.kind, query.subset, query.answer if query.kind == EXISTENCE else "")
        found[DESCRIPTION if query.kind == DESCRIPTION else "questions"].append((group, query))
    for name, wanted in (("questions", questions), (DESCRIPTION, descriptions)):
        if len(found[name]) < wanted:
            raise ValueError(
                f"{wanted} {name} were asked for and {folder / 'test.json'} holds {len(found[name])}; "
                "ask for fewer, or raise tiny.test_images"
            )
    truth = {resolve_image(folder, name): entry for name, entry in load_truth(folder).items()}
    asked = _evenly(found["questions"])[:questions]
    described = [query for _, query in found[DESCRIPTION]][:descriptions]
    images = {query.image for query in (*asked, *described)}
    return TestSet(
        asked,
        described,
        {image: frozenset(scene_attributes(truth[image].scene)) for image in images},
        {image: _patches(truth[image]) for image in images},
    )


def _query(sample: dict[str, Any], index: int, folder: Path) -> Query:
    parsed = parse_sample(sample, index, folder)
    question, answer = parsed.turns[0]
    if answer is None or len(parsed.turns) > 1:
        raise ValueError(f"test sample {index} must hold one question and its answer")
    image = resolve_image(folder, parsed.images[0])
    return Query(parsed.id, index, image, question, answer, sample["kind"], sample.get("pope", ""))


def _evenly(groups: Sequence[tuple[Hashable, Query]]) -> list[Query]:
    """Interleave the groups in proportion to their sizes, each in its own order."""
    members: dict[Hashable, list[Query]] = defaultdict(list)
    for group, query in groups:
        members[group].append(query)
    placed = [((i + 0.5) / len(queries), query) for queries in members.values() for i, query in enumerate(queries)]
    return [query for _, query in sorted(placed, key=lambda pair: (pair[0], pair[1].key))]


def _patches(truth: Any) -> list[list[int]]:
    owners = list(enumerate(truth.patch_object))
    return [[patch for patch, owner in owners if owner == number] for number in range(len(truth.scene.objects))]
