"""How many tokens the layers of a preset see and hold under any method: counted on one row in a narrow model.

The model has the preset's layers, prompt and image, and random weights a few numbers wide; method, engine and cache are
the real ones. Where a method decides by what tokens hold, its counts on a trained model differ.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from dynamic_llava.costs import DecoderShape, LlavaShape, VisionShape
from dynamic_llava.engine.learned import learned_of
from dynamic_llava.methods import Dynamic, OutputTokens, describe_method, read_method
from dynamic_llava.profile.presets import Preset
from dynamic_llava.profile.workload import CPU, build_model, prompts, say_on, sparse_prefill

WIDTH = 16
"""Hidden size of the narrow model."""
HEADS = 2
LONGEST = 8192
"""Output tokens that are decided on at once."""


def preset_under(preset: Preset, spelling: Mapping[str, Any]) -> Preset:
    """Return a preset whose way `both` is another method's, with what its layers see and hold.

    ValueError for a method that is not known, for Dynamic-LLaVA itself and for one that drops nothing, which are timed
    without it, for one that has weights of its own, and for one with a window over output tokens.
    """
    method = read_method(spelling, preset.sparsity)
    if isinstance(method, Dynamic) or method.is_dense:
        raise ValueError(
            f"{describe_method(method)} is profiled without --method, as the ways dense, image and both; name another "
            "method, or leave it out"
        )
    if not method.training_free:
        raise ValueError(
            f"{describe_method(method)} cannot be profiled: it decides by weights that it has learned, and models have "
            "random weights here; name a method that learns nothing"
        )
    if method.drop_delay:
        raise ValueError(
            f"{describe_method(method)} cannot be profiled: it drops output tokens {method.drop_delay} steps late, and "
            "caches are filled here with what stays; profile it without that window"
        )
    about = f"{preset.about}; both is {describe_method(method)}"
    under = replace(preset, method=method, about=about)
    return replace(under, counts=Rehearsal(under))


class Rehearsal:
    """The counts of one row of a preset that has a method."""

    def __init__(self, preset: Preset) -> None:
        """Run the prompt. ValueError where the method cannot decide in so many layers."""
        decoder, vision = preset.shape.decoder, preset.shape.vision
        narrow = LlavaShape(
            DecoderShape(
                hidden=WIDTH, layers=decoder.layers, intermediate=WIDTH, heads=HEADS, kv_heads=HEADS, vocab=64
            ),
            VisionShape(hidden=WIDTH, layers=1, intermediate=WIDTH, patch=vision.patch, patches=vision.patches),
            preset.shape.tokens_per_image,
        )
        self.preset = replace(preset, shape=narrow, batch=1)
        self.method = preset.method
        self._held: dict[int, list[int]] = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            self.model = build_model(self.preset, CPU, torch.float32)
            self._open()
            self.prompt = self._opened.sparsity.tokens_per_layer()[0].tolist()
        self.output_layer = next((cut.layer for cut in self.method.cuts(decoder.layers) if cut.output), decoder.layers)
        self._kept = self._decided(LONGEST) if self.output_layer < decoder.layers else None

    def seen(self, outputs: int) -> list[int]:
        """Return how many tokens each layer sees of the prompt and `outputs` generated ones."""
        kept = outputs
        if self._kept is not None:
            self._kept = self._kept if outputs <= len(self._kept) else self._decided(2 * outputs)
            kept = int(self._kept[:outputs].sum())
        return [tokens + (outputs if layer < self.output_layer else kept) for layer, tokens in enumerate(self.prompt)]

    def held(self, outputs: int) -> list[int]:
        """Return how many tokens the longest key head of each layer holds after so many generated ones."""
        if not self.method.evicts:
            return self.seen(outputs)
        if outputs not in self._held:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                if outputs < self._said:
                    self._open()
                say_on(self.model, self.preset, self._opened.cache, self._said, outputs)
                self._said = outputs
            self._held[outputs] = self._opened.cache.head_lengths()[0].amax(-1).tolist()
        return self._held[outputs]

    def _open(self) -> None:
        self._opened = sparse_prefill(self.model, self.preset, "both", prompts(self.model, self.preset))
        self._said = 0

    def _decided(self, outputs: int) -> torch.Tensor:
        """(T,) bool: which of so many output tokens of one row stay."""
        hidden_TD = torch.randn(outputs, WIDTH, generator=torch.Generator().manual_seed(0))
        rank_T = torch.arange(outputs)
        said = OutputTokens(hidden_TD, rank_T, torch.zeros_like(rank_T))
        return self.method.keep_output(said, learned_of(self.model.model.language_model))  # type: ignore[no-any-return]
