"""The matrix products of a real training step, counted by torch and held against the formula."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.costs import llava_shape, predictor_flops, training_flops
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.model.switches import choose_method
from dynamic_llava.train.optimizer import prepare
from tests.builders import FIRST_WORD, IMAGE_TOKEN, VOCABULARY

ROWS, TOKENS, BEFORE = 2, 40, 3


def learned_of_run(shape, run):
    """Return the costs of the learned parts, those of them learning that the run trains."""
    chosen = choose_method(run.sparsity, sparsity=run.train.sparsity_mode)
    return learned_costs(run.sparsity, shape.decoder.hidden, chosen)


def counted_flops(run, config):
    """Return a real step's matrix products (2 rows of 40 tokens, features given): sums over tokens, over heads.

    The sums over tokens run in `mm` and `addmm`, those over heads, which is attention, in `bmm`.
    """
    image_tokens, hidden = llava_shape(config).tokens_per_image, config.text_config.hidden_size
    model = prepare(DynamicLlavaForConditionalGeneration(config), run).train()
    ids = torch.randint(FIRST_WORD, VOCABULARY, (ROWS, TOKENS))
    ids[:, BEFORE : BEFORE + image_tokens] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:, : BEFORE + image_tokens] = -100
    learns = run.train.projector_learning_rate is not None
    images = {"image_features": torch.randn(ROWS, image_tokens, hidden, requires_grad=learns)}
    with FlopCounterMode(display=False) as counter:
        mode = run.train.sparsity_mode
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **images}
        model(**given, sparsity=mode, distill=run.train.distill, skip_logits=True).loss.backward()
    # Earlier transformers computes the rotary angles by a product, later ones do not.
    rotary = next(module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding"))
    with FlopCounterMode(display=False) as angles:
        for _ in range(1 if run.train.distill is None else 2):
            rotary(images["image_features"], position_ids=torch.arange(TOKENS)[None])
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    return counts["aten.mm"] + counts.get("aten.addmm", 0), counts["aten.bmm"] - angles.get_total_flops()


def check_training_flops(run, config):
    """Assert that the formula counts what a step of this run on a model of this configuration multiplies."""
    linear, attention = counted_flops(run, config)
    shape, sparsity, mode = llava_shape(config), run.sparsity, run.train.sparsity_mode
    image_tokens, width, blocks = shape.tokens_per_image, sparsity.predictor_width, sparsity.predictor_blocks
    flops = training_flops(shape, sparsity, learned_of_run(shape, run), run.train, run.lora)
    outputs, tokens = ROWS * (TOKENS - BEFORE - image_tokens), ROWS * TOKENS
    whole = tokens * flops.per_token + ROWS * TOKENS * (TOKENS + 1) // 2 * flops.per_pair + ROWS * flops.per_image
    head = outputs * flops.per_learned_token
    assert flops.of_batch(ROWS, TOKENS, ROWS, outputs, outputs) == whole + outputs * flops.per_output_token + head
    image = 3 * predictor_flops(
        shape.decoder.hidden, image_tokens, width=width, mlp=sparsity.predictor_mlp, blocks=blocks
    )
    inner = 3 * blocks * 4 * image_tokens**2 * width  # the predictor's own attention runs in a fused operation
    images = ROWS * (image - inner) if mode in ("both", "image") else 0
    assert linear == tokens * flops.per_token + images + outputs * flops.per_output_token + head
    assert attention == ROWS * TOKENS**2 * flops.per_pair, "the reference attention computes every pair"
