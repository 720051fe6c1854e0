"""`python -m dynamic_llava.profile COMMAND ...`: what training costs.

memory  CONFIG.yaml --gpus N: weights, gradients, optimizer states, activations and buffers on each GPU
"""

import sys
from collections.abc import Sequence
from typing import Any

from dynamic_llava.cli import choose_command, exit_on_mistake, read_yaml
from dynamic_llava.profile.memory import MemoryCommand, memory_report
from dynamic_llava.train.config import RunConfig

COMMANDS = {"memory": MemoryCommand}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code: 1 where training does not fit, 2 for a mistake."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return _memory(choose_command(COMMANDS, given, "python -m dynamic_llava.profile", __doc__))
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)


def _memory(command: MemoryCommand) -> int:
    run = read_yaml(RunConfig, command.config)
    deepspeed = _deepspeed(run.train.deepspeed)
    report = memory_report(command, run.model, run.data, run.sparsity, run.train, run.lora, deepspeed)
    print(report.table())
    if command.json:
        print(report.line())
    return 1 if report.fits is False else 0


def _deepspeed(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    from dynamic_llava.train.distributed import read_deepspeed  # seconds of imports that other runs do not need

    return read_deepspeed(path)


if __name__ == "__main__":
    sys.exit(main())
