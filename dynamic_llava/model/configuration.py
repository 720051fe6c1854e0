"""The configuration of a Dynamic-LLaVA checkpoint: LLaVA-1.5's or LLaVA-NeXT's own plus the sparsity settings."""

from typing import Any

from transformers import LlavaConfig

from dynamic_llava.config import SparsityConfig, check_sparse_layer
from dynamic_llava.engine.learned import added_tokens, check_names, parts_of
from dynamic_llava.files import brief
from dynamic_llava.model.loading import spare_learned
from dynamic_llava.model.supported import (
    check_architecture,
    check_kernels,
    check_place,
    naming_config,
    refuse_trust,
)
from dynamic_llava.model.tiles import pinpoints_of
from dynamic_llava.projectors import DEFAULT, image_tokens, layers_of

NO_ADDED = (
    "sparsity.method adds {} learned tokens to an image, and a LLaVA-NeXT has images of any size, for which that is "
    "not offered; choose a method that adds none, or a LLaVA-1.5"
)


class DynamicLlavaConfig(LlavaConfig):
    """LlavaConfig with `sparsity`; a dense llava-hf config.json is accepted and gets the paper's settings.

    One of a LLaVA-NeXT (model_type llava_next) has `image_grid_pinpoints`, and nothing else tells it from a LLaVA-1.5.

    Setting `sparsity` to a dict changes the named settings and keeps the others, so
    `from_pretrained(folder, sparsity={"image_keep_rate": 0.3})` overrides one value of a checkpoint.
    Raises ValueError when the sparse layer is outside 1..L-1 or a setting is unknown or out of range.
    """

    model_type = "dynamic_llava"
    # What a Trainer's evaluation leaves out of the predictions that it collects.
    keys_to_ignore_at_inference = [  # noqa: RUF012  # as in transformers' configurations
        *("cache", "past_key_values", "image_outputs", "sparsity"),
        *("lm_loss", "method_losses", "image_keep_loss", "output_keep_loss"),
    ]
    sparsity: Any = None
    """SparsityConfig, or a dict of some of its fields, or None for the paper's values."""
    projector: Any = DEFAULT
    """Name of the projector, one of PROJECTORS, or package.module:Class of a module that is imported already."""
    image_grid_pinpoints: Any = None
    """Of a LLaVA-NeXT the heights and widths in pixels into which an image may be resized; None: all images have one
    size."""
    untrained_predictors: Any = None
    """Names of the learned parts that were newly initialised beside a dense checkpoint and are untrained since."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load config.json; ValueError that names it where it describes no model that is carried here."""
        refuse_trust(kwargs)
        with naming_config(args[0] if args else "the checkpoint"):
            return super().from_pretrained(*args, trust_remote_code=False, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json; that of a dense LLaVA-1.5 or LLaVA-NeXT counts as ours. ValueError for any other one."""
        if args:
            check_place(args[0], kwargs)
        values, rest = super().get_config_dict(*args, **kwargs)
        source = str(args[0]) if args else "the checkpoint"
        check_kernels(source, values)
        check_architecture(source, values)
        values["image_grid_pinpoints"] = pinpoints_of(values)
        values["model_type"] = cls.model_type
        if values.get("quantization_config"):
            method = _method_of(kwargs.get("sparsity")) or _method_of(values.get("sparsity"))
            parts = parts_of(SparsityConfig(method=method))
            values["quantization_config"] = spare_learned(values["quantization_config"], parts)
        return values, rest

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)  # a dense config.json says "llava", which would shadow the class attribute
        if self.sparsity is None:
            self.sparsity = SparsityConfig()
        self.untrained_predictors = check_names(self.untrained_predictors, parts_of(self.sparsity))
        super().__post_init__(**kwargs)
        parts = {"text_config": self.text_config, "vision_config": self.vision_config}
        values = {name: {**vars(part), "model_type": part.model_type} for name, part in parts.items()}
        check_architecture("the configuration", {**vars(self), "model_type": self.model_type, **values})
        if self.image_grid_pinpoints is not None and self.added_image_tokens:
            raise ValueError(NO_ADDED.format(self.added_image_tokens))
        length = image_tokens(self)  # a ValueError where the projector is unknown, or takes no such images
        if self.added_image_tokens:
            self.image_seq_length = length
        self.vision_feature_layer = layers_of(self)
        self._check_layer()
        _check_padding(self.text_config)

    def __setattr__(self, key: str, value: Any) -> None:
        if key != "sparsity" or value is None:
            super().__setattr__(key, value)
            return
        current = self.__dict__.get("sparsity")
        if isinstance(value, dict):
            value = SparsityConfig.from_dict({**(current.to_dict() if current is not None else {}), **value})
        if not isinstance(value, SparsityConfig):
            raise ValueError(f"sparsity={brief(value)} must be a SparsityConfig or a dict of its fields")
        super().__setattr__(key, value)
        if self.__dict__.get("image_grid_pinpoints") is not None and added_tokens(value):
            raise ValueError(NO_ADDED.format(added_tokens(value)))
        if current is not None and current.method != value.method:
            self.untrained_predictors = []  # those of the other method's parts
            self.image_seq_length += added_tokens(value) - added_tokens(current)
        if hasattr(self.__dict__.get("text_config"), "num_hidden_layers"):
            self._check_layer()

    @property
    def added_image_tokens(self) -> int:
        """How many of an image's tokens a learned method adds behind those that the projector makes."""
        return 0 if self.sparsity is None else added_tokens(self.sparsity)

    def _check_layer(self) -> None:
        check_sparse_layer(self.sparsity.sparse_layer, self.text_config.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain dict that config.json stores."""
        values = super().to_dict()
        if isinstance(values.get("sparsity"), SparsityConfig):
            values["sparsity"] = values["sparsity"].to_dict()
        if values.get("image_grid_pinpoints") is None:
            values.pop("image_grid_pinpoints", None)
        if values.get("projector") == DEFAULT:
            del values["projector"]  # LLaVA-1.5's; so the file is that of every earlier version
        return values


def _method_of(sparsity: Any) -> Any:
    """Return what settings, a SparsityConfig or a dict of some of its fields, say of the learned method."""
    return sparsity.get("method") if isinstance(sparsity, dict) else getattr(sparsity, "method", None)


def _check_padding(text: Any) -> None:
    """Raise ValueError where the embedding has no row for the padding token, which torch would not name."""
    pad, words = text.pad_token_id, text.vocab_size
    if pad is not None and not -words <= pad < words:
        raise ValueError(f"pad_token_id={brief(pad)} is no row of {words} (vocab_size); give 0 to {words - 1}, or null")
