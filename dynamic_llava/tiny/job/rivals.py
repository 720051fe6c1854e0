"""Rivals of the learned selection on the tiny world's test set, each with as many image tokens as it keeps.

The comparison is that of `python -m dynamic_llava.eval compare`: the rivals on the dense control of a seed, the learned
selection on its Dynamic I|T. The seed's folder gets compare/: the test set as benchmarks, every answer, and
compare.json, .md, .csv, .png and .svg.
"""

from collections.abc import Sequence
from pathlib import Path

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.compare.run import RESULT, CompareOptions, compare
from dynamic_llava.eval.compare.seeds import join_seeds
from dynamic_llava.eval.compare.spelling import read_methods
from dynamic_llava.eval.compare.table import main_table
from dynamic_llava.eval.options import RunOptions
from dynamic_llava.eval.reading import read_json
from dynamic_llava.eval.writing import write_json
from dynamic_llava.files import EXIT_WRITE_FAILED, WriteError
from dynamic_llava.provenance import source_digest
from dynamic_llava.sparsity import budget
from dynamic_llava.tiny.job.benchmarks import write_benchmarks
from dynamic_llava.tiny.job.config import TinyJobConfig

LEARNED = "dynamic:sparsity=image"
"""What the rivals are compared with; they do not touch output tokens, and neither does it here."""
SHORT = ("pope", "gqa")
"""Benchmarks of short questions, which rivals are compared on."""
ROUNDS = 3
"""Rounds that times are medians of."""


def check_rivals(rivals: str, settings: SparsityConfig) -> None:
    """Raise ValueError for rivals that no model of the job could run, before anything is trained."""
    for one in read_methods(rivals) if rivals else ():
        if not one.read(settings).training_free:
            raise ValueError(
                f"tiny.rivals: {one.label} learns something, and the main job trains Dynamic-LLaVA and a dense "
                "control alone; name methods that learn nothing; python -m dynamic_llava.eval compare runs this one"
            )


def compare_rivals(
    seed: Path,
    world: Path,
    models: Sequence[Path],
    settings: SparsityConfig,
    tiny: TinyJobConfig,
    patches: int,
    fingerprint: str,
) -> Path:
    """Compare the rivals, on the first of a seed's models, with the selection that the second has learned.

    The first is dense. Returns the comparison's folder. What an earlier call has found stays, if it was of the same
    settings, trainings (`fingerprint`) and source code. WriteError where a file cannot be written; a method that fails
    has a row that says why. `patches`: image tokens of one image.
    """
    folder = seed / "compare"
    asked = {
        "models": list(map(str, models)), "methods": f"dense,{LEARNED},{tiny.rivals}",
        "equal": f"image-tokens={budget(settings.image_keep_rate, patches)}", "limit": tiny.rival_questions,
        "fingerprint": fingerprint, "source": source_digest(),
    }  # fmt: skip
    if (folder / "asked.json").is_file() and read_json(folder / "asked.json") == asked:
        return folder
    written = write_benchmarks(world, folder / "data", tiny.questions, tiny.descriptions)
    tasks = ",".join(task for task in SHORT if task in written)
    run = RunOptions(
        model=asked["models"][0], tasks=tasks, data_root=folder / "data", output_folder=folder, limit=asked["limit"],
        batch_size=tiny.batch_size,
    )  # fmt: skip
    named = tuple(asked["models"])
    options = CompareOptions(run, named, asked["methods"], asked["equal"], ROUNDS, learned_only=frozenset(named[1:]))
    code = compare(options, table=False)
    if code == EXIT_WRITE_FAILED:
        raise WriteError(f"the comparison in {folder} could not be written; free the disk, and start the job again")
    if code == 0:
        write_json(folder / "asked.json", asked)
    return folder


def compared_in(folder: Path, seeds: Sequence[int]) -> Path | None:
    """Return the folder of a job's comparison: its one seed's, or that of all seeds joined; None where one lacks it."""
    own = [folder / f"seed{seed}" / "compare" for seed in seeds]
    if not all((one / RESULT).is_file() for one in own):
        return None
    return own[0] if len(own) == 1 else join_seeds(own, folder / "compare").parent


def rivals_section(compared: Path | None) -> str:
    """Return the section of the report; "" without a comparison."""
    if compared is None:
        return ""
    found = read_json(compared / RESULT)
    intro = (
        f"The first {found['settings']['limit']} questions of each kind through methods that learn nothing, on the "
        f"dense control, and through the learned selection, on its own model, every one with {found['equal']} of an "
        "image in the last layer. compare/compare.md explains the columns, and docs/comparing.md how to add a method."
    )
    return f"## Rivals at equal image tokens\n\n{intro}\n\n{main_table(found)}"
