"""What transformers' users and tools do with a LLaVA works with ours, or is refused by name."""

import inspect
import logging
from functools import partial

import pytest
import torch
from transformers import AutoModel, AutoModelForMultimodalLM, DynamicCache, Trainer, TrainingArguments
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.utils import TransformersKwargs
from transformers.utils.logging import warning_once

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.engine.cache import CACHE
from dynamic_llava.model.arguments import DENSE_ONLY, PASSED_ON
from dynamic_llava.model.base_model import TAKES_ENCODED
from tests.builders import (
    HIDDEN,
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    assert_same_logits,
    build_model,
    collate,
    dense_twin,
    fixed_rows,
    make_row,
    prompt_segments,
    prompts,
    shared_model,
)

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return shared_model()


@pytest.fixture(scope="module")
def twin(model):
    return dense_twin(model)


def images_and_text(count=2, output=0):
    """Rows of one image and of equal length, so that every argument of transformers fits them."""
    rows = [make_row([*prompt_segments(1, [2, 4]), ("output", output)], seed=80 + index) for index in range(count)]
    inputs = collate(rows, "left")
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def causal(batch, tokens):
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None].expand(batch, 1, -1, -1)


def ways_to_call(embeddings):
    """Name -> arguments of a forward that transformers' LLaVA takes."""
    inputs = images_and_text()
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    labels = torch.where(ids == IMAGE_TOKEN, -100, ids)
    embedded = {"inputs_embeds": embeddings(ids).detach(), "attention_mask": inputs["attention_mask"]}
    return {
        "ids": inputs,
        "embeddings": {**embedded, "pixel_values": pixels},
        "embeddings of text": embedded,
        "four-dimensional mask": {"input_ids": ids, "pixel_values": pixels, "attention_mask": causal(*ids.shape)},
        "positions": {**inputs, "position_ids": torch.arange(ids.shape[1])[None] + 3},
        "last layer of the vision tower": {**inputs, "vision_feature_layer": -1},
        "labels": {**inputs, "labels": labels},
        "labels on everything": {**inputs, "labels": ids.clone()},
        "shift_labels": {**inputs, "labels": labels, "shift_labels": torch.full_like(ids, 7)},
        "a given number of items": {**inputs, "labels": labels, "num_items_in_batch": 5},
        "a tensor of items": {**inputs, "labels": labels, "num_items_in_batch": torch.tensor(5)},
        "one token's logits": {**inputs, "logits_to_keep": 1},
        "some tokens' logits": {**inputs, "logits_to_keep": torch.tensor([2, 5])},
        "hidden states": {**inputs, "output_hidden_states": True},
        "no cache": {**inputs, "use_cache": False},
        "kinds of tokens": {**inputs, "token_type_ids": torch.zeros_like(ids)},
        "not causal": {**inputs, "is_causal": False},
        "a tuple": {**inputs, "labels": labels, "return_dict": False},
    }


def assert_the_same(ours, theirs, path="output"):
    """Assert that nested outputs are equal to the last bit; ours may have more at the end of a tuple."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), path
    elif isinstance(theirs, DynamicCache):
        for mine, other in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values), path
    elif isinstance(theirs, (tuple, list)):
        assert len(ours) >= len(theirs), path
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
            assert_the_same(mine, other, f"{path}[{index}]")
    else:
        assert ours == theirs, path


@pytest.mark.parametrize("way", ways_to_call(torch.nn.Embedding(128, HIDDEN)))
@torch.no_grad()
def test_a_dense_forward_is_transformers_own(model, twin, way):
    """Every field of transformers' output, in its place; `sparsity` is None."""
    call = ways_to_call(model.get_input_embeddings())[way]
    ours, theirs = model(**call, sparsity="none"), twin(**call)
    if isinstance(theirs, tuple):
        assert_the_same(ours, theirs if TAKES_ENCODED else theirs[:3])  # images have another name there, no place
        return
    assert ours.sparsity is None
    for name, value in theirs.items():
        if name == "image_outputs":
            assert_the_same(list(ours[name].pooler_output), list(value.pooler_output), name)
        elif name == "image_hidden_states":
            assert torch.equal(ours.image_hidden_states.flatten(0, 1), value)
        else:
            assert_the_same(ours[name], value, name)


@torch.no_grad()
def test_nothing_of_ours_reaches_the_parent(model, monkeypatch):
    """In dense forwards and in every pass of a dense generation the parent gets its own arguments alone."""
    seen, parent = set(), LlavaModel.forward

    def spy(self, *args, **kwargs):
        seen.update(kwargs)
        return parent(self, *args, **kwargs)

    monkeypatch.setattr(LlavaModel, "forward", spy)
    inputs = images_and_text()
    model(**inputs, sparsity="none", sample_key=torch.tensor([1, 2]), tau=0.5)
    model.generate(**inputs, **GREEDY, sparsity="none", sample_key=torch.tensor([1, 2]))
    model.generate(**inputs, **GREEDY, method="dense", num_beams=2)
    theirs = {*inspect.signature(parent).parameters, *TransformersKwargs.__optional_keys__, CACHE}
    assert seen and seen <= theirs | {"use_cache", "return_dict"}, seen - theirs


WAYS_OF_GENERATION = {
    "embeddings": {"embeds": True},
    "embeddings, beams": {"embeds": True, "num_beams": 2},
    "embeddings of text": {"embeds": True, "text": True},
    "another vision layer": {"vision_feature_layer": -1},
    "everything recorded": {
        **dict.fromkeys(("output_hidden_states", "output_scores", "output_logits"), True),
        "return_dict_in_generate": True,
    },
}


def generation(model, embeds=False, text=False, **asked):
    inputs = images_and_text()
    if text:
        inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]), "attention_mask": torch.ones(2, 3)}
    if embeds:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    return {**inputs, **GREEDY, **asked}


@pytest.mark.parametrize("way", WAYS_OF_GENERATION.values(), ids=WAYS_OF_GENERATION)
@torch.no_grad()
def test_a_dense_generation_is_transformers_own(model, twin, way):
    ours = model.generate(**generation(model, **way), sparsity="none")
    theirs = twin.generate(**generation(twin, **way))
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
        return
    for name in ("sequences", "scores", "logits", "hidden_states"):
        assert_the_same(ours[name], theirs[name], name)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_a_sparse_generation_from_embeddings_is_that_from_ids(model, beams):
    """Tokens and records; images are found by the image token's embedding, or as the caller says."""
    inputs = prompts(fixed_rows(seed=83, output=0))
    asked = {**GREEDY, "num_beams": beams, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **asked)
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids)
    for given in ({}, {"image_mask": ids == IMAGE_TOKEN}):
        found = model.generate(**inputs, **asked, **given)
        assert torch.equal(found.sequences, expected.sequences[:, ids.shape[1] :])
        assert found.sparsity.rows == expected.sparsity.rows


@pytest.mark.parametrize("sparsity", ["none", "both"])
@pytest.mark.parametrize("asked", [{}, {"use_cache": False}, {"num_beams": 2}], ids=str)
@torch.no_grad()
def test_the_class_token_of_each_image_can_be_asked_for(model, twin, sparsity, asked):
    """vision_feature_select_strategy="full": an image is one token more, in forward and in every step of generate."""
    ids = torch.tensor([[1, 9, *[IMAGE_TOKEN] * (TOKENS_PER_IMAGE + 1), 8, 7], [1, 5, *[IMAGE_TOKEN] * 17, 4, 6]])
    call = {"input_ids": ids, "pixel_values": images_and_text()["pixel_values"]}
    call["vision_feature_select_strategy"] = "full"
    expected = twin(**call).logits
    kept = {"sparsity": "none"} if sparsity == "none" else {"image_keep_rate": 1.0, "output_threshold": -1e9}
    assert_same_logits(model(**call, **kept).logits, expected, tolerance=1e-5)
    tokens = model.generate(**call, **GREEDY, **kept, **asked, return_dict_in_generate=True)
    assert torch.equal(tokens.sequences, twin.generate(**call, **GREEDY, **asked))
    if sparsity == "both":
        assert [len(row.image_indices[0]) for row in tokens.sparsity.rows] == [17, 17]


@torch.no_grad()
def test_images_that_are_encoded_already(model):
    """Features of ours, and, where transformers has a name for them, of theirs."""
    inputs = images_and_text()
    encoded = model.get_image_features(inputs["pixel_values"], return_dict=True)
    pixels = inputs.pop("pixel_values")
    for sparsity in ("none", "both"):
        asked = {**inputs, "sparsity": sparsity}
        expected = model(**asked, pixel_values=pixels)
        tokens = model.generate(**asked, **GREEDY, pixel_values=pixels)
        ways = {"image_features": torch.stack(list(encoded.pooler_output)), "mm_encoder_outputs": {"image": encoded}}
        for name, value in ways.items():
            found = model(**asked, **{name: value})
            assert torch.equal(found.logits, expected.logits), name
            assert torch.equal(found.image_hidden_states, expected.image_hidden_states), name
            if name == "image_features" or TAKES_ENCODED:
                assert torch.equal(model.generate(**asked, **GREEDY, **{name: value}), tokens), name


MISSPELT = {
    "sparsty": "sparsity",
    "image_keep_rat": "image_keep_rate",
    "out_threshold": "output_threshold",
    "pixel_value": "pixel_values",
    "vision_feature_layers": "vision_feature_layer",
    "label": "labels",
    "samplekey": "sample_key",
}


@pytest.mark.parametrize("name", MISSPELT)
@pytest.mark.parametrize("sparsity", [None, "none"])
def test_a_misspelt_argument_is_refused_and_the_near_one_named(model, name, sparsity):
    inputs = images_and_text()
    calls = {"forward": model, "generate": partial(model.generate, **GREEDY), "without head": model.model}
    for where, call in calls.items():
        given = {} if where == "without head" else {"sparsity": sparsity}
        if where == "without head" and MISSPELT[name] in ("sparsity", "image_keep_rate", "output_threshold", "labels"):
            continue  # switches and labels belong to the class with the head
        with pytest.raises(ValueError, match=f"no argument '{name}'.*did you mean '{MISSPELT[name]}'"):
            call(**inputs, **given, **{name: "none"})


def test_an_argument_that_resembles_none_is_refused(model):
    with pytest.raises(ValueError, match=r"forward has no argument 'qqqq'.*leave it out"):
        model(**images_and_text(), qqqq=1)


@pytest.mark.parametrize("name", DENSE_ONLY)
@torch.no_grad()
def test_an_argument_that_sparse_layers_cannot_serve_names_the_way_out(model, name):
    inputs = images_and_text()
    value = {"is_causal": False, "interpolate_pos_encoding": True}.get(name, torch.tensor([0, 22]))
    with pytest.raises(ValueError, match=rf"{name}=.*sparsity='none'"):
        model(**inputs, **{name: value})
    assert {*DENSE_ONLY} - {"image_sizes"} <= PASSED_ON
    if name != "image_sizes":  # transformers' own LLaVA takes it for Pixtral's vision tower alone
        assert torch.isfinite(model(**inputs, **{name: value}, sparsity="none").logits).all()


@pytest.mark.parametrize("sparsity", ["none", "both", "image", "output"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_comes_first_and_the_logits_second(model, sparsity, return_dict):
    inputs = images_and_text(output=5)
    output = model(**inputs, labels=inputs["input_ids"].clone(), sparsity=sparsity, return_dict=return_dict)
    assert output[0].dim() == 0 and output[1].shape[:2] == inputs["input_ids"].shape
    if return_dict:
        assert list(output)[:2] == ["loss", "logits"]


@pytest.mark.parametrize("segments", ["last", "all"])
def test_labels_on_image_tokens_leave_images_what_they_are(segments):
    """As public collators make them: labels = input_ids.clone(), with padding alone at -100."""
    model = build_model(output_segments=segments)
    inputs = images_and_text(output=5)
    for mode in (model.eval(), model.train()):
        output = mode(**inputs, labels=inputs["input_ids"].clone(), sample_key=torch.arange(2))
        image = inputs["input_ids"] == IMAGE_TOKEN
        assert torch.equal(output.sparsity.layout.is_image, image)
        assert not (output.sparsity.layout.output & image).any() and output.sparsity.layout.output[:, -5:].all()
        expected = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        )
        torch.testing.assert_close(output.lm_loss, expected)


@pytest.mark.parametrize("training", [False, True])
def test_shifted_labels_are_what_a_sparse_pass_learns(training):
    model = build_model().train(training)
    inputs = images_and_text(output=5)
    labels = torch.where(inputs["input_ids"] == IMAGE_TOKEN, -100, inputs["input_ids"])
    wanted = torch.full_like(labels, 7)
    call = {**inputs, "labels": labels, "sample_key": torch.arange(2)}
    output = model(**call, shift_labels=wanted)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), wanted.flatten())
    torch.testing.assert_close(output.lm_loss, expected)
    total = model(**call, shift_labels=wanted, num_items_in_batch=torch.tensor(4)).lm_loss
    torch.testing.assert_close(total, expected * wanted.numel() / 4)


def smoothed(logits, labels, shift_labels=None, num_items_in_batch=None, **kwargs):
    """A loss of a user's own, as transformers' `model.loss_function` takes it."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    )


def trainer(model, tmp_path, **asked):
    rows = [{name: value[0] for name, value in images_and_text(1, output=5).items()} for _ in range(4)]
    for row in rows:
        row["labels"] = torch.where(row["input_ids"] == IMAGE_TOKEN, -100, row["input_ids"])
    others = {name: asked.pop(name) for name in ("compute_loss_func", "compute_metrics") if name in asked}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, per_device_train_batch_size=2, **asked
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, **others)


OWN_LOSSES = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "a function": {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits.float().mean()},
}


@pytest.mark.parametrize("own", OWN_LOSSES.values(), ids=OWN_LOSSES)
def test_a_trainers_own_loss_cannot_lose_the_keep_rate_terms(own, tmp_path):
    with pytest.raises(ValueError, match=r"without labels.*keep-rate terms.*loss_function.*sparsity='none'"):
        trainer(build_model(), tmp_path, **own).train()


def test_the_ways_out_of_a_trainers_own_loss(tmp_path):
    """A loss function of the model's own, to which the keep-rate terms are added; and a dense model."""
    model = build_model().train()
    model.loss_function = smoothed
    batch = images_and_text(output=5)
    output = model(**batch, labels=batch["input_ids"].clone())
    torch.testing.assert_close(output.lm_loss, smoothed(output.logits, batch["input_ids"]))
    weight = model.config.sparsity.keep_rate_weight
    terms = output.image_keep_loss + output.output_keep_loss
    torch.testing.assert_close(output.loss, output.lm_loss + weight * terms)
    assert trainer(model, tmp_path).train().training_loss > 0
    dense = build_model()
    dense.forward = partial(dense.forward, sparsity="none")
    dense.forward.__signature__ = inspect.signature(type(dense).forward)
    assert trainer(dense, tmp_path, label_smoothing_factor=0.1, remove_unused_columns=False).train().training_loss > 0


def test_a_plain_trainer_evaluates(tmp_path):
    """Predictions are logits, not records or caches."""
    shapes = []
    found = trainer(
        build_model(), tmp_path, compute_metrics=lambda given: shapes.append(given.predictions.shape) or {"seen": 1}
    ).evaluate()
    assert found["eval_seen"] == 1 and found["eval_loss"] > 0
    assert shapes == [(4, len(images_and_text(1, output=5)["input_ids"][0]), 128)]


def test_a_training_pass_without_labels_says_what_it_lacks(caplog):
    model = build_model().train()
    warning_once.cache_clear()  # another test of the same process may have been warned
    with caplog.at_level(logging.WARNING):
        model(**images_and_text())
    assert "no predictor learns from it" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"dropped_tokens": "zero_vectors"}, {"sparsity": "none"}], ids=str)
def test_checkpoints_of_either_kind_change_no_gradient(settings):
    switch = {name: settings[name] for name in settings if name == "sparsity"}
    inputs = images_and_text(output=6)
    call = {**inputs, "labels": inputs["input_ids"].clone(), "sample_key": torch.arange(2), **switch}
    gradients = []
    for reentrant in (None, False, True):
        model = build_model(**{name: value for name, value in settings.items() if name not in switch}).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**call).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, wanted in gradients[0].items():
            torch.testing.assert_close(other[name], wanted, msg=name)


PARTS = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]


@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_any_part_may_lie_on_a_disk(model, part, tmp_path):
    places = {name: "disk" if name == part else "cpu" for name in PARTS}
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    loaded.generation_config = model.generation_config
    inputs = images_and_text()
    for sparsity in ("both", "none"):
        asked = {**inputs, **GREEDY, "sparsity": sparsity}
        assert torch.equal(loaded.generate(**asked), model.generate(**asked))


def test_the_auto_class_of_multimodal_models(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is type(model)


@torch.no_grad()
def test_a_cache_is_read_as_transformers_caches_are(model):
    """By its layers' keys and values, lengths and kinds, from the first pass on."""
    inputs = prompts(fixed_rows(seed=84, output=0))
    first = model(**inputs, use_cache=True)
    token = torch.full((4, 1), 9)
    other = DynamicCache(config=model.config.text_config)
    seen = inputs["input_ids"].shape[1]
    for step in range(2):
        cache = first.cache
        assert len(cache.layers) == len(cache) == model.config.text_config.num_hidden_layers
        assert cache.get_seq_length() == seen + step
        for index, layer in enumerate(cache.layers):
            lengths = (cache.dense if index < 2 else cache.sparse).lengths
            assert layer.keys.shape == layer.values.shape and layer.keys.shape[:2] == (4, 4)
            assert int(lengths.max()) <= layer.keys.shape[2]
            assert layer.get_seq_length() == cache.get_seq_length(index) == seen + step
            assert layer.is_initialized and layer.keys.dtype == layer.dtype
        for name in ("is_sliding", "is_compileable", "is_initialized"):
            assert type(getattr(cache, name)) is type(getattr(other, name)), name
        assert cache.get_max_cache_shape() == -1 if hasattr(cache, "get_max_cache_shape") else True
        first = model(input_ids=token, cache=cache, use_cache=True)
    cache.reset()
    assert cache.layers[0].keys is None and cache.get_seq_length() == 0


@torch.no_grad()
def test_a_dense_call_exports_and_compiles_whole(model, twin):
    inputs = {**images_and_text(), "use_cache": False}
    expected = twin(**inputs).logits
    exported = torch.export.export(model, (), kwargs={**inputs, "sparsity": "none"})
    assert torch.equal(exported.module()(**inputs, sparsity="none").logits, expected)
    model(**inputs, sparsity="none")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs, sparsity="none").logits, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("whose", ["ours", "transformers'"])
def test_a_model_saved_without_its_head_is_told_so(model, twin, whose, tmp_path):
    (model if whose == "ours" else twin).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without its language-model head.*AutoModel"):
        DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type((model if whose == "ours" else twin).model)


@pytest.mark.parametrize("sparsity", ["both", "none"])
@pytest.mark.parametrize("embeds", [False, True])
def test_generating_past_the_positions_of_the_model_is_told_once(sparsity, embeds, caplog):
    model = build_model(layers=3)
    call = {**generation(model, embeds=embeds), "sparsity": sparsity}
    model.config.text_config.max_position_embeddings = 24 + 4
    with caplog.at_level(logging.WARNING):
        model.generate(**{**call, "max_new_tokens": 3})
        assert "max_position_embeddings" not in caplog.text
        model.config.text_config.max_position_embeddings = 20 + int(embeds) + 2 * (sparsity == "none")  # told once each
        model.generate(**call)
        model.generate(**call)
    assert caplog.text.count("max_position_embeddings") == 1


@torch.no_grad()
def test_no_entry_of_a_generation_config_takes_the_switch_away(tmp_path):
    """Checkpoints of earlier versions hold one that transformers had copied from the arguments of loading."""
    model, inputs = build_model(), prompts(fixed_rows(seed=1, output=0))
    call = {"max_new_tokens": 4, "do_sample": False}
    expected = dense_twin(model).generate(**inputs, **call)
    model.generation_config.sparsity = {"image_keep_rate": 0.2}
    assert torch.equal(model.generate(**inputs, **call, sparsity="none"), expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, sparsity={"image_keep_rate": 0.5})
    assert not hasattr(loaded.generation_config, "sparsity")
