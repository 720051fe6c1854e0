"""`generate` with sparsity: what a generation needs travels in its own arguments, so calls never share state.

Shape suffixes: B rows, N tokens, I images, n image tokens of one image, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dynamic_llava.engine.cache import CACHE, AdmissionCache, cache_of, check_dense_cache, rename_cache
from dynamic_llava.engine.evict import check_eviction, check_search
from dynamic_llava.engine.learned import warn_untrained
from dynamic_llava.engine.plan import tower_cut
from dynamic_llava.engine.record import SparsityRecord
from dynamic_llava.engine.tower import EncodedImages
from dynamic_llava.layout import TokenLayout, after_end
from dynamic_llava.methods import Method
from dynamic_llava.model.arguments import (
    check_names,
    names_of,
    refuse_for_any_sparsity,
    refuse_misfits,
    refuse_unsupported,
    setting,
    warn_past_positions,
)
from dynamic_llava.model.images import Inputs, features_of
from dynamic_llava.model.kv_budget import method_within
from dynamic_llava.model.switches import check_compile, choose_method

SWITCHES = ("sparsity", "method", "image_keep_rate", "output_threshold", "output_keep_rate")
"""Arguments of `generate` that choose the method; the same as those of `forward`."""
GENERATION = "generation"
"""Key of a sparse generation's state among the arguments that `generate` hands from step to step."""
ROWS_OF_IMAGES = ("pixel_values", "image_features", "image_sizes")
"""Arguments with one entry per image, which are repeated row by row, not image by image."""


@dataclass
class GenerationState:
    """What one sparse generation carries from step to step."""

    method: Method
    end_ids: Tensor | None = None
    """(E,) int64: tokens that end an answer."""
    features: Sequence[Tensor] | None = None
    """(n, D) of each new image of the call, encoded once, whatever the number of beams and steps."""
    record: SparsityRecord | None = None
    """Of the latest pass; without a cache that is the whole sequence's."""


class SparseGeneration:
    """The hooks of transformers' GenerationMixin that carry sparsity through a generation.

    A dense generation is the parent's own; of ours it carries sparsity="none" alone, which `forward` has to be told.
    """

    @torch.no_grad()
    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *positional: Any, **kwargs: Any
    ) -> Any:
        """Generate as transformers does, sparsely; see GenerationMixin.generate for everything not listed here.

        Args:
            inputs: (B, N) input ids (or input_ids=, or inputs_embeds=), left padded, with attention_mask (B, N).
            generation_config: transformers' GenerationConfig.
            positional: the arguments that follow in transformers.
            kwargs: pixel_values (I, 3, S, S) in row order, of a LLaVA-NeXT tiles and their image_sizes (I, 2); the
                switches sparsity, method, image_keep_rate, output_keep_rate and output_threshold of `forward`;
                kv_budget, bytes (an int, or "512MiB") that the keys and values of a row may take at the end of
                max_new_tokens, which chooses output_keep_rate; sample_key (B,); use_cache; compile=True to run every
                cached step as one compiled graph; output_mask (B, N) bool if some of the given tokens belong to an
                answer. A later turn passes the `cache` of the earlier call, all ids so far, and the new images only.

        With return_dict_in_generate=True the output has `sparsity`, a SparsityRecord of the whole sequence, earlier
        turns on the same cache included (None for a dense generation), and `cache`. Raises ValueError before any
        computation for modes that sparse decoding cannot serve.
        """
        rename_cache(kwargs)
        settings = generation_config if generation_config is not None else self.generation_config
        switches = {name: kwargs.pop(name, None) for name in SWITCHES}
        if getattr(settings, "is_assistant", False) and not any(value is not None for value in switches.values()):
            switches["sparsity"] = "none"  # a draft is checked by another model, and rolled back
        kv_budget = kwargs.pop("kv_budget", None)
        method = choose_method(self.config.sparsity, **switches)
        if kv_budget is not None:
            method = self._within(kv_budget, method, switches, inputs, settings, kwargs)
        cached, beams = (setting(settings, kwargs, name) for name in ("use_cache", "num_beams"))
        check_compile(bool(kwargs.get("compile")), method, cached=cached is not False)
        check_eviction(method, cached=cached is not False)
        if (beams or 1) > 1:
            check_search(method, len(self.model.language_model.layers))
        refuse_for_any_sparsity(settings, kwargs)
        for name in ROWS_OF_IMAGES:
            if kwargs.get(name) is None or not len(kwargs[name]):
                kwargs.pop(name, None)
        if method.is_dense:
            result = self._generate_densely(inputs, generation_config, *positional, **kwargs)
            if not isinstance(result, Tensor):
                result.cache, result.sparsity = cache_of(result), None
            return result
        refuse_unsupported(settings, kwargs)
        refuse_misfits(inputs if inputs is not None else kwargs.get("input_ids"), kwargs)
        warn_untrained(self.config, method)
        generation = GenerationState(method)
        result = super().generate(  # type: ignore[misc]
            inputs, generation_config, *positional, generation=generation, **kwargs
        )
        if isinstance(result, Tensor):
            return result
        result.cache = cache_of(result)
        if (beams or 1) > 1:
            given = {**kwargs, "input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
            ends = setting(settings, kwargs, "eos_token_id")
            result.sparsity = self._replay(result.sequences, generation, ends, given)
        else:
            result.sparsity = result.cache.record if isinstance(result.cache, AdmissionCache) else generation.record
        return result

    def _within(
        self, budget: int | str, method: Method, switches: dict[str, Any], inputs: Any, settings: Any, kwargs: Any
    ) -> Method:
        """Return the method with the threshold that a budget allows this call. ValueError where it cannot choose."""
        for name in ("output_threshold", "output_keep_rate"):
            if switches[name] is not None:
                raise ValueError(f"kv_budget and {name} both say how many output tokens stay; leave one of them out")
        given = {**kwargs, "input_ids": inputs if inputs is not None else kwargs.get("input_ids")}
        longest = setting(settings, kwargs, "max_new_tokens")
        return method_within(budget, self.config, method, given, longest, self.dtype.itemsize)

    def _generate_densely(self, inputs: Any, generation_config: Any, *positional: Any, **kwargs: Any) -> Any:
        check_dense_cache(kwargs.get(CACHE))
        for name in ("sample_key", "compile"):
            kwargs.pop(name, None)
        features = kwargs.get("image_features")
        if features is not None and "mm_encoder_outputs" in names_of(LlavaForConditionalGeneration):
            # transformers' own name for them, which all of its ways of decoding know.
            encoded = BaseModelOutputWithPooling(pooler_output=list(kwargs.pop("image_features")))
            kwargs["mm_encoder_outputs"] = {"image": encoded}
        return super().generate(  # type: ignore[misc]
            inputs, generation_config, *positional, sparsity="none", **kwargs
        )

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        known = {*names_of(type(self)), *vars(GenerationConfig()), GENERATION}
        check_names(model_kwargs, known, "generate")
        super()._validate_model_kwargs(model_kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_mask: Tensor | None = None,
        image_features: Tensor | Sequence[Tensor] | None = None,
        image_mask: Tensor | None = None,
        generation: GenerationState | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one pass: rows that have ended feed padding, and images are placed only where they are new."""
        if generation is not None:
            kwargs["method"] = generation.method
            if generation.end_ids is not None and input_ids.shape[0] > 1 and input_ids.shape[1]:
                attention_mask = _without_fillers(input_ids, attention_mask, output_mask, generation.end_ids)
        prepared = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if generation is None:
            # A checkpoint's generation_config.json may hold an entry of this name, which swallows the argument.
            prepared["sparsity"] = "none"
        places_images = is_first_iteration or not kwargs.get("use_cache", True)
        if output_mask is not None and (generation is not None or places_images):
            drafted = input_ids.shape[1] - output_mask.shape[1]  # tokens that an assistant has proposed
            prepared["output_mask"] = nn.functional.pad(output_mask, (0, max(drafted, 0)), value=True)
        if image_features is not None and places_images:
            prepared["image_features"] = image_features
        if image_mask is not None and prepared.get("inputs_embeds") is not None:
            prepared["image_mask"] = image_mask[:, -prepared["inputs_embeds"].shape[1] :]
        return prepared

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if GENERATION in model_kwargs:
            return model_kwargs  # images are encoded below, once they have been counted
        return super()._maybe_prepare_encoder_kwargs_for_generation(  # type: ignore[misc, no-any-return]
            inputs_tensor, model_kwargs, *args, **kwargs
        )

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        generation = model_kwargs.get(GENERATION)
        if generation is not None:
            self._encode_images(generation, input_ids, model_kwargs)
        images = {name: model_kwargs.pop(name, None) for name in ROWS_OF_IMAGES}
        if expand_size > 1 and any(value is not None for value in images.values()):
            # transformers before 5.24 would repeat image by image, which mixes up rows that hold several.
            order = self._repeated(input_ids, {**model_kwargs, **images}, expand_size)
            images["pixel_values"] = self.model.filled(images["pixel_values"], images["image_sizes"])
            images = {name: _chosen(value, order) for name, value in images.items()}
        expanded_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return expanded_ids, model_kwargs | {name: value for name, value in images.items() if value is not None}

    def _encode_images(self, generation: GenerationState, input_ids: Tensor, given: dict[str, Any]) -> None:
        """Turn the new images among the arguments `given` into features, and start the mask of output tokens."""
        if given.get("output_mask") is None:
            tokens = input_ids if input_ids.shape[1] else given["inputs_embeds"][..., 0]
            given["output_mask"] = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        layer = given.pop("vision_feature_layer", None)
        self.model.check_feature_layer(layer)
        encoded = (given.pop("mm_encoder_outputs", None) or {}).get("image")
        if encoded is not None:
            given["image_features"] = features_of(encoded)
        inputs = replace(_inputs_of(input_ids, given), feature_layer=layer)
        cut = tower_cut(generation.method, self.config.text_config.num_hidden_layers)
        images = self.model.images_of_call(inputs, self._new_images(input_ids, given), cut)
        if images is not None:
            given["image_features"], given["pixel_values"] = features_of(images), None
        generation.features = given.get("image_features")

    def _new_images(self, input_ids: Tensor | None, given: dict[str, Any]) -> TokenLayout:
        """Return the layout of the tokens that the given cache, if any, has not seen yet, as far as images go."""
        inputs = _inputs_of(input_ids, given)
        image = self.model.image_places(inputs)
        cache, output = given.get(CACHE), given.get("output_mask")
        if output is not None:
            image = image & ~output.bool()  # an answer may contain the id of an image token: it is no image
        new = image if cache is None else image[:, cache.get_seq_length() :]
        return TokenLayout.build(new, None, None, self.model.lengths_of(inputs))

    def _repeated(self, input_ids: Tensor | None, given: dict[str, Any], times: int) -> list[int]:
        """Return the numbers of the new images with every row's repeated `times` times, row by row."""
        images_B = self._new_images(input_ids, given).image_starts.sum(1)
        numbers = torch.arange(int(images_B.sum())).split(images_B.tolist())
        return [int(number) for row in numbers for _ in range(times) for number in row]

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if outputs.cache is not None:
            model_kwargs[CACHE] = outputs.cache
        mask, positions = model_kwargs.get("output_mask"), model_kwargs.get("position_ids")
        if mask is not None:
            model_kwargs["output_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], num_new_tokens)], dim=1)
        if model_kwargs.get(GENERATION) is not None and outputs.sparsity is not None:
            model_kwargs[GENERATION].record = outputs.sparsity
        if positions is not None:
            warn_past_positions(self.config, positions.shape[-1])
        return model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        generation: GenerationState | None = model_kwargs.get(GENERATION)
        if generation is not None:
            generation.end_ids = generation_config._eos_token_tensor
            if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
                layers, block = self.config.text_config.num_hidden_layers, self.config.sparsity.cache_block
                model_kwargs[CACHE] = AdmissionCache.for_method(generation.method, layers, block)
                return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # Another model may draft, which knows nothing of our arguments; one of ours drafts densely by itself.
        ours = ("sparsity", "output_mask", "image_features", "image_mask")
        theirs = {name: value for name, value in model_kwargs.items() if name not in ours}
        return super()._get_candidate_generator(*args, model_kwargs=theirs, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                processor.model = partial(self, sparsity="none")  # sparse generations refuse guidance
        return processors

    def _replay(
        self, sequences: Tensor, generation: GenerationState, ends: Any, given: dict[str, Any]
    ) -> SparsityRecord | None:
        """Decide on finished beams again, in one masked pass: search leaves no row per returned sequence."""
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        prompt = ids if embeds is None else embeds
        answers = sequences[:, 0 if ids is None else ids.shape[1] :]
        repeats = sequences.shape[0] // prompt.shape[0]

        def over_all(name: str, of_prompt: int) -> Tensor:
            """(B', N): a mask of the prompts, repeated, and 1 at the tokens that the answers have fed."""
            mask = given.get(name)
            mask = torch.full(prompt.shape[:2], of_prompt, device=sequences.device) if mask is None else mask
            return nn.functional.pad(mask.repeat_interleave(repeats, dim=0), (0, answers.shape[1] - 1), value=1)

        output, mask = over_all("output_mask", 0).bool(), over_all("attention_mask", 1)
        if ends is not None:
            ends = torch.as_tensor(ends, device=sequences.device).flatten()
            mask = _without_fillers(sequences[:, :-1], mask, output, ends)
        features, key, strategy = (
            generation.features,
            given.get("sample_key"),
            given.get("vision_feature_select_strategy"),
        )
        sizes = given.get("image_sizes")
        if features is not None:
            new = {
                name: value for name, value in given.items() if name != CACHE
            }  # the cache was empty, if it was given
            order = self._repeated(ids, {**new, "image_features": features}, repeats)
            features, sizes = _chosen(features, order), _chosen(sizes, order)
        fed: dict[str, Any] = {"input_ids": sequences[:, :-1]}
        if embeds is not None:
            words = self.get_input_embeddings()(answers[:, :-1])  # type: ignore[attr-defined]
            fed = {"inputs_embeds": torch.cat([embeds.repeat_interleave(repeats, dim=0), words], dim=1)}
            fed["image_mask"] = over_all("image_mask", 0).bool() & ~output if "image_mask" in given else None
        record = self.model(
            **fed,
            attention_mask=mask,
            image_features=features,
            image_sizes=sizes,
            vision_feature_select_strategy=strategy,
            output_mask=output,
            method=Method() if generation.method.evicts else generation.method,  # what is evicted was kept before
            sample_key=None if key is None else key.repeat_interleave(repeats, dim=0),
            masked=True,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).sparsity
        held = record.tokens_per_layer()
        return replace(record, cache_lengths=held[:, -1], dense_cache_lengths=held[:, 0])


def _without_fillers(input_ids: Tensor, attention_mask: Tensor | None, output_mask: Tensor, end_ids: Tensor) -> Tensor:
    """The attention mask with the padding that ended rows were fed switched off; it must never enter a cache.

    After a prompt of embeddings the ids are those of the last columns alone.
    """
    fillers_BN = after_end(input_ids, output_mask[:, -input_ids.shape[1] :], end_ids.to(input_ids.device))
    if attention_mask is None:
        fillers_BN = nn.functional.pad(fillers_BN, (output_mask.shape[1] - fillers_BN.shape[1], 0))
        return (~fillers_BN).long()
    mask = attention_mask.clone()
    mask[:, mask.shape[1] - fillers_BN.shape[1] :] &= ~fillers_BN
    return mask


def _inputs_of(input_ids: Tensor | None, given: dict[str, Any]) -> Inputs:
    names = ("inputs_embeds", "pixel_values", "image_features", "image_mask")
    embeds, *images = (given.get(name) for name in names)
    strategy, sizes = given.get("vision_feature_select_strategy"), given.get("image_sizes")
    return Inputs(None if embeds is not None else input_ids, embeds, *images, None, strategy, sizes)


def _chosen(images: Tensor | Sequence[Tensor] | None, order: list[int]) -> Tensor | list[Tensor] | None:
    """Return the images (I, ...), or the list of them, in this order."""
    if images is None or isinstance(images, Tensor):
        return None if images is None else images[order]
    if isinstance(images, EncodedImages):
        return images.chosen(order)
    return [images[number] for number in order]
