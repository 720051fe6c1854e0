"""The tiny world's test set as benchmarks in their own layouts, so that `python -m dynamic_llava.eval` runs on it.

    pope         its questions whether something is there, in POPE's three subsets
    gqa          its other short questions
    lvis_single  its descriptions

Questions are those of `read_test_set`, as the world asks them: a benchmark's usual suffix is not added. Images are
links to the world's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.eval.tasks import gqa, pope
from dynamic_llava.eval.tasks.generation import LVIS_IMAGES, SINGLE
from dynamic_llava.eval.writing import write_json, write_lines
from dynamic_llava.files import writing
from dynamic_llava.processing.prompts import IMAGE_PLACE
from dynamic_llava.tiny.job.testset import EXISTENCE, Query, read_test_set


def write_benchmarks(world: Path, root: Path, questions: int, descriptions: int) -> list[str]:
    """Write the first questions and descriptions of a built world below a data root; return the tasks that have any.

    The first few questions may all be of one kind. Raises ValueError where the world holds fewer.
    """
    test = read_test_set(world, questions, descriptions)
    existence = [query for query in test.questions if query.kind == EXISTENCE]
    others = [query for query in test.questions if query.kind != EXISTENCE]
    written = []
    for task, write, its in (("pope", _write_pope, existence), ("gqa", _write_gqa, others)):
        if its:
            write(root, its)
            written.append(task)
    items = [
        {"id": one.id, "image": one.image.name, "question": one.question, "answer": one.answer}
        for one in test.descriptions
    ]
    write_json(root / SINGLE, items)
    for images in (pope.IMAGES, gqa.IMAGES, LVIS_IMAGES):
        _link(root / images, world / "images")
    return [*written, "lvis_single"]


def _write_pope(root: Path, queries: Sequence[Query]) -> None:
    lines: list[dict[str, Any]] = []
    labels: dict[str, list[dict[str, Any]]] = {}
    for query in queries:
        lines.append(_question(query) | {"category": query.subset})
        label = {"question_id": query.key, "label": query.answer.lower().rstrip(".")}
        labels.setdefault(query.subset, []).append(label)
    write_lines(root / pope.QUESTIONS, lines)
    for category, its in labels.items():
        write_lines(root / pope.LABELS / f"coco_pope_{category}.json", its)


def _write_gqa(root: Path, queries: Sequence[Query]) -> None:
    write_lines(root / gqa.QUESTIONS, [_question(query) | {"category": "default"} for query in queries])
    labels = {
        str(query.key): {
            "question": query.question, "imageId": query.image.stem, "answer": gqa.read_gqa(query.answer),
            "isBalanced": True, "types": {"structural": query.kind, "semantic": query.kind},
        }
        for query in queries
    }  # fmt: skip
    write_json(root / gqa.LABELS, labels)


def _question(query: Query) -> dict[str, Any]:
    text = query.question.replace(IMAGE_PLACE, "").strip()
    return {"question_id": query.key, "image": query.image.name, "text": text}


def _link(path: Path, images: Path) -> None:
    """Make `path` a link to the world's images; ValueError where something else stands there."""
    if path.is_symlink() and path.resolve() == images.resolve():
        return
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} is there already and no link to {images}; choose another folder")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(images.resolve(), target_is_directory=True)
