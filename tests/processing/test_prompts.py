"""vicuna_v1: the exact text, and LLaVA's own masking written out a second time as it stands in its `preprocess_v1`."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dynamic_llava.processing.prompts import (
    PLAIN,
    SYSTEM,
    ImageCutError,
    RenderingError,
    conversation_prompt,
    encode_conversation,
    encode_prompt,
)

PER_IMAGE, IMAGE_ID, IGNORED = 6, 5, -100
CONVERSATIONS = {
    "one turn": [("<image>\nWhat is it?", "A small cat.")],
    "three turns": [("<image>\nWhat is it?", "A cat."), ("Sure?", "Yes, a cat on a mat."), ("Why?", "It purrs.")],
    "no image": [("What is a cat?", "A small animal."), ("Is it big?", "No.")],
    "two images": [("<image>\n<image>\nWhich one is a cat?", "The first."), ("And the other?", "A dog.")],
    "other letters": [("<image>\nWas ist das?", "Größe: 3 m² 🐱, naïve")],
}


@pytest.fixture(scope="module")
def llama_like():
    """A byte-fallback BPE tokenizer in the manner of LLaMA's: every piece of text begins with a space mark."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token reaches over two words
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<used>", "<picture>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials)
    texts = [text for turns in CONVERSATIONS.values() for turn in turns for text in turn]
    backend.train_from_iterator([SYSTEM, "USER: ASSISTANT:", *texts] * 4, trainer)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    assert tokenizer("ab").input_ids[0] == 1
    return tokenizer


def test_text_is_vicuna_v1():
    expected = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
        "USER: Sure? ASSISTANT: Yes.</s>"
    )
    assert conversation_prompt([("<image>\nWhat is it?", "A cat."), ("Sure?", "Yes.")]) == expected


def test_an_open_question_ends_in_the_role():
    assert conversation_prompt([("Who?", None)]) == f"{SYSTEM} USER: Who? ASSISTANT:"
    text = conversation_prompt([("Who?", "I."), ("Why?", None)])
    assert text.endswith("ASSISTANT: I.</s>USER: Why? ASSISTANT:")


def llava_tokenizer_image_token(prompt, tokenizer):
    """Repeat llava/mm_utils.py: pieces between images, the start token once, each image as -200."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    ids = chunks[0][:1]
    for number, chunk in enumerate(chunks):
        ids += ([-200] if number else []) + chunk[1:]
    return ids


def llava_preprocess_v1(prompt, tokenizer):
    """Repeat llava/train/train.py: labels by counting the tokens of every round (legacy tokenizer)."""
    ids = llava_tokenizer_image_token(prompt, tokenizer)
    target, separator, current = list(ids), " ASSISTANT: ", 1
    target[:1] = [IGNORED]
    for conversation_round in prompt.split("</s>"):
        if conversation_round == "":
            break
        parts = conversation_round.split(separator)
        assert len(parts) == 2
        length = len(llava_tokenizer_image_token(conversation_round, tokenizer))
        instruction = len(llava_tokenizer_image_token(parts[0] + separator, tokenizer)) - 2
        target[current : current + instruction] = [IGNORED] * instruction
        current += length
    assert current == len(ids), "LLaVA would print a tokenization mismatch"
    return ids, target


def expand(values, ids, filler):
    """Return `values` with each image place of `ids` widened to the image's tokens."""
    wide = [[filler] * PER_IMAGE if token == -200 else [value] for token, value in zip(ids, values, strict=True)]
    return [value for values in wide for value in values]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_labels_equal_llava(llama_like, name):
    turns = CONVERSATIONS[name]
    ids, target = llava_preprocess_v1(conversation_prompt(turns), llama_like)
    encoded = encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID)
    assert encoded.input_ids == expand(ids, ids, IMAGE_ID)
    assert encoded.labels == expand(target, ids, IGNORED)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_spans_are_the_answers(llama_like, name):
    turns = CONVERSATIONS[name]
    encoded = encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID)
    texts = [llama_like.decode(encoded.input_ids[start:end]) for start, end in encoded.output_spans]
    assert [text.strip() for text in texts] == [f"{answer}</s>" for _, answer in turns]
    learned = {i for start, end in encoded.output_spans for i in range(start, end)}
    assert learned == {i for i, label in enumerate(encoded.labels) if label != IGNORED}


def test_prompt_ids_are_the_beginning_of_the_conversation(llama_like):
    turns = [("<image>\nWhat is it?", "A cat.")]
    prompt = encode_prompt(llama_like, conversation_prompt([(turns[0][0], None)]), PER_IMAGE, IMAGE_ID)
    encoded = encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.output_spans[0][0] == len(prompt)


def test_text_is_cut_at_its_end(llama_like):
    turns = CONVERSATIONS["three turns"]
    whole = encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID)
    limit = whole.output_spans[1][0] + 2
    cut = encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID, max_length=limit)
    assert cut.shortened and not whole.shortened
    assert cut.input_ids == whole.input_ids[:limit] and cut.labels == whole.labels[:limit]
    assert cut.output_spans == [whole.output_spans[0], (limit - 2, limit)]


def test_an_image_is_never_cut(llama_like):
    turns = CONVERSATIONS["one turn"]
    ids = encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID).input_ids
    first = ids.index(IMAGE_ID)
    for limit in (first, first + 1, first + PER_IMAGE - 1):
        with pytest.raises(ImageCutError, match=f"max_length={limit}"):
            encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID, max_length=limit)
    kept = encode_conversation(llama_like, turns, PER_IMAGE, IMAGE_ID, max_length=first + PER_IMAGE)
    assert kept.output_spans == [] and set(kept.labels) == {IGNORED}


def test_mistakes_are_named(llama_like):
    with pytest.raises(ValueError, match="at least one"):
        conversation_prompt([])
    with pytest.raises(ValueError, match="turn 0 of 2 has no answer"):
        conversation_prompt([("a", None), ("b", "c")])
    with pytest.raises(ValueError, match="answer of turn 0 holds '<image>'"):
        conversation_prompt([("a", "<image>")])
    with pytest.raises(ValueError, match="fast tokenizer"):
        encode_prompt(object(), "a", PER_IMAGE, IMAGE_ID)


@pytest.mark.parametrize("question", ["<image>", "<image>\nWrite a terse description.", "Say it briefly.\n<image>"])
def test_plain_is_llavas_first_stage(llama_like, question):
    """LLaVA's preprocess_plain: start token, image, caption and a line break, of which the last two are learned."""
    caption = "a cat on a mat "
    learned = llama_like(caption + "\n").input_ids[1:]
    found = encode_conversation(llama_like, [(question, caption)], PER_IMAGE, IMAGE_ID, form=PLAIN)
    assert found.input_ids == [1, *[IMAGE_ID] * PER_IMAGE, *learned]
    assert found.labels == [IGNORED] * (1 + PER_IMAGE) + learned
    assert found.output_spans == [(1 + PER_IMAGE, len(found.input_ids))]
    assert conversation_prompt([(question, caption)], form=PLAIN) == f"<image>{caption}\n"


@pytest.mark.parametrize(
    ("turns", "system", "words"),
    [
        ([("What is a cat?", "An animal.")], None, "1 turns, 0 images and no system text"),
        ([("<image>\n<image>\nWhich?", "Both.")], None, "1 turns, 2 images"),
        (CONVERSATIONS["three turns"], None, "3 turns, 1 images"),
        (CONVERSATIONS["one turn"], "Be kind.", "1 images and a system text"),
    ],
)
def test_plain_takes_one_image_and_its_caption(turns, system, words):
    with pytest.raises(RenderingError, match=words):
        conversation_prompt(turns, system, PLAIN)
