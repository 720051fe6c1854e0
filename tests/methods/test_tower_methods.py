"""Methods that decide by the vision tower, at LLaVA-1.5's 576 patches: published budgets, numbers by hand, ties."""

import numpy as np
import pytest
import torch

from dynamic_llava.methods import (
    SCOPE,
    AveragePool,
    Choice,
    Cut,
    Downsample,
    HiPrune,
    HiRED,
    HoloV,
    IDPruner,
    ImageTokens,
    PruMergePlus,
    VisionZip,
    VisPruner,
)
from dynamic_llava.methods.holov import shared_out
from dynamic_llava.methods.prumerge import outliers_and_grid
from dynamic_llava.methods.vispruner import thinned

PATCHES, WIDTH = 576, 8
CUT = Cut(0)


def images(row, keys=None, features=None):
    """Return images of (I, n) attention, with random keys and features where none are given."""
    row = torch.as_tensor(row, dtype=torch.float32)
    drawn = torch.randn(2, *row.shape, WIDTH, generator=torch.Generator().manual_seed(3))
    keys, features = (value if given is None else given for value, given in zip(drawn, (keys, features), strict=True))
    seen = {"class_row": row, "joint_class_row": row, "tower_keys": keys, "joint_tower_keys": keys, "tower": features}
    return ImageTokens(features, torch.ones_like(row, dtype=torch.bool), torch.arange(len(row)), seen)


def rows(count=2, patches=PATCHES, seed=0):
    return torch.randn(count, patches, generator=torch.Generator().manual_seed(seed)).softmax(1)


@pytest.mark.parametrize(("rate", "total", "dominant"), [(0.3334, 192, 162), (0.2223, 128, 108), (0.1112, 64, 54)])
def test_visionzip_divides_the_published_budgets_as_published(rate, total, dominant):
    row = rows()
    choice = VisionZip(image_keep_rate=rate).keep_image(CUT, images(row), None)
    assert choice.keep.sum(1).tolist() == [total, total]
    for keep, attention in zip(choice.keep, row, strict=True):
        ranked = attention.argsort(descending=True)
        assert keep[ranked[:dominant]].all() and int(keep[ranked[dominant:]].sum()) == total - dominant
        rest = sorted(ranked[dominant:].tolist())
        step = len(rest) // (total - dominant)
        assert [place for place in rest if keep[place]] == rest[::step][: total - dominant]


def test_visionzip_adds_the_mean_of_what_goes_to_a_contextual_patch():
    """Six patches, two dominant, two contextual ones; each other goes to the one whose key points its way."""
    row = [[0.3, 0.05, 0.06, 0.3, 0.07, 0.08]]  # dominant 0 and 3; of 1, 2, 4, 5 every second is contextual: 1 and 4
    keys = torch.tensor([[[1.0, 0], [1, 0], [1, 0.1], [0, 1], [0, 1], [2, 0.1]]])
    choice = VisionZip(image_keep_rate=0.67, dominant_share=0.5).keep_image(CUT, images(row, keys), None)
    assert choice.keep[0].nonzero()[:, 0].tolist() == [0, 1, 3, 4]
    assert choice.into[0, [2, 5]].tolist() == [1, 1]
    assert choice.weight[0].tolist() == [1, 1, 0.5, 1, 1, 0.5]


def test_visionzip_without_contextual_tokens_merges_nothing():
    keep = VisionZip(image_keep_rate=0.5, dominant_share=1).keep_image(CUT, images(rows()), None)
    assert not isinstance(keep, Choice)
    assert torch.equal(keep, HiRED(image_keep_rate=0.5).keep_image(CUT, images(rows()), None))


@pytest.mark.parametrize("rate", [0.2, 0.29, 1.0])
def test_fastervlm_and_hired_choose_alike_in_an_image_of_one_view(rate):
    faster = VisPruner(image_keep_rate=rate, important_ratio=1)
    assert faster.cuts(32)[0].sees == {"class_row"}
    chosen = faster.keep_image(CUT, images(rows()), None)
    assert torch.equal(chosen, HiRED(image_keep_rate=rate).keep_image(CUT, images(rows()), None))


def test_vispruner_thins_out_the_nearest_of_every_other_patch():
    """Of 0, 2, 4 those go whose nearest among 1, 3, 5 is nearest; the others then stand by nearness, before 1, 3, 5."""
    angles = torch.tensor([0.0, 0.5, 1.0, 1.1, 2.0, 2.3])  # nearest: 0 -> 1 by 0.5, 2 -> 3 by 0.1, 4 -> 5 by 0.3
    unit = torch.stack([angles.cos(), angles.sin()], -1)[None]
    listed = torch.arange(6)[None]
    assert thinned(unit, listed, 5).tolist() == [[4, 0, 1, 3, 5]]
    assert thinned(unit, listed, 4).tolist() == [[0, 1, 3, 5]], "up to eight go in one round"
    # 4, 1, 5 are dealt to the first half of what the first round left, 0 and 3 to the second: 1 is nearest, to 0.
    assert thinned(unit, torch.tensor([[4, 0, 1, 3, 5]]), 4).tolist() == [[4, 5, 0, 3]]
    assert thinned(unit, listed, 6).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert thinned(unit, torch.tensor([[2, 5, 4]]), 1).tolist() == [[5]]


def test_ties_go_to_the_earlier_patch():
    even = images(np.full((1, 12), 1 / 12), torch.ones(1, 12, 2), torch.ones(1, 12, 2))
    assert HiRED(image_keep_rate=0.25).keep_image(CUT, even, None)[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert SCOPE(image_keep_rate=0.25).keep_image(CUT, even, None)[0].nonzero()[:, 0].tolist() == [0, 1, 2]
    vispruner = VisPruner(image_keep_rate=0.5).keep_image(CUT, even, None)  # 0, 1, 2; then 3 to 11 thinned out to 3
    assert vispruner[0].nonzero()[:, 0].tolist() == [0, 1, 2, 6, 8, 10]
    choice = VisionZip(image_keep_rate=0.5, dominant_share=0.5).keep_image(CUT, even, None)  # of 3 to 11: 3, 6, 9
    assert choice.keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6, 9]
    assert set(choice.into[0, [4, 5, 7, 8, 10, 11]].tolist()) == {3}
    merged = PruMergePlus(neighbours=3).keep_image(CUT, even, None)  # no outlier: the first, and every fourth
    assert merged.keep[0].nonzero()[:, 0].tolist() == [0, 4, 8, 11]
    assert (merged.shares[0, 4] > 0).nonzero()[:, 0].tolist() == [0, 1, 2, 4]
    half = PruMergePlus(image_keep_rate=0.5).keep_image(CUT, even, None)  # three; of 3 to 11 the third and the seventh
    assert half.keep[0].nonzero()[:, 0].tolist() == [0, 1, 2, 5, 9, 11], "the sum at the last that is not kept"
    np.testing.assert_allclose(half.shares[0, 11], [(place not in (0, 1, 2, 5, 9)) / 12 for place in range(12)])
    for rate, count in ((0.1, 1), (0.25, 3), (0.95, 11), (1.0, 12)):
        assert int(PruMergePlus(image_keep_rate=rate).keep_image(CUT, even, None).keep.sum()) == count


@pytest.mark.parametrize("outliers", [1, 12, 47, 48, 100, 140])
def test_prumerge_counts_outliers_of_each_image_and_steps_by_a_third_of_their_distance(outliers):
    """So many patches stand out; with 48 of 576 the step is int(12 / 3), and no patch is kept twice."""
    row = 1e-4 + 1e-6 * torch.rand(2, PATCHES, generator=torch.Generator().manual_seed(1))
    places = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(outliers))[:outliers]
    row[1, places] = 1e-2
    kept = outliers_and_grid(row)[1].nonzero()[:, 0].tolist()
    step = max(1, int(int(PATCHES / outliers) / 3))
    assert kept == sorted({*places.tolist(), *range(0, PATCHES - 1, step)})


def test_holov_shares_the_budget_out_by_mean_attention():
    """The published weight of variation moves nothing; 64 of 576 in 16 parts of 36."""
    row = rows()
    keep = HoloV(image_keep_rate=0.1112).keep_image(CUT, images(row), None)
    assert torch.equal(keep, HoloV(image_keep_rate=0.1112, variation=0).keep_image(CUT, images(row), None))
    for kept, attention in zip(keep.view(2, 16, 36), row.view(2, 16, 36), strict=True):
        shares = attention.mean(1) / attention.mean(1).sum() * 64
        assert int(kept.sum()) == 64 and (kept.sum(1) - shares.floor()).unique().tolist() == [0, 1]
        for part, values in zip(kept, attention, strict=True):
            assert values[part].min() > values[~part].max()


def test_holov_gives_to_others_what_a_part_cannot_take():
    """Of three parts of two the last has all attention: it takes two, and the others one each in turn."""
    row = [[1e-4, 3e-4, 2e-4, 1e-4, 0.5, 0.4]]
    for total, kept in ((3, [1, 4, 5]), (4, [1, 2, 4, 5]), (5, [0, 1, 2, 4, 5])):
        method = HoloV(image_keep_rate=total / 6 + 0.01, image_parts=3)
        assert method.keep_image(CUT, images(row), None)[0].nonzero()[:, 0].tolist() == kept
    assert shared_out(torch.tensor([[1.0, 1, 1]]), torch.tensor([2, 2, 2]), 4).tolist() == [[2, 1, 1]]


def test_hiprune_keeps_anchors_with_their_neighbours_in_the_grid():
    """24 x 24: anchors in a corner, at the end of a row and inside; the deep layer has the rest of the budget."""
    early, deep = torch.full((1, PATCHES), 1e-3), torch.full((1, PATCHES), 1e-3)
    anchors, registers = [0, 47, 300], [2, 48, 400, 575]
    early[0, anchors], deep[0, [*anchors, *registers]] = torch.tensor([0.3, 0.2, 0.1]), 0.1
    method = HiPrune(image_keep_rate=0.0287, object_share=15 / 16)  # 16 patches, 3 anchors
    shown = images(early)
    shown.seen.update(early_received=early, received=deep)
    kept = method.keep_image(CUT, shown, None)[0].nonzero()[:, 0].tolist()
    beside = [1, 24, 46, 23, 71, 299, 301, 276, 324]
    assert kept == sorted([*anchors, *beside, *registers])
    tiny = HiPrune(image_keep_rate=0.0053, object_share=1).keep_image(CUT, shown, None)  # 3 patches, 1 anchor
    assert tiny[0].nonzero()[:, 0].tolist() == [0, 1, 24], "never more than the budget"


def test_scope_covers_what_is_not_covered_yet():
    """Of two pairs of like patches and one alone one each is chosen first, the heaviest first; then what is left."""
    features = torch.tensor([[[1.0, 0, 0], [1, 0.01, 0], [0, 1, 0], [0, 1, 0.01], [0, 0, 1]]])
    row = [[0.1, 0.2, 0.3, 0.25, 0.05]]
    for total, kept in ((1, [2]), (2, [1, 2]), (3, [1, 2, 4])):
        method = SCOPE(image_keep_rate=total / 5)
        assert method.keep_image(CUT, images(row, features=features), None)[0].nonzero()[:, 0].tolist() == kept


def test_idpruner_weighs_importance_against_likeness():
    """Importance 1, 0.9, 0.5, 0; token 1 is like 0, the others are not. Ties go to the earlier."""
    hidden = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]])
    shown = images([[0.4, 0.37, 0.25, 0.1]], features=hidden)  # likeness is that of projected features: the same here
    chosen = {}
    for weight in (0, 0.3, 0.6, 1):
        keep = IDPruner(image_keep_rate=0.5, importance_weight=weight).keep_image(CUT, shown, None)
        chosen[weight] = keep[0].nonzero()[:, 0].tolist()
    assert chosen == {0: [0, 2], 0.3: [0, 2], 0.6: [0, 2], 1: [0, 1]}
    keep = IDPruner(image_keep_rate=0.5, importance_weight=0.72).keep_image(CUT, shown, None)
    assert keep[0].nonzero()[:, 0].tolist() == [0, 1], "0.72 * 0.9 - 0.28 > 0.72 * 0.5"


def test_prumerge_adds_neighbours_by_attention_and_sums_up_what_is_left():
    row = torch.tensor([[0.02, 0.03, 0.5, 0.04, 0.05, 0.06, 0.07, 0.08]])
    keys = torch.eye(8)[None] + 0.1 * torch.arange(8.0)[:, None]
    choice = PruMergePlus(neighbours=2).keep_image(CUT, images(row, keys), None)
    assert choice.keep[0].nonzero()[:, 0].tolist() == [0, 2, 4, 6, 7]  # an outlier: step int(8 / 3) = 2; 7 for the rest
    unit = (keys[0] / keys[0].norm(dim=-1, keepdim=True)).numpy()
    alike = unit @ unit.T
    for one in (0, 2, 4, 6):
        nearest = sorted((place for place in range(8) if place != one), key=lambda place: -alike[one, place])[:2]
        wanted = [float(place == one) or (row[0, place].item() if place in nearest else 0.0) for place in range(8)]
        np.testing.assert_allclose(choice.shares[0, one], wanted, rtol=1e-6)
    np.testing.assert_allclose(choice.shares[0, 7], [0, 0.03, 0, 0.04, 0, 0.06, 0, 0.08], rtol=1e-6)


def test_pooling_and_downsampling_lay_a_coarser_grid_over_the_patches():
    """24 x 24 in cells of 2 x 2 and 3 x 3; by 7, which does not divide 24, in cells of four that overlap."""
    shown = images(rows())
    for rate, size in ((0.5, 2), (0.3334, 3)):
        choice = AveragePool(side_keep_rate=rate).keep_image(CUT, shown, None)
        keep = choice.keep[1].view(24 // size, size, 24 // size, size)
        middle = (size - 1) // 2
        assert keep[:, middle, :, middle].all() and int(keep.sum()) == (24 // size) ** 2
        assert torch.equal(Downsample(side_keep_rate=rate).keep_image(CUT, shown, None), choice.keep)
        cell = choice.shares[1, 24 * (2 * size + middle) + 5 * size + middle].view(24, 24)
        wanted = np.zeros((24, 24))
        wanted[2 * size : 3 * size, 5 * size : 6 * size] = 1 / size**2
        np.testing.assert_allclose(cell, wanted, rtol=1e-6)
    choice = AveragePool(side_keep_rate=0.3).keep_image(CUT, shown, None)
    pooled = torch.nn.functional.adaptive_avg_pool2d(shown.seen["tower"].transpose(1, 2).unflatten(2, (24, 24)), 7)
    found = (choice.shares @ shown.seen["tower"])[choice.keep].view(2, 49, WIDTH)
    torch.testing.assert_close(found, pooled.flatten(2).transpose(1, 2))
    whole = AveragePool(side_keep_rate=1.0).keep_image(CUT, shown, None)
    assert whole.keep.all() and torch.equal(whole.shares[0], torch.eye(PATCHES))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: VisPruner(important_ratio=1.5), "important_ratio=1.5 is no share"),
        (lambda: VisionZip(dominant_share=0), "dominant_share"),
        (lambda: HiRED(image_keep_rate=0), "image_keep_rate"),
        (lambda: HoloV(image_parts=0), "image_parts=0 is no number of parts"),
        (lambda: HoloV(variation=-1), "variation=-1 is no weight"),
        (lambda: HiPrune(object_depth=2), "object_depth=2 is no share"),
        (lambda: IDPruner(importance_weight=1.5), "importance_weight=1.5 is no weight"),
        (lambda: SCOPE(saliency=-1), "saliency=-1 is no exponent"),
        (lambda: PruMergePlus(neighbours=0), "neighbours=0 is no number of patches"),
        (lambda: AveragePool(side_keep_rate=1.5), "side_keep_rate"),
        (lambda: Downsample(side_keep_rate=0), "side_keep_rate"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
