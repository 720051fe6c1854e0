"""`python -m dynamic_llava.smol job | table | page`: learned admission in a real language model, on a CPU.

job    CONFIG.yaml [overrides]: assemble the base, sample its answers, train, measure every rule of the table
table  print the table of a job's folder, as far as the job has come
page   docs/results/smol.md, smol.json and smol.png from a job's folder

`bash scripts/train.sh configs/smol.yaml` runs the job; docs/smol.md says what it needs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli import load_config
from dynamic_llava.cli.commands import Parser, entry_point, exit_on_mistake
from dynamic_llava.smol.config import SmolJobConfig

MODULE = "dynamic_llava.smol"
PROGRAM = f"python -m {MODULE}"
ABOUT_JOB = "The smol world's job: assemble the base, sample its answers, train, measure every rule of the table."


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 2 for a user's mistake, for the job also those of a training."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["job"]:
        return _job(words[1:])
    given = _parser().parse_args(words)
    try:
        given.execute(given)
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("job", help="CONFIG.yaml [overrides]: run the job")
    table = commands.add_parser("table", help="print the table of a job's folder")
    table.add_argument("run", type=Path, help="folder of the job, e.g. runs/smol")
    table.set_defaults(execute=_table)
    page = commands.add_parser("page", help="write the results page of a job's folder")
    page.add_argument("run", type=Path, help="folder of the job, e.g. runs/smol")
    page.add_argument("--page", type=Path, default=Path("docs/results/smol.md"), help="where the page goes")
    page.set_defaults(execute=_page)
    return parser


def _job(words: list[str]) -> int:
    """Run the job here, or on a machine with several GPUs in one process that sees the first of them alone."""
    from dynamic_llava.train.launch import run_alone

    def read() -> SmolJobConfig:
        config = load_config(SmolJobConfig, words, f"{PROGRAM} job CONFIG.yaml", ABOUT_JOB)
        if not words or words[0].startswith("-"):  # not before --help has been answered
            raise ValueError(f"give the file of the job before its overrides: {PROGRAM} job configs/smol.yaml")
        return config

    def work(config: SmolJobConfig) -> None:
        from dynamic_llava.smol.job import main as run_job  # not before --help is answered

        run_job(config)

    return run_alone("the smol world's job", MODULE, ["job", *words], read, work)


def _table(given: argparse.Namespace) -> None:
    from dynamic_llava.smol.job import read_result
    from dynamic_llava.smol.table import table

    print(table(read_result(given.run)))


def _page(given: argparse.Namespace) -> None:
    from dynamic_llava.smol.page import write_page

    print(write_page(given.run, given.page))


if __name__ == "__main__":
    sys.exit(main())
