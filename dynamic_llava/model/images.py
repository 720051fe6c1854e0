"""The images of a call: which tokens stand for them, how many each fills, and the features that fill them.

Shape suffixes: B rows, N tokens, I images of the batch in row order, n image tokens of one image, m image tokens left
of a smaller picture, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import MultiModalData as MultiModalData  # what servers of models ask processing/ for

from dynamic_llava.engine.tower import EncodedImages, TowerReading
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import CLIP_EVIDENCE, Cut, Evidence, Method
from dynamic_llava.methods.grid import middles
from dynamic_llava.model import text_tower
from dynamic_llava.model.arguments import check_shapes
from dynamic_llava.model.tiles import TiledImages
from dynamic_llava.projectors import STRATEGIES, find_projector, image_tokens
from dynamic_llava.sparsity.decisions import budget


@dataclass(frozen=True)
class Inputs:
    """The tokens and images of one call, as they were given."""

    input_ids: Tensor | None
    """(B, N) int64, or None where embeddings are given."""
    inputs_embeds: Tensor | None
    """(B, N, D), or None where ids are given."""
    pixel_values: Tensor | None
    """(I, 3, S, S) float; of images of any size their tiles, (I, most, 3, S, S), or one image's behind the other's."""
    image_features: Tensor | Sequence[Tensor] | None
    """(I, n, D), or (n, D) for each image with an n of its own, instead of pixels."""
    image_mask: Tensor | None
    """(B, N) bool, only with embeddings: the tokens that stand for images."""
    feature_layer: int | list[int] | None
    """vision_feature_layer; None: the configuration's."""
    feature_strategy: str | None
    """vision_feature_select_strategy; None: the configuration's."""
    image_sizes: Any = None
    """(I, 2) int64: height and width of each image in pixels, where the model takes images of any size."""

    @property
    def has_images(self) -> bool:
        """Whether images come along."""
        return self.pixel_values is not None or self.image_features is not None


class ImageInputs(TiledImages):
    """What DynamicLlavaModel does with images before its language model runs."""

    @property
    def _patches_along(self) -> int:
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def tokens_per_image(self) -> int:
        """n: image tokens that one image becomes. ValueError where that depends on its size."""
        if self.tiling is not None:
            raise ValueError(
                "an image of a LLaVA-NeXT becomes as many tokens as its size makes; ask tiling.tokens((height, width))"
            )
        return self.image_length(None)

    def image_length(self, strategy: str | None) -> int:
        """Return n under a vision_feature_select_strategy, by default the configuration's. ValueError for another."""
        return image_tokens(self.config, strategy)

    def lengths_of(self, inputs: Inputs) -> int | list[int]:
        """Return how many tokens each image of a call fills, in row order, or the one number of all.

        Features given as a list say their lengths themselves; images of any size have those that their sizes make.
        Raises ValueError for features of another shape.
        """
        features, per_image = inputs.image_features, self.image_length(inputs.feature_strategy)
        width = self.config.text_config.hidden_size
        if self.tiling is not None and isinstance(features, Tensor):
            features = list(features)
        if isinstance(features, Tensor):
            if features.dim() != 3 or tuple(features.shape[1:]) != (per_image, width):
                raise ValueError(
                    f"image_features has shape {tuple(features.shape)} but an image of this model is {per_image} "
                    f"tokens of width {width}; give shape (images, {per_image}, {width}), or a list with one (tokens, "
                    f"{width}) per image for images of other lengths"
                )
        elif features is not None:
            for number, one in enumerate(features):
                shape = tuple(getattr(one, "shape", ()))
                if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
                    raise ValueError(
                        f"image_features[{number}] has shape {shape}; give each image as a tensor (tokens, {width}) of "
                        "at least one token"
                    )
            if self.tiling is None:
                return [len(one) for one in features]
        if self.tiling is not None:
            return self.tiled_lengths(inputs.image_sizes, features, inputs.has_images or inputs.image_mask is not None)
        return per_image

    def check_feature_layer(self, layer: int | list[int] | None) -> None:
        """Raise ValueError for a vision_feature_layer that the vision tower lacks or the projector does not take."""
        if layer is None:
            return
        layers = [layer] if isinstance(layer, int) else list(layer)
        depth, own = self.config.vision_config.num_hidden_layers, self.config.vision_feature_layer
        taken = 1 if isinstance(own, int) else len(own)
        if any(not -depth - 1 <= one <= depth for one in layers):
            raise ValueError(
                f"vision_feature_layer={layer} names a layer outside {-depth - 1}..{depth}, which are those of this "
                "vision tower; choose one of them"
            )
        if len(layers) != taken:
            raise ValueError(
                f"vision_feature_layer={layer} names {len(layers)} layers but the projector takes the features of "
                f"{taken}; give {taken}, or build a model with vision_feature_layer in its configuration and train it"
            )

    def check_tokens(self, inputs: Inputs) -> None:
        """Raise ValueError unless either ids (B, N) or embeddings (B, N, D) of this model's width are given."""
        ids, embeds = inputs.input_ids, inputs.inputs_embeds
        if (ids is None) == (embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if ids is not None and ids.dim() != 2:
            raise ValueError(f"input_ids has shape {tuple(ids.shape)}; give (rows, tokens)")
        width = self.config.text_config.hidden_size
        if embeds is not None and (embeds.dim() != 3 or embeds.shape[2] != width):
            raise ValueError(
                f"inputs_embeds has shape {tuple(embeds.shape)} but this model's embeddings are {width} wide; give "
                f"(rows, tokens, {width})"
            )

    def image_places(self, inputs: Inputs) -> Tensor:
        """(B, N) bool: the tokens that stand for images.

        They are those of the image token's id; among embeddings those of `image_mask`, and without one those equal to
        the image token's embedding, where images come with the call.
        """
        embeds = inputs.inputs_embeds
        if embeds is None:
            if inputs.image_mask is not None:
                raise ValueError("image_mask belongs to inputs_embeds; input_ids already say where images are")
            return inputs.input_ids == self.config.image_token_id
        if inputs.image_mask is not None:
            check_shapes(*embeds.shape[:2], image_mask=inputs.image_mask)
            return inputs.image_mask.bool()
        if not inputs.has_images:
            return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        token = torch.tensor(self.config.image_token_id, device=embeds.device)
        return (embeds == self.get_input_embeddings()(token)).all(-1)

    def embed(self, inputs: Inputs, images: BaseModelOutputWithPooling | None, image_BN: Tensor) -> Tensor:
        """Return (B, N, D): the tokens' embeddings, with image features where `image_BN` says."""
        embeds = inputs.inputs_embeds
        if embeds is None:
            embeds = self.get_input_embeddings()(inputs.input_ids)
        if images is None:
            return embeds
        pooled = images.pooler_output
        features = pooled.flatten(0, 1) if isinstance(pooled, Tensor) else torch.cat(list(pooled))
        features = features.to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(image_BN[..., None], features)

    def check_pixels(self, pixel_values: Tensor, image_sizes: Any = None) -> None:
        """Raise ValueError unless pixels have the shape that the vision tower takes, (I, 3, S, S), or are tiles."""
        if self.tiling is not None:
            self.tiles_of(pixel_values, image_sizes)
            return
        vision, shape = self.config.vision_config, tuple(pixel_values.shape)
        wanted = (vision.num_channels, vision.image_size, vision.image_size)
        if shape[1:] != wanted:
            raise ValueError(
                f"pixel_values has shape {shape} but the vision tower takes (images, {', '.join(map(str, wanted))}); "
                "give all images of the batch one after the other, as the processor makes them"
            )

    def encode_images(
        self,
        pixel_values: Tensor,
        layer: int | list[int] | None = None,
        strategy: str | None = None,
        cut: Cut | None = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the vision tower and the projector on (I, 3, S, S); `pooler_output` is one (n, D) per image.

        Images of any size come as tiles with their `image_sizes` (I, 2). With a cut that reads the tower it is an
        EncodedImages, which holds what the cut is shown. Raises ValueError for pixels of another shape, and for a cut
        that this model's tower or projector cannot serve. `kwargs` may ask for output_hidden_states and
        output_attentions.
        """
        self.check_pixels(pixel_values, image_sizes)
        layers = layer if layer is not None else self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        reading = None if cut is None else self._reading(cut, layers, strategy)
        if self.device.type != "meta":  # weights on a disk: their hooks move the input
            pixel_values = pixel_values.to(self.device)
        asked = {name: value for name, value in kwargs.items() if name.startswith("output_") and value}
        to_tower: dict[str, Any] = {} if reading is None else {"tower": reading}
        to_tower |= {} if self.tiling is None else {"image_sizes": image_sizes}
        side = coarse = self._patches_along
        if cut is not None and cut.picture_side is not None:
            coarse = budget(cut.picture_side, side)
            pixel_values = _downsampled(pixel_values, coarse * self.config.vision_config.patch_size)
            to_tower["interpolate_pos_encoding"] = True
        outputs: BaseModelOutputWithPooling = self.get_image_features(
            pixel_values,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            return_dict=True,
            **asked,
            **to_tower,
        )
        if cut is not None and reading is not None:
            seen = dict(reading.seen)
            if cut.before_projector or "tower" in cut.sees:
                seen["tower"] = torch.cat([outputs.hidden_states[one][:, 1:] for one in layers], dim=-1)
            features = features_of(outputs)
            if "clip_tokens" in cut.sees:
                width = self.config.vision_config.hidden_size
                patches = outputs.hidden_states[layers[-1]][:, 1:]
                clip = text_tower.open_clip(str(cut.text_tower), width, patches.device)
                seen["clip_tokens"] = clip.tokens(patches)
            if cut.picture_side is not None:
                features = [_placed(one, side, coarse) for one in features]
            outputs.pooler_output = EncodedImages(features, seen, cut)
        if "output_hidden_states" not in asked:
            outputs.hidden_states = None  # the projector has read them; kept, they would be memory for nothing
        return outputs

    def _reading(self, cut: Cut, layers: Sequence[int], strategy: str | None) -> TowerReading | None:
        """Return what reads the vision tower for a cut; None where the cut is shown nothing of it.

        ValueError where an image token is not made of one patch, and where the cut reads a layer without attention.
        """
        if not cut.reads_tower:
            return None
        wanted = cut.asked_of_tower
        if self.tiling is not None:
            raise ValueError(
                f"the method decides about patches by the vision tower ({wanted}), which sees an image of a LLaVA-NeXT "
                "tile by tile: patches are shown twice, some hold padding alone, and no class token has seen them all; "
                "use a method that decides by projected features or by attention, such as divprune or fastv"
            )
        strategy = strategy if strategy is not None else self.config.vision_feature_select_strategy
        self.image_length(strategy)  # refuses a strategy that is none
        added = self.config.added_image_tokens
        if STRATEGIES[strategy] or not find_projector(self.config.projector).per_patch or added:
            raise ValueError(
                f"the method decides about patches by the vision tower ({wanted}), and here an image's tokens are not "
                f"its patches: vision_feature_select_strategy={strategy!r}, projector={self.config.projector!r}, "
                f"{added} tokens added by the checkpoint's method; use 'default', a projector with `per_patch` and a "
                "checkpoint that adds none, or a method that decides by projected features, such as divprune"
            )
        depth, blocks = self.config.vision_config.num_hidden_layers, self.vision_tower.encoder.layers
        asked: dict[Any, frozenset[Evidence]] = {}
        if earlier := cut.sees & {"early_received", "early_class_row"}:
            early = max(1, round((cut.early_depth or 0) * depth))
            asked[blocks[early - 1].self_attn] = earlier
        if not (attended := cut.sees - earlier - {"tower"} - CLIP_EVIDENCE):
            return TowerReading(asked)
        layer = layers[-1] if cut.tower_layer is None else cut.tower_layer
        if not -depth - 1 <= layer <= depth or layer in (0, -depth - 1):
            raise ValueError(
                f"the method decides by {wanted} of the vision tower's layer {layer}, and attention is that of the "
                f"layers 1 to {depth}, or {-depth} to -1, of this tower (0 is the embeddings); choose one of them"
            )
        module = blocks[layer % (depth + 1) - 1].self_attn
        return TowerReading({**asked, module: attended | asked.get(module, frozenset())})

    def images_of_call(
        self, inputs: Inputs, layout: TokenLayout, cut: Cut | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | None:
        """Return the images, encoded here or as features given; ValueError unless they fit the layout's image tokens.

        What `cut` is shown of the vision tower comes along (`encode_images`). In training a batch without any passes a
        blank one through, which fills no token.
        """
        pixels, features = inputs.pixel_values, inputs.image_features
        if pixels is not None and features is not None:
            raise ValueError("give either pixel_values or image_features, not both")
        lengths = self.lengths_of(inputs)
        if features is not None:
            check_images(layout, lengths, len(features))
            self.check_added(features)
            given = features if isinstance(features, EncodedImages) else list(features)
            return BaseModelOutputWithPooling(pooler_output=given)
        if pixels is not None:
            self.check_pixels(pixels, inputs.image_sizes)
            check_images(layout, lengths, len(pixels) if isinstance(lengths, int) else len(lengths))
            given = {**kwargs, "image_sizes": inputs.image_sizes}
            return self.encode_images(pixels, inputs.feature_layer, inputs.feature_strategy, cut, **given)
        if self.training and torch.is_grad_enabled() and not bool(layout.is_image.any()):
            return self._no_images()
        return None

    def check_added(self, features: Tensor | Sequence[Tensor]) -> None:
        """Raise ValueError unless images given as features end in the tokens that a learned method adds to each."""
        count = self.config.added_image_tokens
        if not count:
            return
        added_nD = self.language_model.added_image_tokens(count)
        for number, one in enumerate(features):
            if len(one) <= count or not torch.equal(one[-count:].to(added_nD.device), added_nD.to(one.dtype)):
                raise ValueError(
                    f"image_features[{number}] does not end in the {count} learned tokens that this checkpoint adds to "
                    "an image; give pixel_values, or the pooler_output of model.model.encode_images(pixel_values)"
                )

    def _no_images(self) -> BaseModelOutputWithPooling:
        """Features of no image, (0, n, D), for a training batch without one.

        A blank image passes the vision tower and the projector all the same: the other processes of a run use theirs,
        and where weights are spread over processes (ZeRO-3) or gradients are averaged, all have to take part.
        """
        vision, sizes = self.config.vision_config, None
        like = next(self.vision_tower.parameters())
        if self.tiling is None:
            blank = like.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
        else:
            blank, sizes = self.blank_tiles(like)
        features = torch.stack(features_of(self.encode_images(blank, image_sizes=sizes)))
        return BaseModelOutputWithPooling(pooler_output=features[:0])


def _downsampled(pixels: Tensor, size: int) -> Tensor:
    """(I, 3, size, size): the pictures made smaller, bicubic and antialiased."""
    made = F.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
    return made.to(pixels.dtype)


def _placed(features_mD: Tensor, side: int, coarse: int) -> Tensor:
    """(n, D): features (m, D) of a coarse grid, each in the middle of its cell in the whole grid; zeros elsewhere."""
    place_m = torch.tensor(middles(side, coarse), device=features_mD.device)
    return features_mD.new_zeros(side**2, features_mD.shape[1]).index_copy(0, place_m, features_mD)


def features_of(images: BaseModelOutputWithPooling) -> list[Tensor]:
    """Return the projected features of encoded images, (n, D) for each, with what the vision tower says of them."""
    found = images.pooler_output
    return found if isinstance(found, EncodedImages) else list(found)


def tower_of(method: Method, cut: Cut, images: BaseModelOutputWithPooling | None) -> EncodedImages:
    """Return the images with what the vision tower says of them for a method's cut; ValueError where that is lacking.

    Images that came as features have passed the tower elsewhere.
    """
    found = None if images is None else images.pooler_output
    if isinstance(found, EncodedImages) and found.serves(cut):
        return found
    raise ValueError(
        f"method {method.name!r} decides by the vision tower ({cut.asked_of_tower}), and the images of this call came "
        "as projected features, which say nothing of it; give pixel_values, or the pooler_output of "
        "model.model.encode_images(pixel_values, cut=method.cuts(layers)[0]), or use a method that decides by "
        "projected features, such as divprune"
    )


def check_images(layout: TokenLayout, lengths: int | Sequence[int], images: int | None = None) -> None:
    """Raise ValueError unless images of these lengths fill the layout's image tokens, each in one piece in one row.

    `lengths` holds the tokens of each image, in row order, or the one number of all; `images` is their number, None
    where no more is known of them than their tokens.
    """
    one = isinstance(lengths, int)
    found, pieces = torch.stack([layout.in_image.sum(), layout.image_starts.sum()]).tolist()
    count = images if images is not None else found // lengths if one else len(lengths)
    wanted = count * lengths if one else sum(lengths)
    if found == wanted and pieces == count:
        return
    if found != wanted and (images is not None or not one):
        size = str(lengths) if one else ", ".join(map(str, lengths))
        as_images = f" ({found / lengths:g} images)" if one else ""
        raise ValueError(
            f"{count} images of {size} tokens were given for {found} image tokens{as_images}; give one image per "
            "<image> place"
        )
    if one and bool((layout.in_image.sum(1) % lengths).any()):
        raise ValueError(
            f"a row holds part of an image: its image tokens are not a multiple of {lengths}; "
            "truncate prompts between images, never inside one"
        )
    number = int((torch.bincount(layout.image[layout.image_starts]) > 1).nonzero()[0])
    raise ValueError(
        f"the {lengths if one else lengths[number]} tokens of image {number}, counted from 0 row by row, do not follow "
        "one another in one row; give images in the order of their tokens, and truncate prompts between images, never "
        "inside one"
    )
