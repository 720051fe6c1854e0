"""CV-Bench, its 2D half: counting and relations of objects in ADE20K and COCO images, multiple choice.

The tables' number is the mean of the accuracies on the two sources, not that over all questions, which is given too. A
question without an answer is wrong and counted, an answer to no question is counted and left out.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.choices import first_character
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import NAME, PATH, TEXT, brief, fields_of, optional, read_json_lines
from dynamic_llava.eval.tasks.base import LETTER, PAPER_TABLE1, SHORT_TOKENS, DataFile, Score, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import ImageFile, Question, meet

ROWS, IMAGES = "cvbench/test_2d.jsonl", "cvbench"
SITE = "https://huggingface.co/datasets/nyu-visionx/CV-Bench"
SOURCES = ("ADE20K", "COCO")
KIND = "2D"
COLUMNS = {"idx": NAME, "task": TEXT, "answer": TEXT, "prompt": TEXT, "source": TEXT}
ROW = COLUMNS | {"type": optional(TEXT), "filename": PATH}
"""Fields of a line of the file: the columns of the dataset, and where the image lies."""

_OPTION = re.compile(r"\(([A-Za-z])\)")


class CvBench2d(Task):
    """CVBench-2D. Its number in tables is the mean of the accuracies on ADE20K and COCO."""

    name = "cvbench"
    title = "CVBench-2D"
    groups = (PAPER_TABLE1,)
    max_new_tokens = SHORT_TOKENS
    files = (
        DataFile(ROWS, "questions and labels", f"{SITE} (the rows of configuration 2D as JSON lines)"),
        DataFile(IMAGES, "images", f"{SITE} (each row's filename, below this folder)"),
    )
    hub = HubData("nyu-visionx/CV-Bench", "test", KIND)
    table_metric = "mean_of_sources"
    paper = paper_numbers("mean_of_sources", dense=(58.5, 62.3), both=(58.3, 60.7))
    paper_note = "Table 1"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order: the row's own prompt and the suffix for letters."""
        if hub is not None:
            table = read_hub(hub, COLUMNS)
            return [
                Question(row["idx"], row["prompt"] + LETTER, table.image(place)) for place, row in enumerate(table.rows)
            ]
        folder = Path(root) / IMAGES
        return [
            Question(row["idx"], row["prompt"] + LETTER, ImageFile(folder, row["filename"]))
            for row in self._rows(root, None)
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the accuracy in percent: the mean of the sources, over all, by source, and by source and task."""
        records = {str(row["idx"]): row for row in self._rows(root, hub)}
        said, counts, warnings = meet(self.name, answers, records, part)
        unread = [
            (name, said[name].text)
            for name, row in records.items()
            if name in said and first_character(said[name].text) not in letters_of(row)
        ]
        right: dict[str, list[bool]] = {}
        flags: dict[str, bool] = {}
        for name, row in records.items():
            if part and name not in said:
                continue
            correct = name in said and first_character(said[name].text) == first_character(row["answer"])
            flags[name] = correct
            for group in ("accuracy", f"accuracy/{row['source']}", f"accuracy/{row['source']}/{row['task']}"):
                right.setdefault(group, []).append(correct)
        accuracy = {group: 100 * fmean(values) for group, values in sorted(right.items())}
        found = [accuracy[f"accuracy/{source}"] for source in SOURCES if f"accuracy/{source}" in accuracy]
        if len(found) < len(SOURCES):
            absent = [source for source in SOURCES if f"accuracy/{source}" not in accuracy]
            warnings.append(f"no questions of {', '.join(absent)}: the mean is over the other source")
        values = {"mean_of_sources": fmean(found)} | accuracy
        metrics = {group: (value, "percent") for group, value in values.items()}
        by_source = tally_of_means(flags, scale=100, groups=[records[name]["source"] for name in flags])
        return self.result(metrics, counts, unread, warnings, tallies={"mean_of_sources": by_source})

    def _rows(self, root: Path, hub: HubData | None) -> list[Mapping[str, Any]]:
        """Return the rows in file order, checked; those of the 3D half are passed over."""
        if hub is not None:
            lines, place, fields = enumerate(read_hub(hub, COLUMNS, image=None).rows), hub.dataset, COLUMNS
        else:
            path = self.path(root, ROWS)
            lines, place, fields = read_json_lines(path), str(path), ROW
        found: dict[str, Mapping[str, Any]] = {}
        for number, row in lines:
            fields_of(row, fields, f"{place}:{number}")
            if row.get("type", KIND) != KIND:
                continue
            if row["source"] not in SOURCES or not first_character(row["answer"]):
                raise ValueError(
                    f"{place}:{number}: source is {brief(row['source'])}, answer {brief(row['answer'])}; a source is "
                    f"one of {', '.join(SOURCES)}, an answer a letter in brackets"
                )
            if str(row["idx"]) in found:
                raise ValueError(f"{place}:{number}: question {brief(row['idx'])} occurs twice")
            found[str(row["idx"])] = row
        if not found:
            raise ValueError(f"{place} holds no questions of the {KIND} half")
        return list(found.values())


def letters_of(row: Mapping[str, Any]) -> set[str]:
    """Return the small letters of a row's options, "(A) 0" a line; its label's own where the prompt shows none."""
    return {letter.lower() for letter in _OPTION.findall(row["prompt"])} | {first_character(row["answer"])}
