"""Which checkpoints this library carries: one gate for everything that opens a folder, before weights are read."""

import json
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
"""Arguments of a `from_pretrained` that say where the files of a hub name are."""
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
"""Files in which transformers looks for Python code that it should run (`auto_map`)."""
KERNEL_KEYS = ("attn_implementation", "_attn_implementation")
"""Keys of config.json by which transformers chooses how attention is calculated."""


def read_settings_file(source: str | Path, file: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a JSON file of a folder or hub name holds; None where there is no such file.

    `arguments` may hold transformers' hub arguments; others are left alone. Raises ValueError that names the file where
    it is no JSON object, and OSError where a hub name cannot be reached.
    """
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    found = cached_file(str(source), file, _raise_exceptions_for_missing_entries=False, **hub)
    if found is None:
        return None
    try:
        values = json.loads(Path(found).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise ValueError(f"{found} is no valid JSON ({error}); replace the file") from None
    if not isinstance(values, dict):
        raise ValueError(f"{found} holds a {type(values).__name__} where settings belong; replace the file")
    return values


def refuse_code(source: str | Path, arguments: MutableMapping[str, Any]) -> None:
    """Refuse to run Python code of a checkpoint: what it holds is read as data, and this package's classes do the rest.

    Takes `trust_remote_code` out of the arguments of a `from_pretrained`. Raises ValueError where it is True, and where
    a file of the folder or hub name asks for code by `auto_map`: tools of transformers that see the folder later, such
    as `pipeline`, would ask on standard input whether they may run it.
    """
    if arguments.pop("trust_remote_code", None):
        raise ValueError(
            "trust_remote_code=True is not offered: no code of a checkpoint is run here, and none is needed; leave the "
            "argument out"
        )
    for file in SETTINGS_FILES:
        try:
            values = read_settings_file(source, file, arguments) or {}
        except OSError:
            return  # nothing can be read, which the loading itself will say
        if values.get("auto_map"):
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
                f"config.json of {source} asks by {key} for the kernel {named!r} of the hub, and no code that a "
                f"checkpoint names is run here; take {key} out of the file, or give attn_implementation yourself"
            )
