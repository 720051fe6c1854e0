"""Conversion of checkpoints: everything is checked first, then tensors pass through one by one.

The new folder appears under its name only when everything is in it, tokenizer, prompts and image preparation included.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlavaConfig

from dynamic_llava.checkpoints.configs import config_to_hf
from dynamic_llava.checkpoints.folders import Say
from dynamic_llava.checkpoints.layouts import read_json
from dynamic_llava.checkpoints.plan import Conversion, Dtype, TargetLayout, make_plan
from dynamic_llava.checkpoints.sources import SourceCheckpoint
from dynamic_llava.checkpoints.tensors import write_weights
from dynamic_llava.checkpoints.vocabulary import Vocabulary
from dynamic_llava.files import WriteError, amount, writing
from dynamic_llava.model import DynamicLlavaConfig
from dynamic_llava.model.card import write_card
from dynamic_llava.model.weight_files import WeightFiles
from dynamic_llava.processing import DynamicLlavaImageProcessor, DynamicLlavaProcessor
from dynamic_llava.processing.folder import write_json

SHARD_BYTES = 5_000_000_000
"""Most bytes of one file of weights."""
_GENERATION = "generation_config.json"
_PIXELS = "preprocessor_config.json"


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: TargetLayout = "dynamic-llava",
    vision_tower: str | Path | None = None,
    base: str | Path | None = None,
    dtype: Dtype | None = None,
    keep_projector: bool = False,
    projector: str | None = None,
    seed: int = 0,
    leave_out: Collection[str] = (),
    shard_bytes: int = SHARD_BYTES,
    say: Say = print,
) -> Path:
    """Convert a checkpoint's folder into a new one, which appears only when it is complete; return it.

    source: a folder or hub name of the original LLaVA-1.5, of the published Dynamic-LLaVA, of llava-hf, of ours, of
    LoRA matrices over one of them, or of a projector that LLaVA's first stage has trained. to: this library's layout,
    or llava-hf's without predictors. vision_tower: a CLIP folder, for a source without its tower. base: what LoRA
    matrices or a projector belong to. dtype: float32, float16 or bfloat16 for every tensor; None keeps each as it is.
    keep_projector: the base's projector is right, for LoRA matrices whose training left it alone. projector: name of a
    new one for a language model alone, which becomes a LLaVA to be trained with vision_tower. seed: what its values are
    drawn from. leave_out: names of files of weights that are no part of the model. say: gets one line at a time of what
    is done.
    Raises FileNotFoundError and ValueError before anything is written, for whatever does not fit, and for a file of
    weights that nothing was read from and that is no second copy of what was; ValueError also for a full disk.
    Memory: one tensor beside what the system keeps of the one input file that is open.
    """
    destination = Path(destination)
    check_destination(destination)
    plan = make_plan(
        source,
        to=to,
        vision_tower=vision_tower,
        base=base,
        dtype=dtype,
        keep_projector=keep_projector,
        projector=projector,
        seed=seed,
        leave_out=leave_out,
        say=say,
    )
    with new_folder(destination, plan.size) as folder:
        write_weights(folder, plan.placements, shard_bytes, say)
        write_processor(folder, plan.source, plan.config, plan.vocabulary, to, say)
        written = WeightFiles.of_folder(folder).heads
        assert {name: head.shape for name, head in written.items()} == {p.name: p.shape for p in plan.placements}
        _write_configs(folder, plan)
    say(f"{destination}: complete")
    return destination


def _write_configs(folder: Path, plan: Conversion) -> None:
    """Write what is left, config.json last of all: without it nothing takes the folder for a checkpoint."""
    config: LlavaConfig = plan.config
    architecture: Any = "DynamicLlavaForConditionalGeneration"
    if plan.to == "llava-hf":
        config, architecture = config_to_hf(plan.config), "LlavaForConditionalGeneration"
    config.architectures = [architecture]
    parts = plan.source.trained_config is not None  # of the original LLaVA, whose own holds contradicting settings
    folders = [folder for folder in (None if parts else plan.source.folder, plan.source.base) if folder is not None]
    own = next((path for folder in folders if (path := folder / _GENERATION).is_file()), None)
    if not plan.source.is_original and own is not None:
        shutil.copyfile(own, folder / _GENERATION)
    else:
        # The original's own holds sampling settings that contradict each other.
        text = plan.config.text_config
        GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=plan.vocabulary.pad_id
        ).save_pretrained(folder)
    if plan.to == "dynamic-llava":
        write_card(folder, plan.config)
    config.save_pretrained(folder)


def check_destination(destination: Path) -> None:
    """Raise ValueError unless `destination` is free: not there, or an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is there already and not empty; choose another folder, or remove it")


@contextmanager
def new_folder(destination: Path, needed: int) -> Iterator[Path]:
    """Give a folder to write into, beside `destination`; it takes that name when the block ends well.

    After an error nothing is left. What a killed process left, `.NAME.partial`, is removed by the next one.
    `needed` is what will be written at least, in bytes. Raises WriteError for a disk that is or becomes full or takes
    nothing.
    """
    check_destination(destination)
    destination = destination.absolute()
    partial = destination.with_name(f".{destination.name}.partial")
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(destination.parent).free
        if free < needed:
            raise WriteError(
                f"the disk of {destination.parent} has no room for the {amount(needed)} of {destination.name}: only "
                f"{amount(free)} are free. Free some space or choose another disk; nothing was left behind"
            )
        partial.mkdir()
        try:
            yield partial
            partial.replace(destination)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_processor(
    folder: Path,
    source: SourceCheckpoint,
    config: DynamicLlavaConfig,
    vocabulary: Vocabulary,
    to: TargetLayout,
    say: Say,
) -> None:
    """Write the processor's files; without a tokenizer in the source only those about images, and say so."""
    image_size, colours = config.vision_config.image_size, _colours(source)
    if vocabulary.tokenizer is None:
        write_json(folder / _PIXELS, DynamicLlavaImageProcessor(image_size, **colours).to_dict())
        say(f"{source.folder} holds no tokenizer, so there is no processor of text; the model itself is whole")
        return
    DynamicLlavaProcessor(
        vocabulary.tokenizer,
        image_size,
        config.vision_config.patch_size,
        image_token_id=vocabulary.image_id,
        feature_select=config.vision_feature_select_strategy,
        projector=config.projector,
        added_tokens=0 if to == "llava-hf" else config.added_image_tokens,
        **colours,
        chat_template=vocabulary.chat_template,
        ends=vocabulary.ends,
    ).save_pretrained(folder)
    if to == "llava-hf":
        _name_processor(folder, "LlavaProcessor")


def _colours(source: SourceCheckpoint) -> dict[str, Any]:
    """Return the source's own mean and deviation of colours; without any, none, which means CLIP's."""
    found = source.config.get("image_processor") or {}
    for folder in (source.folder, source.base, source.vision_tower):
        if not found and folder is not None and (folder / _PIXELS).is_file():
            found = read_json(folder / _PIXELS)
    return {name: found[name] for name in ("image_mean", "image_std") if name in found}


def _name_processor(folder: Path, name: str) -> None:
    """Let transformers find its own class, which knows nothing of ours."""
    for path in (folder / "processor_config.json", folder / "tokenizer_config.json"):
        values = read_json(path) if path.is_file() else {}
        if "processor_class" in values:
            write_json(path, {**values, "processor_class": name})
