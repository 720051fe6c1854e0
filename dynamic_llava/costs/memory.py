"""What training holds in the memory of one GPU: pure arithmetic, no torch; checked against what torch really keeps.

Weights, gradients and AdamW's two states are exact. Under DeepSpeed in bfloat16 a trained parameter costs 2 + 2 + 12
bytes (weight, gradient; float32 master copy and states), a frozen one 2; otherwise weight, gradient and states have the
trained parameter's own format (4 + 4 + 8 in float32). ZeRO divides the states (stage 1), the gradients (2) and the
weights (3) by the number of GPUs.

Activations are what autograd keeps between forward and backward pass of one batch; with gradient checkpointing one
hidden state per layer. Buffers are what comes and goes, at its highest: the loss over the whole vocabulary, or one
layer's backward pass (recomputed, with gradient checkpointing), or the optimizer's step; and what communication needs.
Logits are made of learned tokens alone, which every token of text is taken for. Distillation passes the same weights
once more without keeping anything, and adds those logits.
Left out: the accelerator's context, the allocator's fragments, the vision tower's passing activations, the batch.
"""

from dataclasses import dataclass

from dynamic_llava.config import LoraConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.costs.shapes import DecoderShape, Learned, LlavaShape, parameter_counts

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOSS_BYTES = 12
"""The loss at its highest, per token and word: log-probabilities, their gradient, the logits' gradient, in float32."""
BLOCK_ROWS, PART = 128, 2**24
"""Queries per block and scores per part of the chunked MaskedSoftmax on a GPU (sparsity/kernels/chunked.py)."""
DIVERGENCE_PART = 2**22
"""Logits of which distillation's divergence is computed at a time (model/distillation.py)."""


@dataclass(frozen=True)
class Sharding:
    """How a run's state is spread over GPUs."""

    gpus: int = 1
    """Processes, one per GPU."""
    deepspeed: bool = False
    """DeepSpeed's optimizer with float32 master copies, instead of torch's AdamW on the parameters themselves."""
    zero_stage: int = 0
    """What ZeRO spreads: nothing (0), optimizer states (1), gradients too (2), weights too (3)."""
    offload_optimizer: bool = False
    """Optimizer states and gradients lie in the host's memory."""
    offload_weights: bool = False
    """So do the weights (stage 3)."""
    live_parameters: int = 10**9
    """Most parameters that stage 3 holds gathered (stage3_max_live_parameters; DeepSpeed's default)."""
    bucket_parameters: int = 5 * 10**8
    """Parameters that are reduced at once (reduce_bucket_size; DeepSpeed's default)."""
    prefetch_parameters: int = 5 * 10**7
    """Parameters that stage 3 gathers ahead (stage3_prefetch_bucket_size; DeepSpeed's default)."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"gpus={self.gpus}, zero_stage={self.zero_stage}: give 1 or more GPUs and a stage 0 to 3")
        if self.zero_stage and not self.deepspeed:
            raise ValueError(f"zero_stage={self.zero_stage} without DeepSpeed; set deepspeed, or stage 0")


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one GPU at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    host: int
    """Bytes per process in the host's memory (offloading), not part of the total."""

    @property
    def total(self) -> int:
        """Sum of what lies on the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class _Run:
    """What the formulas below ask about a run; formats are bytes per value."""

    decoder: DecoderShape
    train: TrainConfig
    lora: LoraConfig | None
    settings: SparsityConfig
    learned: Learned
    weight: int
    """Format of frozen weights, and of the hidden states between layers."""
    trained: int
    """Format of trained weights and their gradients."""
    compute: int
    """Format that linear maps work in."""

    @property
    def learning(self) -> tuple[str, ...]:
        """The parts that learn."""
        return tuple(self.train.learning_rates(name for name, part in self.learned.items() if part.learns))

    @property
    def full(self) -> bool:
        """Whether the language model's own weights learn."""
        return self.train.tune == "full"

    @property
    def reaches_all(self) -> bool:
        """Whether a gradient reaches the decoder's input: embeddings or projector learn."""
        return self.full or self.train.projector_learning_rate is not None

    @property
    def first_layer(self) -> int:
        """The first layer that keeps anything for the backward pass."""
        return self.settings.sparse_layer if self.train.tune == "predictors" and not self.reaches_all else 0

    @property
    def reaches_first(self) -> bool:
        """Whether a gradient reaches the input of the first layer; else only the layer's own parts need one."""
        through_zeros = self.train.tune == "predictors" and self.settings.dropped_tokens == "zero_vectors"
        return self.reaches_all or through_zeros

    def distilled_bytes(self, learned: int) -> int:
        """Bytes of the divergence's gradient in the logits of `learned` tokens, where training distils."""
        return self.compute * self.decoder.vocab * learned if self.train.distill is not None else 0

    @property
    def splits_inputs(self) -> bool:
        """Whether every adapter keeps an input of its own: dropped differently, or cast for itself by autocast."""
        return self.lora is not None and (self.compute != self.trained or self.lora.dropout > 0)

    def is_masked(self, layer: int) -> bool:
        """Whether the layer runs MaskedSoftmax instead of causal attention."""
        hides = self.train.sparsity_mode != "none" and self.settings.dropped_tokens == "masked_softmax"
        return hides and layer >= self.settings.sparse_layer


def training_memory(
    shape: LlavaShape,
    model: ModelConfig,
    sparsity: SparsityConfig,
    learned: Learned,
    train: TrainConfig,
    lora: LoraConfig | None = None,
    *,
    tokens: int,
    images: int = 1,
    sharding: Sharding | None = None,
) -> TrainingMemory:
    """Return the memory of training on batches of train.batch_size samples of `tokens` tokens with `images` images.

    `learned` are the parts of the method. Raises ValueError for sizes that are not positive.
    """
    if tokens < 1 or images < 0:
        raise ValueError(f"tokens={tokens}, images={images}: give 1 or more tokens and 0 or more images")
    spread = sharding or Sharding()
    run = _run(shape, model, sparsity, learned, train, lora, spread)
    counts = parameter_counts(shape, learned, lora)
    trained = sum(counts[part] for part in run.learning)
    frozen = sum(counts.values()) - trained
    if lora is not None:  # originals of the modules whose copies are trained
        copied = (*learned, *(("projector",) if run.reaches_all else ()))
        frozen += sum(counts[part] for part in copied)
    sizes = {
        "optimizer": (12 if spread.deepspeed else 2 * run.trained) * trained,
        "gradients": run.trained * trained,
        "weights": run.weight * frozen + run.trained * trained,
    }
    shares = {name: spread.gpus if spread.zero_stage > place else 1 for place, name in enumerate(sizes)}
    held = {name: -(-size // shares[name]) for name, size in sizes.items()}
    moved = [*(("optimizer", "gradients") if spread.offload_optimizer else ())]
    moved += ["weights"] if spread.offload_weights else []
    batch, pictures = train.batch_size * tokens, train.batch_size * images * shape.tokens_per_image
    kept = _activation_bytes(shape, run, batch, train.batch_size * images)
    stepping = _step_bytes(trained // shares["optimizer"], run, spread)
    passing = max(_passing_bytes(run, batch, max(batch - pictures, 0)), stepping - kept)
    return TrainingMemory(
        **{name: 0 if name in moved else size for name, size in held.items()},
        activations=kept,
        buffers=passing + _communication_bytes(frozen + trained, sizes["gradients"], run, spread),
        host=sum(held[name] for name in moved),
    )


def _run(
    shape: LlavaShape,
    model: ModelConfig,
    sparsity: SparsityConfig,
    learned: Learned,
    train: TrainConfig,
    lora: LoraConfig | None,
    sharding: Sharding,
) -> _Run:
    compute = 2 if train.bf16 else DTYPE_BYTES[model.dtype]
    if sharding.deepspeed:  # one format for everything, beside the optimizer's float32
        weight = trained = compute
    else:
        weight = DTYPE_BYTES[model.dtype]
        trained = weight if train.tune == "full" else 4
    return _Run(shape.decoder, train, lora, sparsity, learned, weight, trained, compute)


def _activation_bytes(shape: LlavaShape, run: _Run, tokens: int, images: int) -> int:
    """Return the bytes kept for the backward pass of `tokens` tokens, those of `images` images among them."""
    decoder, train = run.decoder, run.train
    layers = range(run.first_layer, decoder.layers)
    if train.gradient_checkpointing:
        kept = len(layers) * tokens * run.weight * decoder.hidden
    else:
        kept = sum(_layer_bytes(run, layer, tokens) for layer in layers)
    learned = max(tokens - images * shape.tokens_per_image, 0)
    # The last norm, and of learned tokens log-probabilities instead of logits.
    kept += tokens * _norm_bytes(run) + learned * 4 * decoder.vocab
    if run.full:
        kept += learned * run.compute * decoder.hidden
    if run.compute != run.weight:
        kept += run.compute * decoder.vocab * decoder.hidden
    kept += _learned_bytes(run, tokens, images * shape.tokens_per_image)
    kept += run.distilled_bytes(learned)
    if train.projector_learning_rate is not None:
        kept += images * run.compute * shape.projector.kept
    return kept


def _layer_bytes(run: _Run, layer: int, tokens: int) -> int:
    """Bytes that one decoder layer keeps, with autocast's copies of its weights."""
    decoder = run.decoder
    per_token = _attention_bytes(run, layer) + _mlp_bytes(run)
    copies = decoder.layer_parameters if run.compute != run.weight else 0
    if run.lora is not None and run.compute != run.trained:
        copies += decoder.adapter_parameters(run.lora.rank)
    if layer == run.first_layer and not run.reaches_first:
        per_token -= 4 * decoder.hidden + 4
        copies -= decoder.incoming_parameters if run.compute != run.weight else 0
    return tokens * per_token + run.compute * copies


def _attention_bytes(run: _Run, layer: int) -> int:
    """Bytes per token of an attention and its norm: queries, keys, values, output, and what four maps learn from."""
    decoder = run.decoder
    statistics = 8 * decoder.heads + 8 if run.is_masked(layer) else 4 * decoder.heads
    values = run.compute * 2 * (decoder.query_width + decoder.kv_width)
    inputs = 0
    if run.full:  # the output map learns from the output, which is kept and has the right format already
        inputs = run.compute * (3 if run.compute != run.weight else 1) * decoder.hidden
    elif run.lora is not None:
        split = 3 * decoder.hidden + decoder.query_width
        inputs = run.compute * ((split if run.splits_inputs else decoder.hidden) + 4 * run.lora.rank)
        inputs += split if run.lora.dropout > 0 else 0  # the dropout's masks, a byte per value
    return values + statistics + inputs + _norm_bytes(run) + _head_norm_bytes(run)


def _head_norm_bytes(run: _Run) -> int:
    """Bytes per token that the norms of queries and keys keep, where a family has them, as `_norm_bytes`."""
    decoder = run.decoder
    width, heads = decoder.query_width + decoder.kv_width, decoder.heads + decoder.kv_heads
    kept = 4 * width + 4 * heads + (run.weight * width if run.full else 0)
    return kept if decoder.head_norms else 0


def _mlp_bytes(run: _Run) -> int:
    """Bytes per token of a gated MLP and its norm: two products and the activation, and what three maps learn from."""
    hidden, inner = run.decoder.hidden, run.decoder.intermediate
    inputs = 0
    if run.full:
        inputs = run.compute * ((2 if run.compute != run.weight else 1) * hidden + inner)
    elif run.lora is not None:
        inputs = run.compute * ((2 if run.splits_inputs else 1) * hidden + inner + 3 * run.lora.rank)
        inputs += 2 * hidden + inner if run.lora.dropout > 0 else 0
    return run.compute * 3 * inner + inputs + _norm_bytes(run)


def _norm_bytes(run: _Run) -> int:
    """Bytes per token that an RMS norm keeps: its input and scale in float32, the normalized input if it learns."""
    return 4 * run.decoder.hidden + 4 + (run.weight * run.decoder.hidden if run.full else 0)


def _learned_bytes(run: _Run, tokens: int, pictures: int) -> int:
    """Bytes that the method's parts keep; a token that is no image's may be an answer's or a question's."""
    kept = 0
    for part in run.learned.values():
        if part.learns:
            judged = part.judges_images * pictures + (part.judges_outputs or part.judges_prompts) * (tokens - pictures)
            cast = run.weight * run.decoder.hidden if run.compute != run.weight else 0
            copies = run.compute * part.parameters if run.compute != run.trained else 0
            kept += judged * (run.compute * part.kept + cast) + copies
    return kept


def _passing_bytes(run: _Run, tokens: int, learned: int) -> int:
    """Highest bytes beyond the activations while a batch runs: in the loss, in the head, or in one layer's backward.

    `learned` of the tokens are no image tokens, and may be learned: the head and the loss see these alone.
    """
    decoder, width = run.decoder, run.compute
    hidden, words = decoder.hidden, learned * decoder.vocab
    written = width + (run.trained if width != run.trained else 0)  # a weight's gradient, and its cast
    recomputes = run.train.gradient_checkpointing
    loss = (LOSS_BYTES - 4) * words
    head = (width - 4) * words + written * decoder.vocab * hidden if run.full else 0
    last = decoder.layers - 1
    layer = tokens * 2 * run.weight * hidden + (written * hidden * decoder.intermediate if run.full else 0)
    layer += _layer_bytes(run, last, tokens) if recomputes else 0
    if run.is_masked(last):
        floats = 8 + (3 if width != 4 else 0)  # gradients, their sums; float32 copies of queries, keys and values
        layer += 4 * (tokens * floats * decoder.query_width + 3 * min(tokens * BLOCK_ROWS * decoder.heads, 2 * PART))
    else:
        layer += tokens * 4 * width * decoder.query_width
    # By then the loss, the last norm and the layer's MLP are done.
    layer -= 4 * words + tokens * (_norm_bytes(run) + _mlp_bytes(run))
    distilled = run.distilled_bytes(learned)
    if distilled:  # both passes' logits while their divergence is computed; later its gradient beside the loss's
        parts = 8 * 4 * min(words, DIVERGENCE_PART)
        loss = max(loss + width * words - distilled, width * words + 2 * distilled + parts)
        head, layer = head - distilled, layer - distilled
    # Autocast remembers its copies of trained weights until the forward pass is over.
    remembers = run.full and recomputes and width != run.weight
    forward = (width + 4) * words + width * decoder.layers * decoder.layer_parameters if remembers else 0
    return max(loss, head, layer, forward)


def _step_bytes(parameters: int, run: _Run, sharding: Sharding) -> int:
    """Bytes that AdamW's step makes for `parameters` on this GPU: a list of them; under DeepSpeed gradients as well."""
    if sharding.offload_optimizer:
        return 0
    if not sharding.deepspeed:
        return run.trained * parameters
    return 8 * (min(parameters, 10**9) if sharding.zero_stage == 3 else parameters)


def _communication_bytes(parameters: int, gradients: int, run: _Run, sharding: Sharding) -> int:
    """Bytes that moving weights and gradients between GPUs needs; DDP's buckets are a second copy of the gradients."""
    if not sharding.deepspeed:
        return gradients if sharding.gpus > 1 else 0
    bucket = min(sharding.bucket_parameters, gradients // run.trained)
    if sharding.zero_stage < 3:
        return run.compute * 2 * bucket  # one fills while the other is sent
    gathered = min(sharding.live_parameters, parameters) + min(sharding.prefetch_parameters, parameters)
    return run.compute * (gathered + bucket)
