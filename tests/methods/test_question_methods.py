"""Methods that decide by the question: which text that is, numbers by hand, ties."""

import math

import pytest
import torch

from dynamic_llava.engine.question import question_of
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import DART, Cut, ImageTokens, QuestionTokens, SparseVLM, SparseVLMPlus, VScan
from dynamic_llava.methods.sparsevlm import grouped

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
    ("method", "published"),
    [
        (SparseVLM(), (300, 200, 110)), (SparseVLM(last_keep_rate=0.0296, schedule=(66, 30, 17)), (66, 30, 17)),
        (SparseVLM(last_keep_rate=0.0626, schedule=(303, 110, 36)), (303, 110, 36)),
        (SparseVLMPlus(), (300, 200, 118)),
        (SparseVLMPlus(last_keep_rate=0.1042, schedule=(238, 108, 60)), (238, 108, 60)),
        (SparseVLMPlus(last_keep_rate=0.0348, schedule=(66, 34, 20)), (66, 34, 20)),
    ],
)  # fmt: skip
def test_sparsevlm_has_the_published_schedules(method, published):
    """Of 576 tokens, behind layers 2, 6 and 15 of 32; an image of another length has its proportion of them."""
    cuts, valid = method.cuts(32), torch.ones(2, 576, dtype=torch.bool)
    assert [cut.layer for cut in cuts] == [3, 7, 16] and [cut.layer for cut in method.cuts(4)] == [1, 2]
    shown = ImageTokens(torch.zeros(2, 576, 1), valid, torch.zeros(2), tokens=torch.tensor([576, 64]))
    for cut, count in zip(cuts, published, strict=True):
        assert method.budgets(cut, shown).tolist() == [count, max(1, count * 64 // 576)]


def asked(rows, relevance, hidden=None, rotation=None):
    """Return one image of attention (n, t, H), with a question of so much relevance each."""
    rows, relevance = torch.tensor(rows)[None].float(), torch.tensor(relevance)[None].float()
    valid, every = torch.ones(1, rows.shape[1], dtype=torch.bool), torch.ones_like(relevance, dtype=torch.bool)
    hidden = torch.zeros(*rows.shape[:2], 1) if hidden is None else hidden
    seen, its = {"question_rows": rows}, {"relevance": relevance}
    if rotation is not None:
        seen["rotation"], its["rotation"] = rotation
    return ImageTokens(hidden, valid, torch.zeros(1), seen, question=QuestionTokens(every, its))


def test_sparsevlm_ranks_by_its_raters_alone():
    """Two of three tokens matter more than the mean; the third, which looks at token 3 alone, is not asked."""
    rows = [[[0.1], [0.1], [0.0]], [[0.3], [0.1], [0.0]], [[0.1], [0.4], [0.0]], [[0.0], [0.0], [9.0]]]
    method = SparseVLM(last_keep_rate=0.5, schedule=(1,), drop_layers=(2,))
    (cut,) = method.cuts(6)
    choice = method.keep_image(cut, asked(rows, [0.4, 0.5, 0.1]), None)
    assert choice.keep[0].tolist() == [True, True, True, False], "1 and 2 by rank; 0 is the one that is recycled"
    assert choice.weight[0].tolist() == [1, 1, 1, 0], "token 3 goes nowhere"
    everyone = method.keep_image(cut, asked(rows, [0.5, 0.5, 0.5]), None)
    assert everyone.keep[0].tolist() == [False, True, True, True], "all are raters where none matters more"


def test_sparsevlm_groups_by_density_peaks():
    """As plain Python finds them, of 25 tokens in three heaps; and equal tokens go to the earliest."""
    heaps = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).mul(4).repeat_interleave(9, 0)[:25]
    tokens = heaps + torch.randn(25, 6, generator=torch.Generator().manual_seed(2))
    apart = [[float((one - other).norm()) / 6**0.5 for other in tokens] for one in tokens]
    density = [math.exp(-sum(gap**2 for gap in sorted(gaps)[:3]) / 3) for gaps in apart]
    far = max(map(max, apart))
    peak = [
        density[i] * min([apart[i][j] for j in range(25) if density[j] > density[i]], default=far) for i in range(25)
    ]
    centres = sorted(range(25), key=lambda one: -peak[one])[:3]
    assert [centre // 9 for centre in sorted(centres)] == [0, 1, 2]
    assert grouped(tokens, 3).tolist() == [min(centres, key=lambda centre: apart[i][centre]) for i in range(25)]
    assert grouped(torch.ones(4, 2), 2).tolist() == [0, 1, 0, 0]


def test_sparsevlm_plus_divides_by_what_positions_weigh_and_counts_some_heads():
    """One pair of dimensions: ones at p and q weigh 2 cos(p - q) / sqrt(2). Of two heads the one with more counts."""
    places, question = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.2, 1.3])
    rotation = [torch.stack([at.cos(), at.cos(), at.sin(), at.sin()], -1)[None] for at in (places, question)]
    rows = [[[0.30, 0.9], [0.1, 0.0]], [[0.35, 0.0], [0.1, 0.0]], [[0.40, 0.0], [0.1, 0.0]]]
    weights = 2 * (places[:, None] - question).cos() / 2**0.5
    divided = (torch.tensor(rows)[:, 0, 0] / weights[:, 0]).tolist()  # the first token of the question is the rater
    assert divided[0] > divided[1] > divided[2] and sum(divided) < 0.9 / float(weights[0, 0])
    method = SparseVLMPlus(last_keep_rate=0.34, schedule=(1,), drop_layers=(2,), head_share=0.5)
    (cut,) = method.cuts(6)
    kept = method.keep_image(cut, asked(rows, [0.9, 0.1], rotation=rotation), None)
    assert kept[0].tolist() == [True, False, False]
    rows[2][0][1] = 3.0  # the other head now looks at the last token
    assert method.keep_image(cut, asked(rows, [0.9, 0.1], rotation=rotation), None)[0].tolist() == [False, False, True]
    rows[2][0][1], rows[0][0][1] = 0.0, 0.0
    assert method.keep_image(cut, asked(rows, [0.9, 0.1], rotation=rotation), None)[0].tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DART(image_pivots=-1), "image_pivots=-1 is no number of pivots"),
        (lambda: DART(image_pivots=0, text_pivots=0), "leave nothing to compare with"),
        (lambda: VScan(wider=0), "wider=0 is no count"),
        (lambda: VScan(local_share=2), "local_share=2 is no share"),
        (lambda: VScan(layer=0), "layer=0 is before the language model"),
        (lambda: SparseVLM(schedule=(3, 2)), "is for 2 cuts and there are 3"),
        (lambda: SparseVLM(schedule=(3, 2, 0)), "holds no counts"),
        (lambda: SparseVLMPlus(head_share=0), "head_share"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
