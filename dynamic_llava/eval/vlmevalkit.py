"""Dynamic-LLaVA in VLMEvalKit, which has no entry points: this puts the model into its tables and starts its run.py.

    python -m dynamic_llava.eval.vlmevalkit VLMEvalKit/run.py --config run.json

where run.json names the class: {"model": {"sparse": {"class": "DynamicLlava", "pretrained": PATH, "sparsity": "both"}},
"data": {...}}. In Python, `register("sparse", pretrained=PATH)` makes the name known to its --model as well.

VLMEvalKit (open-compass/VLMEvalKit, read at 0044c57 and 0c4ef1b) asks one sample at a time.
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from dynamic_llava.cli.commands import Parser, entry_point, exit_on_mistake
from dynamic_llava.eval.harness import Harness, chat_prompt
from dynamic_llava.eval.tasks.base import LETTER
from dynamic_llava.eval.tasks.mmbench import is_empty
from dynamic_llava.eval.tasks.questions import option_lines

PROGRAM = "python -m dynamic_llava.eval.vlmevalkit"
CLASS = "DynamicLlava"
"""What a configuration of VLMEvalKit calls the model's class."""
LONGEST = 512
"""Longest answer where the arguments say nothing; that of VLMEvalKit's own LLaVA."""
OPTIONS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Answering(Harness):
    """What VLMEvalKit's base class is given: the arguments come from its configuration, or from `register`.

    Args:
        pretrained: folder or hub name of a checkpoint (llava-hf layout, or saved by this library).
        max_new_tokens: longest answer.
        device: where the model runs; by default the accelerator, if there is one.
        dtype, projector, switches: as in lmms-eval's class (`lmms/model.py`).
    Raises ValueError for anything else, before any weight is read.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str,
        max_new_tokens: int = LONGEST,
        device: str | None = None,
        dtype: str = "auto",
        projector: str | None = None,
        **switches: Any,
    ) -> None:
        super().__init__()
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r} is not possible; give a whole number from 1 on")
        found = torch.accelerator.current_accelerator() if device is None else torch.device(device)
        self.open(pretrained, found or torch.device("cpu"), dtype, projector, switches, "max_new_tokens and device")
        self._settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}

    def use_custom_prompt(self, dataset: str) -> bool:
        """Return whether a dataset is multiple choice, which LLaVA-1.5 was taught in a form of its own."""
        from vlmeval.dataset import DATASET_TYPE

        return DATASET_TYPE(dataset) == "MCQ"

    def build_prompt(self, line: Any, dataset: str | None = None) -> list[dict[str, str]]:
        """Return the message of a row of a multiple-choice dataset: images, hint, question, options, the suffix."""
        options = {letter: line[letter] for letter in OPTIONS if letter in line and not is_empty(line[letter])}
        hint = f"{line['hint']}\n" if "hint" in line and not is_empty(line["hint"]) else ""
        paths = self.dump_image(line, dataset)
        text = f"{hint}{line['question']}{option_lines(options)}{LETTER}"
        return [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": text}]

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Return the greedy answer to one message."""
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """Return the greedy answer to the last question of a conversation."""
        messages = [{"role": one["role"], "content": list(map(_part, one["content"]))} for one in message]
        prompt, images = chat_prompt(self.processor, messages)
        key = crc32("\n".join([prompt, *map(str, images)]).encode())  # random methods draw by it: no index is given
        (said,) = self.answer([prompt], [images], self._settings, [key])
        return said.text


def _part(part: Mapping[str, str]) -> dict[str, str]:
    key = {"text": "text", "image": "url"}.get(part["type"], "value")
    return {"type": part["type"], key: part["value"]}


def model_class() -> type:
    """Return the model's class on VLMEvalKit's base. ValueError where VLMEvalKit is not installed."""
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise ValueError(
            f"VLMEvalKit cannot be imported ({error}); run `git clone https://github.com/open-compass/VLMEvalKit` and "
            "`pip install -e VLMEvalKit`"
        ) from None
    return type(CLASS, (Answering, BaseModel), {"__doc__": Answering.__doc__})


def register(name: str | None = None, **settings: Any) -> type:
    """Make the class known to VLMEvalKit's configurations, and with a name the model to its --model; return the class.

    ValueError for a name that VLMEvalKit's table has already.
    """
    made = model_class()
    import vlmeval.config
    import vlmeval.vlm

    if name is not None:
        if name in vlmeval.config.supported_VLM:
            raise ValueError(f"VLMEvalKit has a model {name!r} already; choose another name")
        vlmeval.config.supported_VLM[name] = partial(made, **settings)
    setattr(vlmeval.vlm, CLASS, made)
    return made


@entry_point("eval")
def main(arguments: Sequence[str] | None = None) -> int:
    """Register the class and run VLMEvalKit's run.py with the arguments behind it; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.add_argument("script", metavar="RUN.PY", type=Path, help="VLMEvalKit's run.py; its own arguments follow")
    script = parser.parse_args(given[:1]).script
    try:
        if not script.is_file():
            raise FileNotFoundError(f"there is no file {script}; give VLMEvalKit's run.py, then its arguments")
        register()
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)
    kept = sys.argv
    sys.argv = [str(script), *given[1:]]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = kept
    return 0


if __name__ == "__main__":
    sys.exit(main())
