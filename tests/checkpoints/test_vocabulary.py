"""<image> and <pad> of an original LLaVA: their ids, their rows, and the tokenizer's."""

import io
import json

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaProcessor

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.checkpoints.vocabulary import extend_vocabulary
from dynamic_llava.processing.folder import load_tokenizer
from tests.builders import build_model
from tests.checkpoints.folders import clip_folder, original_folder, published_folder
from tests.sft_builders import tiny_processor

WORDS = 128
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture(scope="module")
def tokenizer_files():
    """Return a function that writes LLaVA's tokenizer files, with 128 words, into a folder."""
    text = "the quick brown fox jumps over the lazy dog while five boxing wizards move so fast that nobody can see"
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text, text.upper()] * 20),
        model_writer=written,
        model_type="bpe",
        vocab_size=WORDS,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )

    def write(folder, **settings):
        (folder / "tokenizer.model").write_bytes(written.getvalue())
        known = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        known |= {"pad_token": "<unk>", "padding_side": "right", "model_max_length": 2048}
        (folder / "tokenizer_config.json").write_text(json.dumps(known | settings))

    return write


@pytest.mark.parametrize(("flag", "legacy"), [({}, True), ({"legacy": True}, True), ({"legacy": False}, False)])
def test_words_and_rows(model, tmp_path, tokenizer_files, flag, legacy):
    source = original_folder(tmp_path / "source", model, image_token_index=None)
    tokenizer_files(source, **flag)
    new = convert(source, tmp_path / "new")
    weights = load_file(new / "model.safetensors")
    for name in (EMBEDDING, "lm_head.weight"):
        old = model.state_dict()[name]
        assert torch.equal(weights[name][:WORDS], old)
        assert weights[name].shape == (192, 64)
        assert torch.equal(weights[name][WORDS:], old.double().mean(0).float().expand(64, -1))
    processor = DynamicLlavaProcessor.from_pretrained(new)
    assert processor.image_token_id == WORDS and processor.tokenizer.convert_tokens_to_ids("<pad>") == WORDS + 1
    assert processor.pad_token_id == WORDS + 1
    loaded = DynamicLlavaForConditionalGeneration.from_pretrained(new)
    assert loaded.config.image_token_id == WORDS
    assert loaded.generation_config.pad_token_id == WORDS + 1 and loaded.generation_config.eos_token_id == 2
    # The flag decides whether a word-start comes behind a special token.
    tokens = AutoTokenizer.from_pretrained(new).tokenize("</s>the")
    assert (tokens[1][0] == "\u2581") == legacy
    ids = processor.encode_conversation([("<image>\nthe fox", None)]).input_ids
    assert ids.count(WORDS) == processor.tokens_per_image == 16


def test_the_way_to_llava_hf_has_a_processor_of_transformers(model, tmp_path, tokenizer_files):
    source = published_folder(tmp_path / "source", model, image_token_index=None)
    tokenizer_files(source)
    new = convert(source, tmp_path / "new", to="llava-hf")
    assert "DynamicLlava" not in "".join(path.read_text() for path in new.glob("*.json"))
    processor = LlavaProcessor.from_pretrained(new)
    assert processor.image_token_id == WORDS and processor.patch_size == 14
    ours = convert(new, tmp_path / "ours")
    assert DynamicLlavaProcessor.from_pretrained(ours).image_token_id == WORDS
    assert load_file(ours / "model.safetensors")[EMBEDDING].shape == (192, 64)


def test_the_tokenizer_of_a_vision_tower_is_not_taken(model, tmp_path, tokenizer_files):
    source = original_folder(tmp_path / "source", model, without=["model.vision_tower."])
    tower = clip_folder(tmp_path / "clip", model, full=True)
    tokenizer_files(tower)
    new = convert(source, tmp_path / "new", vision_tower=tower)
    assert not (new / "tokenizer.json").exists()


def test_words_that_are_there_keep_their_place(model, tmp_path):
    new = convert(original_folder(tmp_path / "source", model, image_token_index=7), tmp_path / "new")
    config = json.loads((new / "config.json").read_text())
    assert config["image_token_index"] == 7 and config["text_config"]["vocab_size"] == WORDS
    assert not (new / "tokenizer.json").exists() and (new / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("values", "rows", "expected"),
    [({}, 32000, (32064, 32000)), ({}, 32064, (32128, 32064)), ({"image_token_index": 31999}, 32000, (32000, 31999))],
)
def test_rows_without_a_tokenizer(values, rows, expected):
    found = extend_vocabulary(values, rows, None, 0)
    assert (found.rows, found.image_id) == expected and found.pad_id == 0


def test_a_tokenizer_of_another_model(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path)
    with pytest.raises(ValueError, match="knows 128 words and the model 100"):
        extend_vocabulary({}, 100, AutoTokenizer.from_pretrained(tmp_path), 0)


def test_a_tokenizer_that_contradicts_the_configuration(tmp_path, tokenizer_files):
    tokenizer_files(tmp_path)
    with pytest.raises(ValueError, match="image token 7 and the tokenizer's <image> is not there"):
        extend_vocabulary({"image_token_index": 7}, WORDS, AutoTokenizer.from_pretrained(tmp_path), 0)


def test_a_tokenizer_that_panics_is_named(model, tmp_path):
    """A panic of the library in Rust is no Exception: the template of its texts asks for a token that it lacks."""
    source = original_folder(tmp_path / "source", model, image_token_index=None)
    tiny_processor().save_pretrained(source)
    path = source / "tokenizer.json"
    values = json.loads(path.read_text())
    values["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"the tokenizer in {source} cannot be read"):
        convert(source, tmp_path / "new")
    with pytest.raises(ValueError, match=f"the tokenizer of {source} cannot be read"):
        load_tokenizer(source)


@pytest.mark.parametrize("damage", [b"nothing", None])
def test_a_damaged_tokenizer_is_named(model, tmp_path, tokenizer_files, damage):
    """Also one whose damage shows at the first text: a longest length that is no number."""
    source = original_folder(tmp_path / "source", model, image_token_index=None)
    tokenizer_files(source)
    if damage is not None:
        (source / "tokenizer.model").write_bytes(damage)
    else:
        path = source / "tokenizer_config.json"
        settings = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(settings | {"model_max_length": [[]]}))
    with pytest.raises(ValueError, match=f"the tokenizer in {source} cannot be read"):
        convert(source, tmp_path / "new")
