"""The processor: both padding sides, image counts, and the folder it is loaded from."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlavaProcessor

from dynamic_llava.processing import DynamicLlavaProcessor
from tests.builders import IMAGE_SIZE, IMAGE_TOKEN, PAD, TOKENS_PER_IMAGE, build_model
from tests.sft_builders import character_tokenizer, picture, tiny_processor, write_checkpoint


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_chosen_side(processor, side):
    batch = processor(["<image>ab", "abc"], picture(), padding_side=side)
    row = [1, *[IMAGE_TOKEN] * TOKENS_PER_IMAGE, *processor.tokenizer("ab", add_special_tokens=False).input_ids]
    assert batch["input_ids"][0].tolist() == row
    filler = len(row) - 4
    short = processor.tokenizer("abc").input_ids
    expected = [PAD] * filler + short if side == "left" else short + [PAD] * filler
    assert batch["input_ids"][1].tolist() == expected
    assert torch.equal(batch["attention_mask"][1].bool(), torch.tensor(expected) != PAD)
    assert batch["pixel_values"].shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_text_or_images_alone(processor, tmp_path):
    assert set(processor("abc")) == {"input_ids", "attention_mask"}
    picture().save(tmp_path / "a.png")
    only = processor(images=[picture(), tmp_path / "a.png"])
    assert set(only) == {"pixel_values"}
    assert torch.equal(only["pixel_values"][0], only["pixel_values"][1]), "a path is as good as an opened image"
    with pytest.raises(ValueError, match="neither text nor images"):
        processor()


def test_flat_and_nested_images_agree(processor):
    texts, images = ["<image>a<image>", "b", "<image>c"], [picture(seed) for seed in range(3)]
    flat = processor(texts, images)
    nested = processor(texts, [images[:2], [], images[2:]])
    assert all(torch.equal(flat[name], nested[name]) for name in flat)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, r"0 images were given for 2 <image> places \(per text: \[1, 0, 1\]\)"),
        ([0, 1, 2], "3 images were given for 2"),
        ([[0], [1], []], r"images per row \[1, 1, 0\] do not match the <image> places per text \[1, 0, 1\]"),
        ([[0], []], r"\[1, 0\] do not match"),
    ],
)
def test_a_wrong_number_of_images_is_named(processor, images, message):
    def pictures(values):
        return [pictures(value) if isinstance(value, list) else picture(value) for value in values]

    with pytest.raises(ValueError, match=message):
        processor(["<image>a", "b", "c<image>"], images if images is None else pictures(images))


def test_wrong_settings_are_named(processor):
    with pytest.raises(ValueError, match="padding_side='top'"):
        processor("a", padding_side="top")
    with pytest.raises(ValueError, match="return_tensors='tf'"):
        processor("a", return_tensors="tf")
    with pytest.raises(ValueError, match="empty list of texts"):
        processor([])
    with pytest.raises(ValueError, match="image_size=50 is not a positive multiple of patch_size=14"):
        DynamicLlavaProcessor(character_tokenizer(), 50, 14)
    with pytest.raises(ValueError, match="feature_select='cls'"):
        DynamicLlavaProcessor(character_tokenizer(), 56, 14, feature_select="cls")


def test_decoding_leaves_image_and_special_tokens_out(processor):
    ids = processor("<image>ab</s>", picture())["input_ids"]
    assert processor.decode(ids[0]).replace(" ", "") == "ab"
    assert processor.batch_decode(ids.tolist(), skip_special_tokens=False)[0].replace(" ", "") == "<s>ab</s>"


def test_the_class_token_can_be_counted():
    assert DynamicLlavaProcessor(character_tokenizer(), 56, 14, feature_select="full").tokens_per_image == 17


@pytest.mark.parametrize("with_model", [True, False])
def test_saved_folder_gives_the_same_processor(tmp_path, with_model):
    saved = DynamicLlavaProcessor(character_tokenizer(), 56, 14, image_mean=(0.1, 0.2, 0.3), image_std=(1, 2, 3))
    if with_model:
        build_model().save_pretrained(tmp_path)
    saved.save_pretrained(tmp_path)
    loaded = DynamicLlavaProcessor.from_pretrained(tmp_path)
    first, second = saved("<image>ab", picture()), loaded("<image>ab", picture())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.tokens_per_image == build_model().model.tokens_per_image == TOKENS_PER_IMAGE


def test_a_cropping_preprocessor_config_still_pads(tmp_path):
    """llava-hf folders say CLIPImageProcessor, which crops; LLaVA-1.5 itself pads."""
    write_checkpoint(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    old = {"image_processor_type": "CLIPImageProcessor", "crop_size": 56, "size": {"shortest_edge": 56}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    wide = picture(size=(90, 30))
    assert torch.equal(
        DynamicLlavaProcessor.from_pretrained(tmp_path)(images=wide)["pixel_values"],
        tiny_processor()(images=wide)["pixel_values"],
    )


def test_contradicting_or_missing_files_are_named(tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "crop_size": {"height": 70, "width": 70}}))
    with pytest.raises(ValueError, match="makes images of 70 pixels and the vision tower sees 56"):
        DynamicLlavaProcessor.from_pretrained(tmp_path)
    file.write_text(json.dumps({**values, "rescale_factor": 1.0}))
    with pytest.raises(ValueError, match=r"rescale_factor=1\.0"):
        DynamicLlavaProcessor.from_pretrained(tmp_path)
    for wrong in ([[None], 0.5, 0.5], [[0.5], [0.5], [0.5]], "0.5", [True, 0.5, 0.5], [10**400, 0.5, 0.5]):
        file.write_text(json.dumps({**values, "image_std": wrong}))
        with pytest.raises(ValueError, match=r"preprocessor_config\.json of .*image_std=.*give three numbers"):
            DynamicLlavaProcessor.from_pretrained(tmp_path)
    file.write_text(json.dumps({**values, "crop_size": "\ud800"}))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json holds half a character"):
        DynamicLlavaProcessor.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        DynamicLlavaProcessor.from_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds neither config"):
        DynamicLlavaProcessor.from_pretrained(tmp_path / "empty")


def test_transformers_reads_the_same_folder(tmp_path):
    write_checkpoint(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("ab").input_ids == character_tokenizer()("ab").input_ids
    theirs = LlavaProcessor.from_pretrained(tmp_path)(text="<image>ab", images=picture(), return_tensors="pt")
    ours = tiny_processor()("<image>ab", picture())
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
