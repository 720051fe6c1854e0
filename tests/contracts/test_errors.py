"""What a user gets wrong is refused early: what was given, what is allowed, what to do."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from dynamic_llava import DynamicLlavaConfig, SparsityConfig, get_method
from dynamic_llava.model.arguments import NO_LLAVA, REFUSED
from tests.builders import (
    IMAGE_TOKEN,
    LAYERS,
    build_model,
    collate,
    dense_twin,
    fixed_rows,
    make_row,
    prompt_segments,
    prompts,
    shared_model,
    tiny_config,
)


@pytest.fixture
def model():
    return shared_model()


@pytest.fixture
def inputs():
    return prompts(fixed_rows(seed=30, output=0))


@pytest.fixture(params=["forward", "generate"])
def call(request, model):
    """Both entry points must refuse the same mistakes."""
    if request.param == "forward":
        return model.__call__
    return lambda **kwargs: model.generate(**kwargs, max_new_tokens=2)


def refused(call, *words, **kwargs):
    """Assert a ValueError that contains every one of `words`."""
    with pytest.raises(ValueError) as error, torch.no_grad():
        call(**kwargs)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_too_few_images(call, inputs):
    inputs["pixel_values"] = inputs["pixel_values"][:-1]
    refused(call, "5 images", "96 image tokens", "6 images", "one image per <image> place", **inputs)


def test_too_many_images(call, inputs):
    inputs["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][:1]])
    refused(call, "7 images", "96 image tokens", **inputs)


def test_no_images_at_all(call, inputs):
    inputs["pixel_values"] = None
    refused(call, "96 image tokens", "give the images", **inputs)


def test_images_without_a_place(call, inputs):
    text = {"input_ids": torch.randint(4, 100, (1, 6)), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    refused(call, "1 images", "0 image tokens", **text, pixel_values=inputs["pixel_values"][:1])


def test_an_image_cut_in_two(call, inputs):
    """The right number of image tokens in the batch, the wrong number in a row."""
    ids = inputs["input_ids"].clone()
    place = (ids[0] == 3).nonzero()[0]
    ids[0, place], ids[1, -1] = 50, 3
    refused(call, "part of an image", "multiple of 16", **{**inputs, "input_ids": ids})


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, 20, True, "0.2"])
def test_keep_rates_outside_their_range(call, inputs, rate):
    refused(call, "image_keep_rate", repr(rate), "(0, 1]", **inputs, image_keep_rate=rate)


@pytest.mark.parametrize("mode", ["images", "Both", "all", ""])
def test_unknown_sparsity(call, inputs, mode):
    refused(call, "sparsity", repr(mode), "'both', 'image', 'output', 'none'", **inputs, sparsity=mode)


def test_unknown_method(call, inputs):
    refused(call, "'no_method'", "'dynamic'", "'fastv'", **inputs, method="no_method")


def test_a_method_that_is_no_method(call, inputs):
    refused(call, "neither a registered name nor a Method", **inputs, method=0.5)


def test_switches_that_exclude_each_other(call, inputs):
    both = {"method": get_method("random"), "image_keep_rate": 0.5}
    refused(call, "image_keep_rate", "set them on the object", **inputs, **both)
    refused(call, "output_threshold", "'fastv'", **inputs, method="fastv", output_threshold=0.0)


@pytest.mark.parametrize("layer", [0, LAYERS, LAYERS + 3, -1])
def test_the_sparse_layer_of_a_configuration(layer):
    with pytest.raises(ValueError, match=rf"sparse_layer={layer}\b"):
        tiny_config(sparse_layer=layer)


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_the_sparse_layer_of_a_method(model, inputs, layer):
    """On every path: none computes layers that the model has not."""
    words = f"decides at the layers [{layer}]", f"layers from 0 (before the language model) to {LAYERS - 1}"
    call = {**inputs, "method": get_method("random", layer=layer)}
    for path in ({"use_cache": True}, {"use_cache": False}):
        refused(model, *words, **call, **path)
        refused(model.generate, *words, **call, **path, max_new_tokens=2)
    refused(model, *words, **call, labels=inputs["input_ids"], output_mask=inputs["input_ids"] < 0)
    refused(model.model, *words, **call, answers_only=True)


def test_unknown_settings_of_a_configuration():
    with pytest.raises(ValueError, match=r"keep_rate_image.*image_keep_rate"):
        DynamicLlavaConfig(sparsity={"keep_rate_image": 0.5})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("image_keep_rate", 0.0, r"\(0, 1\]"),
        ("output_keep_rate", 1.5, r"\(0, 1\]"),
        ("image_selection", "top", "'topk', 'threshold'"),
        ("output_segments", "first", "'last', 'all'"),
        ("keep_rate_reduction", "mean", "'batch', 'applicable'"),
        ("keep_rate_distance", "l2", "'squared', 'absolute'"),
        ("masked_softmax", "flash", "'reference', 'chunked'"),
        ("mask_grad_clip", -1.0, "None"),
        ("predictor_heads", 3, "multiple"),
        ("cache_block", 0, "least value 1"),
    ],
)
def test_settings_outside_their_range(field, value, words):
    with pytest.raises(ValueError, match=rf"{field}.*{words}|{words}.*{field}"):
        replace(SparsityConfig(), **{field: value})


def test_right_padding_in_generate(model):
    inputs = prompts(fixed_rows(seed=31, output=0), side="right")
    refused(model.generate, "rows [0, 1, 3]", "on the left", **inputs)


def test_masks_of_another_shape(call, inputs):
    short = inputs["attention_mask"][:, :-2]
    refused(call, "attention_mask", str(tuple(short.shape)), **{**inputs, "attention_mask": short})
    fewer = inputs["attention_mask"][:-1]
    refused(call, "attention_mask", str(tuple(fewer.shape)), **{**inputs, "attention_mask": fewer})


PER_TOKEN = ("attention_mask", "output_mask", "keep_mask")


@pytest.mark.parametrize("value", [0.5, 2, -1, float("nan")])
@pytest.mark.parametrize("path", [{}, {"use_cache": True}, {"use_cache": False}, {"masked": True}], ids=str)
def test_decisions_between_keeping_and_dropping(model, inputs, value, path):
    """Masking could weigh a token by a fraction, removing it could not: no path may read the mask its own way."""
    keep = torch.ones(inputs["input_ids"].shape, dtype=torch.long if isinstance(value, int) else torch.float)
    keep[0, -1] = value
    arguments = {**inputs, "keep_mask": keep}
    if path.get("masked"):
        arguments["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    else:
        arguments |= path
    refused(model, "keep_mask", "1 for a token that is kept and 0", **arguments)


@pytest.mark.parametrize("live", [False, True], ids=["whole", "live"])
@pytest.mark.parametrize("change", [(0, -1), (0, 1), (-1, 0)], ids=["narrow", "wide", "fewer rows"])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_values_per_token_have_one_value_per_token(model, inputs, name, change, live):
    """Of the chunk, or of all that is in the cache and the chunk; on no path is any other width cut to size."""
    rows, past = inputs["input_ids"].shape
    if live:
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).cache
        inputs, past = {"input_ids": torch.full((rows, 3), 9), "cache": cache}, past + 3
        model(**inputs, **{name: torch.ones(rows, past, dtype=torch.long)})
        inputs["cache"], past = cache, past + 3
    shape = rows + change[0], past + change[1]
    refused(model, name, str(shape), **{**inputs, name: torch.ones(shape, dtype=torch.long)})


def test_decisions_for_tokens_that_do_not_exist_yet(model, inputs):
    refused(model.generate, "keep_mask", "one by one", **inputs, keep_mask=inputs["attention_mask"], max_new_tokens=2)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_cache_of_other_rows(model, inputs, tokens):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
        refused(
            model, "holds 4 rows", "has 2", "batch_select_indices", input_ids=torch.full((2, tokens), 9), cache=cache
        )
        cache.batch_select_indices(torch.tensor([0, 3]))
        model(input_ids=torch.full((2, tokens), 9), cache=cache)


def test_a_later_turn_without_its_images(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
    refused(model, "64 image tokens", "give the images", input_ids=torch.full((4, 16), 3), cache=cache)


TOKENS = (4, 58)
"""Shape of the tokens of `inputs`, which hold 6 images of 16 tokens of width 64."""
MISFITS = [
    ("image_features", (6, 20, 64), ["16", "64"]),
    ("image_features", (4, 24, 64), ["16", "64"]),  # 96 features for 96 places, but of other images
    ("image_features", (6, 16, 32), ["16", "64"]),
    ("image_features", (96, 64), ["16", "64"]),
    ("pixel_values", (6, 3, 28, 28), ["3, 56, 56"]),
    ("pixel_values", (6, 1, 56, 56), ["3, 56, 56"]),
    ("pixel_values", (2, 3, 3, 56, 56), ["3, 56, 56"]),
    ("position_ids", (4, 57), [str(TOKENS), str((1, 58))]),
    ("position_ids", (2, 58), [str(TOKENS), str((1, 58))]),
    ("sample_key", (3,), [str(TOKENS), "(4,)"]),
    ("sample_key", (4, 1), [str(TOKENS), "(4,)"]),
    ("labels", (4, 57), [str(TOKENS)]),
    ("shift_labels", (4, 57), [str(TOKENS)]),
    ("tau", (4,), ["one number"]),
    ("attention_mask", (4, 1, 58, 58), [str(TOKENS), "sparsity='none'"]),
    ("inputs_embeds", (4, 58, 32), ["64 wide"]),
    ("inputs_embeds", (4, 64), ["64 wide"]),
    ("input_ids", (58,), ["(rows, tokens)"]),
]


@pytest.mark.parametrize(("name", "shape", "words"), MISFITS, ids=str)
def test_a_tensor_of_another_shape_is_named_with_what_it_should_fit(model, inputs, name, shape, words):
    assert inputs["input_ids"].shape == TOKENS
    whole = {"input_ids", "labels", "shift_labels", "sample_key", "position_ids", "attention_mask"}
    value = torch.zeros(shape, dtype=torch.long if name in whole else torch.float32)
    without = {"inputs_embeds": "input_ids", "image_features": "pixel_values"}.get(name)
    given = {key: tensor for key, tensor in inputs.items() if key != without}
    if name in ("shift_labels", "tau"):
        given["labels"] = inputs["input_ids"]
    refused(model, name, str(shape), *words, **{**given, name: value})


def test_an_image_mask_that_does_not_fit(model, inputs):
    mask = torch.ones(2, 2, dtype=torch.bool)
    refused(model, "image_mask", "input_ids", **inputs, image_mask=mask)
    refused(model, "image_mask", "(2, 2)", "(1, 3)", inputs_embeds=torch.ones(1, 3, 64), image_mask=mask)


def test_labels_on_a_live_cache(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    refused(model, "labels", "cache", **inputs, labels=inputs["input_ids"], past_key_values=cache)


def test_a_target_rate_at_inference(model, inputs):
    refused(model, "output_keep_rate", "output_threshold", **inputs, output_keep_rate=0.5)


@pytest.mark.parametrize(
    "switches",
    [
        {"sparsity": "none", "image_keep_rate": 0.5},
        {"sparsity": "output", "image_keep_rate": 0.5},
        {"sparsity": "image", "output_threshold": 0.5},
    ],
    ids=str,
)
def test_switches_that_a_call_would_not_use(call, inputs, switches):
    refused(call, *switches, "no use", **inputs, **switches)


def test_an_image_rate_where_a_threshold_decides():
    model = build_model(image_selection="threshold")
    inputs = prompts(fixed_rows(seed=31, output=0))
    refused(model, "image_keep_rate", "topk", **inputs, image_keep_rate=0.5)


def test_a_sparse_cache_for_dense_decoding(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    token = torch.full((4, 1), 9)
    refused(model, "cache", "sparsity", input_ids=token, past_key_values=cache, sparsity="none")
    asked = {"input_ids": torch.cat([inputs["input_ids"], token], 1), "max_new_tokens": 2, "sparsity": "none"}
    refused(model.generate, "opened by a sparse call", **asked, past_key_values=cache)


def test_a_cache_of_another_layer(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    method = get_method("random", layer=3)
    refused(model, "sparse layer 2", "3", input_ids=torch.full((4, 1), 9), past_key_values=cache, method=method)


OPTIONS = {
    "assistant_model": [lambda twin: {"assistant_model": twin}, lambda twin: {"assistant_model": shared_model()}],
    "prompt_lookup_num_tokens": [lambda twin: {"prompt_lookup_num_tokens": 3}],
    "prefill_chunk_size": [lambda twin: {"prefill_chunk_size": 5}],
    "guidance_scale": [
        lambda twin: {"guidance_scale": 1.5},
        lambda twin: {"guidance_scale": 1.5, "use_cache": False},
    ],
    "cache_implementation": [
        lambda twin: {"cache_implementation": "static"},
        lambda twin: {"cache_implementation": "static", "num_beams": 2},
        lambda twin: {"cache_implementation": "offloaded"},  # this and the next need what a CPU's installation lacks
        lambda twin: {"cache_implementation": "quantized"},
    ],
    "token_healing": [lambda twin: {"token_healing": True}],
}
"""Every option that a sparse generation refuses -> ways to ask for it."""


def generated(call, **kwargs):
    """Return tokens, or the kind and the words of the error."""
    try:
        return call(**kwargs)
    except Exception as error:
        return type(error), str(error).replace("DynamicLlava", "Llava")


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_a_refused_option_is_served_by_the_dense_call_that_the_refusal_names(name):
    """The way out is taken: sparsity='none' gives what transformers' own class gives, to the last token."""
    model = shared_model()
    twin = dense_twin(model)
    rows = [make_row(prompt_segments(1, [2, 3]), seed=6)]
    if name in ("guidance_scale", "cache_implementation"):
        rows.append(make_row(prompt_segments(1, [4, 2]), seed=7))
    inputs = prompts(rows)
    for option in OPTIONS[name]:
        asked = {**inputs, **option(twin), "max_new_tokens": 5, "do_sample": False}
        refused(model.generate, name, "sparsity='none'", **asked)
        expected = generated(twin.generate, **asked)
        actual = generated(model.generate, **asked, sparsity="none")
        if isinstance(expected, tuple):
            assert actual == expected, name
        else:
            assert torch.equal(actual, expected), name


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "assistant_model"])
def test_a_refused_option_is_refused_in_a_generation_config_too(model, inputs, name):
    for option in OPTIONS[name]:
        given = GenerationConfig(max_new_tokens=2, pad_token_id=0, **option(None))
        refused(model.generate, name, "sparsity='none'", **inputs, generation_config=given)


@pytest.mark.parametrize("name", NO_LLAVA)
def test_an_option_that_no_llava_serves_is_refused_without_advice_that_fails(model, inputs, name):
    for sparsity in ("both", "none"):
        refused(model.generate, name, "leave it out", **inputs, **{name: 2}, sparsity=sparsity, max_new_tokens=2)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_a_cache_of_transformers_goes_with_a_dense_call(call, model, inputs, kind):
    """The refusal's way out, and a second dense call on the same cache."""

    def cache():
        return kind(config=model.config.text_config, **({} if kind is DynamicCache else {"max_cache_len": 64}))

    refused(call, kind.__name__, "sparsity='none'", **inputs, past_key_values=cache())
    twin, asked = dense_twin(model), {"max_new_tokens": 3, "do_sample": False}
    ours, theirs = cache(), cache()
    expected = twin.generate(**inputs, **asked, past_key_values=theirs)
    assert torch.equal(model.generate(**inputs, **asked, past_key_values=ours, sparsity="none"), expected)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    again = {"input_ids": expected, "attention_mask": mask, **asked}
    second = twin.generate(**again, past_key_values=theirs)
    assert torch.equal(model.generate(**again, past_key_values=ours, sparsity="none"), second)


@pytest.mark.parametrize("copies", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_several_sequences_from_one_live_cache(model, inputs, copies):
    with torch.no_grad():
        first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    text = {"input_ids": first.sequences, "past_key_values": first.past_key_values, "max_new_tokens": 2}
    refused(model.generate, next(iter(copies)), "live cache", "batch_repeat_interleave", **text, **copies)


def test_cropping_a_sparse_cache(model, inputs):
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="roll-back"):
        cache.crop(3)


def test_neither_ids_nor_embeddings(model):
    refused(model, "input_ids", "inputs_embeds")


def test_attention_dropout_in_training():
    model = build_model().train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    inputs = collate(fixed_rows(), "right")
    inputs.pop("keep_mask")
    refused(model, "attention_dropout=0.1", "set it to 0", **inputs, labels=inputs["input_ids"], tau=1.0)
