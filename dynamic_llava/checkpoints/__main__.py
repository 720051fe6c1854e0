"""`python -m dynamic_llava.checkpoints COMMAND ...`: checkpoints of other layouts made ours, and the way back.

convert  SRC DST: from the original LLaVA-1.5, the published Dynamic-LLaVA, llava-hf, LoRA matrices or ours
check    SRC: the same checks, nothing is written
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dynamic_llava.cli import choose_command, exit_on_mistake


@dataclass(frozen=True)
class CheckCommand:
    """Find out what layout a folder has, and whether every tensor has its name, shape and format."""

    source: str
    """Folder of a checkpoint: config.json with safetensors or .bin files, or adapter_config.json with LoRA matrices."""
    vision_tower: str | None = None
    """Folder of the CLIP model, where the checkpoint lacks its vision tower; a CLIPModel's text half is left out."""
    base: str | None = None
    """Folder of the model that LoRA matrices belong to."""


@dataclass(frozen=True)
class ConvertCommand:
    """Convert a folder into a new one, which appears only when it is complete."""

    source: str
    """Folder of a checkpoint: config.json with safetensors or .bin files, or adapter_config.json with LoRA matrices."""
    destination: str
    """Folder to make."""
    to: Literal["dynamic-llava", "llava-hf"] = "dynamic-llava"
    """Layout of the new folder; llava-hf has no place for predictors, so they are dropped."""
    vision_tower: str | None = None
    """Folder of the CLIP model, where the checkpoint lacks its vision tower; a CLIPModel's text half is left out."""
    base: str | None = None
    """Folder of the model that LoRA matrices belong to."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of every tensor; None keeps each as it is."""


COMMANDS = {"convert": ConvertCommand, "check": CheckCommand}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code, 2 for a checkpoint or a setting that does not fit."""
    given = sys.argv[1:] if arguments is None else arguments
    command = choose_command(COMMANDS, given, "python -m dynamic_llava.checkpoints", __doc__)
    from dynamic_llava.checkpoints.convert import convert  # seconds of imports that --help does not need
    from dynamic_llava.checkpoints.plan import make_plan

    try:
        if isinstance(command, ConvertCommand):
            convert(
                command.source,
                command.destination,
                to=command.to,
                vision_tower=command.vision_tower,
                base=command.base,
                dtype=command.dtype,
            )
        else:
            plan = make_plan(command.source, vision_tower=command.vision_tower, base=command.base)
            print(f"{command.source}: complete and in order, {plan.size / 1e9:.3f} GB")
    except (ValueError, OSError) as error:  # OSError: also a folder that may not be written
        return exit_on_mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
