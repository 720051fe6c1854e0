"""What a forward pass returns: transformers' fields, the loss parts, and the record of what was kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from dynamic_llava.engine.cache import EARLIER
from dynamic_llava.engine.record import RowRecord, SparsityRecord


class LlavaOutput(ModelOutput):
    """The fields `cache` and `image_outputs`, which can be asked for by their earlier names too."""

    @classmethod
    def of(cls, outputs: Mapping[str, Any], **more: Any) -> Any:
        """Return the fields of another model's outputs, whatever its transformers calls them, and `more`.

        The states below the head, which outputs with logits have no field for, are left out.
        """
        given = {**outputs, **more}
        if "logits" in given:
            given.pop("last_hidden_state", None)
        if EARLIER in given:
            given["cache"] = given.pop(EARLIER)
        features = given.pop("image_hidden_states", None)
        if features is not None:
            given["image_outputs"] = BaseModelOutputWithPooling(pooler_output=list(features))
        return cls(**given)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in their order; those of `image_outputs` as a tuple of their own."""
        return tuple(value.to_tuple() if name == "image_outputs" else value for name, value in self.items())

    @property
    def image_hidden_states(self) -> Tensor | list[Tensor] | None:
        """(I, n, D) projected images, as transformers before 5.24 names them; None where no image was given.

        Images of different lengths are a list of one (n, D) each.
        """
        images = self.image_outputs  # type: ignore[attr-defined]
        features = None if images is None else images.pooler_output
        if features is None or isinstance(features, Tensor) or len({len(one) for one in features}) > 1:
            return features
        return torch.stack(list(features))

    if not hasattr(ModelOutput, EARLIER):

        @property
        def past_key_values(self) -> Cache | None:
            """The cache, by the name that transformers before 5.24 gives it."""
            return self.cache  # type: ignore[attr-defined, no-any-return]

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__("cache" if key == EARLIER else key)

        def __contains__(self, key: object) -> bool:
            return super().__contains__("cache" if key == EARLIER else key)

        def get(self, key: str, default: Any = None) -> Any:
            """As a dict's, under either name of the cache."""
            return super().get("cache" if key == EARLIER else key, default)


@dataclass
class DynamicModelOutput(LlavaOutput):
    """Output of the language model and of the model without head; fields as in transformers, plus the record."""

    last_hidden_state: Tensor | None = None
    """(B, N, D) in input order; rows of dropped tokens are zero."""
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """Per layer; from the sparse layer on, the packed kept tokens where tokens were removed."""
    attentions: tuple[Tensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    """Output of the vision tower; `pooler_output` is the projected image features, (n, D) per image."""
    sparsity: SparsityRecord | None = None
    """The record of the pass: what was kept; None for a dense one."""


@dataclass
class DynamicLlavaOutput(LlavaOutput):
    """Output of DynamicLlavaForConditionalGeneration: transformers' fields in their order, then ours."""

    loss: Tensor | None = None
    """(): lm_loss + the method's loss weight * the sum of its own losses (for Dynamic-LLaVA: lambda, Eq. 10) + the
    weight of `distill` * distill_loss."""
    logits: Tensor | None = None
    """(B, N, V) in input order; rows of dropped tokens are those of a zero hidden state and carry no prediction. None
    where the call said skip_logits."""
    cache: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    """Output of the vision tower; `pooler_output` is the projected image features, (n, D) per image."""
    lm_loss: Tensor | None = None
    """(): cross entropy of the labelled tokens."""
    method_losses: dict[str, Tensor] | None = None
    """Name -> () float, unweighted: what the method itself is trained by; None for a dense pass."""
    image_keep_loss: Tensor | None = None
    """(): keep-rate regulariser of the image tokens (Eq. 10), unweighted."""
    output_keep_loss: Tensor | None = None
    """(): keep-rate regulariser of the output tokens (Eq. 10), unweighted."""
    distill_loss: Tensor | None = None
    """(): divergence from the dense pass at the learned tokens (train.distill), unweighted; None without `distill`."""
    sparsity: SparsityRecord | None = None
    """The record of the pass: what was kept; None for a dense one."""


__all__ = ["DynamicLlavaOutput", "DynamicModelOutput", "RowRecord", "SparsityRecord"]
