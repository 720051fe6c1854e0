"""`python -m dynamic_llava.eval --model PATH --tasks pope,gqa --output-folder OUT`: benchmarks beside the paper's.

`--tasks list` says which benchmarks there are and which of their files are missing. The same command again goes on
where an interrupted run was. `bash scripts/eval.sh` takes the same arguments and uses every GPU. Instead of all this:

score         what an answer file is worth, or the file for the server that scores it
build-lvis, build-sharegpt4v
              the items of LVIS-VQA and ShareGPT4V-VQA, from the public data they were chosen from
ppl-speed     how much faster perplexity in one pass is than token by token
tiny-page     the results page docs/results/tiny.md of a run folder, pictures included
tiny-budgets  accuracy of learned selection, attention and chance at several image keep rates, from a run folder
tiny-model    accuracy, perplexity and costs of one checkpoint on the tiny world's test set

Commands import what they need when they run: `score` and `--tasks list` start without torch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.commands import Parser, add_method, entry_point, exit_on_mistake
from dynamic_llava.config import SPARSITY_MODES
from dynamic_llava.eval import score
from dynamic_llava.eval.generation.commands import add_commands
from dynamic_llava.eval.tasks import GROUPS, TASKS
from dynamic_llava.eval.writing import write_text

RATES = (0.05, 0.1, 0.2, 0.35, 0.5)
"""Image keep rates that tiny-budgets compares."""


@entry_point("eval")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code: 2 for a user's mistake, 74 for a file not written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
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
    scoring = commands.add_parser("score", help="score an answer file, without a model")
    score.add_arguments(scoring)
    scoring.set_defaults(execute=score.run)
    add_commands(commands)
    page = commands.add_parser("tiny-page", help="write docs/results/tiny.md from a finished main job")
    page.add_argument("run", type=Path, help="folder of the job, e.g. runs/tiny")
    page.add_argument("--page", type=Path, default=Path("docs/results/tiny.md"), help="where the page goes")
    page.add_argument("--made-by", default="bash scripts/train.sh", help="the command that made the run, for the page")
    page.add_argument("--readme", type=Path, help="also put the main rows between the markers of this README")
    page.set_defaults(execute=_page)
    budgets = commands.add_parser("tiny-budgets", help="accuracy at several image keep rates, from a job's checkpoints")
    budgets.add_argument("run", type=Path, help="folder of the job, e.g. runs/tiny")
    budgets.add_argument("--rates", type=float, nargs="+", default=RATES, help="image keep rates, in (0, 1]")
    budgets.set_defaults(execute=_budgets)
    one = commands.add_parser("tiny-model", help="one checkpoint on the tiny world's test set, into a summary.json")
    one.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    one.add_argument("--world", type=Path, required=True, help="folder of a built world")
    one.add_argument("--output-folder", type=Path, required=True, help="where summary.json goes")
    _add_deciding(one)
    one.add_argument("--questions", type=int, default=700, help="short questions, spread evenly over the kinds")
    one.add_argument("--descriptions", type=int, default=64, help="descriptions")
    one.set_defaults(execute=_tiny_model)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the run itself, which has no command's name."""
    names = f"{', '.join(TASKS)}; vqav2:val names a split; groups: {', '.join(GROUPS)}; or: list"
    parser.set_defaults(execute=_run)
    parser.add_argument(
        "--model", help="folder of a checkpoint with its processor, or a hub name; required (default: None)"
    )
    parser.add_argument("--tasks", help=f"benchmarks, separated by commas, required: {names} (default: None)")
    parser.add_argument(
        "--data-root", type=Path, default=score.DATA_ROOT, help="folder as LLaVA's playground/data/eval"
    )
    parser.add_argument(
        "--output-folder", type=Path, help="answers, summary.json and table.md go here; required (default: None)"
    )
    _add_deciding(parser)
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
    add_method(parser)


def _run(given: argparse.Namespace) -> int:
    """Evaluate a model, or list the benchmarks."""
    if given.tasks == "list":
        from dynamic_llava.eval.task_list import task_list

        print(task_list(given.data_root))
        return 0
    for name in ("model", "tasks", "output_folder"):
        if getattr(given, name) is None:
            raise ValueError(f"--{name.replace('_', '-')} is missing; see --help")
    datasets: dict[str, str] = {}
    for text in given.dataset:
        task, _, dataset = text.partition("=")
        if not dataset or task in datasets:
            raise ValueError(f"--dataset {text} is not understood; give TASK=ID_OR_PATH, once for each task")
        datasets[task] = dataset
    from dynamic_llava.eval.run import RunOptions, evaluate

    names = ("model", "tasks", "data_root", "output_folder", "sparsity", "method", "batch_size")
    names += ("dtype", "limit", "max_new_tokens", "source", "round_separator")
    return evaluate(RunOptions(**{name: getattr(given, name) for name in names}, datasets=datasets))


def _page(given: argparse.Namespace) -> None:
    """Write the results page, and the README's table where one is asked for."""
    from dynamic_llava.cli import read_yaml
    from dynamic_llava.tiny.job.page import write_readme_table, write_results_page
    from dynamic_llava.train.config import RunConfig

    config = read_yaml(RunConfig, given.run / "config.yaml")
    print(write_results_page(given.run, given.page, config.sparsity, given.made_by))
    if given.readme is not None:
        print(write_readme_table(given.run, given.readme, given.made_by))


def _budgets(given: argparse.Namespace) -> None:
    """Write budgets.json, budgets.md and budgets.png into the job's folder, from all of its finished seeds."""
    from dynamic_llava.cli import read_yaml
    from dynamic_llava.model import DynamicLlavaConfig
    from dynamic_llava.tiny.job.budgets import accuracy_by_budget, budget_table, mean_by_budget
    from dynamic_llava.tiny.job.testset import read_test_set
    from dynamic_llava.tiny.world.dataset import build_world
    from dynamic_llava.train.config import RunConfig
    from dynamic_llava.viz.curves import draw_budget_curves

    run, rates = given.run, given.rates
    config = read_yaml(RunConfig, run / "config.yaml")
    if config.tiny is None:
        raise ValueError(f"{run / 'config.yaml'} has no `tiny` section; give the folder of a tiny-world job")
    world = build_world(train=config.tiny.train_images, test=config.tiny.test_images, seed=config.tiny.data_seed)
    test = read_test_set(world, config.tiny.questions, config.tiny.descriptions)
    folders = sorted(path.parent for path in run.glob("seed*/results.json"))
    if not folders:
        raise FileNotFoundError(f"{run} holds no finished seed; run `bash scripts/train.sh` first")
    seeds = []
    for folder in folders:
        print(f"{folder.name}: {len(test.questions)} questions per line", flush=True)
        seeds.append(accuracy_by_budget({key: folder / key / "model" for key in ("control", "both")}, test, rates))
    tokens = DynamicLlavaConfig.from_pretrained(folders[0] / "both" / "model").image_seq_length
    table = budget_table(seeds, tokens)
    write_text(run / "budgets.json", json.dumps({"seeds": seeds}, indent=1) + "\n")
    write_text(run / "budgets.md", table + "\n")
    picture = draw_budget_curves(run / "budgets.png", mean_by_budget(seeds), config.sparsity.image_keep_rate)
    print(f"\n{table}\n\ntable: {run / 'budgets.md'}; picture: {picture}")


def _tiny_model(given: argparse.Namespace) -> None:
    """Measure one checkpoint on a built world's test set."""
    from dynamic_llava.eval.predict import hide_library_progress
    from dynamic_llava.tiny.job.measure import write_measures
    from dynamic_llava.tiny.job.testset import read_test_set

    hide_library_progress()
    test = read_test_set(given.world, given.questions, given.descriptions)
    print(write_measures(given.model, test, given.output_folder, sparsity=given.sparsity, method=given.method))


if __name__ == "__main__":
    sys.exit(main())
