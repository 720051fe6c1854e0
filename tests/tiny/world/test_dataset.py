"""The world on disk: valid LLaVA data, the same every time, whole or absent, and never outside its folder."""

import hashlib
import json
import resource
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dynamic_llava.files import WriteError
from dynamic_llava.tiny.world import dataset
from dynamic_llava.tiny.world.dataset import build_world, image_path, load_truth
from dynamic_llava.tiny.world.scenes import render_scene, sample_scene
from dynamic_llava.tiny.world.texts import KINDS, NEGATIVES, describe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("worlds") / "small", train=24, test=40, seed=3)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_samples_are_valid_llava_data(folder):
    for split in ("train.json", "test.json"):
        samples = read(folder, split)
        assert len({s["id"] for s in samples}) == len(samples)
        for sample in samples:
            with Image.open(image_path(folder, sample["image"])) as image:
                assert image.size == (64, 64) and image.mode == "RGB"
            turns = sample["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n")
            assert sum(t["value"].count("<image>") for t in turns) == 1
            assert all(t["value"] for t in turns)


def test_train_split_has_single_questions_descriptions_and_genuine_turns(folder):
    samples = read(folder, "train.json")
    kinds = Counter(s["kind"] for s in samples)
    assert kinds["description"] == 24 and kinds["turns"] == 4
    assert sum(kinds[k] for k in KINDS) == 24
    for sample in samples:
        assert (len(sample["conversations"]) > 2) == (sample["kind"] == "turns")
    assert [s["image"] for s in samples] != sorted(s["image"] for s in samples)


def test_test_split_is_balanced(folder):
    samples = read(folder, "test.json")
    kinds = Counter(s["kind"] for s in samples)
    assert all(kinds[k] == 18 for k in KINDS if k != "exist") and kinds["description"] == 10
    existence = Counter((s["pope"], s["answer"]) for s in samples if s["kind"] == "exist")
    assert existence == {(n, a): 3 for n in NEGATIVES for a in ("Yes", "No")}
    assert all(s["answer"] == s["conversations"][1]["value"] for s in samples if "answer" in s)


def test_the_default_size_promises_enough():
    per_kind = int(0.45 * 800)
    assert 5 * per_kind + 6 * (per_kind // 5) >= 2000 and 800 // 4 >= 150


def test_truth_belongs_to_the_pictures(folder):
    truths = load_truth(folder)
    assert len(truths) == 64
    for i, name in enumerate(f"images/test_{i:06d}.png" for i in range(5)):
        rng = np.random.default_rng((102, 3, i))
        scene = sample_scene(rng)
        picture = render_scene(scene, rng)
        assert truths[name].scene == scene
        assert truths[name].patch_object == tuple(picture.patch_object)
        np.testing.assert_allclose(truths[name].patch_coverage, picture.patch_coverage, atol=1e-3)
        np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), picture.pixels)
    for sample in read(folder, "test.json"):
        scene = truths[sample["image"]].scene
        if sample["kind"] == "description":
            assert sample["conversations"][1]["value"] == describe(scene, sample["style"]).text
        else:
            assert all(i < len(scene.objects) for i in sample["referents"])


def test_splits_share_no_scene(folder):
    scenes = {name: truth.scene for name, truth in load_truth(folder).items()}
    train = {s for name, s in scenes.items() if "train" in name}
    assert not train & {s for name, s in scenes.items() if "test" in name}


def test_a_world_is_deterministic_and_built_once(folder, tmp_path):
    again = build_world(tmp_path / "again", train=24, test=40, seed=3)
    for name in ("train.json", "test.json", "scenes.json", "images/train_000007.png"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    before = (again / "train.json").stat().st_mtime_ns
    assert build_world(again, train=24, test=40, seed=3) == again
    assert (again / "train.json").stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_the_default_world_is_what_it_has_always_been(folder):
    """Digests of version 1: published numbers and checkpoints belong to these rows and pixels."""
    files = {name: folder / f"{name}.json" for name in ("train", "test", "scenes", "world")}
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    assert digests == {
        "train": "8ba02e8a1c507d9f", "test": "55d10c8b9a1c198a", "scenes": "37f1a942fcc9ac2f",
        "world": "27b125856b997788",
    }  # fmt: skip
    pixels = hashlib.sha256()
    for path in sorted((folder / "images").iterdir()):
        pixels.update(path.name.encode() + np.asarray(Image.open(path)).tobytes())
    assert pixels.hexdigest()[:16] == "641cd89bd52ea64d"


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    folder = build_world(train=1, test=4, seed=9)
    assert folder.parent == tmp_path / "cache" and (folder / "scenes.json").exists()


def test_other_contents_are_never_touched(folder, tmp_path):
    with pytest.raises(ValueError, match="another world"):
        build_world(folder, train=25, test=40, seed=3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        build_world(tmp_path, train=1, test=4)
    with pytest.raises(ValueError, match="is a file"):
        build_world(tmp_path / "notes.txt", train=1, test=4)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="train=0"):
        build_world(tmp_path / "none", train=0)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("dynamic_llava.tiny.world.dataset._test_samples", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_world(tmp_path / "world", train=1, test=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "images/../../secret.png"])
def test_image_names_stay_inside(folder, name):
    with pytest.raises(ValueError, match="leads out"):
        image_path(folder, name)
    assert image_path(folder, "images/test_000000.png").is_file()


def test_truth_of_a_missing_world_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="build_world"):
        load_truth(tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
from dynamic_llava.tiny.world import dataset
dataset._test_samples = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
dataset.build_world(Path(sys.argv[1]), train=1, test=16)
"""


def test_what_a_killed_build_has_left_is_removed(tmp_path):
    (tmp_path / "world.partial-4u_0old").mkdir()  # as earlier versions named it
    (tmp_path / "world.partial-4u_0old" / "images").mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "world")], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "world.partial" / "images").is_dir()
    build_world(tmp_path / "world", train=1, test=16)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_world_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(WriteError, match=r"world could not be written \(.*\): make room"):
            build_world(tmp_path / "world", train=1, test=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_world_that_lost_an_image_while_it_was_built_is_not_finished(tmp_path, monkeypatch):
    dump = dataset._dump

    def lose_one(path, content):
        (path.parent / "images" / "test_000003.png").unlink(missing_ok=True)
        dump(path, content)

    monkeypatch.setattr(dataset, "_dump", lose_one)
    with pytest.raises(WriteError, match=r"images/test_000003\.png was deleted while the world"):
        build_world(tmp_path / "world", train=1, test=16)
    assert list(tmp_path.iterdir()) == []


def test_of_processes_that_want_one_world_one_builds_it(tmp_path, monkeypatch):
    built, write = [], dataset._write_world

    def write_world(folder, *arguments):
        built.append(folder)
        write(folder, *arguments)

    monkeypatch.setattr(dataset, "_write_world", write_world)
    with ThreadPoolExecutor(3) as threads:
        folders = list(threads.map(lambda _: build_world(tmp_path / "world", train=1, test=16), range(3)))
    assert folders == [tmp_path / "world"] * 3 and len(built) == 1
