"""Dynamic-LLaVA on transformers, with the language-model head: what users load, train and generate with.

A dense call is handed to the parent, transformers' own LLaVA. Training minimises the cross entropy of the labelled
tokens plus the losses of the method itself (Eq. 10).
Shape suffixes: B rows, N tokens, I images of the batch in row order, n image tokens of one image, D hidden size,
y learned tokens, V vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from dynamic_llava.config import DistillConfig, SparsityConfig, SparsityMode, check_keep_rate
from dynamic_llava.engine.cache import CACHE, is_live, one_cache
from dynamic_llava.engine.decide import asked_by
from dynamic_llava.engine.learned import warn_untrained
from dynamic_llava.engine.record import SparsityRecord
from dynamic_llava.methods import Method, Spelling
from dynamic_llava.model.arguments import check_names, check_shapes, names_of
from dynamic_llava.model.base_model import DynamicLlavaModel, DynamicLlavaPreTrainedModel
from dynamic_llava.model.configuration import DynamicLlavaConfig
from dynamic_llava.model.distillation import check_distillation, dense_logits, distillation_loss
from dynamic_llava.model.generation import SparseGeneration
from dynamic_llava.model.images import Inputs
from dynamic_llava.model.loading import CheckedLoading
from dynamic_llava.model.outputs import DynamicLlavaOutput, DynamicModelOutput
from dynamic_llava.model.switches import check_compile, check_temperature, choose_method

logger = logging.getLogger(__name__)


class DynamicLlavaForConditionalGeneration(
    SparseGeneration, CheckedLoading, DynamicLlavaPreTrainedModel, LlavaForConditionalGeneration
):
    """Dynamic-LLaVA with its language-model head: train, prefill, decode with or without cache, all sparse.

    Nothing about a generation is kept on the module: decisions, caches and noise keys travel with the call.

    Arguments of `forward`:
        input_ids: (B, N) int64; an image is `tokens_per_image` image tokens, or as many as its features in a list.
        pixel_values: (I, 3, S, S) float, all images of the batch in row order; of a LLaVA-NeXT their tiles,
            (I, most, 3, S, S), or those of all images one after the other, (tiles, 3, S, S).
        image_sizes: (I, 2) int64, of a LLaVA-NeXT the height and width in pixels of each image, also beside features.
        attention_mask: (B, N) 1 = real token; padding on either side. On a live cache it covers the past too.
        inputs_embeds: (B, N, D) instead of input_ids. Images that come along fill the tokens of `image_mask`, or,
            without it, those equal to the image token's embedding.
        vision_feature_layer, vision_feature_select_strategy: as in transformers, for this call.
        labels: (B, N) int64, -100 = not learned. With labels nothing is removed: dropped tokens are masked
            (Eq. 7), with sampled decisions in training mode and hard ones in eval mode. Without labels dropped
            tokens are physically removed.
        shift_labels: (B, N) int64, what each token shall predict, instead of the label behind it; with labels.
        output_mask: (B, N) bool, tokens of an answer; one with an image token's id is no image. By default the labelled
            tokens of each row's last answer (of all answers with output_segments="all"), image tokens left out, and on
            a live cache a single new token.
        keep_mask: (B, N) bool, int or float, 1 = kept and 0 = dropped: decisions given instead of made.
        image_features: projected images instead of pixel_values: (I, n, D), or, where images differ in their number of
            tokens, a list of one (n, D) per image, in row order. A method that reads the vision tower takes those alone
            that `model.encode_images` has encoded for its cut.
        image_mask: (B, N) bool, only with inputs_embeds: the tokens that are images, to be filled or filled already.
        sparsity: "both", "image", "output" or "none"; default both. With "none", and without keep_mask, the parent's
            forward runs, and everything that transformers' LLaVA can do is done as there.
        image_keep_rate, output_threshold: override the checkpoint's settings for this call.
        output_keep_rate: in training, override r_OT (of the regulariser, and of a relaxation with a budget); at
            inference, the share of output tokens that is to stay: of a method that has such a rate, or, in a calibrated
            checkpoint, of Dynamic-LLaVA, for which it chooses the threshold.
        method: what decides instead of Dynamic-LLaVA: a Method, a name (registered, or package.module:Class), or a
            mapping {"name": ..., setting: ...}; settings that are not said are the checkpoint's or the method's own.
        tau: temperature of the relaxation in training mode, 1.0 by default.
        sample_key: (B,) int64 noise keys; a sample with the same key gets the same noise in any batch. Default: in
            training drawn from torch's generator, otherwise 0.
        num_items_in_batch, num_samples_in_batch: global denominators of the LM loss (labelled tokens) and of the
            method's own losses (samples; one number, or one for each name in the output's `method_losses`), across
            ranks and accumulation; default: this batch.
        distill: with labels, adds the KL divergence from what the same weights predict without sparsity, at the tokens
            that are learned, to the loss (train.distill; model/distillation.py).
        loss_scale: what the caller multiplies the loss by before the backward pass; mask_grad_clip is meant without it.
        skip_logits: with labels, make logits of the tokens that are learned alone, for the loss, and return none: most
            of a training step's memory at a large vocabulary. A `loss_function` then gets them as one row.
        logits_to_keep: make logits of the last so many tokens only (0: all), or of the indices given.
        compile: run a single new token on a live sparse cache as one compiled graph (engine/step.py); other passes run
            as ever.
    Other arguments of transformers' models (output_hidden_states, ...) are handed on; any other name is refused.
    """

    accepts_loss_kwargs = True

    def __init__(self, config: DynamicLlavaConfig) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = DynamicLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.loss_function = language_model_loss
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
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        image_sizes: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        *,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_mask: Tensor | None = None,
        keep_mask: Tensor | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
        image_mask: Tensor | None = None,
        sparsity: SparsityMode | None = None,
        image_keep_rate: float | None = None,
        output_keep_rate: float | None = None,
        output_threshold: float | None = None,
        method: Spelling | None = None,
        tau: float | None = None,
        sample_key: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_samples_in_batch: Mapping[str, Tensor] | Tensor | int | None = None,
        distill: DistillConfig | None = None,
        loss_scale: float = 1.0,
        skip_logits: bool = False,
        compile: bool = False,
        **kwargs: Any,
    ) -> DynamicLlavaOutput:
        """Run one pass; the class describes the arguments.

        Raises ValueError for switches, names, shapes, images and caches that do not fit.
        """
        check_names(kwargs, FORWARD_NAMES, "forward")
        shift_labels = kwargs.pop("shift_labels", None)  # named, it would be one of the labels that a Trainer asks for
        switches = {"sparsity": sparsity, "image_keep_rate": image_keep_rate, "output_threshold": output_threshold}
        if output_keep_rate is not None and labels is not None and self.training:
            check_keep_rate("output_keep_rate", output_keep_rate)
        else:
            switches["output_keep_rate"], output_keep_rate = output_keep_rate, None
        chosen = choose_method(self.config.sparsity, method=method, **switches)
        check_compile(compile, chosen, cached=use_cache is not False and labels is None)
        kwargs |= {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes,
            "image_features": image_features,
            "image_mask": image_mask,
            CACHE: one_cache(cache, past_key_values),
        }
        kwargs |= {"output_mask": output_mask, "use_cache": use_cache, "method": chosen}
        if mm_encoder_outputs:  # transformers before 5.24 has no such argument
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        loss = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        check_distillation(distill, chosen, self.config.text_config.num_hidden_layers)
        _check_labels(input_ids if input_ids is not None else inputs_embeds, labels, shift_labels, skip_logits)
        check_temperature(tau)
        if chosen.is_dense and keep_mask is None:
            return self._dense_forward(kwargs, loss, logits_to_keep, skip_logits)
        kwargs |= {"keep_mask": keep_mask, "tau": tau or 1.0, "compile": compile, "loss_scale": loss_scale}
        kwargs |= {"output_keep_rate": output_keep_rate, "sample_key": self._sample_key(sample_key, labels)}
        if not (self.training or keep_mask is not None or isinstance(method, Method) or is_live(kwargs[CACHE])):
            warn_untrained(self.config, chosen)  # generate has warned, and hands over the object it has chosen
        if labels is not None:
            return self._learning_forward(kwargs, loss, logits_to_keep, num_samples_in_batch, distill, skip_logits)
        self._refuse_lost_losses({**loss, "distill": distill}, num_samples_in_batch)
        outputs = self.model(**kwargs, return_dict=True)
        return DynamicLlavaOutput.of(outputs, logits=self._logits(outputs, logits_to_keep))

    def _dense_forward(
        self, inputs: dict[str, Any], loss: dict[str, Any], logits_to_keep: int | Tensor, skip_logits: bool
    ) -> DynamicLlavaOutput:
        """transformers' own forward, loss and all; `method` tells the model without head, and goes no further."""
        if skip_logits:
            outputs = self.model(**inputs, return_dict=True)
            lm_loss, _ = self._lm_loss(outputs.last_hidden_state, loss, skip_logits)
            return DynamicLlavaOutput.of(outputs, loss=lm_loss, lm_loss=lm_loss, logits=None)
        given = {name: value for name, value in {**inputs, **loss}.items() if value is not None}
        outputs = super().forward(**given, logits_to_keep=logits_to_keep, return_dict=True)
        return DynamicLlavaOutput.of(outputs, lm_loss=outputs.loss)

    def _learning_forward(
        self,
        inputs: dict[str, Any],
        loss: dict[str, Any],
        logits_to_keep: int | Tensor,
        samples: Any,
        distill: DistillConfig | None,
        skip_logits: bool,
    ) -> DynamicLlavaOutput:
        """The masked forward, the LM loss, the method's own losses (Eq. 10) and, if asked for, the distillation's."""
        method, labels = inputs["method"], loss["labels"]
        if inputs[CACHE] is not None:
            raise ValueError("labels need the whole sequence: leave the cache out")
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            raise ValueError("labels need the logits of every token: leave logits_to_keep out")
        if inputs["output_mask"] is None:
            inputs["output_mask"] = _answers(labels, self._image_places(inputs), self.config.sparsity.output_segments)
        asked = asked_by(labels, inputs["output_mask"]) if self.training else None
        outputs = self.model(**{**inputs, "use_cache": False, "asked": asked}, masked=True, return_dict=True)
        lm_loss, logits = self._lm_loss(outputs.last_hidden_state, loss, skip_logits)
        settings = self.settings_of_call(inputs["output_keep_rate"])
        terms = method_losses(method, outputs.sparsity, settings, samples)
        total = total_loss(lm_loss, terms, method, settings)
        own_fields = {name: term for name, term in terms.items() if name in DynamicLlavaOutput.__dataclass_fields__}
        parts = {"lm_loss": lm_loss, "method_losses": terms, **own_fields}
        if distill is not None:
            learned_BN = _targets(labels, loss["shift_labels"]) != -100
            teacher_yV = dense_logits(self, inputs, outputs.image_outputs, learned_BN)
            student_yV = logits[0] if skip_logits else logits[learned_BN.to(logits.device)]
            parts["distill_loss"] = distillation_loss(
                student_yV, teacher_yV, distill.temperature, loss["num_items_in_batch"]
            )
            total = total + distill.weight * parts["distill_loss"]
        return DynamicLlavaOutput.of(outputs, loss=total, logits=None if skip_logits else logits, **parts)

    def _lm_loss(self, hidden_BND: Tensor, loss: dict[str, Any], skip_logits: bool) -> tuple[Tensor, Tensor]:
        """Return the LM loss, and its logits: (B, N, V), or with skip_logits (1, y, V) of the learned tokens."""
        vocabulary = self.config.text_config.vocab_size
        if not skip_logits:
            logits_BNV = self.lm_head(hidden_BND)
            return self.loss_function(logits=logits_BNV, vocab_size=vocabulary, **loss), logits_BNV
        targets_BN = _targets(loss["labels"], loss["shift_labels"]).to(hidden_BND.device)
        learned_BN = targets_BN != -100
        targets = dict.fromkeys(("labels", "shift_labels"), targets_BN[learned_BN][None])
        logits_1yV = self.lm_head(hidden_BND[learned_BN][None])
        return self.loss_function(logits=logits_1yV, vocab_size=vocabulary, **{**loss, **targets}), logits_1yV

    def _logits(self, outputs: DynamicModelOutput, logits_to_keep: int | Tensor) -> Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.lm_head(outputs.last_hidden_state[:, kept])  # -0 is 0: all

    def _image_places(self, inputs: dict[str, Any]) -> Tensor:
        names = ("input_ids", "inputs_embeds", "pixel_values", "image_features", "image_mask")
        return self.model.image_places(Inputs(*(inputs[name] for name in names), None, None))

    def _refuse_lost_losses(self, loss: dict[str, Any], samples: Any) -> None:
        """Refuse what belongs to a loss in a call without labels, and say what a training pass without them lacks."""
        for name, value in {**loss, "num_samples_in_batch": samples}.items():
            if value is not None:
                raise ValueError(
                    f"{name} was given without labels: a loss made from the logits (as Trainer does with "
                    "label_smoothing_factor and compute_loss_func) would lose the keep-rate terms. Give labels, and a "
                    "loss of your own as model.loss_function; or pass sparsity='none'"
                )
        if self.training and torch.is_grad_enabled():
            logger.warning_once(  # transformers gives it to every logger
                "a sparse pass in training mode without labels drops tokens for good: no predictor learns from it, and "
                "its outputs have no keep-rate terms. Give labels to train, or call model.eval()"
            )

    def _sample_key(self, sample_key: Tensor | None, labels: Tensor | None) -> Tensor | None:
        if sample_key is not None or labels is None or not self.training:
            return sample_key
        # The CPU generator, so that one torch.manual_seed gives the same decisions on every device.
        return torch.randint(0, 2**62, (labels.shape[0],)).to(labels.device)


def _answers(labels: Tensor, image: Tensor, segments: str) -> Tensor:
    """(B, N) bool: labelled tokens that are no image tokens, of each row's last run of labels or of all runs."""
    labelled = (labels != -100) & ~image.to(labels.device)
    if segments == "all":
        return labelled
    starts = labelled & ~nn.functional.pad(labelled, (1, 0))[:, :-1]
    run = starts.cumsum(1)
    return labelled & (run == run[:, -1:])


def _targets(labels: Tensor, shift_labels: Tensor | None, ignore_index: int = -100) -> Tensor:
    """(B, N) int64: what each token shall predict: the label behind it, or as told."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:] if shift_labels is None else shift_labels


def _check_labels(tokens: Tensor | None, labels: Tensor | None, shift_labels: Tensor | None, skip_logits: bool) -> None:
    if skip_logits and labels is None:
        raise ValueError("skip_logits leaves nothing but a loss, and there are no labels for one; give labels")
    if tokens is not None and tokens.dim() > 1:
        check_shapes(*tokens.shape[:2], labels=labels, shift_labels=shift_labels)


FORWARD_NAMES = names_of(DynamicLlavaForConditionalGeneration) | {"shift_labels"}


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross entropy of predicting each labelled token from the position before it; () float32.

    The model's `loss_function`, with the arguments of transformers': logits (B, N, V), labels (B, N) int64, or
    shift_labels (B, N), what each token shall predict. num_items_in_batch is the number of labelled tokens to divide by
    (the global batch), by default those of this batch. A batch without any gives 0, not NaN.
    """
    targets = _targets(labels, shift_labels, ignore_index).to(logits.device).flatten()
    total = nn.functional.cross_entropy(
        logits.float().flatten(0, -2), targets, ignore_index=ignore_index, reduction="sum"
    )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != ignore_index).sum().clamp(min=1)
    return total / torch.as_tensor(num_items_in_batch, device=total.device)


def method_losses(
    method: Method,
    record: SparsityRecord,
    settings: SparsityConfig,
    samples: Mapping[str, Tensor] | Tensor | int | None,
) -> dict[str, Tensor]:
    """Return the losses of the method itself by name, () float32 each.

    `samples` is what each is divided by: counts by name, one count for all, or by default the batch's own samples.
    """
    decided_BN = record.sparsified_output | record.sparsified_prompt
    counted = method.loss_samples(record.layout, decided_BN, settings)
    if samples is None:
        samples = {name: where_B.sum().clamp(min=1) for name, where_B in counted.items()}
    if not isinstance(samples, Mapping):
        samples = dict.fromkeys(counted, torch.as_tensor(samples, device=record.keep_mask.device))
    return method.losses(record, samples, settings)


def total_loss(lm_loss: Tensor, terms: Mapping[str, Tensor], method: Method, settings: SparsityConfig) -> Tensor:
    """Return what is minimised: the language model's loss and the method's own, weighted (Eq. 10); () float32."""
    return lm_loss + method.loss_weight(settings) * sum(terms.values()) if terms else lm_loss
