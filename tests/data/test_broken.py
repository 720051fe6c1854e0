"""Images that are missing or cannot be read: found where a file's header tells, refused, or left out openly."""

import json
import logging
import os

import pytest
import yaml

from dynamic_llava.config import DataConfig, SparsityConfig
from dynamic_llava.data import SftDataset, UnreadError, chunks, prepare
from dynamic_llava.data.__main__ import main
from dynamic_llava.data.check import check
from dynamic_llava.processing.images import check_header, load_image
from tests.sft_builders import conversation, picture, tiny_processor

GOOD = ["0.png", "1.png"]


def missing(folder):
    return "gone.png"


def in_a_missing_folder(folder):
    return "nowhere/gone.png"


def empty(folder):
    (folder / "empty.jpg").touch()
    return "empty.jpg"


def a_page(folder):
    (folder / "page.jpg").write_text("<html>404 Not Found</html>")
    return "page.jpg"


def beginning_only(folder):
    (folder / "head.png").write_bytes((folder / "0.png").read_bytes()[:20])
    return "head.png"


def too_large(folder):
    picture(size=(20_000, 1), mode="1").save(folder / "long.png")
    return "long.png"


def without_a_range(folder):
    picture(mode="F").save(folder / "float.tiff")
    return "float.tiff"


def a_folder(folder):
    (folder / "inner.png").mkdir()
    return "inner.png"


def a_link_to_nothing(folder):
    (folder / "link.png").symlink_to(folder / "gone.png")
    return "link.png"


BROKEN = [
    missing, in_a_missing_folder, empty, a_page, beginning_only, too_large, without_a_range, a_folder,
    a_link_to_nothing,
]  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number, name in enumerate(GOOD):
        picture(number).save(tmp_path / "images" / name)
    return tmp_path


def write(folder, *images, **data):
    """Write one sample per image between two good ones; return the settings."""
    named = [GOOD[0], *images, GOOD[1]]
    entries = [{"id": f"n{n}", "image": name, "conversations": conversation()} for n, name in enumerate(named)]
    (folder / "data.json").write_text(json.dumps(entries))
    return DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=400, **data)


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_what_preparation_finds(folder, processor, damage):
    """Refused by name with the way out, or left out, counted and listed; `check` says the same before."""
    name = damage(folder / "images")
    config = write(folder, name)
    with pytest.raises(ValueError, match=r"1 of 3 samples cannot be used(.|\n)*index 1, id 'n1': ") as error:
        SftDataset(config, processor)
    assert str(error.value).endswith("data.broken: skip leaves 1 of them, whose image is missing or broken, out")
    report = check(config, processor, SparsityConfig())
    assert report.errors == 1 and "data.broken: skip" in str(report)
    skipping = write(folder, name, broken="skip")
    dataset = SftDataset(skipping, processor)
    assert [dataset[number]["sample_id"] for number in range(len(dataset))] == [0, 2]
    assert (dataset.counts.total, dataset.counts.used, dataset.counts.broken) == (3, 2, 1)
    assert "1 with a broken or missing image left out" in str(dataset.counts)
    (listed,) = dataset.broken
    assert (listed["index"], listed["id"], listed["images"]) == (1, "n1", [name]) and listed["why"]
    report = check(skipping, processor, SparsityConfig())
    assert (report.errors, report.warnings) == (0, 1) and "training would leave out:" in str(report)


def test_other_faults_are_refused_whatever_is_skipped(folder, processor):
    """A sample that is broken and wrong is wrong."""
    config = write(folder, "../outside.png", ["gone.png", GOOD[0]], broken="skip")
    with pytest.raises(ValueError, match=r"2 of 4 samples cannot be used") as error:
        SftDataset(config, processor)
    assert "leaves the image folder" in str(error.value) and "2 images are named for 1" in str(error.value)
    assert "data.broken" not in str(error.value)


def test_nothing_left_is_an_error(folder, processor):
    write(folder)
    for name in GOOD:
        (folder / "images" / name).unlink()
    config = write(folder, broken="skip")
    with pytest.raises(
        ValueError, match=r"no sample is left to train on: 0 of 2 samples .* 2 with a broken or missing"
    ):
        SftDataset(config, processor)
    assert check(config, processor, SparsityConfig()).errors == 1


def test_either_setting_has_rows_of_its_own(folder, processor, own_cache):
    """Rows that lack a sample never serve a run that refuses; whole rows serve both."""
    config, skipping = write(folder, "gone.png"), write(folder, "gone.png", broken="skip")
    assert len(SftDataset(skipping, processor)) == 2
    with pytest.raises(ValueError, match="1 of 3 samples cannot be used"):
        SftDataset(config, processor)
    picture(7).save(folder / "images" / "gone.png")
    assert len(SftDataset(config, processor)) == 3
    (folder / "images" / "gone.png").unlink()
    dataset = SftDataset(skipping, processor)
    assert len(dataset) == 3, "a run that begins to skip keeps its order"
    with pytest.raises(UnreadError, match=r"index 1, id 'n1': image 'gone\.png' is missing"):
        dataset[1]
    (filler,) = dataset.__getitems__([1])
    assert filler["sample_id"] == -1 and filler["unread"].index == 1 and filler["unread"].images == ["gone.png"]


def test_an_image_that_is_mended_is_used_again(folder, processor, monkeypatch, caplog):
    config = write(folder, "gone.png", empty(folder / "images"), broken="skip")
    assert len(SftDataset(config, processor)) == 2
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "_write_rows", lambda *_: pytest.fail("prepared twice"))
        assert len(SftDataset(config, processor)) == 2
    picture(7).save(folder / "images" / "gone.png")
    with caplog.at_level(logging.INFO):
        dataset = SftDataset(config, processor)
    assert len(dataset) == 3 and dataset[1]["sample_id"] == 1 and dataset.counts.broken == 1
    assert "the images of 1 samples that were left out can be read now" in caplog.text


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_list_them_in_the_order_of_the_file(folder, processor, monkeypatch, workers):
    monkeypatch.setattr(chunks, "CHUNK_SAMPLES", 4)
    monkeypatch.setattr(chunks, "PARALLEL_BYTES", 0)
    config = write(folder, *["gone.png", GOOD[0], "gone.png"] * 6, broken="skip", workers=workers)
    dataset = SftDataset(config, processor)
    assert [sample["index"] for sample in dataset.broken] == [n for n in range(1, 19) if n % 3 != 2]


def test_the_command_exits_as_training_would(folder, capsys):
    tiny_processor().save_pretrained(folder / "base")
    config = write(folder, "gone.png")
    data = {"json": config.json, "image_folder": config.image_folder}
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": {"base": str(folder / "base")}, "data": data}))
    for arguments, code in (
        ([], 1),
        (["--images", "stat"], 1),
        (["--data.broken", "skip"], 0),
        (["--data.broken", "skip", "--strict"], 1),
    ):
        assert main(["check", str(folder / "run.yaml"), *arguments]) == code, arguments
        assert "index 1, id 'n1': image 'gone.png' is missing" in capsys.readouterr().out


def test_the_list_of_a_run_names_each_sample_once(tmp_path):
    file = tmp_path / "broken.jsonl"
    one, two = ({"index": n, "id": str(n), "images": [], "why": "gone"} for n in (1, 2))
    assert prepare.write_broken(file, [one]) == [one] and prepare.write_broken(file, [two, one]) == [two]
    with file.open("a") as lines:
        lines.write('{"index": 3, "id"')  # the process ended here
    assert prepare.read_broken(file) == [one, two]
    assert prepare.write_broken(file, [{**one, "index": 3}]) and len(prepare.read_broken(file)) == 3


def test_a_header_is_read_and_no_pixel(folder, monkeypatch):
    """What only decoding finds passes here, and costs no more than the file's beginning."""
    image = folder / "images" / GOOD[0]
    os.truncate(image, image.stat().st_size - 100)
    check_header(image)
    with pytest.raises(ValueError, match="broken or cut off"):
        load_image(image)
