"""Dynamic-LLaVA without its head: vision tower, projector and the sparse language model.

A dense call is handed to the parent, transformers' own LLaVA, and nothing of ours goes along.
Shape suffixes: B rows, N tokens, I images of the batch in row order, n image tokens of one image, D hidden size.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.attention import TowerNames, serve_sparsely
from dynamic_llava.engine.cache import CACHE, check_dense_cache, is_live, one_cache
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.engine.plan import Plan, cuts_of
from dynamic_llava.layout import TokenLayout, chunk_of
from dynamic_llava.methods import Spelling
from dynamic_llava.model.arguments import check_names, check_served, check_shapes, names_of
from dynamic_llava.model.configuration import DynamicLlavaConfig
from dynamic_llava.model.images import ImageInputs, Inputs, check_images, features_of, tower_of
from dynamic_llava.model.outputs import DynamicModelOutput
from dynamic_llava.model.switches import choose_method
from dynamic_llava.model.text_tower import asked_text
from dynamic_llava.projectors import Projector, find_projector, image_tokens

TAKES_ENCODED = "mm_encoder_outputs" in inspect.signature(LlavaModel.forward).parameters
"""Whether the installed transformers' LLaVA takes images that are encoded already."""


class DynamicLlavaPreTrainedModel(LlavaPreTrainedModel):
    """Shared by both model classes: the configuration class and the settings of a call."""

    config_class = DynamicLlavaConfig
    config: DynamicLlavaConfig
    _no_split_modules = [  # noqa: RUF012  # as in transformers' models
        layer for family in FAMILIES.values() for layer in family._no_split_modules
    ]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Projector):  # asked behind the modules in it
            module.initialise()
        if isinstance(module, DynamicLlavaModel) and module.tiling is not None:
            nn.init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)

    def settings_of_call(self, output_keep_rate: float | None) -> SparsityConfig:
        """Return the checkpoint's settings, with the rate r_OT that a training call may give instead."""
        own: SparsityConfig = self.config.sparsity
        return own if output_keep_rate is None else replace(own, output_keep_rate=output_keep_rate)


class DynamicLlavaModel(ImageInputs, DynamicLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and sparse language model, without the head."""

    def __init__(self, config: DynamicLlavaConfig) -> None:
        # LlavaModel's own constructor would build a plain decoder.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        serve_sparsely(self.vision_tower.encoder.layers, self.vision_tower.config, TowerNames)
        activation = ACT2FN[config.projector_hidden_act]
        self.multi_modal_projector = find_projector(config.projector)(config, activation)
        if self.tiling is not None:
            self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self.language_model = FAMILIES[config.text_config.model_type](config.text_config, config.sparsity)
        self.post_init()

    def new_projector(self, config: DynamicLlavaConfig) -> Projector:
        """Return a newly initialised projector for a configuration; its weights depend on torch's seed alone."""
        projector = find_projector(config.projector)(config, ACT2FN[config.projector_hidden_act])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            projector.apply(self._init_weights)
        return projector

    def exchange_projector(self, name: str) -> None:
        """Put a newly initialised projector in place of this one; the configuration follows, for the model too.

        It reads what it usually does where the last one read several layers.
        """
        config, old = self.config, next(self.multi_modal_projector.parameters())
        layers = config.vision_feature_layer
        values = config.to_dict() | {"projector": name}
        values["vision_feature_layer"] = layers if isinstance(layers, int) else layers[-1]
        read = DynamicLlavaConfig.from_dict(values)  # ValueError for what does not fit, before anything is changed
        self.multi_modal_projector = self.new_projector(read).to(old.device, old.dtype)
        config.projector, config.vision_feature_layer = name, read.vision_feature_layer
        config.image_seq_length = image_tokens(config)

    @can_return_tuple
    def get_image_features(  # transformers' generate reads in the signature which of its inputs are an image's
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As the parent's, with the learned tokens of a method that adds some behind those of each image.

        Of a LLaVA-NeXT as transformers' own class for it: tiles in, the tokens of whole images with their newlines out.
        """
        if self.tiling is not None:
            pixel_values = self.tiles_of(pixel_values, image_sizes)
        elif image_sizes is not None:
            kwargs["image_sizes"] = image_sizes
        outputs = super().get_image_features(
            pixel_values=pixel_values,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            **{**kwargs, "return_dict": True},
        )
        if self.tiling is not None:
            outputs.pooler_output = self.packed(outputs.pooler_output, image_sizes)
        if count := self.config.added_image_tokens:
            added_nD = self.language_model.added_image_tokens(count)
            outputs.pooler_output = [torch.cat([one, added_nD.to(one)]) for one in outputs.pooler_output]
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        *,
        image_features: Tensor | Sequence[Tensor] | None = None,
        image_mask: Tensor | None = None,
        output_mask: Tensor | None = None,
        keep_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        method: Spelling | None = None,
        masked: bool = False,
        answers_only: bool = False,
        asked: Tensor | None = None,
        sample_key: Tensor | None = None,
        tau: float = 1.0,
        output_keep_rate: float | None = None,
        loss_scale: float = 1.0,
        compile: bool = False,
        **kwargs: Any,
    ) -> DynamicModelOutput:
        """Embed, place the image features, and run the language model; arguments as in the class with the head."""
        cache = one_cache(cache, past_key_values)
        check_names(kwargs, FORWARD_NAMES, "forward")
        self.check_feature_layer(vision_feature_layer)
        method = choose_method(self.config.sparsity, method=method)
        dense = method.is_dense and keep_mask is None and not (masked or answers_only)
        encoded = mm_encoder_outputs.get("image") if mm_encoder_outputs else None
        if encoded is not None and not (dense and TAKES_ENCODED):
            image_features, mm_encoder_outputs = features_of(encoded), None
        inputs = Inputs(
            input_ids,
            inputs_embeds,
            pixel_values,
            image_features if image_features is None or len(image_features) else None,
            image_mask,
            vision_feature_layer,
            vision_feature_select_strategy,
            image_sizes,
        )
        self.check_tokens(inputs)
        tokens = {"attention_mask": attention_mask, "position_ids": position_ids, "cache": cache}
        if dense:
            if mm_encoder_outputs:
                kwargs["mm_encoder_outputs"] = mm_encoder_outputs
            return self._dense_forward(inputs, tokens, output_mask, image_sizes=image_sizes, **kwargs)
        check_served({**kwargs, "image_sizes": image_sizes if self.tiling is None else None})
        plan = {"method": method, "masked": masked, "answers_only": answers_only, "tau": tau, "compile": compile}
        plan["asked"] = asked
        plan |= {"keep_mask": keep_mask, "sample_key": sample_key, "loss_scale": loss_scale}
        plan["settings"] = self.settings_of_call(output_keep_rate)
        return self._sparse_forward(inputs, tokens, output_mask, plan, **kwargs)

    def _sparse_forward(
        self, inputs: Inputs, given: dict[str, Any], output_mask: Tensor | None, plan: dict[str, Any], **kwargs: Any
    ) -> DynamicModelOutput:
        """Run the language model as `plan`, the values of a Plan, says; `given` is its mask, positions and cache."""
        image, live = self.image_places(inputs), is_live(given["cache"])
        (batch, tokens), seen = image.shape, given["cache"].get_seq_length() if live else 0
        check_shapes(batch, tokens, **given, **plan)
        # A single token on a live cache is no image, whatever its id, unless an image comes along or a mask says so.
        is_step = live and tokens == 1 and not inputs.has_images and inputs.image_mask is None
        if output_mask is None and tokens == 1 and live:
            output_mask = torch.ones_like(image) if is_step else ~image  # it continues the answer
        lengths = None if is_step else self.lengths_of(inputs)
        newlines = None
        if self.tiling is not None and lengths:
            newlines = self.newlines_of(inputs.image_sizes)
        layout = TokenLayout.build(image, given["attention_mask"], output_mask, lengths, seen, newlines)
        idle = plan["method"].is_dense and plan["keep_mask"] is None
        cuts = () if idle else cuts_of(plan["method"], self.config.text_config.num_hidden_layers)
        images = None
        if not is_step:
            reads = next((cut for cut in cuts if cut.reads_tower and plan["keep_mask"] is None), None)
            images = self.images_of_call(inputs, layout, reads, **kwargs)
            if images is None and inputs.input_ids is not None:
                _refuse_places_without_images(layout.in_image)
            elif images is None and inputs.image_mask is not None:
                check_images(layout, lengths)
            plan["has_images"] = bool(layout.is_image.any())
            if reads is not None and plan["has_images"]:
                plan["tower"] = tower_of(plan["method"], reads, images)
                plan["project"] = self.multi_modal_projector
                plan["question"] = asked_text(self.config, plan["method"], reads, inputs.input_ids, layout)
        if plan["sample_key"] is None:
            plan["sample_key"] = torch.zeros(batch, dtype=torch.int64, device=image.device)
        if plan["keep_mask"] is not None:
            plan["keep_mask"] = _decisions(chunk_of("keep_mask", plan["keep_mask"], image, seen))
        if plan["keep_mask"] is not None and any(cut.within_image for cut in cuts):
            raise ValueError(
                f"keep_mask was given to method {plan['method'].name!r}, whose images are read by tokens of their own "
                "although they are dropped; give it to a method whose dropped tokens nobody reads, such as "
                "get_method('dense', layer=2)"
            )
        if plan["keep_mask"] is not None and not cuts:
            raise ValueError(
                f"keep_mask was given to method {plan['method'].name!r}, which never decides, so no layer is the first "
                "that it could hold for; give it to a method with a cut, such as get_method('dense', layer=2)"
            )
        outputs = self.language_model(
            inputs_embeds=self.embed(inputs, images, layout.in_image),
            plan=Plan(cuts=cuts, layout=layout, **plan),
            **given,
            **kwargs,
        )
        return DynamicModelOutput(**{**outputs, "image_outputs": images})

    def _dense_forward(
        self, inputs: Inputs, given: dict[str, Any], output_mask: Tensor | None, **kwargs: Any
    ) -> DynamicModelOutput:
        """Let the parent run. It gets its own arguments alone; images given in a way of ours are embedded before."""
        cache = given.pop("cache")
        check_dense_cache(cache)
        shape = (inputs.input_ids if inputs.inputs_embeds is None else inputs.inputs_embeds).shape[:2]
        check_shapes(*shape, position_ids=given["position_ids"])
        _check_rows(given["attention_mask"], *shape)
        ours = (inputs.image_features, inputs.image_mask, output_mask)
        # A training batch of text passes a blank image through, in dense calls as in sparse ones.
        blank = self.training and torch.is_grad_enabled() and inputs.pixel_values is None
        images = None
        if any(value is not None for value in ours) or (blank and not kwargs.get("mm_encoder_outputs")):
            image = self.image_places(inputs)
            if output_mask is not None:
                image = image & ~output_mask[:, output_mask.shape[1] - image.shape[1] :].bool()
            layout = TokenLayout.build(image, None, None, self.lengths_of(inputs))
            images = self.images_of_call(inputs, layout, **kwargs)
            embeds = self.embed(inputs, images, image)
            inputs = replace(inputs, input_ids=None, inputs_embeds=embeds, pixel_values=None)
        outputs = super().forward(
            input_ids=inputs.input_ids,
            inputs_embeds=inputs.inputs_embeds,
            pixel_values=inputs.pixel_values,
            vision_feature_layer=inputs.feature_layer,
            vision_feature_select_strategy=inputs.feature_strategy,
            return_dict=True,
            **given,
            **{CACHE: cache},
            **kwargs,
        )
        if "image_hidden_states" in outputs:  # transformers before 5.24 gives all images as one row of tokens
            lengths = self.lengths_of(inputs)
            features = outputs["image_hidden_states"].split(lengths)
            outputs = {**outputs, "image_hidden_states": features}
        result = DynamicModelOutput.of(outputs)
        if images is not None:
            result.image_outputs = images
        return result


def _check_rows(attention_mask: Any, rows: int, tokens: int) -> None:
    """A mask of two dimensions must cover the tokens, in a dense call too; transformers makes those of four itself."""
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        found = tuple(attention_mask.shape)
        if found[0] != rows or found[1] < tokens:
            raise ValueError(
                f"attention_mask has shape {found} but the tokens have shape ({rows}, {tokens}); give one value per "
                "token, those in the cache included"
            )


def _refuse_places_without_images(image_BN: Tensor) -> None:
    if bool(image_BN.any()):
        raise ValueError(
            f"input_ids hold {int(image_BN.sum())} image tokens but pixel_values is None; give the images, or "
            "leave <image> out of the prompt"
        )


def _decisions(keep_mask: Tensor) -> Tensor:
    """Return the given decisions. ValueError for a value between 0 and 1."""
    # Eq. 7 could weigh a token by a fraction, but a token cannot be removed by a fraction: the paths would part.
    between = (keep_mask != 0) & (keep_mask != 1)
    if keep_mask.dtype != torch.bool and bool(between.any()):
        raise ValueError(
            f"keep_mask holds {keep_mask[between][0].item():.4g}; give 1 for a token that is kept and 0 for one that "
            "is dropped (masked_softmax_attention itself takes fractions)"
        )
    return keep_mask


# transformers' LLaVA hands the last two on to its layers.
FORWARD_NAMES = names_of(DynamicLlavaModel) | {"use_cache", "shift_labels"}
