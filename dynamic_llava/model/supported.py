"""Which checkpoints this library carries: one gate for everything that opens a folder, before weights are read.

What was given is a folder, a name of the hub, or a mistake that is easily mended; config.json describes what is carried
here, or is refused by the name of the setting.
"""

import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file

from dynamic_llava.costs import llava_shape, parameter_counts
from dynamic_llava.engine.decoder import FAMILIES
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.files import brief, brief_text
from dynamic_llava.model.tiles import check_tiles
from dynamic_llava.model.weight_files import all_weight_files, holds_model

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
"""Arguments of a `from_pretrained` that say where the files of a hub name are."""
GENERATION = "generation_config.json"
SETTINGS_FILES = (
    "config.json",
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
"""Files in which transformers looks for Python code that it should run (`auto_map`)."""
_SMALL_PREDICTORS = 100_000_000
"""Parameters that predictors may always have, however small a model is."""
KERNEL_KEYS = ("attn_implementation", "_attn_implementation")
"""Keys of config.json by which transformers chooses how attention is calculated."""
ADAPTER_SETTINGS = "adapter_config.json"
CONVERT = "python -m dynamic_llava.checkpoints convert"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DEPTH = 3
"""How far below a run's folder its models lie: runs/tiny/seed0/both/model."""
_SHOWN = 4


def read_settings_file(source: str | Path, file: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a JSON file of a folder or hub name holds; None where there is no such file.

    `arguments` may hold transformers' hub arguments; others are left alone. Raises ValueError that names the file where
    it is no JSON object or holds half a character, and OSError where a hub name cannot be reached.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    found = cached_file(str(source), file, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        return None
    try:
        values = json.loads(Path(found).read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{found} holds half a character (an unpaired surrogate); replace the file") from None
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ValueError(f"{found} is no valid JSON ({error}); replace the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{found} holds a {type(values).__name__} where settings belong; replace the file")
    return values


def refuse_trust(arguments: MutableMapping[str, Any]) -> None:
    """Take `trust_remote_code` out of the arguments of a `from_pretrained`; ValueError where it is True."""
    if arguments.pop("trust_remote_code", None):
        raise ValueError(
            "trust_remote_code=True is not offered: no code of a checkpoint is run here, and none is needed; leave the "
            "argument out"
        )


def refuse_code(source: str | Path, arguments: MutableMapping[str, Any]) -> None:
    """Refuse to run Python code of a checkpoint: what it holds is read as data, and this package's classes do the rest.

    Raises ValueError for `trust_remote_code=True` (see `refuse_trust`), and where a file of the folder or hub name asks
    for code by `auto_map`: tools of transformers that see the folder later, such as `pipeline`, would ask on standard
    input whether they may run it.
    """
    refuse_trust(arguments)
    for file in SETTINGS_FILES:
        try:
            values = read_settings_file(source, file, arguments) or {}
        except OSError:
            return  # nothing can be read, which the loading itself will say
        if values.get("auto_map", {}) != {}:
            raise ValueError(
                f"{file} of {source} asks for Python code of the checkpoint (auto_map: {values['auto_map']}), and no "
                "code of a checkpoint is run here; if the checkpoint is a LLaVA-1.5 all the same, take auto_map out of "
                "the file, and give tokenizer_class in tokenizer_config.json the name of a class of transformers"
            )


def check_kernels(source: str | Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError where config.json names a kernel of the hub, which is code that transformers would download."""
    for key in KERNEL_KEYS:
        named = values.get(key)
        if named is not None and "/" in str(named):
            raise ValueError(
                f"config.json of {source} asks by {key} for the kernel {brief(named)} of the hub, and no code that a "
                f"checkpoint names is run here; take {key} out of the file, or give attn_implementation yourself"
            )


OUR_TYPES = ("llava", "dynamic_llava", "llava_next")
"""model_type of config.json: llava-hf's for LLaVA-1.5, this library's own, and llava-hf's for LLaVA-NeXT."""
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "image_size", "patch_size",
)  # fmt: skip
_OPTIONAL = ("num_key_value_heads", "head_dim")
_PARTS = {
    "text_config": ("language model", tuple(FAMILIES)),
    "vision_config": ("vision tower", ("clip_vision_model",)),
}
"""What the two parts of config.json are called, and the model_types that are carried; the first is LLaVA-1.5's."""


def check_architecture(source: str | Path, values: Mapping[str, Any]) -> None:
    """Raise ValueError unless config.json describes what is carried here: a decoder of FAMILIES behind a CLIP tower.

    `values` is config.json in llava-hf's or this library's layout; a part that is missing is LLaVA-1.5's.
    """
    found = values.get("model_type", OUR_TYPES[0])
    if found not in OUR_TYPES:
        raise ValueError(
            f"{source} has model_type {brief(found)}; give a LLaVA-1.5 or LLaVA-NeXT checkpoint in llava-hf layout "
            "('llava', 'llava_next') or one of ours ('dynamic_llava')"
        )
    for part, (words, carried) in _PARTS.items():
        settings = values.get(part)
        if not isinstance(settings, Mapping | None):
            raise ValueError(f"config.json of {source} has {part} {brief(settings)}, where settings (an object) belong")
        kind = (settings or {}).get("model_type", carried[0])
        if kind not in carried:
            raise ValueError(
                f"{source} has a {words} of type {brief(kind)} ({part}.model_type in config.json), and only "
                f"{', '.join(map(repr, carried))} can be sparse here; transformers' own "
                "LlavaForConditionalGeneration runs it without sparsity"
            )
        _check_sizes(source, part, settings or {})
    _check_window(source, values.get("text_config") or {})
    _check_tower(source, values, values.get("vision_config") or {})
    check_tiles(source, values, values.get("vision_config") or {})


def _check_window(source: str | Path, text: Mapping[str, Any]) -> None:
    """Raise ValueError where a layer sees a window of the last tokens only.

    What a window counts changes when tokens are dropped, so masking and removing would part.
    """
    slides = text.get("model_type") == "mistral" and text.get("sliding_window") is not None
    if slides or "sliding_attention" in (text.get("layer_types") or ()):
        raise ValueError(
            f"{source} has a language model with a sliding window (text_config.sliding_window "
            f"{text.get('sliding_window')}), which would count dropped tokens; for sequences that are shorter than the "
            "window it changes nothing: set text_config.sliding_window to null, and leave out use_sliding_window and "
            "layer_types"
        )


def _check_sizes(source: str | Path, part: str, settings: Mapping[str, Any]) -> None:
    for name in _SIZES:
        size = settings.get(name, 1)
        if not (size is None and name in _OPTIONAL) and (type(size) is not int or size < 1):
            raise ValueError(
                f"config.json of {source} has {part}.{name} {brief(size)}; give a whole number of 1 or more"
            )
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if isinstance(rope, Mapping):  # anything else is refused by transformers, with the field's name
        _check_name(source, f"{part}'s rope_type", rope.get("rope_type", rope.get("type")), ROPE_INIT_FUNCTIONS)
    _check_name(source, f"{part}.hidden_act", settings.get("hidden_act"), ACT2FN)


def _check_name(source: str | Path, what: str, found: Any, known: Collection[str]) -> None:
    if found not in (None, "default") and not (isinstance(found, str) and found in known):
        raise ValueError(
            f"config.json of {source} has {what} {brief(found)}; transformers knows {', '.join(sorted(known))}"
        )


def _check_tower(source: str | Path, values: Mapping[str, Any], tower: Mapping[str, Any]) -> None:
    if tower.get("num_channels", 3) != 3:
        raise ValueError(
            f"{source} has vision_config.num_channels {brief(tower['num_channels'])}; images have 3 here: red, "
            "green, blue"
        )
    for key in ("dtype", "torch_dtype"):
        found = getattr(torch, str(values.get(key)).removeprefix("torch."), None)
        if values.get(key) is not None and not isinstance(found, torch.dtype):
            raise ValueError(
                f"config.json of {source} has {key} {brief(values[key])}; give 'float32', 'float16' or 'bfloat16'"
            )
    _check_name(source, "projector_hidden_act", values.get("projector_hidden_act"), ACT2FN)
    image, patch = tower.get("image_size", 336), tower.get("patch_size", 14)
    if image < patch:
        raise ValueError(f"{source} has images of {image} pixels and patches of {patch}; a patch is a part of an image")
    chosen, depth = values.get("vision_feature_layer", -2), tower.get("num_hidden_layers", 24)
    chosen = chosen if isinstance(chosen, list | tuple) else [chosen]
    if not chosen or any(type(layer) is not int or not -depth - 1 <= layer <= depth for layer in chosen):
        raise ValueError(
            f"config.json of {source} has vision_feature_layer {brief(values.get('vision_feature_layer'))}, and the "
            f"vision tower has {depth} layers; give one of {-depth - 1}..{depth}, or a list of them"
        )


def check_generation(source: str | Path, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError that names the setting where generation_config.json holds one that transformers does not take.

    `arguments` are those of `from_pretrained`; with a generation_config of the caller's own, the file is not read.
    """
    if arguments.get("generation_config") is not None:
        return
    values = read_settings_file(source, GENERATION, arguments) or {}
    for name, several in (("bos_token_id", False), ("eos_token_id", True), ("pad_token_id", False)):
        found = values.get(name)
        ids = found if several and isinstance(found, list) else [found]
        if found is not None and not all(type(number) is int for number in ids):
            due = "a token id, a list of them or null" if several else "a token id or null"
            raise ValueError(f"{GENERATION} of {source} has {name} {brief(found)}; give {due}")
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # transformers compares before it looks at kinds
        culprit = next((name for name, value in values.items() if not _is_taken({name: value})), None)
        what = "settings that exclude each other" if culprit is None else f"{culprit} {brief(values[culprit])}"
        reason = brief_text(" ".join(str(error).split()))
        raise ValueError(
            f"{GENERATION} of {source} has {what} ({reason}); correct it, or take it out for the default"
        ) from None


def _is_taken(settings: dict[str, Any]) -> bool:
    try:
        GenerationConfig.from_dict(settings)
    except Exception:
        return False
    return True


def check_size(source: str | Path, config: Any, shapes: Iterable[tuple[int, ...]]) -> None:
    """Raise ValueError where a configuration describes more than twice what the files of weights hold (`shapes`).

    From sizes alone, before any tensor is made: what the files lack would be allocated first and missed afterwards.
    Quantised weights are stored in other shapes, so nothing is said about them.
    """
    if getattr(config, "quantization_config", None):
        return
    learned = learned_costs(config.sparsity, config.text_config.hidden_size)
    counts = parameter_counts(llava_shape(config), learned)
    described = counts["language_model"] + counts["vision_tower"] + counts["projector"]
    stored = sum(math.prod(shape) for shape in shapes)
    predictors = sum(part.parameters for part in learned.values())
    if predictors > described + _SMALL_PREDICTORS:
        raise ValueError(
            f"the predictors of {source} have {predictors:,} parameters and the LLaVA {described:,}; lower "
            "sparsity.predictor_width, predictor_mlp or predictor_blocks (the paper: 512, 2048, 2)"
        )
    if not 0 <= config.image_token_id < config.text_config.vocab_size:
        raise ValueError(
            f"config.json of {source} has the image token {config.image_token_id}, which is outside of its "
            f"{config.text_config.vocab_size} words; correct image_token_index"
        )
    if described > 2 * stored:
        raise ValueError(
            f"config.json of {source} describes a LLaVA of {described:,} parameters and the files of weights hold "
            f"{stored:,}; compare vocab_size, num_hidden_layers and the other sizes in it with the checkpoint's, or "
            "get the missing files"
        )


@contextmanager
def naming_config(source: str | Path) -> Iterator[None]:
    """Turn what transformers raises about a value of config.json into a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {brief_text(error)}") from error
    except Exception as error:  # transformers has classes of its own for a value of the wrong kind
        reason = brief_text(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"config.json of {source} makes no model ({reason}); correct the value") from error


def check_place(source: str | os.PathLike[str], arguments: Mapping[str, Any]) -> None:
    """Raise FileNotFoundError for a path that is no folder, and for the folder of a run, which names its models.

    A name of the hub, owner/name, and a settings file (.json) pass. `arguments` may hold transformers' `subfolder`.
    """
    place = Path(source)
    if place.is_dir():
        place /= arguments.get("subfolder") or ""
    if place.is_dir():
        if not _looks_like_checkpoint(place) and (models := _models_below(place)):
            raise FileNotFoundError(
                f"{place} holds no checkpoint that can be read; did you mean {' or '.join(map(str, models))}?"
            )
        return
    if place.is_file():
        if place.suffix == ".json":
            return
        raise FileNotFoundError(f"{place} is a file; give the folder that it lies in, {place.parent}")
    if _HUB_NAME.fullmatch(str(source)) and not place.parent.is_dir():
        return
    near = next(folder for folder in place.absolute().parents if folder.is_dir())
    raise FileNotFoundError(
        f"there is no model folder {place}: {near} holds no {place.absolute().relative_to(near).parts[0]}; give the "
        "folder of a checkpoint, or a name of the hub such as llava-hf/llava-1.5-7b-hf"
    )


def refuse_adapter(source: str, arguments: MutableMapping[str, Any]) -> None:
    """Raise ValueError for LoRA matrices, beside a model or alone, in a folder or hub name.

    transformers would apply them while it loads: without a word where a model lies beside them, and without what was
    trained whole (the projector of LLaVA's training).
    """
    explicit = (arguments.get("adapter_kwargs") or {}).get("_adapter_model_path")
    place = str(explicit or source)
    try:
        settings = read_settings_file(place, ADAPTER_SETTINGS, arguments)
    except OSError:
        return  # nothing can be read, which the loading itself will say
    if settings is None:
        return
    raise ValueError(_adapter_message(Path(place), settings))


def _adapter_message(place: Path, settings: Mapping[str, Any]) -> str:
    if place.is_dir() and holds_model(place):
        return (
            f"{place} holds LoRA matrices (adapter_config.json) beside a model, and it is not said whether they belong "
            f"to it: merge them, {CONVERT} {place} NEW_FOLDER --base {place}, or move adapter_config.json and "
            "adapter_model.* out of the folder"
        )
    merged = place.parent / "model"
    if (merged / "config.json").is_file():
        return f"{place} holds LoRA matrices, no model; the training has written the merged model beside it, {merged}"
    named = settings.get("base_model_name_or_path")
    return (
        f"{place} holds LoRA matrices, no model; merge them with the model that they were trained on"
        f"{f' ({named})' if named else ''}: {CONVERT} {place} NEW_FOLDER --base MODEL"
    )


def _looks_like_checkpoint(folder: Path) -> bool:
    known = (*SETTINGS_FILES, ADAPTER_SETTINGS, "tokenizer.json", "tokenizer.model")
    return any((folder / name).is_file() for name in known) or bool(all_weight_files(folder))


def _models_below(folder: Path) -> list[Path]:
    """Return the nearest folders with a config.json below a folder, the first few of them."""
    for depth in range(1, _DEPTH + 1):
        found = []
        for path in sorted(folder.glob("/".join(["*"] * depth) + "/config.json")):
            try:
                kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
            except (OSError, ValueError, AttributeError):
                continue
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if kind is not None and not hidden and not (path.parent / ADAPTER_SETTINGS).is_file():
                found.append(path.parent)
        if found:
            return found[:_SHOWN]
    return []
