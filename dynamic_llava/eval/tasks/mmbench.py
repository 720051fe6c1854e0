"""MMBench (English, dev 20230712): multiple choice in which every rotation of a question's options has to be right.

The rows k, k + 1e6, k + 2e6, ... are one question with its options rotated. A row without an answer is wrong and
counted, an answer to no row is counted and left out. Letters are inferred by rule (`read_mmbench`); where that finds
none the row is wrong: there is no judge and no guess.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.metrics.choices import read_mmbench
from dynamic_llava.eval.metrics.tally import tally_of_means
from dynamic_llava.eval.reading import TEXT, WHOLE, brief, fields_of, optional, shown
from dynamic_llava.eval.reading import read_table as read_cells
from dynamic_llava.eval.tasks.base import (
    LETTER,
    LONG_TOKENS,
    PAPER_TABLE1,
    DataFile,
    Score,
    Submission,
    Task,
    paper_numbers,
)
from dynamic_llava.eval.tasks.hub import HubData, read_hub
from dynamic_llava.eval.tasks.questions import (
    ImageData,
    ImageSource,
    Question,
    meet,
    missing_answers,
    option_lines,
    unknown_answers,
)
from dynamic_llava.eval.writing import write_workbook

TABLE = "mmbench/mmbench_dev_20230712.tsv"
TABLE_URL = "https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv"
LETTERS = ("A", "B", "C", "D")
NEEDED = ("index", "question", *LETTERS, "answer")
HUB_COLUMNS = {
    "index": WHOLE,
    "question": TEXT,
    **dict.fromkeys((*LETTERS, "answer", "hint", "category", "L2-category", "split"), optional(TEXT)),
}
UPLOAD = ("index", "question", *LETTERS, "prediction", "answer", "split")
"""Columns of the server's workbook in their order."""
ROTATION = 1_000_000
"""Rows of one question differ by multiples of it."""
LONGEST_REFERENCE = 64
"""An image cell of at most so many characters may hold the index of the row whose image it shares."""
EMPTY = ("", "nan", "none")
"""What an empty cell may hold, in small letters."""

_INDEX = re.compile("[0-9]{1,18}")

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class CellImage:
    """An image that stands in a cell of the table as base64, decoded when it is needed."""

    cell: str = field(repr=False)
    name: str

    def load(self) -> Any:
        """Return the Pillow image in RGB; ValueError when it is broken."""
        try:
            data = base64.b64decode(self.cell, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{self.name} is no base64 ({error})") from None
        return ImageData(data, self.name).load()

    def digest(self) -> str:
        """Return the digest of the cell."""
        return sha256(self.cell.encode()).hexdigest()


class MmBench(Task):
    """MMBench. Its number in tables is the circular accuracy over the dev questions."""

    name = "mmbench"
    title = "MMBench (en)"
    groups = (PAPER_TABLE1,)
    max_new_tokens = LONG_TOKENS
    files = (DataFile(TABLE, "questions, images and labels", TABLE_URL),)
    hub = HubData("lmms-lab/MMBench", "dev", "en")
    table_metric = "circular_accuracy"
    paper = paper_numbers("circular_accuracy", dense=(64.3, 67.7), image=(65.4, 68.3), both=(64.1, 66.9))
    paper_note = "Tables 1 and 2, dev 20230712"
    send_to = "https://mmbench.opencompass.org.cn/mmbench-submission"

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return every row as a question, in file order; answer lines record the prompt without its suffix."""
        if hub is not None:
            table = read_hub(hub, HUB_COLUMNS)
            return [_question(row, table.image(place)) for place, row in enumerate(table.rows)]
        path = self.path(root, TABLE)
        rows = read_table(path)
        fields_of(dict(rows[0]), {"image": TEXT}, f"{path}: the head line")
        by_index = {row["index"]: row for row in rows}
        return [_question(row, image_of(row, by_index, path)) for row in rows]

    def score(
        self, answers: Sequence[AnswerLine], root: Path, hub: HubData | None = None, *, part: bool = False
    ) -> Score:
        """Return circular accuracy in percent (all, by category and l2-category), and that of single rows.

        `vanilla_accuracy` counts the rows with index < 1e6, `row_accuracy` all rows.
        """
        rows = self._rows(root, hub)
        said, counts, warnings = meet(self.name, answers, [str(row["index"]) for row in rows], part)
        right: dict[int, bool] = {}
        groups: dict[int, list[Cells]] = {}
        unread: list[tuple[int, str]] = []
        for row in rows:
            answer, letter = said.get(str(row["index"])), None
            if answer is None and part:
                continue
            if answer is not None and (letter := read_mmbench(answer.text, options_of(row))) is None:
                unread.append((row["index"], answer.text))
            right[row["index"]] = letter == row["answer"]
            groups.setdefault(row["index"] % ROTATION, []).append(row)
        whole = {"circular_accuracy": []}
        for members in groups.values():
            for name in ("circular_accuracy", *_kinds(members[0])):
                whole.setdefault(name, []).append(all(right[row["index"]] for row in members))
        plain = {
            "vanilla_accuracy": [value for index, value in right.items() if index < ROTATION],
            "row_accuracy": list(right.values()),
        }
        metrics = {name: (100 * fmean(values), "percent") for name, values in (whole | plain).items() if values}
        circular = dict(zip(map(str, groups), whole["circular_accuracy"], strict=True))
        tallies = {"circular_accuracy": tally_of_means(circular, scale=100, unit="groups of rotations")}
        return self.result(metrics, counts | {"groups": len(groups)}, unread, warnings, tallies=tallies)

    def submission(
        self, answers: Sequence[AnswerLine], root: Path, folder: Path, hub: HubData | None = None
    ) -> Submission:
        """Write mmbench_upload.xlsx for the server. ValueError unless every row is answered, and no other."""
        rows, said = self._rows(root, hub, labels=False), one_per_question(answers)
        names = [str(row["index"]) for row in rows]
        if unknown := unknown_answers(self.name, said, names):
            raise ValueError(unknown)
        if missing := missing_answers(said, names):
            raise ValueError(f"mmbench: no answer to rows {shown(missing)}; the server's file holds all")
        filled = [{key: cell for key, cell in row.items() if not is_empty(cell)} for row in rows]
        lines = [row | {"prediction": said[name].text} for name, row in zip(names, filled, strict=True)]
        cells = [[line.get(name) for name in UPLOAD] for line in lines]
        return Submission((write_workbook(folder / "mmbench_upload.xlsx", UPLOAD, cells),), self.send_to)

    def _rows(self, root: Path, hub: HubData | None, labels: bool = True) -> Sequence[Cells]:
        """Return the rows. ValueError where `labels` are wanted and one is no letter."""
        place = hub.dataset if hub is not None else str(Path(root) / TABLE)
        rows = read_table(self.path(root, TABLE)) if hub is None else read_hub(hub, HUB_COLUMNS, image=None).rows
        if labels and (bad := [row["index"] for row in rows if row["answer"] not in LETTERS]):
            raise ValueError(f"{place}: the answers of rows {shown(bad)} are no letters; only dev has labels")
        return rows


def read_table(path: Path, columns: Sequence[str] = NEEDED) -> list[dict[str, Any]]:
    """Return the rows of a table in MMBench's format: tab-separated, a head line, these columns, the index a number.

    ValueError names file and line for a row of another length, an index that is no number or occurs twice, a missing
    column, and what is no UTF-8.
    """
    known: set[int] = set()
    return [_checked(row, known, place) for place, row in read_cells(path, columns, "\t")]


def is_empty(cell: Any) -> bool:
    """Return whether a cell is empty: None, a number that is none, or "", "nan", "none" in any case."""
    return str(cell).strip().lower() in EMPTY


def options_of(row: Cells) -> dict[str, str]:
    """Return letter -> option of a row, up to the first that is empty or has no column."""
    options: dict[str, str] = {}
    for letter in LETTERS:
        if is_empty(row.get(letter)):
            break
        options[letter] = str(row[letter])
    return options


def image_of(row: Cells, rows: Mapping[int, Cells], path: Path) -> CellImage:
    """Return the image in a row's cell, or in that of the row whose index the cell holds, as newer tables have it."""
    place, cell = f"{path}, image of index {row['index']}", row["image"].strip()
    if len(cell) > LONGEST_REFERENCE or not _INDEX.fullmatch(cell):
        return CellImage(cell, place)
    other = rows.get(int(cell))
    if other is None or len(other["image"].strip()) <= LONGEST_REFERENCE:
        raise ValueError(f"{place}: the cell holds {cell}, but no row of this index has an image of its own")
    return CellImage(other["image"].strip(), f"{place}, which is that of index {cell}")


def _checked(row: dict[str, Any], known: set[int], place: str) -> dict[str, Any]:
    if not _INDEX.fullmatch(row["index"]):
        raise ValueError(f"{place}: index is {brief(row['index'])}; it is a number")
    row["index"] = int(row["index"])
    if row["index"] in known:
        raise ValueError(f"{place}: index {row['index']} occurs twice")
    known.add(row["index"])
    return row


def _question(row: Cells, image: ImageSource) -> Question:
    options = options_of(row)
    hint = "" if is_empty(row.get("hint")) else f"{row['hint']}\n"
    text = hint + row["question"] + option_lines(options)
    extra = {"round_id": 0, "options": list(options.values()), "option_char": list(options)}
    return Question(row["index"], text + LETTER, image, prompt=text, extra=extra)


def _kinds(row: Cells) -> list[str]:
    """Return the metrics of a row's category and l2-category (a capital letter on the Hub)."""
    kinds = {"category": row.get("category"), "l2-category": row.get("l2-category", row.get("L2-category"))}
    return [f"circular_accuracy/{kind}/{value}" for kind, value in kinds.items() if not is_empty(value)]
