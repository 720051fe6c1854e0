"""MMStar: 1,500 multiple-choice questions that cannot be answered without the image, in six categories of 250.

Letters are read by the owner's rule (`read_mmstar`; MMStar-Benchmark/MMStar, eval/vlmeval/evaluate/mmstar.py, 79e6d1c),
and the number is the accuracy over all questions, as there; lmms-eval prints the mean over finer categories. A question
without an answer is wrong and counted, an answer to no question is counted and left out.

The table that the owner's evaluation downloads holds the images. Options stand in the question, or in columns A to D
where the table has these; then they are listed as in the owner's prompt for LLaVA (eval/vlmeval/vlm/llava_next.py),
which is LLaVA-1.5's, the suffix included.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.choices import MMSTAR_LETTERS, read_mmstar
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import NAME, TEXT, brief, shown
from dynamic_llava.eval.tasks.base import LETTER, SHORT_TOKENS, DataFile, Score, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.mmbench import image_of, options_of, read_table
from dynamic_llava.eval.tasks.questions import Question, meet, option_lines

TABLE = "mmstar/MMStar.tsv"
URL = "https://huggingface.co/datasets/Lin-Chen/MMStar/resolve/main/MMStar.tsv"
COLUMNS = {"index": NAME, "question": TEXT, "answer": TEXT, "category": TEXT, "l2_category": TEXT}


class MmStar(Task):
    """MMStar. Its number in tables is the accuracy over all questions."""

    name = "mmstar"
    title = "MMStar"
    max_new_tokens = SHORT_TOKENS
    files = (DataFile(TABLE, "questions, images and labels", URL),)
    hub = HubData("Lin-Chen/MMStar", "val", "val")
    table_metric = "accuracy"
    paper = paper_numbers("accuracy")
    paper_note = "not in the paper"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order, each with the suffix for letters."""
        if hub is not None:
            table = read_hub(hub, COLUMNS)
            return [Question(row["index"], _text(row), table.image(place)) for place, row in enumerate(table.rows)]
        path = self.path(root, TABLE)
        rows = read_table(path, (*COLUMNS, "image"))
        by_index = {row["index"]: row for row in rows}
        return [Question(row["index"], _text(row), image_of(row, by_index, path)) for row in rows]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the accuracy in percent: over all, by category, and by category and finer category."""
        records = self._records(root, hub)
        said, counts, warnings = meet(self.name, answers, records, part)
        right: dict[str, bool] = {}
        groups: dict[str, list[bool]] = {}
        unread: list[tuple[str, str]] = []
        for name, row in records.items():
            if name not in said and part:
                continue
            letter = read_mmstar(said[name].text) if name in said else None
            if name in said and letter is None:
                unread.append((name, said[name].text))
            right[name] = letter == row["answer"]
            category = f"accuracy/{row['category']}"
            for group in (category, f"{category}/{row['l2_category']}"):
                groups.setdefault(group, []).append(right[name])
        found = {"accuracy": list(right.values())} | {group: groups[group] for group in sorted(groups)}
        metrics = {name: (100 * fmean(own), "percent") for name, own in found.items()}
        return self.result(metrics, counts, unread, warnings, tallies={"accuracy": tally_of_means(right, scale=100)})

    def _records(self, root: Path, hub: HubData | None) -> dict[str, Mapping[str, Any]]:
        """Return index -> row in file order. ValueError where a label is no letter or an index occurs twice."""
        place = hub.dataset if hub is not None else str(Path(root) / TABLE)
        rows: Sequence[Mapping[str, Any]]
        if hub is not None:
            rows = read_hub(hub, COLUMNS, image=None).rows
        else:
            rows = read_table(self.path(root, TABLE), (*COLUMNS, "image"))
        if bad := [row["index"] for row in rows if row["answer"] not in MMSTAR_LETTERS]:
            raise ValueError(f"{place}: the answers of rows {shown(bad)} are none of {', '.join(MMSTAR_LETTERS)}")
        found: dict[str, Mapping[str, Any]] = {}
        for row in rows:
            if str(row["index"]) in found:
                raise ValueError(f"{place}: index {brief(row['index'])} occurs twice")
            found[str(row["index"])] = row
        return found


def _text(row: Mapping[str, Any]) -> str:
    return row["question"] + option_lines(options_of(row)) + LETTER
