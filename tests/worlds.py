"""Random worlds: a random small model, a method, and rows of ragged conversations, held against the laws.

A world draws everything that may vary: layers, the sparse layer, heads and their width, images' grid, cache blocks,
attention, the method and its settings, and 1-3 rows of 1-4 turns whose pieces (text, images, answers) stand in any
order, so that a turn may end in anything; a row may sit out any turn but its first.
"""

import copy
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from hypothesis import assume
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, SparsityConfig, get_method
from dynamic_llava.methods import FastV
from dynamic_llava.model.switches import choose_method
from dynamic_llava.sparsity import keep_margin
from tests.builders import BOS, EOS, FIRST_WORD, IMAGE_TOKEN, PAD, VOCABULARY, assert_same_logits, predictors

PATCH = 2
TIE = 1e-4
"""Two scores nearer than this may change places by rounding; a world with such a pair is not judged."""
TURN_LENGTH = 4


@dataclass(frozen=True)
class Shape:
    """What a model of a world is made of."""

    layers: int
    sparse_layer: int
    heads: int
    kv_heads: int
    head_dim: int
    grid: int
    cache_block: int
    image_keep_rate: float
    image_selection: str
    masked_softmax: str
    attention: str
    seed: int

    @property
    def tokens_per_image(self):
        return self.grid**2


@dataclass(frozen=True)
class World:
    """A shape, a method (None: Dynamic-LLaVA in a sparsity mode), and rows as tuples of turns of (kind, length)."""

    shape: Shape
    method: tuple | None
    mode: str
    rows: tuple


@st.composite
def shapes(draw):
    layers, kv_heads = draw(st.integers(2, 5)), draw(st.sampled_from([1, 2]))
    return Shape(
        layers=layers,
        sparse_layer=draw(st.integers(1, layers - 1)),
        heads=kv_heads * draw(st.sampled_from([1, 2])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        grid=draw(st.integers(1, 4)),
        cache_block=draw(st.sampled_from([1, 2, 7, 64])),
        image_keep_rate=draw(st.sampled_from([0.05, 0.2, 0.34, 0.5, 1.0])),
        image_selection=draw(st.sampled_from(["topk", "threshold"])),
        masked_softmax=draw(st.sampled_from(["reference", "chunked"])),
        attention=draw(st.sampled_from(["sdpa", "eager"])),
        seed=draw(st.integers(0, 2**20)),
    )


RATES = st.sampled_from([None, 0, 0.3, 0.5, 1])
METHODS = st.one_of(
    st.none(),
    st.builds(lambda image, output: ("random", image, output), RATES, RATES),
    st.builds(lambda image, output: ("structure", image, output), RATES, RATES),
    st.builds(lambda image: ("fastv", image, None), st.sampled_from([0.2, 0.5, 1.0])),
)
PIECES = st.tuples(st.sampled_from(["text", "text", "image", "output", "output"]), st.integers(1, TURN_LENGTH))


@st.composite
def worlds(draw, most_turns=4):
    """Draw a world; the method that looks back at a whole prompt gets all of its images in the first turn."""
    shape, method, mode = draw(shapes()), draw(METHODS), draw(st.sampled_from(["both", "image", "output"]))
    turns, rows = draw(st.integers(1, most_turns)), []
    for _ in range(draw(st.integers(1, 3))):
        row = [draw(st.lists(PIECES, min_size=int(turn == 0), max_size=4)) for turn in range(turns)]
        if method is not None and method[0] == "fastv":
            # Its row of attention is that of the question's end: images, then text, then answers alone.
            images = [piece for piece in row[0] if piece[0] == "image"]
            row = [[*images, ("text", 2)], *([("output", length) for _, length in turn] for turn in row[1:])]
        rows.append(tuple(tuple(turn) for turn in row))
    return World(shape, method, mode, tuple(rows))


@lru_cache(maxsize=4)
@torch.no_grad()
def build(shape):
    """Return the world's model, whose output decisions are mixed, and transformers' own with the same weights."""
    hidden = shape.heads * 8
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=PATCH * shape.grid, patch_size=PATCH, initializer_range=0.2,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=24, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, vocab_size=VOCABULARY, initializer_range=0.25,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False,
    )  # fmt: skip
    sparsity = SparsityConfig(
        sparse_layer=shape.sparse_layer, image_keep_rate=shape.image_keep_rate, image_selection=shape.image_selection,
        cache_block=shape.cache_block, masked_softmax=shape.masked_softmax, output_min_length=1,
        predictor_width=8, predictor_heads=2, predictor_mlp=8, predictor_blocks=1,
    )  # fmt: skip
    common = {
        "vision_config": vision, "text_config": text, "image_token_id": IMAGE_TOKEN, "initializer_range": 0.25,
        "image_seq_length": shape.tokens_per_image, "tie_word_embeddings": False,
    }  # fmt: skip
    ours, plain = DynamicLlavaConfig(**common, sparsity=sparsity), LlavaConfig(**common)
    ours._attn_implementation = plain._attn_implementation = shape.attention
    with torch.random.fork_rng():
        torch.manual_seed(shape.seed)
        model, twin = DynamicLlavaForConditionalGeneration(ours).eval(), LlavaForConditionalGeneration(plain).eval()
        for predictor in predictors(model):
            for parameter in predictor.parameters():
                parameter.normal_(std=0.4) if parameter.dim() > 1 else parameter.add_(0.1)
        ids = torch.randint(FIRST_WORD, VOCABULARY, (4, 24))
    own = {name: value for name, value in model.state_dict().items() if "_predictor" not in name}
    twin.load_state_dict(own, strict=True)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    twin.generation_config = model.generation_config
    with Margins(model) as margins:
        model(input_ids=ids, labels=ids, output_mask=torch.ones_like(ids).bool(), sparsity="output")
    predictors(model)[1].head[-1].bias[1] -= torch.cat(margins.outputs).median()
    return model, twin


class Margins:
    """Collects what the predictors say while it is entered: margins of each image (n,) and of output tokens (T,)."""

    def __init__(self, model):
        self.images, self.outputs, self.handles = [], [], []
        image, output = predictors(model)
        self.kinds = [(image, self.images.extend), (output, lambda margin: self.outputs.append(margin.flatten()))]

    def __enter__(self):
        for predictor, collect in self.kinds:
            hook = predictor.register_forward_hook(lambda module, inputs, logits, c=collect: c(keep_margin(logits)))
            self.handles.append(hook)
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class WatchedFastV(FastV):
    """FastV that collects the attention it ranks by, as `Margins` does of the predictors."""

    images: list = field(default_factory=list, compare=False)

    def keep_image(self, cut, images, learned):
        self.images.extend(images.seen["question_row"])
        return super().keep_image(cut, images, learned)


def has_tie(images, outputs, shape):
    """Whether some decision hangs on less than rounding changes; scores of each image (n,), margins (T,)."""
    near_zero = [*outputs, *(images if shape.image_selection == "threshold" else ())]
    near_another = [score.sort().values.diff() for score in images]
    return any(bool((found.abs() < TIE).any()) for found in (*near_zero, *near_another))


def chunks(world):
    """Return one batch per turn, padded on the left of the turn: ids, masks, pixels; rows begin with BOS."""
    generator = torch.Generator().manual_seed(world.shape.seed)
    side, made = PATCH * world.shape.grid, []
    for turn in range(len(world.rows[0])):
        rows = []
        for row in world.rows:
            ids, output, pixels = ([BOS], [False], []) if turn == 0 else ([], [], [])
            for kind, length in row[turn]:
                length = world.shape.tokens_per_image if kind == "image" else length
                words = torch.randint(FIRST_WORD, VOCABULARY, (length,), generator=generator).tolist()
                ids += [IMAGE_TOKEN] * length if kind == "image" else words
                output += [kind == "output"] * length
                pixels += [torch.randn(3, side, side, generator=generator)] if kind == "image" else []
            rows.append((ids, output, pixels))
        made.append(rows)
    return [_collate(rows) for rows in made]


def _collate(rows):
    width = max(1, *(len(ids) for ids, *_ in rows))
    pad = [width - len(ids) for ids, *_ in rows]
    pixels = [pixel for *_, found in rows for pixel in found]
    return {
        "input_ids": torch.tensor([[PAD] * n + ids for n, (ids, *_) in zip(pad, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(ids) for n, (ids, *_) in zip(pad, rows, strict=True)]),
        "output_mask": torch.tensor([[False] * n + output for n, (_, output, _) in zip(pad, rows, strict=True)]),
        "images": [found for *_, found in rows],
        "pixel_values": torch.stack(pixels) if pixels else None,
    }


def row_of(parts, row):
    """Return the chunks of one row alone, without padding and without the turns that the row has no part in."""
    alone = []
    for part in parts:
        if not part["attention_mask"][row].any():
            continue
        real = part["attention_mask"][row].bool()
        pixels = part["images"][row]
        alone.append(
            {
                **{name: part[name][row : row + 1, real] for name in ("input_ids", "attention_mask", "output_mask")},
                "images": [pixels],
                "pixel_values": torch.stack(pixels) if pixels else None,
            }
        )
    return alone


def whole(parts):
    """Return all turns as one batch; padding may lie between them. Images go row by row."""
    masks = ("input_ids", "attention_mask", "output_mask")
    batch = {name: torch.cat([part[name] for part in parts], 1) for name in masks}
    rows = range(len(parts[0]["images"]))
    pixels = [pixel for row in rows for part in parts for pixel in part["images"][row]]
    batch["pixel_values"] = torch.stack(pixels) if pixels else None
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


class Laws:
    """The laws of one world, each a method that asserts; `check` runs all."""

    def __init__(self, world):
        self.world, self.parts = world, chunks(world)
        self.model, self.twin = build(world.shape)
        self.batch = whole(self.parts)
        self.rows = len(world.rows)
        self.switches = {"sample_key": torch.arange(self.rows) + world.shape.seed}
        if world.method is None:
            self.switches["sparsity"] = world.mode
        else:
            name, image, output = world.method
            settings = {"image_keep_rate": image, "layer": world.shape.sparse_layer}
            self.switches["method"] = (
                WatchedFastV(**settings) if name == "fastv" else get_method(name, output_keep_rate=output, **settings)
            )
        with Margins(self.model) as margins:
            out = self.model(**self.batch, labels=self.batch["input_ids"], **self.switches)
        self.refuse_ties(margins)
        self.expected, self.record = out.logits, out.sparsity
        self.keep = self.record.keep_mask.bool()

    def refuse_ties(self, margins):
        """Leave a world unjudged in which rounding alone could change a decision."""
        looked_at = getattr(self.switches.get("method"), "images", margins.images)
        assume(not has_tie(looked_at, margins.outputs, self.world.shape))

    def of_row(self, row):
        return {name: value[row : row + 1] if name == "sample_key" else value for name, value in self.switches.items()}

    def ends(self):
        """Return the last column of each turn."""
        widths = [part["input_ids"].shape[1] for part in self.parts]
        return [sum(widths[: turn + 1]) - 1 for turn in range(len(widths))]

    def dropping_equals_masking(self):
        out = self.model(**self.batch, **self.switches)
        assert torch.equal(out.sparsity.keep_mask.bool(), self.keep)
        real = self.batch["attention_mask"].bool()
        newest = real & (real.cumsum(1) == real.sum(1, keepdim=True))
        assert_same_logits(out.logits[self.keep & real | newest], self.expected[self.keep & real | newest])

    def scoring_equals_masking(self):
        switches = {name: value for name, value in self.switches.items() if name != "sample_key"}
        method = choose_method(self.model.config.sparsity, **switches)
        key = self.switches["sample_key"]
        out = self.model.model(**self.batch, method=method, sample_key=key, answers_only=True)
        where = self.batch["output_mask"] & self.batch["attention_mask"].bool()
        logits = self.model.lm_head(out.last_hidden_state)
        assert_same_logits(logits[where], self.expected[where], what="answers only")

    def turns(self, parts, switches, cache=None, first=0):
        """Yield what the model says at the end of each turn on a live cache, and the cache."""
        for turn in range(first, len(parts)):
            seen = whole(parts[: turn + 1])
            width = parts[turn]["input_ids"].shape[1]
            out = self.model(
                input_ids=parts[turn]["input_ids"],
                pixel_values=parts[turn]["pixel_values"],
                attention_mask=seen["attention_mask"],
                output_mask=seen["output_mask"],
                position_ids=seen["position_ids"][:, -width:],
                past_key_values=cache,
                use_cache=True,
                **switches,
            )
            cache = out.past_key_values
            yield out, cache

    def a_live_cache_equals_masking(self):
        for (out, _), end in zip(self.turns(self.parts, self.switches), self.ends(), strict=True):
            spoke = self.batch["attention_mask"][:, end].bool()
            assert_same_logits(out.logits[spoke, -1], self.expected[spoke, end], what=f"turn up to column {end}")
        assert out.sparsity.cache_lengths.tolist() == self.keep.sum(1).tolist()
        assert out.sparsity.dense_cache_lengths.tolist() == self.batch["attention_mask"].sum(1).tolist()

    def a_row_alone_equals_the_row_in_the_batch(self):
        for row in range(self.rows):
            parts = row_of(self.parts, row)
            ends = [end for end in self.ends() if self.batch["attention_mask"][row, end]]
            for (out, _), end in zip(self.turns(parts, self.of_row(row)), ends, strict=True):
                assert_same_logits(out.logits[0, -1], self.expected[row, end], what=f"row {row} alone, column {end}")
            assert int(out.sparsity.cache_lengths) == int(self.keep[row].sum())

    def permuted_rows_give_permuted_results(self):
        order = torch.arange(self.rows).flip(0)
        batch = {name: value if name == "pixel_values" else value[order] for name, value in self.batch.items()}
        pixels = [p for row in order.tolist() for part in self.parts for p in part["images"][row]]
        batch["pixel_values"] = torch.stack(pixels) if pixels else None
        switches = {name: value[order] if name == "sample_key" else value for name, value in self.switches.items()}
        out = self.model(**batch, labels=batch["input_ids"], **switches)
        real = self.batch["attention_mask"][order].bool()
        assert_same_logits(out.logits[real], self.expected[order][real], what="permuted rows")

    def keeping_all_equals_transformers(self):
        plain = {name: value for name, value in self.batch.items() if name != "output_mask"}
        theirs = self.twin(**plain).logits
        real = self.batch["attention_mask"].bool()
        assert torch.equal(self.model(**plain, sparsity="none").logits[real], theirs[real]), "none is not transformers'"
        everything = torch.ones_like(real)
        ours = self.model(**self.batch, keep_mask=everything).logits
        assert_same_logits(ours[real], theirs[real], what="everything kept")

    def a_cloned_cache_continues_alike(self):
        if len(self.parts) < 2:
            return
        _, cache = next(self.turns(self.parts[:1], self.switches))
        clone = copy.deepcopy(cache)
        once, again = (self.turns(self.parts, self.switches, found, first=1) for found in (cache, clone))
        for (one, _), (other, _) in zip(once, again, strict=True):
            assert torch.equal(one.logits, other.logits), "a clone of the cache goes on differently"

    def generating_with_and_without_cache(self):
        prompt = self.parts[0]
        inputs = {name: prompt[name] for name in ("input_ids", "attention_mask", "output_mask", "pixel_values")}
        call = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with Margins(self.model) as margins:
            cached = self.model.generate(**inputs, **self.switches, **call)
        steps = torch.stack(cached.logits, 1)
        best = steps.topk(2, dim=-1).values
        self.refuse_ties(margins)
        assume(bool((best[..., 0] - best[..., 1] > TIE).all()))
        uncached = self.model.generate(**inputs, **self.switches, **call, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        assert_same_logits(torch.stack(uncached.logits, 1), steps, what="generated without cache")
        assert torch.equal(cached.sparsity.keep_mask, uncached.sparsity.keep_mask)

    def check(self):
        """Run every law on this world."""
        for law in LAWS:
            getattr(self, law)()


LAWS = [
    "dropping_equals_masking",
    "scoring_equals_masking",
    "a_live_cache_equals_masking",
    "a_row_alone_equals_the_row_in_the_batch",
    "permuted_rows_give_permuted_results",
    "keeping_all_equals_transformers",
    "a_cloned_cache_continues_alike",
    "generating_with_and_without_cache",
]
"""Names of the laws."""
