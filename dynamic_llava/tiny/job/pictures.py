"""The pictures of the main job: kept patches, greyed answers, keep rate by word, training curves."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.config import SparsityConfig
from dynamic_llava.methods import Dynamic
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.images import load_image
from dynamic_llava.processing.prompts import IMAGE_PLACE
from dynamic_llava.tiny.job.config import TinyJobConfig
from dynamic_llava.tiny.job.evaluation import UNTRAINED, SeedEvaluation
from dynamic_llava.tiny.job.rows import REFERENCE
from dynamic_llava.tiny.job.testset import TestSet
from dynamic_llava.viz.curves import draw_training_curves
from dynamic_llava.viz.greyed_answers import GreyedAnswer, draw_greyed_answers, draw_keep_rate_by_word
from dynamic_llava.viz.kept_patches import PatchChoice, draw_kept_patches

_OBJECT_COUNTS = (3, 4, 2, 3, 1, 4)
"""Numbers of objects of the pictured scenes, in turn; the first test scenes that have them are taken."""
_PATCH_ROWS = {REFERENCE: "Dynamic I|T", "fastv": "FastV-like", "random_image": "random", UNTRAINED: "untrained base"}


def draw_pictures(
    folder: Path,
    test: TestSet,
    evaluation: SeedEvaluation,
    processor: DynamicLlavaProcessor,
    tiny: TinyJobConfig,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    sparsity: SparsityConfig,
) -> list[Path]:
    """Draw all pictures into `folder`; returns their paths. `histories` are the logs of the trainings by title."""
    side = processor.image_size // processor.patch_size
    targets = Dynamic.from_config(sparsity).keep_rates(sparsity)
    drawn = [draw_training_curves(folder / "training_curves.png", histories, targets)]
    if tiny.picture_scenes:
        drawn.append(_kept_patches(folder, test, evaluation, tiny.picture_scenes, side, sparsity.sparse_layer))
    answers = [_greyed(test, evaluation, processor, number) for number in range(len(test.descriptions))]
    if tiny.picture_answers:
        drawn.append(
            draw_greyed_answers(
                folder / "greyed_answers.png",
                answers[: tiny.picture_answers],
                (side, side),
                title="What Dynamic I|T keeps of its own answers",
            )
        )
    return drawn + keep_rate_by_word(folder, answers)


def keep_rate_by_word(folder: Path, answers: Sequence[GreyedAnswer]) -> list[Path]:
    """Draw how often words were kept, those that are frequent enough among so many answers; nothing without a word."""
    seen = Counter(word for answer in answers for word in answer.words)
    if not seen:  # a model that is not trained may end at once
        return []
    path = draw_keep_rate_by_word(
        folder / "keep_rate_by_word.png",
        [answer.words for answer in answers],
        [answer.kept for answer in answers],
        title="How often a word of a description stays in the cache",
        least_count=min(10, len(answers), max(seen.values())),
    )
    return [path]


def _kept_patches(
    folder: Path, test: TestSet, evaluation: SeedEvaluation, scenes: int, side: int, sparse_layer: int
) -> Path:
    chosen = _scenes(test, scenes)
    images = [test.questions[place].image for place in chosen]
    choices = [
        PatchChoice(title, [evaluation.outputs[key].answers[place].image_kept[0] for place in chosen])
        for key, title in _PATCH_ROWS.items()
        if key in evaluation.outputs
    ]
    return draw_kept_patches(
        folder / "kept_patches.png",
        [load_image(image) for image in images],
        choices,
        (side, side),
        objects=[test.object_patches[image] for image in images],
        title=f"Image tokens that the layers from {sparse_layer} on still see (unseen scenes, objects outlined)",
    )


def _scenes(test: TestSet, wanted: int) -> list[int]:
    """Places of questions about different images whose numbers of objects follow a fixed pattern."""
    first: dict[Path, int] = {}
    for place, query in enumerate(test.questions):
        first.setdefault(query.image, place)
    free = list(first.items())
    chosen: list[int] = []
    for turn in range(min(wanted, len(free))):
        count = _OBJECT_COUNTS[turn % len(_OBJECT_COUNTS)]
        pick = next((pair for pair in free if len(test.object_patches[pair[0]]) == count), free[0])
        free.remove(pick)
        chosen.append(pick[1])
    return chosen


def _greyed(test: TestSet, evaluation: SeedEvaluation, processor: DynamicLlavaProcessor, number: int) -> GreyedAnswer:
    query, said = test.descriptions[number], evaluation.outputs[REFERENCE].descriptions[number]
    words = [processor.decode([token], skip_special_tokens=False).strip() for token in said.tokens]
    return GreyedAnswer(
        image=load_image(query.image),
        kept_patches=said.image_kept[0],
        question=query.question.replace(IMAGE_PLACE, "").strip(),
        words=words[: len(said.output_kept)],  # nothing was decided about the last token
        kept=said.output_kept,
    )
