"""Images as LLaVA-1.5 feeds them to CLIP: read, padded to a square, resized, normalised; Pillow and numpy only.

Shape suffixes: I images, S pixels a side.
"""

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from dynamic_llava.files import brief_text

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Channel means of OpenAI CLIP."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Channel standard deviations of OpenAI CLIP."""
MAX_SQUARE_PIXELS = 8192**2
"""Largest padded square that is accepted, a side of 8,192 pixels: a small file may hold a large image, and decoding,
squaring and resizing one of this size takes about 0.6 GB."""

Colour = tuple[int, int, int]

_BROKEN = (OSError, SyntaxError, EOFError, ValueError, IndexError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow's decoders are known to raise on damaged files."""


class _TooLarge(ValueError):
    """Kept apart from the errors of a damaged file."""


def load_image(path: str | Path, max_square_pixels: int = MAX_SQUARE_PIXELS) -> Image.Image:
    """Read an image file and return it in RGB, whatever its mode (see `to_rgb`).

    An animation gives its first frame. EXIF orientation is ignored, as LLaVA does. Raises FileNotFoundError when there
    is no such file, and ValueError when it is a web address or no image, is broken or cut off, or is so long or so
    large that its padded square exceeds `max_square_pixels` (checked before the pixels are decoded).
    """
    name = brief_text(path)  # of a message or of a folder whose names are no UTF-8
    if str(path).startswith(("http://", "https://")):
        raise ValueError(
            f"{name} is a web address, and nothing is downloaded here; fetch the image first and give its file, or "
            "open it yourself and give the Pillow image"
        )
    path = Path(path)
    try:
        found = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file system takes: too long, or with a null in it
        reason = getattr(error, "strerror", None) or error  # an OSError's own text repeats the name
        raise ValueError(f"there is no image file of the name {name} ({reason}); check the name") from None
    if not found:
        raise FileNotFoundError(f"there is no image file {name}; check the name and the image folder")
    return _read_rgb(path, name, max_square_pixels)


def open_image(image: object, name: str) -> Image.Image:
    """Return an image of any kind in RGB: Pillow image, path, `data:` address, bytes of a file, array or tensor.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W) of 8 bits with 1, 3 or 4 channels. `name` is what errors call
    what has no name of its own. Raises ValueError, and FileNotFoundError for a path without a file.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)  # which reads the pixels of a file that was only opened
        except _BROKEN as error:
            raise ValueError(f"{name} cannot be read ({error}); replace it or leave the sample out") from None
    if isinstance(image, bytes):
        return decode_image(image, name)
    if isinstance(image, np.ndarray | torch.Tensor):
        return _from_array(image, name)
    if isinstance(image, str) and image.startswith("data:"):
        try:
            return decode_image(base64.b64decode(image.partition(",")[2], validate=True), name)
        except binascii.Error as error:
            raise ValueError(f"{name} is a data: address that holds no base64 ({error}); give the file") from None
    if not isinstance(image, str | Path):
        raise ValueError(f"{name} is of type {type(image).__name__}; give a Pillow image, a path, bytes or an array")
    return load_image(image)


def _from_array(array: np.ndarray | torch.Tensor, name: str) -> Image.Image:
    pixels = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if pixels.dtype != np.uint8:
        raise ValueError(
            f"{name} is an array of {pixels.dtype}, whose range is unknown; give whole numbers of 0 to 255 in 8 bits, "
            "such as (unit * 255).round().astype('uint8')"
        )
    # As transformers reads them: channels first where both ends could be channels.
    if pixels.ndim == 3 and (pixels.shape[0] in (1, 3) or (pixels.shape[0] == 4 and pixels.shape[-1] not in (1, 3, 4))):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (3, 4)) or not pixels.size:
        raise ValueError(
            f"{name} is an array of shape {tuple(array.shape)}; give height and width, with 1, 3 or 4 channels before "
            "or behind them"
        )
    return to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def decode_image(data: bytes, name: object, max_square_pixels: int = MAX_SQUARE_PIXELS) -> Image.Image:
    """Return an encoded image (PNG, JPEG, ...) in RGB, as `load_image` does; `name` is what its errors call it."""
    return _read_rgb(io.BytesIO(data), name, max_square_pixels)


def check_header(path: Path, max_square_pixels: int = MAX_SQUARE_PIXELS) -> None:
    """Raise as `load_image` would for what a file's header tells: no image, too many pixels, pixels without a range."""
    name = brief_text(path)
    with _opened(path, name, max_square_pixels) as image:
        mode = image.mode
    try:
        _check_mode(mode)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@contextmanager
def _opened(source: Path | io.BytesIO, path: object, max_square_pixels: int) -> Iterator[Image.Image]:
    """Give the image of a file whose header has been read; what goes wrong inside is a ValueError that names `path`."""
    try:
        with Image.open(source) as image:
            _check_size(image.size, max_square_pixels, path)
            yield image
    except _TooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise _TooLarge(f"{path} is too large ({error}); shrink it before training") from None
    except UnidentifiedImageError:
        is_empty = isinstance(source, Path) and not source.stat().st_size
        what = "is no image but an empty file" if is_empty else "is no image that Pillow can read"
        raise ValueError(f"{path} {what}; replace it or leave the sample out") from None
    except _BROKEN as error:
        raise ValueError(f"{path} is broken or cut off ({error}); replace it or leave the sample out") from error


def _read_rgb(source: Path | io.BytesIO, path: object, max_square_pixels: int) -> Image.Image:
    with _opened(source, path, max_square_pixels) as image:
        image.load()
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in RGB: transparency is dropped without blending, as LLaVA does; 16-bit grey is scaled to 8 bits.

    Raises ValueError for floating-point pixels, whose range is unknown.
    """
    _check_mode(image.mode)
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_mode(mode: str) -> None:
    if mode == "F":
        raise ValueError("an image with floating-point pixels has no known range; save it with 8 bits per channel")


def mean_colour(mean: Sequence[float]) -> Colour:
    """Return the colour that LLaVA pads with: int(255 * mean) per channel."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def expand_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    """Return the RGB image centred on a square of its longer side filled with `colour` (LLaVA's `expand2square`)."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def preprocess(
    images: Sequence[Image.Image],
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    max_square_pixels: int = MAX_SQUARE_PIXELS,
) -> torch.Tensor:
    """Return (I, 3, S, S) float32 pixel values: square, bicubic resize to S = `size`, / 255, normalised per channel.

    Equal to transformers' `LlavaImageProcessorPil(do_pad=True)`. No image gives an empty (0, 3, S, S) tensor.
    """
    pixels = np.empty((len(images), 3, size, size), dtype=np.float32)
    mean_3, std_3 = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    for index, image in enumerate(images):
        _check_size(image.size, max_square_pixels, f"image {index}")
        square = expand_to_square(to_rgb(image), mean_colour(mean)).resize((size, size), Image.Resampling.BICUBIC)
        unit = (np.asarray(square).astype(np.float64) * (1 / 255)).astype(np.float32)
        pixels[index] = ((unit - mean_3) / std_3).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def _check_size(size: tuple[int, int], max_square_pixels: int, name: object) -> None:
    width, height = size
    if min(size) < 1:
        raise ValueError(f"{name} is empty ({width} x {height} pixels); replace it or leave the sample out")
    if max(size) ** 2 > max_square_pixels:
        raise _TooLarge(
            f"{name} has {width} x {height} pixels; padded to a square that is more than the {max_square_pixels:,} "
            "allowed; shrink it before training"
        )
