"""What the tiny world's answers and kept patches are worth (standard library only)."""

from collections import defaultdict
from collections.abc import Collection, Sequence


def normalise_answer(text: str) -> str:
    """Lower-case, cut at the first full stop and collapse white space: "Blue .\\n" becomes "blue"."""
    return " ".join(text.lower().split(".", 1)[0].split())


def accuracy_by_kind(answers: Sequence[str], truths: Sequence[str], kinds: Sequence[str]) -> dict[str, float]:
    """Share of right answers (0..1) for each kind in alphabetical order, then over all questions as "all".

    The three sequences belong together by position; ValueError when their lengths differ or they are empty.
    """
    if not len(answers) == len(truths) == len(kinds):
        raise ValueError(
            f"{len(answers)} answers, {len(truths)} truths and {len(kinds)} kinds were given; "
            "they belong together one by one, so give equally many"
        )
    if not answers:
        raise ValueError("no answers were given; accuracy needs at least one question")
    right: dict[str, list[bool]] = defaultdict(list)
    for answer, truth, kind in zip(answers, truths, kinds, strict=True):
        right[kind].append(normalise_answer(answer) == normalise_answer(truth))
    scores = {kind: sum(right[kind]) / len(right[kind]) for kind in sorted(right)}
    scores["all"] = sum(sum(values) for values in right.values()) / len(answers)
    return scores


def patch_overlap(
    kept: Sequence[Collection[int]], objects: Sequence[Sequence[Collection[int]]], patches: int
) -> dict[str, float]:
    """Overlap of kept patches with object patches over all images together, each a share (0..1).

    kept[i] are the kept patch numbers of image i, objects[i][j] the patch numbers of its object j, `patches` the number
    of patches per image. Returns precision (kept patches that carry an object), recall (object patches kept), iou,
    objects_hit (objects of which at least one patch is kept), object_share (share of patches that carry an object: the
    precision of a random choice) and kept_share. ValueError when the lengths differ or there is no object at all.
    """
    if len(kept) != len(objects) or not kept:
        raise ValueError(f"kept patches of {len(kept)} images, objects of {len(objects)}; give both for each image")
    chosen = covered = both = hit = total = 0
    for kept_patches, image_objects in zip(kept, objects, strict=True):
        kept_set = set(kept_patches)
        object_set = {patch for one in image_objects for patch in one}
        chosen, covered = chosen + len(kept_set), covered + len(object_set)
        both += len(kept_set & object_set)
        hit += sum(bool(kept_set & set(one)) for one in image_objects)
        total += len(image_objects)
    if not total or not covered:
        raise ValueError("no image has an object patch; overlap with objects is undefined")
    return {
        "precision": both / chosen if chosen else 0.0,
        "recall": both / covered,
        "iou": both / (chosen + covered - both),
        "objects_hit": hit / total,
        "object_share": covered / (patches * len(kept)),
        "kept_share": chosen / (patches * len(kept)),
    }
