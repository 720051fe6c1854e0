"""Prepared samples equal freshly encoded ones; preparation happens once; batches are what the model expects."""

import json

import pytest
import torch

from dynamic_llava.config import DataConfig
from dynamic_llava.data import FILLER, Collator, SftDataset, UnreadError
from tests.builders import IMAGE_TOKEN, TOKENS_PER_IMAGE, build_model
from tests.sft_builders import conversation, picture, tiny_processor, write_data

IGNORED = -100


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def mixed(tmp_path):
    """One image, two images and two turns, no image, and a long text."""
    (tmp_path / "images").mkdir()
    for name in "ab":
        picture(ord(name)).save(tmp_path / "images" / f"{name}.png")
    entries = [
        {"id": "single", "image": "a.png", "conversations": conversation()},
        {
            "id": "double",
            "image": ["a.png", "b.png"],
            "conversations": conversation("<image>\n<image>\nSame?", "No.", "Sure?", "Quite sure."),
        },
        {"id": "text", "conversations": conversation("Who?", "I.")},
        {"id": "long", "image": "b.png", "conversations": conversation("<image>\nWhat?", "x" * 150)},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def config(folder, **changes):
    values = {"json": str(folder / "data.json"), "image_folder": str(folder / "images"), "max_length": 400, **changes}
    return DataConfig(**values)


def test_samples_equal_a_fresh_encoding(mixed, processor):
    dataset = SftDataset(config(mixed, text_only="dense"), processor)
    raw = json.loads((mixed / "data.json").read_text())
    assert len(dataset) == 4
    for number, entry in enumerate(raw):
        texts = [message["value"] for message in entry["conversations"]]
        encoded = processor.encode_conversation(list(zip(texts[::2], texts[1::2], strict=True)), max_length=400)
        sample = dataset[number]
        assert sample["input_ids"].tolist() == encoded.input_ids
        assert sample["labels"].tolist() == encoded.labels
        assert sample["spans"] == encoded.output_spans
        assert sample["sample_id"] == number
        assert dataset.lengths[number] == len(encoded.input_ids)
    both = processor.preprocess_images([picture(ord("a")), picture(ord("b"))])
    assert torch.equal(dataset[1]["pixel_values"], both)
    assert dataset[2]["pixel_values"].shape == (0, 3, 56, 56)


def test_left_out_and_shortened_samples_are_counted(mixed, processor):
    length = len(SftDataset(config(mixed), processor)[1]["input_ids"])
    dataset = SftDataset(config(mixed, max_length=length - 30), processor)
    assert [dataset[i]["sample_id"] for i in range(len(dataset))] == [0, 1, 3]
    counts = dataset.counts
    assert (counts.total, counts.used, counts.text_only_skipped, counts.shortened) == (4, 3, 1, 2)
    image_end = int((dataset[0]["input_ids"] == IMAGE_TOKEN).nonzero().max()) + 1
    tight = SftDataset(config(mixed, max_length=image_end), processor)
    assert tight.counts.image_would_be_cut == 1 and tight.counts.nothing_learned == 2
    assert "1 text-only skipped, 1 with an image cut" in str(tight.counts)
    with pytest.raises(ValueError, match="no sample is left to train on: 0 of 4"):
        SftDataset(config(mixed, max_length=50), processor)


def test_preparation_happens_once_and_again_after_a_change(mixed, processor, own_cache, monkeypatch):
    SftDataset(config(mixed), processor)
    with monkeypatch.context() as patched:
        patched.setattr("dynamic_llava.data.prepare._write_rows", lambda *_: pytest.fail("prepared twice"))
        assert len(SftDataset(config(mixed), processor)) == 3
    entries = json.loads((mixed / "data.json").read_text())
    (mixed / "data.json").write_text(json.dumps(entries[:2]))
    assert len(SftDataset(config(mixed), processor)) == 2
    assert not list(own_cache.rglob("*.part"))


def test_a_failed_preparation_leaves_nothing_behind(mixed, processor, own_cache):
    (mixed / "images" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"data\.json: 2 of 4 samples cannot be used .*\n  index 1, id 'double'"):
        SftDataset(config(mixed), processor)
    assert {path.suffix for path in own_cache.rglob("*") if path.is_file()} == {".lock"}
    assert not list((own_cache / "sft").glob("*.part"))


def test_the_filler_teaches_nothing(mixed, processor):
    dataset = SftDataset(config(mixed), processor)
    filler = dataset[FILLER]
    assert filler["sample_id"] == FILLER and not filler["spans"] and not len(filler["pixel_values"])
    batch = Collator(processor)([filler, dataset[0], filler])
    assert batch["sample_ids"].tolist() == [FILLER, 0, FILLER]
    assert (batch["labels"][::2] == IGNORED).all() and not batch["output_mask"][::2].any()
    assert batch["attention_mask"][::2].any(dim=1).all(), "a row of padding alone would attend to nothing"


def test_blank_answers_are_counted_and_not_learned(mixed, processor):
    entries = [
        {"id": "blank", "image": "a.png", "conversations": conversation("<image>\nWhat?", " ")},
        {"id": "half", "image": "a.png", "conversations": conversation("<image>\nWhat?", "", "Sure?", "Yes.")},
    ]
    (mixed / "data.json").write_text(json.dumps(entries))
    dataset = SftDataset(config(mixed), processor)
    assert (dataset.counts.blank_answers, dataset.counts.nothing_learned) == (2, 1)
    assert "2 blank answers" in str(dataset.counts)
    assert (dataset[0]["labels"] == IGNORED).all()
    learned = dataset[1]["input_ids"][dataset[1]["labels"] != IGNORED]
    assert processor.decode(learned).replace(" ", "") == "Yes."


def test_pictures_under_another_ending_are_read(mixed, processor):
    """OCR-VQA's covers are GIF and PNG files, all named .jpg in the published list."""
    for number, kind in enumerate(("GIF", "PNG", "WEBP")):
        picture(number).save(mixed / "images" / f"{number}.jpg", format=kind)
    entries = [{"id": n, "image": f"{n}.jpg", "conversations": conversation()} for n in range(3)]
    (mixed / "data.json").write_text(json.dumps(entries))
    dataset = SftDataset(config(mixed), processor)
    assert {dataset[number]["pixel_values"].shape for number in range(3)} == {(1, 3, 56, 56)}


def test_an_image_that_breaks_later_is_named(mixed, processor):
    dataset = SftDataset(config(mixed), processor)
    (mixed / "images" / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"data\.json, index 0, id 'single': .*a\.png is no image"):
        dataset[0]
    (mixed / "images" / "a.png").unlink()
    with pytest.raises(UnreadError, match=r"index 1, id 'double': image 'a\.png' is missing"):
        dataset[1]


def test_images_are_kept_in_memory_up_to_a_limit(mixed, processor, monkeypatch):
    dataset = SftDataset(config(mixed, cache_images=1), processor)
    first = dataset[0]["pixel_values"]
    calls = []
    original = type(processor).preprocess_images
    monkeypatch.setattr(type(processor), "preprocess_images", lambda self, i: calls.append(i) or original(self, i))
    assert torch.equal(dataset[0]["pixel_values"], first) and not calls
    dataset[2]
    dataset[0]
    assert len(calls) == 2 and len(dataset._images) == 1


@pytest.mark.parametrize("segments", ["last", "all"])
def test_batches(mixed, processor, segments):
    dataset = SftDataset(config(mixed, text_only="dense"), processor)
    samples = [dataset[number] for number in range(4)]
    batch = Collator(processor, segments)(samples)
    longest = max(len(sample["input_ids"]) for sample in samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["output_mask"].shape == (4, longest)
    assert batch["attention_mask"].sum(1).tolist() == [len(sample["input_ids"]) for sample in samples]
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    assert batch["sample_ids"].tolist() == [0, 1, 2, 3]
    assert batch["pixel_values"].shape[0] * TOKENS_PER_IMAGE == (batch["input_ids"] == IMAGE_TOKEN).sum()
    learned = batch["labels"] != IGNORED
    assert torch.equal(batch["output_mask"][0], learned[0])
    assert not batch["output_mask"][2].any(), "a text-only row stays dense"
    sparse = Collator(processor, segments, sparse_text=True)(samples)["output_mask"]
    assert torch.equal(sparse[2], learned[2]) and sparse[2].any() and torch.equal(sparse[:2], batch["output_mask"][:2])
    first, second = samples[1]["spans"]
    marked = batch["output_mask"][1].nonzero().flatten().tolist()
    assert marked == [*(range(*first) if segments == "all" else ()), *range(*second)]
    assert "pixel_values" not in Collator(processor)(samples[2:3])


@pytest.mark.parametrize("segments", ["last", "all"])
def test_the_model_agrees_about_output_tokens(mixed, processor, segments):
    """Without an output mask the model takes the labelled runs: the collator's mask says the same."""
    dataset = SftDataset(config(mixed), processor)
    batch = Collator(processor, segments)([dataset[number] for number in range(3)])
    batch.pop("sample_ids")
    model = build_model(output_segments=segments)
    given = model(**batch).sparsity
    derived = model(**{name: value for name, value in batch.items() if name != "output_mask"}).sparsity
    assert torch.equal(given.layout.output, derived.layout.output)


def test_an_ordinary_folder_of_data(tmp_path, processor):
    file, images = write_data(tmp_path, samples=5)
    dataset = SftDataset(DataConfig(json=str(file), image_folder=str(images)), processor)
    assert len(dataset) == 5 and str(dataset.counts).startswith("5 of 5 samples")
