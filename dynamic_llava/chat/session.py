"""The chat in a terminal: lines in, answers out, with dropped words grey and the size of the cache below them.

From a terminal it asks for lines; where the lines come from a pipe or a file it answers each and ends, and a mistake
ends it at once. Nothing here knows the model's inside: it is all in `Conversation`.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from dynamic_llava.chat.conversation import Conversation, Step, check_settings
from dynamic_llava.chat.terminal import AnswerText, ColorMode, Screen, Stream, Writer, wants_color
from dynamic_llava.config import SHIPPED, SparsityMode, checkpoint_source
from dynamic_llava.config.checks import check_one_rate
from dynamic_llava.eval.shard import own_device
from dynamic_llava.methods import Method, describe_method, import_named
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.kv_budget import check_kv_budget
from dynamic_llava.model.loading import check_learned, checkpoint_files
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.images import load_image

COMMANDS = "/image FILE (goes with the next question), /reset, /quit"
STOPPED = {"length": "(ends here for want of room or at --max-new-tokens)", "stopped": "(stopped)", "end": ""}


@dataclass(frozen=True)
class ChatOptions:
    """What the command line chooses; ValueError for values that are not possible."""

    model: str
    """Checkpoint folder or hub name, or the name of one that comes with the package."""
    images: tuple[Path, ...] = ()
    """Images that go with the first question."""
    sparsity: SparsityMode | None = None
    """Short for this setting of Dynamic-LLaVA; None is both, unless `method` says otherwise."""
    method: Mapping[str, Any] | None = None
    """What decides, as methods/registry.py reads it; None is Dynamic-LLaVA with the checkpoint's settings."""
    image_keep_rate: float | None = None
    """Share of each image's tokens that is kept; None is the checkpoint's, or the method's own."""
    output_keep_rate: float | None = None
    """Share of output tokens that is kept; None is what the method's own settings keep."""
    kv_budget: str | None = None
    """Bytes that the conversation's keys and values may fill at the end of each answer, such as 512MiB."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    """Seed of sampling, where the temperature is not 0."""
    color: ColorMode = "auto"

    def __post_init__(self) -> None:
        check_settings(self.max_new_tokens, self.temperature)
        check_one_rate(self.output_keep_rate, self.kv_budget)

    @property
    def asks_rate(self) -> bool:
        """Whether a share of output tokens is asked for, so that the share that is met is worth a word."""
        return self.output_keep_rate is not None or self.kv_budget is not None


class LineFeed:
    """Where questions come from."""

    def __init__(self, source: TextIO, *, interactive: bool) -> None:
        self._source, self.interactive = source, interactive

    def __iter__(self) -> Iterator[str]:
        """Yield stripped, non-empty lines until the end of the input (Ctrl-D)."""
        while True:
            try:
                line = input("> ") if self.interactive else self._source.readline()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print("\n(Ctrl-D or /quit ends the chat)")
                continue
            if not line and not self.interactive:
                return
            if line.strip():
                yield line.strip()


class Chat:
    """One chat: its conversation, its images that wait for a question, and how answers are written."""

    def __init__(
        self,
        conversation: Conversation,
        images: Sequence[Path],
        writer: Writer,
        *,
        interactive: bool,
        tells_rate: bool = False,
    ) -> None:
        self.conversation, self.writer, self.interactive = conversation, writer, interactive
        self.tells_rate = tells_rate
        """Whether the line below an answer says how many of its tokens are kept."""
        self.waiting: list[Path] = list(images)
        """Images for the next question."""
        self._latest = list(images)

    def run(self, lines: LineFeed) -> None:
        """Do what the lines say. ValueError or FileNotFoundError for a mistake, unless somebody can try again."""
        for line in lines:
            try:
                if line == "/quit":
                    return
                self._do(line)
            except (ValueError, FileNotFoundError) as error:
                if not self.interactive:
                    raise
                print(f"error: {error}")

    def _do(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/image":
            self._attach(Path(rest.strip()).expanduser())
        elif command == "/reset":
            self.conversation.reset()
            self.waiting = list(self._latest)
            self._say(f"a new conversation{_with_images(self.waiting)}")
        elif command.startswith("/"):
            raise ValueError(f"there is no command {command}; the commands are {COMMANDS}")
        else:
            self._answer(line)

    def _attach(self, path: Path) -> None:
        load_image(path)  # a mistake is told now, not with the question
        self.conversation.check_later_images()
        self.waiting.append(path)
        self._latest = list(self.waiting)
        self._say(f"the next question goes{_with_images(self.waiting)}")

    def _answer(self, question: str) -> None:
        text = AnswerText(self.conversation.processor.decode)

        def show(step: Step) -> None:
            if step.kept is not None:
                text.decide(step.kept)
            text.add(step.token)
            self.writer.show(text.pieces, str(step.use))

        with _stop_on_interrupt(self.interactive) as stop:
            try:
                answer = self.conversation.ask(question, self.waiting, on_step=show, stop=stop)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print("\n(torn off in the middle of a step: this is a new conversation)")
                self.waiting = list(self._latest)
                return
        self.waiting = []
        share = f", {sum(answer.kept)} of {len(answer.kept)} tokens of the answer" if self.tells_rate else ""
        self.writer.finish(text.pieces, f"{answer.use}{share} {STOPPED[answer.ended]}".rstrip())

    def _say(self, text: str) -> None:
        if self.interactive:
            print(f"({text})")


def chat(options: ChatOptions) -> None:
    """Load the model and chat on stdin and stdout. ValueError or FileNotFoundError for a mistake."""
    for image in options.images:
        load_image(image)
    model, processor, method = load(options)
    torch.manual_seed(options.seed)
    conversation = Conversation(
        model,
        processor,
        method=method,
        kv_budget=options.kv_budget,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
    )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    color = wants_color(options.color, sys.stdout, os.environ.get("NO_COLOR"))
    on_screen = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    writer = Screen(sys.stdout, color=color) if on_screen else Stream(sys.stdout, sys.stderr, color=color)
    if interactive:
        import readline  # noqa: F401  (editing and history for `input`)

        print(f"{options.model} on {model.device}, {describe_method(method)}{_with_images(options.images)}")
        print(f"{COMMANDS}; Ctrl-C stops an answer, Ctrl-D ends")
    lines = LineFeed(sys.stdin, interactive=interactive)
    Chat(conversation, options.images, writer, interactive=interactive, tells_rate=options.asks_rate).run(lines)


def find_checkpoint(name: str) -> str:
    """Return the folder or hub name of what a user calls a checkpoint; FileNotFoundError where there is none."""
    source = checkpoint_source(name)
    try:
        checkpoint_files(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {', '.join(SHIPPED)} is the model that ships with the package") from None
    except OSError as error:
        raise FileNotFoundError(f"{name} holds no checkpoint that can be read: {str(error).splitlines()[0]}") from None
    return source


def load(options: ChatOptions) -> tuple[Any, DynamicLlavaProcessor, Method]:
    """Return the model on the default device, in eval mode, its processor, and what decides.

    FileNotFoundError when there is no model; ValueError when it is dense and a method needs its predictors, and when a
    rate or a budget is given to one that is not calibrated.
    """
    name = options.model
    source = find_checkpoint(name)
    import_named(options.method)
    config = DynamicLlavaConfig.from_pretrained(source)
    rates = {"image_keep_rate": options.image_keep_rate, "output_keep_rate": options.output_keep_rate}
    method = choose_method(config.sparsity, sparsity=options.sparsity, method=options.method, **rates)
    if options.kv_budget is not None:
        check_kv_budget(options.kv_budget, config, method)
    check_learned(source, config, method, name)
    processor = DynamicLlavaProcessor.from_pretrained(source)  # first: it refuses before weights are read
    model = DynamicLlavaForConditionalGeneration.load_for(method, source, dtype="auto")
    return model.to(own_device()).eval(), processor, method


@contextmanager
def _stop_on_interrupt(active: bool) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C ask for a stop between two steps; a second one interrupts at once."""
    if not active:
        yield lambda: False
        return
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _with_images(images: Sequence[Path]) -> str:
    return f" with {', '.join(path.name for path in images)}" if images else ""
