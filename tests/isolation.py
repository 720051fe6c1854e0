"""What tests of one process must not leave to each other: how loggers are set, and what is said only once."""

import contextlib
import logging
from collections.abc import Iterator

from dynamic_llava.sparsity.kernels.choice import log_once

ADDED_BY_TRANSFORMERS = ("warning_once", "info_once")
WATCHED = ("dynamic_llava", "transformers")


def forget_what_was_said() -> None:
    """Let every message that a process logs only once be logged again."""
    log_once.cache_clear()
    for name in ADDED_BY_TRANSFORMERS:
        if hasattr(logging.Logger, name):  # once transformers has been imported
            getattr(logging.Logger, name).cache_clear()


@contextlib.contextmanager
def loggers_of_its_own() -> Iterator[None]:
    """Set the loggers back at the end: whatever the block has switched off, quietened, filtered or cut from the root.

    Loggers of ours that the block was the first to ask for end as Python makes them; those of transformers, which sets
    its own while it is imported, are left.
    """
    disabled, before = logging.root.manager.disable, {logger: _state(logger) for logger in _loggers(*WATCHED)}
    try:
        yield
    finally:
        logging.disable(disabled)
        new = {logger: (logging.NOTSET, True, False, []) for logger in _loggers(WATCHED[0])}
        for logger, (level, propagate, off, filters) in {**new, **before}.items():
            logger.setLevel(level)
            logger.propagate, logger.disabled, logger.filters[:] = propagate, off, filters


def _loggers(*packages: str) -> list[logging.Logger]:
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    return [logging.root, *(logger for logger in known if logger.name.partition(".")[0] in packages)]


def _state(logger: logging.Logger) -> tuple[int, bool, bool, list[logging.Filter]]:
    return logger.level, logger.propagate, logger.disabled, list(logger.filters)
