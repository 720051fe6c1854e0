"""The commands `build-lvis`, `build-sharegpt4v` and `ppl-speed` of `python -m dynamic_llava.eval`; no torch here."""

import argparse
from pathlib import Path
from typing import Any

from dynamic_llava.eval.generation.build import KINDS, BuildOptions, build


def add_commands(commands: Any) -> None:
    """Add the commands to argparse's sub-parsers."""
    lvis = commands.add_parser("build-lvis", help="choose the items of LVIS-VQA from lvis_instruct4v_220k.json")
    lvis.add_argument("--kind", choices=("single", "multi"), required=True, help="one round, or more than seven")
    _add_build_arguments(lvis)
    share = commands.add_parser("build-sharegpt4v", help="choose the items of ShareGPT4V-VQA from its 100K captions")
    share.set_defaults(kind="sharegpt4v")
    _add_build_arguments(share)
    speed = commands.add_parser("ppl-speed", help="time perplexity in one pass against the token-by-token loop")
    speed.add_argument("--json", type=Path, help="write the measurement here")
    speed.add_argument("--seed", type=int, default=0, help="of weights, image and tokens")
    speed.add_argument("--repeats", type=int, default=5, help="medians over so many runs of each")
    speed.set_defaults(execute=_speed)


def _add_build_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = "; ".join(f"{name}: {kind.describe()}" for name, kind in KINDS.items())
    parser.add_argument("--source", type=Path, required=True, help="JSON list of samples in LLaVA's format")
    parser.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        help="training file whose images may not occur, by base name (llava_v1_5_mix665k.json); may be repeated",
    )
    parser.add_argument("--output", type=Path, required=True, help="the item list goes here")
    parser.add_argument("--n", type=int, help=f"items to draw; by default what the paper has ({defaults})")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing; the paper's is not published")
    least = parser.add_mutually_exclusive_group()
    least.add_argument("--min-words", type=int, help="shortest answer (all rounds together), in words")
    least.add_argument("--min-tokens", type=int, help="shortest answer in tokens; needs --tokenizer")
    parser.add_argument("--min-rounds", type=int, help="least number of rounds, for --kind multi")
    parser.add_argument("--tokenizer", help="checkpoint whose tokens are counted and printed beside Table 8")
    parser.set_defaults(execute=_build)


def _build(given: argparse.Namespace) -> None:
    """Write an item list and print what it was chosen from and how long its texts are."""
    names = ("kind", "source", "output", "n", "seed", "min_words", "min_tokens", "min_rounds", "tokenizer")
    options = BuildOptions(exclude=tuple(given.exclude), **{name: getattr(given, name) for name in names})
    print(build(options))


def _speed(given: argparse.Namespace) -> None:
    """Measure, print, and write the measurement where one is asked for."""
    from dynamic_llava.eval.generation.speed import measure_ppl_speed, write_speed

    found = measure_ppl_speed(seed=given.seed, repeats=given.repeats)
    print(found.describe())
    if given.json is not None:
        print(f"measurement: {write_speed(found, given.json)}")
