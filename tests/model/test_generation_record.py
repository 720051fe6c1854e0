"""What `generate` says it kept: as many columns as were fed, the masked forward's decisions, lengths that are sums."""

from threading import Thread

import pytest
import torch
from torch.nn.functional import pad
from transformers import TextIteratorStreamer, TextStreamer

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor, SparsityRecord
from dynamic_llava.layout import after_end
from dynamic_llava.model import AdmissionCache
from dynamic_llava.processing.prompts import conversation_prompt
from dynamic_llava.tiny import BASE_WEIGHTS
from dynamic_llava.tiny.world.scenes import sample_pictures
from tests.builders import IMAGE_TOKEN, LAYERS, TOKENS_PER_IMAGE, collate, fixed_rows, prompts, shared_model

CALL = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
WAYS = {
    "greedy": {},
    "uncached": {"use_cache": False},
    "sampling": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "uncached beams": {"num_beams": 2, "use_cache": False},
}


def an_end(model, inputs):
    """Return a token that some greedy answers hold in their middle and others nowhere."""
    answers = model.generate(**inputs, **CALL).sequences[:, inputs["input_ids"].shape[1] :].tolist()
    inside = [
        token for row in answers for token in row[1:-2] if sum(token in other for other in answers) < len(answers)
    ]
    return inside[0]


def masked_decisions(model, sequences, attention_mask, output, pixels, end=None):
    """Return the record of one masked forward over what was fed: all columns but the last, fillers switched off."""
    fed, output = sequences[:, :-1], output[:, : sequences.shape[1] - 1]
    valid = pad(attention_mask, (0, fed.shape[1] - attention_mask.shape[1]), value=1).bool()
    if end is not None:
        valid = valid & ~after_end(fed, output, torch.tensor([end]))
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    return model(
        input_ids=fed, attention_mask=valid.long(), output_mask=output, pixel_values=pixels, labels=fed,
        position_ids=positions,
    ).sparsity  # fmt: skip


def assert_is_record_of(record, expected, cached):
    layout = record.layout
    for kind in ("valid", "image", "output"):
        assert torch.equal(getattr(layout, kind), getattr(expected.layout, kind)), kind
    assert torch.equal(record.keep_mask.bool(), expected.keep_mask.bool())
    kept = record.keep_mask[layout.output].float().mean()
    assert 0.1 < kept < 0.9, "decisions that are all alike would compare little"
    assert not cached or torch.equal(record.cache_lengths, record.keep_mask.sum(1))
    assert not cached or torch.equal(record.dense_cache_lengths, layout.valid.sum(1))


def images_by_row(inputs, copies=1):
    per_row = (inputs["input_ids"] == IMAGE_TOKEN).sum(1) // TOKENS_PER_IMAGE
    return torch.cat([row for row in inputs["pixel_values"].split(per_row.tolist()) for _ in range(copies)])


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_record_is_the_masked_forward_of_what_was_fed(way):
    """Left-padded ragged rows, no to three images each, some of them ended early."""
    model, inputs = shared_model(), prompts(fixed_rows(seed=21, output=0))
    end = an_end(model, inputs)
    torch.manual_seed(5)
    out = model.generate(**inputs, **{**CALL, **WAYS[way]}, eos_token_id=end, pad_token_id=0)
    copies = WAYS[way].get("num_return_sequences", 1)
    output = torch.zeros_like(out.sequences, dtype=torch.bool)
    output[:, inputs["input_ids"].shape[1] :] = True
    mask = inputs["attention_mask"].repeat_interleave(copies, 0)
    expected = masked_decisions(model, out.sequences, mask, output, images_by_row(inputs, copies), end)
    assert_is_record_of(out.sparsity, expected, cached="uncached" not in way)
    ended = [len(row) for row in out.sparsity.output_decisions]
    assert min(ended) < CALL["max_new_tokens"] - 1 or way != "greedy", ended


@torch.no_grad()
def test_beams_on_a_given_empty_cache_have_a_record():
    model, inputs = shared_model(), prompts(fixed_rows(seed=22, output=0))
    given = model.generate(**inputs, **CALL, num_beams=2, cache=AdmissionCache(LAYERS, 2))
    own = model.generate(**inputs, **CALL, num_beams=2)
    assert torch.equal(given.sequences, own.sequences)
    assert torch.equal(given.sparsity.keep_mask, own.sparsity.keep_mask)


@torch.no_grad()
def test_a_second_turn_on_a_kept_cache_records_the_whole_conversation():
    """Rows of the first turn end at different steps; the second turn brings images to some rows and none to others."""
    model, first = shared_model(), prompts(fixed_rows(seed=23, output=0))
    end = an_end(model, first)
    one = model.generate(**first, **CALL, eos_token_id=end, pad_token_id=0)
    later = collate([fixed_rows(seed=24, output=0)[index] for index in (1, 0, 3, 2)], "left")
    ids = torch.cat([one.sequences, later["input_ids"]], 1)
    width, answered = first["input_ids"].shape[1], one.sequences.shape[1]
    output = torch.zeros_like(ids, dtype=torch.bool)
    output[:, width:answered] = True
    mask = pad(first["attention_mask"], (0, answered - width), value=1)
    mask = mask * ~after_end(ids, output, torch.tensor([end]))[:, :answered]
    mask = torch.cat([mask, later["attention_mask"]], 1)
    two = model.generate(
        input_ids=ids, attention_mask=mask, output_mask=output, pixel_values=later["pixel_values"], cache=one.cache,
        **CALL,
    )  # fmt: skip
    pixels = zip(split_rows(first), split_rows(later), strict=True)
    output = pad(output, (0, CALL["max_new_tokens"]), value=True)
    both = torch.cat([torch.cat(pair) for pair in pixels])
    expected = masked_decisions(model, two.sequences, mask, output, both)
    assert_is_record_of(two.sparsity, expected, cached=True)
    assert torch.equal(two.sparsity.keep_mask[:, : answered - 1], one.sparsity.keep_mask), "decisions are for ever"
    assert [len(row) for row in two.sparsity.image_indices] == [1, 1, 5, 5]


def split_rows(inputs):
    per_row = (inputs["input_ids"] == IMAGE_TOKEN).sum(1) // TOKENS_PER_IMAGE
    return inputs["pixel_values"].split(per_row.tolist())


@torch.no_grad()
def test_the_record_follows_the_rows_of_its_cache():
    """Repeated rows of a kept cache go on with the record of the row they were."""
    model, inputs = shared_model(), prompts(fixed_rows(seed=25, output=0))
    out = model.generate(**inputs, **CALL)
    cache, before = out.cache, out.sparsity
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([6, 1]))
    assert torch.equal(cache.record.keep_mask, before.keep_mask[[3, 0]])
    assert torch.equal(cache.record.layout.is_image, before.layout.is_image[[3, 0]])
    assert torch.equal(cache.record.cache_lengths, cache.record.keep_mask.sum(1))
    cache.reset()
    assert cache.record is None


@torch.no_grad()
def test_rows_are_plain_numbers_and_the_text_says_the_same():
    model, inputs = shared_model(), prompts(fixed_rows(seed=26, output=0))
    record = model.generate(**inputs, **CALL).sparsity
    for number, row in enumerate(record.rows):
        assert row.image_indices == [kept.tolist() for kept in record.image_indices[number]]
        assert row.output_decisions == record.output_decisions[number].tolist()
        prompt = int(inputs["attention_mask"][number].sum()) - TOKENS_PER_IMAGE * len(row.image_indices)
        kept = sum(map(len, row.image_indices)) + sum(row.output_decisions)
        assert row.cache_length == prompt + kept
        assert row.dense_cache_length == int(inputs["attention_mask"][number].sum()) + CALL["max_new_tokens"] - 1
    lines = repr(record).split("\n")
    assert lines[0] == f"SparsityRecord of 4 x {record.keep_mask.shape[1]} tokens" and len(lines) == 5
    row = record.rows[3]
    assert lines[4] == (
        f"  row 3: kept 4, 4 of 16 tokens per image; kept {sum(row.output_decisions)} of 8 output tokens; "
        f"cache {row.cache_length} tokens, below the sparse layer {row.dense_cache_length}"
    )
    uncached = model.generate(**inputs, **CALL, use_cache=False).sparsity.rows[0]
    assert (uncached.cache_length, uncached.dense_cache_length) == (None, None)


def test_nothing_cannot_be_joined():
    with pytest.raises(ValueError, match="no pass has been run"):
        SparsityRecord.joined([])


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(BASE_WEIGHTS).eval()
    processor = DynamicLlavaProcessor.from_pretrained(BASE_WEIGHTS)
    _, pictures = sample_pictures(2, (7,))
    return model, processor, [picture.pixels for picture in pictures]


def described(processor, pixels, rows=1):
    from PIL import Image

    text = conversation_prompt([("<image>\nDescribe the image in detail.", None)])
    return processor(text=[text] * rows, images=[Image.fromarray(pixels[row]) for row in range(rows)])


@pytest.mark.parametrize("sparsity", ["both", "none"])
def test_streamed_text_is_the_answer(tiny, sparsity, capsys):
    model, processor, pixels = tiny
    inputs, options = described(processor, pixels), {"skip_prompt": True, "skip_special_tokens": True}
    call = {"max_new_tokens": 40, "do_sample": False, "sparsity": sparsity}
    plain = model.generate(**inputs, **call)
    answer = processor.decode(plain[0, inputs["input_ids"].shape[1] :])
    assert len(answer.split()) > 3
    printed = model.generate(**inputs, **call, streamer=TextStreamer(processor.tokenizer, **options))
    assert torch.equal(printed, plain)
    assert capsys.readouterr().out.strip() == answer.strip()
    pieces = TextIteratorStreamer(processor.tokenizer, timeout=60, **options)
    thread = Thread(target=model.generate, kwargs={**inputs, **call, "streamer": pieces})
    thread.start()
    words = list(pieces)
    thread.join()
    assert "".join(words).strip() == answer.strip() and len(words) > 3


def test_a_streamer_takes_one_row_only(tiny):
    model, processor, pixels = tiny
    inputs = described(processor, pixels, rows=2)
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**inputs, max_new_tokens=2, streamer=TextStreamer(processor.tokenizer))
