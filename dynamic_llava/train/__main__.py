"""`python -m dynamic_llava.train CONFIG.yaml [overrides]`: the tiny world's main job, or training on any LLaVA data."""

import logging
import sys
from collections.abc import Sequence

from dynamic_llava.cli import exit_on_mistake, load_config
from dynamic_llava.train.config import RunConfig

PROGRAM = "python -m dynamic_llava.train CONFIG.yaml"
DESCRIPTION = """Train Dynamic-LLaVA on LLaVA-format data from a base checkpoint.

A file with a `tiny` section runs the tiny world's main job instead: data, trainings, evaluation, report."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        config = load_config(RunConfig, sys.argv[1:] if arguments is None else arguments, PROGRAM, DESCRIPTION)
        return _train(config)
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)


def _train(config: RunConfig) -> int:
    # Imported here, so that --help and a mistyped key answer at once.
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # in a log file its bars are noise; the run prints lines
    if config.tiny is not None:
        from dynamic_llava.main_job import main as main_job

        main_job(config)
        return 0
    from dynamic_llava.train.run import run

    result = run(config)
    print(f"trained checkpoint: {result.folder}\nlog: {result.run_folder / 'metrics.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
