"""Bad data met by both entries: `check` counts them and goes on, the training dataset refuses them by name."""

import json
import struct
import zlib

import pytest
import yaml

from dynamic_llava.config import DataConfig
from dynamic_llava.data import SftDataset
from dynamic_llava.data.__main__ import main, peak_resident_bytes
from tests.sft_builders import conversation, picture, tiny_processor

GOOD = {"id": "good", "image": "good.jpg", "conversations": conversation()}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture(size=(200, 150)).save(folder / "good.jpg")
    return folder


def write(images, *entries):
    file = images.parent / "data.json"
    file.write_text(json.dumps([GOOD, *entries]))
    return file


def checked(images, capsys):
    """Run the command on data.json; return its exit code and what it printed."""
    folder = images.parent
    tiny_processor().save_pretrained(folder / "base")
    values = {
        "model": {"base": str(folder / "base")},
        "data": {"json": str(folder / "data.json"), "image_folder": str(images)},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    code = main(["check", str(folder / "run.yaml")])
    return code, capsys.readouterr().out


def trained_on(images, processor):
    """Fetch every sample as training does."""
    dataset = SftDataset(DataConfig(json=str(images.parent / "data.json"), image_folder=str(images)), processor)
    return [dataset[number] for number in range(len(dataset))]


def refused(images, processor, capsys, kind, message):
    """Assert that check counts one `kind` at index 1, and that training fails with the same words."""
    code, text = checked(images, capsys)
    assert code == 1 and f"{kind}: 1\n    index 1, id 'bad': " in text and "1 can be trained on" in text
    with pytest.raises((ValueError, FileNotFoundError), match=f"index 1, id 'bad': .*{message}") as error:
        trained_on(images, processor)
    assert "data.json" in str(error.value)


def bad(**changes):
    return {**GOOD, "id": "bad", **changes}


def test_missing_image(images, processor, capsys):
    write(images, bad(image="nothing.jpg"))
    refused(images, processor, capsys, "missing image", r"'nothing\.jpg' is missing")


def test_truncated_jpeg(images, processor, capsys):
    data = (images / "good.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(data[: len(data) * 2 // 3])
    write(images, bad(image="cut.jpg"))
    refused(images, processor, capsys, "unreadable image", r"cut\.jpg is broken or cut off")


def test_image_bomb(images, processor, capsys):
    """A picture of 60,000 x 60,000 pixels in a hundred bytes: 10 GB if it were decoded."""

    def block(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = block(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    pixels = block(b"IDAT", zlib.compress(bytes(1000)))
    (images / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + block(b"IEND", b""))
    write(images, bad(image="bomb.png"))
    before = peak_resident_bytes()
    refused(images, processor, capsys, "unreadable image", r"bomb\.png.*(too large|more than)")
    assert peak_resident_bytes() - before < 300e6, "no pixel of it may be decoded"


def test_json_cut_in_the_middle(images, processor, capsys):
    file = write(images, *[bad()] * 3)
    file.write_bytes(file.read_bytes()[:-30])
    code, text = checked(images, capsys)
    assert code == 1 and "4 samples" not in text and "3 samples, 3 can be trained on" in text
    assert "broken file: 1" in text and "item 3, byte" in text and "was it cut off" in text
    with pytest.raises(ValueError, match=r"data\.json is no valid JSON at item 3, byte \d"):
        trained_on(images, processor)


def test_role_out_of_order(images, processor, capsys):
    write(images, bad(conversations=[*conversation(), *conversation("Sure?", "Yes.")[::-1]]))
    refused(images, processor, capsys, "role out of order", "message 2 is from 'gpt' where 'human' is due")


@pytest.mark.parametrize("image", ["../outside.jpg", "inner/../../outside.jpg", "absolute", "link.jpg"])
def test_path_that_leaves_the_image_folder(images, processor, capsys, image):
    outside = images.parent / "outside.jpg"
    picture().save(outside)
    (images / "link.jpg").symlink_to(outside)
    write(images, bad(image=str(outside) if image == "absolute" else image))
    refused(images, processor, capsys, "image path leaves the folder", "leaves the image folder")


def test_blank_answer(images, processor, capsys):
    """The published mixture has one: training goes on, and the answer is not learned."""
    write(images, bad(conversations=conversation(answer="")))
    code, text = checked(images, capsys)
    assert code == 0 and "blank answer: 1\n    index 1, id 'bad': " in text
    samples = trained_on(images, processor)
    assert (samples[1]["labels"] == -100).all() and (samples[0]["labels"] != -100).any()


def test_broken_utf8(images, processor, capsys):
    file = write(images, bad(conversations=conversation(answer="Grösse")))
    file.write_bytes(file.read_bytes().replace(b"\\u00f6", b"\xff"))
    code, text = checked(images, capsys)
    assert code == 1 and "broken file: 1" in text and "is no UTF-8 text" in text and "byte" in text
    with pytest.raises(ValueError, match=r"data\.json is no UTF-8 text: .* byte \d"):
        trained_on(images, processor)


def test_half_a_character(images, processor, capsys):
    file = write(images, bad(conversations=conversation(answer="half")))
    file.write_text(file.read_text().replace("half", "\\ud83d"))
    refused(images, processor, capsys, "missing or wrong field", "half a character")
