"""Every registered method behind the same engine: ragged batches, exact budgets, equal paths, rows alone."""

import dataclasses
from typing import ClassVar

import pytest
import torch

from dynamic_llava import METHODS, get_method
from dynamic_llava.methods import Choice, Cut, Dynamic, FastV, Method, OneCut
from dynamic_llava.sparsity import budget, gumbel_keep, top_k_keep
from tests.builders import (
    IMAGE_TOKEN,
    LAYERS,
    TOKENS_PER_IMAGE,
    assert_same_logits,
    build_model,
    collate,
    fixed_rows,
    make_row,
    model_of,
    new_model_of,
    prompts,
    shared_model,
)

STEPS = 8
CALL = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
RATES = (0.1, 0.29, 0.5, 1.0)


def accepts(name, setting):
    return setting in {field.name for field in dataclasses.fields(METHODS[name])}


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def batch():
    return fixed_rows(seed=20, output=0)


def test_the_registry_holds_the_first_peers():
    assert {"dense", "dynamic", "fastv", "h2o", "random", "streaming_llm", "structure"} <= set(METHODS)
    for key, method in METHODS.items():
        assert method.name == key and dataclasses.is_dataclass(method)
        with pytest.raises(dataclasses.FrozenInstanceError):
            get_method(key).layer = 3


@torch.no_grad()
def test_prefill_and_generate_on_a_ragged_batch(name, batch):
    model, inputs = model_of(name), prompts(batch)
    keys = torch.arange(len(batch)) + 5
    out = model.generate(**inputs, **CALL, method=name, sample_key=keys)
    assert out.sequences.shape == (len(batch), inputs["input_ids"].shape[1] + STEPS)
    assert torch.isfinite(torch.stack(out.logits)).all()
    if get_method(name).is_dense:
        assert out.sparsity is None
        return
    # Prompt tokens are never dropped.
    prompt = out.sparsity.layout.prompt
    assert out.sparsity.keep_mask[prompt].bool().all()
    kept = (out.sparsity.keep_mask.bool() & out.sparsity.layout.valid).sum(1)
    assert out.sparsity.cache_lengths.tolist() == kept.tolist()
    stored = torch.stack([layer.slots.lengths for layer in out.cache.layers], 1)
    if get_method(name).evicts:
        assert torch.equal(stored, out.sparsity.head_lengths)
        assert (stored <= out.sparsity.tokens_per_layer()[..., None]).all()
        return
    assert torch.equal(stored, out.sparsity.tokens_per_layer()), "the cache holds other tokens than the record says"
    assert torch.equal(stored[:, 0], out.sparsity.dense_cache_lengths)
    above = get_method(name).cuts(LAYERS)[0].layer > 0
    fed = inputs["attention_mask"].sum(1) + STEPS - 1
    assert torch.equal(stored[:, 0], fed) == above, "every token is in the layers below the first cut, and only there"


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_the_batch(name, batch):
    model, keys = model_of(name), torch.arange(len(batch)) + 5
    together = model.generate(**prompts(batch), **CALL, method=name, sample_key=keys)
    for index, row in enumerate(batch):
        alone = model.generate(**prompts([row]), **CALL, method=name, sample_key=keys[index : index + 1])
        assert torch.equal(alone.sequences[0, -STEPS:], together.sequences[index, -STEPS:])
        both = torch.stack(together.logits, 1)[index], torch.stack(alone.logits, 1)[0]
        assert_same_logits(*both, what=f"row {index}")
        if together.sparsity is not None:
            for one, other in zip(alone.sparsity.image_indices[0], together.sparsity.image_indices[index], strict=True):
                assert torch.equal(one, other)


@torch.no_grad()
def test_cached_uncached_and_masked_agree(name, batch):
    if get_method(name).evicts:
        pytest.skip("what a token sees depends on the steps before it: tests/laws/test_eviction.py")
    model, inputs, keys = model_of(name, 2), prompts(batch), torch.arange(len(batch)) + 5
    cached = model.generate(**inputs, **CALL, method=name, sample_key=keys)
    uncached = model.generate(**inputs, **CALL, method=name, sample_key=keys, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    steps = torch.stack(cached.logits, 1)
    assert_same_logits(torch.stack(uncached.logits, 1), steps)
    width = inputs["input_ids"].shape[1]
    output = torch.zeros_like(cached.sequences, dtype=torch.bool)
    output[:, width:] = True
    teacher = model(
        input_ids=cached.sequences,
        attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1),
        pixel_values=inputs["pixel_values"],
        output_mask=output,
        labels=cached.sequences,
        method=name,
        sample_key=keys,
    )
    assert_same_logits(teacher.logits[:, width - 1 : -1], steps)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if accepts(name, "image_keep_rate")])
@torch.no_grad()
def test_image_budgets_are_exact(name, batch, rate):
    model, inputs = model_of(name), collate(batch, "left")
    call = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    record = model(**call, method=get_method(name, image_keep_rate=rate)).sparsity
    images = [image for row in record.image_indices for image in row]
    assert len(images) == len(inputs["pixel_values"])
    for kept in images:
        assert len(kept) == budget(rate, TOKENS_PER_IMAGE) == max(1, int(rate * TOKENS_PER_IMAGE + 1e-9))
        assert kept.tolist() == sorted(set(kept.tolist()))


@pytest.mark.parametrize("name", ["random", "structure"])
@torch.no_grad()
def test_dropping_every_image_token_is_possible(name, batch):
    """The proof that dropping matters: a rate of 0 leaves the text alone."""
    model, inputs = shared_model(), prompts(batch)
    record = model(**inputs, method=get_method(name, image_keep_rate=0)).sparsity
    assert all(len(kept) == 0 for row in record.image_indices for kept in row)


@torch.no_grad()
def test_structure_keeps_every_other_output_token(batch):
    model = shared_model()
    out = model.generate(**prompts(batch), **CALL, method=get_method("structure", output_keep_rate=0.5))
    for decisions in out.sparsity.output_decisions:
        assert decisions.tolist() == [False, True] * 3 + [False]


@torch.no_grad()
def test_random_draws_follow_sample_and_seed(batch):
    """Rows with different keys draw differently, equal keys alike, another seed anew."""
    model, same = shared_model(), [batch[0]] * 3
    keys = torch.tensor([1, 1, 2])

    def kept(seed):
        record = model(**prompts(same), method=get_method("random", seed=seed, image_keep_rate=0.5), sample_key=keys)
        return [row[0].tolist() for row in record.sparsity.image_indices]

    first = kept(seed=0)
    assert first[0] == first[1] != first[2]
    assert kept(seed=0) == first != kept(seed=1)


def training_call(model, **more):
    inputs = collate([make_row([("text", 2), ("image", 0), ("text", 2), ("output", 8)], seed) for seed in range(2)])
    labels = torch.where(inputs.pop("output_mask"), inputs["input_ids"], -100)
    inputs.pop("keep_mask")
    return model(**inputs, labels=labels, **more)


def test_every_registered_method_trains(name):
    """By sampling with a gradient, or under a fixed rule that it declares; the layers learn either way.

    A method that evicts has no masked pass and is refused by name.
    """
    model = new_model_of(name, layers=3).train()
    if get_method(name).evicts:
        with pytest.raises(ValueError, match=f"'{name}' evicts"):
            training_call(model, method=name)
        return
    training_call(model, method=name, sample_key=torch.arange(2)).loss.backward()
    assert all(layer.mlp.up_proj.weight.grad.abs().sum() > 0 for layer in model.model.language_model.layers)
    own = model.model.language_model
    learns = any(weight.grad is not None for part in own.learner.parts for weight in getattr(own, part).parameters())
    assert learns != METHODS[name].training_free


@dataclasses.dataclass(frozen=True)
class Elsewhere(Method):
    """A method with any cuts, which halves an image at each, and decides on output tokens where a cut says so."""

    name: ClassVar[str] = "elsewhere"
    training_free: ClassVar[bool] = True

    where: tuple[Cut, ...] = ()

    def cuts(self, layers):
        return self.where

    def keep_image(self, cut, images, learned):
        return top_k_keep(images.hidden.float().norm(dim=-1), rate=0.5, valid=images.valid)

    def keep_output(self, outputs, learned):
        return outputs.rank % 3 > 0


ROW = frozenset({"question_row"})
SERVED = [
    (), (Cut(0),), (Cut(1), Cut(2)), (Cut(0), Cut(LAYERS - 1)), (Cut(0, output=True),),
    (Cut(2, ROW), Cut(3, output=True)), (Cut(1, output=True), Cut(4, ROW)),
    tuple(Cut(layer) for layer in range(LAYERS)), (Cut(0, within_image=True),),
    (Cut(3, within_image=True, output=True),),
]  # fmt: skip
REFUSED = [
    ((Cut(LAYERS),), f"decides at the layers .{LAYERS}., and this language model has {LAYERS}"),
    ((Cut(-1),), "layers from 0"),
    ((Cut(2), Cut(1)), "ascending"),
    ((Cut(2), Cut(2)), "each once"),
    ((Cut(1, output=True), Cut(2, output=True)), "let one cut say `output`"),
    ((Cut(0, ROW),), "question_row at layer 0"),
    ((Cut(0), Cut(1, within_image=True)), "`within_image`.*and other cuts; let it be the one thing"),
]


@pytest.mark.parametrize("where", SERVED, ids=str)
@torch.no_grad()
def test_a_method_may_decide_anywhere(where, batch):
    """Cached, uncached and masked passes agree, and the record says what each layer has stored."""
    model, method, inputs = shared_model(2), Elsewhere(where), prompts(batch)
    cached = model.generate(**inputs, **CALL, method=method)
    uncached = model.generate(**inputs, **CALL, method=method, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    steps = torch.stack(cached.logits, 1)
    assert_same_logits(torch.stack(uncached.logits, 1), steps)
    width = inputs["input_ids"].shape[1]
    output = (torch.arange(width + STEPS) >= width).expand_as(cached.sequences)
    taught = model(
        input_ids=cached.sequences,
        attention_mask=torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1),
        pixel_values=inputs["pixel_values"],
        output_mask=output,
        labels=cached.sequences,
        method=method,
    )
    assert_same_logits(taught.logits[:, width - 1 : -1], steps)
    assert torch.equal(taught.sparsity.until[:, :-1], cached.sparsity.until)
    stored = torch.stack([layer.slots.lengths for layer in cached.cache.layers], 1)
    assert torch.equal(stored, cached.sparsity.tokens_per_layer())


@pytest.mark.parametrize(("where", "words"), REFUSED, ids=str)
@torch.no_grad()
def test_cuts_that_cannot_be_are_refused(where, words, batch):
    method = Elsewhere(where)
    for call in (shared_model(), shared_model().generate):
        with pytest.raises(ValueError, match=words):
            call(**prompts(batch), method=method)


@dataclasses.dataclass(frozen=True)
class Merging(OneCut):
    """A method that merges every dropped token into the first of its image, by weights or in the mean."""

    name: ClassVar[str] = "merging"

    layer: int = 0
    first: float | None = None
    """Weight of the first token; the others have the rest of 1, all the same."""

    def keep_image(self, cut, images, learned):
        keep_In = torch.zeros_like(images.valid).index_fill(1, torch.tensor([0]), True)
        others = (images.valid.sum(1, keepdim=True) - 1).clamp(min=1)
        weight_In = None if self.first is None else torch.where(keep_In, self.first, (1 - self.first) / others)
        return Choice(keep_In, into=torch.zeros_like(keep_In, dtype=torch.int64), weight=weight_In)


@torch.no_grad()
def test_tokens_are_merged_by_their_weights(batch):
    """Equal weights are the mean; a weight of 1 for the heir is plain dropping; means are those of the features."""
    model, inputs = shared_model(), prompts(batch)
    mean, plain = (model(**inputs, method=method).logits for method in (Merging(), Merging(first=1.0)))
    assert_same_logits(model(**inputs, method=Merging(first=1 / TOKENS_PER_IMAGE)).logits, mean)
    assert (mean - plain).abs().max() > 0.1
    keep = inputs["input_ids"] != IMAGE_TOKEN
    firsts = keep.new_zeros(keep.shape)
    for row, columns in enumerate(~keep):
        firsts[row, columns.nonzero()[::TOKENS_PER_IMAGE, 0]] = True
    kept = model(**inputs, keep_mask=keep | firsts, method=Elsewhere((Cut(0),))).logits
    assert_same_logits(plain[keep], kept[keep], what="nothing merged")
    features = torch.stack(list(model.model.encode_images(inputs["pixel_values"]).pooler_output))
    features = features.mean(1, keepdim=True).expand_as(features)
    means = {**inputs, "image_features": features, "pixel_values": None}
    meant = model(**means, keep_mask=keep | firsts, method=Elsewhere((Cut(0),))).logits
    assert_same_logits(mean[keep], meant[keep], what="means")


@dataclasses.dataclass(frozen=True)
class ImagesAlone(FastV):
    """A method whose cut has no decision on output tokens, so that it is never asked for one."""

    name: ClassVar[str] = "images_alone"

    def cuts(self, layers):
        return (Cut(self.layer, self.sees, output=False),)

    def keep_output(self, outputs, learned):
        raise AssertionError("asked about output tokens")


@torch.no_grad()
def test_a_cut_without_output_keeps_every_output_token(batch):
    model = shared_model()
    out = model.generate(**prompts(batch), **CALL, method=ImagesAlone())
    uncached = model.generate(**prompts(batch), **CALL, method=ImagesAlone(), use_cache=False)
    assert torch.equal(out.sequences, uncached.sequences)
    assert all(row.all() and len(row) == STEPS - 1 for row in out.sparsity.output_decisions)


SCORER = torch.nn.Linear(64, 1)


@dataclasses.dataclass(frozen=True)
class Learned(OneCut):
    """A method of one's own with something to learn."""

    name: ClassVar[str] = "learned"

    def keep_image(self, cut, images, learned):
        return SCORER(images.hidden)[..., 0] > 0

    def keep_output(self, outputs, learned):
        return SCORER(outputs.hidden)[..., 0] > 0


@dataclasses.dataclass(frozen=True)
class LearnedFastV(FastV):
    """It inherits a training-free method's word for hooks that the word was not given for."""

    keep_output = Learned.keep_output


@dataclasses.dataclass(frozen=True)
class LearnedDynamic(Dynamic):
    """The engine's own sampling would never ask its hook."""

    keep_image = Learned.keep_image


@dataclasses.dataclass(frozen=True)
class Declared(Learned):
    """A subclass that answers for the hooks it inherits."""

    training_free: ClassVar[bool] = True


@pytest.mark.parametrize("kind", [Learned, LearnedFastV, LearnedDynamic])
def test_a_learned_method_is_refused_where_it_would_have_no_gradient(kind, batch):
    model = build_model(layers=3).train()
    words = rf"{kind.name}.*{kind.__name__}.*training_free.*keep_mask.*model\.eval"
    with pytest.raises(ValueError, match=words):
        training_call(model, method=kind())
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        training_call(model, method=kind())
    with pytest.raises(ValueError, match=words):
        model(**prompts(batch), method=kind())  # no labels, but gradients are recorded
    model.generate(**prompts(batch), max_new_tokens=2, method=kind())


def test_the_ways_out_for_a_learned_method_work():
    model = build_model(layers=3).train()
    training_call(model, method=Declared()).loss.backward()
    training_call(model.eval(), method=Learned())
    SCORER.zero_grad()
    margin_BN = SCORER(model.get_input_embeddings()(torch.arange(4, 33).repeat(2, 1)).detach())
    mask_BN = gumbel_keep(torch.cat([-margin_BN, margin_BN], -1), torch.zeros(2, 29, 2), tau=1.0)
    training_call(model.train(), keep_mask=mask_BN).loss.backward()
    assert 0 < mask_BN.sum() < mask_BN.numel() and SCORER.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layer", [1, 3, LAYERS - 1])
@torch.no_grad()
def test_the_sparse_layer_of_a_method_is_respected(layer, batch):
    model = shared_model()
    out = model(**prompts(batch), method=get_method("fastv", layer=layer), use_cache=True)
    lengths = [int(one.slots.lengths[0]) for one in out.past_key_values.layers]
    assert lengths[:layer] == [len(batch[0].ids)] * layer
    assert set(lengths[layer:]) == {len(batch[0].ids) - TOKENS_PER_IMAGE // 2}


@torch.no_grad()
def test_fastv_keeps_what_the_last_question_token_attends_to(batch):
    """Against attention weights of an eager model, read from transformers' own implementation."""
    from tests.builders import dense_twin

    model = shared_model(4, "eager")
    inputs = prompts([batch[0]])
    attentions = dense_twin(model)(**inputs, output_attentions=True).attentions
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    for layer in (1, 2, 4):
        record = model(**inputs, method=get_method("fastv", layer=layer, image_keep_rate=0.5)).sparsity
        row = attentions[layer - 1][0].mean(0)[-1, image]
        expected = row.topk(TOKENS_PER_IMAGE // 2).indices.sort().values
        assert torch.equal(record.image_indices[0][0], expected)
