"""The folders that a conversion is given: on this machine or fetched from the hub, and what else lies in them."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from dynamic_llava.checkpoints.layouts import ADAPTER
from dynamic_llava.checkpoints.names import RECOMPUTED, TEXT_HALF, reason_to_leave_out, to_ours, without_peft
from dynamic_llava.model.weight_files import SUFFIXES, WeightFiles, all_weight_files

Say = Callable[[str], None]

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PARAMETERS = ("weight", "bias")
_OTHER_FRAMEWORKS = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")
"""Suffixes of weights that torch does not read; the hub's repositories hold them beside the same weights for torch."""


def local_folder(given: str | Path, say: Say) -> Path:
    """Return the folder of a path, or of a hub name: from the hub's cache on this machine, or downloaded into it.

    Raises FileNotFoundError for a path that is no folder, and for a hub name that cannot be had, with the command that
    downloads it elsewhere.
    """
    folder, name = Path(given), str(given)
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(name) or folder.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; give a checkpoint's folder, or a name of the hub such as owner/model"
        )
    say(f"{name}: no folder here, so the hub is asked for it")
    try:
        return Path(snapshot_download(name, ignore_patterns=[f"*{suffix}" for suffix in _OTHER_FRAMEWORKS]))
    except Exception as error:  # the hub's client passes on what its transport raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FileNotFoundError(
            f"{name} is no folder here, and the hub does not give it ({reason}). Download it where the hub can be "
            f"reached, and give the folder: hf download {name} --local-dir {folder.name}"
        ) from None


def check_unread(
    folder: Path,
    opened: Collection[WeightFiles],
    placed: Mapping[str, tuple[WeightFiles, str]],
    leave_out: Collection[str],
    say: Say,
) -> None:
    """Account for the files of weights in a folder that nothing was read from.

    opened: what is read, of this folder and of others. placed: file and stored name of every tensor, by our names.
    A file may hold a second copy of what is read, value by value; it may be named in `leave_out`. Raises ValueError
    for any other: it may be the one that was meant.
    """
    read = {file.resolve() for files in opened for file in files.files}
    own = [files for files in opened if files.files[0].parent == folder]
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _OTHER_FRAMEWORKS and path.is_file():
            say(f"{path}: not read; it is not for torch")
    for file in all_weight_files(folder):
        if file.name in leave_out and file.resolve() in read:
            raise ValueError(f"{file} is what is read of {folder}; to leave it out, move it out of the folder")
        if file.name in leave_out or file.resolve() in read:
            continue
        copy = _open(file)
        if not _is_of_a_model(copy):
            say(f"{file}: not read; it holds no model's weights but {some(copy.heads, 2)}")
            continue
        differing = _differing(copy, own, placed)
        if differing:
            raise ValueError(
                f"{file} is not read, and what is read has no such values: {some(differing)}. If the file is no part "
                f"of this model, say --leave-out {file.name}; if it is the right one, move the files that are read "
                f"({', '.join(sorted(path.name for files in own for path in files.files)) or 'none'}) out of the folder"
            )
        say(f"{file}: not read; every tensor of it is in the files that are")


def check_left_out(folders: Iterable[Path], leave_out: Collection[str]) -> None:
    """Raise ValueError for a name in `leave_out` that no file of weights in the folders has."""
    folders = list(folders)
    there = {file.name for folder in folders for file in all_weight_files(folder)}
    unknown = [name for name in leave_out if name not in there]
    if unknown:
        raise ValueError(
            f"--leave-out {unknown[0]}: no such file of weights ({', '.join(SUFFIXES)}) is in "
            f"{' or '.join(map(str, folders))}; there are {', '.join(sorted(there)) or 'none'}"
        )


def _open(file: Path) -> WeightFiles:
    try:
        return WeightFiles([file])
    except ValueError as error:
        raise ValueError(f"{error}; if it is no part of this model, say --leave-out {file.name}") from None


def _is_of_a_model(files: WeightFiles) -> bool:
    """Return whether a file may be a part of a LLaVA: one tensor has such a name, or all are called weight and bias."""
    return any(_our_name(name) for name in files.heads) or all(name.endswith(_PARAMETERS) for name in files.heads)


def _our_name(name: str) -> str | None:
    found = to_ours(without_peft(name), ADAPTER.rules)
    return None if found is None else found[0]


def _differing(
    copy: WeightFiles, own: Iterable[WeightFiles], placed: Mapping[str, tuple[WeightFiles, str]]
) -> list[str]:
    """Return the tensors of a file that those which are read lack, or hold with another value."""
    found = []
    for name, head in copy.heads.items():
        if reason_to_leave_out(without_peft(name), (*RECOMPUTED, *TEXT_HALF)):
            continue
        twin = next(((files, name) for files in own if name in files.heads), None)
        if twin is None:
            twin = placed.get(_our_name(name) or "")
        if twin is None or twin[0].heads[twin[1]].shape != head.shape:
            found.append(name)
            continue
        value = twin[0].read(twin[1])
        if not copy.read(name).to(value.dtype).equal(value):
            found.append(name)
    return found


def some(names: Iterable[str], shown: int = 5) -> str:
    """Return the first few names, and how many more there are."""
    names = list(names)
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
