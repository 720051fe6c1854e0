"""Random worlds: a random small model, a method, and rows of ragged conversations, held against the laws.

A world draws everything that may vary, an entry of MODEL or CALL each, and 1-3 rows of turns whose pieces (text,
images, answers) stand in any order, so that a turn may end in anything; a row may sit out any turn but its first. A
later feature adds its dimension to one of the two tables, and its law to `tests/world_laws.py`.
"""

from dataclasses import field, make_dataclass, replace
from functools import lru_cache
from types import FunctionType

import torch
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.methods import METHODS, get_method
from dynamic_llava.sparsity import keep_margin
from tests.builders import (
    BOS,
    EOS,
    FIRST_WORD,
    IMAGE_TOKEN,
    LEARNED,
    PAD,
    TEXT_CONFIGS,
    VOCABULARY,
    centre_text_margins,
    predictors,
    vary_biases_and_norms,
)

PATCH = 2
TIE = 1e-4
"""Two scores nearer than this may change places by rounding; a world with such a pair is not judged."""
TURN_LENGTH = 4
HALF_TOLERANCE = {"bfloat16": 0.04, "float16": 0.005}
"""Of the logits' scale: ten roundings (2^-8, 2^-11)."""

MODEL = {
    "layers": st.integers(2, 5),
    "sparse_layer": lambda drawn: st.integers(1, drawn["layers"] - 1),
    "kv_heads": st.sampled_from([1, 2]),
    "heads": lambda drawn: st.sampled_from([1, 2]).map(drawn["kv_heads"].__mul__),
    "head_dim": st.sampled_from([4, 8, 16]),
    "grid": st.integers(1, 4),
    "cache_block": st.sampled_from([1, 2, 7, 64]),
    "image_keep_rate": st.sampled_from([0.05, 0.2, 0.34, 0.5, 1.0]),
    "image_selection": st.sampled_from(["topk", "threshold"]),
    "prompt_keep_rate": st.sampled_from([None, 0.7]),
    "output_window": st.sampled_from([0, 0, 1, 3, 50]),
    "output_sinks": st.sampled_from([0, 0, 0, 2]),
    "masked_softmax": st.sampled_from(["reference", "chunked"]),
    "attention": st.sampled_from(["sdpa", "eager"]),
    "family": st.sampled_from(sorted(FAMILIES)),
    "seed": st.integers(0, 2**20),
}
"""What a model is made of; a dimension may depend on what was drawn before it."""
LOOK_BACK = tuple(name for name, one in METHODS.items() if any(cut.reads_question for cut in one().cuts(layers=4)))
"""Methods that decide by the question, most of them by the attention of its end, at one layer or more."""
READS_TOWER = tuple(name for name, one in METHODS.items() if any(cut.reads_tower for cut in one().cuts(layers=4)))
"""Methods that decide by the vision tower, so that images have to be pixels."""
ANY_RATE = ("random", "structure", "mixed")
"""Methods with a rate of image tokens and one of output tokens, which may be anything."""
DROPPING = tuple(
    name
    for name, one in METHODS.items()
    if not (one().is_dense or one().evicts or name == "dynamic" or name in (*ANY_RATE, *LEARNED))
)
"""All other methods that drop or merge image tokens, at a rate above 0, and keep what is stored.

A world's model holds Dynamic-LLaVA's weights; methods with others of their own: tests/methods/test_references.py.
"""
RATES = st.sampled_from([None, 0, 0.3, 0.5, 1])
CALL = {
    "method": st.one_of(
        st.none(),
        st.tuples(st.sampled_from(ANY_RATE), RATES, RATES),
        st.tuples(st.sampled_from(DROPPING), st.sampled_from([0.2, 0.5, 1.0]), st.none()),
    ),
    "mode": st.sampled_from(["both", "image", "output"]),
    "lengths": st.sampled_from(["one", "any"]),
    "turns": st.integers(1, 4),
    "side": st.sampled_from(["left", "right"]),
    "autocast": st.sampled_from(["bfloat16", "float16"]),
    "beams": st.integers(2, 4),
    "returned": lambda drawn: st.integers(1, drawn["beams"]),
    "temperature": st.sampled_from([0.7, 1.0, 3.0]),
}
"""What the model is asked for. `method` None is Dynamic-LLaVA itself, in the sparsity `mode`; `lengths` says whether
images are pixels, all of one number of tokens, or features, each image with a number of its own."""
PIECES = st.tuples(st.sampled_from(["text", "text", "image", "output", "output"]), st.integers(1, TURN_LENGTH))

Shape = make_dataclass("Shape", list(MODEL), frozen=True)
World = make_dataclass("World", ["shape", *CALL, "rows"], frozen=True)
"""A shape, a call, and rows as tuples of turns of (kind, length)."""


def draw_all(draw, dimensions):
    """Draw every dimension of a table in its order; return name -> value."""
    drawn = {}
    for name, strategy in dimensions.items():
        drawn[name] = draw(strategy(drawn) if isinstance(strategy, FunctionType) else strategy)
    return drawn


@st.composite
def worlds(draw):
    """Draw a world; the method that looks back at a whole prompt gets all of its images in the first turn."""
    shape, call, rows = Shape(**draw_all(draw, MODEL)), draw_all(draw, CALL), []
    for _ in range(draw(st.integers(1, 3))):
        row = [draw(st.lists(PIECES, min_size=int(turn == 0), max_size=4)) for turn in range(call["turns"])]
        if call["method"] is not None and call["method"][0] in READS_TOWER:
            call["lengths"] = "one"
        if call["method"] is not None and call["method"][0] in LOOK_BACK:
            # Its row of attention is that of the question's end: images, then text, then answers alone.
            images = [piece for piece in row[0] if piece[0] == "image"]
            row = [[*images, ("text", 2)], *([("output", length) for _, length in turn] for turn in row[1:])]
        if call["method"] is None and shape.prompt_keep_rate is not None:
            row = asked_apart(row)
        rows.append(tuple(tuple(turn) for turn in row))
    return World(shape, **call, rows=tuple(rows))


def asked_apart(row):
    """Return a row's turns with an answer wherever two of them meet in text: in one pass they would be one question."""
    apart, last = [], None
    for turn in row:
        if turn and last == turn[0][0] == "text":
            turn = [("output", 1), *turn]
        last = turn[-1][0] if turn else last
        apart.append(turn)
    return apart


class Unjudged(Exception):
    """A law says nothing about this world: it has no such part, or a decision in it hangs on rounding alone."""


@lru_cache(maxsize=4)
@torch.no_grad()
def build(shape):
    """Return the world's model, whose decisions on text are mixed, and transformers' own with the same weights."""
    hidden = shape.heads * 8
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=PATCH * shape.grid, patch_size=PATCH, initializer_range=0.2,
    )  # fmt: skip
    text = TEXT_CONFIGS[shape.family](
        hidden_size=hidden, intermediate_size=24, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, vocab_size=VOCABULARY, initializer_range=0.25,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    if hasattr(text, "head_dim"):
        text.head_dim = shape.head_dim
    sparsity = SparsityConfig(
        sparse_layer=shape.sparse_layer, image_keep_rate=shape.image_keep_rate, image_selection=shape.image_selection,
        output_window=shape.output_window, output_sinks=shape.output_sinks,
        cache_block=shape.cache_block, masked_softmax=shape.masked_softmax, output_min_length=1,
        prompt_keep_rate=shape.prompt_keep_rate, prompt_min_length=1,
        predictor_width=8, predictor_heads=2, predictor_mlp=8, predictor_blocks=1,
    )  # fmt: skip
    common = {
        "vision_config": vision, "text_config": text, "image_token_id": IMAGE_TOKEN, "initializer_range": 0.25,
        "image_seq_length": shape.grid**2, "tie_word_embeddings": False,
    }  # fmt: skip
    ours, plain = DynamicLlavaConfig(**common, sparsity=sparsity), LlavaConfig(**common)
    ours._attn_implementation = plain._attn_implementation = shape.attention
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model, twin = DynamicLlavaForConditionalGeneration(ours).eval(), LlavaForConditionalGeneration(plain).eval()
        vary_biases_and_norms(model)
        for predictor in predictors(model):
            for parameter in predictor.parameters():
                parameter.normal_(std=0.4) if parameter.dim() > 1 else parameter.add_(0.1)
        ids = torch.randint(FIRST_WORD, VOCABULARY, (4, 24))
    own = {name: value for name, value in model.state_dict().items() if "_predictor" not in name}
    twin.load_state_dict(own, strict=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    twin.generation_config = model.generation_config
    centre_text_margins(model, ids)
    return model, twin


class Margins:
    """Collects what the predictors say while it is entered: margins of each image (n,) and of text tokens (T,)."""

    def __init__(self, model):
        self.images, self.texts, self.handles = [], [], []
        self.predictors = predictors(model)

    def __enter__(self):
        image, *of_text = self.predictors
        self.handles.append(image.register_forward_hook(self.of_images))
        for predictor in of_text:
            self.handles.append(predictor.register_forward_hook(self.of_texts))
        return self

    def of_images(self, module, inputs, logits):
        _, valid = inputs
        self.images.extend(margin[its] for margin, its in zip(keep_margin(logits), valid, strict=True))

    def of_texts(self, module, inputs, logits):
        self.texts.append(keep_margin(logits).flatten())

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


class Watched:
    """Collects the attention that a method ranks by, as `Margins` does what the predictors say."""

    def keep_image(self, cut, images, learned):
        if "question_row" in cut.sees:
            rows = zip(images.seen["question_row"], images.valid, strict=True)
            self.images.extend(row[valid] for row, valid in rows)
        return super().keep_image(cut, images, learned)


@lru_cache
def watched(kind):
    """Return a class of methods, watched."""
    images = field(default_factory=list, compare=False)
    return make_dataclass(f"Watched{kind.__name__}", [("images", list, images)], bases=(Watched, kind), frozen=True)


def method_of(world):
    """Return the method object of a world that has one."""
    shape, (name, image, output) = world.shape, world.method
    if name == "mixed":
        parts = {"image_by": ("random", image, None), "output_by": ("structure", None, output)}
        return get_method(name, **{part: method_of(replace(world, method=its)) for part, its in parts.items()})
    known = {
        "layer": shape.sparse_layer, "layers": tuple(sorted({shape.sparse_layer, shape.layers - 1})),
        "image_keep_rate": image, "stage_keep_rate": image, "side_keep_rate": image, "output_keep_rate": output,
    }  # fmt: skip
    kind = watched(METHODS[name]) if name in LOOK_BACK else METHODS[name]
    return kind(**{setting: value for setting, value in known.items() if setting in METHODS[name].__dataclass_fields__})


def has_tie(images, texts, shape):
    """Whether some decision hangs on less than rounding changes; scores of each image (n,), margins (T,)."""
    near_zero = [*texts, *(images if shape.image_selection == "threshold" else ())]
    near_another = [score.sort().values.diff() for score in images]
    return any(bool((found.abs() < TIE).any()) for found in (*near_zero, *near_another))


def chunks(world):
    """Return one batch per turn, padded within the turn: ids, masks, images; rows begin with BOS."""
    generator = torch.Generator().manual_seed(world.shape.seed)
    made = []
    for turn in range(len(world.rows[0])):
        rows = []
        for row in world.rows:
            ids, output, images = ([BOS], [False], []) if turn == 0 else ([], [], [])
            for kind, length in row[turn]:
                if kind == "image":
                    images.append(_image(world, length**2, generator))
                    length = length**2 if world.lengths == "any" else world.shape.grid**2
                words = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()
                ids += [IMAGE_TOKEN] * length if kind == "image" else words
                output += [kind == "output"] * length
            rows.append((ids, output, images))
        made.append(rows)
    return [_collate(rows, world.side) for rows in made]


def _image(world, tokens, generator):
    """Return an image's pixels (3, S, S), or features (tokens, D) where images are of any length."""
    if world.lengths == "any":
        return torch.randn(tokens, world.shape.heads * 8, generator=generator)
    side = PATCH * world.shape.grid
    return torch.randn(3, side, side, generator=generator)


def images_given(images):
    """Return the arguments that give these images, all pixels or all features, to the model."""
    if images and images[0].dim() == 2:
        return {"image_features": images}
    return {"pixel_values": torch.stack(images) if images else None}


def _collate(rows, side):
    width = max(1, *(len(ids) for ids, *_ in rows))

    def padded(values, filler):
        missing = [filler] * (width - len(values))
        return torch.tensor([*missing, *values] if side == "left" else [*values, *missing])

    return {
        "input_ids": torch.stack([padded(ids, PAD) for ids, *_ in rows]),
        "attention_mask": torch.stack([padded([1] * len(ids), 0) for ids, *_ in rows]),
        "output_mask": torch.stack([padded(output, False) for _, output, _ in rows]),
        "images": [found for *_, found in rows],
    }


def row_of(parts, row):
    """Return the chunks of one row alone, without padding and without the turns that the row has no part in."""
    alone = []
    for part in parts:
        if not part["attention_mask"][row].any():
            continue
        real = part["attention_mask"][row].bool()
        alone.append(
            {
                **{name: part[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "output_mask")},
                "images": [part["images"][row]],
            }
        )
    return alone


def whole(parts):
    """Return all turns as one batch; padding may lie between them. Images go row by row."""
    masks = ("input_ids", "attention_mask", "output_mask")
    batch = {name: torch.cat([part[name] for part in parts], 1) for name in masks}
    rows = range(len(parts[0]["images"]))
    batch |= images_given([image for row in rows for part in parts for image in part["images"][row]])
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch
