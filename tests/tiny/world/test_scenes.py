"""Scenes and pictures: determinism, the promised geometry, and patch truth against an independent rasteriser."""

import math

import numpy as np
import pytest

from dynamic_llava.tiny.world import scenes
from dynamic_llava.tiny.world.scenes import (
    GRID,
    PATCH_SIZE,
    Scene,
    SceneObject,
    render_scene,
    sample_pictures,
    sample_scene,
)

SCENES, PICTURES = sample_pictures(40, (77,))


def inside(obj, x, y):
    """Point test written without the renderer's formulas."""
    dx, dy, r = x - obj.x, y - obj.y, obj.radius
    distance = math.hypot(dx, dy)
    if obj.shape == "circle":
        return distance <= r
    if obj.shape == "ring":
        return 0.55 * r <= distance <= r
    if obj.shape == "square":
        return max(abs(dx), abs(dy)) <= 0.85 * r
    if obj.shape == "cross":
        return min(abs(dx), abs(dy)) <= 0.33 * r and max(abs(dx), abs(dy)) <= r
    top, left, right = (0.0, -r), (-0.99 * r, 0.8 * r), (0.99 * r, 0.8 * r)
    sides = [
        (b[0] - a[0]) * (dy - a[1]) - (b[1] - a[1]) * (dx - a[0]) for a, b in ((top, right), (right, left), (left, top))
    ]
    return all(side >= 0 for side in sides)


def test_the_same_seed_gives_the_same_pictures_and_prefixes_agree():
    scenes, pictures = sample_pictures(5, (77,))
    assert scenes == SCENES[:5]
    for one, other in zip(pictures, PICTURES[:5], strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_array_equal(one.patch_coverage, other.patch_coverage)
    assert sample_pictures(5, (78,))[0] != scenes


def test_objects_are_apart_unambiguous_and_ordered():
    for i in range(300):
        objects = sample_scene(np.random.default_rng((5, i))).objects
        assert 1 <= len(objects) <= 4
        assert [o.x for o in objects] == sorted(o.x for o in objects)
        assert len({(o.color, o.shape) for o in objects}) == len(objects)
        for a, b in ((a, b) for a in objects for b in objects if a is not b):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius
            assert abs(a.x - b.x) > 4
        for o in objects:
            assert o.radius < o.x < 64 - o.radius and o.radius < o.y < 64 - o.radius
            assert min(abs(v - 64 * k / 3) for v in (o.x, o.y) for k in (1, 2)) >= 1.5


def test_patch_truth_equals_an_independent_count():
    for scene, picture in list(zip(SCENES, PICTURES, strict=True))[:12]:
        share = np.zeros((len(scene.objects), GRID * GRID))
        for k, obj in enumerate(scene.objects):
            for patch in range(GRID * GRID):
                y0, x0 = (patch // GRID) * PATCH_SIZE, (patch % GRID) * PATCH_SIZE
                points = [(x0 + (i + 0.5) / 2, y0 + (j + 0.5) / 2) for i in range(16) for j in range(16)]
                share[k, patch] = np.mean([inside(obj, x, y) for x, y in points])
        np.testing.assert_allclose(picture.patch_coverage, share.max(0), atol=0.02)
        clear = abs(share.max(0) - 0.1) > 0.02
        owner = np.where(share.max(0) > 0.1, share.argmax(0), -1)
        np.testing.assert_array_equal(picture.patch_object[clear], owner[clear])


def test_every_object_owns_a_patch_and_objects_cover_about_a_fifth():
    for scene, picture in zip(SCENES, PICTURES, strict=True):
        assert set(range(len(scene.objects))) <= set(picture.patch_object.tolist())
    share = np.mean([picture.patch_object >= 0 for picture in PICTURES])
    assert 0.15 < share < 0.27


def test_the_picture_shows_the_object_where_the_truth_says():
    obj = SceneObject("red", "square", "large", 20.0, 40.0, 11.4)
    picture = render_scene(Scene((obj,), "plain"), np.random.default_rng(0))
    assert picture.pixels.shape == (64, 64, 3) and picture.pixels.dtype == np.uint8
    red = picture.pixels[..., 0].astype(int) - picture.pixels[..., 2] > 80
    rows, columns = np.nonzero(red)
    assert abs(rows.mean() + 0.5 - 40) < 0.5 and abs(columns.mean() + 0.5 - 20) < 0.5
    assert (obj.row, obj.column) == ("middle", "left")


def test_unknown_words_are_refused():
    obj = SceneObject("red", "star", "large", 20.0, 40.0, 11.4)
    with pytest.raises(ValueError, match=r"star.*circle"):
        render_scene(Scene((obj,), "plain"), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"dotted.*striped"):
        render_scene(Scene((), "dotted"), np.random.default_rng(0))


def test_frequencies_sum_to_one():
    for weights, words in (
        (scenes.COLOR_WEIGHTS, scenes.COLORS),
        (scenes.SHAPE_WEIGHTS, scenes.SHAPES),
        (scenes.COUNT_WEIGHTS, range(scenes.MAX_OBJECTS)),
    ):
        assert len(weights) == len(words) and sum(weights) == pytest.approx(1)
