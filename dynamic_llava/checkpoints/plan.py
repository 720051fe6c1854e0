"""What a conversion will do, checked from names, shapes and settings before a single value is read."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from dynamic_llava.checkpoints import layouts
from dynamic_llava.checkpoints.configs import config_from_hf, config_from_original, config_of_parts
from dynamic_llava.checkpoints.folders import Say, some
from dynamic_llava.checkpoints.names import (
    EMBEDDING,
    HEAD,
    PROJECTOR,
    TOWER,
    from_ours,
    has_keep_first,
)
from dynamic_llava.checkpoints.sources import SourceCheckpoint, Stored, read_source
from dynamic_llava.checkpoints.tensors import FLOATS, Change, NewTensors, Placement, add_mean_rows, swap_rows
from dynamic_llava.checkpoints.vocabulary import (
    Vocabulary,
    extend_vocabulary,
    keep_vocabulary,
    read_tokenizer,
    with_prompts,
)
from dynamic_llava.engine.learned import prefixes
from dynamic_llava.files import brief_text
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.supported import naming_config
from dynamic_llava.processing.base_template import Ends
from dynamic_llava.processing.folder import read_ends
from dynamic_llava.projectors import DEFAULT, import_projector

TargetLayout = Literal["dynamic-llava", "llava-hf"]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and can be carried out."""

    source: SourceCheckpoint
    to: TargetLayout
    config: DynamicLlavaConfig
    vocabulary: Vocabulary
    placements: list[Placement]

    @property
    def size(self) -> int:
        """Return the bytes of the new weights."""
        return sum(placement.size for placement in self.placements)


def make_plan(
    source: str | Path,
    *,
    to: TargetLayout = "dynamic-llava",
    vision_tower: str | Path | None = None,
    base: str | Path | None = None,
    dtype: Dtype | None = None,
    keep_projector: bool = False,
    projector: str | None = None,
    seed: int = 0,
    leave_out: Collection[str] = (),
    say: Say = print,
) -> Conversion:
    """Check everything there is to check and return what to do; arguments and errors are those of `convert`."""
    for name, value, allowed in (("dtype", dtype, (None, *get_args(Dtype))), ("to", to, get_args(TargetLayout))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not offered; choose one of {', '.join(filter(None, allowed))}")
    import_projector(projector)
    found = read_source(
        source, vision_tower, base, say, keep_projector=keep_projector, projector=projector, leave_out=leave_out
    )
    config = _config(found, say)
    if projector is not None:
        found = _with_new_projector(found, config, seed, say)
    if to == "llava-hf" and config.projector != DEFAULT:
        raise ValueError(
            f"{found.folder} has the projector {config.projector!r}, and llava-hf's layout knows none but {DEFAULT!r}; "
            "leave --to out"
        )
    own_names = _check(found, config)
    vocabulary = _vocabulary(found, config, say)
    new_rows = vocabulary.rows - config.text_config.vocab_size
    config.text_config.vocab_size, config.image_token_index = vocabulary.rows, vocabulary.image_id
    placements = []
    learned = tuple(prefixes(config.sparsity).values())
    for name, stored in found.tensors.items():
        target = _target_name(name, own_names, learned, to)
        if target is not None:
            placements.append(_placement(name, target, stored, new_rows, dtype))
    _say_changes(found, config, to, say)
    sizes: Counter[torch.dtype] = Counter()
    for placement in placements:
        sizes[placement.dtype] += placement.size
    config.dtype = sizes.most_common(1)[0][0]
    return Conversion(found, to, config, vocabulary, placements)


def _config(source: SourceCheckpoint, say: Say) -> DynamicLlavaConfig:
    try:
        if source.is_original:
            return config_from_original(source.config, source.shapes, source.vision_config, say, source.projector)
        config = config_from_hf(source.config, ours=source.layout is layouts.OURS)
        if source.trained_config is not None:
            config = config_of_parts(config, source.trained_config, source.shapes, say)
        return config
    except ValueError as error:
        raise ValueError(f"{source.folder}: {brief_text(error)}") from None
    except Exception as error:  # transformers has classes of its own for a value of the wrong kind
        raise ValueError(f"{source.folder}: config.json makes no model ({brief_text(error)})") from None


def _without_weights(source: SourceCheckpoint, config: DynamicLlavaConfig) -> DynamicLlavaForConditionalGeneration:
    """Return the model of a configuration, whose weights hold nothing; ValueError where it makes none."""
    with naming_config(source.folder), torch.device("meta"):
        return DynamicLlavaForConditionalGeneration(config)


def _with_new_projector(source: SourceCheckpoint, config: DynamicLlavaConfig, seed: int, say: Say) -> SourceCheckpoint:
    """Return the checkpoint of a language model with a projector's initial values, which the seed alone decides."""
    model = _without_weights(source, config).model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = model.new_projector(config)
    made = NewTensors(projector.state_dict(), source.tensors[EMBEDDING].head.dtype)
    say(f"projector: a new {config.projector!r}, {len(made.heads)} tensors; it has learned nothing, so train it first")
    new = {f"{PROJECTOR}{name}": Stored(made, name, ("", PROJECTOR)) for name in made.heads}
    return replace(source, tensors=source.tensors | new)


def _check(source: SourceCheckpoint, config: DynamicLlavaConfig) -> dict[str, str]:
    """Return the module's own name of every tensor. ValueError unless names, shapes and formats are the model's."""
    state = _without_weights(source, config).state_dict()
    # Some releases of transformers have one more level inside the tower.
    own = {name.replace(f"{TOWER}vision_model.", TOWER): name for name in state}
    shapes = {name: tuple(state[stored].shape) for name, stored in own.items()}
    expected = set(own)
    for word, prefix in prefixes(config.sparsity).items():
        if word in config.untrained_predictors and not any(name.startswith(prefix) for name in source.tensors):
            expected -= {name for name in own if name.startswith(prefix)}
    wrong = []
    missing = [_both_names(name, source) for name in own if name in expected and name not in source.tensors]
    if missing:
        wrong.append(f"missing tensors: {some(missing)}")
    extra = [stored.name for name, stored in source.tensors.items() if name not in own]
    if extra:
        wrong.append(f"tensors that this configuration has no place for: {some(extra)}")
    misshapen = [
        f"{stored.name} is {stored.head.shape} and should be {shapes[name]} ({stored.head.file.name})"
        for name, stored in source.tensors.items()
        if name in own and stored.head.shape != shapes[name]
    ]
    if misshapen:
        wrong.append(f"wrong shapes: {some(misshapen)}")
    formats = [
        f"{stored.name} is {stored.head.dtype}" for stored in source.tensors.values() if stored.head.dtype not in FLOATS
    ]
    if formats:
        wrong.append(f"tensors that are not float32, float16, bfloat16 or float64: {some(formats)}")
    if wrong:
        raise ValueError(f"{source.folder} does not fit its config.json: {'; '.join(wrong)}")
    return own


def _both_names(name: str, source: SourceCheckpoint) -> str:
    stored = from_ours(name, source.layout.rules)
    return name if stored in (None, name) else f"{stored} ({name})"


def _vocabulary(source: SourceCheckpoint, config: DynamicLlavaConfig, say: Say) -> Vocabulary:
    # The tokenizer of an original LLaVA's parts lacks <image>, which such a base has.
    first = None if source.trained_config is not None else source.folder
    folders = [folder for folder in (first, source.base) if folder is not None]
    llama = config.text_config.model_type == "llama"
    tokenizer = read_tokenizer(folders, source.is_original and llama)
    if not source.is_original:
        return with_prompts(keep_vocabulary(config, tokenizer), folders, read_ends(source.folder, {}))
    text = config.text_config
    vocabulary = extend_vocabulary(source.config, text.vocab_size, tokenizer, text.pad_token_id)
    say(
        f"vocabulary: <image> is {vocabulary.image_id}, padding {vocabulary.pad_id}; {text.vocab_size} rows "
        f"become {vocabulary.rows}, new ones the mean of the others"
    )
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    return with_prompts(vocabulary, folders, Ends(ends, "config.json"))


def _target_name(name: str, own_names: dict[str, str], learned: tuple[str, ...], to: TargetLayout) -> str | None:
    """Return the name under which one of our tensors is written; None for what the target has no place for.

    `learned` are the beginnings of the names of what the method has learned.
    """
    if to == "dynamic-llava":
        return own_names[name]
    return None if name.startswith(learned) else from_ours(name, layouts.LLAVA_HF.rules)


def _placement(name: str, target: str, stored: Stored, new_rows: int, dtype: Dtype | None) -> Placement:
    changes: list[Change] = []
    shape = stored.head.shape
    if stored.adapter is not None:
        changes.append(stored.adapter.merge)
    if has_keep_first(name, stored.rule):
        changes.append(swap_rows)
    if new_rows and name in (EMBEDDING, HEAD):
        changes.append(add_mean_rows(new_rows))
        shape = (shape[0] + new_rows, *shape[1:])
    kind = stored.head.dtype if dtype is None else getattr(torch, dtype)
    return Placement(target, shape, kind, stored.source, stored.name, tuple(changes))


def _say_changes(source: SourceCheckpoint, config: DynamicLlavaConfig, to: TargetLayout, say: Say) -> None:
    swapped = sum(has_keep_first(name, stored.rule) for name, stored in source.tensors.items())
    if swapped:
        say(f"keep channel: the rows of {swapped} tensors are swapped, (keep, drop) becomes (drop, keep)")
    predictors = sum(name.startswith(tuple(prefixes(config.sparsity).values())) for name in source.tensors)
    if to == "llava-hf" and predictors:
        say(f"predictors: {predictors} tensors are dropped; llava-hf's layout has no place for them")
    elif to == "dynamic-llava" and config.untrained_predictors:
        say(
            f"not trained: {' and '.join(config.untrained_predictors)}; what the new folder lacks of them, loading "
            "initialises and says so"
        )
