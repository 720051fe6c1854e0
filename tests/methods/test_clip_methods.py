"""Methods that decide by CLIP's comparison with the question: numbers by hand, brute force, ties."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from dynamic_llava.methods import TRIM, CDPruner, Cut, ImageTokens, QuestionTokens
from dynamic_llava.methods.cdpruner import likeliest, relevance
from dynamic_llava.methods.outliers import outliers

CUT = Cut(0)


def images(tokens, text, hidden=None, pieces=None):
    """Return images of (I, n, P) patches and (I, m, P) pieces of text, of which `pieces` are real."""
    tokens, text = (torch.as_tensor(one, dtype=torch.float32) for one in (tokens, text))
    hidden = tokens if hidden is None else torch.as_tensor(hidden, dtype=torch.float32)
    valid = torch.ones(text.shape[:2], dtype=torch.bool) if pieces is None else torch.tensor(pieces)
    question = QuestionTokens(valid, {"clip_text": text})
    shown = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return ImageTokens(hidden, shown, torch.arange(len(tokens)), {"clip_tokens": tokens}, question=question)


def kept(keep):
    return [row.nonzero()[:, 0].tolist() for row in keep]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_trim_keeps_the_patches_least_like_the_first_piece_and_the_mean_of_the_others():
    """Products 3, -1, 2, -5, 0, 1 with the first piece; the second, which would turn the order, is not read."""
    tokens = [[[3.0, 1], [-1, 1], [2, 1], [-5, 1], [0, 1], [1, 1]]]
    shown = images(tokens, [[[1.0, 0], [-9, 0]]])
    choice = TRIM(image_keep_rate=0.5).keep_image(CUT, shown, None)
    assert kept(choice.keep) == [[1, 3, 5]], "two of the least products, and the mean at the last that is not kept"
    np.testing.assert_allclose(choice.shares[0, 5], [1 / 4, 0, 1 / 4, 0, 1 / 4, 1 / 4])
    for place in (1, 3):
        assert choice.shares[0, place].tolist() == [float(one == place) for one in range(6)]


def test_trim_at_its_edges():
    shown = images(drawn(2, 8, 3), drawn(2, 1, 3))
    one = TRIM(image_keep_rate=0.1).keep_image(CUT, shown, None)
    assert kept(one.keep) == [[7], [7]], "one token is the mean of all"
    np.testing.assert_allclose(one.shares[:, 7], np.full((2, 8), 1 / 8))
    whole = TRIM(image_keep_rate=1.0).keep_image(CUT, shown, None)
    assert whole.keep.all() and torch.equal(whole.shares, torch.eye(8).expand(2, 8, 8)), "the one left is its own mean"
    even = images(torch.ones(1, 6, 2), torch.ones(1, 1, 2))
    assert kept(TRIM(image_keep_rate=0.5).keep_image(CUT, even, None).keep) == [[0, 1, 5]], "ties: the earlier"
    assert kept(TRIM().keep_image(CUT, even, None).keep) == [[5]], "no outlier: the mean alone"


def test_outliers_are_those_of_each_image():
    """Of two images that one batch would pool; quartiles by numpy."""
    scores = (torch.randn(2, 576, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1.0], [3.0]])).softmax(1)
    for count, row in zip(outliers(scores).tolist(), scores.numpy(), strict=True):
        lower, upper = np.percentile(row, [25, 75])
        assert count == (row > upper + 1.5 * (upper - lower)).sum() > 0
    shown = images(-scores.log()[..., None], torch.ones(2, 1, 1))
    keep = TRIM().keep_image(CUT, shown, None).keep
    assert keep.sum(1).tolist() == [count + 1 for count in outliers(scores).tolist()]


def test_relevance_is_a_stretched_mean_over_real_pieces():
    tokens = drawn(2, 5, 4)
    text = drawn(2, 3, 4, seed=1)
    shown = images(tokens, text, pieces=[[True, True, True], [True, False, False]])
    found = relevance(shown.seen["clip_tokens"], shown.question)
    for number, real in enumerate((3, 1)):
        unlike = []
        for patch in tokens[number].double().numpy():
            pieces = text[number, :real].double().numpy()
            alike = [patch @ piece / np.linalg.norm(patch) / np.linalg.norm(piece) for piece in pieces]
            unlike.append(-sum(alike) / real)
        unlike = np.array(unlike)
        wanted = (unlike - unlike.min() + 1e-6) / (unlike.max() - unlike.min())
        np.testing.assert_allclose(found[number], wanted, rtol=1e-4, atol=1e-6)
    assert relevance(torch.ones(1, 3, 4), images(torch.ones(1, 3, 4), torch.ones(1, 1, 4)).question).tolist() == [
        [1] * 3
    ]


def volume(features, weights, chosen):
    """The determinant of the kernel's part, from its definition, in double precision."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    kernel = weights[:, None] * (unit @ unit.T) * weights[None]
    return np.linalg.det(kernel[np.ix_(chosen, chosen)])


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_set_grows_by_what_adds_most_to_the_determinant(seed):
    """Step by step among all that are left; and its volume is near that of the best set of all."""
    features, weights = drawn(2, 8, 5, seed=seed), drawn(2, 8, seed=seed + 50).abs() + 0.1
    chosen = [[], []]
    for count in range(1, 5):
        for number, keep in enumerate(kept(likeliest(features, weights, count))):
            one, its = features[number].double().numpy(), weights[number].double().numpy()
            left = [place for place in range(8) if place not in chosen[number]]
            chosen[number].append(max(left, key=lambda place: volume(one, its, [*chosen[number], place])))
            assert keep == sorted(chosen[number])
            best = max(volume(one, its, list(some)) for some in combinations(range(8), count))
            assert volume(one, its, keep) >= best / math.factorial(count) ** 2, "the known bound, (k!)^2"


def test_tokens_that_are_spanned_already_come_last_and_ties_go_to_the_earlier():
    """Two directions in five tokens: one of each, by relevance; then nothing adds, and places decide."""
    features = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 2], [1, 1]]])
    weights = torch.tensor([[0.5, 1, 0.9, 0.9, 0.3]])
    grown = [kept(likeliest(features, weights, count))[0] for count in range(1, 6)]
    assert grown == [[1], [1, 2], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert kept(likeliest(torch.ones(1, 4, 3), torch.ones(1, 4), 3)) == [[0, 1, 2]]


def test_more_tokens_than_the_space_has_directions_stay_finite_and_distinct():
    features, weights = drawn(3, 40, 4), drawn(3, 40, seed=1).abs()
    assert likeliest(features, weights, 30).sum(1).tolist() == [30] * 3


def test_cdpruner_prefers_what_is_unlike_the_question_among_different_tokens():
    """Four orthogonal tokens: relevance alone orders them; of three like ones a single one counts."""
    tokens = [[[1.0, 0], [0.9, 0.5], [0.5, 0.9], [0, 1]]]
    shown = images(tokens, [[[1.0, 0]]], hidden=torch.eye(4)[None])
    found = [kept(CDPruner(image_keep_rate=rate).keep_image(CUT, shown, None))[0] for rate in (0.25, 0.5, 0.75, 1)]
    assert found == [[3], [2, 3], [1, 2, 3], [0, 1, 2, 3]]
    like = images(tokens, [[[1.0, 0]]], hidden=torch.tensor([[[1.0, 0], [0, 1], [0, 1], [0, 1]]]))
    assert kept(CDPruner(image_keep_rate=0.25).keep_image(CUT, like, None)) == [[3]]
    # 0 has a relevance of 1e-6, and adds its square; 1 and 2 are what 3 spans.
    assert kept(CDPruner(image_keep_rate=0.5).keep_image(CUT, like, None)) == [[0, 3]]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TRIM(image_keep_rate=0), "image_keep_rate"),
        (lambda: TRIM(image_keep_rate="most"), "give a number in .*or 'outliers'"),
        (lambda: CDPruner(image_keep_rate=1.5), "image_keep_rate"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()
