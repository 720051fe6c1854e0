"""What a conversion starts from: every tensor under our name, from one folder or put together from several."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dynamic_llava.checkpoints import layouts, names
from dynamic_llava.checkpoints.folders import Say, check_left_out, check_unread, local_folder, some
from dynamic_llava.checkpoints.layouts import Layout, find_layout, is_original, layout_by_config, read_json
from dynamic_llava.checkpoints.lora import (
    PROJECTOR_FILE,
    SETTINGS_FILE,
    Adapter,
    holds_parts,
    part_files,
    split_adapter,
)
from dynamic_llava.checkpoints.names import RECOMPUTED, TEXT_HALF, TOWER, Rule, reason_to_leave_out, to_ours
from dynamic_llava.files import brief
from dynamic_llava.model.supported import check_architecture
from dynamic_llava.model.weight_files import Head, WeightFiles, holds_model


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

    @property
    def files(self) -> tuple[WeightFiles, ...]:
        """Return where its value comes from, its adapter's included."""
        return (self.source,) if self.adapter is None else (self.source, self.adapter.source)


@dataclass(frozen=True)
class SourceCheckpoint:
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
    trained_config: dict[str, Any] | None = None
    """config.json of an original LLaVA's LoRA folder whose base has a layout with <image>; `config` is the base's."""

    projector: str | None = None
    """Projector that a language model alone gets, newly initialised."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by our names."""
        return {name: stored.head.shape for name, stored in self.tensors.items()}

    @property
    def is_original(self) -> bool:
        """Return whether this is the original LLaVA's family, whose vocabulary has no <image>."""
        return is_original(self.layout)


def read_source(
    folder: str | Path,
    vision_tower: str | Path | None,
    base: str | Path | None,
    say: Say,
    *,
    keep_projector: bool = False,
    projector: str | None = None,
    leave_out: Collection[str] = (),
) -> SourceCheckpoint:
    """Find out what a checkpoint holds and where every tensor belongs; arguments and errors are those of `convert`.

    No value is read, except where a file may be a second copy of another one.
    """
    folder = local_folder(folder, say)
    tower = None if vision_tower is None else local_folder(vision_tower, say)
    under = None if base is None else local_folder(base, say)
    check_left_out([place for place in (folder, under, tower) if place is not None], leave_out)
    if holds_parts(folder, leave_out):
        source = _read_parts(folder, under, leave_out, keep_projector, say)
    elif under is not None or keep_projector:
        option = "--keep-projector" if under is None else f"--base {base}"
        raise ValueError(
            f"{option} belongs to LoRA matrices, and {folder} has no adapter_config.json and no projector alone; leave "
            "it out"
        )
    else:
        source = _read_model(folder, say)
    if source.layout is layouts.LANGUAGE and projector is None:
        raise ValueError(
            f"{folder} is a language model without projector and vision tower, no LLaVA; it can be the --base of a "
            "LoRA folder, or become one with --vision-tower PATH and a new projector, --projector mlp"
        )
    if source.layout is not layouts.LANGUAGE and projector is not None:
        raise ValueError(
            f"{folder} has a projector; --projector {projector} is for a language model alone. To train a new one over "
            f"this model, convert it as it is, and say --model.projector {projector} to the training"
        )
    source = replace(source, projector=projector)
    source = _with_tower(source, tower, say)
    opened = {id(files): files for stored in source.tensors.values() for files in stored.files}
    placed = {name: (stored.source, stored.name) for name, stored in source.tensors.items()}
    for place in dict.fromkeys(place for place in (folder, under, tower) if place is not None):
        check_unread(place, opened.values(), placed, leave_out, say)
    return source


def _read_model(folder: Path, say: Say) -> SourceCheckpoint:
    config = read_json(folder / "config.json")
    layout = layout_by_config(folder, config)  # a folder of another architecture is named before its files are read
    if layout in (layouts.OURS, layouts.LLAVA_HF):
        check_architecture(folder, config)
    files = WeightFiles.of_folder(folder)
    layout = find_layout(folder, config, files.heads)
    say(f"{folder}: {layout.title}; {len(files.heads)} tensors in {len(files.files)} files")
    tensors = _place(folder, files, layout, say)
    if layout is layouts.LANGUAGE and config.get("tie_word_embeddings") is True and names.EMBEDDING in tensors:
        say("head: a copy of the table of words, which the language model uses for both; from now on they are two")
        tensors[names.HEAD] = tensors[names.EMBEDDING]
    return SourceCheckpoint(folder, layout, config, tensors)


def _read_parts(
    folder: Path, base: Path | None, leave_out: Collection[str], keep_projector: bool, say: Say
) -> SourceCheckpoint:
    if base is None:
        raise ValueError(_needs_base(folder))
    under = _read_model(base, say)
    files = part_files(folder, leave_out)
    adapters, whole = split_adapter(folder, files)
    kind = layouts.ADAPTER if adapters else layouts.PROJECTOR
    say(f"{folder}: {kind.title}; {len(adapters)} pairs of matrices to merge, {len(whole)} whole tensors")
    trained = _place(folder, files, kind, say, only=whole)
    tensors = under.tensors | trained
    if any(name.startswith(names.PROJECTOR) and name not in under.tensors for name in trained):  # of another kind
        tensors = {name: one for name, one in under.tensors.items() if not name.startswith(names.PROJECTOR)} | trained
    rules = set()
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
        rules.add(found[1])
    own = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    config = under.config if own is None else own
    layout = layout_by_config(folder, config)
    if layout is layouts.LANGUAGE:
        raise ValueError(f"neither {folder} nor {base} has the config.json of a LLaVA, which names projector and tower")
    by_llava = bool(rules & set(names.PUBLISHED)) or (own is not None and is_original(layout))
    adapted = {found[0] for name in adapters if (found := to_ours(name, layouts.ADAPTER.rules))}
    _check_projector(folder, {*trained, *adapted}, by_llava, own or {}, keep_projector, say)
    if is_original(layout) and not is_original(under.layout):  # <image> has its row in the base already
        return SourceCheckpoint(folder, under.layout, under.config, tensors, base=base, trained_config=own)
    return SourceCheckpoint(folder, layout, config, tensors, base=base)


def _needs_base(folder: Path) -> str:
    if not (folder / SETTINGS_FILE).is_file():
        return f"{folder} holds a projector alone; give the folder of the model that it was trained on with --base PATH"
    named = read_json(folder / SETTINGS_FILE).get("base_model_name_or_path")
    whole = f", or --base {folder} for the model beside them" if holds_model(folder) else ""
    return f"{folder} holds LoRA matrices over {brief(named)}; give the folder of that model with --base PATH{whole}"


def _check_projector(
    folder: Path, trained: Collection[str], by_llava: bool, config: dict[str, Any], keep: bool, say: Say
) -> None:
    """Raise ValueError where LLaVA's training has trained a projector that is not in its folder."""
    there = [name for name in trained if name.startswith(names.PROJECTOR)]
    frozen = config.get("freeze_mm_mlp_adapter") is True
    if keep and there:
        raise ValueError(f"{folder} holds a trained projector ({some(there)}); leave --keep-projector out")
    if there or not by_llava:
        say(f"projector: {'as it was trained' if there else 'that of the base, which this adapter did not train'}")
    elif keep or frozen:
        say(f"projector: that of the base, {'as --keep-projector says' if keep else 'which config.json calls frozen'}")
    else:
        raise ValueError(
            f"{folder} lacks the projector, which LLaVA's training trains beside LoRA matrices: copy the training's "
            f"non_lora_trainables.bin or {PROJECTOR_FILE} into the folder. A checkpoint from the middle of such a "
            "training holds neither, and is of use to that training only. If the training left the projector alone, "
            "say --keep-projector, and the one of the base is taken"
        )


def _with_tower(source: SourceCheckpoint, vision_tower: Path | None, say: Say) -> SourceCheckpoint:
    inside = any(name.startswith(TOWER) for name in source.tensors)
    if inside and vision_tower is not None:
        raise ValueError(f"{source.folder} holds its own vision tower; leave --vision-tower {vision_tower} out")
    if inside:
        return source
    if vision_tower is None:
        named = source.config.get("mm_vision_tower", "openai/clip-vit-large-patch14-336")
        raise ValueError(
            f"{source.folder} holds no vision tower; its config.json names {brief(named)}: give the folder of that "
            "CLIP model with --vision-tower PATH"
        )
    config = read_json(vision_tower / "config.json")
    if config.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(
            f"{vision_tower} has model_type {brief(config.get('model_type'))}; LLaVA-1.5's tower is a CLIPVisionModel "
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
    only: Mapping[str, str] | None = None,
) -> dict[str, Stored]:
    """Return the tensors of a folder by our names, and say what was mapped by which rule and what was left out.

    `only`: the tensors to place, as the layout calls them, with the names under which they are stored; default all.
    """
    placed: dict[str, Stored] = {}
    mapped: Counter[Rule] = Counter()
    dropped: Counter[str] = Counter()
    unplaced = []
    for name, stored in (only if only is not None else {name: name for name in files.heads}).items():
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
