"""`python -m dynamic_llava.checkpoints COMMAND ...`: checkpoints of other layouts made ours, and the way back.

convert SRC DST  from the original LLaVA-1.5, LLaVA-TokenPacker, the published Dynamic-LLaVA, llava-hf, LoRA matrices, a
                 projector, a language model alone, or ours
check SRC        the same checks, nothing is written

SRC, --base and --vision-tower are folders, or names of the hub, which are then downloaded.
"""

import argparse
import sys
from collections.abc import Sequence

from dynamic_llava.cli.commands import Parser, entry_point, exit_on_mistake


@entry_point("convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code, 2 for a checkpoint or a setting that does not fit."""
    given = vars(_parser().parse_args(arguments))
    command, source = given.pop("command"), given.pop("source")
    from dynamic_llava.checkpoints.convert import convert  # seconds of imports that --help does not need
    from dynamic_llava.checkpoints.plan import make_plan

    try:
        if command == "convert":
            convert(source, given.pop("destination"), **given)
        else:
            plan = make_plan(source, **given)
            print(f"{source}: complete and in order, {plan.size / 1e9:.3f} GB")
    except (ValueError, OSError) as error:  # OSError: also a folder that may not be written
        return exit_on_mistake(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dynamic_llava.checkpoints", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    convert = commands.add_parser("convert", help="convert a checkpoint", description=_CONVERT)
    check = commands.add_parser("check", help="the same checks, nothing is written", description=_CHECK)
    for made in (convert, check):
        made.add_argument("source", metavar="SRC", help="checkpoint: a model's folder, or one of LoRA matrices")
    convert.add_argument("destination", metavar="DST", help="folder to make; it must be new or empty")
    convert.add_argument(
        "--to",
        choices=("dynamic-llava", "llava-hf"),
        default="dynamic-llava",
        help="layout of the new folder; llava-hf has no place for predictors, so they are dropped",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="number format of every tensor (default: each keeps its own)",
    )
    for made in (convert, check):
        made.add_argument(
            "--vision-tower",
            help="CLIP model, where the checkpoint lacks its vision tower; a CLIPModel's text half is left out",
        )
        made.add_argument("--base", help="model that LoRA matrices, or a projector alone, belong to")
        made.add_argument(
            "--keep-projector",
            action="store_true",
            help="the base's projector is right: the LoRA training has left it alone",
        )
        made.add_argument(
            "--projector",
            metavar="NAME",
            help="new projector for a language model alone, which becomes a LLaVA with --vision-tower: its name, such "
            "as mlp, or package.module:Class; it is then trained (configs/pretrain_projector_7b.yaml)",
        )
        made.add_argument(
            "--leave-out",
            nargs="+",
            metavar="FILE",
            default=(),
            help="names of files of weights in these folders that are no part of the model",
        )
    return parser


_CONVERT = "Convert a checkpoint into a new folder, which appears only when it is complete."
_CHECK = "Find out what layout a checkpoint has, and whether every tensor has its name, shape and format."


if __name__ == "__main__":
    sys.exit(main())
