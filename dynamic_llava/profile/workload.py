"""A model of any size without a checkpoint, what it is fed, and caches as they are after so many generated tokens.

Weights are random: time and memory do not depend on their values. Images come in as projected features, with what the
vision tower says of them for a method that reads it; the tower is timed apart, because sparsity does not change it, but
for the rows that such a method is shown. The dense baseline is transformers' own LlamaForCausalLM,
which holds the very same tensors.
Shape suffixes: B rows, N tokens, C computed tokens, n image tokens of one image, D hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from dynamic_llava.engine.cache import CACHE
from dynamic_llava.engine.plan import tower_cut
from dynamic_llava.engine.step import compile_options
from dynamic_llava.engine.tower import EncodedImages
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import CLIP_EVIDENCE, Dynamic, Method
from dynamic_llava.model import AdmissionCache, DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.profile.presets import Preset, Way

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGE_TOKEN = 3
BEFORE_IMAGE = 1
"""Prompt tokens before the image's."""
CPU = torch.device("cpu")
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
    images: Tensor | Sequence[Tensor]
    """The features as the sparse model is given them: those, or encoded for a method that reads the vision tower."""


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
    cut = None if preset.method is None else tower_cut(preset.method, preset.shape.decoder.layers)
    if cut is None:
        return Prompt(ids_BN, features_BnD, embeds_BND, features_BnD)
    if cut.sees & CLIP_EVIDENCE:
        assert preset.method is not None
        raise ValueError(
            f"method {preset.method.name!r} reads the question's text, and a benchmark's model has no "
            "tokenizer that says it; time a method that reads no text, such as divprune"
        )
    return Prompt(ids_BN, features_BnD, embeds_BND, EncodedImages(features_BnD, tower_says(model, preset), cut))


def tower_says(model: DynamicLlavaForConditionalGeneration, preset: Preset) -> dict[Any, Tensor]:
    """Return random evidence of the vision tower; the rows are the same for every image, and in every model.

    So a method whose images say themselves how many tokens they need keeps the same number in all rows and rehearsals.
    """
    batch, n, width = preset.batch, preset.shape.tokens_per_image, preset.shape.vision.hidden
    heads = model.config.vision_config.num_attention_heads
    row_n = torch.randn(n, generator=torch.Generator().manual_seed(0)).softmax(0)
    row_Bn = row_n.to(model.device).expand(batch, n)
    widths = {"tower_keys": width // heads, "joint_tower_keys": width, "tower": width}
    drawn = {name: torch.randn(batch, n, one, device=model.device, dtype=model.dtype) for name, one in widths.items()}
    rows = dict.fromkeys(("class_row", "early_class_row", "joint_class_row", "received", "early_received"), row_Bn)
    return {**rows, **drawn}


def random_ids(model: DynamicLlavaForConditionalGeneration, batch: int, tokens: int) -> Tensor:
    """Return (B, N) int64 ids of words, drawn on the device."""
    return torch.randint(IMAGE_TOKEN + 1, model.config.text_config.vocab_size, (batch, tokens), device=model.device)


def sparse_prefill(model: DynamicLlavaForConditionalGeneration, preset: Preset, way: Way, prompt: Prompt) -> Any:
    """Run the prompts through the sparse model, image predictor included; returns its output with the cache."""
    return model(
        input_ids=prompt.ids_BN,
        image_features=prompt.images,
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
    the computation is left out. Dropped tokens leave nothing, so a stage's chunks hold the admitted ones. For a method
    that evicts all is computed, for what stays follows from it.
    """
    batch, layers, method = preset.batch, preset.shape.decoder.layers, method_of(preset, way)
    if method.evicts:
        with torch.no_grad():
            cache: AdmissionCache = sparse_prefill(model, preset, way, prompts(model, preset)).cache
            say_on(model, preset, cache, 0, outputs)
        return cache
    cache = AdmissionCache.for_method(method, layers, model.config.sparsity.cache_block)
    seen = [preset.seen(way)[start] for start in cache.starts]
    for slots, tokens in zip(cache.groups, seen, strict=True):
        slots.open(torch.full((batch,), tokens, device=model.device), tokens)
    _store(model, preset, cache, seen)
    _note(cache, preset, preset.prompt, seen, image=preset.shape.tokens_per_image)
    for begun in range(0, outputs, CHUNK):
        ended = min(begun + CHUNK, outputs)
        before, after = preset.seen(way, begun), preset.seen(way, ended)
        counts = [after[start] - before[start] for start in cache.starts]
        admits = [torch.ones(batch, count, dtype=torch.bool, device=model.device) for count in counts]
        for slots, admit_BC in zip(cache.groups, admits, strict=True):
            slots.place_chunk(admit_BC, admit_BC)
        _store(model, preset, cache, counts)
        cache.commit_chunk(admits)
        _note(cache, preset, ended - begun, counts)
    return cache


def say_on(
    model: DynamicLlavaForConditionalGeneration, preset: Preset, cache: AdmissionCache, begun: int, outputs: int
) -> None:
    """Feed random output tokens to a live cache, from the `begun`-th to the `outputs`-th, in chunks."""
    for said in range(begun, outputs, CHUNK):
        ended = min(said + CHUNK, outputs)
        place_N = torch.arange(preset.prompt + ended, device=model.device)
        model(
            input_ids=random_ids(model, preset.batch, ended - said),
            output_mask=(place_N >= preset.prompt).expand(preset.batch, -1),
            method=method_of(preset, "both"),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE: cache},
        )


def _note(cache: AdmissionCache, preset: Preset, tokens: int, counts: Sequence[int], image: int = 0) -> None:
    """Take note of a prompt with an image of `image` tokens, or of output tokens without; the last ones are dropped.

    counts: how many tokens the layers of each group see.
    """
    place_N = torch.arange(tokens, device=cache.dense.open_lengths().device)
    image_N = (place_N >= BEFORE_IMAGE) & (place_N < BEFORE_IMAGE + image)
    droppable_N = image_N if image else torch.ones_like(image_N)
    rank_N, stay = droppable_N.cumsum(0) - 1, int((~droppable_N).sum())
    until_N = torch.full_like(place_N, preset.shape.decoder.layers)
    for start, count in reversed([*zip(cache.starts, counts, strict=True)]):
        until_N = torch.where(droppable_N & (rank_N >= count - stay), start, until_N)
    valid_BN, image_BN, output_BN, until_BN = (
        one.expand(preset.batch, -1)
        for one in (torch.ones_like(image_N), image_N, torch.full_like(image_N, not image), until_N)
    )
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


def _store(model: Any, preset: Preset, cache: AdmissionCache, counts: Sequence[int]) -> None:
    """Store so many random tokens in the layers of each group, which share them."""
    pairs = [_random_pair(model, preset, tokens) for tokens in counts]
    for layer, group in zip(cache.layers, cache.group_of, strict=True):
        layer.update(*pairs[group])


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
    A DynamicCache is one longer in every step, and cuDNN's attention would plan anew each time, which is far slower
    (`operations.new_length_rows`): it is left out there, on an accelerator, so that the baseline is no straw man.
    """
    token_B1 = random_ids(model, preset.batch, 1)
    if not steps:
        forward = twin if model.device.type == "cpu" else without_cudnn(twin)
        return Decoding(forward, token_B1, dense_cache(twin, preset, outputs))
    longest = preset.prompt + outputs + steps
    options = compile_options(replayed=model.device.type != "cpu")
    forward = torch.compile(twin.forward, fullgraph=True, dynamic=False, options=options)
    return Decoding(forward, token_B1, dense_cache(twin, preset, outputs, longest))


def without_cudnn(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, run with every backend of torch's attention but cuDNN's."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return function(*args, **kwargs)

    return run


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
