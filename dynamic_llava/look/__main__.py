"""`python -m dynamic_llava.look --model M --image photo.jpg --ask "…" --out DIR`: what is kept of image and answer.

Asks the same by several methods, and writes into DIR: index.html, a page that needs no other file and no network;
kept, answers and cache, each as PNG, SVG and PDF; look.json, the numbers behind them. Alone it asks the dense model
that ships with the package about a scene of its world, which is what that model knows, once dense and once by FastV,
which needs no training.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli.commands import Parser, add_methods, add_projector, entry_point, exit_on_mistake


@entry_point("look")
def main(arguments: Sequence[str] | None = None) -> int:
    """Look; return 0, 2 for a user's mistake, 74 for a file that could not be written, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    given = vars(_parser().parse_args(arguments))
    from dynamic_llava.look.looking import LookOptions, look  # here, so that --help answers at once
    from dynamic_llava.look.writing import write_all  # without matplotlib, that is said before a model is loaded

    try:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        options = LookOptions(**values)
        page = write_all(look(options), options.output_folder)
        pictures = ", ".join(sorted(path.name for path in page.parent.glob("*.png")))
        print(f"\npage: {page}\nbeside it, as SVG and PDF too: {pictures}")
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dynamic_llava.look", description=__doc__)
    add = parser.add_argument
    add(
        "--model", default="tiny", metavar="PATH", help="checkpoint folder, hub name, or tiny (the shipped dense model)"
    )
    add(
        "--image",
        type=Path,
        action="append",
        dest="images",
        metavar="FILE",
        help="goes with the first question; may be given more than once (default: for the shipped model a scene of its "
        "world)",
    )
    add("--ask", metavar="TEXT", help='the question (default: without --turns "Describe the image in detail.")')
    add(
        "--turns",
        type=Path,
        metavar="FILE",
        help="text file of questions, one a line, asked in turn, behind that of --ask (default: None)",
    )
    add_methods(parser, "dense, and what the checkpoint was trained for; where that is nothing, fastv")
    add_projector(parser)
    add("--max-new-tokens", type=int, default=256, help="most tokens of an answer")
    add(
        "--output-folder",
        "--out",
        type=Path,
        default=Path("runs/look"),
        metavar="DIR",
        help="the page and the pictures go here",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
