"""`python -m dynamic_llava.sweep SWEEP.yaml [--dry-run] [overrides]`: a table of trainings and their evaluations.

Every run that a row names is trained, unless its model is there, and evaluated on the benchmarks of the columns, each
as the command that a user would start. What is finished is not repeated: interrupted anywhere, the same command goes
on. A failed step is reported and the others go on. Further arguments (--train.batch-size 16) are added to every
training's command.
"""

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli import read_yaml
from dynamic_llava.cli.commands import Parser, entry_point, exit_on_mistake

EXIT_FAILED = 1


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Do a sweep; return 0 when the table is whole, 1 when a step failed, 2 for a user's mistake, 75 when stopped."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = _parser().parse_known_args(given)
    try:
        return _sweep(options.sweep, options.dry_run, overrides, shlex.join(given))
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dynamic_llava.sweep", description=__doc__)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="a file of configs/sweeps")
    parser.add_argument("--dry-run", action="store_true", help="print every command, and what is done and missing")
    return parser


def _sweep(path: Path, dry_run: bool, overrides: Sequence[str], given: str) -> int:
    # Imported here, so that --help answers at once.
    from dynamic_llava.sweep.config import SweepConfig
    from dynamic_llava.sweep.plan import make_plan
    from dynamic_llava.sweep.report import sweep_report
    from dynamic_llava.sweep.run import describe, run_plan
    from dynamic_llava.sweep.table import results, table, write_table
    from dynamic_llava.train.stopping import EXIT_STOPPED, Stopped

    plan = make_plan(read_yaml(SweepConfig, path), path, overrides)
    if dry_run:
        print("\n".join(describe(plan)))
        return 0
    results(plan)  # a broken file in an evaluation's folder is found now, not after a day
    made_by = f"python -m dynamic_llava.sweep {given}"
    try:
        failures = run_plan(plan, lambda line: print(line, flush=True), lambda: write_table(plan, made_by))
    except Stopped as stopped:
        print(f"stopped: {stopped}. The same command goes on from here.", file=sys.stderr)
        return EXIT_STOPPED
    print(f"\n{table(plan, results(plan), escape=False)}\n\ntable: {plan.sweep.folder / 'table.md'}")
    print(f"report: {sweep_report(plan.sweep.folder).write()}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return EXIT_FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(main())
