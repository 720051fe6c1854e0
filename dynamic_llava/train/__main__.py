"""`python -m dynamic_llava.train CONFIG.yaml [overrides]`: the tiny world's main job, or training on any LLaVA data."""

import logging
import os
import sys
from collections.abc import Sequence

from dynamic_llava.cli import load_config
from dynamic_llava.commands import entry_point, exit_on_mistake
from dynamic_llava.files import WriteError
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.stopping import (
    EXIT_FAILED,
    EXIT_NOT_FINITE,
    EXIT_SAVE_FAILED,
    EXIT_STOPPED,
    NotFinite,
    Stopped,
    TrainingFailed,
    end_with_launcher,
    tell_launcher,
)

PROGRAM = "python -m dynamic_llava.train CONFIG.yaml"
DESCRIPTION = """Train Dynamic-LLaVA on LLaVA-format data from a base checkpoint.

A file with a `tiny` section runs the tiny world's main job instead: data, trainings, evaluation, report."""


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code: 2 for a user's mistake, others in `stopping`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    end_with_launcher()
    try:
        config = load_config(RunConfig, sys.argv[1:] if arguments is None else arguments, PROGRAM, DESCRIPTION)
        code = _train(config)
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_SAVE_FAILED
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except NotFinite as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_NOT_FINITE
    except (ValueError, OSError) as error:  # OSError: also a base that the hub does not give
        code = exit_on_mistake(error)
    except Stopped:  # the log has said so
        code = EXIT_STOPPED
    if code:
        tell_launcher(code)
    return code


def _train(config: RunConfig) -> int:
    # Imported here, so that --help and a mistyped key answer at once.
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # in a log file its bars are noise; the run prints lines
    if config.tiny is not None:
        from dynamic_llava.tiny.job.job import main as main_job

        main_job(config)
        return 0
    from dynamic_llava.train.distributed import leave
    from dynamic_llava.train.run import run

    result = run(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"trained checkpoint: {result.folder}\nlog: {result.run_folder / 'metrics.jsonl'}")
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
