"""Trains the dense base of the tiny world from scratch: about 25 minutes on two free CPU cores.

    python -m dynamic_llava.tiny.train_base --config configs/tiny_base.yaml [--seed 1] [--install]

Three stages: vision tower, alignment, language. An interrupted run goes on from the files in the output folder. The
result is a llava-hf folder `export/` with provenance and log; `--install` also puts it into the package
(dynamic_llava/tiny/weights).

Crutches of this base that no real LLaVA has, all before the sparse training and none of them in it: patch-level labels
for the tower; a projector aligned to the words that name each patch; unit-scale embeddings and mimetic attention at the
start; a loss that points two heads of one layer to the object named next, gone after half of the steps; several
conversations per row behind a block-diagonal mask.
"""

import json
import logging
import sys

import torch

from dynamic_llava.cli import load_config
from dynamic_llava.cli.commands import entry_point, exit_on_mistake
from dynamic_llava.tiny.base.pipeline import BaseConfig, train_base


@entry_point("train")
def main(arguments: list[str]) -> int:
    """Runs the training that the arguments describe; the word `--config` before the YAML file may be left out."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments[:1] == ["--config"]:
        arguments = arguments[1:]
    try:
        config = load_config(BaseConfig, arguments, "python -m dynamic_llava.tiny.train_base", str(__doc__))
        torch.set_num_threads(config.threads)
        torch.set_flush_denormal(True)  # denormal numbers appear in the optimizers' moments and slow a CPU down
        print(json.dumps(train_base(config), indent=2))
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
