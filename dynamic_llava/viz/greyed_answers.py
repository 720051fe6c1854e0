"""Answers with the words greyed whose keys and values did not enter the cache of the sparse layers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.patches import Rectangle
from PIL import Image, ImageFont

from dynamic_llava.viz import style
from dynamic_llava.viz.patches import drawn, fade_dropped

_WIDTH = 1300
_DPI = 100
"""Pixels of the layout in an inch: pictures are laid out in whole pixels of this size."""
_MARGIN = 28
_THUMBNAIL = 176
_TEXT_SIZE = 21
_LINE = 32
_TITLE_SIZE = 25
_CAPTION_SIZE = 17

_CLOSING, _OPENING = set(".,;:!?)]}%'\N{RIGHT SINGLE QUOTATION MARK}"), set("([{")


@dataclass(frozen=True)
class GreyedAnswer:
    """One generated answer: the image, its kept patches, and the words with their decisions."""

    image: Image.Image | None
    """The image that the answer is about, of any proportion; None: no image is drawn."""
    kept_patches: Sequence[int]
    """Numbers of the image patches kept from the sparse layer on (row-major)."""
    question: str
    """The user's question."""
    words: Sequence[str]
    """The answer, piece by piece as it was generated: with the spaces of the text, or words alone, which are then set
    apart by spaces, punctuation joined to the word that it belongs to."""
    kept: Sequence[bool]
    """Whether each piece's keys and values were admitted to the cache."""
    title: str = ""
    """What stands above the question, such as the method."""
    share: str = ""
    """What is said below the words; by default how many of them were kept, and of the patches."""


def draw_greyed_answers(
    path: Path, answers: Sequence[GreyedAnswer], grid: tuple[int, int], *, title: str = "", also: Sequence[str] = ()
) -> Path:
    """Draw a PNG with one block per answer: the image, beside it with dropped patches faded, and the greyed text.

    `grid` is (rows, columns) of patches; `also`: see `style.save`. Returns the path. ValueError when words and
    decisions differ in number.
    """
    blocks = [_AnswerBlock(answer, grid) for answer in answers]
    head = _MARGIN + (_TITLE_SIZE + 44 if title else 0)
    canvas = _Canvas(head + sum(block.height + _MARGIN for block in blocks))
    if title:
        canvas.text(_MARGIN, _MARGIN - 6, title, _TITLE_SIZE, style.INK, bold=True)
        _legend(canvas, _MARGIN + _TITLE_SIZE + 8, any(block.pictures for block in blocks))
    top = head
    for block in blocks:
        block.paint(canvas, top)
        top += block.height + _MARGIN
    return style.save(canvas.figure, path, dpi=_DPI, also=also)


class _Canvas:
    """A figure that is drawn on in pixels from its upper left corner; text stays text in SVG and PDF."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = style.new_figure(_WIDTH / _DPI, height / _DPI)
        self.figure.set_layout_engine("none")

    def text(self, x: float, y: float, text: str, size: int, color: str, *, bold: bool = False) -> None:
        """Write a text whose line begins at y; size in pixels."""
        baseline = y + style.font(size, bold=bold).getmetrics()[0]
        self.figure.text(
            x / _WIDTH, 1 - baseline / self.height, text, fontsize=size * 72 / _DPI, color=color,
            fontweight="bold" if bold else "normal", va="baseline", parse_math=False,
        )  # fmt: skip

    def image(self, x: float, y: float, pixels: Any, width: int, height: int) -> None:
        """Show pixels in a box, framed."""
        box = x / _WIDTH, 1 - (y + height) / self.height, width / _WIDTH, height / self.height
        axes = self.figure.add_axes(box)
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=style.FADED, clip_on=False)
        axes.add_patch(frame)


def _legend(canvas: _Canvas, top: int, patches: bool) -> None:
    small, x = style.font(_CAPTION_SIZE), float(_MARGIN)
    ends = "are dropped after their own step"
    for text, color in (
        ("dark words", style.INK),
        ("stay in the cache of the sparse layers,", style.QUIET),
        ("grey words", style.FADED),
        (f"{ends}; faded patches before the sparse layers" if patches else ends, style.QUIET),
    ):
        canvas.text(x, top, text, _CAPTION_SIZE, color)
        x += small.getlength(text + " ")


class _AnswerBlock:
    """The lines of one answer, laid out once so that the height is known before painting."""

    def __init__(self, answer: GreyedAnswer, grid: tuple[int, int]) -> None:
        if len(answer.words) != len(answer.kept):
            raise ValueError(f"{len(answer.words)} words have {len(answer.kept)} decisions; give one per word")
        self.answer, self.grid = answer, grid
        self.pictures = _pictures(answer, grid)
        self.left = _MARGIN + len(self.pictures) * (_THUMBNAIL + _MARGIN // 2) + (_MARGIN // 2 if self.pictures else 0)
        width = _WIDTH - self.left - _MARGIN
        pieces = list(zip(spaced(answer.words), answer.kept, strict=True))
        self.lines = _wrap(pieces, style.font(_TEXT_SIZE), width)
        asked = [(text, True) for text in spaced(answer.question.split())]
        self.question = _wrap(asked, style.font(_CAPTION_SIZE), width)
        heads = bool(answer.title) + len(self.question)
        text = heads * (_CAPTION_SIZE + 8) + 6 + _LINE * len(self.lines) + _CAPTION_SIZE + 10
        self.height = max(_THUMBNAIL if self.pictures else 0, text)

    def paint(self, canvas: _Canvas, top: int) -> None:
        """Draw pictures, question, words and share of one answer, `top` pixels from the upper edge."""
        for place, pixels in enumerate(self.pictures):
            height, width = pixels.shape[:2]
            scale = _THUMBNAIL / max(height, width)
            size = max(1, round(width * scale)), max(1, round(height * scale))
            canvas.image(_MARGIN + place * (_THUMBNAIL + _MARGIN // 2), top, pixels, *size)
        y = top
        if self.answer.title:
            canvas.text(self.left, y, self.answer.title, _CAPTION_SIZE, style.INK, bold=True)
            y += _CAPTION_SIZE + 8
        for line in self.question:
            for x, text, _ in line:
                canvas.text(self.left + x, y, text, _CAPTION_SIZE, style.QUIET)
            y += _CAPTION_SIZE + 8
        y += 6
        for line in self.lines:
            for x, text, kept in line:
                canvas.text(self.left + x, y, text, _TEXT_SIZE, style.INK if kept else style.FADED)
            y += _LINE
        canvas.text(self.left, y + 4, self.answer.share or self._share(), _CAPTION_SIZE, style.QUIET)

    def _share(self) -> str:
        kept, count = sum(self.answer.kept), len(self.answer.kept)
        share = f"{kept} of {count} answer tokens kept"
        if self.pictures:
            share += f", {len(self.answer.kept_patches)} of {self.grid[0] * self.grid[1]} patches"
        return share


def _pictures(answer: GreyedAnswer, grid: tuple[int, int]) -> list[Any]:
    """Return the pixels of the image, as it is and with its dropped patches faded; none without an image."""
    if answer.image is None:
        return []
    pixels = drawn(answer.image, 2 * _THUMBNAIL)
    return [pixels, fade_dropped(pixels, answer.kept_patches, grid, answer.image.size)]


def spaced(words: Sequence[str]) -> list[str]:
    """Return pieces of a text that joined make the text: as they are where any has a space, else words, spaced.

    Words alone stand apart; punctuation belongs to the word before it, an opening bracket to the one behind it.
    """
    if any(character.isspace() for word in words for character in word):
        return list(words)
    pieces: list[str] = []
    for word in words:
        alone = not pieces or not word or word[0] in _CLOSING or pieces[-1][-1:] in _OPENING
        pieces.append(word if alone else f" {word}")
    return pieces


def _wrap(
    pieces: Sequence[tuple[str, bool]], font: ImageFont.FreeTypeFont, width: int
) -> list[list[tuple[float, str, bool]]]:
    """Break (text, kept) pieces into lines of (x offset, text, kept) no wider than `width` pixels.

    Broken at spaces and line ends; a word that is wider than a line is broken where the line ends.
    """
    lines: list[list[tuple[float, str, bool]]] = [[]]
    x = 0.0
    for word in _words(pieces):
        if word == [("\n", True)]:
            lines.append([])
            x = 0.0
            continue
        wide = sum(font.getlength(text) for text, _ in word)
        blank = all(text.isspace() for text, _ in word)
        if x and x + wide > width:
            lines.append([])
            x = 0.0
        if blank and not x:
            continue
        for text, kept in word if wide <= width else [(one, kept) for part, kept in word for one in part]:
            length = font.getlength(text)
            if x and x + length > width:
                lines.append([])
                x = 0.0
            lines[-1].append((x, text, kept))
            x += length
    return lines


def _words(pieces: Sequence[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """Return the text in parts that a line may not break, each a list of (text, kept); spaces and line ends are own."""
    words: list[list[tuple[str, bool]]] = []
    inside = False
    for text, kept in pieces:
        for character in text:
            kind = "\n" if character in "\n\r" else " " if character.isspace() else "x"
            if kind == "\n":
                words.append([("\n", True)])
            elif kind == " ":
                words.append([(" ", True)])
            elif not inside:
                words.append([(character, kept)])
            elif words[-1][-1][1] == kept:
                words[-1][-1] = (words[-1][-1][0] + character, kept)
            else:
                words[-1].append((character, kept))
            inside = kind == "x"
    return words


def draw_keep_rate_by_word(
    path: Path,
    words: Sequence[Sequence[str]],
    kept: Sequence[Sequence[bool]],
    *,
    title: str,
    least_count: int = 10,
    most_words: int = 48,
) -> Path:
    """Draw how often each word was kept over many answers, for words seen at least `least_count` times.

    The `most_words` most frequent ones are shown, sorted by their keep rate. Returns the path; ValueError when no word
    is frequent enough.
    """
    seen: Counter[str] = Counter()
    stayed: Counter[str] = Counter()
    for answer, decisions in zip(words, kept, strict=True):
        for word, decision in zip(answer, decisions, strict=True):
            seen[word] += 1
            stayed[word] += bool(decision)
    frequent = [word for word, count in seen.most_common(most_words) if count >= least_count]
    if not frequent:
        raise ValueError(f"no word occurs {least_count} times in {len(words)} answers; lower least_count")
    frequent.sort(key=lambda word: stayed[word] / seen[word])
    rates = [100 * stayed[word] / seen[word] for word in frequent]
    overall = 100 * sum(stayed.values()) / sum(seen.values())
    figure = style.new_figure(max(6.5, 0.235 * len(frequent) + 1.2), 3.6)
    axes = figure.subplots()
    axes.bar(range(len(frequent)), rates, color=style.OUTPUT_TOKENS, width=0.72)
    axes.axhline(overall, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(-0.6, overall + 1.5, f"all tokens: {overall:.0f} %", fontsize=style.NOTE, color=style.INK)
    style.tidy_axes(axes, title, "", "kept, %")
    axes.set_xticks(range(len(frequent)), frequent, rotation=90)
    axes.set_xlim(-0.8, len(frequent) - 0.2)
    axes.set_ylim(0, 104)
    return style.save(figure, path)
