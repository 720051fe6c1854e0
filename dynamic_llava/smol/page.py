"""The results page of the smol world, from a job's folder: what was run, the table, and an analysis that is kept."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynamic_llava.files import replace_file, writing
from dynamic_llava.smol.job import PICTURE, RESULT, read_result
from dynamic_llava.smol.table import table

ANALYSIS = "<!-- analysis: written by hand, kept when the page is generated again -->"
"""Line of the page below which nothing is generated."""


def write_page(folder: Path, page: Path) -> Path:
    """Write the page of a job's folder, its numbers as JSON and its picture beside it; return the page.

    What stands below the analysis line of an earlier page stays.
    """
    result = read_result(folder)
    earlier = page.read_text(encoding="utf-8").partition(ANALYSIS)[2] if page.is_file() else ""
    picture = page.with_suffix(".png")
    with writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / RESULT, page.with_suffix(".json"))
        shutil.copyfile(folder / PICTURE, picture)
    text = "\n\n".join(
        [
            _head(result, page.with_suffix(".json").name),
            f"![what a budget costs]({picture.name})",
            table(result),
            ANALYSIS,
        ]
    )
    replace_file(page, text + (earlier or "\n"))
    return page


def _head(result: Mapping[str, Any], numbers: str) -> str:
    settings, made = result["settings"], result["environment"]
    spent = sum(result["training_seconds"]), sum(row["seconds"] for row in result["rows"])
    minutes = " and ".join(f"{seconds / 60:.0f} minutes" for seconds in spent)
    return (
        "# The smol world: output tokens of a real language model\n\n"
        f"Made by `bash scripts/train.sh configs/smol.yaml` and `python -m dynamic_llava.smol page`; numbers: "
        f"[{numbers}]({numbers}). Language model: {settings['base']}, "
        f"{result['model']['layers']} layers, the first {result['model']['sparse_layer']} of which see every token. "
        f"Commit {made['commit']}, torch {made['torch']}, transformers {made['transformers']}, "
        f"{made['machine']}; {minutes} for {len(result['training_seconds'])} trainings and for the rows."
    )
