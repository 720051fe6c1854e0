"""`python -m dynamic_llava.chat --model PATH --image FILE`: chat with a model in the terminal.

Words whose keys and values the sparse layers have dropped are grey; the line below an answer says how full the cache
is. /image FILE gives the next question an image, /reset begins a new conversation, /quit or Ctrl-D ends. Ctrl-C stops
an answer and keeps the conversation. Lines from a pipe are answered as plain text, the cache's line on stderr.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli.commands import Parser, add_method, add_projector, add_rates, entry_point, exit_on_mistake
from dynamic_llava.config import SPARSITY_MODES

EXIT_INTERRUPTED = 130


@entry_point(None)
def main(arguments: Sequence[str] | None = None) -> int:
    """Chat; return 0 at the end of the input, 2 for a user's mistake, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    given = vars(_parser().parse_args(arguments))
    from dynamic_llava.chat.session import ChatOptions, chat  # here, so that --help answers at once

    try:
        chat(ChatOptions(images=tuple(given.pop("image")), **given))
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dynamic_llava.chat", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help="checkpoint folder, hub name, or tiny (the shipped dense model)")
    add(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="goes with the first question; may be given more than once",
    )
    add("--sparsity", choices=SPARSITY_MODES, help="what Dynamic-LLaVA drops (default: both)")
    add_rates(parser)
    add_method(parser)
    add_projector(parser)
    add("--max-new-tokens", type=int, default=512, help="most tokens of an answer")
    add("--temperature", type=float, default=0.0, help="temperature of sampling; 0 is greedy")
    add("--seed", type=int, default=0, help="seed of sampling")
    add("--color", choices=("auto", "always", "never"), default="auto", help="auto: on a terminal, without NO_COLOR")
    return parser


if __name__ == "__main__":
    sys.exit(main())
