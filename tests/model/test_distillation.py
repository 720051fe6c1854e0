"""Distillation: its value is that of two models, its gradient reaches the sparse pass alone, and it leaves no trace."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dynamic_llava.config import DistillConfig, LoraConfig, SparsityConfig, TrainConfig
from dynamic_llava.methods import FastV
from dynamic_llava.model import distillation
from dynamic_llava.model.distillation import dense_logits, distillation_loss
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.optimizer import prepare
from tests.builders import build_model, collate, dense_twin, fixed_rows

DISTILL = DistillConfig(weight=2.0, temperature=3.0)
TOKENS = ("input_ids", "attention_mask", "pixel_values")


def batch(side="right", **more):
    """Return a training call on rows with two, one and no image, of which every third token is not learned."""
    inputs = collate(fixed_rows(), side)
    del inputs["keep_mask"]
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    labels[:, ::3] = -100
    return {**inputs, "labels": labels, "tau": 0.7, "sample_key": torch.arange(len(labels)), **more}


def in_float64(inputs):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def learned(labels):
    return F.pad(labels, (0, 1), value=-100)[:, 1:] != -100


def by_definition(student, teacher, temperature):
    """The mean over tokens of temperature^2 sum_v p (log p - log q)."""
    p, q = (torch.softmax(logits / temperature, -1) for logits in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_it_is_the_divergence_of_two_models(side, family):
    """transformers' own LLaVA of the same weights, a model by itself, is the teacher; in float64."""
    model = build_model(family=family).double().train()
    twin = dense_twin(model).double()
    inputs = in_float64(batch(side))
    found = model(**inputs, distill=DISTILL)
    with torch.no_grad():
        teacher = twin(**{name: inputs[name] for name in TOKENS}).logits
    where = learned(inputs["labels"])
    expected = by_definition(found.logits[where], teacher[where], 3.0)
    torch.testing.assert_close(found.distill_loss, expected, rtol=1e-12, atol=1e-14)
    assert found.distill_loss > 0.01 and found.distill_loss.dtype == torch.float64
    alone = model(**inputs)
    assert torch.equal(found.lm_loss, alone.lm_loss) and alone.distill_loss is None
    torch.testing.assert_close(found.loss, alone.loss + 2.0 * expected, rtol=1e-12, atol=0)


def test_its_gradient_is_that_of_two_models():
    model = build_model().double().train()
    twin = dense_twin(model).double()
    inputs = in_float64(batch())
    found = {}
    for way in ("one", "two"):
        model.zero_grad(set_to_none=True)
        out = model(**inputs, distill=DISTILL if way == "one" else None)
        loss = out.distill_loss
        if loss is None:
            with torch.no_grad():
                teacher = twin(**{name: inputs[name] for name in TOKENS}).logits
            where = learned(inputs["labels"])
            loss = by_definition(out.logits[where], teacher[where], 3.0)
        loss.backward()
        found[way] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found["one"].keys() == found["two"].keys()
    assert sum("_predictor." in name and bool(gradient.any()) for name, gradient in found["one"].items()) > 10
    for name, gradient in found["one"].items():
        torch.testing.assert_close(gradient, found["two"][name], rtol=1e-9, atol=1e-13, msg=name)


def test_the_divergence_in_parts(monkeypatch):
    """Whole and in parts of two rows: the same value, and the gradient that torch's own operations have."""
    student = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    whole = distillation_loss(student, teacher, 2.0)
    monkeypatch.setattr(distillation, "PART", 22)
    parts = distillation_loss(student, teacher, 2.0)
    expected = by_definition(student, teacher.detach(), 2.0)
    for loss in (whole, parts):
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
        (wanted,) = torch.autograd.grad(3 * expected, student, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
    assert torch.autograd.grad(whole, teacher, allow_unused=True) == (None,)
    assert torch.autograd.gradcheck(lambda logits: distillation_loss(logits, teacher[:3], 0.7, 4), student[:3])
    nothing = distillation_loss(student[:0], teacher[:0], 2.0)
    assert nothing.item() == 0 and not torch.autograd.grad(nothing, student)[0].any()


def test_a_small_divergence_is_exact_in_float32():
    """Distributions that are nearly the same, and ones that have nothing in common."""
    teacher = 3 * torch.randn(50, 1000)
    for student in (teacher + 1e-3 * torch.randn(50, 1000), 60 * torch.randn(50, 1000)):
        exact = by_definition(student.double(), teacher.double(), 1.0).item()
        assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(exact, rel=1e-4)
    assert distillation_loss(teacher, teacher, 1.0).item() == 0


def test_the_count_is_the_global_one():
    model, inputs = build_model().train(), batch()
    own = model(**inputs, distill=DISTILL).distill_loss
    count = int(learned(inputs["labels"]).sum())
    told = model(**inputs, distill=DISTILL, num_items_in_batch=torch.tensor(4.0 * count)).distill_loss
    torch.testing.assert_close(4 * told, own)
    shifted = {**inputs, "shift_labels": F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]}
    assert torch.equal(model(**shifted, distill=DISTILL).distill_loss, own)
    none = {**inputs, "labels": torch.full_like(inputs["labels"], -100), "output_mask": inputs["output_mask"]}
    assert model(**none, distill=DISTILL).distill_loss.item() == 0


def test_nothing_dropped_is_no_distance_and_dropping_is_one():
    model, inputs = build_model().double().train(), in_float64(batch())
    keep = inputs["attention_mask"].bool()
    kept = model(**inputs, keep_mask=keep, distill=DISTILL).distill_loss
    dropped = model(**inputs, keep_mask=keep & ~inputs["output_mask"], distill=DISTILL).distill_loss
    assert abs(kept) < 1e-12 and dropped > 1e-3


def test_one_tower_pass_few_logits_and_no_trace():
    """Modes, random state and gradients of the teacher: as if it had not been there."""
    model = build_model().train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    calls = {"tower": 0, "head": []}
    model.model.vision_tower.register_forward_hook(lambda *_: calls.update(tower=calls["tower"] + 1))
    model.lm_head.register_forward_hook(
        lambda module, given, made: calls["head"].append((made.shape, made.requires_grad))
    )
    inputs, state = batch(), torch.get_rng_state()
    model(**inputs, distill=DISTILL)
    rows, count = inputs["labels"].shape, int(learned(inputs["labels"]).sum())
    assert calls == {"tower": 1, "head": [((*rows, 128), True), ((count, 128), False)]}
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_the_teacher_has_no_dropout_of_adapters():
    lora = RunConfig(train=TrainConfig(tune="lora"), lora=LoraConfig(rank=4, dropout=0.9))
    model = prepare(build_model(), lora).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    inner, inputs = model.get_base_model(), batch()
    given = {**dict.fromkeys(("inputs_embeds", "position_ids", "image_mask")), **inputs}
    images = inner.model.encode_images(inputs["pixel_values"])
    where = learned(inputs["labels"])
    training = dense_logits(inner, given, images, where)
    model.eval()
    assert torch.equal(training, dense_logits(inner, given, images, where))


@pytest.mark.parametrize("recomputes", [False, True])
def test_autocast_loses_no_gradient_to_the_dense_pass(recomputes):
    """Autocast remembers the copies of weights that it has made; one made without gradient must serve no other pass."""
    run = RunConfig(train=TrainConfig(bf16=True, gradient_checkpointing=recomputes))
    model, inputs = prepare(build_model(), run).train(), batch()
    exact = model(**inputs, distill=DISTILL).distill_loss.item()
    found = {}
    for distill in (None, DISTILL):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**inputs, distill=distill)
        out.loss.backward()
        found[distill] = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert found[None] == found[DISTILL] and "lm_head.weight" in found[None]
    assert out.distill_loss.dtype == torch.float32 and out.distill_loss.item() == pytest.approx(exact, rel=0.3)


def test_rules_without_weights_and_rows_of_text():
    """The language model may be tuned under a fixed rule; a batch of text has nothing that an image would change."""
    model, inputs = build_model().train(), batch()
    assert model(**inputs, method=FastV(layer=2, image_keep_rate=0.25), distill=DISTILL).distill_loss > 1e-3
    text = {name: value[1:2] for name, value in inputs.items() if name not in ("pixel_values", "tau")}
    assert not (text["input_ids"] == model.config.image_token_id).any()
    model.config.sparsity = replace(model.config.sparsity, output_min_length=10_000)
    assert model(**text, distill=DISTILL).distill_loss < 1e-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": "none"}, "distill draws a sparse pass to the dense one, and method 'dynamic' drops nothing"),
        ({"method": "dense"}, "method 'dense' drops nothing"),
        ({"method": "downsample"}, "method 'downsample' makes them of a smaller picture"),
        ({"labels": None}, "distill was given without labels"),
    ],
)
def test_what_cannot_be_distilled_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_model().eval()(**batch(distill=DISTILL, **change))


@pytest.mark.parametrize(
    "settings", [{"weight": 0}, {"weight": -1.0}, {"temperature": 0}, {"temperature": float("nan")}]
)
def test_settings_without_a_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=f"train.distill.{next(iter(settings))}="):
        DistillConfig(**settings)
    assert TrainConfig().distill is None and "distill" not in {*SparsityConfig().to_dict()}
