"""One look: the questions are asked by each method in turn, and what they kept is written down.

Shape suffixes: I images, n image tokens.
"""

import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dynamic_llava.chat.conversation import CacheUse, Conversation, Step, check_settings
from dynamic_llava.chat.session import STOPPED, find_checkpoint
from dynamic_llava.chat.terminal import AnswerText, Piece, Stream, printable, wants_color
from dynamic_llava.config import SHIPPED
from dynamic_llava.eval.shard import own_device
from dynamic_llava.methods import Cut, Dense, Dynamic, ImageTokens, Method, describe_method, import_named
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.loading import check_learned, cuts_of
from dynamic_llava.model.switches import choose_method
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.images import load_image
from dynamic_llava.projectors import STRATEGIES, BlockProjector, find_projector, grid_of, image_tokens
from dynamic_llava.sparsity import keep_margin
from dynamic_llava.tiny.world.scenes import sample_pictures

QUESTION = "Describe the image in detail."
SCENE = "scene.png"
"""Name of the shipped model's own scene in the output folder."""
_SCENE_SEED = (103, 0)
"""The splits of the tiny world begin with 101 and 102 (tiny/world/dataset.py): no model has seen this scene."""
_UNTRAINED = "fastv"
"""What decides beside the dense method where a checkpoint was trained for nothing: it needs no training."""


@dataclass(frozen=True)
class LookOptions:
    """What the command line chooses; ValueError for values that are not possible."""

    model: str = "tiny"
    images: tuple[Path, ...] | None = None
    """Images of the first question; None is a scene of the shipped model's world."""
    ask: str | None = None
    turns: Path | None = None
    """File of further questions, one a line."""
    methods: tuple[Mapping[str, Any], ...] | None = None
    """What decides, each as methods/registry.py reads it."""
    max_new_tokens: int = 256
    output_folder: Path = Path("runs/look")

    def __post_init__(self) -> None:
        check_settings(self.max_new_tokens, 0.0)
        if self.images is None and self.model not in SHIPPED:
            raise ValueError(f"--image is missing: {self.model} needs one; only the shipped model brings its own")


@dataclass(frozen=True)
class PatchGrid:
    """Where image tokens lie on an image."""

    rows: int
    columns: int
    first: int = 0
    """Tokens before the first patch's: 1 where the class token comes along."""

    def patches(self, tokens: Sequence[int]) -> list[int]:
        """Return the patches of an image's tokens, row by row."""
        return [token - self.first for token in tokens if token >= self.first]


@dataclass(frozen=True)
class SeenTurn:
    """One question and its answer."""

    question: str
    pieces: list[Piece]
    """The answer's text, with what was dropped of it."""
    kept: list[bool]
    """One decision for each token of the answer but the last, which nothing has decided about."""
    tokens: int
    ended: str
    """Why it ended, in words; empty where it ended by itself."""

    @property
    def counts(self) -> str:
        """What was kept, in words."""
        said = f"{sum(self.kept)} of {len(self.kept)} answer tokens kept"
        return f"{said}; {self.ended}" if self.ended else said


@dataclass(frozen=True)
class Sight:
    """What one method kept."""

    label: str
    described: str
    """The method with all its settings."""
    image_tokens: list[int]
    """Per image, how many there are."""
    kept: list[list[int]]
    """Per image, the offsets of the tokens that stay to the last layer: the record's image_indices."""
    seen: list[list[float]]
    """Per image and token, the share of the language model's layers that see it."""
    chance: list[list[float]] | None
    """Per image and token, the keep probability; None where the method has none."""
    turns: list[SeenTurn] = field(default_factory=list)
    sparse_lengths: list[int] = field(default_factory=list)
    """Tokens in the cache behind the last cut as each token was chosen."""
    dense_lengths: list[int] = field(default_factory=list)
    """The same of a dense cache."""
    use: CacheUse | None = None
    """The cache at the end."""
    evicts: bool = False


@dataclass(frozen=True)
class Looked:
    """All that the pictures and the page are made of."""

    model: str
    device: str
    images: list[tuple[str, Image.Image]]
    """Name and pixels of each, as the processor read it."""
    grid: PatchGrid | None
    """None where image tokens belong to no place."""
    sights: list[Sight]


@dataclass(frozen=True)
class Watched(Dynamic):
    """Dynamic-LLaVA that notes the keep probabilities it decides by."""

    noted: list[list[float]] = field(default_factory=list, compare=False)

    @classmethod
    def of(cls, method: Dynamic) -> "Watched":
        """Return the same method, watched."""
        return cls(**{one.name: getattr(method, one.name) for one in fields(method) if one.init})

    def keep_image(self, cut: Cut, images: ImageTokens, learned: Any) -> Tensor:
        """(I, n) bool, as Dynamic-LLaVA decides."""
        if self.sparsifies_image:
            chance_In = keep_margin(learned.image_predictor(images.hidden, images.valid)).float().sigmoid()
            self.noted.extend(row[valid].tolist() for row, valid in zip(chance_In, images.valid, strict=True))
        return super().keep_image(cut, images, learned)


def look(options: LookOptions) -> Looked:
    """Ask by each method, and print the answers as they grow; returns what pictures and page show (writing.py).

    Raises ValueError or FileNotFoundError for a mistake, before anything is computed where it can be known then.
    """
    questions, images = _questions(options), _images(options)
    model, processor, methods = _load(options)
    grid = patch_grid(model.config)
    writer = Stream(sys.stdout, sys.stderr, color=wants_color("auto", sys.stdout, os.environ.get("NO_COLOR")))
    sights = []
    for label, method in methods.items():
        print(f"\n{printable(label)}:", flush=True)
        sights.append(see(model, processor, label, method, questions, images, options.max_new_tokens, writer))
    return Looked(printable(options.model), str(model.device), images, grid, sights)


def see(
    model: Any,
    processor: DynamicLlavaProcessor,
    label: str,
    method: Method,
    questions: Sequence[str],
    images: Sequence[tuple[str, Image.Image]],
    max_new_tokens: int,
    writer: Stream,
) -> Sight:
    """Ask all questions on one cache by one method, the images with the first; the answers are written as they grow."""
    watched = Watched.of(method) if type(method) is Dynamic else method
    chat = Conversation(model, processor, method=watched, max_new_tokens=max_new_tokens)
    steps: list[Step] = []
    turns: list[SeenTurn] = []
    for question in questions:
        text = AnswerText(processor.decode)

        def show(step: Step, text: AnswerText = text) -> None:
            if step.kept is not None:
                text.decide(step.kept)
            text.add(step.token)
            steps.append(step)
            writer.show(text.pieces, "")

        try:
            answer = chat.ask(question, [] if turns else [image for _, image in images], on_step=show)
        except ValueError as error:
            if not chat.turns:  # the first question, or the conversation has been begun anew
                raise
            print(f"not asked: {printable(question)} ({error})", file=sys.stderr)
            turns.append(SeenTurn(printable(question), [], [], 0, f"not asked: {error}"))
            continue
        writer.finish(text.pieces, f"{answer.use} {STOPPED[answer.ended]}".rstrip())
        ended = STOPPED[answer.ended].strip("()")
        turns.append(SeenTurn(printable(question), text.pieces, answer.kept, len(answer.tokens), ended))
    kept, seen = _decisions(chat, len(images))
    return Sight(
        label=printable(label),
        described=printable(describe_method(method)),
        image_tokens=[len(one) for one in seen],
        kept=kept,
        seen=seen,
        chance=watched.noted if isinstance(watched, Watched) and watched.noted else None,
        turns=turns,
        sparse_lengths=[step.use.sparse_tokens for step in steps],
        dense_lengths=[step.use.dense_tokens for step in steps],
        use=steps[-1].use,
        evicts=method.evicts,
    )


def patch_grid(config: Any) -> PatchGrid | None:
    """Return where the image tokens of a model lie; None where its projector makes, or its method adds, some of no
    place.
    """
    projector, (rows, columns) = find_projector(config.projector), grid_of(config)
    if getattr(config, "added_image_tokens", 0):
        return None
    if projector.per_patch:
        return PatchGrid(rows, columns, int(STRATEGIES[config.vision_feature_select_strategy]))
    if issubclass(projector, BlockProjector):
        return PatchGrid(rows // projector.scale, columns // projector.scale)
    return None


def _decisions(chat: Conversation, images: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return what was kept of each image, and the share of the layers that see each of its tokens."""
    record = chat.record
    if record is None:
        count = image_tokens(chat.model.config)
        return [list(range(count))] * images, [[1.0] * count] * images
    untils = record.until[record.layout.is_image].split(record.layout.image_lengths().tolist())
    return record.rows[0].image_indices, [[float(one) / record.layers for one in each] for each in untils]


def _questions(options: LookOptions) -> list[str]:
    questions = [] if options.ask is None else [options.ask]
    if options.turns is not None:
        try:
            lines = options.turns.read_bytes().decode("utf-8-sig").splitlines()
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no file {options.turns} of questions (--turns)") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{options.turns} is not written in UTF-8 ({error}); save it as UTF-8") from None
        asked = [line.strip() for line in lines if line.strip()]
        if not asked:
            raise ValueError(f"{options.turns} holds no question; write one a line")
        questions += asked
    for question in questions:
        if not question.strip():
            raise ValueError("the question is empty; ask something")
        if odd := [one for one in question if unicodedata.category(one) in ("Cc", "Cs") and not one.isspace()]:
            raise ValueError(f"the question {question!r} holds {odd[0]!r}, which is no text; leave it out")
    return questions or [QUESTION]


def _images(options: LookOptions) -> list[tuple[str, Image.Image]]:
    if options.images is not None:
        return [(printable(path.name), load_image(path)) for path in options.images]
    _, pictures = sample_pictures(1, _SCENE_SEED)
    return [(SCENE, Image.fromarray(np.asarray(pictures[0].pixels)))]


def _load(options: LookOptions) -> tuple[Any, DynamicLlavaProcessor, dict[str, Method]]:
    """Return the model on the default device, in eval mode, its processor, and the methods by their labels."""
    source = find_checkpoint(options.model)
    for spelled in options.methods or ():
        import_named(spelled)
    config = DynamicLlavaConfig.from_pretrained(source)
    methods = _methods(options, source, config)
    for method in methods.values():
        cuts_of(method, config.text_config.num_hidden_layers)
        check_learned(source, config, method, options.model)
    processor = DynamicLlavaProcessor.from_pretrained(source)  # first: it refuses before weights are read
    learned = next((one for one in methods.values() if one.used_parts), next(iter(methods.values())))
    model = DynamicLlavaForConditionalGeneration.load_for(learned, source, dtype="auto")
    return model.to(own_device()).eval(), processor, methods


def _methods(options: LookOptions, source: str, config: Any) -> dict[str, Method]:
    """Return the methods that are named, or the dense one and what the checkpoint was trained for."""
    if options.methods is None:
        own = choose_method(config.sparsity)
        try:
            check_learned(source, config, own, options.model)
        except ValueError:
            said = f"{options.model} was trained for no method, so {_UNTRAINED} decides, which needs no training"
            print(f"{said}; --method names others", file=sys.stderr)
            own = choose_method(config.sparsity, method=_UNTRAINED)
        return {Dense.name: Dense(), own.name: own}
    found: dict[str, Method] = {}
    for spelled in options.methods:
        settings = [f"{name} {value}" for name, value in spelled.items() if name != "name"]
        label = f"{spelled['name']} ({', '.join(settings)})" if settings else str(spelled["name"])
        if label in found:
            raise ValueError(f"--method {label} is given twice; name it once, or with other settings")
        found[label] = choose_method(config.sparsity, method=spelled)
    return found
