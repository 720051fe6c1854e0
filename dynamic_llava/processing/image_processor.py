"""LLaVA-1.5's image preparation as an image processor of transformers; the pixels themselves are made in images.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ImageProcessingMixin

from dynamic_llava.processing import images as image_io

ImageInput = Image.Image | str | Path
"""An opened Pillow image, or the path of an image file."""


class DynamicLlavaImageProcessor(ImageProcessingMixin):
    """Pads to a square in the mean's colour, resizes, scales to [0, 1] and normalises; Pillow and numpy only.

    Args:
        image_size: side S of the square in pixels (LLaVA-1.5: 336).
        image_mean, image_std: normalisation per channel; the padding colour follows from the mean.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        image_size: int = 336,
        image_mean: Sequence[float] = image_io.CLIP_MEAN,
        image_std: Sequence[float] = image_io.CLIP_STD,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.image_mean = tuple(float(value) for value in image_mean)
        self.image_std = tuple(float(value) for value in image_std)

    def __call__(self, images: ImageInput | Sequence[ImageInput], return_tensors: str = "pt") -> BatchFeature:
        """Return `pixel_values` (I, 3, S, S) float32 of one image or several."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not offered; use 'pt'")
        return BatchFeature({"pixel_values": self.pixels([images] if isinstance(images, ImageInput) else images)})

    def pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """Return (I, 3, S, S) float32 pixel values of Pillow images or image files."""
        opened = [image if isinstance(image, Image.Image) else image_io.load_image(image) for image in images]
        return image_io.preprocess(opened, self.image_size, self.image_mean, self.image_std)

    def to_dict(self) -> dict[str, Any]:
        """Return what preprocessor_config.json holds: transformers' own LLaVA image processor makes the same pixels."""
        flags = ("convert_rgb", "pad", "resize", "center_crop", "rescale", "normalize")
        return {
            "image_processor_type": "LlavaImageProcessor",
            **{f"do_{flag}": True for flag in flags},
            "size": {"shortest_edge": self.image_size},
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "resample": int(Image.Resampling.BICUBIC),
            "rescale_factor": 1 / 255,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
