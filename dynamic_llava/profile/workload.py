"""A model of any size without a checkpoint, what it is fed, and caches as they are after so many generated tokens.

Weights are random: time and memory do not depend on their values. Images come in as projected features; the vision
tower is timed apart, because sparsity does not change it. The dense baseline is transformers' own LlamaForCausalLM,
which holds the very same tensors.
Shape suffixes: B rows, N tokens, C computed tokens, n image tokens of one image, D hidden size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from dynamic_llava.engine.cache import CACHE
from dynamic_llava.engine.step import compile_options
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import Dynamic, Method, describe_method, print_method, read_method, settings_of
from dynamic_llava.model import AdmissionCache, DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.profile.presets import Preset, Way

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGE_TOKEN = 3
BEFORE_IMAGE = 1
"""Prompt tokens before the image's."""
CHUNK = 256
"""Tokens by which a cache is filled: a chunk's mask is small beside the cache."""


def device_asked(name: str | None) -> torch.device:
    """Return the device of a name; None is the accelerator, if there is one. ValueError for what is no device."""
    if name is not None:
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device {name} is no device: {error}") from None
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else found


def dtype_asked(name: str | None, device: torch.device | None) -> torch.dtype:
    """Return the dtype of a name; None is float32 on a CPU, else bfloat16."""
    if name is not None:
        return DTYPES[name]
    return torch.float32 if device is not None and device.type == "cpu" else torch.bfloat16


def preset_under(preset: Preset, spelling: Mapping[str, Any]) -> Preset:
    """Return a preset whose way `both` is another method's, at that method's layer and keep rates.

    ValueError for a method that is not known, and for one whose work does not follow from its settings `layer`,
    `image_keep_rate` and, if it has it, `output_keep_rate` (of a random rate the mean is taken).
    """
    method = read_method(spelling, preset.sparsity)
    settings = settings_of(method)
    if isinstance(method, Dynamic) or not {"layer", "image_keep_rate"} <= set(settings):
        raise ValueError(
            f"method {spelling['name']!r} cannot be profiled here: name one with the settings layer and "
            "image_keep_rate that learns nothing; Dynamic-LLaVA is profiled without --method"
        )
    rates = [getattr(method, name, None) for name in ("image_keep_rate", "output_keep_rate")]
    image, output = (1.0 if rate is None else rate for rate in rates)
    if not image or not method.training_free:
        raise ValueError(f"{describe_method(method)} cannot be profiled: it must keep image tokens, and learn nothing")
    about = f"{preset.about}; both is {describe_method(method)}"
    rates = {"image_keep_rate": image, "output_keep_rate": output}
    return replace(preset, method=method, sparse_layer=print_method(method)["layer"], about=about, **rates)


def method_of(preset: Preset, way: Way) -> Method:
    """Return the method that a sparse way runs with: its output predictor runs, and is overruled at an exact rate.

    A predictor with random weights would keep all or nothing. Where the preset has a method of its own, it is that.
    """
    if way == "dense":
        raise ValueError("the dense way has no method; its baseline is transformers' own model")
    if preset.method is not None:
        return preset.method
    return Dynamic(
        layer=preset.sparse_layer,
        sparsity=way,
        image_keep_rate=preset.image_keep_rate,
        output_selection="spread",
        output_keep_rate=preset.output_keep_rate,
    )


def build_model(preset: Preset, device: torch.device, dtype: torch.dtype) -> DynamicLlavaForConditionalGeneration:
    """Return a model of the preset's shape with random weights, made on the device, in eval mode without gradients."""
    shape, vision, decoder = preset.shape, preset.shape.vision, preset.shape.decoder
    side = vision.patch * math.isqrt(vision.patches)
    config = DynamicLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden,
            intermediate_size=vision.intermediate,
            num_hidden_layers=vision.layers,
            num_attention_heads=max(1, vision.hidden // 64),
            image_size=side,
            patch_size=vision.patch,
        ),
        text_config=LlamaConfig(
            hidden_size=decoder.hidden,
            intermediate_size=decoder.intermediate,
            num_hidden_layers=decoder.layers,
            num_attention_heads=decoder.heads,
            num_key_value_heads=decoder.kv_heads,
            head_dim=decoder.head_width,
            vocab_size=decoder.vocab,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=shape.tokens_per_image,
        tie_word_embeddings=False,
        sparsity=preset.sparsity,
    )
    with device, _default_dtype(dtype):
        model = DynamicLlavaForConditionalGeneration(config)
    return model.eval().requires_grad_(False)


def dense_twin(model: DynamicLlavaForConditionalGeneration) -> LlamaForCausalLM:
    """Return transformers' own language model around the same tensors; it takes no memory of its own."""
    config = model.config.text_config
    with torch.device("meta"):
        twin = LlamaForCausalLM(config)
    prefix = "model.language_model."
    own = {
        name.replace(prefix, "model."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith((prefix, "lm_head")) and "_predictor" not in name
    }
    twin.load_state_dict(own, strict=True, assign=True)
    twin.model.rotary_emb = model.model.language_model.rotary_emb  # its buffers are in no state dict
    return twin.eval().requires_grad_(False)


@dataclass(frozen=True)
class Prompt:
    """The same prompts for the sparse model (ids and features) and for the dense one (embeddings)."""

    ids_BN: Tensor
    """(B, N) int64, with image tokens."""
    features_BnD: Tensor
    """(B, n, D): projected images."""
    embeds_BND: Tensor
    """(B, N, D): the same with features in place."""


def prompts(model: DynamicLlavaForConditionalGeneration, preset: Preset) -> Prompt:
    """Return random prompts, one image each."""
    device, n = model.device, preset.shape.tokens_per_image
    ids_BN = random_ids(model, preset.batch, preset.prompt)
    image = slice(BEFORE_IMAGE, BEFORE_IMAGE + n)
    ids_BN[:, image] = IMAGE_TOKEN
    hidden = preset.shape.decoder.hidden
    features_BnD = 0.02 * torch.randn(preset.batch, n, hidden, device=device, dtype=model.dtype)
    embeds_BND = model.get_input_embeddings()(ids_BN)
    embeds_BND[:, image] = features_BnD
    return Prompt(ids_BN, features_BnD, embeds_BND)


def random_ids(model: DynamicLlavaForConditionalGeneration, batch: int, tokens: int) -> Tensor:
    """Return (B, N) int64 ids of words, drawn on the device."""
    return torch.randint(IMAGE_TOKEN + 1, model.config.text_config.vocab_size, (batch, tokens), device=model.device)


def sparse_prefill(model: DynamicLlavaForConditionalGeneration, preset: Preset, way: Way, prompt: Prompt) -> Any:
    """Run the prompts through the sparse model, image predictor included; returns its output with the cache."""
    return model(
        input_ids=prompt.ids_BN,
        image_features=prompt.features_BnD,
        method=method_of(preset, way),
        use_cache=True,
        logits_to_keep=1,
    )


def dense_prefill(twin: LlamaForCausalLM, prompt: Prompt) -> Any:
    """Run the prompts through the dense model; returns its output with a DynamicCache."""
    return twin(inputs_embeds=prompt.embeds_BND, use_cache=True, logits_to_keep=1)


def admission_cache(
    model: DynamicLlavaForConditionalGeneration, preset: Preset, way: Way, outputs: int
) -> AdmissionCache:
    """Return the cache after a prefill and `outputs` generated tokens, filled with random keys and values.

    The calls are those of a prefill and of later chunks, so lengths, slots and bytes are those of a generation; only
    the computation is left out. Dropped tokens leave nothing, so the sparse layers' chunks hold the admitted ones.
    """
    batch, device = preset.batch, model.device
    cache = AdmissionCache(preset.shape.decoder.layers, preset.sparse_layer, model.config.sparsity.cache_block)
    for slots, tokens in ((cache.dense, preset.prompt), (cache.sparse, preset.kept_prompt)):
        slots.open(torch.full((batch,), tokens, device=device), tokens)
    _store(model, preset, cache, preset.prompt, preset.kept_prompt)
    _note(cache, preset, preset.prompt, preset.kept_prompt, image=preset.shape.tokens_per_image)
    for begun in range(0, outputs, CHUNK):
        ended = min(begun + CHUNK, outputs)
        before, after = (preset.kept_outputs(count) if way == "both" else count for count in (begun, ended))
        dense_BN, sparse_BC = (
            torch.ones(batch, count, dtype=torch.bool, device=device) for count in (ended - begun, after - before)
        )
        cache.dense.place_chunk(dense_BN, dense_BN)
        cache.sparse.place_chunk(sparse_BC, sparse_BC)
        _store(model, preset, cache, ended - begun, after - before)
        cache.commit_chunk([dense_BN, sparse_BC])
        _note(cache, preset, ended - begun, after - before)
    return cache


def _note(cache: AdmissionCache, preset: Preset, tokens: int, kept: int, image: int = 0) -> None:
    """Take note of a prompt with an image of `image` tokens, or of output tokens without; the last ones are dropped."""
    place_N = torch.arange(tokens, device=cache.dense.open_lengths().device)
    image_N = (place_N >= BEFORE_IMAGE) & (place_N < BEFORE_IMAGE + image)
    droppable_N = image_N if image else torch.ones_like(image_N)
    keep_N = ~droppable_N | (droppable_N.cumsum(0) <= kept - int((~droppable_N).sum()))
    valid_BN, image_BN, output_BN, keep_BN = (
        one.expand(preset.batch, -1)
        for one in (torch.ones_like(image_N), image_N, torch.full_like(image_N, not image), keep_N)
    )
    until_BN = torch.where(keep_BN, preset.shape.decoder.layers, preset.sparse_layer)
    cache.note(TokenLayout.build(image_BN, valid_BN, output_BN, image or None), until_BN)


def dense_cache(
    twin: LlamaForCausalLM, preset: Preset, outputs: int, longest: int | None = None
) -> DynamicCache | StaticCache:
    """Return transformers' cache after a prefill and `outputs` tokens; a StaticCache of `longest` slots, if given."""
    cache = DynamicCache() if longest is None else StaticCache(config=twin.config, max_cache_len=longest)
    pair = _random_pair(twin, preset, preset.prompt + outputs)  # the same for all layers, which copy it
    for index in range(preset.shape.decoder.layers):
        cache.update(*pair, index)
    return cache


def _store(model: Any, preset: Preset, cache: AdmissionCache, dense: int, sparse: int) -> None:
    early, late = (_random_pair(model, preset, tokens) for tokens in (dense, sparse))
    for index, layer in enumerate(cache.layers):
        layer.update(*(early if index < preset.sparse_layer else late))


def _random_pair(model: Any, preset: Preset, tokens: int) -> tuple[Tensor, Tensor]:
    decoder = preset.shape.decoder
    size = (preset.batch, decoder.kv_heads, tokens, decoder.head_width)
    keys, values = (torch.randn(size, device=model.device, dtype=model.dtype) for _ in range(2))
    return keys, values


class Decoding:
    """A generation under way: `step` feeds every row its next token. Nothing is read on the host."""

    def __init__(self, forward: Callable[..., Any], token_B1: Tensor, cache: Any, **switches: Any) -> None:
        self.forward, self.cache, self.switches = forward, cache, switches
        self.token_B1 = token_B1

    @torch.no_grad()
    def step(self) -> None:
        """Feed one token per row and take the likeliest next one, on the device."""
        out = self.forward(
            input_ids=self.token_B1, use_cache=True, logits_to_keep=1, **{CACHE: self.cache}, **self.switches
        )
        self.token_B1 = out.logits[:, -1].argmax(-1, keepdim=True)


def sparse_decoding(
    model: DynamicLlavaForConditionalGeneration, preset: Preset, way: Way, outputs: int, *, compile: bool = False
) -> Decoding:
    """Return a sparse generation with `outputs` tokens behind it."""
    cache = admission_cache(model, preset, way, outputs)
    token_B1 = random_ids(model, preset.batch, 1)
    return Decoding(model, token_B1, cache, method=method_of(preset, way), compile=compile)


def dense_decoding(
    model: DynamicLlavaForConditionalGeneration, twin: LlamaForCausalLM, preset: Preset, outputs: int, steps: int = 0
) -> Decoding:
    """Return a dense generation with `outputs` tokens behind it: DynamicCache, or compiled for `steps` more tokens.

    Compiled means StaticCache and torch.compile with the settings of the sparse step: replayed where the device can.
    """
    token_B1 = random_ids(model, preset.batch, 1)
    if not steps:
        return Decoding(twin, token_B1, dense_cache(twin, preset, outputs))
    longest = preset.prompt + outputs + steps
    options = compile_options(replayed=model.device.type != "cpu")
    forward = torch.compile(twin.forward, fullgraph=True, dynamic=False, options=options)
    return Decoding(forward, token_B1, dense_cache(twin, preset, outputs, longest))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
