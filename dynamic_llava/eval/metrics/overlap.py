"""How well the kept patches of an image cover its objects (standard library only)."""

from collections.abc import Collection, Sequence


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
