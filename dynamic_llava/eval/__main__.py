"""`python -m dynamic_llava.eval COMMAND RUN_FOLDER`: more about a finished main job of the tiny world.

tiny-page     the results page docs/results/tiny.md, pictures included
tiny-budgets  accuracy of learned selection, attention and chance at several image keep rates
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.cli import exit_on_mistake, read_yaml
from dynamic_llava.eval.budgets import accuracy_by_budget, budget_table, mean_by_budget
from dynamic_llava.eval.page import write_readme_table, write_results_page
from dynamic_llava.eval.tiny_data import read_test_set
from dynamic_llava.model import DynamicLlavaConfig
from dynamic_llava.tiny.dataset import build_world
from dynamic_llava.train.config import RunConfig

RATES = (0.05, 0.1, 0.2, 0.35, 0.5)
"""Image keep rates that tiny-budgets compares."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit code, 2 for a user's mistake."""
    given = _parser().parse_args(arguments)
    try:
        config = read_yaml(RunConfig, given.run / "config.yaml")
        if given.command == "tiny-page":
            print(write_results_page(given.run, given.page, config.sparsity, given.made_by))
            if given.readme is not None:
                print(write_readme_table(given.run, given.readme, given.made_by))
        else:
            _budgets(config, given.run, given.rates)
    except (ValueError, FileNotFoundError) as error:
        return exit_on_mistake(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dynamic_llava.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    page = commands.add_parser("tiny-page", help="write docs/results/tiny.md from a finished main job")
    page.add_argument("run", type=Path, help="folder of the job, e.g. runs/tiny")
    page.add_argument("--page", type=Path, default=Path("docs/results/tiny.md"), help="where the page goes")
    page.add_argument("--made-by", default="bash scripts/train.sh", help="the command that made the run, for the page")
    page.add_argument("--readme", type=Path, help="also put the main rows between the markers of this README")
    budgets = commands.add_parser("tiny-budgets", help="accuracy at several image keep rates, from a job's checkpoints")
    budgets.add_argument("run", type=Path, help="folder of the job, e.g. runs/tiny")
    budgets.add_argument("--rates", type=float, nargs="+", default=RATES, help="image keep rates, in (0, 1]")
    return parser


def _budgets(config: RunConfig, run: Path, rates: Sequence[float]) -> None:
    """Write budgets.json, budgets.md and budgets.png into the job's folder, from all of its finished seeds."""
    from dynamic_llava.viz.curves import draw_budget_curves

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
    (run / "budgets.json").write_text(json.dumps({"seeds": seeds}, indent=1) + "\n", encoding="utf-8")
    (run / "budgets.md").write_text(table + "\n", encoding="utf-8")
    picture = draw_budget_curves(run / "budgets.png", mean_by_budget(seeds), config.sparsity.image_keep_rate)
    print(f"\n{table}\n\ntable: {run / 'budgets.md'}; picture: {picture}")


if __name__ == "__main__":
    sys.exit(main())
