"""What is measured: model sizes, batches and lengths, named after the paper's protocols; and the ways to run them.

A way is dense, image (Dynamic-LLaVA_I: image tokens dropped) or both (_I|T: output tokens too). `Preset.groups` says
for each way what the two groups of layers see, in the words of the formulas in costs/.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import LLAVA_SHAPES, DecoderShape, LlavaShape, VisionShape

Way = Literal["dense", "image", "both"]
WAYS: tuple[Way, ...] = ("dense", "image", "both")
TRAINED_POSITIONS = 4096
"""Positions that LLaVA-1.5 was trained on."""


@dataclass(frozen=True)
class Preset:
    """One protocol: the sizes of a model with random weights, and of what it is asked to do."""

    name: str
    """Name of the preset on the command line."""
    shape: LlavaShape
    """Sizes of vision tower, projector and decoder."""
    batch: int
    """B: rows, each with one image."""
    outputs: tuple[int, ...]
    """Numbers of generated tokens that results are given for, ascending."""
    about: str
    """Source of the protocol, and its sizes in words."""
    text: int = 50
    """Prompt tokens beside the image's."""
    image_keep_rate: float = 0.2
    """r_I."""
    output_keep_rate: float = 0.5
    """Share of the output tokens that is admitted, exactly: decisions are forced, though the predictor runs."""
    sparse_layer: int = 2
    """l."""
    method: Any = None
    """A Method that decides in the sparse ways instead of Dynamic-LLaVA (`rehearsal.preset_under`)."""
    counts: Any = None
    """The Rehearsal that says what layers see and hold under `method`."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.text < 2 or not self.outputs or sorted(set(self.outputs)) != list(self.outputs):
            raise ValueError(
                f"batch={self.batch}, text={self.text}, outputs={self.outputs} are not possible; give 1 or more rows, "
                "2 or more prompt tokens and ascending numbers of generated tokens"
            )
        if self.outputs[0] < 1 or not 1 <= self.sparse_layer < self.shape.decoder.layers:
            raise ValueError(
                f"outputs={self.outputs}, sparse_layer={self.sparse_layer} of {self.shape.decoder.layers} layers are "
                "not possible; give at least 1 generated token and more layers than the sparse one"
            )

    @property
    def sparsity(self) -> SparsityConfig:
        """The method's settings of the model."""
        return SparsityConfig(sparse_layer=self.sparse_layer, image_keep_rate=self.image_keep_rate)

    @property
    def prompt(self) -> int:
        """Tokens of a row before the first generated one."""
        return self.text + self.shape.tokens_per_image

    @property
    def kept_prompt(self) -> int:
        """Prompt tokens that the sparse layers see."""
        from dynamic_llava.sparsity.decisions import budget  # needs torch, which the names of presets do not

        return self.text + budget(self.image_keep_rate, self.shape.tokens_per_image)

    def kept_outputs(self, outputs: int) -> int:
        """Return how many of the first `outputs` generated tokens are admitted."""
        return int(outputs * self.output_keep_rate)

    @property
    def ways(self) -> tuple[Way, ...]:
        """The ways that are compared; a method of its own has one beside the dense one."""
        return WAYS if self.method is None else ("dense", "both")

    def groups(self, way: Way, outputs: int = 0) -> dict[str, Any]:
        """Return tokens=, kept= and sparse_layer= for the formulas of costs/, with `outputs` tokens generated."""
        if way != "dense" and self.counts is not None:
            return {"tokens": self.counts.seen(outputs), "kept": None, "sparse_layer": 0}
        tokens = self.prompt + outputs
        if way == "dense":
            return {"tokens": tokens, "kept": None, "sparse_layer": self.sparse_layer}
        kept = self.kept_prompt + (self.kept_outputs(outputs) if way == "both" else outputs)
        return {"tokens": tokens, "kept": kept, "sparse_layer": self.sparse_layer}

    def seen(self, way: Way, outputs: int = 0) -> list[int]:
        """Return how many tokens each layer sees, with `outputs` tokens generated."""
        groups, layers = self.groups(way, outputs), self.shape.decoder.layers
        if not isinstance(groups["tokens"], int):
            return [*groups["tokens"]]
        kept = groups["tokens"] if groups["kept"] is None else groups["kept"]
        return [groups["tokens"] if layer < self.sparse_layer else kept for layer in range(layers)]

    def held(self, way: Way, outputs: int = 0) -> list[int]:
        """Return how many tokens each layer's cache holds: those that it sees, less the evicted ones."""
        return self.seen(way, outputs) if way == "dense" or self.counts is None else [*self.counts.held(outputs)]

    def past_training(self, outputs: int) -> str | None:
        """Return what has to be said about positions past those of the training; None where there are none."""
        last = self.prompt + outputs
        if last <= TRAINED_POSITIONS:
            return None
        return (
            f"{self.prompt} prompt and {outputs} generated tokens reach position {last}; LLaVA-1.5 was trained on "
            f"{TRAINED_POSITIONS}, so this measures speed and memory only"
        )

    def with_layers(self, layers: int | None) -> "Preset":
        """Return the same with a shorter decoder; None leaves it as it is."""
        if layers is None:
            return self
        decoder = replace(self.shape.decoder, layers=layers)
        return replace(self, shape=replace(self.shape, decoder=decoder))


def small_shape(hidden: int, layers: int, vocab: int = 32064) -> LlavaShape:
    """Return a decoder with LLaMA's proportions and heads of 64, behind a small vision tower with 576 patches."""
    decoder = DecoderShape(
        hidden=hidden,
        layers=layers,
        intermediate=hidden * 43 // 16,  # 11008 / 4096
        heads=hidden // 64,
        kv_heads=hidden // 64,
        vocab=vocab,
    )
    return LlavaShape(decoder, VisionShape(hidden=64, layers=2, intermediate=128, patch=14, patches=576), 576)


_LONG = (1024, 2048, 4096)
PRESETS = {
    preset.name: preset
    for preset in (
        Preset("table4", LLAVA_SHAPES["13b"], 8, _LONG, "Table 4 and Fig. 1: 13B, batch 8, 1K, 2K and 4K tokens"),
        Preset("table14", LLAVA_SHAPES["13b"], 1, (1000,), "Table 14: 13B, batch 1, 1,000 tokens"),
        Preset("7b-b1", LLAVA_SHAPES["7b"], 1, _LONG, "7B, batch 1"),
        Preset("7b-b8", LLAVA_SHAPES["7b"], 8, _LONG, "7B, batch 8"),
        Preset("cpu", small_shape(1024, 16), 8, (512,), "for a CPU: hidden 1024, 16 layers, batch 8"),
        Preset("cpu-prefill", small_shape(1024, 16), 2, (512,), "the same at batch 2, for the compute-bound prefill"),
        Preset(
            "cpu-small", small_shape(256, 8, 1024), 1, (64,), "hidden 256, 8 layers, batch 1: where calls cost most"
        ),
        Preset("cpu-uncached", small_shape(512, 8), 2, (256,), "hidden 512, 8 layers, batch 2: steps without cache"),
        Preset(
            "cpu-bytes",
            small_shape(64, 2, 512),
            4,
            (256, 1024, 4096),
            "tiny and long: bytes follow from lengths",
            sparse_layer=1,
        ),
    )
}
"""Protocols by name; all with the paper's rates, r_I = 0.2 and half of the output tokens kept."""


def find_preset(name: str) -> Preset:
    """Return a preset by its name; ValueError lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
