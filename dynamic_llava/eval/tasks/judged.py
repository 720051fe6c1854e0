"""Tasks whose answers a judge reads: what they share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from dynamic_llava.eval.answers import Answer, one_per_question
from dynamic_llava.eval.reading import NAME, TEXT, shown
from dynamic_llava.eval.tasks.base import Question, Score, Task, llava_questions
from dynamic_llava.eval.tasks.files import missing_answers, unknown_answers
from dynamic_llava.eval.tasks.hub import HubData, read_hub


class Judged(Task):
    """A benchmark of open questions, asked without a suffix; its answers have no score before a judge reads them."""

    asked: ClassVar[str]
    """Its question file, JSON lines as LLaVA writes them."""
    images: ClassVar[str]

    def questions(self, root: Path, hub: HubData | None = None) -> list[Question]:
        """Return the questions in file order."""
        if hub is None:
            return [question for question, _ in llava_questions(self.path(root, self.asked), Path(root) / self.images)]
        table = read_hub(hub, {"question_id": NAME, "question": TEXT})
        return [Question(self.hub_id(row), row["question"], table.image(place)) for place, row in enumerate(table.rows)]

    def hub_id(self, row: dict[str, Any]) -> int | str:
        """Return the id that LLaVA's files give to the question of a dataset row."""
        return row["question_id"]

    def can_score(self, answers: Sequence[Answer], root: Path, hub: HubData | None = None) -> bool:
        """Return False: a judge is needed."""
        return False

    def score(self, answers: Sequence[Answer], root: Path, hub: HubData | None = None, *, part: bool = False) -> Score:
        """Raise ValueError: answers have no score here."""
        raise ValueError(f"{self.name}: answers have no score without a judge; send them to {self.send_to}")

    def complete(self, answers: Sequence[Answer], root: Path, hub: HubData | None = None) -> list[Answer]:
        """Return the answers in their order. ValueError unless each question has one and no other has.

        Without the question file below `root` only a question answered twice can be told: a judge's file needs none.
        """
        said = one_per_question(answers)
        if hub is not None or (Path(root) / self.asked).is_file():
            known = [str(question.id) for question in self.questions(root, hub)]
            if unknown := unknown_answers(self.name, said, known):
                raise ValueError(unknown)
            if missing := missing_answers(said, known):
                raise ValueError(f"{self.name}: no answer to questions {shown(missing)}; the judge reads all of them")
        return list(said.values())
