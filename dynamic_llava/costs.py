"""What a forward pass costs: FLOPs, tokens per layer, key-value bytes. Pure arithmetic, no torch.

Two ways to count, never to be mixed in one table. `flops_paper` is Eq. 13 as the paper's tables use it: 32 N C^2 stands
for ALL linear layers (four projections 8 N C^2, a three-matrix MLP of width 4C 24 N C^2) and 4 N^2 C for attention; the
paper's sentence swaps them, and LLaMA's real MLP is narrower, so its absolute values are 1.32 times too large while
ratios hold. `flops_exact` counts the real module shapes, two operations per multiply-add. Both leave out norms,
softmax, embeddings and the vision tower; the head is `head_flops`.

In every function `tokens` is what layers below `sparse_layer` see and `kept` what the others see; kept=None is dense.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a Llama-type decoder that its costs follow from; ValueError where they do not fit together."""

    hidden: int
    """C: hidden size."""
    layers: int
    """L: decoder layers."""
    intermediate: int
    """I: width of the gated MLP."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    vocab: int
    """Rows of the output head."""

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden={self.hidden}, heads={self.heads}, kv_heads={self.kv_heads} do not fit; choose heads that "
                "divide hidden and kv_heads that divide heads"
            )

    @property
    def kv_width(self) -> int:
        """Width of a token's keys, and of its values, in one layer."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear maps: query, key, value, output, and the three of the MLP."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_width
        return attention + 3 * self.hidden * self.intermediate


LLAVA_7B = DecoderShape(hidden=4096, layers=32, intermediate=11008, heads=32, kv_heads=32, vocab=32064)
"""The decoder of LLaVA-1.5-7B."""
LLAVA_13B = DecoderShape(hidden=5120, layers=40, intermediate=13824, heads=40, kv_heads=40, vocab=32064)
"""The decoder of LLaVA-1.5-13B."""


def average_tokens(total: float, kept: float, layers: int, sparse_layer: int) -> float:
    """Return the mean over layers of the tokens a layer sees: 576 -> 115 at layer 2 of 32 is 143.8, not 115."""
    _check_layers(layers, sparse_layer)
    return (sparse_layer * total + (layers - sparse_layer) * kept) / layers


def flops_paper(
    tokens: int, hidden: int, layers: int, *, kept: int | None = None, sparse_layer: int = 0, batch: int = 1
) -> int:
    """Return the FLOPs of Eq. 13: 32 B N C^2 + 4 B N^2 C in each layer."""
    groups = _layer_groups(tokens, kept, layers, sparse_layer)
    return batch * sum(depth * (32 * n * hidden**2 + 4 * n**2 * hidden) for depth, n in groups)


def flops_exact(
    tokens: int,
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
        total += depth * (2 * n * shape.layer_parameters + 4 * pairs * shape.hidden)
    return batch * total


def flops_decode_step(
    tokens: int, shape: DecoderShape, *, kept: int | None = None, sparse_layer: int = 0, batch: int = 1
) -> int:
    """Return the FLOPs of the decoder layers for one new token with a cache of `tokens` (`kept` in sparse layers)."""
    groups = _layer_groups(tokens, kept, shape.layers, sparse_layer)
    return batch * sum(depth * (2 * shape.layer_parameters + 4 * (n + 1) * shape.hidden) for depth, n in groups)


def head_flops(tokens: int, shape: DecoderShape) -> int:
    """Return the FLOPs of the output head on `tokens` tokens (one per row in a prefill)."""
    return 2 * tokens * shape.hidden * shape.vocab


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
    head = width * (width // 2) + (width // 2) * (width // 4) + (width // 4) * 2
    token_wise = 2 * (hidden * width + head)
    block = 2 * (4 * width**2 + 2 * width * mlp) + 4 * image_tokens * width
    return images * image_tokens * (token_wise + blocks * block) + output_tokens * token_wise


def kv_bytes(
    shape: DecoderShape,
    tokens: int,
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
    return bytes_per_value * (shape.layers * shape.layer_parameters + shape.vocab * shape.hidden)


def _layer_groups(tokens: int, kept: int | None, layers: int, sparse_layer: int) -> list[tuple[int, int]]:
    """Return (number of layers, tokens they see) of the dense and of the sparse group."""
    _check_layers(layers, sparse_layer)
    if kept is None:
        return [(layers, tokens)]
    if not 0 <= kept <= tokens:
        raise ValueError(f"kept={kept} of tokens={tokens} is not possible; give 0 <= kept <= tokens")
    return [(sparse_layer, tokens), (layers - sparse_layer, kept)]


def _check_layers(layers: int, sparse_layer: int) -> None:
    if layers < 1 or not 0 <= sparse_layer <= layers:
        raise ValueError(f"sparse_layer={sparse_layer} of layers={layers} does not exist; give 0 <= l <= layers")
