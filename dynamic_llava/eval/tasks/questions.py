"""Questions and their images as a task reads them, and how answers meet the questions they belong to; no torch here."""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from dynamic_llava.eval.answers import AnswerLine, one_per_question
from dynamic_llava.eval.reading import NAME, NO_PATH, TEXT, brief, fields_of, read_json_lines, shown
from dynamic_llava.files import file_digest


class ImageSource(Protocol):
    """An image that is read when it is needed."""

    @property
    def name(self) -> str:
        """Name of the image in error messages."""

    def load(self) -> Any:
        """Return the Pillow image in RGB; FileNotFoundError or ValueError where it is missing or broken."""

    def digest(self) -> str:
        """Return what tells its encoded content from another's; OSError or ValueError where it cannot be read."""


@dataclass(frozen=True)
class ImageFile:
    """An image file named by the data, `name` relative to `folder`; it may not leave the folder."""

    folder: Path
    name: str

    def path(self) -> Path:
        """Return the file. ValueError when the name is absolute or leaves the folder (by `..` or a symbolic link)."""
        return inside(self.folder, self.name)

    def load(self) -> Any:
        """Return the Pillow image in RGB; FileNotFoundError when it is missing, ValueError when it is broken."""
        from dynamic_llava.processing.images import load_image

        return load_image(self.path())

    def digest(self) -> str:
        """Return the digest of the file."""
        return file_digest(self.path())


@dataclass(frozen=True)
class ImageData:
    """An encoded image (PNG, JPEG, ...) that stands in the data itself."""

    data: bytes = field(repr=False)
    name: str

    def load(self) -> Any:
        """Return the Pillow image in RGB; ValueError when it is broken."""
        from dynamic_llava.processing.images import decode_image

        return decode_image(self.data, self.name)

    def digest(self) -> str:
        """Return the digest of the encoded image."""
        return sha256(self.data).hexdigest()


def inside(folder: Path, name: str) -> Path:
    """Return the path of `name` in `folder`. ValueError when it is absolute or leaves it, by `..` or a link."""
    home = Path(folder).resolve()
    try:
        path = (home / name).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, a name too long, a circle of links
        raise ValueError(f"image path {brief(name)} in {home} is no path of a file ({error})") from None
    if Path(name).is_absolute() or not path.is_relative_to(home):
        raise ValueError(f"image path {brief(name)} leaves the image folder {home}; give a path inside it")
    return path


@dataclass(frozen=True)
class Question:
    """One question as the runner asks it."""

    id: int | str
    """`question_id` of its answer line; not always unique (MME, TextVQA), its place among the questions is."""
    text: str
    """The prompt with its suffix, without conversation template and `<image>`; the image is placed first."""
    image: ImageSource | None = None
    """Its image; None for a question of text alone."""
    prompt: str | None = None
    """Prompt of the answer line where it differs from `text` (MMBench, ScienceQA)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of its answer line (MMBench's round_id, options, option_char)."""

    @property
    def logged_prompt(self) -> str:
        """The prompt of the answer line."""
        return self.text if self.prompt is None else self.prompt


QUESTION_LINE = {"question_id": NAME, "text": TEXT, "image": NO_PATH}
"""Fields of a line of a LLaVA question file."""


def llava_questions(path: Path, folder: Path, *, repeated_ids: bool = False) -> list[tuple[Question, dict[str, Any]]]:
    """Return the questions of a LLaVA question file (JSON lines), each with its raw line; images lie in `folder`.

    A line has question_id, text, an image unless it is a question of text alone, and more (category). Raises ValueError
    that names file and line for a broken line, and for an id that occurs twice unless `repeated_ids`.
    """
    found: list[tuple[Question, dict[str, Any]]] = []
    lines: dict[str, int] = {}
    for number, line in read_json_lines(path):
        place = f"{path}:{number}"
        fields_of(line, QUESTION_LINE, place)
        name, text, image = line["question_id"], line["text"], line.get("image")
        if not repeated_ids and str(name) in lines:
            raise ValueError(f"{place}: question {brief(name)} stands already in line {lines[str(name)]}")
        lines[str(name)] = number
        found.append((Question(name, text, ImageFile(folder, image) if image else None), line))
    if not found:
        raise ValueError(f"{path} holds no questions")
    return found


def option_lines(options: Mapping[str, str]) -> str:
    """Return options as LLaVA-1.5 was taught to read them, each on a line of its own: "\\nA. Open\\nB. Closed"."""
    return "".join(f"\n{letter}. {text}" for letter, text in options.items())


def meet(
    task: str, answers: Sequence[AnswerLine], known: Collection[str], part: bool = False
) -> tuple[dict[str, AnswerLine], dict[str, int], list[str]]:
    """Return the answers by id, what is counted, and what is warned of; `known` are the ids of the questions, as text.

    Questions without an answer are wrong and counted, or with `part` left out; answers without a question are counted
    and left out. Raises ValueError for a question answered twice, and when no answer has a question.
    """
    said = one_per_question(answers)
    missing, unknown = missing_answers(said, known), unknown_answers(task, said, known)
    answered = len(known) - len(missing)
    if not answered:
        raise ValueError(unknown or f"{task}: there are no answers")
    wrong = missing and not part
    warnings = [f"questions without an answer, counted as wrong: {shown(missing)}"] if wrong else []
    warnings += left_out(part, missing, len(known))
    counts = {"questions": len(known), "answered": answered, "missing": len(missing), "unknown": len(said) - answered}
    return said, counts, warnings + ([unknown] if unknown else [])


def unknown_answers(task: str, answers: Iterable[Any], known: Iterable[Any]) -> str:
    """Say which answered questions (their keys) the task does not have; "" when it has all of them."""
    known = set(known)
    unknown = [name for name in answers if name not in known]
    return f"{task} has no question for answers {shown(unknown)}; are they of another split or task?" if unknown else ""


def missing_answers(answers: Container[Any], known: Iterable[Any]) -> list[Any]:
    """Return the questions (their keys) that have no answer, in the questions' order."""
    return [name for name in known if name not in answers]


def left_out(part: bool, missing: Sequence[Any], known: int) -> list[str]:
    """Return the warning that only a part of the `known` questions is scored; none where nothing is `missing`."""
    if not part or not missing:
        return []
    return [f"a part of the questions: {known - len(missing)} of {known} are answered, and the numbers are over these"]
