"""The sizes of a LLaVA and of a device that costs follow from, and the parameters of each part. No torch."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynamic_llava.config import LoraConfig, SparsityConfig


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder of any family that its costs follow from; ValueError where they do not fit together."""

    hidden: int
    """D: hidden size."""
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
    head_dim: int | None = None
    """D: width of one head; None means hidden / heads."""
    attention_bias: bool = False
    """Whether the four maps of attention have a bias."""
    incoming_bias: bool = False
    """Whether the three maps to queries, keys and values have a bias, as Qwen2's; follows from attention_bias."""
    head_norms: bool = False
    """Whether each head's queries and keys are normed, as Qwen3's."""
    mlp_bias: bool = False
    """Whether the three maps of the MLP have a bias."""
    tied_head: bool = False
    """Whether the output head is the embedding matrix itself."""

    def __post_init__(self) -> None:
        divides = self.head_dim is not None or self.hidden % self.heads == 0
        if not divides or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden={self.hidden}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim} do not "
                "fit; choose kv_heads that divide heads, and heads that divide hidden or a head_dim"
            )

    @property
    def head_width(self) -> int:
        """d: width of one head, stated or hidden / heads."""
        return self.head_dim if self.head_dim is not None else self.hidden // self.heads

    @property
    def query_width(self) -> int:
        """Width of a token's queries, and of what attention hands to the output map, in one layer."""
        return self.head_width * self.heads

    @property
    def kv_width(self) -> int:
        """Width of a token's keys, and of its values, in one layer."""
        return self.head_width * self.kv_heads

    @property
    def incoming_parameters(self) -> int:
        """Weights of one layer's maps to queries, keys and values."""
        return self.hidden * (self.query_width + 2 * self.kv_width)

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear maps: query, key, value, output, and the three of the MLP; without biases."""
        return self.incoming_parameters + self.query_width * self.hidden + 3 * self.hidden * self.intermediate

    @property
    def layer_biases(self) -> int:
        """Biases of one layer's linear maps."""
        incoming = (self.attention_bias or self.incoming_bias) * (self.query_width + 2 * self.kv_width)
        return incoming + self.attention_bias * self.hidden + self.mlp_bias * (2 * self.intermediate + self.hidden)

    @property
    def layer_norms(self) -> int:
        """Weights of one layer's norms."""
        return 2 * self.hidden + 2 * self.head_norms * self.head_width

    def adapter_parameters(self, rank: int) -> int:
        """Weights of one layer's LoRA adapters: rank x (inputs + outputs) for each of its seven linear maps."""
        attention = 2 * (self.hidden + self.query_width) + 2 * (self.hidden + self.kv_width)
        return rank * (attention + 3 * (self.hidden + self.intermediate))


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a CLIP vision tower."""

    hidden: int
    """Hidden size."""
    layers: int
    """Encoder layers."""
    intermediate: int
    """Width of the MLP."""
    patch: int
    """Side of a patch in pixels."""
    patches: int
    """Patches of an image; the class token comes on top."""

    @property
    def parameters(self) -> int:
        """All weights: embeddings, encoder layers, and the norms before and after them."""
        linear = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        layer = linear + (4 + 1 + 4) * self.hidden + self.intermediate  # biases and two layer norms
        return 3 * self.patch**2 * self.hidden + (1 + self.patches + 1 + 4) * self.hidden + self.layers * layer

    @property
    def flops(self) -> int:
        """FLOPs of one image; the last layer counts, which LLaVA runs and does not use."""
        tokens = self.patches + 1
        linear = 2 * tokens * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        embedding = 2 * self.patches * 3 * self.patch**2 * self.hidden
        return embedding + self.layers * (linear + 4 * tokens**2 * self.hidden)


@dataclass(frozen=True)
class ProjectorShape:
    """What a projector costs for one image."""

    parameters: int
    """Weights and biases, whatever the number of images."""
    forward: int
    """FLOPs of its linear maps."""
    backward: int
    """FLOPs of the gradients of its weights, and of what lies between its maps."""
    kept: int
    """Values that the forward pass keeps for the backward pass, weights not counted."""

    @classmethod
    def mlp(cls, features: int, hidden: int, tokens: int, bias: bool = True) -> "ProjectorShape":
        """Return the costs of LLaVA-1.5's two maps, features -> hidden -> hidden, on each of `tokens` tokens."""
        first, second = features * hidden, hidden**2
        forward, backward = 2 * tokens * (first + second), 2 * tokens * (first + 2 * second)
        return cls(first + second + bias * 2 * hidden, forward, backward, kept=tokens * (features + 2 * hidden))


@dataclass(frozen=True)
class LlavaShape:
    """The sizes of a whole LLaVA: vision tower, projector, decoder."""

    decoder: DecoderShape
    """The language model."""
    vision: VisionShape
    """The vision tower."""
    tokens_per_image: int
    """n: image tokens of one image, those that a learned method adds among them."""
    feature_layers: int = 1
    """Layers of the vision tower whose outputs, side by side, enter the projector."""
    projector_bias: bool = True
    """Whether the two maps of LLaVA-1.5's projector have a bias."""
    other_projector: ProjectorShape | None = None
    """What another projector than LLaVA-1.5's costs."""

    @property
    def projector(self) -> ProjectorShape:
        """What the projector costs."""
        if self.other_projector is not None:
            return self.other_projector
        features = self.feature_layers * self.vision.hidden
        return ProjectorShape.mlp(features, self.decoder.hidden, self.tokens_per_image, self.projector_bias)


LLAVA_7B = DecoderShape(hidden=4096, layers=32, intermediate=11008, heads=32, kv_heads=32, vocab=32064)
"""The decoder of LLaVA-1.5-7B."""
LLAVA_13B = DecoderShape(hidden=5120, layers=40, intermediate=13824, heads=40, kv_heads=40, vocab=32064)
"""The decoder of LLaVA-1.5-13B."""
_CLIP_L_336 = VisionShape(hidden=1024, layers=24, intermediate=4096, patch=14, patches=576)
LLAVA_SHAPES = {name: LlavaShape(decoder, _CLIP_L_336, 576) for name, decoder in (("7b", LLAVA_7B), ("13b", LLAVA_13B))}
"""The published sizes of LLaVA-1.5."""


@dataclass(frozen=True)
class Base:
    """A published model that sparsity may be put on: its language model and how long its images usually are."""

    name: str
    decoder: DecoderShape
    image_tokens: int
    about: str
    """Whose config.json the sizes are from, and what the number of image tokens stands for."""


_MISTRAL_7B = DecoderShape(hidden=4096, layers=32, intermediate=14336, heads=32, kv_heads=8, vocab=32064)
_QWEN2_7B = DecoderShape(
    hidden=3584, layers=28, intermediate=18944, heads=28, kv_heads=4, vocab=152064, incoming_bias=True
)
_QWEN3_8B = DecoderShape(
    hidden=4096, layers=36, intermediate=12288, heads=32, kv_heads=8, vocab=151936, head_dim=128, head_norms=True
)
_TILES = "576 for the whole image and for each of four tiles; newline tokens left out"
_PIXELS = "1,280 tokens, the upper end of the range that the model card shows (max_pixels)"
BASES = {
    base.name: base
    for base in (
        Base("llava-1.5-7b", LLAVA_7B, 576, "llava-hf/llava-1.5-7b-hf"),
        Base("llava-1.5-13b", LLAVA_13B, 576, "llava-hf/llava-1.5-13b-hf"),
        Base("llava-next-vicuna-7b", LLAVA_7B, 2880, f"llava-hf/llava-v1.6-vicuna-7b-hf; {_TILES}"),
        Base("llava-next-vicuna-13b", LLAVA_13B, 2880, f"llava-hf/llava-v1.6-vicuna-13b-hf; {_TILES}"),
        Base("llava-next-mistral-7b", _MISTRAL_7B, 2880, f"llava-hf/llava-v1.6-mistral-7b-hf; {_TILES}"),
        Base("qwen2-vl-7b", _QWEN2_7B, 1280, f"Qwen/Qwen2-VL-7B-Instruct; {_PIXELS}"),
        Base("qwen2.5-vl-7b", _QWEN2_7B, 1280, f"Qwen/Qwen2.5-VL-7B-Instruct; {_PIXELS}"),
        Base("qwen3-vl-8b", _QWEN3_8B, 1280, "Qwen/Qwen3-VL-8B-Instruct; 1,280 tokens, as the others"),
    )
}
"""Bases by name, with the sizes of their config.json."""


@dataclass(frozen=True)
class DevicePeak:
    """What a device can do at best, by its maker's data sheet."""

    tflops: float
    """Dense bfloat16 matrix products, TFLOP/s."""
    terabytes: float
    """Memory bandwidth, TB/s."""


DEVICE_PEAKS = {
    "H100 PCIe": DevicePeak(756.0, 2.0),
    "H100 NVL": DevicePeak(835.0, 3.9),
    "H100": DevicePeak(989.0, 3.35),
    "H200": DevicePeak(989.0, 4.8),
    "A100-SXM4-40GB": DevicePeak(312.0, 1.555),
    "A100-PCIE-40GB": DevicePeak(312.0, 1.555),
    "A100 80GB PCIe": DevicePeak(312.0, 1.935),
    "A100": DevicePeak(312.0, 2.039),
    "A40": DevicePeak(149.7, 0.696),
    "L40S": DevicePeak(362.0, 0.864),
    "L4": DevicePeak(121.0, 0.3),
    "RTX A6000": DevicePeak(154.8, 0.768),
    "RTX 4090": DevicePeak(165.2, 1.008),
}
"""Peaks by a part of the device's name, from NVIDIA's data sheets; the first that fits counts."""


def device_peak(name: str) -> DevicePeak | None:
    """Return the peaks of a device of this name, or None where nobody wrote them down."""
    return next((peak for part, peak in DEVICE_PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def decoder_shape(config: Any) -> DecoderShape:
    """Return the sizes of the language model in a DynamicLlavaConfig or LlavaConfig."""
    text = config.text_config
    return DecoderShape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=text.vocab_size,
        head_dim=getattr(text, "head_dim", None),
        attention_bias=bool(getattr(text, "attention_bias", False)),
        incoming_bias=text.model_type in ("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"),
        head_norms=text.model_type in ("qwen3", "qwen3_vl_text"),
        mlp_bias=bool(getattr(text, "mlp_bias", False)),
        tied_head=bool(config.tie_word_embeddings),
    )


def llava_shape(config: Any) -> LlavaShape:
    """Return the sizes in a DynamicLlavaConfig or LlavaConfig; needs torch, for the projector says what it makes."""
    from dynamic_llava.projectors import DEFAULT, image_tokens

    vision = config.vision_config
    tower = VisionShape(
        hidden=vision.hidden_size,
        layers=vision.num_hidden_layers,
        intermediate=vision.intermediate_size,
        patch=vision.patch_size,
        patches=(vision.image_size // vision.patch_size) ** 2,
    )
    layers = config.vision_feature_layer
    own = getattr(config, "projector", DEFAULT) == DEFAULT and not getattr(config, "added_image_tokens", 0)
    return LlavaShape(
        decoder_shape(config),
        tower,
        image_tokens(config),
        feature_layers=1 if isinstance(layers, int) else len(layers),
        projector_bias=config.multimodal_projector_bias,
        other_projector=None if own else _counted(config),
    )


def _counted(config: Any) -> ProjectorShape:
    from dynamic_llava.projectors.registry import projector_costs

    return ProjectorShape(*projector_costs(config))


@dataclass(frozen=True)
class PartCosts:
    """What one learned part of a method costs."""

    parameters: int
    """Its weights."""
    flops: int
    """FLOPs of judging one token, by linear maps."""
    flops_per_pair: int = 0
    """FLOPs on top for each pair of tokens of one set (attention within an image)."""
    kept: int = 0
    """Values per token that a training pass keeps for the backward pass, the token's hidden state among them."""
    judges_images: bool = False
    """Whether it judges image tokens."""
    judges_outputs: bool = False
    """Whether it judges output tokens."""
    judges_prompts: bool = False
    """Whether it judges the tokens of questions."""
    learns: bool = True
    """Whether it decides anything, and so learns in training."""

    @classmethod
    def reckoned(cls, module: Any, *, images: bool, outputs: bool) -> "PartCosts":
        """Return the costs of a torch module whose matrices are each multiplied once with every token it judges."""
        matrices = [parameter for parameter in module.parameters() if parameter.dim() >= 2]
        return cls(
            parameters=sum(parameter.numel() for parameter in module.parameters()),
            flops=2 * sum(matrix.numel() for matrix in matrices),
            kept=sum(matrix.shape[0] + matrix[0].numel() for matrix in matrices),
            judges_images=images,
            judges_outputs=outputs,
        )

    def judging(self, tokens: int) -> int:
        """Return the FLOPs of judging a set of so many tokens: those of one image, or one output token."""
        return tokens * (self.flops + tokens * self.flops_per_pair)


Learned = Mapping[str, PartCosts]
"""What a method has learned, by the names of its parts (`Method.costs`)."""


def predictor_costs(hidden: int, sparsity: SparsityConfig) -> dict[str, PartCosts]:
    """Return the costs of the image, the output and the prompt predictor (sparsity/predictors.py) for a hidden size."""
    width, mlp, blocks = sparsity.predictor_width, sparsity.predictor_mlp, sparsity.predictor_blocks
    half, quarter = width // 2, width // 4
    head = width * half + half * quarter + quarter * 2
    ends = 2 * hidden + hidden * width + width + head + half + quarter + 2
    block = 4 * width + 4 * width**2 + width + 2 * width * mlp + mlp + width
    token, kept = 2 * (hidden * width + head), 2 * hidden + 3 * width + half
    image = PartCosts(
        parameters=ends + blocks * block,
        flops=token + blocks * 2 * (4 * width**2 + 2 * width * mlp),
        flops_per_pair=4 * blocks * width,
        kept=kept + blocks * (8 * width + 2 * mlp),
        judges_images=True,
    )
    found = {"image_predictor": image, "output_predictor": PartCosts(ends, token, kept=kept, judges_outputs=True)}
    if sparsity.prompt_keep_rate is not None:
        found["prompt_predictor"] = PartCosts(ends, token, kept=kept, judges_prompts=True)
    return found


def parameter_counts(shape: LlavaShape, learned: Learned, lora: LoraConfig | None = None) -> dict[str, int]:
    """Return the number of parameters of each part; the parts are those of train/optimizer.py."""
    hidden, decoder = shape.decoder.hidden, shape.decoder
    layer = decoder.layer_parameters + decoder.layer_biases + decoder.layer_norms
    return {
        "language_model": decoder.layers * layer + hidden + (2 - decoder.tied_head) * decoder.vocab * hidden,
        "vision_tower": shape.vision.parameters,
        "projector": shape.projector.parameters,
        **{name: part.parameters for name, part in learned.items()},
        "adapters": 0 if lora is None else decoder.layers * decoder.adapter_parameters(lora.rank),
    }
