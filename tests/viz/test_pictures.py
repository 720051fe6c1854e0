"""Pictures: their parts against hand-made cases; the files exist, have the expected size and are not blank."""

import numpy as np
import pytest
from PIL import Image

from dynamic_llava.viz.curves import draw_training_curves
from dynamic_llava.viz.greyed_answers import GreyedAnswer, draw_greyed_answers, draw_keep_rate_by_word
from dynamic_llava.viz.kept_patches import PatchChoice, draw_kept_patches
from dynamic_llava.viz.patches import PatchView, fade_dropped, patch_outline


def picture(side=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def is_drawn(path):
    pixels = np.asarray(Image.open(path).convert("L"))
    return pixels.shape[0] > 100 and pixels.shape[1] > 100 and pixels.std() > 5


def test_fading_leaves_kept_patches_alone():
    pixels = np.zeros((8, 8, 3), np.uint8)
    faded = fade_dropped(pixels, [0, 3], (2, 2))
    assert (faded[:4, :4] == 0).all() and (faded[4:, 4:] == 0).all()
    assert (faded[:4, 4:] > 200).all() and (faded[4:, :4] > 200).all()


def test_the_outline_of_two_neighbours_has_no_inner_edge():
    view = PatchView((8, 8), (2, 2))
    edges = patch_outline([0, 1], view, 8, 8)
    assert len(edges) == 6
    assert ((3.5, -0.5), (3.5, 3.5)) not in edges
    assert len(patch_outline([0, 3], view, 8, 8)) == 8


def test_kept_patches_are_drawn(tmp_path):
    choices = [PatchChoice("learned", [[0, 1], [3]]), PatchChoice("random", [[2], []])]
    objects = [[[0], [5, 6]], [[3]]]
    path = draw_kept_patches(
        tmp_path / "new" / "kept.png", [picture(), picture()], choices, (4, 4), objects=objects, title="t"
    )
    assert is_drawn(path)
    assert is_drawn(draw_kept_patches(tmp_path / "one.png", [picture()], [PatchChoice("x", [[1]])], (4, 4)))
    with pytest.raises(ValueError, match="1 entries for 2 images"):
        draw_kept_patches(path, [picture(), picture()], [PatchChoice("learned", [[0]])], (4, 4))


def test_greyed_answers_are_drawn_and_long_ones_wrap(tmp_path):
    words = ["word", "another", "."] * 40

    def height(count):
        answer = GreyedAnswer(picture(), [0, 5], "What is it?", words[:count], [True, False, True] * (count // 3))
        path = draw_greyed_answers(tmp_path / f"{count}.png", [answer], (4, 4), title="t")
        assert is_drawn(path)
        return Image.open(path).height

    assert height(120) > height(6)


def test_dropped_words_are_lighter_than_kept_ones(tmp_path):
    def darkest(kept):
        answer = GreyedAnswer(picture(), list(range(16)), "", ["wwwwwwww"], [kept])
        image = Image.open(draw_greyed_answers(tmp_path / f"{kept}.png", [answer], (4, 4))).convert("L")
        return np.asarray(image)[55:95, 418:700].min()

    assert darkest(True) < 80 < darkest(False)


def test_words_and_decisions_belong_together(tmp_path):
    with pytest.raises(ValueError, match="2 words have 1 decisions"):
        draw_greyed_answers(tmp_path / "x.png", [GreyedAnswer(picture(), [], "", ["a", "b"], [True])], (4, 4))


def test_keep_rate_by_word_needs_frequent_words(tmp_path):
    words, kept = [["a", "b", "a"]] * 5, [[True, False, False]] * 5
    assert is_drawn(draw_keep_rate_by_word(tmp_path / "w.png", words, kept, title="t", least_count=5))
    with pytest.raises(ValueError, match="lower least_count"):
        draw_keep_rate_by_word(tmp_path / "w.png", words, kept, title="t", least_count=50)


def test_curves_skip_missing_and_undefined_values(tmp_path):
    sparse = [
        {"step": i, "image_keep_rate": 0.5 - i / 50, "output_keep_rate": float("nan") if i % 2 else 0.5, "lm_loss": 1.0}
        for i in range(10)
    ]
    dense = [{"step": i, "lm_loss": 0.9, "grad_norm": 1.0} for i in range(10)]
    targets = {"image_keep_rate": 0.2, "output_keep_rate": 0.5}
    both = draw_training_curves(tmp_path / "both.png", {"I|T": sparse, "control": dense}, targets, title="t")
    only = draw_training_curves(tmp_path / "only.png", {"control": dense}, targets)
    assert is_drawn(both) and is_drawn(only)
    assert Image.open(both).width > Image.open(only).width
    with pytest.raises(ValueError, match="no training records"):
        draw_training_curves(tmp_path / "none.png", {"control": []}, targets)
