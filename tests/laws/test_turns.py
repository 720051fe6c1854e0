"""Several turns on one live cache equal a recomputation from scratch."""

import torch
from hypothesis import strategies as st

from tests.builders import IMAGE_TOKEN, TOKENS_PER_IMAGE, Row, assert_same_logits, collate, make_row, rows, shared_model
from tests.laws.test_paths import KV_HEADS
from tests.properties import few_or_many, for_all


@st.composite
def conversations(draw):
    """Draw 1-3 rows, each a first prompt, an answer, a second prompt (0-2 new images) and an answer, all ragged."""
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        seed, turns = draw(st.integers(0, 2**20)), []
        for _ in range(2):
            images = draw(st.integers(0, 2))
            segments = [("text", draw(st.integers(1, 4)))]
            for _ in range(images):
                segments += [("image", 0), ("text", draw(st.integers(1, 4)))]
            turns.append([*segments, ("output", draw(st.integers(1, 5)))])
        batch.append((make_row(turns[0] + turns[1], seed), sum(map(length, turns[0])) + 1))
    return batch


def length(segment):
    kind, count = segment
    return TOKENS_PER_IMAGE if kind == "image" else count


def part(row, start, stop):
    """Cut a Row; its pixels are those of the images between start and stop."""
    before = int((row.ids[:start] == IMAGE_TOKEN).sum()) // TOKENS_PER_IMAGE
    inside = int((row.ids[start:stop] == IMAGE_TOKEN).sum()) // TOKENS_PER_IMAGE
    cut = slice(start, stop)
    return Row(row.ids[cut], row.output[cut], row.pixels[before : before + inside], row.keep[cut])


@few_or_many
def test_a_second_turn_on_a_live_cache_equals_recomputation(examples):
    @for_all(examples, conversations(), KV_HEADS)
    @torch.no_grad()
    def check(batch, kv_heads):
        model = shared_model(kv_heads)
        first = collate([part(row, 0, turn) for row, turn in batch], "left")
        second = collate([part(row, turn, None) for row, turn in batch], "left")
        width = first["input_ids"].shape[1]
        both = {
            name: torch.cat([first[name], second[name]], 1) for name in ("attention_mask", "output_mask", "keep_mask")
        }
        # Padding has no position of its own, here also inside the sequence.
        positions = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
        out = model(**first, position_ids=positions[:, :width], use_cache=True)
        out = model(
            input_ids=second["input_ids"],
            pixel_values=second["pixel_values"],
            past_key_values=out.past_key_values,
            position_ids=positions[:, width:],
            use_cache=True,
            **both,
        )
        for index, (row, turn) in enumerate(batch):
            alone = collate([row])
            expected = model(**alone, labels=alone["input_ids"]).logits[0, turn:]
            real = second["attention_mask"][index].bool()
            computed = (second["keep_mask"] | second["output_mask"])[index][real]
            assert_same_logits(out.logits[index][real][computed], expected[computed], what=f"row {index}")
            assert out.sparsity.cache_lengths[index] == row.keep.sum()
            assert out.sparsity.dense_cache_lengths[index] == len(row.ids)


@few_or_many
def test_generate_continues_a_conversation(examples):
    """Turn 2 of generate() on turn 1's cache gives what the whole conversation gives without a cache."""

    @for_all(examples, rows(outputs=(0, 0), most_rows=3, most_images=2), rows(3, 3, 1, (0, 0)), KV_HEADS)
    @torch.no_grad()
    def check(batch, questions, kv_heads):
        model = shared_model(kv_heads)
        first = collate(batch, "left")
        prompt = {name: first[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        call = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        one = model.generate(**prompt, **call)
        new = collate(questions[: len(batch)], "left")
        width = prompt["input_ids"].shape[1]
        ids = torch.cat([one.sequences, new["input_ids"]], 1)
        answered = torch.ones_like(one.sequences[:, width:])
        mask = torch.cat([prompt["attention_mask"], answered, new["attention_mask"]], 1)
        output = torch.zeros_like(mask, dtype=torch.bool)
        output[:, width : one.sequences.shape[1]] = True
        two = {"input_ids": ids, "attention_mask": mask, "output_mask": output}
        cached = model.generate(**two, pixel_values=new["pixel_values"], past_key_values=one.past_key_values, **call)
        pixels = interleave(batch, questions)
        scratch = model.generate(**two, pixel_values=pixels, use_cache=False, **call)
        assert torch.equal(cached.sequences, scratch.sequences)
        assert_same_logits(torch.stack(cached.logits), torch.stack(scratch.logits))


def interleave(batch, questions):
    """Return every image in row order: those of a row's first turn, then those of its second."""
    pixels = torch.cat([torch.cat([row.pixels, later.pixels]) for row, later in zip(batch, questions, strict=False)])
    return pixels if len(pixels) else None
