"""Loading that never leaves a tensor random by accident: only a predictor as a whole may be missing, and is named.

Quantised loading leaves the learned parts alone: they are few weights, and decide what the layers above see.
"""

import copy
import json
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from dynamic_llava.config import SparsityConfig
from dynamic_llava.engine.learned import HOME, parts_of, prefixes
from dynamic_llava.engine.plan import cuts_of
from dynamic_llava.files import brief, brief_text, give_usual_modes
from dynamic_llava.methods import Method, settings_of
from dynamic_llava.model.card import replace_generic_card, write_card
from dynamic_llava.model.supported import (
    CONVERT,
    check_architecture,
    check_generation,
    check_place,
    check_size,
    refuse_adapter,
    refuse_code,
)
from dynamic_llava.model.weight_files import Head, WeightFiles, all_weight_files, holds_model, read_index

logger = logging.getLogger(__name__)

_OTHER_SOURCES = ("state_dict", "subfolder", "variant", "gguf_file")
"""Arguments of from_pretrained that take the weights from elsewhere than the folder's usual files."""


_HEADLESS = {"LlavaModel", "LlavaNextModel", "DynamicLlavaModel"}
"""Classes without the language-model head."""
_EXPECTED = ContextVar("new weights are expected", default=False)
_LEFT_OUT_ANYWAY = ("lm_head",)
"""What transformers excludes by itself, but only where no list is given."""
_LEAVING_OUT = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")
"""What the list is called: in torchao and most others, in bitsandbytes, in HQQ."""
_LEAVING_OUT_BY_METHOD = {"bitsandbytes": "llm_int8_skip_modules", "hqq": "skip_modules"}


@contextmanager
def new_weights_expected() -> Iterator[None]:
    """Load without a word about newly initialised weights, which are about to be trained, or will not be asked."""
    before = _EXPECTED.set(True)
    try:
        yield
    finally:
        _EXPECTED.reset(before)


class CheckedLoading:
    """`from_pretrained` that checks every tensor, and `save_pretrained` with the module's own names."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a llava-hf folder (predictors newly initialised, and said so) or one of ours.

        Raises ValueError when any other tensor is missing, has no place or has another shape, for a damaged file or one
        that holds more than tensors, and for a layout that has to be converted first (docs/checkpoints.md).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError("ignore_mismatched_sizes would leave tensors random; repair the checkpoint instead")
        source = str(args[0]) if args else str(kwargs.get("pretrained_model_name_or_path"))
        check_place(source, kwargs)
        refuse_adapter(source, kwargs)
        refuse_code(source, kwargs)
        check_generation(source, kwargs)
        if kwargs.get("quantization_config") is not None:
            parts = parts_of(cls._config_of_call(source, kwargs).sparsity)
            kwargs["quantization_config"] = spare_learned(kwargs["quantization_config"], parts)
        if Path(source).is_dir() and not any(kwargs.get(name) for name in _OTHER_SOURCES):
            heads = check_folder(Path(source), needs_config=kwargs.get("config") is None)
            check_size(source, cls._config_of_call(source, kwargs), (head.shape for head in heads.values()))
        # Mismatches are let through here only to be named in the error below.
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False, **kwargs
        )
        check_loaded(source, info)
        # transformers copies the arguments of loading into it, and would save them as defaults of generate.
        if getattr(model, "generation_config", None) is not None:
            vars(model.generation_config).pop("sparsity", None)
        return (model, info) if wants_info else model

    @classmethod
    def load_for(cls, method: Method, source: str | Path, **kwargs: Any) -> Any:
        """Load a checkpoint for calls under `method`; kwargs are those of from_pretrained.

        A dense one is enough for a method that learns nothing, and nothing is said of predictors that it never asks.
        Raises ValueError, before any weight is read, where the method decides by weights that the checkpoint lacks.
        """
        config = cls.config_class.from_pretrained(source)  # type: ignore[attr-defined]
        cuts_of(method, config.text_config.num_hidden_layers)
        check_learned(source, config, method)
        with nullcontext() if method.used_parts else new_weights_expected():
            return cls.from_pretrained(source, trust_remote_code=False, **kwargs)

    @classmethod
    def _config_of_call(cls, source: str, arguments: dict[str, Any]) -> Any:
        """Return the configuration that `from_pretrained` with these arguments will use."""
        config = arguments.get("config")
        if isinstance(config, cls.config_class):  # type: ignore[attr-defined]
            return config
        rest = {key: value for key, value in arguments.items() if key != "config"}
        read = cls.config_class.from_pretrained  # type: ignore[attr-defined]
        return read(config or source, return_unused_kwargs=True, **rest)[0]

    @classmethod
    def check_checkpoint(cls, source: str | Path, **kwargs: Any) -> None:
        """Raise ValueError unless the tensors of a checkpoint fit, from their names and shapes: no value is read.

        For loading in parts (ZeRO-3), where transformers reports neither tensors without a place nor, on every process,
        wrong shapes. It comes before transformers knows of DeepSpeed. `kwargs` are those of the configuration.
        """
        config = cls.config_class.from_pretrained(source, **kwargs)  # type: ignore[attr-defined]
        shapes = {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(source).items()}
        _, info = super().from_pretrained(  # type: ignore[misc]
            None,
            config=config,
            state_dict=shapes,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        check_loaded(str(source), info)

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        # New predictors depend on torch's seed alone, not on what was drawn while the model was built: ZeRO-3 builds it
        # in another way, and they shall be the same.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            super()._initialize_missing_keys(*args, **kwargs)  # type: ignore[misc]

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        # transformers has initialised the missing tensors by now; one clear line replaces its table of them.
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        lost = {}
        parts = prefixes(self.config.sparsity)  # type: ignore[attr-defined]
        for predictor, prefix in parts.items():
            tensors = {name for name in self.state_dict() if name.startswith(prefix)}  # type: ignore[attr-defined]
            if tensors and tensors <= set(loading_info.missing_keys):
                lost[predictor] = tensors
        if len(lost) == len(parts):
            kind = "a dense checkpoint"
            self.config.untrained_predictors = list(parts)  # type: ignore[attr-defined]
        else:
            # What the checkpoint itself does not call untrained is damage, and an error.
            untrained = self.config.untrained_predictors  # type: ignore[attr-defined]
            lost = {predictor: tensors for predictor, tensors in lost.items() if predictor in untrained}
            kind = "a checkpoint"
        names = {name for tensors in lost.values() for name in tensors}
        loading_info.missing_keys -= names
        if names and not _EXPECTED.get():
            logger.warning(
                "%s without %s: their %d tensors are newly initialised; train before sparse inference",
                kind,
                " and ".join(lost),
                len(names),
            )

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, save_original_format: bool = False, **kwargs: Any
    ) -> Any:
        """Save as transformers does, but under the module's own names, which resuming a Trainer needs.

        A model card with the sparsity settings, README.md, is added where the folder has none.
        """
        result = super().save_pretrained(  # type: ignore[misc]
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )
        if (args[0] if args else kwargs.get("is_main_process", True)) and Path(save_directory).is_dir():
            for path in Path(save_directory).glob("*.safetensors"):
                give_usual_modes(path)
            write_card(save_directory, self.config)  # type: ignore[attr-defined]
        return result

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        # transformers puts its empty form in place of the card before it uploads; a card in the repository it keeps.
        replace_generic_card(working_dir, self.config)  # type: ignore[attr-defined]
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


def checkpoint_files(source: str | Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder or hub name. OSError where there are none."""
    check_place(source, {})
    refuse_adapter(str(source), {})
    single = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(source, "model.safetensors.index.json")
    read_index(Path(index))
    files, _ = get_checkpoint_shard_files(source, index)
    return [Path(file) for file in files]


def tensor_shapes(source: str | Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint folder or hub name, from the heads of its safetensors files."""
    return {name: head.shape for name, head in WeightFiles(checkpoint_files(source)).heads.items()}


def check_learned(source: str | Path, config: Any, method: Method, name: str | None = None) -> None:
    """Raise ValueError where a method decides by weights that a checkpoint (a folder or hub name) does not hold.

    Read from its configuration and the heads of its files, before any weight is loaded; `name`: what the message calls
    the checkpoint.
    OSError where there are none.
    """
    names = tensor_shapes(source)
    if method.used_parts and not any(f".{part}." in name for part in method.used_parts for name in names):
        what = f"sparsity={method.sparsity!r}" if "sparsity" in settings_of(method) else f"method {method.name!r}"
        raise ValueError(
            f"{name or source} is a dense checkpoint without predictors, so {what} would be decided at random; train "
            "it first, give --sparsity none, or a method that learns nothing, such as --method fastv"
        )
    if random := [part for part in method.used_parts if part in config.untrained_predictors]:
        raise ValueError(
            f"{name or source} holds an untrained {' and '.join(random)} (untrained_predictors in its config.json), so "
            f"method {method.name!r} would decide at random; train it first, give --sparsity none, or the method that "
            "the model was tuned under (--method)"
        )


def check_folder(folder: Path, needs_config: bool = True) -> dict[str, Head]:
    """Return what is stored in a folder, by name; no value is read.

    Raises ValueError or FileNotFoundError where it cannot be loaded, whatever the model's configuration: its files of
    weights must be whole and hold tensors only, its layout must be llava-hf's or ours, and one of ours must hold the
    predictors that it does not call untrained.
    """
    path = folder / "config.json"
    if not path.is_file() and needs_config:
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        kind, nested = config.get("model_type"), "text_config" in config
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no valid configuration ({brief_text(error)}); get the file again") from None
    parts = (folder / "mm_projector.bin").is_file() and not holds_model(folder)
    if (any(key.startswith("mm_") for key in config) and not nested) or parts:
        raise ValueError(
            f"{folder} {'holds a projector alone,' if parts else 'is'} in the layout of the original LLaVA (model_type "
            f"{brief(kind)}); convert it first: "
            f"{CONVERT} {folder} NEW_FOLDER{' --base MODEL' if parts else ''}"
        )
    check_architecture(folder, config)
    files = WeightFiles.of_folder(folder)
    names = files.heads
    unread = [file.name for file in all_weight_files(folder) if file not in files.files]
    if unread:
        logger.warning("%s: %s not read, nothing of it is in the model", folder, ", ".join(unread))
    if _saved_without_head(config) and not any(name.endswith("lm_head.weight") for name in names):
        raise ValueError(
            f"{folder} holds a model without its language-model head ({', '.join(config['architectures'])}); save the "
            "whole model, ...ForConditionalGeneration, or load this folder with AutoModel, which needs no head"
        )
    untrained = config.get("untrained_predictors") or ()
    if not isinstance(untrained, list | tuple):
        raise ValueError(f"{path} has untrained_predictors {brief(untrained)}; give a list of names")
    ours = kind == "dynamic_llava"
    for predictor, prefix in prefixes(_settings(path, config)).items() if ours else ():
        # A model saved without its head, which a tied one does not miss, has its tensors' names from transformers 4.
        if predictor not in untrained and not any(f".{predictor}." in name for name in names):
            raise ValueError(
                f"{folder} lacks the whole {predictor} ({prefix}*), which its config.json does not call untrained; "
                "missing tensors cannot be made up: get the checkpoint again"
            )
    return names


def _settings(path: Path, config: dict[str, Any]) -> SparsityConfig:
    values = config.get("sparsity") or {}
    try:
        return SparsityConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has sparsity {brief(values)}: {brief_text(str(error))}") from None


def _saved_without_head(config: dict[str, Any]) -> bool:
    tied = any((part or {}).get("tie_word_embeddings") for part in (config, config.get("text_config")))
    named = config.get("architectures")
    return not tied and isinstance(named, list) and bool(_HEADLESS.intersection(map(str, named)))


def check_loaded(source: str, info: dict[str, Any]) -> None:
    """Raise ValueError unless the loading report of `source` is empty: nothing missing, left over or misshapen."""
    findings = {
        "missing tensors": info["missing_keys"],
        "tensors without a place": info["unexpected_keys"],
        "wrongly shaped tensors": info.get("mismatched_keys", ()),
    }
    problems = [f"{what} {_some(sorted(map(str, names)))}" for what, names in findings.items() if names]
    if problems:
        raise ValueError(
            f"{source} is not a LLaVA checkpoint of this configuration: {'; '.join(problems)}. Only "
            "predictors as a whole may be missing; check that the folder is complete and in llava-hf layout"
        )


def _some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return brief_text(shown) if len(names) <= limit else f"{brief_text(shown)} and {len(names) - limit} more"


def spare_learned(settings: Any, parts: Collection[str]) -> Any:
    """Return a copy of quantisation settings that exclude the learned `parts`, and what they exclude already.

    They keep the number format of the checkpoint, or of `dtype`. `settings` is a configuration of transformers
    (BitsAndBytesConfig, TorchAoConfig, ...), or the dict of one as it stands in config.json. Raises ValueError for a
    configuration that cannot exclude anything.
    """
    settings = copy.deepcopy(settings)
    if isinstance(settings, dict):
        field = _field_of_dict(settings)
        settings[field] = _with_learned(settings.get(field), parts)
        return settings
    field = next((name for name in _LEAVING_OUT if hasattr(settings, name)), "")
    if not field:
        raise ValueError(
            f"{type(settings).__name__} has no list of modules to leave out ({', '.join(_LEAVING_OUT)}), so it would "
            "quantise what a method has learned; use BitsAndBytesConfig, TorchAoConfig or another one with such a list"
        )
    setattr(settings, field, _with_learned(getattr(settings, field), parts))
    return settings


def _field_of_dict(settings: dict[str, Any]) -> str:
    present = [name for name in _LEAVING_OUT if name in settings]
    if present:
        return present[0]
    # bitsandbytes need not say its name: transformers knows it by these two switches.
    switched = settings.get("load_in_8bit") or settings.get("load_in_4bit")
    method = "bitsandbytes" if switched else str(settings.get("quant_method", ""))
    return _LEAVING_OUT_BY_METHOD.get(method, "modules_to_not_convert")


def _with_learned(given: list[str] | None, parts: Collection[str]) -> list[str]:
    excluded = list(_LEFT_OUT_ANYWAY if given is None else given)
    return excluded + [name for name in (f"{HOME}.{part}" for part in parts) if name not in excluded]
