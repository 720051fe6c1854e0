"""Token ids are LLaVA's own: its slow tokenizer, written out on the sentencepiece library, gives the same ids.

LLaVA tokenises with transformers 4's slow LlamaTokenizer (`use_fast=False`); the library here is transformers 5, whose
LlamaTokenizer is another implementation. The real vocabulary cannot be had in a test, so a SentencePiece model with
LLaMA's options is trained on the spot; docs/tokenizer.md says how to check the real one.
"""

import io
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AddedToken, AutoTokenizer

from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import (
    IGNORED_LABEL,
    SYSTEM,
    conversation_prompt,
    encode_conversation,
    encode_prompt,
)
from dynamic_llava.tiny.world.scenes import sample_scene
from dynamic_llava.tiny.world.texts import STYLES, describe

BOS_ID, PER_IMAGE = 1, 4
SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")
PROMPTS = {
    "one image": f"{SYSTEM} USER: <image>\nWhat color is the ring? ASSISTANT:",
    "two turns": f"{SYSTEM} USER: <image>\nWhat is it? ASSISTANT: A red ring.</s>USER: Sure? ASSISTANT:",
    "several images": "USER: <image>\n<image>\n<image> Which <image>is red? ASSISTANT:",
    "image first": "<image>a red ring",
    "image last": "a red ring <image>",
    "images alone": "<image><image>",
    "nothing": "",
    "unicode": "Größe: 3 m² 🐱, naïve, 中文",
    "spaces": "  two  spaces   three ",
    "space after image": "USER: <image> What is it?",
    "space after answer": "A ring.</s> USER: <image>\n  What?",
    "whitespace alone": " \n \t ",
    "line breaks": "one\ntwo\n\nthree\r\n",
    "written mark": "\u2581a \u2581 b<image>\u2581",
    "special tokens": "<s>a</s></s> b<unk> c<pad>",
    "half a token": "</ <imag e> <|image|> < s>",
}
SNIPPETS = ["a", " ", "  ", "\n", "<image>", "<image>\n", "</s>", "<s>", "Größe", "ring", "The ", "red circle", "🐱"]
SNIPPETS += ["\u2581", "\t", "3", "m²", "<unk>", "<pad>", ".", ", ", "USER:", "ASSISTANT:", "</", "é", "中文", "\u00a0"]


@dataclass(frozen=True)
class Slow:
    """transformers 4's slow LlamaTokenizer and LLaVA's `tokenizer_image_token`, on the sentencepiece library."""

    model: bytes
    legacy: bool
    ids_of_added: dict[str, int]

    def ids(self, prompt):
        """Pieces between images are tokenised one by one; the start token comes once, in front."""
        ids = [BOS_ID]
        for number, piece in enumerate(prompt.split("<image>")):
            ids += [self.ids_of_added["<image>"]] * PER_IMAGE if number else []
            ids += self.piece_ids(piece)
        return ids

    def piece_ids(self, piece):
        """Cut out special tokens, then give SentencePiece what lies between.

        legacy: every such part begins with a word-start. Otherwise the first part alone does, if it is there.
        """
        ids = []
        for number, part in enumerate(re.split(f"({'|'.join(map(re.escape, SPECIALS))})", piece)):
            if part in self.ids_of_added:
                ids.append(self.ids_of_added[part])
            elif part:
                ids += self.encode(part, word_start=self.legacy or number == 0)
        return ids

    def encode(self, part, word_start):
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(self.model)
        proto.normalizer_spec.add_dummy_prefix = word_start
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()).encode(part)


@pytest.fixture(scope="module")
def model():
    """Return a SentencePiece BPE model with LLaMA's options, trained on the tiny world's descriptions."""
    rng = np.random.default_rng(0)
    texts = [describe(sample_scene(rng), style).text for _ in range(150) for style in STYLES]
    texts += [SYSTEM, "USER: What is it? ASSISTANT:", "Größe naïve"] * 20
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=written,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return written.getvalue()


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not-legacy"])
def pair(request, model, tmp_path_factory):
    """Return our processor of a checkpoint with this `legacy` flag, and the slow tokenizer of the same."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(model)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": request.param, "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<image>", "<pad>")])
    vocabulary = tokenizer.get_vocab()
    added = {name: vocabulary[name] for name in (*SPECIALS, "<image>")}
    return DynamicLlavaProcessor(tokenizer, 28, 14), Slow(model, request.param, added)


def ids_of(processor, prompt):
    return encode_prompt(processor.tokenizer, prompt, PER_IMAGE, processor.image_token_id)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_ids_equal_the_slow_tokenizer(pair, prompt):
    processor, slow = pair
    assert ids_of(processor, prompt) == slow.ids(prompt)


def test_ids_of_random_texts_equal_the_slow_tokenizer(pair):
    processor, slow = pair
    draw = random.Random(0)
    for _ in range(400):
        prompt = "".join(draw.choices(SNIPPETS, k=draw.randint(0, 12)))
        assert ids_of(processor, prompt) == slow.ids(prompt), repr(prompt)


def test_the_legacy_flag_matters_and_survives_saving(pair, tmp_path):
    processor, slow = pair
    prompt = PROMPTS["two turns"]
    other = Slow(slow.model, not slow.legacy, slow.ids_of_added)
    assert slow.ids(prompt) != other.ids(prompt), "the comparison would be empty"
    processor.save_pretrained(tmp_path)
    loaded = DynamicLlavaProcessor.from_pretrained(tmp_path)
    assert loaded.tokenizer.legacy is slow.legacy
    for text in PROMPTS.values():
        assert ids_of(loaded, text) == slow.ids(text), repr(text)


@pytest.mark.parametrize(
    "question", ["<image>\nWhat?", "<image> What?", "  What?</s> <image>  \u2581a", "What <image> "]
)
def test_labels_are_the_answers_where_spaces_are_restored(pair, question):
    processor, slow = pair
    turns = [(question, "A red ring."), ("<image> And it?", " Two  rings.")]
    encoded = encode_conversation(processor.tokenizer, turns, PER_IMAGE, processor.image_token_id)
    assert encoded.input_ids == slow.ids(conversation_prompt(turns))
    learned = [processor.tokenizer.decode(encoded.input_ids[start:end]) for start, end in encoded.output_spans]
    assert [text.strip() for text in learned] == ["A red ring.</s>", "Two  rings.</s>"]
    assert sum(end - start for start, end in encoded.output_spans) == sum(
        label != IGNORED_LABEL for label in encoded.labels
    )


def test_the_check_in_the_documentation_runs(pair, tmp_path, capsys):
    processor, slow = pair
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(slow.model)
    page = (Path(__file__).parents[2] / "docs" / "tokenizer.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert 'FOLDER = "checkpoint"' in code
    exec(code.replace('FOLDER = "checkpoint"', f"FOLDER = {str(tmp_path)!r}"), {})
    assert f"5 prompts: the same ids, legacy={slow.legacy}" in capsys.readouterr().out
