"""Pictures of every mode and every kind of damage, and the equality with transformers' own image processor."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dynamic_llava.processing.images import CLIP_MEAN, expand_to_square, load_image, mean_colour, preprocess, to_rgb
from tests.sft_builders import picture

SIZES = [(10, 10), (77, 33), (640, 480), (200, 641), (50, 1)]
MODES = {"RGB": "png", "RGBA": "png", "L": "png", "LA": "png", "P": "gif", "1": "png", "CMYK": "jpg", "I;16": "png"}


@pytest.mark.parametrize("side", [64, 336])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_transformers(side, size):
    module = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    theirs = module.LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    image = picture(size=size)
    expected = theirs([image], return_tensors="pt")["pixel_values"]
    ours = preprocess([image], side)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)


def test_square_is_centred_on_the_mean_colour():
    assert mean_colour(CLIP_MEAN) == (122, 116, 104)
    image = picture(size=(7, 4))
    square = np.asarray(expand_to_square(image, (1, 2, 3)))
    assert square.shape == (7, 7, 3)
    assert np.array_equal(square[1:5], np.asarray(image))
    assert (square[[0, 5, 6]] == (1, 2, 3)).all()
    assert expand_to_square(image.crop((0, 0, 4, 4)), (1, 2, 3)).size == (4, 4)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / f"picture.{MODES[mode]}"
    image = picture(size=(31, 17), mode=mode)
    image.save(path)
    loaded = load_image(path)
    assert loaded.mode == "RGB" and loaded.size == (31, 17)
    if mode in ("RGB", "RGBA"):
        assert np.array_equal(np.asarray(loaded), np.asarray(image)[..., :3]), "transparency is dropped, not blended"
    if mode == "I;16":
        assert np.array_equal(np.asarray(loaded)[..., 0], np.asarray(image) // 257)


def test_exif_orientation_is_ignored(tmp_path):
    image = picture(size=(30, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (30, 10)


def test_transparent_palette_and_animation(tmp_path):
    frames = [picture(seed, (20, 12), "P") for seed in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], transparency=0)
    assert load_image(tmp_path / "moving.gif").mode == "RGB"


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff.*floating-point"):
        load_image(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("ending", ["jpg", "png", "gif"])
def test_a_cut_off_file_is_named(tmp_path, ending):
    whole = tmp_path / f"whole.{ending}"
    picture(size=(200, 200)).save(whole)
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"cut\.{ending} is broken or cut off"):
        load_image(cut)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*nothing\.jpg"):
        load_image(tmp_path / "nothing.jpg")
    with pytest.raises(FileNotFoundError, match=r"there is no image file .*half\\ud96f\.jpg"):  # to be printed
        load_image(tmp_path / "half\ud96f.jpg")
    with pytest.raises(ValueError, match=r"^(?=.{,1100}$)there is no image file .*too long\); check the name"):
        load_image(5000 * "x")
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path)
    for content in (b"", b"no picture"):
        (tmp_path / "text.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"text\.jpg is no image"):
            load_image(tmp_path / "text.jpg")


def png_header(width, height):
    """Return the bytes of a PNG that claims a size and holds next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("size", [(60000, 60000), (60000, 10), (13000, 13000), (8193, 1)], ids=str)
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, size):
    """The long thin one is small itself; its padded square would be 3.6 billion pixels."""
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    with pytest.raises(ValueError, match=r"bomb\.png.*(too large|more than)"):
        load_image(tmp_path / "bomb.png")


def test_the_limit_is_an_argument(tmp_path):
    picture(size=(40, 10)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", max_square_pixels=1600).size == (40, 10)
    with pytest.raises(ValueError, match=r"40 x 10 pixels.*1,599"):
        load_image(tmp_path / "a.png", max_square_pixels=1599)
    with pytest.raises(ValueError, match="image 0 has 40 x 10"):
        preprocess([picture(size=(40, 10))], 8, max_square_pixels=1599)


def test_no_image_gives_an_empty_tensor():
    assert preprocess([], 8).shape == (0, 3, 8, 8)
