"""`python -m dynamic_llava.data check | first-batch`: data looked at without training on it."""

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dynamic_llava.cli import load_config
from dynamic_llava.cli.commands import Parser, as_typed, entry_point, exit_on_mistake
from dynamic_llava.config.run import RunConfig
from dynamic_llava.files import brief

if TYPE_CHECKING:
    from dynamic_llava.processing import DynamicLlavaProcessor

PROGRAM = "python -m dynamic_llava.data"


@dataclass(frozen=True)
class CheckConfig(RunConfig):
    """The file of a training run, and how its data are checked."""

    images: Literal["decode", "stat"] = "decode"
    """Decode every image as training will (exact), or only read its file's header as preparation does (fast)."""
    examples: int = 3
    """Findings of each kind that are shown; all are counted."""
    strict: bool = False
    """Fail for what training would lose as well: samples it would leave out, blank answers, text behind max_length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images not in ("decode", "stat"):
            raise ValueError(f"images={self.images!r} is not known; choose 'decode' or 'stat'")
        if self.examples < 0:
            raise ValueError(f"examples={self.examples} must be 0 or more")


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 1 for data that training would fail on, 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    rest = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], int]] = {"check": _check, "first-batch": _first_batch}
    if not rest or rest[0] not in commands:
        asked = rest[:1] in (["-h"], ["--help"])
        print(_help(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return commands[rest[0]](rest[1:])
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)


def _help() -> str:
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND")
    commands.add_parser(
        "check", help="CONFIG.yaml [overrides]: what is wrong in the data of a run; exit code 1 if training would fail"
    )
    commands.add_parser(
        "first-batch", help="CONFIG.yaml [overrides]: open the data as training does; seconds and peak memory as JSON"
    )
    return as_typed(f"{parser.format_help()}\n{PROGRAM} COMMAND --help shows every setting.")


def _check(arguments: list[str]) -> int:
    about = "Check the data of a training run: every sample, every image."
    config = load_config(CheckConfig, arguments, "python -m dynamic_llava.data check CONFIG.yaml", about)
    from dynamic_llava.data.check import check

    report = check(config.data, _processor(config), config.sparsity, images=config.images, examples=config.examples)
    print(report)
    return int(report.errors > 0 or (config.strict and report.warnings > 0))


def _first_batch(arguments: list[str]) -> int:
    began = time.perf_counter()
    about = "Open the data of a training run, preparing them if need be, and fetch the first batch."
    config = load_config(RunConfig, arguments, "python -m dynamic_llava.data first-batch CONFIG.yaml", about)
    from torch.utils.data import DataLoader

    from dynamic_llava.data import Collator, EpochSampler, SftDataset

    dataset = SftDataset(config.data, _processor(config))
    lengths = dataset.lengths if config.train.group_by_length else None
    step = config.train.batch_size * config.train.gradient_accumulation
    loader = DataLoader(
        dataset,
        config.train.batch_size,
        sampler=EpochSampler(len(dataset), step, config.train.seed, lambda: 0, lengths),
        num_workers=config.data.workers,
        collate_fn=Collator(dataset.processor, config.sparsity.output_segments, config.data.text_only == "sparse"),
    )
    batch = next(iter(loader))
    for unread in batch.get("unread", ()):
        raise ValueError(f"{config.data.json}, index {unread.index}, id {brief(unread.id)}: {unread.why}")
    answer = {
        "samples": len(dataset),
        "seconds": time.perf_counter() - began,
        "peak_resident_bytes": peak_resident_bytes(),
        "batch": {name: list(tensor.shape) for name, tensor in batch.items()},
    }
    print(json.dumps(answer), flush=True)
    return 0


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far, memory-mapped pages that it has read included.

    Where Linux tells it, without what its parent held before the process began, which getrusage would count.
    """
    import resource  # not everywhere

    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor(config: RunConfig) -> "DynamicLlavaProcessor":
    from dynamic_llava.data.prepare import base_processor

    for name, value in (("model.base", config.model.base), ("data.json", config.data.json)):
        if not value:
            raise ValueError(f"{name} is not set; give it in the configuration file or as --{name}")
    return base_processor(config.model, config.sparsity)


if __name__ == "__main__":
    sys.exit(main())
