"""A finished run is never trained over by accident: the same command has nothing to do, another one is refused."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.files import Lock
from dynamic_llava.tiny.job.config import JobConfig, TinyJobConfig
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import RunConfig, changes, compared_settings
from dynamic_llava.train.finished import MODEL_RECORD
from dynamic_llava.train.run import run, write_config
from tests.builders import TINY_SPARSITY
from tests.sft_builders import picture, write_checkpoint, write_data


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    file, images = write_data(folder, samples=8)
    return RunConfig(
        name="done",
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(write_checkpoint(folder / "base"))),
        data=DataConfig(json=str(file), image_folder=str(images), max_length=400),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(batch_size=4, max_steps=2, learning_rate=1e-3, log_every=1),
    )


@pytest.fixture(scope="module")
def done(start):
    """A finished run without a checkpoint, the state that an ordinary run leaves."""
    result = run(start)
    assert not list(result.run_folder.glob("checkpoint-*"))
    return result


@pytest.fixture
def copy(start, done, tmp_path):
    """The same run elsewhere, to be changed."""
    shutil.copytree(done.run_folder, tmp_path / "runs" / "done")
    return replace(start, output_folder=str(tmp_path / "runs"))


def files_of(config):
    return {path: path.read_bytes() for path in config.folder.rglob("*") if path.is_file()}


def test_the_same_command_has_nothing_to_do(copy, done, tmp_path, capsys, caplog):
    write_config(copy, tmp_path / "same.yaml")
    before, pages = files_of(copy), set()
    for more in ([], ["--train.log-every", "7"], ["--train.batch-size", "2", "--train.gradient-accumulation", "2"]):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert main([str(tmp_path / "same.yaml"), *more]) == 0
        assert "done: finished already, nothing to do; the model is" in caplog.text
        assert str(copy.folder / "model") in capsys.readouterr().out
        after = files_of(copy)
        pages.add(after.pop(copy.folder / "report.html"))  # made of the other files, so a lost one is made again
        assert after == before
    assert len(pages) == 1
    again = run(copy)
    assert again.history == done.history and again.metrics["steps"] == 2
    assert again.metrics["lm_loss"] == done.metrics["lm_loss"] and again.metrics["train_seconds"] > 0


OTHERS = {
    "learning rate": (["--train.learning-rate", "1e-4"], r"train\.learning_rate was 0\.001 and is 0\.0001"),
    "steps": (["--train.max-steps", "3"], r"train\.max_steps was 2 and is 3"),
    "batch": (["--train.batch-size", "2"], "samples per optimizer step was 4 and is 2"),
    "seed": (["--seed", "5"], r"train\.seed was 0 and is 5"),
    "sparsity": (["--sparsity.image-keep-rate", "0.9"], r"sparsity\.image_keep_rate was 0\.25 and is 0\.9"),
    "tune": (["--train.tune", "lora"], "lora.* was None and is 128"),
    "no resume": (["--train.no-resume", "--seed", "5"], r"train\.seed was 0 and is 5"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused_and_nothing_is_touched(copy, tmp_path, capsys, other):
    arguments, message = OTHERS[other]
    write_config(copy, tmp_path / "same.yaml")
    before = files_of(copy)
    assert main([str(tmp_path / "same.yaml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "holds a finished model of another run" in error and "--train.overwrite" in error and "--name NEW" in error
    assert files_of(copy) == before


RECORDS = {
    "no object": ({"inputs": ["a", 1]}, "does not say how the model was trained: TypeError"),
    "a long value": ({"settings": {"train.learning_rate": 5000 * "x"}}, r"train\.learning_rate was 'xx.*\.\.\..*x'"),
    "what cannot be printed": ({"inputs": {"data.json": "\ud800"}}, r"data\.json was '\\ud800'"),
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_says_anything_is_refused_in_short(copy, tmp_path, capsys, record):
    changed, message = RECORDS[record]
    path = copy.folder / "model" / "trained_with.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    write_config(copy, tmp_path / "same.yaml")
    assert main([str(tmp_path / "same.yaml")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error) < 4000, error
    error.encode()


def test_other_content_under_the_same_names_is_refused(copy, start, tmp_path):
    images = shutil.copytree(start.data.image_folder, tmp_path / "images")
    picture(5, (90, 90)).save(images / "1.png")
    with pytest.raises(ValueError, match=r"data\.image_folder was 8 images of .* and is 8 images of "):
        run(replace(copy, data=replace(copy.data, image_folder=str(images))))


def test_both_ways_out_work(copy, done):
    other = replace(copy, train=replace(copy.train, seed=5, save_every=1))
    assert run(replace(other, name="new")).history != done.history
    # Over a finished model whose checkpoint must not be resumed from.
    run(replace(copy, name="new", train=replace(other.train, overwrite=True)))
    over = replace(other, name="new", train=replace(other.train, seed=6, overwrite=True))
    result = run(over)
    assert json.loads((over.folder / "environment.json").read_text())["resumed_from_step"] is None
    assert [line["step"] for line in result.history] == [1, 2] and over.folder.joinpath("model").is_dir()
    assert run(replace(over, train=replace(over.train, overwrite=False))).history == result.history


def test_overwriting_removes_nothing_before_all_mistakes_are_found(copy, tmp_path):
    before = files_of(copy)
    broken = shutil.copytree(copy.model.base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError):
        run(replace(copy, model=ModelConfig(base=str(broken)), train=replace(copy.train, overwrite=True)))
    assert files_of(copy) == before


def test_models_of_earlier_versions(copy):
    """They say their settings only, or nothing."""
    (copy.folder / "model" / MODEL_RECORD).unlink()
    assert run(copy).metrics["steps"] == 2
    with pytest.raises(ValueError, match=r"train\.seed was 0 and is 1"):
        run(replace(copy, train=replace(copy.train, seed=1)))
    (copy.folder / "model" / "run.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no run\.yaml that says how it was trained; move .* away"):
        run(copy)


@pytest.mark.parametrize("damage", [b"\xff\xfe{", b"{", b"[]"], ids=["no UTF-8", "cut", "no object"])
def test_a_damaged_record_is_named(copy, damage):
    record = copy.folder / "model" / MODEL_RECORD
    record.write_bytes(damage)
    with pytest.raises(ValueError, match="does not say how the model was trained") as error:
        run(copy)
    assert str(error.value).startswith(str(record))


def test_two_processes_do_not_train_in_one_folder(copy, tmp_path, capsys):
    write_config(copy, tmp_path / "same.yaml")
    with Lock(copy.folder / "run.lock", "training"):
        assert main([str(tmp_path / "same.yaml")]) == 2
    assert f"training in {copy.folder}: process " in capsys.readouterr().err
    assert main([str(tmp_path / "same.yaml")]) == 0
    assert not (copy.folder / "run.lock").exists()


VARIANTS = [
    {},
    {"model": ModelConfig(base="other")},
    {"data": DataConfig(json="b/data.json")},
    {"data": DataConfig(json="data.json")},
    {"data": DataConfig(json="a/data.json", text_only="dense")},
    {"sparsity": SparsityConfig(image_keep_rate=0.3)},
    {"train": TrainConfig(seed=1)},
    {"train": TrainConfig(sparsity_mode="none")},
    {"train": TrainConfig(tune="lora")},
    {"train": TrainConfig(tune="lora"), "lora": LoraConfig(rank=8)},
]
JOBS = [TinyJobConfig(), TinyJobConfig(questions=100)]


def test_runs_without_a_name_never_share_a_folder():
    unnamed = RunConfig(data=DataConfig(json="a/data.json"))
    names = [replace(unnamed, **variant).run_name for variant in VARIANTS]
    names += [JobConfig(tiny=job).run_name for job in JOBS]
    assert len(set(names)) == len(VARIANTS) + len(JOBS)
    assert all(re.fullmatch(r"(data|run)-\w{8}", name) for name in names), names
    same = [TrainConfig(resume=False), TrainConfig(batch_size=2), TrainConfig(log_every=1), TrainConfig(save_every=5)]
    assert {replace(unnamed, train=train).run_name for train in same} == {unnamed.run_name}
    assert RunConfig().run_name.startswith("run-") and replace(unnamed, name="mine").run_name == "mine"


def test_a_run_without_a_name_finds_its_folder_again(start, tmp_path):
    unnamed = replace(start, name="", output_folder=str(tmp_path))
    result = run(unnamed)
    assert result.run_folder.name == unnamed.run_name and run(unnamed).history == result.history
    other = run(replace(unnamed, train=replace(unnamed.train, seed=1)))
    assert other.run_folder != result.run_folder
    assert load_file(result.folder / "model.safetensors").keys() == load_file(other.folder / "model.safetensors").keys()


def test_what_earlier_versions_recorded_of_a_section_that_is_gone_makes_no_other_run():
    now = compared_settings(RunConfig(), 1)
    assert changes({**now, "tiny": None}, now) == []
    assert changes({**now, "tiny.seeds": 2}, now) == ["tiny.seeds was 2 and is None"]
