"""`python -m dynamic_llava.train CONFIG.yaml [overrides]`: training on any LLaVA data."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from dynamic_llava.cli import load_config
from dynamic_llava.cli.commands import entry_point, exit_on_mistake
from dynamic_llava.config.run import RunConfig
from dynamic_llava.files import WriteError
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
DESCRIPTION = "Train Dynamic-LLaVA on LLaVA-format data from a base checkpoint."


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code: 2 for a user's mistake, others in `stopping`."""
    log_to_stderr()
    words = sys.argv[1:] if arguments is None else arguments
    return exit_code_of(lambda: _train(load_config(RunConfig, words, PROGRAM, DESCRIPTION)))


def log_to_stderr() -> None:
    """Let the program's own lines appear on stderr, without those of the libraries below it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def hide_bars() -> None:
    """Switch transformers' progress bars off where nobody watches them: in a log file they are noise."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def exit_code_of(work: Callable[[], int]) -> int:
    """Do a training's `work`; return its exit code, which the launcher hears too. A failure is one line on stderr."""
    end_with_launcher()
    try:
        code = work()
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
    hide_bars()
    from dynamic_llava.train.distributed import leave
    from dynamic_llava.train.report import training_report
    from dynamic_llava.train.run import run

    result = run(config)
    leave()
    if os.environ.get("RANK", "0") == "0":
        print(f"trained checkpoint: {result.folder}\nlog: {result.run_folder / 'metrics.jsonl'}")
        print(f"report: {training_report(result.run_folder).write()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
