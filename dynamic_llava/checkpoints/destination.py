"""A new folder that appears under its name only when everything is in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamic_llava.files import WriteError, amount, writing


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
