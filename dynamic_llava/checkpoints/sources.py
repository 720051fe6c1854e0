"""What a conversion starts from: every tensor under our name, from one folder or put together from several."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamic_llava.checkpoints import layouts
from dynamic_llava.checkpoints.layouts import Layout, find_layout, is_adapter, layout_by_config, read_json
from dynamic_llava.checkpoints.lora import Adapter, adapter_files, split_adapter
from dynamic_llava.checkpoints.names import RECOMPUTED, TEXT_HALF, TOWER, Rule, reason_to_leave_out, to_ours
from dynamic_llava.model.weight_files import Head, WeightFiles

Say = Callable[[str], None]
_SHOWN = 5


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies, and the adapter that is merged into it."""

    source: WeightFiles
    name: str
    rule: Rule
    adapter: Adapter | None = None

    @property
    def head(self) -> Head:
        """Return its file, shape and number format."""
        return self.source.heads[self.name]


@dataclass(frozen=True)
class Source:
    """A checkpoint to convert."""

    folder: Path
    layout: Layout
    """Layout of `config`; the tensors of a LoRA folder's base may have another."""
    config: dict[str, Any]
    """config.json as it is."""
    tensors: dict[str, Stored]
    """By our names; the tensors of one file stand together."""
    base: Path | None = None
    """Folder of what LoRA matrices were trained on; the tokenizer may lie there."""
    vision_tower: Path | None = None
    """Folder of a separate vision tower; settings of images may lie there, and a tokenizer that is not LLaVA's."""
    vision_config: dict[str, Any] | None = None
    """Its config.json."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by our names."""
        return {name: stored.head.shape for name, stored in self.tensors.items()}

    @property
    def is_original(self) -> bool:
        """Return whether this is the original LLaVA's family, whose vocabulary has no <image>."""
        return self.layout not in (layouts.OURS, layouts.LLAVA_HF)


def read_source(folder: Path, vision_tower: Path | None, base: Path | None, say: Say) -> Source:
    """Find out what `folder` holds and where every tensor belongs; no value is read.

    Raises FileNotFoundError and ValueError for whatever is missing, damaged, contradictory or without a place.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give a checkpoint's folder (download it from the hub first)"
        )
    if is_adapter(folder):
        source = _read_adapter(folder, base, say)
    elif base is not None:
        raise ValueError(
            f"--base {base} belongs to a LoRA folder, and {folder} has no adapter_config.json; leave it out"
        )
    else:
        source = _read_model(folder, say)
        if source.layout is layouts.LLAMA:
            raise ValueError(
                f"{folder} is a language model without projector and vision tower, no LLaVA; it can be the --base of a "
                "LoRA folder"
            )
    return _with_tower(source, vision_tower, say)


def _read_model(folder: Path, say: Say) -> Source:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    config = read_json(folder / "config.json")
    layout = layout_by_config(folder, config)  # a folder of another architecture is named before its files are read
    files = WeightFiles.of_folder(folder)
    layout = find_layout(folder, config, files.heads)
    say(f"{folder}: {layout.title}; {len(files.heads)} tensors in {len(files.files)} files")
    return Source(folder, layout, config, _place(folder, files, layout, say))


def _read_adapter(folder: Path, base: Path | None, say: Say) -> Source:
    if base is None:
        named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(f"{folder} holds LoRA matrices over {named!r}; give the folder of that model with --base PATH")
    under = _read_model(base, say)
    files = adapter_files(folder)
    adapters, whole = split_adapter(folder, files)
    say(f"{folder}: {layouts.ADAPTER.title}; {len(adapters)} pairs of matrices to merge, {len(whole)} whole tensors")
    tensors = under.tensors | _place(folder, files, layouts.ADAPTER, say, names=whole)
    for name, adapter in adapters.items():
        found = to_ours(name, layouts.ADAPTER.rules)
        if found is None or found[0] not in tensors:
            raise ValueError(
                f"{folder} adapts {name}, which the base {base} does not have; is it another model's adapter?"
            )
        stored = tensors[found[0]]
        if adapter.shape != stored.head.shape:
            raise ValueError(
                f"{folder} adapts {name} {adapter.shape}, which is {stored.head.shape} in {stored.head.file}"
            )
        tensors[found[0]] = replace(stored, adapter=adapter)
    own = folder / "config.json"
    config = read_json(own) if own.is_file() else under.config
    layout = layout_by_config(folder, config)
    if layout is layouts.LLAMA:
        raise ValueError(f"neither {folder} nor {base} has the config.json of a LLaVA, which names projector and tower")
    return Source(folder, layout, config, tensors, base=base)


def _with_tower(source: Source, vision_tower: Path | None, say: Say) -> Source:
    inside = any(name.startswith(TOWER) for name in source.tensors)
    if inside and vision_tower is not None:
        raise ValueError(f"{source.folder} holds its own vision tower; leave --vision-tower {vision_tower} out")
    if inside:
        return source
    if vision_tower is None:
        named = source.config.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
        raise ValueError(
            f"{source.folder} holds no vision tower; its config.json names {named!r}: give the folder of that CLIP "
            "model with --vision-tower PATH"
        )
    if not vision_tower.is_dir():
        raise FileNotFoundError(f"there is no folder {vision_tower}; give the one of a CLIP model with --vision-tower")
    config = read_json(vision_tower / "config.json")
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(
            f"{vision_tower} has model_type {config.get('model_type')!r}; LLaVA-1.5's tower is a CLIPVisionModel "
            "('clip_vision_model') or the image half of a CLIPModel ('clip')"
        )
    files = WeightFiles.of_folder(vision_tower)
    say(f"{vision_tower}: {layouts.CLIP.title}; {len(files.heads)} tensors in {len(files.files)} files")
    tower = _place(vision_tower, files, layouts.CLIP, say, (*RECOMPUTED, *TEXT_HALF))
    return replace(source, tensors=source.tensors | tower, vision_tower=vision_tower, vision_config=config)


def _place(
    folder: Path,
    files: WeightFiles,
    layout: Layout,
    say: Say,
    left_out: Iterable[tuple[Any, str]] = RECOMPUTED,
    names: Mapping[str, str] | None = None,
) -> dict[str, Stored]:
    """Return the tensors of a folder by our names, and say what was mapped by which rule and what was left out.

    `names`: the tensors to place, as the layout calls them, with the names under which they are stored; default all.
    """
    placed: dict[str, Stored] = {}
    mapped: Counter[Rule] = Counter()
    dropped: Counter[str] = Counter()
    unplaced = []
    for name, stored in (names if names is not None else {name: name for name in files.heads}).items():
        reason = reason_to_leave_out(name, left_out)
        found = None if reason else to_ours(name, layout.rules)
        if reason:
            dropped[reason] += 1
        elif found is None:
            unplaced.append(stored)
        elif found[0] in placed:
            raise ValueError(f"{folder}: {placed[found[0]].name} and {stored} are both {found[0]}; remove one of them")
        else:
            placed[found[0]] = Stored(files, stored, found[1])
            mapped[found[1]] += 1
    _refuse(folder, unplaced)
    for (theirs, ours), count in mapped.items():
        say(f"  {count:5} {theirs}* -> {ours}*")
    for reason, count in dropped.items():
        say(f"  {count:5} left out: {reason}")
    return placed


def _refuse(folder: Path, unplaced: list[str]) -> None:
    if unplaced:
        raise ValueError(f"{folder} holds {len(unplaced)} tensors without a place in LLaVA-1.5: {some(unplaced)}")


def some(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
