"""Every family of decoders: dense is transformers' own, and every law holds; loading, windows, attention by name."""

import shutil
from contextlib import suppress
from itertools import cycle, product

import pytest
import torch
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.methods import METHODS as REGISTERED
from dynamic_llava.methods import Dense, get_method
from tests.builders import (
    LEARNED,
    TEXT_CONFIGS,
    assert_same_logits,
    build_model,
    collate,
    dense_twin,
    fixed_rows,
    tiny_config,
)
from tests.world_laws import QUICK_LAWS, Laws
from tests.worlds import ANY_RATE, DROPPING, READS_TOWER, Shape, Unjudged, World

ROWS = (
    ((("text", 2), ("image", 3), ("text", 2)), (("output", 3), ("text", 1)), (("output", 4),)),
    ((("image", 2), ("image", 4), ("text", 1)), (), (("output", 2),)),
    ((("text", 3),), (("text", 1), ("output", 2)), (("output", 1),)),
)
"""Turns of two rows with images, one of which sits out the second, and of a row of text alone."""
METHODS = {"dynamic": None} | {name: (name, 0.5, 0.5 if name in ANY_RATE else None) for name in (*ANY_RATE, *DROPPING)}
"""Those that evict nothing and need no other weights than Dynamic-LLaVA's. Methods that evict have the same laws in
tests/laws/test_eviction.py, those with other weights are held to their paths, in each family, in
tests/methods/test_references.py.
"""
LAYOUTS = [*product(("sdpa", "eager"), ("left", "right"), ("one", "any"))]
"""Attention, side of the padding, lengths of images."""
CASES = [
    pytest.param(family, name, *layout, marks=() if (i + j) % len(LAYOUTS) == k else pytest.mark.slow)
    for i, family in enumerate(FAMILIES)
    for j, name in enumerate(METHODS)
    for k, layout in enumerate(LAYOUTS)
]
"""All; in the fast set every family meets every method once, in another layout each."""


def test_every_family_and_every_method_is_tried():
    assert set(TEXT_CONFIGS) == set(FAMILIES)
    kinds = {name: get_method(name) for name in REGISTERED}
    known = {name for name, one in kinds.items() if not (one.evicts or isinstance(one, Dense) or name in LEARNED)}
    assert set(METHODS) == known


def world_of(family, method, attention="sdpa", side="left", lengths="one", layers=4, seed=3):
    shape = Shape(
        layers=layers, sparse_layer=layers // 2, heads=4, kv_heads=2, head_dim=16, grid=3, cache_block=2,
        image_keep_rate=0.34, image_selection="topk", masked_softmax="chunked", attention=attention, family=family,
        seed=seed, prompt_keep_rate=None, output_window=0, output_sinks=0,
    )  # fmt: skip
    lengths = "one" if method in READS_TOWER else lengths  # it decides by pixels
    return World(
        shape, method=METHODS[method], mode="both", turns=3, side=side, autocast="bfloat16", beams=2, returned=2,
        temperature=1.0, lengths=lengths, rows=ROWS,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "method", "attention", "side", "lengths"), CASES)
@torch.no_grad()
def test_every_law(family, method, attention, side, lengths):
    judged = []
    for seed in range(3, 9):  # the first world of the kind in which no decision hangs on rounding
        with suppress(Unjudged):
            judged.append(len(Laws(world_of(family, method, attention, side, lengths, seed=seed)).check()))
        if judged and max(judged) >= len(QUICK_LAWS) - 2:
            return
    pytest.fail(f"too few laws judged these worlds: {judged} of {len(QUICK_LAWS)}")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize(("family", "method"), [*zip(cycle(FAMILIES), METHODS, strict=False)])
@torch.no_grad()
def test_compiled_steps(family, method):
    """Every method on one family, every family twice: a compilation takes seconds. The soak's worlds draw all pairs."""
    torch._dynamo.reset()
    for seed in range(3, 20):  # the first world of the kind in which no decision hangs on rounding
        with suppress(Unjudged):
            Laws(world_of(family, method, layers=3, seed=seed)).compiled_steps_answer_as_eager_ones()
            break
    else:
        pytest.fail("no world was judged")
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_transformers_when_nothing_is_dropped(family):
    """Dense training to the last bit; through MaskedSoftmax, with recomputation of either kind, to rounding."""
    ours = build_model(kv_heads=2, layers=3, family=family, output_min_length=1)
    theirs = dense_twin(ours).train()
    inputs = collate(fixed_rows(seed=5), "right")
    labels = torch.where(inputs["output_mask"], inputs["input_ids"], -100)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    theirs(**given, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max() for gradient in expected.values())
    calls = {"none": {"sparsity": "none"}, "all kept": {"keep_mask": inputs["attention_mask"].bool()}}
    for reentrant, (what, call) in product((None, False, True), calls.items()):
        ours.zero_grad()
        ours.train()
        if reentrant is not None:
            enable = getattr(ours, "activation_checkpointing_enable", None) or ours.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        ours(**given, labels=labels, output_mask=inputs["output_mask"], **call).lm_loss.backward()
        found = {name: p.grad for name, p in ours.named_parameters() if name in expected}
        differences = [(found[name] - gradient).abs().max() for name, gradient in expected.items()]
        exact = what == "none" and reentrant is None
        assert max(differences) <= (0 if exact else 1e-5 * scale), f"{what}, reentrant={reentrant}"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saves_and_loads_under_the_names_of_transformers(family, tmp_path):
    model = build_model(kv_heads=2, layers=3, family=family)
    model.save_pretrained(tmp_path / "ours")
    dense_twin(model).save_pretrained(tmp_path / "theirs")
    again = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    dense = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs", sparsity=model.config.sparsity)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "theirs")
    assert again.config.text_config.model_type == family
    inputs = collate(fixed_rows(seed=6), "left")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert torch.equal(dense(**given, sparsity="none").logits, plain(**given).logits)


@pytest.mark.parametrize(
    ("family", "window"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 3}),
    ],
    ids=str,
)
def test_sliding_windows_are_refused(family, window):
    """Where the message points is a way out: without a window the same settings are carried."""
    text = tiny_config(family=family).text_config.to_dict()
    refused = {**text, **window} | ({} if "layer_types" in window else {"layer_types": None})
    with pytest.raises(ValueError, match="sliding window"):
        type(tiny_config())(text_config=refused)
    mended = {key: value for key, value in refused.items() if key not in ("use_sliding_window", "layer_types")}
    type(tiny_config())(text_config={**mended, "sliding_window": None})


@torch.no_grad()
def test_the_implementation_is_users_to_choose():
    """It is set and shown by transformers' names, at run time too, and reaches the layers of a sparse call."""
    model = build_model(kv_heads=2)
    inputs = collate(fixed_rows(seed=7), "left")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    expected = model(**given).logits
    seen = []

    def spying(module, *args, **kwargs):
        seen.append(module.config._attn_implementation)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("flash_of_a_test", spying)
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert {model.config._attn_implementation, model.config.text_config._attn_implementation} == {name}
        assert_same_logits(model(**given).logits, expected, what=name)
        weights = model(**given, sparsity="none", output_attentions=True).attentions
        assert len(weights or ()) == (model.config.text_config.num_hidden_layers if name == "eager" else 0)
    model.config.text_config._attn_implementation = "flash_of_a_test"
    alone = {name: values[:1] for name, values in given.items() if name != "attention_mask"}
    model(**alone, use_cache=False)
    assert set(seen) == {"flash_of_a_test"}, "a kernel would be looked up by our name"
