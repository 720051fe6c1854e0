"""`python -m dynamic_llava.eval --model PATH --tasks pope,gqa --output-folder OUT`: benchmarks beside the paper's.

`--tasks list` says which benchmarks there are and which of their files are missing. The same command again goes on
where an interrupted run was. `bash scripts/eval.sh` takes the same arguments and uses every GPU. Instead of all this:

compare       several methods on the same questions: quality, its difference to dense, costs, and a picture of both
compare-seeds such comparisons of checkpoints of several training seeds, joined
score         what an answer file is worth, or the file for the server that scores it
build-lvis, build-sharegpt4v
              the items of LVIS-VQA and ShareGPT4V-VQA, from the public data they were chosen from
ppl-speed     how much faster perplexity in one pass is than token by token

Commands import what they need when they run: `score` and `--tasks list` start without torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamic_llava.cli.commands import Parser, add_method, add_projector, add_rates, entry_point, exit_on_mistake
from dynamic_llava.config import SPARSITY_MODES, checkpoint_source
from dynamic_llava.eval import score
from dynamic_llava.eval.generation.build import KINDS, BuildOptions, build
from dynamic_llava.eval.tasks import GROUPS, TASKS, task_list

MOVED = {
    f"tiny-{old}": f"python -m dynamic_llava.tiny {new}"
    for old, new in (("page", "page"), ("budgets", "budgets"), ("model", "measure"))
}
"""Commands of earlier versions -> where they are now."""


@entry_point("eval")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code: 2 for a user's mistake, 74 for a file not written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] and words[0] in MOVED:
        return exit_on_mistake(f"the command {words[0]} is now: {MOVED[words[0]]}")
    given = _parser().parse_args(words)
    try:
        if given.command is not None and words[0] != given.command:
            raise ValueError(f"{words[0]} stands before the command {given.command}, which ignores it; put it behind")
        return given.execute(given) or 0
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m dynamic_llava.eval", description=__doc__)
    _add_run_arguments(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    comparing = commands.add_parser("compare", help="several methods on the same questions, in one table")
    _add_compare_arguments(comparing)
    seeds = commands.add_parser("compare-seeds", help="comparisons of several training seeds, joined into one table")
    seeds.add_argument("folders", type=Path, nargs="+", help="output folders of `compare`, one for each seed")
    seeds.add_argument("--output-folder", type=Path, required=True, help="compare.json, .md, .csv, .png, .svg go here")
    seeds.set_defaults(execute=_join_seeds)
    scoring = commands.add_parser("score", help="score an answer file, without a model")
    score.add_arguments(scoring)
    scoring.set_defaults(execute=score.run)
    _add_generation_commands(commands)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the run itself, which has no command's name."""
    names = f"{', '.join(TASKS)}; vqav2:val names a split; groups: {', '.join(GROUPS)}; or: list"
    parser.set_defaults(execute=_run)
    parser.add_argument(
        "--model",
        type=checkpoint_source,
        help="folder of a checkpoint with its processor, hub name, or tiny (the shipped dense model); required "
        "(default: None)",
    )
    parser.add_argument("--tasks", help=f"benchmarks, separated by commas, required: {names} (default: None)")
    parser.add_argument(
        "--output-folder", type=Path, help="answers, summary.json and table.md go here; required (default: None)"
    )
    _add_deciding(parser)
    _add_asking(parser)


def _add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command `compare`."""
    parser.set_defaults(execute=_compare)
    parser.add_argument(
        "--model",
        type=checkpoint_source,
        action="append",
        required=True,
        help="folder of a checkpoint with its processor, hub name, or tiny (the shipped dense model); may be given "
        "more than once, and differences are to the dense method on the first",
    )
    parser.add_argument(
        "--learned-only",
        type=checkpoint_source,
        action="append",
        default=[],
        metavar="MODEL",
        help="one more checkpoint, on which the methods run that decide by its learned weights, and no others; may be "
        "given more than once",
    )
    parser.add_argument(
        "--methods",
        required=True,
        help="what decides, a list with dense in it: dense,dynamic,fastv:layer=3,keep=0.25,my_module:Mine; settings "
        "stand behind the colon of their method, and a value with commas in brackets: pyramiddrop:layers=(2,4)",
    )
    parser.add_argument("--tasks", required=True, help="benchmarks, separated by commas, as without a command")
    parser.add_argument(
        "--output-folder",
        type=Path,
        required=True,
        help="answers, compare.json, .md, .csv, .png and .svg go here",
    )
    parser.add_argument(
        "--equal",
        metavar="BUDGET=NUMBER",
        help="give every method as much, by its own setting: image-tokens=144, those of each image that the last "
        "layer sees; or kv-bytes=60000000, what keys and values of the first prompts fill (default: None)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds that times are medians of")
    add_projector(parser)
    _add_asking(parser)


def _add_asking(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what is read, and how a model is asked."""
    parser.add_argument(
        "--data-root", type=Path, default=score.DATA_ROOT, help="folder as LLaVA's playground/data/eval"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="questions at once; changes no answer in float32")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="auto: the checkpoint's"
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="first questions of each task only, for a trial; scores are over these (default: all of them)",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="longest answer (default: each task's own, as LLaVA's scripts have it)"
    )
    parser.add_argument(
        "--source", choices=("layout", "hf"), default="layout", help="LLaVA's files, or Hugging Face datasets"
    )
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="TASK=ID_OR_PATH",
        help="read this task from another dataset, or a local folder of one; may be given more than once",
    )
    parser.add_argument(
        "--round-separator",
        choices=("official", "template"),
        help="how tasks of several rounds feed later questions: USER:...ASSISTANT: as the paper's scripts, or the "
        "conversation template behind </s> (default: official)",
    )


def _add_deciding(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say what decides."""
    parser.add_argument("--sparsity", choices=SPARSITY_MODES, help="what Dynamic-LLaVA sparsifies (default: both)")
    add_rates(parser)
    add_method(parser)
    add_projector(parser)


def _run(given: argparse.Namespace) -> int:
    """Evaluate a model, or list the benchmarks."""
    if given.tasks == "list":
        print(task_list(given.data_root))
        return 0
    for name in ("model", "tasks", "output_folder"):
        if getattr(given, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing; see --help")
    from dynamic_llava.eval.run import RunOptions, evaluate

    names = ("model", "sparsity", "method", "image_keep_rate", "output_keep_rate", "kv_budget")
    deciding = {name: getattr(given, name) for name in names}
    return evaluate(RunOptions(**deciding, **_asking(given)))


def _compare(given: argparse.Namespace) -> int:
    """Compare methods on the same questions."""
    from dynamic_llava.eval.compare.run import CompareOptions, compare
    from dynamic_llava.eval.run import RunOptions

    run = RunOptions(model=given.model[0], **_asking(given))
    models = (*given.model, *given.learned_only)
    chosen = frozenset(given.learned_only)
    return compare(CompareOptions(run, models, given.methods, given.equal, given.repeats, learned_only=chosen))


def _join_seeds(given: argparse.Namespace) -> None:
    """Join comparisons of several seeds, and print their table."""
    from dynamic_llava.eval.compare.seeds import join_seeds

    path = join_seeds(given.folders, given.output_folder)
    print(f"{path.read_text(encoding='utf-8')}\ntable: {path}")


def _asking(given: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a run that its tasks, its data and its way of asking make."""
    datasets: dict[str, str] = {}
    for text in given.dataset:
        task, _, dataset = text.partition("=")
        if not dataset or task in datasets:
            raise ValueError(f"--dataset {text} is not understood; give TASK=ID_OR_PATH, once for each task")
        datasets[task] = dataset
    names = ("tasks", "data_root", "output_folder", "batch_size", "dtype", "limit", "max_new_tokens", "source")
    return {name: getattr(given, name) for name in (*names, "round_separator")} | {"datasets": datasets}


def _add_generation_commands(commands: Any) -> None:
    """Add the commands of the benchmarks of answer quality (generation/) to argparse's sub-parsers."""
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
    from dynamic_llava.eval.generation.perplexity import measure_ppl_speed, write_speed

    found = measure_ppl_speed(seed=given.seed, repeats=given.repeats)
    print(found.describe())
    if given.json is not None:
        print(f"measurement: {write_speed(found, given.json)}")


if __name__ == "__main__":
    sys.exit(main())
