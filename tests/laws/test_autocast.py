"""Autocast changes precision and nothing else: every path runs, gives the dtypes of transformers' class, and agrees."""

import shutil

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from dynamic_llava import METHODS
from tests.builders import (
    LEARNED,
    assert_same_logits,
    build_model,
    collate,
    dense_twin,
    fixed_rows,
    new_model_of,
    prompts,
)

PAIRS = [
    pytest.param((torch.float32, torch.bfloat16), id="float32-bfloat16"),
    pytest.param((torch.float32, torch.float16), id="float32-float16"),
    pytest.param((torch.bfloat16, torch.bfloat16), id="bfloat16-bfloat16", marks=pytest.mark.slow),
    pytest.param((torch.float16, torch.float16), id="float16-float16", marks=pytest.mark.slow),
]
"""Weights and autocast. torch itself mixes no float16 with bfloat16: its own operators refuse."""
TOLERANCE = {torch.bfloat16: 0.04, torch.float16: 0.005}
"""Of the logits' scale: ten roundings (2^-8, 2^-11)."""
WAYS = {
    "cached": {},
    "uncached": {"use_cache": False},
    "beams": {"num_beams": 2},
}
SWITCHES = [{"sparsity": mode} for mode in ("none", "image", "output", "both")] + [{"method": name} for name in METHODS]


@pytest.fixture(params=PAIRS)
def pair(request):
    return request.param


@pytest.fixture(params=["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def model(request, pair):
    return build_model(2, request.param, layers=4).to(pair[0])


def autocast(pair):
    return torch.autocast("cpu", pair[1])


@torch.no_grad()
def test_with_the_same_decisions_every_path_agrees(model, pair):
    """Masked, scored, dropped, step by step and turn by turn: each against the masked forward under autocast."""
    inputs = collate(fixed_rows(seed=60), "left")
    start, keep, real = inputs["input_ids"].shape[1] - 6, inputs["keep_mask"], inputs["attention_mask"].bool()
    dtype = dense_dtype(model, pair)

    def same(actual, wanted, what):
        assert actual.dtype == dtype, f"{what}: {actual.dtype}"
        assert_same_logits(actual.float(), wanted.float(), TOLERANCE[pair[1]], what)

    with autocast(pair):
        expected = model(**inputs, labels=inputs["input_ids"]).logits
        same(expected, expected, "masked")
        same(model(**inputs, use_cache=False).logits[real & keep], expected[real & keep], "uncached")
        hidden = model.model(**inputs, answers_only=True).last_hidden_state
        present = real & (keep | inputs["output_mask"])
        same(model.lm_head(hidden)[present], expected[present], "scored")
        for name, sizes in {"steps": [1] * 6, "turns": [4, 2]}.items():
            stop, out = start, model(**columns(inputs, 0, start), use_cache=True)
            same(out.logits[:, -1], expected[:, start - 1], "prefill")
            for size in sizes:
                stop += size
                out = model(**columns(inputs, stop - size, stop), cache=out.cache, use_cache=True)
                same(out.logits, expected[:, stop - size : stop], f"{name} to column {stop}")


def columns(inputs, start, stop):
    """Return a chunk of the inputs, with masks of all before it; images go with the first."""
    chunk = {name: inputs[name][:, :stop] for name in ("attention_mask", "output_mask", "keep_mask")}
    pixels = inputs["pixel_values"] if start == 0 else None
    return {**chunk, "input_ids": inputs["input_ids"][:, start:stop], "pixel_values": pixels}


def dense_dtype(model, pair):
    """The dtype of the logits of transformers' own class."""
    twin, inputs = dense_twin(model).to(pair[0]), prompts(fixed_rows(seed=60, output=0))
    with autocast(pair):
        return twin(**inputs).logits.dtype


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_of_generating_runs(model, pair, way):
    """Every mode and method; the cache holds what attention computes in, not the float32 that rotation leaves."""
    inputs = prompts(fixed_rows(seed=61, output=0))
    call = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True}
    for switches in SWITCHES:
        if way == "uncached" and "method" in switches and METHODS[switches["method"]]().evicts:
            continue  # there is nothing to evict from
        name, speaker = switches.get("method"), model
        if name in LEARNED:
            speaker = new_model_of(name, 2, model.config._attn_implementation, layers=4).to(pair[0])
        with autocast(pair):
            out = speaker.generate(**inputs, **{**call, **WAYS[way]}, **switches)
        assert all(torch.isfinite(scores).any() for scores in out.scores), switches
        assert all(scores.dtype == torch.float32 for scores in out.scores)
        if out.sparsity is not None and out.cache is not None:
            assert {one.dtype for layer in out.cache.layers for one in (layer.keys, layer.values)} == {pair[1]}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_steps_under_autocast_answer_as_eager_ones(precision):
    model, inputs = build_model(2, layers=3), prompts(fixed_rows(seed=62, output=0))
    method = {"method": "structure", "do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True}
    torch._dynamo.reset()
    with torch.autocast("cpu", precision):
        eager, compiled = (model.generate(**inputs, **method, output_logits=True, compile=on) for on in (False, True))
    assert_same_logits(torch.stack(compiled.logits)[:2], torch.stack(eager.logits)[:2], TOLERANCE[precision])
    assert torch.equal(compiled.sparsity.cache_lengths, eager.sparsity.cache_lengths)
    torch._dynamo.reset()


@pytest.mark.parametrize("opened_under", [True, False])
@torch.no_grad()
def test_a_cache_goes_on_under_another_autocast_than_it_was_opened_under(model, pair, opened_under):
    inputs = collate(fixed_rows(seed=63), "left")
    pixels = {"pixel_values": inputs["pixel_values"].to(pair[0])}
    expected = model(**{**inputs, **pixels}, labels=inputs["input_ids"]).logits.float()
    stop = inputs["input_ids"].shape[1] - 6
    with torch.autocast("cpu", pair[1], enabled=opened_under):
        out = model(**{**columns(inputs, 0, stop), **pixels}, use_cache=True)
    for number, size in enumerate((1, 2, 1, 1, 1)):
        stop += size
        with torch.autocast("cpu", pair[1], enabled=bool(number % 2) == opened_under):
            out = model(**columns(inputs, stop - size, stop), cache=out.cache, use_cache=True)
        wanted = expected[:, stop - size : stop]
        assert_same_logits(out.logits.float(), wanted, TOLERANCE[pair[1]], f"columns to {stop}")


@pytest.mark.parametrize("zero_vectors", [False, True])
def test_training_has_the_same_loss_and_its_gradients(model, pair, zero_vectors):
    """With given decisions the loss is that of full precision; with sampled ones all that learns has a gradient."""
    inputs = collate(fixed_rows(seed=64, output=8), "right")
    labels = torch.where(inputs["output_mask"], inputs["input_ids"], -100)
    if zero_vectors:
        decoder = model.model.language_model
        decoder.settings = type(decoder.settings)(**{**decoder.settings.to_dict(), "dropped_tokens": "zero_vectors"})
    full = build_model(2, model.config._attn_implementation, layers=4).train()
    full.model.language_model.settings = model.model.language_model.settings
    model.train()
    with autocast(pair):
        given = model(**inputs, labels=labels).loss
    torch.testing.assert_close(given.float(), full(**inputs, labels=labels).loss, rtol=TOLERANCE[pair[1]], atol=0)
    sampled = {name: value for name, value in inputs.items() if name not in ("keep_mask", "output_mask")}
    with autocast(pair):
        loss = model(**sampled, labels=labels, sample_key=torch.arange(4)).loss
    loss.backward()
    for name, parameter in model.model.language_model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


class Rows(torch.utils.data.Dataset):
    """One image and one answer each."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch)

    def __getitem__(self, index):
        inputs = prompts([self.batch[index]])
        answer = torch.full_like(inputs["input_ids"], -100)
        answer[0, -3:] = inputs["input_ids"][0, -3:]
        return {**{name: value[0] for name, value in inputs.items()}, "labels": answer[0]}


@pytest.mark.parametrize("precision", ["bf16", None])
def test_seq2seq_trainer_predicts_with_generate(precision, tmp_path):
    """transformers' trainer, in bfloat16 and without: what it predicts is what `generate` gives."""
    model, batch = build_model(2, layers=4), [fixed_rows(seed=65 + seed, output=0)[0] for seed in range(4)]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, predict_with_generate=True, report_to=[],
        per_device_eval_batch_size=2, remove_unused_columns=False, **({precision: True} if precision else {}),
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=Rows(batch), eval_dataset=Rows(batch))
    predicted = trainer.predict(Rows(batch), do_sample=False, max_new_tokens=5)
    # The trainer runs forward, images apart, under autocast; two rows at a time, for rounding flips close decisions.
    for start in (0, 2):
        inputs = prompts(batch[start : start + 2])
        inputs["image_features"] = torch.stack(
            list(model.get_image_features(inputs.pop("pixel_values"), return_dict=True).pooler_output)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            wanted = model.generate(**inputs, do_sample=False, max_new_tokens=5)
        assert predicted.predictions[start : start + 2].tolist() == wanted.tolist()
    assert torch.isfinite(torch.tensor(predicted.metrics["test_loss"]))
