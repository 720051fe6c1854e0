"""Answers with the words greyed whose keys and values did not enter the cache of the sparse layers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dynamic_llava.viz import style
from dynamic_llava.viz.kept_patches import fade_dropped

_WIDTH = 1180
_MARGIN = 28
_THUMBNAIL = 176
_TEXT_SIZE = 19
_LINE = 29
_TITLE_SIZE = 22
_CAPTION_SIZE = 15


@dataclass(frozen=True)
class GreyedAnswer:
    """One generated answer: the image, its kept patches, and the words with their decisions."""

    image: Image.Image
    """The square image the answer is about."""
    kept_patches: Sequence[int]
    """Numbers of the image patches kept from the sparse layer on (row-major)."""
    question: str
    """The user's question."""
    words: Sequence[str]
    """The answer, piece by piece as it was generated."""
    kept: Sequence[bool]
    """Whether each piece's keys and values were admitted to the cache."""


def draw_greyed_answers(path: Path, answers: Sequence[GreyedAnswer], grid: tuple[int, int], *, title: str = "") -> Path:
    """Draw a PNG with one block per answer: the image with dropped patches faded, the text with dropped words greyed.

    `grid` is (rows, columns) of patches. Returns the path. ValueError when words and decisions differ in number.
    """
    blocks = [_AnswerBlock(answer, grid) for answer in answers]
    head = _MARGIN + (_TITLE_SIZE + 40 if title else 0)
    height = head + sum(block.height + _MARGIN for block in blocks)
    canvas = Image.new("RGB", (_WIDTH, height), style.PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_MARGIN, _MARGIN - 6), title, font=style.font(_TITLE_SIZE, bold=True), fill=style.INK)
        _legend(draw, _MARGIN + _TITLE_SIZE + 6)
    top = head
    for block in blocks:
        block.paint(canvas, draw, top)
        top += block.height + _MARGIN
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def _legend(draw: ImageDraw.ImageDraw, top: int) -> None:
    small, x = style.font(_CAPTION_SIZE), float(_MARGIN)
    for text, color in (
        ("dark words", style.INK),
        ("stay in the cache of the sparse layers,", style.QUIET),
        ("grey words", style.FADED),
        ("are dropped after their own step; faded patches are dropped before the sparse layers", style.QUIET),
    ):
        draw.text((x, top), text, font=small, fill=color)
        x += draw.textlength(text + " ", font=small)


class _AnswerBlock:
    """The lines of one answer, laid out once so that the height is known before painting."""

    def __init__(self, answer: GreyedAnswer, grid: tuple[int, int]) -> None:
        if len(answer.words) != len(answer.kept):
            raise ValueError(f"{len(answer.words)} words have {len(answer.kept)} decisions; give one per word")
        self.answer, self.grid = answer, grid
        self.font = style.font(_TEXT_SIZE)
        self.left = 2 * _MARGIN + _THUMBNAIL
        self.lines = _wrap(answer.words, answer.kept, self.font, _WIDTH - self.left - _MARGIN)
        self.height = max(_THUMBNAIL, _CAPTION_SIZE + 14 + _LINE * len(self.lines) + _CAPTION_SIZE + 10)

    def paint(self, canvas: Image.Image, draw: ImageDraw.ImageDraw, top: int) -> None:
        """Draw picture, question, words and share of one answer, `top` pixels from the upper edge."""
        rows, columns = self.grid
        side = max(rows, columns) * max(1, _THUMBNAIL // max(rows, columns))
        pixels = np.asarray(self.answer.image.convert("RGB").resize((side, side), Image.Resampling.NEAREST))
        faded = Image.fromarray(fade_dropped(pixels, self.answer.kept_patches, self.grid))
        canvas.paste(faded.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.NEAREST), (_MARGIN, top))
        draw.rectangle((_MARGIN, top, _MARGIN + _THUMBNAIL, top + _THUMBNAIL), outline=style.FADED)
        caption = style.font(_CAPTION_SIZE)
        draw.text((self.left, top), self.answer.question, font=caption, fill=style.ACCENT)
        y = top + _CAPTION_SIZE + 14
        for line in self.lines:
            for x, word, kept in line:
                draw.text((self.left + x, y), word, font=self.font, fill=style.INK if kept else style.FADED)
            y += _LINE
        kept, count = sum(self.answer.kept), len(self.answer.kept)
        share = f"{kept} of {count} answer tokens kept, {len(self.answer.kept_patches)} of {rows * columns} patches"
        draw.text((self.left, y + 4), share, font=caption, fill=style.QUIET)


def _wrap(
    words: Sequence[str], kept: Sequence[bool], font: ImageFont.FreeTypeFont, width: int
) -> list[list[tuple[float, str, bool]]]:
    """Break into lines of (x offset, word, kept) no wider than `width` pixels."""
    lines: list[list[tuple[float, str, bool]]] = [[]]
    x, space = 0.0, font.getlength(" ")
    for word, keep in zip(words, kept, strict=True):
        length = font.getlength(word)
        if x and x + length > width:
            lines.append([])
            x = 0.0
        lines[-1].append((x, word, keep))
        x += length + space
    return lines


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
    axes.bar(range(len(frequent)), rates, color=style.SECOND, width=0.72)
    axes.axhline(overall, color=style.INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.text(-0.6, overall + 1.5, f"all tokens: {overall:.0f} %", fontsize=9, color=style.INK)
    style.tidy_axes(axes, title, "", "kept, %")
    axes.set_xticks(range(len(frequent)), frequent, rotation=90)
    axes.set_xlim(-0.8, len(frequent) - 0.2)
    axes.set_ylim(0, 104)
    return style.save(figure, path)
