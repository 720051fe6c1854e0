"""A new folder that appears under its name only when everything is in it."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamic_llava.files import amount


def check_destination(destination: Path) -> None:
    """Raise ValueError unless `destination` is free: not there, or an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is there already and not empty; choose another folder, or remove it")


@contextmanager
def new_folder(destination: Path, needed: int) -> Iterator[Path]:
    """Give a folder to write into, beside `destination`; it takes that name when the block ends well.

    After an error nothing is left. What a killed process left, `.NAME.partial`, is removed by the next one.
    `needed` is what will be written at least, in bytes. Raises ValueError for a disk that is or becomes full.
    """
    check_destination(destination)
    destination = destination.absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    free = shutil.disk_usage(destination.parent).free
    if free < needed:
        raise _full(destination, needed, f"only {amount(free)} are free")
    partial.mkdir()
    try:
        yield partial
        partial.replace(destination)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(destination, needed, "it became full while they were written") from None
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _full(destination: Path, needed: int, reason: str) -> ValueError:
    return ValueError(
        f"the disk of {destination.parent} has no room for the {amount(needed)} of {destination.name}: {reason}. "
        "Free some space or choose another disk; nothing was left behind"
    )
