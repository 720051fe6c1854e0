"""What is written to a terminal: the same text on a screen and in a stream, dropped words grey, nothing too wide."""

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamic_llava.chat.terminal import GREY, AnswerText, Piece, Screen, Stream, wants_color

TOKENS = ["The", " red", " circle", ".", " and", "\n", " 猫", "a" * 14, "  ", " é", ""]
ANSWERS = st.lists(st.tuples(st.sampled_from(TOKENS), st.booleans()), min_size=1, max_size=30)


class Terminal:
    """A screen of endless height that knows the few things that are written to it; a full line fails the test."""

    def __init__(self, width):
        self.width, self.lines, self.row, self.column, self.grey = width, [[]], 0, 0, False

    def write(self, text):
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|.", text, re.DOTALL):
            self._obey(part)

    def flush(self):
        pass

    def _obey(self, part):
        if part == "\r":
            self.column = 0
        elif part == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [[]] * (self.row == len(self.lines))
        elif part == "\x1b[1A":
            self.row -= 1
        elif part == "\x1b[J":
            self.lines[self.row :] = [self.lines[self.row][: self.column]]
        elif part in (GREY, "\x1b[0m"):
            self.grey = part == GREY
        else:
            assert not part.startswith("\x1b"), f"unknown sequence {part!r}"
            self.lines[self.row] = [*self.lines[self.row][: self.column], (part, self.grey)]
            self.column += 1
            assert self.column < self.width, "a line is full"


def grow(answer, writer):
    """Feed an answer of (text, kept) tokens as a conversation does: each decision comes one step late."""
    text = AnswerText(lambda tokens: "".join(answer[token][0] for token in tokens))
    for number in range(len(answer)):
        if number:
            text.decide(answer[number - 1][1])
        text.add(number)
        writer.show(text.pieces, f"status {number}")
    writer.finish(text.pieces, "status at the end")
    return text


def visible(characters):
    return [(one, grey) for one, grey in characters if not one.isspace()]


@given(ANSWERS, st.integers(9, 40))
@settings(max_examples=150)
def test_a_screen_ends_up_with_the_text_and_its_colours(answer, width):
    terminal = Terminal(width + 10)  # the last status is written whole
    grow(answer, Screen(terminal, color=True, width=lambda: width))
    *body, status, empty = terminal.lines
    assert "".join(one for one, _ in status) == "status at the end" and not empty
    last = len(answer) - 1
    wanted = [(one, not kept and place < last) for place, (text, kept) in enumerate(answer) for one in text]
    assert visible(one for line in body for one in line) == visible(wanted)
    for line in body:
        text = "".join(one for one, _ in line)
        assert len(text) + text.count("猫") < width
        assert not text.endswith(" ")


def test_words_are_not_cut_where_there_are_spaces():
    terminal = Terminal(40)
    grow(
        [("The", True), (" small", True), (" red circle", False), (" sits", True)],
        Screen(terminal, color=False, width=lambda: 14),
    )
    assert ["".join(one for one, _ in line) for line in terminal.lines[:2]] == ["The small red", "circle sits"]


@given(ANSWERS)
@settings(max_examples=60)
def test_a_stream_without_colour_is_the_text(answer):
    out, status = io.StringIO(), io.StringIO()
    grow(answer, Stream(out, status, color=False))
    assert out.getvalue() == "".join(text for text, _ in answer) + "\n"
    assert status.getvalue() == "status at the end\n"


def test_a_stream_greys_what_is_dropped_and_waits_for_the_decision():
    out = io.StringIO()
    stream = Stream(out, io.StringIO(), color=True)
    stream.show([Piece("a red", 0, kept=True), Piece(" ring", 1)], "")
    assert out.getvalue() == "a red"
    stream.show([Piece("a red", 0, kept=True), Piece(" ring", 0), Piece(".", 1)], "")
    assert out.getvalue() == "a red\x1b[90m ring\x1b[0m"


def test_a_character_of_several_tokens_appears_whole_and_stays_if_one_of_them_does():
    parts = [b"n", "é".encode()[:1], "é".encode()[1:], b"e"]
    text = AnswerText(lambda tokens: b"".join(parts[token] for token in tokens).decode(errors="replace"))
    text.add(0)
    text.decide(False)
    text.add(1)
    assert [piece.text for piece in text.pieces] == ["n"]
    text.decide(True)
    text.add(2)
    assert text.pieces[-1] == Piece("é", 1, kept=True) and not text.pieces[-1].dropped
    text.decide(False)
    text.add(3)
    assert [(piece.text, piece.dropped) for piece in text.pieces] == [("n", True), ("é", False), ("e", False)]


def test_a_model_cannot_steer_the_terminal():
    text = AnswerText(lambda tokens: "a\x1b[2Jb\tc\r"[: 1 + tokens[-1]])
    for token in (0, 8):
        text.add(token)
    assert "".join(piece.text for piece in text.pieces) == "a\N{REPLACEMENT CHARACTER}[2Jb c "


class Tty(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("mode", "out", "no_color", "wanted"),
    [
        ("auto", Tty(), None, True),
        ("auto", Tty(), "", True),
        ("auto", Tty(), "1", False),
        ("auto", io.StringIO(), None, False),
        ("always", io.StringIO(), "1", True),
        ("never", Tty(), None, False),
    ],
)
def test_colour_is_for_terminals_unless_somebody_says_otherwise(mode, out, no_color, wanted):
    assert wants_color(mode, out, no_color) is wanted
