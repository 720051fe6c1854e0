"""`python -m dynamic_llava.train.launch CONFIG.yaml [overrides]`: says how it starts the run and why, and starts it."""

import os
import sys
from collections.abc import Sequence

from dynamic_llava.cli import load_config
from dynamic_llava.commands import entry_point, exit_on_mistake
from dynamic_llava.config.run import RunConfig
from dynamic_llava.train.__main__ import DESCRIPTION, PROGRAM
from dynamic_llava.train.launch.plan import plan
from dynamic_llava.train.launch.supervise import supervise


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Start the run that the command line describes; --help and mistakes are answered here, once and at once."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        config = load_config(RunConfig, given, PROGRAM, DESCRIPTION)
        import torch  # not before --help and a mistyped key have been answered

        launch = plan(
            devices=torch.accelerator.device_count(),
            deepspeed=config.train.deepspeed is not None,
            environment=os.environ,
        )
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)
    print(launch.reason, file=sys.stderr, flush=True)
    command = launch.command(sys.executable, given)
    if not launch.launcher:
        os.execv(command[0], command)
    return supervise(command, {**launch.environment, **os.environ})


if __name__ == "__main__":
    sys.exit(main())
