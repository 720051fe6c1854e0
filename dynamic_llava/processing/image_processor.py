"""LLaVA-1.5's image preparation as an image processor of transformers; the pixels themselves are made in images.py."""

import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ImageProcessingMixin

from dynamic_llava.files import brief
from dynamic_llava.processing import images as image_io

ImageInput = Image.Image | str | Path | np.ndarray | Tensor | bytes
"""An opened Pillow image, the path of an image file, pixels of 8 bits as an array or tensor, or an encoded image."""
_ONE_OF_MANY = 4
"""Dimensions of an array that holds several images."""
_EITHER = ("do_center_crop", "default_to_square", "disable_grouping", "image_seq_length")
"""Arguments whose every value gives the same pixels: a padded square loses nothing when it is cropped."""


class DynamicLlavaImageProcessor(ImageProcessingMixin):
    """Pads to a square in the mean's colour, resizes, scales to [0, 1] and normalises; Pillow and numpy only.

    Args:
        image_size: side S of the square in pixels (LLaVA-1.5: 336).
        image_mean, image_std: normalisation per channel; the padding colour follows from the mean.
        settings: what preprocessor_config.json says beside that; it may only say what is done here.
    Raises ValueError for sizes and colours that make no image, and for settings of another preparation.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    do_convert_rgb = do_pad = do_resize = do_center_crop = do_rescale = do_normalize = True
    rescale_factor = 1 / 255
    resample = int(Image.Resampling.BICUBIC)

    def __init__(
        self,
        image_size: int | None = None,
        image_mean: Sequence[float] = image_io.CLIP_MEAN,
        image_std: Sequence[float] = image_io.CLIP_STD,
        **settings: Any,
    ) -> None:
        super().__init__()
        if image_size is None:
            image_size = _side(settings.get("crop_size", 336))
        if type(image_size) is not int or image_size < 1:
            raise ValueError(f"image_size={image_size!r} is no side of an image; give a whole number of 1 or more")
        self.image_size = image_size
        self.image_mean, self.image_std = _channels("image_mean", image_mean), _channels("image_std", image_std)
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std={self.image_std} divides by it; give positive numbers")
        labels = ("image_processor_type", "processor_class", "feature_extractor_type", "_valid_processor_keys")
        self.check_fixed({name: value for name, value in settings.items() if name not in labels})

    @classmethod
    def get_image_processor_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read preprocessor_config.json as transformers does; ValueError where it holds no JSON object."""
        values, rest = super().get_image_processor_dict(*args, **kwargs)
        if not isinstance(values, dict):
            raise ValueError(
                f"{args[0] if args else 'the folder'}: preprocessor_config.json holds a {type(values).__name__}; it "
                "has to hold an object of settings"
            )
        return values, rest

    @property
    def size(self) -> dict[str, int]:
        """Return what an image's shorter side becomes."""
        return {"shortest_edge": self.image_size}

    @property
    def crop_size(self) -> dict[str, int]:
        """Return height and width of what the vision tower sees."""
        return {"height": self.image_size, "width": self.image_size}

    def __call__(self, images: Any, return_tensors: str | None = "pt", **settings: Any) -> BatchFeature:
        """Return `pixel_values` (I, 3, S, S) float32 of one image or several, lists of lists in their order.

        settings: as transformers' own LLaVA image processor takes them. LLaVA-1.5's preparation is fixed, so they may
        only say what is done anyway. return_tensors: "pt", "np", or None for a list of arrays.
        Raises ValueError for what is no image, and for a setting of another preparation, by its name.
        """
        self.check_fixed(settings)
        given = as_images(images)
        flat = [image for row in given for image in (row if isinstance(row, list) else [row])]
        return BatchFeature({"pixel_values": as_tensors(self.pixels(flat), return_tensors)})

    def fetch_images(self, images: Any) -> Any:
        """Return what is given: files are opened when their pixels are made, and nothing is downloaded."""
        return images

    def pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """Return (I, 3, S, S) float32 pixel values of images of any kind."""
        opened = [image_io.open_image(image, f"image {number}") for number, image in enumerate(images)]
        return image_io.preprocess(opened, self.image_size, self.image_mean, self.image_std)

    def check_fixed(self, settings: dict[str, Any]) -> None:
        """Raise ValueError for a setting that asks for another preparation than LLaVA-1.5's, by its name."""
        fixed = self.to_dict() | {"data_format": "channels_first", "device": "cpu"}
        for name, value in settings.items():
            if value is None or name in _EITHER or name == "return_tensors":
                continue
            wanted = fixed.get(name)
            if not _same(getattr(value, "value", value) if name != "device" else str(value), wanted, self.image_size):
                raise ValueError(
                    f"{name}={value!r} is not offered: how LLaVA-1.5 prepares images is fixed "
                    f"({name}={wanted!r}); leave it out, or prepare the pixels yourself and give the model pixel_values"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return what preprocessor_config.json holds: transformers' own LLaVA image processor makes the same pixels."""
        flags = ("convert_rgb", "pad", "resize", "center_crop", "rescale", "normalize")
        return {
            "image_processor_type": "LlavaImageProcessor",
            **{f"do_{flag}": True for flag in flags},
            "size": self.size,
            "crop_size": self.crop_size,
            "resample": self.resample,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }


def as_images(images: Any) -> list[Any]:
    """Return the images as a list of images, or of one list of images per row; None gives no image.

    Raises ValueError that names the place of what is neither.
    """
    if images is None:
        return []
    if isinstance(images, np.ndarray | Tensor) and images.ndim == _ONE_OF_MANY:
        return list(images)
    if isinstance(images, ImageInput):
        return [images]
    if not isinstance(images, list | tuple):
        raise ValueError(f"images are of type {type(images).__name__}; {_KINDS}")
    nested = any(isinstance(row, list | tuple) for row in images)
    rows: list[Any] = []
    for number, row in enumerate(images):
        if not nested or not isinstance(row, list | tuple):
            if nested or not isinstance(row, ImageInput):
                place = "beside lists of images" if nested else f"image {number}"
                raise ValueError(f"{place}: {type(row).__name__} is no {'list' if nested else 'image'}; {_KINDS}")
            rows.append(row)
            continue
        for place, image in enumerate(row):
            if not isinstance(image, ImageInput):
                raise ValueError(f"row {number}, image {place}: {type(image).__name__} is no image; {_KINDS}")
        rows.append(list(row))
    return rows


def as_tensors(pixels: Tensor, kind: str | None) -> Any:
    """Return pixel values (I, 3, S, S) as `return_tensors` asks: "pt", "np", or None for a list of arrays."""
    if kind not in ("pt", "np", None):
        raise ValueError(f"return_tensors={kind!r} is not known; choose one of 'pt', 'np', None")
    return pixels if kind == "pt" else pixels.numpy() if kind == "np" else list(pixels.numpy())


_KINDS = (
    "an image is a Pillow image, the path of a file, an array or tensor of 8 bits, or the bytes of a file; give one, a "
    "list of them, or one list per text"
)


def _side(size: Any) -> Any:
    return size.get("height") if isinstance(size, dict) else size


def _channels(name: str, values: Any) -> tuple[float, ...]:
    numbers = values if isinstance(values, list | tuple | np.ndarray) else ()
    if len(numbers) != 3 or any(isinstance(one, bool) or not isinstance(one, Real) for one in numbers):
        raise ValueError(f"{name}={brief(values)} is not known; give three numbers, one per channel")
    try:
        found = tuple(float(one) for one in numbers)
    except OverflowError:  # a whole number of hundreds of digits
        found = (math.inf,)
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name}={brief(values)} is not finite; give three numbers, one per channel")
    return found


def _same(value: Any, wanted: Any, side: int) -> bool:
    if isinstance(wanted, dict):
        sizes = (wanted, side, [side, side], (side, side), {"height": side, "width": side}, {"shortest_edge": side})
        return (dict(value) if hasattr(value, "keys") else value) in sizes
    if isinstance(wanted, list | float) and not isinstance(wanted, bool):
        try:
            return bool(np.allclose(value, wanted, rtol=0, atol=1e-9))
        except (TypeError, ValueError):
            return False
    return type(value) is type(wanted) and bool(value == wanted)
