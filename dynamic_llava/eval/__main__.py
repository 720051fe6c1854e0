"""`python -m dynamic_llava.eval tiny-page RUN_FOLDER`: the results page of a finished main job, pictures included."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli import exit_on_mistake, read_yaml
from dynamic_llava.eval.page import write_results_page
from dynamic_llava.train.config import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m dynamic_llava.eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("tiny-page", help="write docs/results/tiny.md from a finished main job")
    page.add_argument("run", type=Path, help="folder of the job, e.g. runs/tiny")
    page.add_argument("--page", type=Path, default=Path("docs/results/tiny.md"), help="where the page goes")
    page.add_argument("--made-by", default="bash scripts/train.sh", help="the command that made the run, for the page")
    given = parser.parse_args(arguments)
    try:
        sparsity = read_yaml(RunConfig, given.run / "config.yaml").sparsity
        print(write_results_page(given.run, given.page, sparsity, given.made_by))
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
