"""VoCo-LLaMA: its mask against one written out by hand, its two passes, its training, and what is refused.

The reference puts the embeddings of a row together one by one, says for each pair of tokens whether one sees the other,
and runs transformers' own decoder on that.
"""

import copy
import json
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor, get_method
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.config import DataConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.costs import LLAVA_7B, LLAVA_SHAPES, flops_exact, flops_paper, head_flops, llava_shape
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.eval import tasks
from dynamic_llava.eval.compare import run as comparing
from dynamic_llava.eval.efficiency import Counted, mean_kv_bytes, prefill_costs
from dynamic_llava.methods import Cut, ImageTokens, VoCoLlama
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import load, run
from dynamic_llava.train.stopping import Stopped
from tests.builders import (
    ADDED,
    HIDDEN,
    IMAGE_TOKEN,
    LAYERS,
    TINY_SPARSITY,
    assert_same_logits,
    build_model,
    collate,
    fixed_rows,
    make_row,
    model_of,
    new_model_of,
    prompts,
    training_passes,
)
from tests.eval.compare.compare_builders import compare, rows_of
from tests.eval.compare.conftest import Stopped as Stopwatch
from tests.eval.run_builders import Toy, toy_data
from tests.sft_builders import picture, write_checkpoint, write_data
from tests.train.test_checkpoints import Signals, disturb

NAME, TOKENS = "voco_llama", ADDED["voco_llama"]
MADE = 4
"""Tokens that the projector of the tiny model makes of an image; the added ones stand behind them."""
OWN = "model.language_model.method.token"
TALK = [("text", 2), ("image", 0), ("text", 3), ("output", 3), ("text", 1), ("image", 0), ("image", 0), ("text", 2)]
HIDES = torch.finfo(torch.float32).min


def written_out(model, row):
    """Return the logits (N, V) of a row by transformers' decoder, under a mask that is written out token by token."""
    decoder, images = model.model.language_model, []
    for pixels in row.pixels:
        states = model.model.vision_tower(pixels[None], output_hidden_states=True).hidden_states
        made = model.model.multi_modal_projector(states[model.config.vision_feature_layer][:, 1:])[0]
        assert len(made) == MADE
        images.append([*made, *[decoder.method.token[0]] * TOKENS])
    embeds, image_of, place_of, seen = [], [], [], 0
    for token in row.ids.tolist():
        number, place = divmod(seen, MADE + TOKENS) if token == IMAGE_TOKEN else (None, None)
        seen += token == IMAGE_TOKEN
        embeds.append(decoder.embed_tokens.weight[token] if number is None else images[number][place])
        image_of.append(number)
        place_of.append(place)
    mask = torch.full((1, 1, len(embeds), len(embeds)), HIDES)
    for reader in range(len(embeds)):
        for read in range(reader + 1):
            of_image = image_of[read] is not None and place_of[read] < MADE
            mask[0, 0, reader, read] = HIDES if of_image and image_of[read] != image_of[reader] else 0.0
    places = torch.arange(len(embeds))[None]
    out = decoder(inputs_embeds=torch.stack(embeds)[None], attention_mask=mask, position_ids=places)
    return model.lm_head(out.last_hidden_state[0])


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa")])
@torch.no_grad()
def test_every_path_is_transformers_decoder_under_the_mask_written_out(family, attention):
    model = new_model_of(NAME, 2, attention, family=family)
    batch = [*fixed_rows(seed=30), make_row([("text", 1), ("image", 0), ("output", 6)], seed=1)]
    inputs = {key: value for key, value in collate(batch, "left").items() if key != "keep_mask"}
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    whole = {**inputs, "position_ids": positions}
    masked = model(**whole, labels=inputs["input_ids"]).logits
    dropped = model(**whole).logits
    scored = model.lm_head(model.model(**whole, answers_only=True).last_hidden_state)
    width = inputs["input_ids"].shape[1] - 6
    prompt = {key: value[:, :width] for key, value in whole.items() if key != "pixel_values"}
    opened = model(**prompt, pixel_values=inputs["pixel_values"], use_cache=True)
    stored = torch.stack([layer.slots.lengths for layer in opened.cache.layers])
    steps = [
        model(input_ids=inputs["input_ids"][:, [at]], position_ids=positions[:, [at]], cache=opened.cache).logits
        for at in range(width, width + 6)
    ]
    cached = torch.cat([opened.logits, *steps], 1)
    for number, row in enumerate(batch):
        real, wanted = inputs["attention_mask"][number].bool(), written_out(model, row)
        for path, found in {"masked": masked, "dropped": dropped, "scored": scored, "cached": cached}.items():
            assert_same_logits(found[number, real], wanted, what=f"{path}, row {number}")
        assert set(stored[:, number].tolist()) == {len(row.ids) - 6 - MADE * len(row.pixels)}, "in every layer"


@torch.no_grad()
def test_turns_on_a_cache_that_dropped_the_images_are_one_masked_pass():
    """Two passes, an image and what is asked about it, and so on: images behind answers too, and two in a row."""
    model, row = model_of(NAME), make_row(TALK, seed=5)
    wanted, cache = written_out(model, row), None
    for start, end in pairwise([0, 3, 3 + 16, 3 + 16 + 6, len(row.ids) - 2, len(row.ids)]):
        first, last = (int((row.ids[:at] == IMAGE_TOKEN).sum()) // 16 for at in (start, end))
        out = model(
            input_ids=row.ids[None, start:end],
            pixel_values=row.pixels[first:last] if last > first else None,
            output_mask=row.output[None, start:end],
            cache=cache,
            use_cache=True,
        )
        cache = out.cache
        assert_same_logits(out.logits[0], wanted[start:end], what=f"tokens {start} to {end}")
        assert [int(layer.slots.lengths[0]) for layer in cache.layers] == [end - last * MADE] * LAYERS
    assert cache.get_seq_length() == len(row.ids), "positions are those of the whole sequence"


@torch.no_grad()
def test_a_cache_is_used_again_for_another_question():
    """What is published as the method's cost: the image has passed once, its added tokens alone are read."""
    model, image = model_of(NAME), [("text", 2), ("image", 0)]
    rows = [make_row([*image, ("text", count)], seed=9) for count in (3, 5)]
    rows[1].ids[:19] = rows[0].ids[:19]
    pixels = rows[0].pixels
    opened = model(input_ids=rows[0].ids[None, :19], pixel_values=pixels, use_cache=True).cache
    for row in rows:
        wanted = written_out(model, replace(row, pixels=pixels))
        out = model(input_ids=row.ids[None, 19:], cache=copy.deepcopy(opened), use_cache=True)
        assert_same_logits(out.logits[0], wanted[19:])
        call = {"input_ids": row.ids[None], "max_new_tokens": 4, "do_sample": False}
        again = model.generate(**call, cache=copy.deepcopy(opened))
        assert torch.equal(again, model.generate(**call, pixel_values=pixels))
    assert opened.get_seq_length() == 19


@torch.no_grad()
def test_text_alone_is_the_plain_model_and_an_image_is_read_through_its_tokens():
    model = model_of(NAME)
    text = prompts([make_row([("text", 7)], seed=2)])
    assert_same_logits(model(**text).logits, model(**text, sparsity="none").logits)
    inputs = prompts([make_row([("text", 2), ("image", 0), ("text", 3)], seed=3)])
    features = list(model.model.encode_images(inputs.pop("pixel_values")).pooler_output)
    assert len(features[0]) == MADE + TOKENS
    other = [features[0].clone()]
    other[0][0] += 1.0
    one, changed = (model(**inputs, image_features=found) for found in (features, other))
    assert (one.logits[0, -1] - changed.logits[0, -1]).abs().max() > 1e-3, "the added tokens carry the image on"
    assert one.sparsity.image_indices[0][0].tolist() == [*range(MADE, MADE + TOKENS)]


def test_the_last_tokens_of_each_image_stay():
    valid = torch.arange(7) < torch.tensor([[7], [5], [3]])
    images = ImageTokens(torch.zeros(3, 7, 2), valid, torch.arange(3))
    keep = VoCoLlama(tokens=3).keep_image(Cut(0), images, None) & valid
    assert keep.long().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    for tokens in (0, -1, True, 10**30):
        with pytest.raises(ValueError, match="is no number of tokens to add to an image; give 1 to 4096"):
            VoCoLlama(tokens=tokens)


def test_the_embedding_has_a_gradient_whatever_a_batch_holds():
    model = new_model_of(NAME).train()
    for out in training_passes(model):
        gradient = dict(model.named_parameters())[OWN].grad
        has_image = bool(out.sparsity.layout.is_image.any())
        assert gradient is not None and bool(gradient.any()) == has_image
        assert out.loss == out.lm_loss and not out.method_losses


def config_of(folder, name="run"):
    rates = {"learning_rate": 3e-3, "predictor_learning_rate": 3e-3, "projector_learning_rate": 3e-3}
    return RunConfig(
        name=name,
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(folder / "base")),
        data=DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=400),
        sparsity=replace(TINY_SPARSITY, method={"name": NAME, "tokens": 3}),
        train=TrainConfig(batch_size=4, max_steps=8, log_every=1, **rates),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a dense base, and what a run of eight steps makes of it."""
    folder = tmp_path_factory.mktemp("voco")
    write_checkpoint(folder / "base", dense=True)
    write_data(folder, samples=8)
    return folder, run(config_of(folder))


def test_training_lowers_the_loss_and_everything_learns(trained):
    folder, result = trained
    losses = [line["lm_loss"] for line in result.history]
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0]
    assert all(line["image_keep_rate"] == pytest.approx(3 / 19) for line in result.history)
    before, after = load(config_of(folder))[0], load_file(result.folder / "model.safetensors")
    assert before.config.untrained_predictors == ["method"] and after[OWN].shape == (1, HIDDEN)
    start = before.state_dict()
    assert 0.01 < start[OWN].std() < 0.03, "it begins as a new word does"
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert moved == {name for name in start if "vision_tower" not in name}, "all but the tower, as published"


def test_a_checkpoint_knows_its_tokens(trained):
    """The model, and its processor, which finds their number in config.json."""
    stored = json.loads((trained[1].folder / "config.json").read_text())
    assert stored["sparsity"]["method"] == {"name": NAME, "tokens": 3} and stored["untrained_predictors"] == []
    assert stored["image_seq_length"] == 19 and "added_image_tokens" not in stored
    processor = DynamicLlavaProcessor.from_pretrained(trained[1].folder)
    assert processor.tokens_per_image == 19 and processor.num_additional_image_tokens == 4
    model = DynamicLlavaForConditionalGeneration.from_pretrained(trained[1].folder).eval()
    inputs = processor(text="USER: <image>\nWhat? ASSISTANT:", images=picture())
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.sparsity.image_indices[0][0].tolist() == [16, 17, 18]
    assert torch.equal(out.sequences, model.generate(**inputs, max_new_tokens=3, do_sample=False, method=NAME))
    assert torch.equal(model.generate(**inputs, max_new_tokens=1, sparsity="none")[:, :-1], inputs["input_ids"])


def test_a_processor_alone_knows_them_too(trained, tmp_path):
    DynamicLlavaProcessor.from_pretrained(trained[1].folder).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert DynamicLlavaProcessor.from_pretrained(tmp_path, image_token_id=IMAGE_TOKEN).tokens_per_image == 19
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_additional_image_tokens": "4"}))
    with pytest.raises(ValueError, match="num_additional_image_tokens '4'; give a whole number"):
        DynamicLlavaProcessor.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_stopped_run_goes_on_exactly(trained, monkeypatch):
    folder, whole = trained
    config = config_of(folder, "stopped")
    with monkeypatch.context() as patched:
        disturb(patched, Signals(4, signal.SIGTERM))
        with pytest.raises(Stopped, match="after step 4 of 8"):
            run(config)
    assert not (config.folder / "model").exists()
    ours, theirs = load_file(run(config).folder / "model.safetensors"), load_file(whole.folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_becomes_a_dense_llava_without_its_tokens(trained, tmp_path):
    convert(trained[1].folder, tmp_path / "hf", to="llava-hf")
    assert not any("method" in name for name in load_file(tmp_path / "hf" / "model.safetensors"))
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    processor = json.loads((tmp_path / "hf" / "processor_config.json").read_text())
    assert values["image_seq_length"] == 16 and processor["num_additional_image_tokens"] == 1
    convert(trained[1].folder, tmp_path / "ours")
    assert OWN in load_file(tmp_path / "ours" / "model.safetensors")
    assert DynamicLlavaProcessor.from_pretrained(tmp_path / "ours").tokens_per_image == 19


def test_a_method_in_its_place_leaves_the_tokens_out(trained):
    config = DynamicLlavaConfig.from_pretrained(trained[1].folder, sparsity={"method": None})
    assert config.image_seq_length == 16 and config.added_image_tokens == 0


@torch.no_grad()
def test_what_cannot_be_is_refused_with_what_to_do():
    model, inputs = model_of(NAME), prompts(fixed_rows(output=0))
    with pytest.raises(ValueError, match=r"'voco_llama' decides by weights of its own.*trained with it"):
        build_model()(**inputs, method=NAME)
    with pytest.raises(ValueError, match=r"is to add 5 tokens .* made for 12; leave the number out"):
        model(**inputs, method={"name": NAME, "tokens": 5})
    with pytest.raises(ValueError, match=r"keep_mask was given to method 'voco_llama'.*get_method\('dense', layer=2\)"):
        model(**inputs, keep_mask=torch.ones_like(inputs["input_ids"]))
    with pytest.raises(ValueError, match="12 tokens added by the checkpoint's method; use"):
        model(**inputs, method="hired")
    bare = list(torch.randn(6, 16, HIDDEN))
    with pytest.raises(ValueError, match=r"image_features\[0\] does not end in the 12 learned tokens.*pixel_values"):
        model(**{**inputs, "pixel_values": None}, image_features=bare)
    assert model(**inputs, method="fastv").sparsity is not None, "what learns nothing decides among all of them"


def test_an_attention_without_masks_and_zero_vectors_are_refused():
    model, inputs = new_model_of(NAME, layers=3), collate(fixed_rows())
    inputs.pop("keep_mask")
    model.model.language_model.settings = replace(model.config.sparsity, dropped_tokens="zero_vectors")
    with pytest.raises(ValueError, match="'zero_vectors' would blank that; set it to 'masked_softmax'"):
        model.train()(**inputs, labels=inputs["input_ids"])
    model.eval().model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'voco_llama' hides an image .*takes no such mask; load .* one of 'sdpa'"):
        model(**prompts(fixed_rows(output=0)), use_cache=False)


def test_a_dense_checkpoint_is_not_asked_by_it(trained):
    with pytest.raises(ValueError, match=r"is a dense checkpoint without predictors.*train it first"):
        DynamicLlavaForConditionalGeneration.load_for(get_method(NAME, tokens=3), trained[0] / "base")


def test_what_it_costs():
    """The image's pass counts, as it is computed; the published 2.2 TFLOP is that of a cache that is used again."""
    method, settings = get_method(NAME), SparsityConfig(method={"name": NAME})
    part = learned_costs(settings, 4096)["method"]
    assert part.parameters == 4096 and part.judging(704) == 0 and part.learns
    said = Counted(704 + 60, (range(128),), (128,) * 32, output_tokens=1, output_kept=0)
    found = prefill_costs(LLAVA_7B, settings, [said], 704, method=method, vision=LLAVA_SHAPES["7b"].vision)
    assert found["image_tokens_per_layer"] == 704
    assert found["prefill_gflop_paper"] * 1e9 == flops_paper(704, 4096, 32) and flops_paper(704, 4096, 32) > 12e12
    exact = flops_exact(764, LLAVA_7B, causal=True) + head_flops(1, LLAVA_7B)
    assert found["prefill_gflop_exact"] * 1e9 == pytest.approx(exact, rel=1e-12)
    assert f"{flops_paper(128, 4096, 32) / 1e12:.1f}" == "2.2"
    assert mean_kv_bytes(LLAVA_7B, method, [said], 704, 2) == (128 + 60) * 32 * 2 * 4096 * 2
    shape = llava_shape(DynamicLlavaConfig(sparsity=settings))
    assert shape.tokens_per_image == 704 == DynamicLlavaConfig(sparsity=settings).image_seq_length
    assert shape.projector.parameters == LLAVA_SHAPES["7b"].projector.parameters
    assert shape.projector.forward == LLAVA_SHAPES["7b"].projector.forward, "added tokens are projected from nothing"


@pytest.mark.slow
def test_it_is_compared_on_a_checkpoint_of_its_own(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "Clock", Stopwatch)
    monkeypatch.setattr(comparing, "draw_quality_against_cost", lambda *given, **more: None)
    monkeypatch.setitem(tasks.TASKS, Toy.name, Toy)
    toy_data(tmp_path, number=3)
    base, own = trained[0] / "base", trained[1].folder
    assert compare(base, f"dense,{NAME}", tmp_path / "out", "--model", own, root=tmp_path) == 0
    mine, others = (rows_of(tmp_path / "out", model=str(model)) for model in (own, base))
    assert mine[NAME]["costs"]["image_tokens_per_layer"] == mine["dense"]["costs"]["image_tokens_per_layer"]
    assert mine[NAME]["costs"]["kv_bytes"] < mine["dense"]["costs"]["kv_bytes"]
    assert set(others) == {"dense"}, "it is left out where its weights are not"
