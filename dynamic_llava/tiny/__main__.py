"""`python -m dynamic_llava.tiny job | page | budgets | measure | benchmarks`: the tiny world's main job, its results.

job      CONFIG.yaml [overrides]: generate the data, train, evaluate every row of the table, draw, report
page     the results page docs/results/tiny.md of a job's folder, pictures included
budgets  accuracy of learned selection, attention and chance at several image keep rates, from a job's folder
measure  accuracy, perplexity and costs of one checkpoint on the tiny world's test set
benchmarks
         the test set as POPE, GQA and LVIS-VQA have theirs, for `python -m dynamic_llava.eval`

`bash scripts/train.sh` without a file runs the job of configs/tiny.yaml. How the shipped base was trained:
`python -m dynamic_llava.tiny.train_base --help`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli import load_config, read_yaml
from dynamic_llava.cli.commands import Parser, add_method, add_projector, entry_point, exit_on_mistake
from dynamic_llava.config import SPARSITY_MODES
from dynamic_llava.tiny.job.config import JobConfig

MODULE = "dynamic_llava.tiny"
PROGRAM = f"python -m {MODULE}"
ABOUT_JOB = "The tiny world's main job: generate its data, train, evaluate every row of the table, draw, report."
RATES = (0.05, 0.1, 0.2, 0.35, 0.5)
"""Image keep rates that `budgets` compares."""


@entry_point("train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 2 for a user's mistake, for the job also those of a training."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["job"]:
        return _job(words[1:])
    given = _parser().parse_args(words)
    try:
        given.execute(given)
    except (ValueError, OSError) as error:
        return exit_on_mistake(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("job", help="CONFIG.yaml [overrides]: run the main job")
    page = commands.add_parser("page", help="write docs/results/tiny.md from a finished job")
    page.add_argument("run", type=Path, help="folder of the job, e.g. runs/tiny")
    page.add_argument("--page", type=Path, default=Path("docs/results/tiny.md"), help="where the page goes")
    page.add_argument("--made-by", default="bash scripts/train.sh", help="the command that made the run, for the page")
    page.add_argument("--readme", type=Path, help="also put the main rows between the markers of this README")
    page.set_defaults(execute=_page)
    budgets = commands.add_parser("budgets", help="accuracy at several image keep rates, from a job's checkpoints")
    budgets.add_argument("run", type=Path, help="folder of the job, e.g. runs/tiny")
    budgets.add_argument("--rates", type=float, nargs="+", default=RATES, help="image keep rates, in (0, 1]")
    add_method(budgets)
    budgets.set_defaults(execute=_budgets)
    one = commands.add_parser("measure", help="one checkpoint on the test set, into a summary.json")
    one.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    one.add_argument("--world", type=Path, required=True, help="folder of a built world")
    one.add_argument("--output-folder", type=Path, required=True, help="where summary.json goes")
    one.add_argument("--sparsity", choices=SPARSITY_MODES, help="what Dynamic-LLaVA sparsifies (default: both)")
    add_method(one)
    add_projector(one)
    one.add_argument("--questions", type=int, default=700, help="short questions, spread evenly over the kinds")
    one.add_argument("--descriptions", type=int, default=64, help="descriptions")
    one.set_defaults(execute=_measure)
    layouts = commands.add_parser("benchmarks", help="the test set in the layouts of POPE, GQA and LVIS-VQA")
    layouts.add_argument("--output-folder", type=Path, required=True, help="the data root that is written")
    layouts.add_argument(
        "--world", type=Path, help="folder of a built world (default: the main job's, built if needed)"
    )
    layouts.add_argument("--questions", type=int, default=700, help="short questions, spread evenly over the kinds")
    layouts.add_argument("--descriptions", type=int, default=64, help="descriptions")
    layouts.set_defaults(execute=_benchmarks)
    return parser


def _job(words: list[str]) -> int:
    """Run the main job here, or on a machine with several GPUs in one process that sees the first of them alone."""
    from dynamic_llava.train.launch import run_alone

    def read() -> JobConfig:
        config = load_config(JobConfig, words, f"{PROGRAM} job CONFIG.yaml", ABOUT_JOB)
        if not words or words[0].startswith("-"):  # not before --help has been answered
            raise ValueError(f"give the file of the job before its overrides: {PROGRAM} job configs/tiny.yaml")
        return config

    def work(config: JobConfig) -> None:
        from dynamic_llava.tiny.job.job import main as run_job  # not before --help has been answered

        run_job(config)

    return run_alone("the tiny world's main job", MODULE, ["job", *words], read, work)


def _page(given: argparse.Namespace) -> None:
    """Write the results page, and the README's table where one is asked for."""
    from dynamic_llava.tiny.job.page import write_readme_table, write_results_page

    config = read_yaml(JobConfig, given.run / "config.yaml")
    print(write_results_page(given.run, given.page, config.sparsity, given.made_by))
    if given.readme is not None:
        print(write_readme_table(given.run, given.readme, given.made_by))


def _budgets(given: argparse.Namespace) -> None:
    """Write budgets.json, budgets.md and budgets.png into the job's folder, from all of its finished seeds."""
    from dynamic_llava.files import replace_file
    from dynamic_llava.model import DynamicLlavaConfig
    from dynamic_llava.tiny.job.measure import accuracy_by_budget, budget_table, mean_by_budget
    from dynamic_llava.tiny.job.testset import read_test_set
    from dynamic_llava.tiny.world.dataset import build_world
    from dynamic_llava.viz.curves import draw_budget_curves

    run, rates = given.run, given.rates
    config = read_yaml(JobConfig, run / "config.yaml")
    tiny = config.tiny
    world = build_world(train=tiny.train_images, test=tiny.test_images, seed=tiny.data_seed, world=tiny.world)
    test = read_test_set(world, config.tiny.questions, config.tiny.descriptions)
    folders = sorted(path.parent for path in run.glob("seed*/results.json"))
    if not folders:
        raise FileNotFoundError(f"{run} holds no finished seed; run `bash scripts/train.sh` first")
    seeds = []
    for folder in folders:
        print(f"{folder.name}: {len(test.questions)} questions per line", flush=True)
        checkpoints = {key: folder / key / "model" for key in ("control", "both")}
        seeds.append(accuracy_by_budget(checkpoints, test, rates, method=given.method))
    tokens = DynamicLlavaConfig.from_pretrained(folders[0] / "both" / "model").image_seq_length
    table = budget_table(seeds, tokens)
    replace_file(run / "budgets.json", json.dumps({"seeds": seeds}, indent=1) + "\n")
    replace_file(run / "budgets.md", table + "\n")
    picture = draw_budget_curves(run / "budgets.png", mean_by_budget(seeds), config.sparsity.image_keep_rate)
    print(f"\n{table}\n\ntable: {run / 'budgets.md'}; picture: {picture}")


def _measure(given: argparse.Namespace) -> None:
    """Measure one checkpoint on a built world's test set."""
    from dynamic_llava.eval.predict import hide_library_progress
    from dynamic_llava.tiny.job.measure import write_measures
    from dynamic_llava.tiny.job.testset import read_test_set

    hide_library_progress()
    test = read_test_set(given.world, given.questions, given.descriptions)
    print(write_measures(given.model, test, given.output_folder, sparsity=given.sparsity, method=given.method))


def _benchmarks(given: argparse.Namespace) -> None:
    """Write the test set of a built world in the layouts of benchmarks."""
    from dynamic_llava.tiny.job.benchmarks import write_benchmarks
    from dynamic_llava.tiny.world.dataset import build_world

    world = build_world() if given.world is None else given.world
    written = write_benchmarks(world, given.output_folder, given.questions, given.descriptions)
    print(f"{', '.join(written)} of {world}: --data-root {given.output_folder}")


if __name__ == "__main__":
    sys.exit(main())
