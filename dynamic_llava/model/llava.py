"""Dynamic-LLaVA on transformers: vision tower, projector, the sparse language model and the head.

Shape suffixes: B rows, N tokens, I images of the batch in row order, n tokens of one image, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaMultiModalProjector,
    LlavaPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from dynamic_llava.config import SparsityMode
from dynamic_llava.layout import TokenLayout, chunk_of
from dynamic_llava.methods import Method
from dynamic_llava.model.cache_names import one_cache
from dynamic_llava.model.configuration import DynamicLlavaConfig
from dynamic_llava.model.decoder import DynamicLlamaModel
from dynamic_llava.model.generation import SparseGeneration
from dynamic_llava.model.initialization import initialize_predictor
from dynamic_llava.model.loading import CheckedLoading
from dynamic_llava.model.losses import language_model_loss, regularisers
from dynamic_llava.model.outputs import DynamicLlavaOutput, DynamicModelOutput
from dynamic_llava.model.plan import Plan
from dynamic_llava.model.switches import check_compile, check_output_keep_rate, choose_method
from dynamic_llava.model.untrained import warn_untrained
from dynamic_llava.sparsity.predictors import ImagePredictor, OutputPredictor


class DynamicLlavaPreTrainedModel(LlavaPreTrainedModel):
    """Shared by both model classes: the configuration class and the initialisation of new predictors."""

    config_class = DynamicLlavaConfig
    config: DynamicLlavaConfig
    _no_split_modules = ["LlamaDecoderLayer", "ImagePredictor", "OutputPredictor"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (ImagePredictor, OutputPredictor)):
            initialize_predictor(module)


class DynamicLlavaModel(DynamicLlavaPreTrainedModel, LlavaModel):
    """Vision tower, projector and sparse language model, without the head."""

    def __init__(self, config: DynamicLlavaConfig) -> None:
        # LlavaModel's own constructor would build a plain Llama.
        LlavaPreTrainedModel.__init__(self, config)
        self.vision_tower = AutoModel.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = DynamicLlamaModel(config.text_config, config.sparsity)
        self.post_init()

    @property
    def tokens_per_image(self) -> int:
        """n: image tokens that one image becomes."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches if self.config.vision_feature_select_strategy == "default" else patches + 1

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        output_mask: Tensor | None = None,
        keep_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        method: Method | None = None,
        sample_key: Tensor | None = None,
        masked: bool = False,
        answers_only: bool = False,
        tau: float = 1.0,
        output_keep_rate: float | None = None,
        compile: bool = False,
        **kwargs: Any,
    ) -> DynamicModelOutput:
        """Embed, place the image features, and run the language model; arguments as in the class with the head."""
        cache = one_cache(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        image = self._image_mask(input_ids, inputs_embeds, image_mask)
        single = image.shape[1] == 1
        if output_mask is None and single and _is_live(cache):
            # A single token on a live cache continues the answer, unless it is an image of one token.
            output_mask = torch.ones_like(image) if pixel_values is None and image_features is None else ~image
        past = cache.get_seq_length() if cache is not None else 0
        layout = TokenLayout.build(image, attention_mask, output_mask, self.tokens_per_image, past)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        features = self._features(pixel_values, image_features, layout)
        if features is not None:
            features = features.to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(layout.image[..., None], features)
        elif input_ids is not None and not (single and _is_live(cache)) and bool(layout.image.any()):
            raise ValueError(
                f"input_ids hold {int(layout.image.sum())} image tokens but pixel_values is None; give the images, or "
                "leave <image> out of the prompt"
            )
        batch, device = image.shape[0], inputs_embeds.device
        if output_keep_rate is None:
            output_keep_rate = self.config.sparsity.output_keep_rate
        plan = Plan(
            method=method if method is not None else choose_method(self.config.sparsity),
            layout=layout,
            sample_key=torch.zeros(batch, dtype=torch.int64, device=device) if sample_key is None else sample_key,
            masked=masked,
            answers_only=answers_only,
            tau=tau,
            output_keep_rate=output_keep_rate,
            keep_mask=_decisions(keep_mask, image, past),
            compile=compile,
        )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            plan=plan,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **kwargs,
        )
        outputs.image_hidden_states = features
        return outputs

    def _image_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, image_mask: Tensor | None) -> Tensor:
        if inputs_embeds is None:
            if image_mask is not None:
                raise ValueError("image_mask belongs to inputs_embeds; input_ids already say where images are")
            return input_ids == self.config.image_token_id
        if image_mask is not None:
            if image_mask.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"image_mask has shape {tuple(image_mask.shape)} but the tokens have shape "
                    f"{tuple(inputs_embeds.shape[:2])}; give one value per token"
                )
            return image_mask.bool()
        return torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)

    def _features(
        self, pixel_values: Tensor | None, image_features: Tensor | None, layout: TokenLayout
    ) -> Tensor | None:
        """Projected images (I, n, D), from pixels (I, 3, S, S) or as given; their number must fit the prompt."""
        if pixel_values is not None and image_features is not None:
            raise ValueError("give either pixel_values or image_features, not both")
        given = pixel_values if pixel_values is not None else image_features
        if given is None:
            return self._empty_features() if self.training and not bool(layout.image.any()) else None
        self.check_images(given.shape[0], layout.image)
        if image_features is not None:
            return image_features
        return torch.stack(list(self.get_image_features(pixel_values, return_dict=True).pooler_output))

    def _empty_features(self) -> Tensor:
        """Projected features of no image, (0, n, D), for a training batch without one.

        A blank image passes the vision tower and the projector all the same: the other processes of a run use theirs,
        and where weights are spread over processes (ZeRO-3) or gradients are averaged, all have to take part.
        """
        vision = self.config.vision_config
        like = next(self.vision_tower.parameters())
        blank = like.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
        return torch.stack(list(self.get_image_features(blank, return_dict=True).pooler_output))[:0]

    def check_images(self, images: int, image_BN: Tensor) -> None:
        """Raise ValueError unless `images` images fill the image tokens (B, N) bool, each row a whole number."""
        places_B = image_BN.sum(1)
        if int(places_B.sum()) != images * self.tokens_per_image:
            raise ValueError(
                f"{images} images of {self.tokens_per_image} tokens were given for {int(places_B.sum())} image tokens "
                f"({int(places_B.sum()) / self.tokens_per_image:g} images); give one image per <image> place"
            )
        if bool((places_B % self.tokens_per_image).any()):
            raise ValueError(
                f"a row holds part of an image: its image tokens are not a multiple of {self.tokens_per_image}; "
                "truncate prompts between images, never inside one"
            )


class DynamicLlavaForConditionalGeneration(
    SparseGeneration, CheckedLoading, DynamicLlavaPreTrainedModel, LlavaForConditionalGeneration
):
    """Dynamic-LLaVA with its language-model head: train, prefill, decode with or without cache, all sparse.

    Nothing about a generation is kept on the module: decisions, caches and noise keys travel with the call.

    Arguments of `forward`:
        input_ids: (B, N) int64; every image is `tokens_per_image` image tokens.
        pixel_values: (I, 3, S, S) float, all images of the batch in row order.
        attention_mask: (B, N) 1 = real token; padding on either side. On a live cache it covers the past too.
        labels: (B, N) int64, -100 = not learned. With labels nothing is removed: dropped tokens are masked
            (Eq. 7), with sampled decisions in training mode and hard ones in eval mode. Without labels dropped
            tokens are physically removed.
        output_mask: (B, N) bool, tokens of an answer. By default the labelled tokens of each row's last answer
            (of all answers with output_segments="all"), and on a live cache a single new token.
        keep_mask: (B, N) bool, int or float, 1 = kept and 0 = dropped: decisions given instead of made.
        image_features: (I, n, D) projected images instead of pixel_values.
        image_mask: (B, N) bool, only with inputs_embeds that already hold image features.
        sparsity: "both", "image", "output" or "none"; default both.
        image_keep_rate, output_threshold: override the checkpoint's settings for this call.
        output_keep_rate: override r_OT (of the regulariser, and of a relaxation with a budget), training only.
        method: a Method or its registered name, instead of Dynamic-LLaVA's own decisions.
        tau: temperature of the relaxation in training mode, 1.0 by default.
        sample_key: (B,) int64 noise keys; a sample with the same key gets the same noise in any batch. Default: in
            training drawn from torch's generator, otherwise 0.
        num_items_in_batch, num_samples_in_batch: global denominators of the LM loss (labelled tokens) and of the
            regularisers (samples), across ranks and accumulation; default: this batch.
        logits_to_keep: make logits of the last so many tokens only (0: all), or of the indices given.
        compile: run a single new token on a live sparse cache as one compiled graph (model/step.py); other passes run
            as ever.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: DynamicLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = DynamicLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_mask: Tensor | None = None,
        keep_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        image_mask: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        past_key_values: Cache | None = None,
        sparsity: SparsityMode | None = None,
        image_keep_rate: float | None = None,
        output_keep_rate: float | None = None,
        output_threshold: float | None = None,
        method: Method | str | None = None,
        tau: float | None = None,
        sample_key: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_samples_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        compile: bool = False,
        **kwargs: Any,
    ) -> DynamicLlavaOutput:
        """Run one pass; the class describes the arguments.

        Raises ValueError for switches, masks, images and caches that do not fit.
        """
        masked = labels is not None
        cache = one_cache(cache, past_key_values)
        if masked and cache is not None:
            raise ValueError("labels need the whole sequence: leave the cache out")
        chosen = choose_method(
            self.config.sparsity,
            sparsity=sparsity,
            method=method,
            image_keep_rate=image_keep_rate,
            output_threshold=output_threshold,
        )
        check_output_keep_rate(output_keep_rate, trains=masked and self.training)
        check_compile(compile, chosen, cached=use_cache is not False and not masked)
        if not (self.training or keep_mask is not None or isinstance(method, Method) or _is_live(cache)):
            warn_untrained(self.config, chosen)  # generate has warned, and hands over the object it has chosen
        if masked and output_mask is None:
            output_mask = _answers(labels, self.config.sparsity.output_segments)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            image_mask=image_mask,
            output_mask=output_mask,
            keep_mask=keep_mask,
            method=chosen,
            masked=masked and not (chosen.is_dense and keep_mask is None),
            tau=1.0 if tau is None else tau,
            output_keep_rate=output_keep_rate,
            sample_key=self._sample_key(sample_key, labels),
            use_cache=False if masked else use_cache,
            compile=compile,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # -0 is 0: the whole sequence
        result = _with_logits(outputs, logits)
        if labels is not None:
            result.lm_loss = language_model_loss(logits, labels, num_items_in_batch)
            self._add_regularisers(result, chosen, output_keep_rate, num_samples_in_batch)
        return result

    def _add_regularisers(
        self, result: DynamicLlavaOutput, method: Method, target: float | None, samples: Tensor | int | None
    ) -> None:
        """Fill in the keep-rate terms (Eq. 10) and the total loss; a dense pass has no terms."""
        result.loss = result.lm_loss
        if result.sparsity is None:
            return
        settings = self.config.sparsity
        result.image_keep_loss, result.output_keep_loss = regularisers(
            result.sparsity, method, settings, target, samples
        )
        result.loss = result.lm_loss + settings.keep_rate_weight * (result.image_keep_loss + result.output_keep_loss)

    def _sample_key(self, sample_key: Tensor | None, labels: Tensor | None) -> Tensor | None:
        if sample_key is not None or labels is None or not self.training:
            return sample_key
        # The CPU generator, so that one torch.manual_seed gives the same decisions on every device.
        return torch.randint(0, 2**62, (labels.shape[0],)).to(labels.device)


def _with_logits(outputs: DynamicModelOutput, logits: Tensor) -> DynamicLlavaOutput:
    return DynamicLlavaOutput(
        logits=logits,
        cache=outputs.cache,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        image_hidden_states=outputs.image_hidden_states,
        sparsity=outputs.sparsity,
    )


def _answers(labels: Tensor, segments: str) -> Tensor:
    """(B, N) bool: labelled tokens, of each row's last run of labels or of all runs."""
    labelled = labels != -100
    if segments == "all":
        return labelled
    starts = labelled & ~nn.functional.pad(labelled, (1, 0))[:, :-1]
    run = starts.cumsum(1)
    return labelled & (run == run[:, -1:])


def _is_live(cache: Cache | None) -> bool:
    return cache is not None and cache.get_seq_length() > 0


def _decisions(keep_mask: Tensor | None, like: Tensor, past: int) -> Tensor | None:
    """Return the chunk's part of the given decisions. ValueError for another shape, or a value between 0 and 1."""
    if keep_mask is None:
        return None
    chunk = chunk_of("keep_mask", keep_mask, like, past)
    # Eq. 7 could weigh a token by a fraction, but a token cannot be removed by a fraction: the paths would part.
    between = (chunk != 0) & (chunk != 1)
    if chunk.dtype != torch.bool and bool(between.any()):
        raise ValueError(
            f"keep_mask holds {chunk[between][0].item():.4g}; give 1 for a token that is kept and 0 for one that is "
            "dropped (masked_softmax_attention itself takes fractions)"
        )
    return chunk
