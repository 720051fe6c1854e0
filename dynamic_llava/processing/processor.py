"""The processor: texts with `<image>` places and images in, padded model inputs out.

Shapes: B rows, N tokens of the longest row, I images of all rows, S side length in pixels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, LlavaConfig
from transformers.utils import cached_file

from dynamic_llava.processing import images as image_io
from dynamic_llava.processing.prompts import (
    IMAGE_PLACE,
    EncodedConversation,
    Turn,
    encode_conversation,
    encode_prompt,
    image_places,
)

ImageInput = Image.Image | str | Path
Images = ImageInput | Sequence[ImageInput] | Sequence[Sequence[ImageInput]]
PADDING_SIDES = ("left", "right")


class DynamicLlavaProcessor:
    """Turns texts and images into the model's inputs; built on a fast transformers tokenizer.

    Args:
        tokenizer: a fast tokenizer (transformers' `PreTrainedTokenizerFast` or a subclass).
        image_size: side S of the square that the vision tower sees; a multiple of `patch_size`.
        patch_size: side of one patch; an image becomes (S / patch_size)^2 tokens.
        image_token_id: the id that stands for every image token; the tokenizer's `<image>` when not given.
        feature_select: "default" (patches only, LLaVA-1.5) or "full" (the class token as well).
        image_mean, image_std: normalisation per channel; the padding colour follows from the mean.
    Raises ValueError when sizes do not fit or no image token is known.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_size: int,
        patch_size: int,
        *,
        image_token_id: int | None = None,
        feature_select: str = "default",
        image_mean: Sequence[float] = image_io.CLIP_MEAN,
        image_std: Sequence[float] = image_io.CLIP_STD,
    ) -> None:
        if patch_size < 1 or image_size < patch_size or image_size % patch_size:
            raise ValueError(f"image_size={image_size} is not a positive multiple of patch_size={patch_size}")
        if feature_select not in ("default", "full"):
            raise ValueError(f"feature_select={feature_select!r} is not known; choose 'default' or 'full'")
        if image_token_id is None:
            image_token_id = tokenizer.get_vocab().get(IMAGE_PLACE)
        if image_token_id is None:
            raise ValueError(f"the tokenizer has no {IMAGE_PLACE!r}; give image_token_id (LLaVA-1.5: 32000)")
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.patch_size = patch_size
        self.image_token_id = int(image_token_id)
        self.feature_select = feature_select
        self.image_mean = tuple(float(value) for value in image_mean)
        self.image_std = tuple(float(value) for value in image_std)

    @property
    def tokens_per_image(self) -> int:
        """Return how many tokens one image becomes; the only place where this number is made."""
        return (self.image_size // self.patch_size) ** 2 + (self.feature_select == "full")

    @property
    def pad_token_id(self) -> int:
        """Return the id at padding places; masked everywhere, so any id but the image token's will do."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.unk_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0 if self.image_token_id != 0 else 1

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Images | None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Return `input_ids` and `attention_mask` (B, N) int64 and `pixel_values` (I, 3, S, S) float32.

        text: one finished prompt or several; each `<image>` becomes `tokens_per_image` image tokens. images: Pillow
        images or paths, one, a flat list in row order, or one list per row. Keys of what is not given are absent.
        Raises ValueError when the images do not match the `<image>` places.
        """
        if text is None and images is None:
            raise ValueError("neither text nor images were given; give at least one of them")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not offered; use 'pt'")
        texts = None if text is None else [text] if isinstance(text, str) else list(text)
        flat = _check_images(texts, images)
        features: dict[str, Tensor] = {}
        if texts is not None:
            rows = [encode_prompt(self.tokenizer, row, self.tokens_per_image, self.image_token_id) for row in texts]
            features.update(self.pad(rows, padding_side))
        if flat:
            features["pixel_values"] = self.preprocess_images(flat)
        return BatchFeature(features)

    def encode_conversation(self, turns: Sequence[Turn], max_length: int | None = None) -> EncodedConversation:
        """Return ids, labels and answers of a training sample (see `prompts.encode_conversation`)."""
        return encode_conversation(
            self.tokenizer, turns, self.tokens_per_image, self.image_token_id, max_length=max_length
        )

    def preprocess_images(self, images: Sequence[ImageInput]) -> Tensor:
        """Return (I, 3, S, S) float32 pixel values of Pillow images or image files."""
        opened = [image if isinstance(image, Image.Image) else image_io.load_image(image) for image in images]
        return image_io.preprocess(opened, self.image_size, self.image_mean, self.image_std)

    def pad(self, rows: Sequence[Sequence[int]], padding_side: str = "left") -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, both (B, N) int64, of rows of unequal length."""
        if padding_side not in PADDING_SIDES:
            raise ValueError(f"padding_side={padding_side!r} is not known; choose 'left' or 'right'")
        if not rows:
            raise ValueError("an empty list of texts was given; give at least one")
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            place = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
            input_ids[number, place] = torch.tensor(row, dtype=torch.int64)
            attention_mask[number, place] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """Return the text of one row of token ids (a tensor or a list); image tokens are left out."""
        ids = [token for token in _as_list(ids) if token != self.image_token_id]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        """Return the text of every row; see `decode`."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    @classmethod
    def from_pretrained(cls, folder: str | Path, **tokenizer_arguments: Any) -> "DynamicLlavaProcessor":
        """Load from a checkpoint folder (or hub name): tokenizer files, config.json and preprocessor_config.json.

        Without config.json, processor_config.json (written by `save_pretrained`) gives the sizes. Images are always
        padded to a square, also where an old preprocessor_config.json crops instead: LLaVA-1.5 was trained so.
        Raises FileNotFoundError when the sizes are nowhere to be found, and ValueError when two files contradict.
        """
        name = str(folder)
        model, processor = _read_json(name, "config.json"), _read_json(name, "processor_config.json") or {}
        pixels = _read_json(name, "preprocessor_config.json") or processor.get("image_processor") or {}
        if model is None and not ("patch_size" in processor and "crop_size" in pixels):
            raise FileNotFoundError(
                f"{name} holds neither config.json nor processor_config.json with preprocessor_config.json; "
                "give the folder of a LLaVA checkpoint (llava-hf layout) or of a saved processor"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, **tokenizer_arguments)
        settings = _sizes_of_model(model) if model is not None else _sizes_of_processor(processor, pixels)
        _check_pixels(name, pixels, settings["image_size"])
        return cls(
            tokenizer,
            **settings,
            image_mean=pixels.get("image_mean", image_io.CLIP_MEAN),
            image_std=pixels.get("image_std", image_io.CLIP_STD),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer, preprocessor_config.json and processor_config.json (readable by transformers too)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        flags = ("convert_rgb", "pad", "resize", "center_crop", "rescale", "normalize")
        pixels = {
            "image_processor_type": "LlavaImageProcessor",
            **{f"do_{flag}": True for flag in flags},
            "size": {"shortest_edge": self.image_size},
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "resample": int(Image.Resampling.BICUBIC),
            "rescale_factor": 1 / 255,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }
        processor = {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE_PLACE,
            "num_additional_image_tokens": 1,  # CLIP's class token, which feature_select "default" takes away again
            "patch_size": self.patch_size,
            "vision_feature_select_strategy": self.feature_select,
        }
        _write_json(folder / "preprocessor_config.json", pixels)
        _write_json(folder / "processor_config.json", processor)


def _check_images(texts: list[str] | None, images: Images | None) -> list[ImageInput]:
    """Return the images as one flat list after comparing them with the `<image>` places."""
    if images is None:
        images = []
    elif isinstance(images, ImageInput):
        images = [images]
    nested = any(not isinstance(image, ImageInput) for image in images)
    if texts is None:
        return [image for row in images for image in row] if nested else list(images)
    wanted = [image_places(text) for text in texts]
    if nested:
        given = [len(row) for row in images]
        if given != wanted:
            raise ValueError(
                f"images per row {given} do not match the {IMAGE_PLACE} places per text {wanted}; "
                "give one list of images per text, as long as the text has places"
            )
        return [image for row in images for image in row]
    if len(images) != sum(wanted):
        raise ValueError(
            f"{len(images)} images were given for {sum(wanted)} {IMAGE_PLACE} places (per text: {wanted}); "
            f"write one {IMAGE_PLACE} per image into the texts"
        )
    return list(images)


def _sizes_of_model(values: dict[str, Any]) -> dict[str, Any]:
    config = LlavaConfig.from_dict({key: value for key, value in values.items() if key != "sparsity"})
    return {
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "image_token_id": config.image_token_index,
        "feature_select": config.vision_feature_select_strategy,
    }


def _sizes_of_processor(processor: dict[str, Any], pixels: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_size": _side(pixels["crop_size"]),
        "patch_size": processor["patch_size"],
        "feature_select": processor.get("vision_feature_select_strategy", "default"),
    }


def _check_pixels(name: str, pixels: dict[str, Any], image_size: int) -> None:
    if "crop_size" in pixels and _side(pixels["crop_size"]) != image_size:
        raise ValueError(
            f"{name}: preprocessor_config.json makes images of {_side(pixels['crop_size'])} pixels and the vision "
            f"tower sees {image_size}; correct one of the two files"
        )
    if abs(pixels.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError(f"{name}: rescale_factor={pixels['rescale_factor']} is not offered; LLaVA-1.5 uses 1/255")


def _side(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else size["height"]


def _read_json(name: str, file: str) -> dict[str, Any] | None:
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{found} is no valid JSON ({error}); replace the file") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_list(ids: Any) -> list[int]:
    return ids.tolist() if isinstance(ids, Tensor) else list(ids)
