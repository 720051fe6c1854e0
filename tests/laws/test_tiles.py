"""Images of any size (LLaVA-NeXT): every path agrees, rows are islands, and newlines are nobody's to drop."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from dynamic_llava.methods import METHODS, Cut, Method, get_method
from dynamic_llava.sparsity import budget
from tests.builders import HIDDEN, IMAGE_TOKEN, LAYERS, LEARNED, assert_same_logits, build_model
from tests.laws.test_images_of_any_length import BY_FEATURES
from tests.tiled import PINPOINTS, ROWS, SIZES, TILING, batch_of, newlines_of, next_model, pixels_of, row_alone

KEYS = torch.arange(len(ROWS)) + 5
HOW = {"both": {"sparsity": "both"}, **{name: {"method": name} for name in BY_FEATURES if name not in LEARNED}}
EVICTING = [name for name in BY_FEATURES if METHODS[name]().evicts]
READ_ONCE = [name for name in BY_FEATURES if any(cut.reads_question for cut in METHODS[name]().cuts(LAYERS))]


def places(batch):
    """(B, N) bool: the image tokens of a batch, and its newlines."""
    image = (batch["input_ids"] == IMAGE_TOKEN) & ~batch["output_mask"]
    newline = torch.zeros_like(image).masked_scatter(image, newlines_of([name for row in ROWS for name in row]))
    return image & ~newline, newline


@pytest.mark.parametrize("how", [name for name in HOW if name not in EVICTING])
@torch.no_grad()
def test_masking_dropping_and_a_row_alone_agree(how):
    model, batch = next_model(), batch_of()
    masked = model(**batch, labels=batch["input_ids"], sample_key=KEYS, **HOW[how])
    dropped = model(**batch, sample_key=KEYS, **HOW[how])
    if masked.sparsity is None:
        return  # a dense call has no record
    keep, real = masked.sparsity.keep_mask.bool(), batch["attention_mask"].bool()
    assert torch.equal(dropped.sparsity.keep_mask.bool(), keep)
    assert_same_logits(dropped.logits[keep], masked.logits[keep])
    for number in range(len(ROWS)):
        alone = row_alone(batch, number)
        out = model(**alone, labels=alone["input_ids"], sample_key=KEYS[number : number + 1], **HOW[how])
        assert torch.equal(out.sparsity.keep_mask[0].bool(), keep[number, real[number]])
        assert_same_logits(out.logits[0], masked.logits[number, real[number]], what=f"row {number}")


@pytest.mark.parametrize("how", HOW)
@torch.no_grad()
def test_newlines_stay_and_no_budget_counts_them(how):
    model, batch = next_model(), batch_of()
    record = model(**batch, sample_key=KEYS, **HOW[how]).sparsity
    if record is None:
        return
    image, newline = places(batch)
    assert torch.equal(record.layout.is_image, image) and torch.equal(record.layout.newline, newline)
    assert (record.until[newline] == LAYERS).all()
    assert record.layout.image_lengths().tolist() == [TILING.image_tokens(SIZES[name]) for row in ROWS for name in row]
    assert not (record.layout.prompt & (newline | image)).any()
    if how in ("both", "fastv", "divprune", "random"):
        rate = model.config.sparsity.image_keep_rate if how == "both" else get_method(how).image_keep_rate
        kept = [len(one) for row in record.image_indices for one in row]
        assert kept == [budget(rate, TILING.image_tokens(SIZES[name])) for row in ROWS for name in row]
        assert float(record.image_keep_rate) == pytest.approx(sum(kept) / int(image.sum()))


@dataclass(frozen=True)
class Sees(Method):
    """Notes what it is shown, and drops every image token."""

    name: ClassVar[str] = "sees"
    heard: list = field(default_factory=list, compare=False)

    def cuts(self, layers):
        return (Cut(2),)

    def keep_image(self, cut, images, learned):
        self.heard.append(images)
        return torch.zeros_like(images.valid)


@torch.no_grad()
def test_a_method_is_shown_patches_alone():
    """Not even one that drops all of an image is asked about a newline."""
    model, batch, sees = next_model(), batch_of(), Sees()
    record = model(**batch, method=sees).sparsity
    (images,) = sees.heard
    lengths = [TILING.image_tokens(SIZES[name]) for row in ROWS for name in row]
    assert images.valid.sum(1).tolist() == lengths == images.tokens.tolist()
    image, newline = places(batch)
    assert not record.keep_mask[image].any() and record.keep_mask[newline].all()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_generating_row_by_row_and_in_a_batch(how, cached):
    model, batch = next_model(), batch_of(answer=0)
    call = {"max_new_tokens": 5, "do_sample": False, "use_cache": cached, "return_dict_in_generate": True, **HOW[how]}
    inputs = {name: value for name, value in batch.items() if name != "output_mask"}
    if not cached and how in EVICTING:
        with pytest.raises(ValueError, match=f"'{how}' evicts"):
            model.generate(**inputs, **call)
        return
    out = model.generate(**inputs, **call, sample_key=KEYS)
    for number in range(len(ROWS)):
        alone = {name: value for name, value in row_alone(batch, number).items() if name != "output_mask"}
        said = model.generate(**alone, **call, sample_key=KEYS[number : number + 1])
        width = alone["input_ids"].shape[1]
        assert torch.equal(said.sequences[0, width:], out.sequences[number, batch["input_ids"].shape[1] :])
        if out.sparsity is not None:
            real = torch.nn.functional.pad(batch["attention_mask"][number].bool(), (0, 4), value=True)
            assert torch.equal(out.sparsity.keep_mask[number, real], said.sparsity.keep_mask[0])
    if out.sparsity is not None:
        newline = places(batch)[1]
        assert out.sparsity.layout.newline[:, : newline.shape[1]].equal(newline)


@pytest.mark.parametrize("call", [{"num_beams": 3, "do_sample": False}, {"do_sample": True}], ids=["beams", "sampled"])
@torch.no_grad()
def test_several_answers_cached_and_not_are_what_a_masked_pass_says(call):
    model, batch = next_model(), batch_of(answer=0)
    inputs = {name: value for name, value in batch.items() if name != "output_mask"}
    call = {**call, "max_new_tokens": 5, "num_return_sequences": 2, "return_dict_in_generate": True}
    outs = []
    for cached in (True, False):
        torch.manual_seed(2)
        outs.append(model.generate(**inputs, **call, use_cache=cached))
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    assert torch.equal(outs[0].sparsity.keep_mask.bool(), outs[1].sparsity.keep_mask.bool())
    sequences, width = outs[0].sequences, batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"].repeat_interleave(2, 0), (0, 5), value=1)
    output = (torch.arange(sequences.shape[1]) >= width).expand_as(sequences)
    images = pixels_of([name for row in ROWS for _ in range(2) for name in row])
    teacher = model(input_ids=sequences, attention_mask=mask, output_mask=output, labels=sequences, **images)
    fed = mask.bool()[:, :-1]
    assert torch.equal(outs[0].sparsity.keep_mask.bool()[fed], teacher.sparsity.keep_mask.bool()[:, :-1][fed])


@pytest.mark.parametrize("how", [name for name in HOW if name not in READ_ONCE and name not in EVICTING])
@torch.no_grad()
def test_later_turns_with_new_images_equal_one_pass(how):
    """A live cache that is given the images of each turn alone; its log keeps newlines apart."""
    model = next_model()
    first, second = batch_of((("wide",), ()), answer=3), batch_of((("narrow", "small"), ("tall",)), answer=3, seed=8)
    switches = {"sample_key": KEYS[:2], **HOW[how]}
    if METHODS.get(how) is not None and METHODS[how]().is_dense:
        return
    whole = {name: torch.cat([first[name], second[name]], 1) for name in ("input_ids", "attention_mask", "output_mask")}
    positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    images = pixels_of(("wide", "narrow", "small", "tall"))
    masked = model(**whole, **images, labels=whole["input_ids"], position_ids=positions, **switches)
    width, cache = first["input_ids"].shape[1], None
    for part, end in ((first, width), (second, whole["input_ids"].shape[1])):
        out = model(
            input_ids=part["input_ids"],
            **{name: part[name] for name in ("pixel_values", "image_sizes")},
            attention_mask=whole["attention_mask"][:, :end],
            output_mask=whole["output_mask"][:, :end],
            position_ids=positions[:, end - part["input_ids"].shape[1] : end],
            past_key_values=cache,
            use_cache=True,
            **switches,
        )
        cache = out.cache
        assert_same_logits(out.logits[:, -1], masked.logits[:, end - 1])
    record = cache.record
    for name in ("image", "valid", "output", "newline"):
        assert torch.equal(getattr(record.layout, name), getattr(masked.sparsity.layout, name)), name
    assert torch.equal(record.keep_mask, masked.sparsity.keep_mask.bool())


@pytest.mark.parametrize("rows", [ROWS, ((), ())], ids=["images", "text alone"])
def test_training_reaches_every_weight_and_counts_patches(rows):
    """The newline among them, also of a batch without an image; the rates are those of patches."""
    model = build_model(image_grid_pinpoints=PINPOINTS).train()
    batch = batch_of(rows, "right")
    out = model(
        **batch, labels=batch["input_ids"].masked_fill(~batch["output_mask"], -100), sample_key=KEYS[: len(rows)]
    )
    out.loss.backward()
    assert all(one.grad is not None for name, one in model.named_parameters() if "vision_tower" not in name)
    newline = model.model.image_newline
    assert bool(newline.grad.abs().max() > 0) == (rows is ROWS) and newline.shape == (HIDDEN,)
    if rows is ROWS:
        image, _ = places(batch)
        keep = out.sparsity.keep_mask
        rate = torch.stack([keep[row][image[row]].mean() for row in range(len(rows)) if rows[row]])
        expected = (rate - model.config.sparsity.image_keep_rate).square().sum() / len(rows)
        torch.testing.assert_close(out.image_keep_loss, expected)


@pytest.mark.parametrize("name", sorted({*METHODS} - {*BY_FEATURES} - {"voco_llama"}))
def test_methods_that_read_the_tower_refuse(name):
    if METHODS[name]().is_dense or name in LEARNED:
        pytest.skip("learned: its weights are those of a checkpoint of its own")
    with pytest.raises(ValueError, match=r"LLaVA-NeXT tile by tile|text_tower"), torch.no_grad():
        next_model()(**batch_of(), method=name)


MISFITS = {
    "no sizes": (lambda given: given.pop("image_sizes"), "give image_sizes"),
    "sizes of other images": (lambda given: given["image_sizes"].__setitem__(0, 300), "image_sizes"),
    "a size too few": (lambda given: given.update(image_sizes=given["image_sizes"][:-1]), "5 images"),
    "one size for all": (lambda given: given.update(image_sizes=torch.tensor([30, 110])), "no sizes"),
    "one tile an image": (lambda given: given.update(pixel_values=given["pixel_values"][:, 0]), "6 tiles"),
    "other tiles": (lambda given: given.update(pixel_values=given["pixel_values"][..., :55]), "tiles of"),
}


@pytest.mark.parametrize("sparsity", ["both", "none"])
@pytest.mark.parametrize("way", MISFITS)
def test_sizes_and_tiles_that_do_not_fit_are_named(way, sparsity):
    spoil, words = MISFITS[way]
    batch = batch_of()
    spoil(batch)
    with pytest.raises(ValueError, match=words), torch.no_grad():
        next_model()(**batch, sparsity=sparsity)


@torch.no_grad()
def test_images_as_features_need_their_sizes():
    model, batch = next_model(), batch_of()
    encoded = model.model.encode_images(batch["pixel_values"], image_sizes=batch["image_sizes"]).pooler_output
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    by_pixels, by_features = model(**batch), model(**inputs, image_features=encoded)
    assert torch.equal(by_pixels.logits, by_features.logits)
    del inputs["image_sizes"]
    with pytest.raises(ValueError, match="give image_sizes"):
        model(**inputs, image_features=encoded)
    dense = model(**{**batch, "output_mask": None}, sparsity="none").logits
    real = batch["attention_mask"].bool()
    assert_same_logits(model(**inputs, image_features=encoded, sparsity="none").logits[real], dense[real])
    inputs["image_sizes"] = batch["image_sizes"].flip(0)
    with pytest.raises(ValueError, match="the sizes that the features were made of"):
        model(**inputs, image_features=encoded)
