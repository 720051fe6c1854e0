"""How a growing answer is written: dropped words grey, on a screen with a status line below, or as a plain stream."""

import itertools
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TextIO

GREY, RESET = "\x1b[90m", "\x1b[0m"
ERASE_BELOW, UP = "\x1b[J", "\x1b[1A"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer puts for the first bytes of a character that later tokens complete."""

ColorMode = Literal["auto", "always", "never"]


@dataclass
class Piece:
    """A part of an answer's text that becomes readable at once: one token's, or that of the bytes of one character."""

    text: str
    undecided: int
    """Tokens of the piece whose decision is still to come."""
    kept: bool = False
    """Whether one of its tokens stays in the cache."""

    @property
    def dropped(self) -> bool:
        """Whether all its tokens are known to be dropped."""
        return not self.undecided and not self.kept


class AnswerText:
    """The text of an answer as its tokens come in, and which parts of it stay. `decode` turns ids into text."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.pieces: list[Piece] = []
        self._decode = decode
        self._tokens: list[int] = []
        self._length = self._waiting = 0
        self._decisions: list[bool] = []

    def add(self, token: int) -> None:
        """Take the next token."""
        self._tokens.append(token)
        self._waiting += 1
        text = self._decode(self._tokens)
        if text.endswith(INCOMPLETE):
            return
        self.pieces.append(Piece(printable(text[self._length :]), self._waiting))
        self._length, self._waiting = len(text), 0
        decisions, self._decisions = self._decisions, []
        for kept in decisions:
            self.decide(kept)

    def decide(self, kept: bool) -> None:
        """Take the decision about the oldest token that has none."""
        piece = next((one for one in reversed(self.pieces) if one.undecided), None)
        if piece is None:  # its piece is not readable yet
            self._decisions.append(kept)
            return
        piece.undecided -= 1
        piece.kept |= kept


class Writer(Protocol):
    """Shows an answer while it grows."""

    def show(self, pieces: Sequence[Piece], status: str) -> None:
        """Show what there is by now; all but the last piece have been decided about."""

    def finish(self, pieces: Sequence[Piece], status: str) -> None:
        """Show the finished answer."""


class Stream:
    """Writes an answer piece by piece, each once it is decided about; for pipes, files and dumb terminals."""

    def __init__(self, out: TextIO, status_out: TextIO, *, color: bool) -> None:
        self._out, self._status_out, self._color = out, status_out, color
        self._written = 0

    def show(self, pieces: Sequence[Piece], status: str) -> None:
        """Write the pieces that have been decided about."""
        self._write([piece for piece in pieces[self._written :] if not piece.undecided])

    def finish(self, pieces: Sequence[Piece], status: str) -> None:
        """Write the rest, a line end, and the status to its own stream."""
        self._write(pieces[self._written :])
        self._written = 0
        self._out.write("\n")
        self._out.flush()
        self._status_out.write(f"{status}\n")
        self._status_out.flush()

    def _write(self, pieces: Sequence[Piece]) -> None:
        characters = [(character, piece.dropped) for piece in pieces for character in piece.text]
        self._out.write(_painted(characters, self._color))
        self._out.flush()
        self._written += len(pieces)


class Screen:
    """Redraws the end of an answer and a status line below it; a word turns grey one step after it appeared."""

    def __init__(self, out: TextIO, *, color: bool, width: Callable[[], int] | None = None) -> None:
        self._out, self._color = out, color
        self._width = width or (lambda: shutil.get_terminal_size().columns)
        self._done = self._lines = 0

    def show(self, pieces: Sequence[Piece], status: str) -> None:
        """Draw what has changed. A line is final when a next one has begun and all its words are decided about."""
        width = self._line_width()
        self._draw(pieces, status[:width], width)

    def finish(self, pieces: Sequence[Piece], status: str) -> None:
        """Draw the last state, the whole status, and leave the cursor below it."""
        self._draw(pieces, status, self._line_width())
        self._out.write("\n")
        self._out.flush()
        self._done = self._lines = 0

    def _line_width(self) -> int:
        return max(self._width() - 1, 8)  # a full line would make some terminals wrap

    def _draw(self, pieces: Sequence[Piece], status: str, width: int) -> None:
        characters = [(character, piece.dropped) for piece in pieces for character in piece.text]
        starts = _line_starts(characters, self._done, width)
        shown = [_painted(_trimmed(line), self._color) for line in _cut(characters, starts)]
        self._out.write("\r" + self._lines * UP + (ERASE_BELOW if self._lines else ""))
        self._out.write("\n".join([*shown, _quiet(status, self._color)]))
        self._out.flush()
        decided = sum(len(piece.text) for piece in itertools.takewhile(lambda piece: not piece.undecided, pieces))
        final = sum(following <= decided for following in starts[1:])
        self._done, self._lines = starts[final], len(starts) - final


def wants_color(mode: ColorMode, out: TextIO, no_color: str | None) -> bool:
    """Whether to write colours to `out`: auto asks for a terminal and for NO_COLOR (its value) to be unset or empty."""
    return mode == "always" or (mode == "auto" and out.isatty() and not no_color)


Character = tuple[str, bool]
"""A character, and whether it is greyed."""


def _line_starts(characters: Sequence[Character], first: int, width: int) -> list[int]:
    """Return where lines of at most `width` columns start, from character `first` on; broken at spaces if any."""
    starts, columns, place = [first], 0, first
    space = None
    while place < len(characters):
        character = characters[place][0]
        columns += _columns(character)
        if character == "\n":
            starts, columns, space = [*starts, place + 1], 0, None
        elif character == " ":
            space = place
        elif columns > width:
            starts.append(place if space is None else space + 1)
            columns, space = sum(_columns(one) for one, _ in characters[starts[-1] : place + 1]), None
        place += 1
    return starts


def _cut(characters: Sequence[Character], starts: Sequence[int]) -> list[Sequence[Character]]:
    return [characters[start:end] for start, end in zip(starts, [*starts[1:], len(characters)], strict=True)]


def _trimmed(line: Sequence[Character]) -> Sequence[Character]:
    """Return the line without its end of line and the spaces before, of which there may be more than columns."""
    end = len(line)
    while end and line[end - 1][0].isspace():
        end -= 1
    return line[:end]


def _painted(characters: Sequence[Character], color: bool) -> str:
    if not color:
        return "".join(character for character, _ in characters)
    parts, grey = [], False
    for character, dropped in characters:
        if dropped != grey:
            parts.append(GREY if dropped else RESET)
            grey = dropped
        parts.append(character)
    return "".join(parts) + (RESET if grey else "")


def _quiet(text: str, color: bool) -> str:
    return f"{GREY}{text}{RESET}" if color else text


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def printable(text: str) -> str:
    """Return a text without what steers a terminal or turns a line's direction: control characters are replaced.

    Model, file and user may have written it. Line ends stay, other white space becomes a space.
    """
    return "".join(one if one == "\n" or one.isprintable() else " " if one.isspace() else INCOMPLETE for one in text)
