"""`python -m dynamic_llava.chat`: lines in, answers out; commands, Ctrl-C, pipes, terminals, and what goes wrong."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dynamic_llava import Conversation, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.chat.__main__ import main
from dynamic_llava.chat.session import Chat, LineFeed
from dynamic_llava.chat.terminal import GREY, Stream
from dynamic_llava.model.switches import choose_method
from dynamic_llava.tiny import BASE_WEIGHTS
from tests.tiny_pipeline import write_checkpoint, write_test_set

ANSI = re.compile(r"\x1b\[\d*[A-Za-z]")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model of width 32 whose decisions are mixed, and two pictures."""
    folder = tmp_path_factory.mktemp("chat")
    write_test_set(folder, images=2)
    return str(write_checkpoint(folder / "model", seed=0)), folder / "0.png", folder / "1.png"


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model = DynamicLlavaForConditionalGeneration.from_pretrained(checkpoint[0]).eval()
    return model, DynamicLlavaProcessor.from_pretrained(checkpoint[0])


def piped(monkeypatch, capsys, text, *arguments):
    """Run the command on lines from a pipe; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


QUESTIONS = "What is it?\n\n  How many are there?  \n"


@pytest.mark.parametrize("sparsity", ["both", "image", "output", "none"])
def test_lines_from_a_pipe_are_answered_as_a_conversation(checkpoint, loaded, monkeypatch, capsys, sparsity):
    folder, image, _ = checkpoint
    code, out, err = piped(
        monkeypatch, capsys, QUESTIONS, "--model", folder, "--image", image, "--sparsity", sparsity,
        "--max-new-tokens", 8,
    )  # fmt: skip
    chat = Conversation(*loaded, sparsity=sparsity, max_new_tokens=8)
    answers = [chat.ask("What is it?", [image]), chat.ask("How many are there?")]
    assert code == 0
    assert [line.strip() for line in out.splitlines()] == [answer.text for answer in answers]
    shown = [line for line in err.splitlines() if line.startswith("cache: ")]
    assert [line.removesuffix(" (ends here for want of room or at --max-new-tokens)") for line in shown] == [
        str(answer.use) for answer in answers
    ]


def test_colour_changes_nothing_but_the_colour(checkpoint, monkeypatch, capsys):
    folder, image, _ = checkpoint
    call = ("--model", folder, "--image", image, "--max-new-tokens", 30)
    plain = piped(monkeypatch, capsys, QUESTIONS, *call)[1]
    coloured = piped(monkeypatch, capsys, QUESTIONS, *call, "--color", "always")[1]
    assert GREY in coloured and "\x1b" not in plain
    assert ANSI.sub("", coloured) == plain


@pytest.fixture(scope="module")
def calibrated(checkpoint, tmp_path_factory):
    """The model with quantiles around 0, where its margins lie."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(checkpoint[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["sparsity"]["calibration"] = {"image": [-1.0, 0.0, 1.0], "output": [-1.0, 0.0, 1.0]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_an_asked_rate_is_answered_with_and_the_rate_that_is_met(calibrated, checkpoint, monkeypatch, capsys):
    image = checkpoint[1]
    call = ("--model", calibrated, "--image", image, "--max-new-tokens", 8)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(calibrated).eval()
    processor = DynamicLlavaProcessor.from_pretrained(calibrated)
    for words, options in (
        (("--output-keep-rate", 0.4, "--image-keep-rate", 0.5), {"output_threshold": 0.2, "image_keep_rate": 0.5}),
        (("--kv-budget", "1GiB"), {"output_threshold": float("-inf")}),
    ):
        code, out, err = piped(monkeypatch, capsys, "What is it?\n", *call, *words)
        method = choose_method(model.config.sparsity, **options)
        answer = Conversation(model, processor, method=method, max_new_tokens=8).ask("What is it?", [image])
        assert code == 0 and out.strip() == answer.text
        assert f"{answer.use}, {sum(answer.kept)} of {len(answer.kept)} tokens of the answer" in err


def test_sampling_follows_the_seed(checkpoint, monkeypatch, capsys):
    folder, image, _ = checkpoint
    call = ("--model", folder, "--image", image, "--max-new-tokens", 12, "--temperature", 2, "--seed")
    one, again, other = (piped(monkeypatch, capsys, QUESTIONS, *call, seed)[1] for seed in (1, 1, 2))
    assert one == again != other


def test_commands_in_a_pipe(checkpoint, loaded, monkeypatch, capsys):
    """/reset takes the latest image along, /image adds one, /quit ends."""
    folder, image, other = checkpoint
    lines = f"What is it?\n/reset\nWhat is it?\n/image {other}\nWhat is it?\n/quit\nWhat is it?\n"
    code, out, _ = piped(monkeypatch, capsys, lines, "--model", folder, "--image", image, "--max-new-tokens", 6)
    chat = Conversation(*loaded, max_new_tokens=6)
    first = chat.ask("What is it?", [image]).text
    second = chat.ask("What is it?", [other]).text
    assert code == 0 and [line.strip() for line in out.splitlines()] == [first, first, second]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image nope.png", "there is no image file nope.png"),
        ("/imaeg a.png", "there is no command /imaeg; the commands are /image FILE"),
        ("What is <image>?", "the question holds '<image>'"),
    ],
)
def test_a_mistake_ends_a_pipe_and_not_a_terminal(checkpoint, loaded, monkeypatch, capsys, line, message):
    folder, image, _ = checkpoint
    code, out, err = piped(monkeypatch, capsys, f"{line}\nWhat is it?\n", "--model", folder, "--image", image)
    assert (code, out) == (2, "") and f"error: {message}" in err
    out = interactive(loaded, monkeypatch, capsys, [line, "What is it?"], [image])
    assert (
        f"error: {message}" in out and Conversation(*loaded, max_new_tokens=8).ask("What is it?", [image]).text in out
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere/at/all"], "there is no model folder nowhere/at/all"),
        (["--model", str(BASE_WEIGHTS.parent)], "holds no checkpoint that can be read"),
        (["--model", "tiny"], "tiny is a dense checkpoint without predictors, so sparsity='both' would be"),
        (["--model", "tiny", "--image", "nope.png"], "there is no image file nope.png"),
        (["--model", "tiny", "--output-keep-rate", "0.5"], "this checkpoint has not been calibrated"),
        (["--model", "tiny", "--kv-budget", "1MiB"], "this checkpoint has not been calibrated"),
        (["--model", "tiny", "--kv-budget", "1MiB", "--output-keep-rate", "1"], "both say how many output tokens stay"),
        (["--model", "tiny", "--image", str(BASE_WEIGHTS / "config.json")], "is no image that Pillow can read"),
        (["--model", "tiny", "--max-new-tokens", "0"], "max_new_tokens=0 is not possible"),
        (["--model", "tiny", "--temperature", "-1"], "temperature=-1.0 is negative"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(monkeypatch, capsys, arguments, message):
    code, out, err = piped(monkeypatch, capsys, "hello\n", *arguments)
    assert (code, out) == (2, "")
    assert re.search(rf"^error: .*{re.escape(message)}", err, re.MULTILINE), err


class Keyboard:
    """Types lines at `input`'s prompt; an exception is raised there, the end of the list is Ctrl-D."""

    def __init__(self, typed):
        self._typed = iter([*typed, EOFError()])

    def __call__(self, prompt):
        assert prompt == "> "
        typed = next(self._typed)
        if isinstance(typed, BaseException):
            raise typed
        return typed


def interactive(loaded, monkeypatch, capsys, typed, images=(), writer=None, conversation=None):
    """Type at a chat in this process; return what it printed."""
    monkeypatch.setattr("builtins.input", Keyboard(typed))
    conversation = conversation or Conversation(*loaded, max_new_tokens=8)
    writer = writer or Stream(sys.stdout, sys.stdout, color=False)
    Chat(conversation, images, writer, interactive=True).run(LineFeed(sys.stdin, interactive=True))
    return capsys.readouterr().out


class Interrupting(Stream):
    """Presses Ctrl-C when the third token of the first answer is shown."""

    def __init__(self, times):
        super().__init__(sys.stdout, sys.stdout, color=False)
        self.left, self.times = 3, times

    def show(self, pieces, status):
        super().show(pieces, status)
        self.left -= 1
        for _ in range(self.times * (self.left == 0)):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(checkpoint, loaded, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    conversation = Conversation(*loaded, max_new_tokens=8)
    typed = ["What is it?", KeyboardInterrupt(), "How many are there?"]
    out = interactive(loaded, monkeypatch, capsys, typed, [checkpoint[1]], Interrupting(1), conversation)
    assert "(stopped)" in out and "(Ctrl-D or /quit ends the chat)" in out
    expected = Conversation(*loaded, max_new_tokens=8)
    steps = []
    expected.ask("What is it?", [checkpoint[1]], on_step=steps.append, stop=lambda: len(steps) == 3)
    expected.ask("How many are there?")
    assert torch.equal(conversation.ids, expected.ids) and conversation.turns == expected.turns
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_ctrl_c_begins_a_new_conversation(checkpoint, loaded, monkeypatch, capsys):
    conversation = Conversation(*loaded, max_new_tokens=8)
    typed = ["What is it?", "What is it?"]
    out = interactive(loaded, monkeypatch, capsys, typed, [checkpoint[1]], Interrupting(2), conversation)
    assert "this is a new conversation" in out
    assert [question for question, _ in conversation.turns] == ["<image>\nWhat is it?"]


@pytest.fixture
def heard_interrupts():
    """A process that a shell started in the background ignores Ctrl-C from the beginning."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_pipe(checkpoint, monkeypatch, capsys, heard_interrupts):
    monkeypatch.setattr("dynamic_llava.chat.session.Stream", lambda *streams, color: Interrupting(1))
    code, _, _ = piped(monkeypatch, capsys, QUESTIONS, "--model", checkpoint[0], "--image", checkpoint[1])
    assert code == 130


@pytest.mark.slow
def test_a_whole_session_on_a_terminal(checkpoint, loaded):
    """The command itself on a pseudo-terminal: prompt, grey words, live cache, Ctrl-D."""
    folder, image, _ = checkpoint
    command = f"{sys.executable} -m dynamic_llava.chat --model {folder} --image {image} --max-new-tokens 20".split()
    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": "", "TERM": "xterm", "COLUMNS": "90"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    seen = ""
    try:
        for typed in ("What is it?\n", "/reset\n", "\x04"):
            seen += read_until(ours, "> ")
            os.write(ours, typed.encode())
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    answer = Conversation(*loaded, max_new_tokens=20).ask("What is it?", [image])
    words = ANSI.sub("", seen)
    assert f"with {image.name}" in words and answer.text.split()[-1] in words
    assert len(re.findall(r"cache: .*tokens in sparse", words)) >= len(answer.tokens)
    assert GREY in seen and "\x1b[1A" in seen


def read_until(terminal, text, patience=120):
    seen, end = "", time.monotonic() + patience
    while not seen.endswith(text):
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 65536).decode(errors="replace")
    return seen
