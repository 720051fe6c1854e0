"""What passes cost: FLOPs, tokens per layer, key-value bytes. Pure arithmetic, no torch.

Two ways to count, never to be mixed in one table. `flops_paper` is Eq. 13 as the paper's tables use it: 32 N D^2 stands
for ALL linear layers (four projections 8 N D^2, a three-matrix MLP of width 4D 24 N D^2) and 4 N^2 D for attention; the
paper's sentence swaps them, and LLaMA's real MLP is narrower, so its absolute values are 1.32 times too large while
ratios hold. `flops_exact` counts the real module shapes, two operations per multiply-add. Both leave out norms,
softmax, embeddings and the vision tower; the head is `head_flops`.

In every function `tokens` is what layers below `sparse_layer` see and `kept` what the others see; kept=None is dense.
`tokens` may also be a sequence, what each layer sees, which covers any method (`SparsityRecord.tokens_per_layer`).
Training masks instead of removing, so `training_flops` counts every token; its bytes are in memory.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dynamic_llava.config import LoraConfig, SparsityConfig, TrainConfig
from dynamic_llava.costs.shapes import DecoderShape, Learned, LlavaShape, predictor_costs


def average_tokens(total: float, kept: float, layers: int, sparse_layer: int) -> float:
    """Return the mean over layers of the tokens a layer sees: 576 -> 115 at layer 2 of 32 is 143.8, not 115."""
    _check_layers(layers, sparse_layer)
    return (sparse_layer * total + (layers - sparse_layer) * kept) / layers


def flops_paper(
    tokens: int | Sequence[int],
    hidden: int,
    layers: int,
    *,
    kept: int | None = None,
    sparse_layer: int = 0,
    batch: int = 1,
) -> int:
    """Return the FLOPs of Eq. 13: 32 B N D^2 + 4 B N^2 D in each layer."""
    groups = _layer_groups(tokens, kept, layers, sparse_layer)
    return batch * sum(depth * (32 * n * hidden**2 + 4 * n**2 * hidden) for depth, n in groups)


def flops_exact(
    tokens: int | Sequence[int],
    shape: DecoderShape,
    *,
    kept: int | None = None,
    sparse_layer: int = 0,
    causal: bool = False,
    batch: int = 1,
) -> int:
    """Return the FLOPs of the decoder layers on `tokens` tokens at once (a prefill, or a training forward).

    causal=False counts the full N x N attention, causal=True only the N (N + 1) / 2 pairs that are visible.
    """
    total = 0
    for depth, n in _layer_groups(tokens, kept, shape.layers, sparse_layer):
        pairs = n * (n + 1) // 2 if causal else n * n
        total += depth * (2 * n * shape.layer_parameters + 4 * pairs * shape.query_width)
    return batch * total


def flops_decode_step(
    tokens: int | Sequence[int], shape: DecoderShape, *, kept: int | None = None, sparse_layer: int = 0, batch: int = 1
) -> int:
    """Return the FLOPs of the decoder layers for one new token with a cache of `tokens` (`kept` in sparse layers)."""
    groups = _layer_groups(tokens, kept, shape.layers, sparse_layer)
    return batch * sum(depth * (2 * shape.layer_parameters + 4 * (n + 1) * shape.query_width) for depth, n in groups)


def head_flops(tokens: int, shape: DecoderShape) -> int:
    """Return the FLOPs of the output head on `tokens` tokens (one per row in a prefill)."""
    return 2 * tokens * shape.hidden * shape.vocab


def prefill_flops(
    tokens: int | Sequence[int], shape: DecoderShape, *, kept: int | None = None, sparse_layer: int = 0, batch: int = 1
) -> int:
    """Return the FLOPs of a prefill, or of a decoding step without cache: causal attention, the head on one token.

    The predictors come on top (`predictor_flops`), and so do vision tower and projector.
    """
    layers = flops_exact(tokens, shape, kept=kept, sparse_layer=sparse_layer, causal=True, batch=batch)
    return layers + head_flops(batch, shape)


def predictor_flops(
    hidden: int,
    image_tokens: int = 0,
    output_tokens: int = 0,
    *,
    images: int = 1,
    width: int = 512,
    mlp: int = 2048,
    blocks: int = 2,
) -> int:
    """Return the FLOPs of the image predictor on `images` images of `image_tokens`, and of the output predictor.

    Same counting as `flops_exact`; attention inside the image predictor is bidirectional over one image.
    """
    sizes = SparsityConfig(predictor_width=width, predictor_heads=1, predictor_mlp=mlp, predictor_blocks=blocks)
    image, output = predictor_costs(hidden, sizes).values()
    return images * image.judging(image_tokens) + output_tokens * output.judging(1)


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a forward and backward pass, which are linear in what the batches hold. Recomputation never counts."""

    per_token: int
    """Linear maps of the decoder's layers."""
    per_pair: int
    """Attention; a sample of n tokens has n (n + 1) / 2 pairs of a query and a key that it sees."""
    per_image: int
    """Vision tower, projector, and what judges image tokens."""
    per_output_token: int
    """What judges output tokens."""
    per_learned_token: int
    """The head, which training runs on tokens with a label alone; of the dense pass too, if training distils."""
    per_prompt_token: int = 0
    """What judges the tokens of questions, which all text but the output counts as. It is counted for every token that
    is no output token; `per_image` takes those of an image off again."""

    def of_batch(self, rows: int, tokens: int, images: int, output_tokens: int, learned_tokens: int) -> int:
        """Return the FLOPs of `rows` samples of `tokens` tokens; all other counts are those of all rows."""
        text = rows * (self.per_token * tokens + self.per_pair * tokens * (tokens + 1) // 2)
        judged = self.per_output_token * output_tokens + self.per_prompt_token * (rows * tokens - output_tokens)
        learned = self.per_learned_token * learned_tokens
        return text + self.per_image * images + judged + learned


def training_flops(
    shape: LlavaShape,
    sparsity: SparsityConfig,
    learned: Learned,
    train: TrainConfig,
    lora: LoraConfig | None = None,
) -> TrainingFlops:
    """Return the FLOPs of training as `train` says: a gradient that nothing needs is not counted.

    `learned` are the parts of the method.

    A linear map costs its forward pass once more for the gradient of its input and once more for that of its weight;
    attention costs twice its forward pass. Predictors alone start at the sparse layer, where MaskedSoftmax passes a
    gradient to the keep mask only: queries, keys and values get none, nor does anything below. Adapters start likewise
    at layer 0, whose input needs no gradient. Distillation passes all layers once more, forward, without the tower.
    """
    decoder, hidden = shape.decoder, shape.decoder.hidden
    full, projector = train.tune == "full", train.projector_learning_rate is not None
    first = sparsity.sparse_layer if train.tune == "predictors" and not projector else 0
    reached = decoder.layers - first
    linear = decoder.layers * decoder.layer_parameters * (2 if full else 1) + reached * decoder.layer_parameters
    pairs = 4 * decoder.query_width * decoder.layers + 8 * decoder.query_width * reached
    if train.tune == "lora" and not projector:
        linear -= decoder.incoming_parameters  # of the first layer
    elif first and sparsity.dropped_tokens == "masked_softmax":
        linear -= decoder.incoming_parameters
        pairs -= 6 * decoder.query_width
    head = hidden * decoder.vocab * (3 if full else 2)
    if lora is not None:
        linear += 3 * decoder.layers * decoder.adapter_parameters(lora.rank)
        linear -= 0 if projector else 3 * lora.rank * hidden
    image = shape.vision.flops + shape.projector.forward + projector * shape.projector.backward
    learning = [part for part in learned.values() if part.learns]
    image += 3 * sum(part.judging(shape.tokens_per_image) for part in learning if part.judges_images)
    output = 3 * sum(part.judging(1) for part in learning if part.judges_outputs)
    prompt = 3 * sum(part.judging(1) for part in learning if part.judges_prompts)
    image -= prompt * shape.tokens_per_image
    if train.distill is not None:
        linear += decoder.layers * decoder.layer_parameters
        pairs += 4 * decoder.query_width * decoder.layers
        head += hidden * decoder.vocab
    return TrainingFlops(2 * linear, pairs, image, output, 2 * head, prompt)


def kv_bytes(
    shape: DecoderShape,
    tokens: int | Sequence[int],
    *,
    kept: int | None = None,
    sparse_layer: int = 0,
    bytes_per_value: int = 2,
    batch: int = 1,
) -> int:
    """Return the bytes of the keys and values of `tokens` tokens, `kept` of them in the sparse layers."""
    groups = _layer_groups(tokens, kept, shape.layers, sparse_layer)
    return batch * sum(depth * n * 2 * shape.kv_width * bytes_per_value for depth, n in groups)


def weight_bytes(shape: DecoderShape, bytes_per_value: int = 2) -> int:
    """Return the bytes of the weights that one decoding step reads: all layers' linear maps and the head."""
    layers = shape.layers * (shape.layer_parameters + shape.layer_biases)
    return bytes_per_value * (layers + shape.vocab * shape.hidden)


def decode_step_bytes(
    shape: DecoderShape,
    tokens: int | Sequence[int],
    *,
    kept: int | None = None,
    sparse_layer: int = 0,
    bytes_per_value: int = 2,
    batch: int = 1,
) -> int:
    """Return the bytes that one decoding step has to read: the weights once, and every row's keys and values."""
    cached = kv_bytes(shape, tokens, kept=kept, sparse_layer=sparse_layer, bytes_per_value=bytes_per_value, batch=batch)
    return weight_bytes(shape, bytes_per_value) + cached


def _layer_groups(
    tokens: int | Sequence[int], kept: int | None, layers: int, sparse_layer: int
) -> list[tuple[int, int]]:
    """Return (number of layers, tokens they see) of each group of layers."""
    _check_layers(layers, sparse_layer)
    if not isinstance(tokens, int):
        if len(tokens) != layers or kept is not None:
            raise ValueError(
                f"tokens has {len(tokens)} counts for {layers} layers, kept={kept}; give one count a layer, and no kept"
            )
        return [(1, count) for count in tokens]
    if kept is None:
        return [(layers, tokens)]
    if not 0 <= kept <= tokens:
        raise ValueError(f"kept={kept} of tokens={tokens} is not possible; give 0 <= kept <= tokens")
    return [(sparse_layer, tokens), (layers - sparse_layer, kept)]


def _check_layers(layers: int, sparse_layer: int) -> None:
    if layers < 1 or not 0 <= sparse_layer <= layers:
        raise ValueError(f"sparse_layer={sparse_layer} of layers={layers} does not exist; give 0 <= l <= layers")
