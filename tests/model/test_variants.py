"""Variants of training: relaxations inside the model, zero vectors for MaskedSoftmax (Table 7), options of Eq. 10."""

import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dynamic_llava import SparsityConfig, get_method
from dynamic_llava.sparsity import RELAXATIONS, budget
from tests.builders import (
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    assert_same_logits,
    build_model,
    collate,
    fixed_rows,
    make_row,
    predictors,
    prompt_segments,
    rows,
)
from tests.model.test_training import assert_same_gradients, gradients, training_inputs
from tests.properties import few_or_many, for_all

every_relaxation = pytest.mark.parametrize("relaxation", RELAXATIONS)
noise_free = pytest.mark.parametrize("relaxation", ["sigmoid_st", "soft_topk"])


def conversations(seed=0):
    """Two rows: answers of 6, 3 and 5 tokens (LEN_OT is 4), and one of 9."""
    turns = [("image", 0), ("text", 2), ("output", 6), ("text", 3), ("output", 3), ("text", 1), ("output", 5)]
    return [
        make_row([("text", 2), *turns], seed=seed),
        make_row([*prompt_segments(1, [1, 2]), ("output", 9)], seed=seed + 1),
    ]


@every_relaxation
@few_or_many
def test_decisions_belong_to_the_sample(examples, relaxation):
    """Images and answers are decided about one by one: alike alone and in any batch, padded on either side."""
    model = build_model(relaxation=relaxation, output_segments="all").train()

    @for_all(examples, rows(least_rows=2, most_images=2, outputs=(1, 9), answers=2), st.sampled_from(["left", "right"]))
    @torch.no_grad()
    def check(batch, side):
        keys = torch.arange(len(batch)) * 1001 + 7
        together = training_inputs(batch, side, keys)
        out = model(**together)
        for index, row in enumerate(batch):
            alone = model(**training_inputs([row], "right", keys[index : index + 1]))
            real = together["attention_mask"][index].bool()
            assert torch.equal(out.sparsity.keep_mask[index][real], alone.sparsity.keep_mask[0])


@every_relaxation
@pytest.mark.parametrize("dropped_tokens", ["masked_softmax", "zero_vectors"])
def test_both_predictors_learn_from_the_task(relaxation, dropped_tokens):
    model = build_model(relaxation=relaxation, dropped_tokens=dropped_tokens, keep_rate_weight=0.0)
    out, found = gradients(model, **training_inputs(fixed_rows(seed=60, output=8)))
    mask, layout = out.sparsity.keep_mask, out.sparsity.layout
    assert set(mask.unique().tolist()) == {0.0, 1.0} and mask[layout.prompt].eq(1).all()
    for predictor in predictors(model):
        parameter = predictor.head[-1].weight
        name = next(name for name, candidate in model.named_parameters() if candidate is parameter)
        assert torch.isfinite(found[name]).all() and found[name].norm() > 0, name


@pytest.mark.parametrize("segments", [[("image", 0), ("output", 6)], [("output", 6)], [("image", 0)], []], ids=str)
def test_each_predictor_is_called_once_whatever_the_batch_holds(segments):
    """A process that called one more often than the others would wait for them for ever (ZeRO-3)."""
    model, calls = build_model().train(), []
    for predictor in predictors(model):
        predictor.register_forward_hook(lambda module, inputs, output: calls.append(type(module).__name__))
    model(**training_inputs([make_row([("text", 3), *segments], seed=71)]))
    assert sorted(calls) == ["ImagePredictor", "OutputPredictor"]


@noise_free
def test_training_without_noise_ignores_the_key_and_the_paper_does_not(relaxation):
    batch = fixed_rows(seed=61, output=8)
    for name, equal in ((relaxation, True), ("gumbel_st", False)):
        model = build_model(relaxation=name).train()
        masks = [model(**training_inputs(batch, keys=torch.arange(4) + k)).sparsity.keep_mask for k in (0, 9)]
        assert torch.equal(*masks) == equal


def test_soft_topk_trains_with_the_image_tokens_of_inference():
    """And sigmoid_st with the output tokens of inference; soft_topk's answers have a budget that inference lacks."""
    batch = fixed_rows(seed=62, output=9)
    call = training_inputs(batch)
    decided = {name: build_model(relaxation=name).train()(**call).sparsity for name in ("soft_topk", "sigmoid_st")}
    call.pop("tau")
    inference = build_model().eval()(**call).sparsity
    layout = inference.layout
    assert torch.equal(decided["soft_topk"].keep_mask[layout.is_image].bool(), inference.keep_mask[layout.is_image])
    assert torch.equal(decided["sigmoid_st"].keep_mask[layout.output].bool(), inference.keep_mask[layout.output])
    assert decided["soft_topk"].keep_mask[layout.output].view(4, 9).sum(1).eq(budget(0.5, 9)).all()


def test_soft_topk_keeps_the_budget_of_every_image_and_answer():
    model = build_model(relaxation="soft_topk", output_segments="all", output_keep_rate=0.4).train()
    call = training_inputs(conversations())
    for rates, kept_image, kept_answers in (
        ({}, budget(0.25, TOKENS_PER_IMAGE), [budget(0.4, 6), 3, budget(0.4, 5), budget(0.4, 9)]),
        ({"image_keep_rate": 0.9, "output_keep_rate": 0.8}, 14, [4, 3, 4, 7]),
    ):
        record = model(**call, **rates).sparsity
        assert record.keep_mask[record.layout.is_image].view(2, -1).sum(1).tolist() == [kept_image] * 2
        answer_T, _ = record.layout.answer_places()
        kept_T = record.keep_mask[record.layout.output].detach()
        assert torch.zeros(4).index_add(0, answer_T, kept_T).tolist() == kept_answers  # 3: shorter than LEN_OT


def test_soft_topk_feels_no_regulariser():
    model = build_model(relaxation="soft_topk").train()
    out = model(**training_inputs(fixed_rows(seed=63, output=9)))
    assert out.image_keep_loss == 0 and out.output_keep_loss > 0, "a quarter of 16 is exact, half of 9 is not"
    parameters = [predictor.head[-1].weight for predictor in predictors(model)]
    of_terms = torch.autograd.grad(out.image_keep_loss + out.output_keep_loss, parameters, retain_graph=True)
    of_task = torch.autograd.grad(out.lm_loss, parameters)
    assert all(a.norm() < 1e-5 * b.norm() for a, b in zip(of_terms, of_task, strict=True))


def root_mean_square_norm(module, x):
    """transformers' own rounds to float32."""
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def literal_zero_vectors(model, embeddings_1ND, keep_N, masked_from):
    """Logits (N, V) of one row by the formulas of Llama, without any of its modules' code; float64.

    From layer `masked_from` on, the hidden state that enters a layer is multiplied by keep_N (N,).
    """
    text = model.config.text_config
    heads, width, norm = text.num_attention_heads, text.hidden_size // text.num_attention_heads, root_mean_square_norm
    h, tokens = embeddings_1ND[0], embeddings_1ND.shape[1]
    frequency = 1 / text.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(tokens, dtype=torch.float32)[:, None] * torch.cat([frequency, frequency])
    cosine, sine = angle.cos().double(), angle.sin().double()  # transformers takes them in float32
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()

    def by_head(x, module, rotated):
        x = (x @ module.weight.T).view(tokens, -1, width).transpose(0, 1)
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], -1) * sine if rotated else x

    for index, layer in enumerate(model.model.language_model.layers):
        if index >= masked_from:
            h = h * keep_N[:, None]
        x, attention, mlp = norm(layer.input_layernorm, h), layer.self_attn, layer.mlp
        q, k = (by_head(x, module, rotated=True) for module in (attention.q_proj, attention.k_proj))
        v = by_head(x, attention.v_proj, rotated=False)
        k, v = (states.repeat_interleave(heads // states.shape[0], dim=0) for states in (k, v))
        weights = (q @ k.transpose(1, 2) / width**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
        h = h + (weights @ v).transpose(0, 1).reshape(tokens, -1) @ attention.o_proj.weight.T
        x = norm(layer.post_attention_layernorm, h)
        inner = x @ mlp.gate_proj.weight.T
        h = h + (inner * inner.sigmoid() * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return norm(model.model.language_model.norm, h) @ model.lm_head.weight.T


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_zero_vectors_equal_their_literal_construction(kv_heads, monkeypatch):
    """Values and gradients, the keep mask's included, in float64."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", root_mean_square_norm)
    model = build_model(kv_heads, dropped_tokens="zero_vectors").double().train()
    row = make_row([*prompt_segments(1, [2, 3]), ("output", 8)], seed=64)
    call = collate([row])
    ids, labels = call["input_ids"], torch.where(call["output_mask"], call["input_ids"], -100)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    parameters = {name: p for name, p in model.named_parameters() if "language_model.layers" in name}
    assert (row.keep == 0).sum() > 5

    mask = row.keep.double()[None].requires_grad_()
    out = model(inputs_embeds=embeddings, image_mask=ids == IMAGE_TOKEN, labels=labels, keep_mask=mask)
    loss = cross_entropy(out.logits[0, :-1], labels[0, 1:])
    actual = torch.autograd.grad(loss, [embeddings, mask, *parameters.values()])

    keep = row.keep.double().requires_grad_()
    logits = literal_zero_vectors(model, embeddings, keep, masked_from=2)
    expected_loss = cross_entropy(logits[:-1], labels[0, 1:])
    expected = torch.autograd.grad(expected_loss, [embeddings, keep, *parameters.values()])

    torch.testing.assert_close(out.logits[0], logits, rtol=1e-9, atol=1e-10)
    assert out.lm_loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)  # the model takes its loss in float32
    for name, ours, theirs in zip(["embeddings", "mask", *parameters], actual, expected, strict=True):
        error = (ours.reshape(theirs.shape) - theirs).norm() / theirs.norm()
        assert error < (1e-6 if name == "mask" else 1e-9), f"{name}: relative error {error:.1e}"  # the mask is float32


def test_fastv_trains_with_zero_vectors_for_what_it_drops_at_inference():
    """The same as its decisions given as a mask; other logits than where dropped tokens are hidden."""
    logits = {}
    for dropped in ("zero_vectors", "masked_softmax"):
        model, fastv = build_model(dropped_tokens=dropped), get_method("fastv", layer=3, image_keep_rate=0.25)
        call = training_inputs(fixed_rows(seed=65, output=8), "left")
        wanted = model(**call, method=fastv).sparsity.keep_mask
        model.train()
        out = model(**call, method=fastv)
        assert torch.equal(out.sparsity.keep_mask.bool(), wanted.bool()) and not wanted.all()
        given = model(**call, keep_mask=wanted.float(), method=get_method("dense", layer=3))
        torch.testing.assert_close(out.logits, given.logits, rtol=0, atol=0)
        logits[dropped] = out.logits
    assert (logits["zero_vectors"] - logits["masked_softmax"]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_zero_vectors_that_drop_nothing_are_the_dense_model(side):
    model = build_model(dropped_tokens="zero_vectors")
    call = training_inputs(fixed_rows(seed=65, output=8), side)
    dense, expected = gradients(model, **call, sparsity="none")
    model.train()
    out = model(**call, keep_mask=torch.ones_like(call["labels"]))
    assert torch.equal(out.lm_loss, dense.loss)
    out.lm_loss.backward()
    for name, wanted in expected.items():
        assert torch.equal(model.get_parameter(name).grad, wanted), name


@pytest.mark.parametrize("side", ["left", "right"])
def test_zero_vectors_leave_rows_islands(side):
    model = build_model(dropped_tokens="zero_vectors").train()
    batch, keys = fixed_rows(seed=66, output=8), torch.arange(4) + 3
    together = training_inputs(batch, side, keys)
    out = model(**together)
    for index, row in enumerate(batch):
        alone = model(**training_inputs([row], "right", keys[index : index + 1]))
        real = together["attention_mask"][index].bool()
        assert_same_logits(out.logits[index][real], alone.logits[0], what=f"row {index}")


def test_zero_vectors_concern_training_alone():
    """Scoring with labels and generating stay those of MaskedSoftmax and of physical removal."""
    hiding, zeroing = build_model(), build_model(dropped_tokens="zero_vectors")
    call = training_inputs(fixed_rows(seed=67, output=8))
    assert not torch.equal(hiding.train()(**call).logits, zeroing.train()(**call).logits)
    call.pop("tau")
    prompt = {name: value for name, value in call.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    for model in (hiding, zeroing):
        model.eval()
    with torch.no_grad():
        assert torch.equal(hiding(**call).loss, zeroing(**call).loss)
        assert torch.equal(hiding(**prompt).logits, zeroing(**prompt).logits)


def test_a_dropped_token_still_pays_its_loss_with_zero_vectors():
    """Its prediction is written by the last layer alone: finite, trained, and blind to which token it was."""
    model = build_model(dropped_tokens="zero_vectors").train()
    row = make_row([*prompt_segments(0, [4]), ("output", 6)], seed=68)
    call = collate([row])
    last = len(row.ids) - 1
    labels = torch.full_like(call["input_ids"], -100)
    labels[0, last] = call["input_ids"][0, last]
    keep = torch.ones_like(labels)
    keep[0, last - 1] = 0  # the token that predicts the last one
    losses = []
    for token in (20, 90):
        ids = call["input_ids"].clone()
        ids[0, last - 1] = token
        losses.append(model(input_ids=ids, labels=labels, output_mask=call["output_mask"], keep_mask=keep).lm_loss)
    assert torch.isfinite(losses[0]) and losses[0] > 0 and torch.equal(*losses)
    layers = model.model.language_model.layers
    before, at_end = torch.autograd.grad(losses[0], [layers[4].mlp.down_proj.weight, layers[5].mlp.down_proj.weight])
    assert at_end.norm() > 0 and before.norm() > 0, "the past it averages over is learned too"


def test_the_gradient_clip_bounds_what_zero_vectors_send_into_the_mask():
    call = training_inputs(fixed_rows(seed=69, output=8))
    settings = {"keep_rate_weight": 0.0, "dropped_tokens": "zero_vectors"}
    free, before = gradients(build_model(**settings), **call)
    tight, after = gradients(build_model(**settings, mask_grad_clip=1e-6), **call)
    assert torch.equal(free.loss, tight.loss)
    names = [name for name in before if "_predictor" in name]
    assert sum(after[name].norm() for name in names) < 1e-2 * sum(before[name].norm() for name in names)
    late = [name for name in before if "layers.3" in name or "lm_head" in name]
    assert_same_gradients({name: after[name] for name in late}, {name: before[name] for name in late})
    assert tight.sparsity.mask_gradient == free.sparsity.mask_gradient


def test_gradient_checkpointing_changes_no_zero_vector():
    call = training_inputs(fixed_rows(seed=70, output=8))
    plain, expected = gradients(build_model(dropped_tokens="zero_vectors"), **call)
    model = build_model(dropped_tokens="zero_vectors")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saved, actual = gradients(model, **call)
    assert torch.equal(saved.loss, plain.loss)
    assert all(torch.equal(actual[name], wanted) for name, wanted in expected.items())


@pytest.mark.parametrize("distance", ["squared", "absolute"])
@pytest.mark.parametrize("segments", ["last", "all"])
def test_output_term_of_eq_10_over_one_or_all_answers(segments, distance):
    """Value and gradient by hand: LEN_OT holds per answer, a sample's keep rate is one mean over what was decided."""
    model = build_model(output_segments=segments, keep_rate_distance=distance).train()
    call = training_inputs(conversations())
    out = model(**call)
    mask = out.sparsity.keep_mask
    answer_T, _ = out.sparsity.layout.answer_places()
    decided = torch.zeros_like(call["labels"], dtype=torch.bool)
    if segments == "all":  # 0, 1, 2: answers of 6, 3 and 5 tokens; 3: the other row's
        decided[out.sparsity.layout.output] = answer_T != 1
    else:
        decided[0, -5:] = True
        decided[1] = call["labels"][1] != -100
    assert torch.equal(out.sparsity.sparsified_output, decided)
    expected_loss, expected = 0.0, torch.zeros_like(mask)
    for row, count in enumerate((11 if segments == "all" else 5, 9)):
        gap = mask[row][decided[row]].detach().mean() - 0.5
        expected_loss += (gap.square() if distance == "squared" else gap.abs()) / 2
        expected[row][decided[row]] = (2 * gap if distance == "squared" else gap.sign()) / count / 2
    torch.testing.assert_close(out.output_keep_loss, expected_loss)
    (gradient,) = torch.autograd.grad(out.output_keep_loss, mask, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("setting", ["relaxation", "dropped_tokens"])
def test_unknown_variants_are_refused(setting):
    with pytest.raises(ValueError, match=rf"{setting}='hard' is not known; choose one of"):
        SparsityConfig(**{setting: "hard"})
