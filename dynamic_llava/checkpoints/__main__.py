"""`python -m dynamic_llava.checkpoints COMMAND ...`: checkpoints of other layouts made ours, and the way back.

convert SRC DST                        from the original LLaVA-1.5, LLaVA-TokenPacker, the published Dynamic-LLaVA,
                                       llava-hf, LoRA matrices, a projector, a language model alone, or ours
check SRC                              the same checks, nothing is written
assemble --language-model SRC ... DST  a LLaVA from a language model and a vision tower, with a new projector

SRC, --base and --vision-tower are folders, or names of the hub, which are then downloaded.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dynamic_llava.cli.commands import Parser, entry_point, exit_on_mistake


@entry_point("convert")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code, 2 for a checkpoint or a setting that does not fit."""
    given = vars(_parser().parse_args(arguments))
    command = given.pop("command")
    from dynamic_llava.checkpoints.assemble import assemble
    from dynamic_llava.checkpoints.convert import convert  # seconds of imports that --help does not need
    from dynamic_llava.checkpoints.plan import make_plan

    try:
        if command == "assemble":
            assemble(given.pop("language_model"), given.pop("destination"), **given)
        elif command == "convert":
            convert(given.pop("source"), given.pop("destination"), **given)
        else:
            source = given.pop("source")
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
    _add_dtype(convert)
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
    _add_assemble(commands)
    return parser


def _add_assemble(commands: Any) -> None:
    made = commands.add_parser("assemble", help="a LLaVA from its parts", description=_ASSEMBLE)
    made.add_argument(
        "--language-model",
        required=True,
        metavar="SRC",
        help="language model: a folder, a name of the hub, or a GGUF file, which needs dynamic-llava[smol]",
    )
    made.add_argument("--vision-tower", metavar="SRC", help="CLIP model; a CLIPModel's text half is left out")
    made.add_argument(
        "--text-only",
        action="store_true",
        help="instead of a tower: no image will be shown, so a small random tower stands in",
    )
    made.add_argument(
        "--projector", metavar="NAME", default="mlp", help="new projector: its name, or package.module:Class"
    )
    made.add_argument("--seed", type=int, default=0, help="what the new values are drawn from")
    _add_dtype(made)
    made.add_argument("destination", metavar="DST", help="folder to make; it must be new or empty")


def _add_dtype(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="number format of every tensor (default: each keeps its own)",
    )


_CONVERT = "Convert a checkpoint into a new folder, which appears only when it is complete."
_CHECK = "Find out what layout a checkpoint has, and whether every tensor has its name, shape and format."
_ASSEMBLE = """\
Put a LLaVA together, as LLaVA's first stage starts: a language model with its tokenizer and chat template, a CLIP
tower, and a projector that has learned nothing, to be trained next (configs/pretrain_projector_7b.yaml).
The folder appears only when it is complete."""


if __name__ == "__main__":
    sys.exit(main())
