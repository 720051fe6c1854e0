"""Images of different lengths in one batch: every one is decided on, sampled and counted as if it were alone.

That all paths agree on them, cached and not, in beams and in later turns, is a dimension of `tests/worlds.py`.
"""

from fractions import Fraction

import pytest
import torch

from dynamic_llava import SparsityConfig
from dynamic_llava.methods import METHODS, get_method
from dynamic_llava.sparsity import budget
from tests.builders import FIRST_WORD, HIDDEN, IMAGE_TOKEN, LAYERS, PAD, VOCABULARY, build_model, model_of, shared_model

ROWS = [[9], [16, 5], [], [1, 20, 7]]
"""Tokens of each image, row by row: neighbours where a row has several, and a row of text."""
BY_FEATURES = [
    name
    for name, kind in METHODS.items()
    if not (any(cut.reads_tower for cut in kind().cuts(LAYERS)) or kind().added_tokens)
]
"""Methods that decide by projected features; those that read the tower refuse them (tests/model/test_tower.py)."""
RELAXATIONS = ["gumbel_st", "sigmoid_st", "soft_topk"]


def batch_of(rows, side="left", answer=6):
    """Return ids, masks and features of rows that begin with a word and end in a question and an answer."""
    generator = torch.Generator().manual_seed(11)
    made, width = [], max(2 + sum(row) + answer for row in rows)
    for row in rows:
        words = torch.randint(FIRST_WORD, VOCABULARY, (2 + answer,), generator=generator).tolist()
        ids = [words[0], *[IMAGE_TOKEN] * sum(row), *words[1:]]
        missing = width - len(ids)
        kinds = [[1] * len(ids), [0] * (len(ids) - answer) + [1] * answer]
        filled = [[PAD] * missing, [0] * missing, [0] * missing]
        pairs = zip(filled, [ids, *kinds], strict=True)
        made.append([torch.tensor(pad + its if side == "left" else its + pad) for pad, its in pairs])
    ids, valid, output = (torch.stack(parts) for parts in zip(*made, strict=True))
    features = [torch.randn(length, HIDDEN, generator=generator) for row in rows for length in row]
    return {"input_ids": ids, "attention_mask": valid, "output_mask": output.bool(), "image_features": features}


def row_alone(batch, number):
    """Return one row of the batch without padding, with its own images."""
    real = batch["attention_mask"][number].bool()
    first = sum(map(len, ROWS[:number]))
    masks = {name: batch[name][number : number + 1, real] for name in ("input_ids", "attention_mask", "output_mask")}
    return {**masks, "image_features": batch["image_features"][first : first + len(ROWS[number])]}


@pytest.mark.parametrize(
    "name", [name for name in BY_FEATURES if not (METHODS[name]().evicts or name.startswith("sparsevlm"))]
)
@pytest.mark.parametrize("rate", [0.2, 0.29, 0.5])
@torch.no_grad()
def test_every_image_has_a_budget_of_its_own(name, rate):
    """floor(rate * n_i), exact in decimals, at least 1, for each image i at each cut (Structure keeps whole steps).

    SparseVLM has a schedule instead: test_a_schedule_is_scaled_to_each_image.
    """
    model, method = model_of(name), METHODS[name]
    settings = {one: rate for one in ("image_keep_rate", "stage_keep_rate") if one in method.__dataclass_fields__}
    out = model(**batch_of(ROWS), labels=batch_of(ROWS)["input_ids"], method=get_method(name, **settings))
    if out.sparsity is None:
        return  # a dense call has no record
    kept = [[len(image) for image in row] for row in out.sparsity.image_indices]
    wanted = ROWS
    for _ in get_method(name).cuts(LAYERS) if settings else ():
        wanted = [[budget(rate, length, minimum=int(name != "structure")) for length in row] for row in wanted]
    assert kept == wanted


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus"])
@torch.no_grad()
def test_a_schedule_is_scaled_to_each_image(name):
    """At layers 1 and 3 of 6, entries 1 and 2; version 1 keeps one group more for each ten tokens that it recycles."""
    last, schedule = ("0.34", (300, 200, 110)) if name == "sparsevlm" else ("0.34", (300, 200, 118))
    out = shared_model()(
        **batch_of(ROWS), labels=batch_of(ROWS)["input_ids"], method=get_method(name, last_keep_rate=0.34)
    )
    for row, lengths in zip(out.sparsity.image_indices, ROWS, strict=True):
        for kept, length in zip(row, lengths, strict=True):
            left = length
            for entry in schedule[1:]:
                best = min(left, max(1, int(Fraction(last) * entry / schedule[-1] * length)))
                recycled = int((left - best) * 0.3) + 1 if left > best and name == "sparsevlm" else 0
                left = best + (recycled // 10 + 1 if recycled else 0)
            assert len(kept) == left


@pytest.mark.parametrize("relaxation", RELAXATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_samples_an_image_among_others_as_alone(relaxation, side):
    """Decisions and both keep-rate terms of a row; the batch's gradient is the sum of its rows' gradients."""
    model = build_model(relaxation=relaxation).double().train()
    batch, keys = batch_of(ROWS, side), torch.arange(len(ROWS)) + 5
    batch["image_features"] = [image.double() for image in batch["image_features"]]
    parameters = [*model.model.language_model.image_predictor.parameters()]

    def trained(inputs, keys):
        labels = torch.where(inputs["output_mask"], inputs["input_ids"], -100)
        model.zero_grad()
        places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        counts = {"num_items_in_batch": 1, "num_samples_in_batch": 1}
        out = model(**inputs, labels=labels, position_ids=places, sample_key=keys, **counts)
        out.loss.backward()
        return out, [parameter.grad.clone() for parameter in parameters]

    together, gradients = trained(batch, keys)
    alone = [trained(row_alone(batch, number), keys[number : number + 1]) for number in range(len(ROWS))]
    for number, (out, _) in enumerate(alone):
        real = batch["attention_mask"][number].bool()
        assert torch.equal(out.sparsity.keep_mask[0], together.sparsity.keep_mask[number, real])
        image = out.sparsity.layout.is_image[0]
        if image.any():
            rate = out.sparsity.keep_mask[0][image].mean()
            target = model.config.sparsity.image_keep_rate
            torch.testing.assert_close(out.image_keep_loss, (rate - target).square().to(out.image_keep_loss.dtype))
    for term in ("image_keep_loss", "output_keep_loss"):
        torch.testing.assert_close(getattr(together, term), sum(getattr(out, term) for out, _ in alone))
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for place, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(its[place] for _, its in alone), rtol=1e-5, atol=1e-6 * largest)


@torch.no_grad()
def test_padding_of_shorter_images_reaches_no_score():
    """The predictor's logits of an image among longer ones are those of the image alone, whatever stands behind it."""
    predictor = shared_model().model.language_model.image_predictor
    hidden, lengths = torch.randn(4, 20, HIDDEN), torch.tensor([9, 20, 1, 13])
    valid = torch.arange(20) < lengths[:, None]
    for filler in (0.0, 1e4, float("nan")):
        logits = predictor(torch.where(valid[..., None], hidden, filler), valid)
        for image, length, mine in zip(hidden, lengths, logits, strict=True):
            torch.testing.assert_close(mine[:length], predictor(image[None, :length])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how", [{"sparsity": "both"}, {"sparsity": "none"}, *({"method": name} for name in BY_FEATURES)], ids=str
)
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_generating_from_images_of_any_length(how, cached):
    """Each row says what it says alone; a dense generation is transformers' own on the same embeddings."""
    model, batch = model_of(how.get("method")), batch_of(ROWS, answer=0)
    keys = torch.arange(len(ROWS)) + 5
    call = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached, **how}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "image_features")}
    if not cached and "method" in how and METHODS[how["method"]]().evicts:
        with pytest.raises(ValueError, match=f"'{how['method']}' evicts"):
            model.generate(**inputs, **call)
        return
    answers = model.generate(**inputs, **call, sample_key=keys)[:, batch["input_ids"].shape[1] :]
    for number in range(len(ROWS)):
        alone = {name: value for name, value in row_alone(batch, number).items() if name != "output_mask"}
        said = model.generate(**alone, **call, sample_key=keys[number : number + 1])
        assert torch.equal(said[0, alone["input_ids"].shape[1] :], answers[number]), f"row {number}"


def features(*lengths, width=HIDDEN):
    return [torch.zeros(length, width) for length in lengths]


MISFITS = {
    "too few": (features(9, 16, 5), ["3 images of 9, 16, 5 tokens", "58 image tokens"]),
    "rows exchanged": (features(16, 5, 9, 1, 20, 7), ["image 0", "16 tokens", "do not follow one another in one row"]),
    "an image over two rows": (features(25, 5, 1, 20, 7), ["image 0", "25 tokens", "in one row"]),
    "no token": (features(9, 16, 5, 0, 1, 20, 7), ["image_features[3]", "at least one token"]),
    "another width": (features(9, 16, 5, 1, 20, 7, width=32), ["image_features[0]", "(9, 32)", f"(tokens, {HIDDEN})"]),
    "no features": ([*features(9, 16, 5, 1, 20), "7"], ["image_features[5]"]),
}


@pytest.mark.parametrize("sparsity", ["both", "none"])
@pytest.mark.parametrize("way", MISFITS)
def test_images_that_do_not_fit_their_tokens_are_named(way, sparsity):
    given, words = MISFITS[way]
    with pytest.raises(ValueError) as error, torch.no_grad():
        shared_model()(**{**batch_of(ROWS), "image_features": given}, sparsity=sparsity)
    for word in words:
        assert word in str(error.value), error.value


def test_an_image_in_two_pieces_is_named():
    batch = batch_of([[8, 8]])
    batch["input_ids"][0, 5] = FIRST_WORD
    batch["image_features"] = features(7, 8)
    with pytest.raises(ValueError, match=r"7 tokens of image 0.*do not follow one another"), torch.no_grad():
        shared_model()(**batch)


@torch.no_grad()
def test_a_mask_over_filled_embeddings_marks_whole_images():
    """Without features an image's length is the model's own."""
    model = shared_model()
    embeds, mask = torch.randn(1, 40, HIDDEN), torch.zeros(1, 40, dtype=torch.bool)
    mask[0, 2:34] = True
    assert [len(kept) for kept in model(inputs_embeds=embeds, image_mask=mask).sparsity.image_indices[0]] == [4, 4]
    mask[0, 33] = False
    with pytest.raises(ValueError, match="part of an image"):
        model(inputs_embeds=embeds, image_mask=mask)


def test_the_record_names_each_length():
    with torch.no_grad():
        record = shared_model()(**batch_of(ROWS), sparsity="image").sparsity
    assert "row 1: kept 4 of 16, 1 of 5 tokens per image" in repr(record)
    assert "row 2: " in repr(record) and SparsityConfig().image_keep_rate == 0.2
