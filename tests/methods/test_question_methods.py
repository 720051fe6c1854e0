"""Methods that decide by the question: which text that is, numbers by hand, ties."""

import pytest
import torch

from dynamic_llava.engine.question import question_of
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import DART, Cut, ImageTokens, QuestionTokens, VScan

CUT = Cut(2)


def images(keys, normed, text_keys, text_normed, valid=None):
    """Return one image of (n, K) keys and (n, D) normed states, and a question of (t, K) and (t, D)."""
    keys, normed, text_keys, text_normed = (
        torch.tensor(one)[None].float() for one in (keys, normed, text_keys, text_normed)
    )
    question = QuestionTokens(
        torch.ones(text_keys.shape[:2], dtype=torch.bool), {"keys": text_keys, "normed": text_normed}
    )
    valid = torch.ones(keys.shape[:2], dtype=torch.bool) if valid is None else torch.tensor([valid])
    return ImageTokens(normed, valid, torch.zeros(1), {"keys": keys, "normed": normed}, question=question)


def kept(method, shown):
    return method.keep_image(CUT, shown, None)[0].nonzero()[:, 0].tolist()


def angles(*degrees):
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], -1).tolist()


def test_dart_takes_what_is_least_like_each_pivot_in_turn():
    """Pivots are those of the largest L1 norm: token 4 (3 + 3, where 2 has the larger L2 norm), then text 1."""
    keys = [[1, 0], [1, 1], [5, 0], [0, 1], [3, -3], [2, 0]]
    shown = images(keys, angles(0, 90, 170, 200, 10, 60), [[0, 1], [-2, 2], [1, 0]], angles(0, 175, 0))
    method = DART(image_keep_rate=0.5, image_pivots=1, text_pivots=1)  # 3 of 6: the pivot, one by each pivot
    assert kept(method, shown) == [0, 3, 4], "200 is farthest from the pivot at 10, then 0 from the text at 175"
    assert kept(DART(image_keep_rate=0.34, image_pivots=1, text_pivots=1), shown) == [0, 4], "the last one's share"
    assert kept(DART(image_keep_rate=0.17, image_pivots=4), shown) == [4], "never more than the budget"
    assert kept(DART(image_keep_rate=0.34, image_pivots=0, text_pivots=2), shown) == [0, 2]
    assert kept(DART(image_keep_rate=1.0), shown) == [0, 1, 2, 3, 4, 5]


def test_dart_gives_ties_to_the_earlier_token_and_leaves_filler_alone():
    shown = images([[1.0]] * 6, angles(*[0] * 6), [[1.0]] * 2, angles(0, 0), [True] * 4 + [False] * 2)
    assert kept(DART(image_keep_rate=0.75, image_pivots=1), shown) == [0, 1, 2]
    assert kept(DART(image_keep_rate=0.5, image_pivots=0, text_pivots=9), shown) == [0, 1]


def test_a_question_is_the_text_behind_an_image_and_before_the_first_answer():
    """Of two rows: text, image, text, image, text, answer, text; and an image right before the answer."""
    kinds = ["TIITITTAAT", "__TTTTTIIA"]
    valid, output = (torch.tensor([[kind in its for kind in row] for row in kinds]) for its in ("TIA", "A"))
    number = torch.tensor([[-1, 0, 0, -1, 1, -1, -1, -1, -1, -1], [-1] * 7 + [2, 2, -1]])
    layout = TokenLayout(valid, number, output.cumsum(1) > 0)
    columns = torch.arange(10.0).expand(2, 10)[..., None]
    question = question_of(layout, torch.tensor([0, 0, 1]), {"normed": columns, "question_row": columns[..., 0]})
    assert set(question.seen) == {"normed"}
    found = [its[mask, 0].tolist() for its, mask in zip(question.seen["normed"], question.valid, strict=True)]
    assert found == [[3, 5, 6], [5, 6], [8]], "the last token before the answer stands for a question that is missing"


@pytest.mark.parametrize(("rate", "wide", "left"), [(0.0556, 96, 32), (0.1112, 192, 64), (0.1667, 288, 96)])
def test_vscan_has_the_published_averages(rate, wide, left):
    """192 / 2 is six patches in each of 16 windows; half of the layers see all that enter, half a third."""
    generator = torch.Generator().manual_seed(5)
    early, deep = torch.rand(2, 1, 576, generator=generator)
    hidden, valid = torch.randn(1, 576, 4, generator=generator), torch.ones(1, 576, dtype=torch.bool)
    method = VScan(image_keep_rate=rate)
    before, later = method.cuts(32)
    assert later.layer == 16
    shown = ImageTokens(hidden, valid, torch.zeros(1), {"class_row": deep, "early_class_row": early})
    keep = method.keep_image(before, shown, None).keep
    assert int(keep.sum()) == wide
    windows = keep.view(4, 6, 4, 6).transpose(1, 2).flatten(2).sum(-1)
    assert int(windows.min()) >= wide // 2 // 16
    row = torch.rand(1, wide, generator=generator)
    shown = ImageTokens(hidden[:, :wide], valid[:, :wide], torch.zeros(1), {"question_row": row}, torch.tensor([576]))
    assert int(method.keep_image(later, shown, None).sum()) == left
    assert (16 * wide + 16 * left) / 32 == 2 * left


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DART(image_pivots=-1), "image_pivots=-1 is no number of pivots"),
        (lambda: DART(image_pivots=0, text_pivots=0), "leave nothing to compare with"),
        (lambda: VScan(wider=0), "wider=0 is no count"),
        (lambda: VScan(local_share=2), "local_share=2 is no share"),
        (lambda: VScan(layer=0), "layer=0 is before the language model"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
