"""`python -m dynamic_llava.calibrate MODEL --data FILE --image-folder DIR`: let keep rates choose the thresholds.

Runs held samples in LLaVA's format through the model, notes the margins of its predictors, and writes their quantiles
into MODEL's config.json. From then on generate(output_keep_rate=0.35) keeps about 35 % of the output tokens, and
image_keep_rate does the same where image_selection is threshold. Prints how well rates are met on held-out samples.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli.commands import Parser, entry_point, exit_on_mistake


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Calibrate a model; return 0, or 2 for a user's mistake."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    given = vars(_parser().parse_args(arguments))
    from dynamic_llava.calibrate.measure import calibrate  # here, so that --help answers at once

    try:
        print(calibrate(given.pop("model"), given.pop("data"), **given))
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m dynamic_llava.calibrate", description=__doc__)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="folder of a trained checkpoint; its config.json is rewritten")
    add("--data", required=True, metavar="FILE", help="samples that the model was not trained on, in LLaVA's format")
    add("--image-folder", default="", metavar="DIR", help="folder that their image paths are relative to")
    add("--text-only", choices=("skip", "sparse"), default="skip", help="samples without an image, as data.text_only")
    add("--samples", type=int, default=500, help="first samples of the file")
    add("--batch-size", type=int, default=8, help="samples at once")
    add("--min-length", type=int, help="shorter answers are left out (default: the model's output_min_length)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
