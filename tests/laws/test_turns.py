"""Several turns on one live cache equal a recomputation from scratch, whatever kind of token a turn ends in."""

import pytest
import torch
from hypothesis import strategies as st

from dynamic_llava import METHODS, DynamicLlavaForConditionalGeneration, get_method
from tests.builders import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    TOKENS_PER_IMAGE,
    Row,
    assert_same_logits,
    collate,
    make_row,
    model_of,
    shared_model,
    tiny_config,
)
from tests.laws.test_paths import KV_HEADS, newest
from tests.properties import few_or_many, for_all

GIVEN = "given"


def reads_question(method):
    """Whether a class of methods decides by the first question."""
    return any(cut.reads_question for cut in method().cuts(layers=4))


WITH_LATER_IMAGES = sorted(
    name for name, one in METHODS.items() if not (reads_question(one) or one().is_dense or one().evicts)
)
ATTENTION = st.sampled_from(["sdpa", "eager"])
PER_TOKEN = ("input_ids", "attention_mask", "output_mask", "keep_mask")


def pieces(*kinds):
    """Draw the 0-4 pieces of a turn, which may begin and end in any of `kinds`."""
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(1, 4)), max_size=4)


def length(piece):
    kind, count = piece
    return TOKENS_PER_IMAGE if kind == "image" else count


@st.composite
def conversations(draw):
    """Draw 1-3 rows of 1-4 turns, of tokens of any kind: the rows, where each turn of a row ends, each turn's padding.

    A row may say nothing in a turn, in the first one too.
    """
    turns, batch, ends = draw(st.integers(1, 4)), [], []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.sampled_from([0, 0, 0, turns - 1]))
        parts = [[]] * first + [draw(pieces("text", "image", "output")) for _ in range(turns - first)]
        sizes = [sum(map(length, part)) for part in parts]
        sizes[first] += 1  # the token that every row begins with
        batch.append(make_row([piece for part in parts for piece in part], draw(st.integers(0, 2**20))))
        ends.append([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return batch, ends, [draw(st.sampled_from(["left", "right"])) for _ in range(turns)]


def part(row, start, stop):
    """Cut a Row; its pixels are those of the images between start and stop."""
    before = int((row.ids[:start] == IMAGE_TOKEN).sum()) // TOKENS_PER_IMAGE
    inside = int((row.ids[start:stop] == IMAGE_TOKEN).sum()) // TOKENS_PER_IMAGE
    cut = slice(start, stop)
    return Row(row.ids[cut], row.output[cut], row.pixels[before : before + inside], row.keep[cut])


def cut_into_turns(batch, ends, sides):
    """Return every turn's padded inputs; a turn in which no row says anything is one column of padding."""
    for turn, side in enumerate(sides):
        rows = [part(row, *end[turn : turn + 2]) for row, end in zip(batch, ends, strict=True)]
        yield collate(rows, side, max(1, *(len(row.ids) for row in rows)))


def said_until(turns, decide):
    """Return the masks of all turns so far, joined; padding inside a row has no position of its own."""
    joined = {name: torch.cat([turn[name] for turn in turns], 1) for name in PER_TOKEN}
    joined["position_ids"] = (joined["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {name: value for name, value in joined.items() if name != "keep_mask" or decide == GIVEN}


@few_or_many
def test_turns_on_a_live_cache_equal_recomputation(examples):
    """Given decisions or a method's own; every place that is computed, in the pass of its turn, is compared."""

    @for_all(examples, conversations(), KV_HEADS, ATTENTION, st.sampled_from([GIVEN, *WITH_LATER_IMAGES]))
    @torch.no_grad()
    def check(conversation, kv_heads, attention, decide):
        batch, ends, sides = conversation
        model, keys = model_of(decide, kv_heads, attention), torch.arange(len(batch)) + 3
        switches = {} if decide == GIVEN else {"method": decide}
        expected = [alone(model, row, decide, **switches, sample_key=keys[i : i + 1]) for i, row in enumerate(batch)]
        turns, cache = [], None
        for number, inputs in enumerate(cut_into_turns(batch, ends, sides)):
            turns.append(inputs)
            past, width = said_until(turns, decide), inputs["input_ids"].shape[1]
            out = model(
                input_ids=inputs["input_ids"],
                pixel_values=inputs["pixel_values"],
                position_ids=past["position_ids"][:, -width:],
                cache=cache,
                use_cache=True,
                sample_key=keys,
                **switches,
                **{name: value for name, value in past.items() if name not in ("input_ids", "position_ids")},
            )
            cache = out.cache
            present = out.sparsity.keep_mask.bool() | newest(inputs["attention_mask"])
            for index, (logits, record) in enumerate(expected):
                of_turn = slice(*ends[index][number : number + 2])
                real, computed = inputs["attention_mask"][index].bool(), present[index]
                wanted = logits[of_turn][computed[real]]
                assert_same_logits(out.logits[index][computed], wanted, what=f"turn {number}, row {index}")
                decided = cache.record.keep_mask[index][cache.record.layout.valid[index]]
                assert torch.equal(decided, record.keep_mask[0, : of_turn.stop].bool())
                assert out.sparsity.cache_lengths[index] == decided.sum()
                assert out.sparsity.dense_cache_lengths[index] == record.seen_by(0)[0, : of_turn.stop].sum()


def alone(model, row, decide, **switches):
    """Return a row's logits (N, V) and record from one masked forward of the whole conversation."""
    inputs = collate([row])
    if decide != GIVEN:
        inputs.pop("keep_mask")
    out = model(**inputs, labels=inputs["input_ids"], **switches)
    return out.logits[0], out.sparsity


@few_or_many
def test_generate_continues_a_conversation(examples):
    """Every turn of generate() on the kept cache gives what the whole conversation gives without a cache.

    A turn is what a user says, with images anywhere, and may end in the beginning of the answer.
    """
    questions = st.tuples(pieces("text", "image"), st.sampled_from([(), (), (("output", 2),)]))

    @for_all(examples, st.integers(1, 3), st.lists(questions, min_size=4, max_size=12), KV_HEADS, st.integers(0, 2**20))
    @torch.no_grad()
    def check(count, said, kv_heads, seed):
        model, call = shared_model(kv_heads), {"do_sample": False, "return_dict_in_generate": True}
        batch, cache, pixels = [[] for _ in range(count)], None, [[] for _ in range(count)]
        ids = torch.zeros(count, 0, dtype=torch.int64)
        mask, output = torch.zeros_like(ids), ids.bool()
        for turn in range(len(said) // count):
            batch = [
                make_row([*parts, *answer], seed + 100 * turn + row)
                for row, (parts, answer) in enumerate(said[turn * count : (turn + 1) * count])
            ]
            new = collate(batch, "left")
            ids = torch.cat([ids, new["input_ids"]], 1)
            mask, output = torch.cat([mask, new["attention_mask"]], 1), torch.cat([output, new["output_mask"]], 1)
            for row, one in zip(pixels, batch, strict=True):
                row.append(one.pixels)
            inputs = {"input_ids": ids, "attention_mask": mask, "output_mask": output}
            call |= {"max_new_tokens": 3, "output_logits": True}
            every = torch.cat([image for row in pixels for image in row])
            cached = model.generate(**inputs, pixel_values=new["pixel_values"], cache=cache, **call)
            scratch = model.generate(**inputs, pixel_values=every if len(every) else None, use_cache=False, **call)
            assert torch.equal(cached.sequences, scratch.sequences), f"turn {turn}"
            assert_same_logits(torch.stack(cached.logits), torch.stack(scratch.logits), what=f"turn {turn}")
            assert torch.equal(cached.sparsity.keep_mask, scratch.sparsity.keep_mask)
            answered = cached.sequences.shape[1] - ids.shape[1]
            ids, cache = cached.sequences, cached.cache
            mask = torch.nn.functional.pad(mask, (0, answered), value=1)
            output = torch.nn.functional.pad(output, (0, answered), value=True)


PROBING = sorted(name for name, one in METHODS.items() if reads_question(one))


@pytest.mark.parametrize("name", PROBING)
@pytest.mark.parametrize("ends_in", ["text", "image"])
@torch.no_grad()
def test_a_question_that_ends_in_an_image_is_read_by_its_last_token(name, ends_in):
    """The attention row is that of the last token before the answer, so every image token is seen by it."""
    model = shared_model()
    row = make_row([("text", 2), ("image", 0), *([("text", 1)] if ends_in == "text" else []), ("output", 3)], seed=4)
    inputs = {key: value for key, value in collate([row]).items() if key != "keep_mask"}
    kept = model(**inputs, labels=inputs["input_ids"], method=name).sparsity.image_indices[0][0].tolist()
    asked = {key: value for key, value in collate([part(row, 0, -3)]).items() if key != "keep_mask"}
    assert model(**asked, method=name).sparsity.image_indices[0][0].tolist() == kept
    assert kept != list(range(len(kept))), "ties go to the first tokens: nothing was read"


@pytest.mark.parametrize("name", PROBING)
@torch.no_grad()
def test_images_behind_the_question_that_decides_are_refused_on_every_path(name):
    model = shared_model()
    row = make_row([("text", 2), ("output", 3), ("text", 1), ("image", 0), ("text", 1)], seed=4)
    inputs = {key: value for key, value in collate([row]).items() if key != "keep_mask"}
    paths = {"masked": {"labels": inputs["input_ids"]}, "uncached": {"use_cache": False}, "prefill": {}}
    for path, switches in paths.items():
        with pytest.raises(ValueError, match="image of a later turn"):
            model(**inputs, **switches, method=name)
            pytest.fail(path)
    with pytest.raises(ValueError, match="image of a later turn"):
        model.model(**inputs, method=get_method(name), answers_only=True)
    first = {key: inputs[key][:, :6] for key in ("input_ids", "output_mask")}
    cache = model(**first, method=name, use_cache=True).cache
    with pytest.raises(ValueError, match="image of a later turn"):
        later = {"input_ids": inputs["input_ids"][:, 6:], "pixel_values": inputs["pixel_values"]}
        model(**later, cache=cache, method=name)
    assert cache.get_seq_length() == 6, "a refused turn leaves the cache as it was"
    # The way out that the message names.
    whole = {key: value for key, value in inputs.items() if key != "output_mask"}
    kept, again = (model(**whole, method=name, use_cache=c).sparsity.image_indices[0][0] for c in (True, False))
    assert torch.equal(kept, again) and 0 < len(kept) < TOKENS_PER_IMAGE


@torch.no_grad()
def test_an_image_of_one_token_is_a_turn_of_its_own():
    """A single token on a live cache continues the answer, unless an image is given for it."""
    model = one_token_model()
    row = make_row([("text", 3)], seed=1)
    ids, pixels = torch.cat([row.ids, torch.tensor([IMAGE_TOKEN])])[None], torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    nothing = get_method("random", image_keep_rate=0)
    cache = model(input_ids=ids[:, :-1], use_cache=True, method=nothing).cache
    out = model(input_ids=ids[:, -1:], pixel_values=pixels, cache=cache, use_cache=True, method=nothing)
    whole = model(input_ids=ids, pixel_values=pixels, labels=ids, output_mask=ids < 0, method=nothing)
    assert_same_logits(out.logits[0, -1], whole.logits[0, -1])
    assert torch.equal(cache.record.keep_mask, whole.sparsity.keep_mask) and not cache.record.keep_mask[0, -1]
    assert int(cache.seen_images) == 1 and int(cache.seen_outputs) == 0


def one_token_model():
    config = tiny_config()
    config.vision_config.patch_size, config.image_seq_length = IMAGE_SIZE, 1
    torch.manual_seed(0)
    return DynamicLlavaForConditionalGeneration(config).eval()
