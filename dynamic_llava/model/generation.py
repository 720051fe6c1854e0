"""`generate` with sparsity: what a generation needs travels in its own arguments, so calls never share state.

Shape suffixes: B rows, N tokens, I images, n tokens of one image, D hidden size.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dynamic_llava.layout import after_end
from dynamic_llava.methods import Method
from dynamic_llava.model.cache import AdmissionCache
from dynamic_llava.model.cache_names import CACHE, cache_of, rename_cache
from dynamic_llava.model.outputs import SparsityRecord
from dynamic_llava.model.switches import check_compile, check_output_keep_rate, choose_method
from dynamic_llava.model.untrained import warn_untrained

SWITCHES = ("sparsity", "method", "image_keep_rate", "output_threshold")
"""Arguments of `generate` that choose the method; the same as those of `forward`."""

_REFUSED = {
    "prompt_lookup_num_tokens": "prompt look-up rolls the cache back, and dropped tokens cannot be restored",
    "assistant_early_exit": "assisted decoding rolls the cache back, and dropped tokens cannot be restored",
    "prefill_chunk_size": "a chunk could cut an image apart before its tokens are ranked",
    "guidance_scale": "guidance runs a second context through a cache of its own",
}


@dataclass
class LatestPass:
    """The record of one generation's latest pass; without a cache that is the whole sequence's."""

    record: SparsityRecord | None = None


class SparseGeneration:
    """The hooks of transformers' GenerationMixin that carry sparsity through a generation."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers does, sparsely; see GenerationMixin.generate for everything not listed here.

        Args:
            inputs: (B, N) input ids (or input_ids=), left padded, with attention_mask (B, N).
            generation_config: transformers' GenerationConfig.
            kwargs: pixel_values (I, 3, S, S) in row order; the switches sparsity, method, image_keep_rate and
                output_threshold of `forward`; sample_key (B,); use_cache; compile=True to run every cached step as one
                compiled graph; output_mask (B, N) bool if some of the given tokens belong to an answer. A later turn
                passes the `cache` of the earlier call, all ids so far, and the pixel_values of the new images only.

        With return_dict_in_generate=True the output has `sparsity`, a SparsityRecord of the whole sequence, earlier
        turns on the same cache included (None for a dense generation), and `cache`. Raises ValueError before any
        computation for modes that sparse decoding cannot serve.
        """
        rename_cache(kwargs)
        method = choose_method(self.config.sparsity, **{name: kwargs.pop(name, None) for name in SWITCHES})
        check_output_keep_rate(kwargs.get("output_keep_rate"), trains=False)
        settings = generation_config if generation_config is not None else self.generation_config
        _refuse_right_padding(kwargs.get("attention_mask"))
        if not method.is_dense:
            _refuse_unsupported(settings, kwargs)
        check_compile(bool(kwargs.get("compile")), method, cached=_setting(settings, kwargs, "use_cache") is not False)
        warn_untrained(self.config, method)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            kwargs["image_features"] = self._encode_images(pixel_values, input_ids, kwargs)
        latest = LatestPass()
        result = super().generate(  # type: ignore[misc]
            inputs, generation_config=generation_config, method=method, latest_pass=latest, **kwargs
        )
        if isinstance(result, Tensor):
            return result
        result.cache = cache_of(result)
        if (_setting(settings, kwargs, "num_beams") or 1) > 1:
            ends = _setting(settings, kwargs, "eos_token_id")
            result.sparsity = self._replay(result.sequences, input_ids, method, ends, kwargs)
        else:
            result.sparsity = result.cache.record if isinstance(result.cache, AdmissionCache) else latest.record
        return result

    def _encode_images(self, pixel_values: Tensor, input_ids: Tensor | None, given: dict[str, Any]) -> Tensor:
        """Encode every new image once, (I, 3, S, S) -> (I, n, D), whatever the number of beams and steps."""
        if input_ids is not None:
            self.model.check_images(pixel_values.shape[0], self._new_image_tokens(input_ids, given))
        pixel_values = pixel_values.to(self.device, self.dtype)
        return torch.stack(list(self.model.get_image_features(pixel_values, return_dict=True).pooler_output))

    def _new_image_tokens(self, input_ids: Tensor, given: dict[str, Any]) -> Tensor:
        """(B, N') bool: the image tokens that the given cache, if any, has not seen yet."""
        cache, output = given.get(CACHE), given.get("output_mask")
        image = input_ids == self.config.image_token_id
        if output is not None:
            image = image & ~output.bool()  # an answer may contain the id of an image token: it is no image
        return image if cache is None else image[:, cache.get_seq_length() :]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        latest_pass: LatestPass | None = None,
        end_ids: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Prepare one pass: rows that have ended feed padding, and images are placed only where they are new."""
        if end_ids is not None and output_mask is not None and input_ids.shape[0] > 1:
            attention_mask = _without_fillers(input_ids, attention_mask, output_mask, end_ids)
        prepared = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        prepared["output_mask"] = output_mask
        if image_features is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            prepared["image_features"] = image_features
        return prepared

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        features = model_kwargs.pop("image_features", None)
        if model_kwargs.get("output_mask") is None:
            given = input_ids if input_ids.shape[1] else model_kwargs["inputs_embeds"][..., 0]
            model_kwargs["output_mask"] = torch.zeros(given.shape, dtype=torch.bool, device=given.device)
        if features is not None:
            # transformers would repeat image by image, which mixes up rows that hold several.
            images_B = self._new_image_tokens(input_ids, model_kwargs).sum(1) // features.shape[1]
            features = _repeat_rows(features, images_B, expand_size)
        expanded_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if features is not None:
            model_kwargs["image_features"] = features
        return expanded_ids, model_kwargs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if outputs.cache is not None:
            model_kwargs[CACHE] = outputs.cache
        mask = model_kwargs["output_mask"]
        model_kwargs["output_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], num_new_tokens)], dim=1)
        if outputs.sparsity is not None:
            model_kwargs["latest_pass"].record = outputs.sparsity
        return model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        method: Method = model_kwargs["method"]
        if not method.is_dense:
            model_kwargs["end_ids"] = generation_config._eos_token_tensor
            if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
                model_kwargs[CACHE] = AdmissionCache(
                    self.config.text_config.num_hidden_layers, method.layer, self.config.sparsity.cache_block
                )
                return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )

    def _replay(
        self, sequences: Tensor, prompt: Tensor | None, method: Method, ends: Any, kwargs: dict[str, Any]
    ) -> SparsityRecord | None:
        """Decide on finished beams again, in one masked pass: search leaves no row per returned sequence."""
        if method.is_dense or prompt is None:
            return None
        kwargs = {name: value for name, value in kwargs.items() if name != CACHE}  # empty when it was given
        fed, repeats = sequences[:, :-1], sequences.shape[0] // prompt.shape[0]
        output = torch.zeros_like(fed, dtype=torch.bool)
        output[:, prompt.shape[1] :] = True
        if kwargs.get("output_mask") is not None:
            output[:, : prompt.shape[1]] = kwargs["output_mask"].repeat_interleave(repeats, dim=0)
        mask = torch.ones_like(fed)
        if kwargs.get("attention_mask") is not None:
            mask[:, : prompt.shape[1]] = kwargs["attention_mask"].repeat_interleave(repeats, dim=0)
        if ends is not None:
            mask = _without_fillers(fed, mask, output, torch.as_tensor(ends, device=fed.device).flatten())
        features, key = kwargs.get("image_features"), kwargs.get("sample_key")
        if features is not None:
            images_B = self._new_image_tokens(prompt, kwargs).sum(1) // features.shape[1]
            features = _repeat_rows(features, images_B, repeats)
        record = self.model(
            input_ids=fed,
            attention_mask=mask,
            image_features=features,
            output_mask=output,
            method=method,
            sample_key=None if key is None else key.repeat_interleave(repeats, dim=0),
            masked=True,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).sparsity
        return replace(record, cache_lengths=record.keep_mask.sum(1), dense_cache_lengths=record.layout.valid.sum(1))


def _setting(settings: Any, kwargs: dict[str, Any], name: str) -> Any:
    return kwargs[name] if kwargs.get(name) is not None else getattr(settings, name, None)


def _refuse_unsupported(settings: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("keep_mask") is not None:
        raise ValueError(
            "keep_mask is not supported by generate, which feeds tokens that nobody can have decided about yet; leave "
            "it out, give a method that decides as you want, or feed the tokens to the model one by one"
        )
    if kwargs.get("assistant_model") is not None:
        raise ValueError(f"assistant_model is not supported with sparsity: {_REFUSED['assistant_early_exit']}")
    for name, reason in _REFUSED.items():
        value = _setting(settings, kwargs, name)
        if value is not None and not (name == "guidance_scale" and value == 1):
            raise ValueError(f"{name}={value!r} is not supported with sparsity: {reason}. Use sparsity='none' for it")
    implementation = _setting(settings, kwargs, "cache_implementation")
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={implementation!r} is not supported with sparsity: rows of the admission cache have "
            "lengths of their own. Leave it out, or use sparsity='none'"
        )
    cache = kwargs.get(CACHE)
    if cache is not None and not isinstance(cache, AdmissionCache):
        raise ValueError(
            f"cache is a {type(cache).__name__}; continue with the cache that a sparse call returned, or use "
            "sparsity='none'"
        )
    for name in ("num_beams", "num_return_sequences"):
        copies = _setting(settings, kwargs, name) or 1
        if cache is not None and cache.get_seq_length() and copies > 1:
            raise ValueError(
                f"{name}={copies} is not supported on a live cache, which holds one row per conversation; repeat its "
                "rows with cache.batch_repeat_interleave and those of the inputs, or start a new cache"
            )


def _refuse_right_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask[:, -1].all()):
        rows = (attention_mask[:, -1] == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"attention_mask ends in padding in rows {rows}; generation continues every row at its last column, so pad "
            "prompts on the left (padding_side='left')"
        )


def _without_fillers(input_ids: Tensor, attention_mask: Tensor | None, output_mask: Tensor, end_ids: Tensor) -> Tensor:
    """The attention mask with the padding that ended rows were fed switched off; it must never enter a cache."""
    fillers_BN = after_end(input_ids, output_mask, end_ids.to(input_ids.device))
    if attention_mask is None:
        return (~fillers_BN).long()
    mask = attention_mask.clone()
    mask[:, mask.shape[1] - fillers_BN.shape[1] :] &= ~fillers_BN
    return mask


def _repeat_rows(features_InD: Tensor, images_B: Tensor, times: int) -> Tensor:
    """Repeat every row's images `times` times, row by row: (I, n, D) -> (I * times, n, D)."""
    if times == 1:
        return features_InD
    rows = features_InD.split(images_B.tolist())
    return torch.cat([row for row in rows for _ in range(times)], dim=0)
