"""Tiny random models and random layouts for the tests of the whole model.

Decisions are mixed by construction: the last layer of the output predictor is shifted to the median of its own margins.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from hypothesis import strategies as st
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig
from dynamic_llava.config import SPARSITY_MODES
from dynamic_llava.methods import METHODS, Dynamic, Method, read_method
from dynamic_llava.model.switches import choose_method
from dynamic_llava.sparsity import ImagePredictor, OutputPredictor, keep_margin

VOCABULARY, IMAGE_TOKEN, PAD, BOS, EOS = 128, 3, 0, 1, 2
FIRST_WORD = 4
TOKENS_PER_IMAGE, IMAGE_SIZE, PATCH = 16, 56, 14
LAYERS, HIDDEN = 6, 64
TINY_SPARSITY = SparsityConfig(
    image_keep_rate=0.25,
    output_min_length=4,
    predictor_width=32,
    predictor_heads=4,
    predictor_mlp=64,
    cache_block=8,
)
TEXT_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": partial(MistralConfig, sliding_window=None),
    "qwen2": Qwen2Config,
    "qwen3": partial(Qwen3Config, head_dim=24),
}
"""Family of decoders -> its configuration, which takes the sizes that all have."""


def tiny_config(
    kv_heads=4, attention="sdpa", layers=LAYERS, family="llama", projector="mlp", image_grid_pinpoints=None, **sparsity
):
    """Return a configuration of 6 layers, hidden 64, 16 tokens per image; kv_heads 4 is MHA, 2 is GQA."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        initializer_range=0.1,
    )
    text = TEXT_CONFIGS[family](
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        initializer_range=0.15,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    config = DynamicLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_IMAGE,
        initializer_range=0.15,
        tie_word_embeddings=False,
        projector=projector,
        image_grid_pinpoints=image_grid_pinpoints,
        sparsity=replace(TINY_SPARSITY, **sparsity),
    )
    config._attn_implementation = attention
    return config


def build_model(kv_heads=4, attention="sdpa", seed=0, layers=LAYERS, family="llama", **config):
    """Return a random model in eval mode whose output decisions are mixed; the same seed gives the same weights."""
    config = tiny_config(kv_heads, attention, layers, family, **config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DynamicLlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            vary_biases_and_norms(model)
            for predictor in predictors(model):
                for parameter in predictor.parameters():
                    parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.add_(0.1)
        centre_text_margins(model, torch.randint(FIRST_WORD, VOCABULARY, (8, 40)))
    # An answer that ends early would make the batches of the tests less ragged, not more.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def vary_biases_and_norms(model):
    """Make the biases and head norms of a family's attention matter, which are 0 and 1 in a new model."""
    for name, parameter in model.model.language_model.layers.named_parameters():
        if "self_attn" in name and parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


@lru_cache(maxsize=8)
def shared_model(kv_heads=4, attention="sdpa", seed=0):
    """Return a model that several tests share; nothing may write to it."""
    return build_model(kv_heads, attention, seed)


LEARNED = tuple(name for name, one in METHODS.items() if one.build is not Method.build and not issubclass(one, Dynamic))
"""Registered methods that decide by weights which a model of Dynamic-LLaVA does not hold."""
ADDED = {"voco_llama": 12}
"""Methods that add tokens to an image -> how many here: with the 4 of a projector they are as many as elsewhere."""


def spelling_of(name):
    """Return a registered method as tests name it: by its defaults, or what fits the tiny models' images.

    A mapping, which has said everything, is returned as it is.
    """
    if isinstance(name, Mapping):
        return name
    return {"name": name, **({"tokens": ADDED[name]} if name in ADDED else {})}


def method_of(name):
    """Return the method of that spelling."""
    return read_method(spelling_of(name))


def new_model_of(name, *given, **settings):
    """Return a random model that a registered method can decide in: one that holds its weights."""
    if name not in LEARNED:
        return build_model(*given, **settings)
    projector = {"projector": "pixel_shuffle"} if name in ADDED else {}
    model = build_model(*given, **settings, **projector, method=spelling_of(name))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(4)
        for parameter in model.model.language_model.method.parameters():
            parameter.normal_(std=0.3)
    return model


@lru_cache(maxsize=4)
def _shared_model_of(name, *given):
    return new_model_of(name, *given)


def model_of(name, *given):
    """Return a model that several tests share, and that a registered method can decide in; nothing may write to it."""
    return _shared_model_of(name, *given) if name in LEARNED else shared_model(*given)


def deciding(how, config=TINY_SPARSITY):
    """Return the method that a sparsity mode or a registered name stands for."""
    return choose_method(config, **({"sparsity": how} if how in SPARSITY_MODES else {"method": spelling_of(how)}))


def predictors(model):
    """Return the image and the output predictor of a model, and that of prompt tokens where there is one."""
    return tuple(module for module in model.modules() if isinstance(module, (ImagePredictor, OutputPredictor)))


@torch.no_grad()
def centre_text_margins(model, ids):
    """Shift the predictors of text tokens so that each keeps half of the words `ids` (B, N) of an answer."""
    entering, cut = [], model.model.language_model.layers[model.config.sparsity.sparse_layer]
    handle = cut.register_forward_pre_hook(lambda layer, given: entering.append(given[0]))
    model(input_ids=ids, labels=ids, output_mask=torch.ones_like(ids).bool())
    handle.remove()
    for predictor in predictors(model)[1:]:
        predictor.head[-1].bias[1] -= keep_margin(predictor(entering[0])).median()


def dense_twin(model, kind=LlavaForConditionalGeneration, **settings):
    """Return transformers' own class `kind` with the very same weights and attention implementation."""
    config = model.config
    plain = kind.config_class(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        tie_word_embeddings=False,
        **settings,
    )
    plain._attn_implementation = config._attn_implementation
    twin = kind(plain).eval()
    own = {name: value for name, value in model.state_dict().items() if "_predictor" not in name}
    twin.load_state_dict(own, strict=True)
    twin.generation_config = model.generation_config
    return twin


@dataclass(frozen=True)
class Row:
    """One conversation before padding: token ids, which of them are output, its images' pixels, its decisions."""

    ids: torch.Tensor
    """(N,) int64, each image expanded to its tokens."""
    output: torch.Tensor
    """(N,) bool."""
    pixels: torch.Tensor
    """(images, 3, S, S) float32."""
    keep: torch.Tensor
    """(N,) bool: random decisions at image and output tokens, True at prompt tokens."""

    def __repr__(self):
        image, output = (self.ids == IMAGE_TOKEN).tolist(), self.output.tolist()
        return f"Row({''.join('i' if i else 'o' if o else 't' for i, o in zip(image, output, strict=True))})"


def words(count, generator):
    """Return `count` random text token ids."""
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator)


def make_row(segments, seed):
    """Build a Row from (kind, length) segments; kinds are "text", "image" (length ignored) and "output"."""
    generator = torch.Generator().manual_seed(seed)
    ids, output = [torch.tensor([BOS])], [torch.zeros(1, dtype=torch.bool)]
    for kind, length in segments:
        piece = torch.full((TOKENS_PER_IMAGE,), IMAGE_TOKEN) if kind == "image" else words(length, generator)
        ids.append(piece)
        output.append(torch.full(piece.shape, kind == "output"))
    ids, output = torch.cat(ids), torch.cat(output)
    image = ids == IMAGE_TOKEN
    images = int(image.sum()) // TOKENS_PER_IMAGE
    pixels = torch.randn(images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    decisions = torch.rand(ids.shape, generator=generator) < 0.5
    return Row(ids, output, pixels, decisions | ~(image | output))


def prompt_segments(images, lengths):
    """Return text, image, text, ..., image, text with the given text lengths (one more than images)."""
    segments = [("text", lengths[0])]
    for length in lengths[1 : images + 1]:
        segments += [("image", 0), ("text", length)]
    return segments


@st.composite
def rows(draw, least_rows=1, most_rows=4, most_images=3, outputs=(0, 10), answers=1):
    """Draw 1-4 rows of 0-3 images each, ragged prompts, and `answers` answers of ragged length.

    A prompt ends in text or in an image; without an answer so does the row.
    """
    batch = []
    for _ in range(draw(st.integers(least_rows, most_rows))):
        segments = []
        for _ in range(answers):
            images = draw(st.integers(0, most_images))
            lengths = draw(st.lists(st.integers(0, 5), min_size=images + 1, max_size=images + 1))
            segments += prompt_segments(images, lengths)
            segments.append(("output", draw(st.integers(*outputs))))
        batch.append(make_row(segments, seed=draw(st.integers(0, 2**20))))
    return batch


def fixed_rows(seed=0, output=6):
    """Four ragged rows: one image, no image, three images, two images; the same answer length unless `output` is 0."""
    layouts = [(1, [3, 4]), (0, [7]), (3, [1, 2, 1, 5]), (2, [2, 3, 2])]
    return [
        make_row([*prompt_segments(images, lengths), ("output", output)], seed * 100 + index)
        for index, (images, lengths) in enumerate(layouts)
    ]


def collate(batch, side="right", width=None):
    """Pad rows into the tensors of a call: input_ids, attention_mask, output_mask, keep_mask, pixel_values."""
    width = width or max(len(row.ids) for row in batch)

    def pad(values, filler):
        missing = width - len(values)
        return torch.nn.functional.pad(values, (missing, 0) if side == "left" else (0, missing), value=filler)

    pixels = torch.cat([row.pixels for row in batch])
    return {
        "input_ids": torch.stack([pad(row.ids, PAD) for row in batch]),
        "attention_mask": torch.stack([pad(torch.ones_like(row.ids), 0) for row in batch]),
        "output_mask": torch.stack([pad(row.output, False) for row in batch]),
        "keep_mask": torch.stack([pad(row.keep, False) for row in batch]),
        "pixel_values": pixels if len(pixels) else None,
    }


def prompts(batch, side="left"):
    """Return the generate() inputs of rows whose answers are cut off."""
    cut = [Row(r.ids[~r.output], r.output[~r.output], r.pixels, r.keep[~r.output]) for r in batch]
    inputs = collate(cut, side)
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def unpad(values, attention_mask):
    """Split (B, N, ...) into a list of the rows' real tokens."""
    return [row[mask.bool()] for row, mask in zip(values, attention_mask, strict=True)]


def assert_same_logits(actual, expected, tolerance=1e-4, what="logits"):
    """Assert a maximal difference below `tolerance` of the expected logits' largest magnitude."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    if not expected.numel():
        return
    scale = expected.abs().max().item()
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * scale, f"{what}: differ by {difference:.2e} at a scale of {scale:.2f}"


def training_passes(model):
    """Yield the output of two training passes, gradients in place: of a ragged batch, and of a row without an image."""
    for batch in (fixed_rows(), fixed_rows()[1:2]):
        inputs = {key: value for key, value in collate(batch).items() if key != "keep_mask"}
        model.zero_grad(set_to_none=True)
        out = model(**inputs, labels=inputs["input_ids"], sample_key=torch.arange(len(batch)))
        out.loss.backward()
        yield out
