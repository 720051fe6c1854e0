"""`dynamic-llava report RUN`: a page about a run, made of the files in its folder: RUN/report.html.

RUN is the folder of a training, an evaluation, a comparison, a sweep or the tiny world's job; each writes the page
when it ends, and the same files make the same page again. It needs no other file and no network. What the folder lacks
is left out; a file that is broken or half written is named in the page and here.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dynamic_llava.cli.commands import Parser, entry_point, exit_on_mistake
from dynamic_llava.viz.run_report import RunReport

MOST_NAMED = 8
"""Runs inside a folder that an error names."""


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages; return 0, 2 for a folder without a run, 74 for a page that could not be written."""
    given = _parser().parse_args(arguments)
    try:
        for folder in given.runs:
            report = report_of(folder)
            print(f"report: {report.write()}")
            for problem in report.problems:
                print(f"{folder}: {problem}", file=sys.stderr)
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dynamic_llava.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, e.g. runs/tiny")
    return parser


def report_of(folder: Path) -> RunReport:
    """Return the report of a run's folder; FileNotFoundError where it is none, with the runs that it holds."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the folder of a run, such as runs/tiny")
    kind = _kind(folder)
    if kind is None:
        inside = sorted({path.parent for path in folder.glob("**/config.yaml") if _kind(path.parent) is not None})
        named = ", ".join(map(str, inside[:MOST_NAMED])) + (", ..." if len(inside) > MOST_NAMED else "")
        raise FileNotFoundError(
            f"{folder} holds nothing that a report is made of: no metrics.jsonl, summary.json, compare.json or "
            f"results.json; give the folder of a run{f', such as one in it: {named}' if inside else ''}"
        )
    return kind(folder)


def _kind(folder: Path) -> Callable[[Path], RunReport] | None:
    """Return what makes the report of a folder, by the files that are in it."""
    # Each is imported when it is asked for: a training's page needs nothing of an evaluation's.
    if (folder / "compare.json").exists():
        from dynamic_llava.eval.compare.report import comparison_report

        return comparison_report
    if (folder / "results.json").exists():
        if (folder / "config.yaml").exists():
            from dynamic_llava.tiny.job.report import job_report

            return job_report
        from dynamic_llava.sweep.report import sweep_report

        return sweep_report
    if (folder / "summary.json").exists():
        from dynamic_llava.eval.report import evaluation_report

        return evaluation_report
    if (folder / "metrics.jsonl").exists():
        from dynamic_llava.train.report import training_report

        return training_report
    return None


if __name__ == "__main__":
    sys.exit(main())
