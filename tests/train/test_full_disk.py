"""Whatever file of a run cannot be written, the command names it, ends with the promised code, and goes on later."""

import pathlib
import resource

import pytest

from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.files import EXIT_WRITE_FAILED
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import write_config
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    file, images = write_data(folder, samples=4)
    return RunConfig(
        name="full",
        model=ModelConfig(base=str(write_checkpoint(folder / "base"))),
        data=DataConfig(json=str(file), image_folder=str(images), max_length=400),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(batch_size=2, max_steps=2, log_every=1, save_every=1),
    )


@pytest.fixture
def command(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(start, tmp_path / "run.yaml")
    return ["run.yaml"]


FULL, READ_ONLY = OSError(28, "No space left on device"), OSError(30, "Read-only file system")
FILES = [
    ("run.lock", READ_ONLY), ("config.yaml", FULL), ("environment.json", FULL), ("metrics.jsonl", FULL),
    ("complete.json", FULL), ("run.yaml", FULL), ("trained_with.json", READ_ONLY), ("counts.json", FULL),
]  # fmt: skip
SHOWN = {"run.yaml": "unfinished", "trained_with.json": "unfinished", "counts.json": "sft"}
"""File -> the folder that is named in its place, for those that are written with others into a folder as a whole."""


@pytest.mark.parametrize(("name", "error"), FILES)
def test_every_file_of_a_run(command, monkeypatch, capsys, name, error):
    real = pathlib.Path.open

    def open_file(path, mode="r", *arguments, **settings):
        if path.name.removesuffix(".partial") == name and not mode.startswith("r"):
            raise error
        return real(path, mode, *arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(pathlib.Path, "open", open_file)
        assert main(command) == EXIT_WRITE_FAILED
    said = capsys.readouterr().err
    assert "could not be written" in said and "Traceback" not in said
    assert name in said or SHOWN[name] in said
    assert main(command) == 0, "with room the same command goes on"


def test_samples_that_cannot_be_prepared(command, capsys, own_cache):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert code == EXIT_WRITE_FAILED and f"{own_cache}/sft/" in said and "could not be written" in said
    assert main(command) == 0


@pytest.mark.parametrize("place", ["runs", "runs/full", "runs/full/checkpoint-1", "runs/full/model.old", "cache/sft"])
def test_a_file_where_a_folder_should_be(command, tmp_path, monkeypatch, capsys, place):
    """What stands in for a folder without permission: the tests may run as root, who has every one."""
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("in the way")
    code = main(command)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert (code == EXIT_WRITE_FAILED and place in said) or (code == 0 and place.endswith("model.old"))
