"""MMVP: pairs of images that look alike to CLIP, the same question about each; a pair is right when both answers are.

Published numbers use the answers of the original Questions.csv. The Hugging Face dataset corrects four of them
(rows 99, 100, 279, 280); its rows are scored with the original ones too. A question without an answer is wrong and
counted, an answer to no question is counted and left out.

The paper does not say how it asks. We ask as LLaVA-1.5 was taught to (lmms-eval's form), greedily: question, one line
an option, and the suffix for letters.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.metrics.choices import read_option
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import TEXT, brief, read_table, shown
from dynamic_llava.eval.tasks.base import LETTER, PAPER_TABLE1, SHORT_TOKENS, DataFile, Score, Task, paper_numbers
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import ImageFile, Question, meet, option_lines

TABLE, IMAGES = "mmvp/Questions.csv", "mmvp/MMVP Images"
MMVP_SITE = "https://huggingface.co/datasets/MMVP/MMVP"
COLUMNS = dict.fromkeys(("Question", "Options", "Correct Answer"), TEXT)
ORIGINAL = {"99": "(a)", "100": "(b)", "279": "(a)", "280": "(b)"}
"""Question -> its answer in the original table, where the dataset of rows has another."""

_OPTION = re.compile(r"\(([a-z])\)\s*(.*?)\s*(?=\([a-z]\)|$)", re.DOTALL)


class Mmvp(Task):
    """MMVP. Its number in tables is the accuracy over pairs."""

    name = "mmvp"
    title = "MMVP"
    groups = (PAPER_TABLE1,)
    max_new_tokens = SHORT_TOKENS
    files = (DataFile(TABLE, "questions and labels", MMVP_SITE), DataFile(IMAGES, "images", MMVP_SITE))
    hub = HubData("lmms-lab-eval/MMVP", "train")
    table_metric = "pair_accuracy"
    paper = paper_numbers("pair_accuracy", dense=(29.3, 30.7), both=(26.3, 31.3))
    paper_note = (
        "Table 1, which does not say how it asks; ours: question, a line an option (A. ...), LLaVA's suffix for letters"
    )

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order; their ids are their numbers from 1, as are the images' names."""
        if hub is not None:
            table = read_hub(hub, COLUMNS)
            return [
                Question(place + 1, _text(row, f"{hub.dataset}, row {place}"), table.image(place))
                for place, row in enumerate(table.rows)
            ]
        path = self.path(root, TABLE)
        return [
            Question(number, _text(row, f"{path}, row {number}"), ImageFile(Path(root) / IMAGES, f"{number}.jpg"))
            for number, row in enumerate(_read(path), 1)
        ]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return the accuracy in percent over pairs (rows 2k - 1 and 2k) and over single questions."""
        rows = _read(self.path(root, TABLE)) if hub is None else read_hub(hub, COLUMNS, image=None).rows
        place = str(Path(root) / TABLE) if hub is None else hub.dataset
        if len(rows) % 2:
            raise ValueError(f"{place} has {len(rows)} rows; they are pairs, so an even number is due")
        records = {str(number): row for number, row in enumerate(rows, 1)}
        said, counts, warnings = meet(self.name, answers, records, part)
        unread: list[tuple[str, str]] = []
        right: dict[str, bool] = {}
        for name, row in records.items():
            options, letter = options_of(row, f"{place}, row {name}"), None
            if part and name not in said:
                continue
            if name in said and (letter := read_option(said[name].text, options)) is None:
                unread.append((name, said[name].text))
            label = row["Correct Answer"] if hub is None else ORIGINAL.get(name, row["Correct Answer"])
            right[name] = letter == _label(label, options, f"{place}, row {name}")
        names = list(records)
        whole = [(one, two) for one, two in zip(names[::2], names[1::2], strict=True) if {one, two} <= right.keys()]
        if not whole:
            raise ValueError("mmvp: no pair (questions 1 and 2, 3 and 4, ...) has two answers")
        if halves := sorted(set(right) - {name for pair in whole for name in pair}):
            warnings.append(f"questions whose pair is not answered, in no pair: {shown(halves)}")
        metrics = {
            "pair_accuracy": (100 * fmean(right[one] and right[two] for one, two in whole), "percent"),
            "accuracy": (100 * fmean(right.values()), "percent"),
        }
        pairs = {f"{one}, {two}": right[one] and right[two] for one, two in whole}
        tallies = {"pair_accuracy": tally_of_means(pairs, scale=100, unit="pairs")}
        return self.result(metrics, counts | {"pairs": len(whole)}, unread, warnings, tallies=tallies)


def options_of(row: Mapping[str, Any], place: str) -> dict[str, str]:
    """Return letter -> text of a row's options, "(a) Open (b) Closed"; ValueError where there are not two or more."""
    options = {letter.upper(): text for letter, text in _OPTION.findall(str(row["Options"]))}
    if len(options) < 2:
        raise ValueError(f"{place}: options are {brief(row['Options'])}; write them as '(a) Open (b) Closed'")
    return options


def _text(row: Mapping[str, Any], place: str) -> str:
    return str(row["Question"]) + option_lines(options_of(row, place)) + LETTER


def _label(answer: str, options: Mapping[str, str], place: str) -> str:
    letter = str(answer).strip(" ()").upper()
    if letter not in options:
        raise ValueError(
            f"{place}: the correct answer is {brief(answer)}; it is one of {', '.join(options)} in brackets"
        )
    return letter


def _read(path: Path) -> list[dict[str, str]]:
    """Return the rows of Questions.csv; ValueError names what is missing. The first column is not used."""
    return [row for _, row in read_table(path, COLUMNS, ",")]
