"""The tiny world as real files in LLaVA's format: images/*.png, train.json, test.json, and scenes.json with the truth.

    folder = build_world()                  # in the cache, seconds; a finished world is found again
    train.json, test.json                   # [{"id", "image": "images/...", "conversations": [...], "kind", ...}]
    scenes.json                             # objects and patch owners per image; for evaluation only, never an input

Training and evaluation read these files like any other LLaVA data. Image names are relative to the world's folder.
"""

import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dynamic_llava.config import cache_folder
from dynamic_llava.files import Lock, writing
from dynamic_llava.tiny.world.long import LONG_KINDS, describe_long, sample_long_request, sample_long_scene
from dynamic_llava.tiny.world.scenes import GRID, PATCH_SIZE, Picture, Scene, SceneObject, render_scene, sample_scene
from dynamic_llava.tiny.world.texts import KINDS, NEGATIVES, Description, ShortQuestion, ask, describe, sample_request

FORMAT_VERSION = 1
MARKER = "world.json"
_SPLIT_KEYS = {"train": 101, "test": 102}  # first part of each picture's seed: the splits share no scene
_MULTI_TURN_EVERY = 6
_QUESTIONS_PER_IMAGE = 0.45
_IMAGES_PER_DESCRIPTION = 4

Sample = dict[str, Any]


@dataclass(frozen=True)
class World:
    """What a world is made of."""

    kinds: tuple[str, ...]
    """Kinds of its short questions."""
    scene: Callable[[np.random.Generator], Scene]
    request: Callable[[np.random.Generator], tuple[str, str]]
    """Draws a style of descriptions and a request for it."""
    describe: Callable[[Scene, str], Description]
    question_every: int = 1
    """Of how many training images one has a short question: where descriptions are long, few fill the batches."""


WORLDS = {
    "default": World(KINDS, sample_scene, sample_request, describe),
    "long": World(LONG_KINDS, sample_long_scene, sample_long_request, describe_long, question_every=4),
}
"""The worlds by name. default: one to four objects, told in 50 to 100 tokens; long: four to seven, in 100 to 250."""


@dataclass(frozen=True)
class Truth:
    """What is in one picture.

    patch_object: 64 ints in row-major order, index of the owning object or -1; patch_coverage: its share of the patch.
    """

    scene: Scene
    patch_object: tuple[int, ...]
    patch_coverage: tuple[float, ...]


def build_world(
    root: Path | None = None, train: int = 5000, test: int = 800, seed: int = 0, world: str = "default"
) -> Path:
    """Writes a world of `train` and `test` images and returns its folder; a finished one is returned as it is.

    `world` is one of WORLDS. Without `root` the folder lies in the cache and its name states the arguments. Per
    training image there is one description and one short question (in the long world for every fourth), for every
    sixth also a conversation of several turns. The test split has 0.45 short questions per image and kind (existence:
    0.54, as POPE's three balanced subsets) and a description for every fourth image: 2,232 questions and 200
    descriptions at the default size (1,872 questions in the long world).

    The folder appears as a whole or not at all; of processes that want the same world at once one builds it. Raises
    ValueError for an unknown world, for sizes that are not positive, and where `root` holds something else; WriteError
    for a full disk.
    """
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; allowed: {', '.join(WORLDS)}")
    if train < 1 or test < _IMAGES_PER_DESCRIPTION:
        raise ValueError(f"got train={train}, test={test} images; need train >= 1, test >= {_IMAGES_PER_DESCRIPTION}")
    arguments: dict[str, Any] = {"format": FORMAT_VERSION, "train": train, "test": test, "seed": seed}
    name = f"tiny_world_v{FORMAT_VERSION}_{train}_{test}_{seed}"
    if world != "default":
        arguments["world"], name = world, f"{name}_{world}"
    folder = cache_folder() / name if root is None else Path(root)
    if _finished(folder, arguments):
        return folder
    lock = Lock(folder.with_name(f"{folder.name}.lock"), f"building the tiny world {folder}").take(wait=True)
    try:
        if not _finished(folder, arguments):
            _build(folder, arguments)
    finally:
        lock.release()
    return folder


def _build(folder: Path, arguments: dict[str, Any]) -> None:
    """Write a world under its name as a whole; what killed builds have left beside it goes first."""
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        for left in folder.parent.glob(f"{glob.escape(folder.name)}.partial*"):
            shutil.rmtree(left)
        try:
            partial.mkdir()
            _write_world(partial, arguments, WORLDS[arguments.get("world", "default")])
            _dump(partial / MARKER, arguments)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def image_path(folder: Path, name: str) -> Path:
    """The file of an image named in train.json or test.json; ValueError where the name leads out of the folder."""
    base = Path(folder).resolve()
    path = (base / name).resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"image name {name!r} leads out of {base}; names are relative to the world's folder")
    return path


def load_truth(folder: Path) -> dict[str, Truth]:
    """Truth by image name, for evaluation; FileNotFoundError where `folder` is no finished world."""
    path = Path(folder) / "scenes.json"
    if not path.is_file():
        raise FileNotFoundError(f"no scenes.json in {folder}; build the world with build_world() and give its folder")
    content = json.loads(path.read_text(encoding="utf-8"))
    return {name: _truth(entry) for name, entry in content["images"].items()}


def _truth(entry: dict[str, Any]) -> Truth:
    fields = ("color", "shape", "size", "x", "y", "radius")
    objects = tuple(SceneObject(**{name: o[name] for name in fields}) for o in entry["objects"])
    scene = Scene(objects, entry["background"])
    return Truth(scene, tuple(entry["patch_object"]), tuple(entry["patch_coverage"]))


def _finished(folder: Path, arguments: dict[str, Any]) -> bool:
    """Whether the folder holds this very world; ValueError where it holds something else."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the path of a folder that does not exist yet")
    marker = folder / MARKER
    if marker.is_file():
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found == arguments:
            return True
        raise ValueError(f"{folder} holds another world ({found}) than asked for ({arguments}); give another folder")
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no finished world; give an empty or new folder")
    return False


def _write_world(folder: Path, arguments: dict[str, Any], world: World) -> None:
    (folder / "images").mkdir()
    truths: dict[str, Any] = {}
    for split in ("train", "test"):
        scenes: dict[str, Scene] = {}
        for name, scene, picture in _pictures(split, arguments[split], arguments["seed"], world):
            Image.fromarray(picture.pixels).save(folder / name, compress_level=1)
            scenes[name] = scene
            truths[name] = {
                **scene.to_dict(),
                "patch_object": picture.patch_object.tolist(),
                "patch_coverage": [round(float(c), 3) for c in picture.patch_coverage],
            }
        rng = np.random.default_rng((_SPLIT_KEYS[split], arguments["seed"]))
        samples = (_train_samples if split == "train" else _test_samples)(scenes, rng, world)
        _dump(folder / f"{split}.json", samples)
    _dump(folder / "scenes.json", {"grid": GRID, "patch_size": PATCH_SIZE, "images": truths})
    lost = next((name for name in truths if not (folder / name).is_file()), None)
    if lost is not None:  # a world that is finished is never looked through again
        raise FileNotFoundError(errno.ENOENT, f"{lost} was deleted while the world was being built")


def _pictures(split: str, count: int, seed: int, world: World) -> Iterator[tuple[str, Scene, Picture]]:
    for i in range(count):
        rng = np.random.default_rng((_SPLIT_KEYS[split], seed, i))
        scene = world.scene(rng)
        yield f"images/{split}_{i:06d}.png", scene, render_scene(scene, rng)


def _train_samples(scenes: dict[str, Scene], rng: np.random.Generator, world: World) -> list[Sample]:
    """Shuffled, so that any first part of the file is a fair sample."""
    samples = []
    for i, (name, scene) in enumerate(scenes.items()):
        if i % world.question_every == 0:
            question = _ask_first(scene, i // world.question_every, rng, world.kinds)
            samples.append(_sample(name, question.kind, [(question.text, question.answer)]))
        samples.append(_described(name, scene, rng, world))
        if i % _MULTI_TURN_EVERY == 0:
            samples.append(_sample(name, "turns", _several_turns(scene, rng, world)))
    return [samples[i] for i in rng.permutation(len(samples))]


def _described(name: str, scene: Scene, rng: np.random.Generator, world: World) -> Sample:
    style, request = world.request(rng)
    return _sample(name, "description", [(request, world.describe(scene, style).text)], style=style)


def _ask_first(scene: Scene, number: int, rng: np.random.Generator, kinds: tuple[str, ...]) -> ShortQuestion:
    """A question of the kind whose turn it is, or of the next kind that the scene allows (size always does)."""
    asked = (ask(scene, kinds[(number + shift) % len(kinds)], rng) for shift in range(len(kinds)))
    return next(question for question in asked if question is not None)


def _several_turns(scene: Scene, rng: np.random.Generator, world: World) -> list[tuple[str, str]]:
    """Two or three turns about one picture; half of the conversations close with a description."""
    questions: dict[str, str] = {}
    closing = rng.random() < 0.5
    wanted = int(rng.integers(1, 3)) if closing else int(rng.integers(2, 4))
    for kind in rng.permutation(len(world.kinds)):
        question = ask(scene, world.kinds[int(kind)], rng)
        if question is not None and len(questions) < wanted:
            questions[question.text] = question.answer
    turns = list(questions.items())
    if closing:
        style, request = world.request(rng)
        turns.append((request, world.describe(scene, style).text))
    return turns


def _test_samples(scenes: dict[str, Scene], rng: np.random.Generator, world: World) -> list[Sample]:
    names = list(scenes)
    per_kind = max(1, int(_QUESTIONS_PER_IMAGE * len(names)))
    samples = []
    for kind in (k for k in world.kinds if k != "exist"):
        samples += [_test_question(*pair) for pair in _spread(scenes, kind, per_kind, rng)]
    for negative in NEGATIVES:
        for present in (True, False):
            chosen = _spread(scenes, "exist", max(1, per_kind // 5), rng, present=present, negative=negative)
            samples += [_test_question(name, question, subset=negative) for name, question in chosen]
    for name in names[::_IMAGES_PER_DESCRIPTION]:
        samples.append(_described(name, scenes[name], rng, world))
    for number, sample in enumerate(samples):
        sample["id"] = f"test_{number:05d}_{sample['kind']}"
    return samples


def _spread(
    scenes: dict[str, Scene], kind: str, count: int, rng: np.random.Generator, **how: Any
) -> list[tuple[str, ShortQuestion]]:
    """`count` questions of one kind, on different images as long as there are enough that allow it."""
    names, found = list(scenes), []
    for _ in range(20):
        for i in rng.permutation(len(names)):
            question = ask(scenes[names[int(i)]], kind, rng, **how)
            if question is not None:
                found.append((names[int(i)], question))
            if len(found) == count:
                return found
    raise ValueError(f"{len(names)} test images give too few questions of kind {kind!r}; ask for more test images")


def _test_question(name: str, question: ShortQuestion, subset: str | None = None) -> Sample:
    extra: dict[str, Any] = {"answer": question.answer, "referents": list(question.referents)}
    if subset is not None:
        extra["pope"] = subset
    return _sample(name, question.kind, [(question.text, question.answer)], **extra)


def _sample(name: str, kind: str, turns: list[tuple[str, str]], **extra: Any) -> Sample:
    conversations = []
    for number, (question, answer) in enumerate(turns):
        value = question if number else f"<image>\n{question}"
        conversations += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": f"{Path(name).stem}_{kind}", "image": name, "conversations": conversations, "kind": kind, **extra}


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
