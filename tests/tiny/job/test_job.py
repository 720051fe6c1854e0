"""The main job's course with trainings that only copy a random checkpoint: files, several seeds, resuming."""

import json
import shutil
from dataclasses import fields, replace

import pytest
from safetensors import safe_open

from dynamic_llava.cli import read_yaml
from dynamic_llava.config import ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.config.run import RunConfig
from dynamic_llava.files import Lock
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.tiny.job import job, rivals
from dynamic_llava.tiny.job.config import JobConfig, TinyJobConfig
from dynamic_llava.tiny.job.job import main
from dynamic_llava.tiny.job.report import job_report
from dynamic_llava.train.run import RunResult, write_config
from tests.tiny_pipeline import SPARSITY, write_checkpoint

TINY = TinyJobConfig(
    train_images=2, test_images=16, questions=12, descriptions=3, uncached_questions=3, uncached_descriptions=1,
    batch_size=12, description_tokens=6, timing_batch=1, timing_tokens=1, timing_repeats=1, dynamic_image=False,
    picture_scenes=2, picture_answers=1, rivals="",
)  # fmt: skip


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Replace training; returns the list of (name, mode, seed, base) that were asked for."""
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    asked = []

    def copy(config):
        asked.append((config.name, config.train.sparsity_mode, config.train.seed, config.model.base))
        folder = config.folder / "model"
        shutil.copytree(tmp_path / "base", folder, dirs_exist_ok=True)
        write_config(config, config.folder / "config.yaml")
        history = [
            {"step": step, "lm_loss": 1.0, "image_keep_rate": 0.2, "output_keep_rate": 0.1 * step} for step in range(10)
        ]
        return RunResult(folder, config.folder, {"lm_loss": 1.0}, history)

    monkeypatch.setattr(job, "run", copy)
    return asked


@pytest.fixture
def config(tmp_path):
    write_checkpoint(tmp_path / "base", 0)
    return JobConfig(
        name="job",
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(tmp_path / "base")),
        sparsity=SparsityConfig(**SPARSITY),
        train=TrainConfig(seed=4),
        tiny=TINY,
    )


def test_one_seed_writes_everything_and_says_where(config, trained, capsys, caplog):
    folder = main(config)
    assert "of which tiny.description_tokens=6 lets a model say the first" in caplog.text
    assert [entry[:3] for entry in trained] == [("both", "both", 4), ("control", "none", 4)]
    for name in ("config.yaml", "metrics.jsonl", "results.json", "table.md"):
        assert (folder / name).is_file() and (folder / "seed4" / name).is_file()
    pictures = {path.name for path in (folder / "seed4" / "pictures").iterdir()}
    assert pictures == {"kept_patches.png", "greyed_answers.png", "keep_rate_by_word.png", "training_curves.png"}
    result = json.loads((folder / "results.json").read_text())["seeds"][0]
    assert result["seed"] == 4 and result["training"] == {"image": pytest.approx(0.2), "output": pytest.approx(0.85)}
    assert result["environment"]["torch"] and len(result["rows"]) == 17 and result["world"] == "default"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {(line["seed"], line["training"]) for line in lines} == {(4, "both"), (4, "control")}
    printed = capsys.readouterr().out
    assert str(folder / "table.md") in printed and str(folder / "seed4" / "pictures") in printed
    said = printed.strip().splitlines()
    assert said[-1] == f"report: {folder / 'report.html'}"
    for line, name in zip(said[-7:-2], ("short answers", "descriptions", "kept", "cost", "targets"), strict=True):
        assert line.startswith(name)
    assert "| row" not in printed  # whole tables are in the files
    page = (folder / "report.html").read_bytes()
    assert job_report(folder).page().encode() == page and not job_report(folder).problems
    assert b"Dynamic I|T, no cache" in page and b"Made with" in page and b"keep rate by word" in page
    assert b"The tiny world: seed4" in job_report(folder / "seed4").page().encode()
    assert r"Dynamic I\|T" in (folder / "table.md").read_text()


def test_rivals_are_compared_at_equal_image_tokens_and_stand_in_the_report(config, trained, monkeypatch, capsys):
    tiny = replace(TINY, seeds=2, questions=40, rivals="random:output_keep_rate=none", rival_questions=1)
    two = replace(config, tiny=tiny)
    folder = main(two)
    found = [json.loads((folder / f"seed{seed}" / "compare" / "compare.json").read_text()) for seed in (4, 5)]
    for one in found:
        assert one["equal"] == f"image-tokens={int(config.sparsity.image_keep_rate * 64)}" and not one["left_out"]
        rows = {(row["method"], row["error"]) for task in one["tasks"].values() for row in task["rows"]}
        assert rows == {(name, None) for name in ("dense", "dynamic:sparsity=image", "random:output_keep_rate=none")}
        both = [row["method"] for task in one["tasks"].values() for row in task["rows"] if "both" in row["model"]]
        assert both == ["dynamic:sparsity=image"] * 2  # the rivals run on the dense control alone
    assert set(found[0]["tasks"]) == {"pope", "gqa"}
    report = (folder / "table.md").read_text()
    assert "## Rivals at equal image tokens" in report and "`random:output_keep_rate=none`" in report
    assert (folder / "compare" / "compare.md").is_file()
    assert capsys.readouterr().out.count("# Methods compared") == 0

    monkeypatch.setattr(rivals, "compare", None)  # nothing is compared again
    assert main(two) == folder and (folder / "table.md").read_text() == report
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="NoneType"):
        patch.setattr(rivals, "source_digest", lambda: "other code")
        main(two)
    with pytest.raises(TypeError, match="NoneType"):  # models of other trainings under the same names
        main(replace(two, train=replace(config.train, max_steps=3)))


@pytest.mark.parametrize(
    ("rivals", "message"), [("dynamic", "dynamic learns something"), ("fastvv", "did you mean 'fastv'"), ("x=1", "x=1")]
)
def test_rivals_that_cannot_run_are_refused_before_anything_is_trained(config, trained, rivals, message):
    with pytest.raises(ValueError, match=message):
        main(replace(config, tiny=replace(TINY, rivals=rivals)))
    assert not trained


def test_several_seeds_resume_what_is_finished(config, trained, capsys, caplog):
    two = replace(config, tiny=replace(TINY, seeds=2))
    folder = main(two)
    assert [entry[2] for entry in trained] == [4, 4, 5, 5]
    assert "±" in (folder / "table.md").read_text()
    (folder / "seed5" / "results.json").unlink()
    trained.clear()
    main(two)
    assert [entry[2] for entry in trained] == [5, 5]
    assert "seed 4: taken from" in capsys.readouterr().out
    path = folder / "seed4" / "results.json"
    result = json.loads(path.read_text())
    result["environment"]["source"] = "other"
    path.write_text(json.dumps(result))
    trained.clear()
    main(two)
    assert not trained and "made by other source code" in caplog.text
    main(replace(two, tiny=replace(two.tiny, questions=11)))
    assert [entry[2] for entry in trained] == [4, 4, 5, 5]
    assert "belongs to other settings, rows or weights and is moved to" in capsys.readouterr().out
    (aside,) = (folder / "seed4").glob("results.*.json")
    assert json.loads(aside.read_text()) == result and (folder / "seed4" / "results.json").is_file()
    assert len(list((folder / "seed4").glob("table.*.md"))) == 1


def test_a_job_that_is_killed_or_gets_more_rows_measures_only_what_is_missing(config, trained, monkeypatch, capsys):
    seen, measure = [], job.Evaluator._measure

    def measured(self, row):
        if len(seen) == 5:
            seen.append("killed")
            raise KeyboardInterrupt
        seen.append(row.key)
        return measure(self, row)

    monkeypatch.setattr(job.Evaluator, "_measure", measured)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    folder = main(config)
    assert len(seen) == len({*seen}) == 17  # all but the subset row, and the one that was killed
    assert capsys.readouterr().out.count("(measured before)") == 5
    before = json.loads((folder / "results.json").read_text())["seeds"][0]
    seen[:] = ["warm"] * 6
    trained.clear()
    main(replace(config, tiny=replace(TINY, more_output_rates=[0.35])))
    assert [entry[:2] for entry in trained] == [("both", "both"), ("both_35", "both"), ("control", "none")]
    assert seen[6:] == ["dynamic_35", "inside_sinks_35", "inside_recent_35"]
    after = json.loads((folder / "results.json").read_text())["seeds"][0]
    rows = {row["key"]: row for row in after["rows"]}
    assert all(rows[row["key"]] == row for row in before["rows"]) and len(rows) == len(before["rows"]) + 3
    assert "r_OT 0.35" in (folder / "table.md").read_text()


def test_a_base_of_the_world_is_trained_once_for_all_seeds(config, trained, tmp_path, monkeypatch):
    two = replace(config, tiny=replace(TINY, seeds=2, base_steps=7))
    folder = main(two)
    plain = folder / "base" / "plain"
    assert trained[0] == ("base", "none", 0, str(tmp_path / "base"))
    assert [entry[2:] for entry in trained[1:]] == [(4, str(plain))] * 2 + [(5, str(plain))] * 2
    assert json.loads((plain / "config.json").read_text())["model_type"] == "llava"
    assert read_yaml(RunConfig, folder / "base" / "config.yaml").train.max_steps == 7
    with safe_open(plain / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert names and not [name for name in names if "predictor" in name]
    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(job, "convert", None)  # it lies there
        main(two)
    assert [entry[0] for entry in trained] == ["base"]  # which a real training finds finished; the seeds are read


def test_every_training_has_its_own_rate(config, tmp_path):
    three = replace(config, tiny=replace(TINY, more_output_rates=[0.35, 0.2]))
    trainings = job.SeedJob(three, tmp_path, tmp_path, tmp_path).trainings
    assert {key: (mode, rate) for key, (_, mode, rate) in trainings.items()} == {
        "both": ("both", 0.5), "both_35": ("both", 0.35), "both_20": ("both", 0.2), "control": ("none", 0.5),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "message"), [([0.35, 0.35], "names a rate twice"), ([0.5], "which is trained anyway"), ([1.5], "1.5")]
)
def test_rates_that_make_no_sense_are_refused(config, rates, message):
    with pytest.raises(ValueError, match=message):
        replace(config, tiny=replace(TINY, more_output_rates=rates))


def test_a_world_that_is_not_known_is_refused_before_anything_is_trained(config, trained):
    with pytest.raises(ValueError, match="unknown world 'longer'; allowed: default, long"):
        main(replace(config, tiny=replace(TINY, world="longer")))
    assert not trained


def test_the_same_job_again_trains_and_measures_nothing(config, trained, capsys):
    folder = main(config)
    written = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    trained.clear()
    capsys.readouterr()
    main(config)
    assert not trained and "finished already, nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in written} == written
    main(replace(config, train=replace(config.train, overwrite=True)))
    assert [entry[:3] for entry in trained] == [("both", "both", 4), ("control", "none", 4)]


def test_a_training_of_other_settings_leaves_a_finished_job_as_it_is(config, trained, monkeypatch):
    folder = main(config)
    written = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}

    def refuse(run_config):
        raise ValueError(f"{run_config.folder} holds a finished model of another run")

    monkeypatch.setattr(job, "run", refuse)
    with pytest.raises(ValueError, match=r"seed4/both holds a finished model of another run"):
        main(replace(config, train=replace(config.train, learning_rate=1e-3)))
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == written
    with Lock(folder / "job.lock", "x"), pytest.raises(ValueError, match=r"the main job in .*: process"):
        main(config)


def test_every_file_of_the_base_belongs_to_the_results(config, tmp_path):
    seed = job.SeedJob(config, tmp_path / "seed4", tmp_path / "world", tmp_path / "base")
    known = {seed.fingerprint()}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = tmp_path / "base" / name
        file.write_bytes(file.read_bytes() + b" ")
        assert seed.fingerprint() not in known, name
        known.add(seed.fingerprint())


def test_full_adds_the_untrained_base(config, trained, tmp_path):
    folder = main(replace(config, tiny=replace(TINY, untrained_base=True)))
    assert trained[-1][:3] == ("untrained", "both", 4)
    result = json.loads((folder / "results.json").read_text())["seeds"][0]
    assert result["overlap"][-1]["key"] == "untrained"
    load = DynamicLlavaForConditionalGeneration.from_pretrained
    fresh, base = load(trained[-1][3], sparsity=SPARSITY), load(tmp_path / "base")
    compare = {name: (value == base.state_dict()[name]).all() for name, value in fresh.state_dict().items()}
    assert all(same for name, same in compare.items() if "vision_tower" in name or "projector" in name)
    assert not compare["lm_head.weight"] and not compare["model.language_model.layers.0.mlp.up_proj.weight"]


def test_a_job_without_a_base_is_refused(config):
    with pytest.raises(ValueError, match=r"model\.base is not set"):
        main(replace(config, model=ModelConfig()))


def test_a_training_of_the_job_is_an_ordinary_run(config):
    """Every section of a run's file reaches it, whichever there will be; what is the job's own does not."""
    training = config.training(name="both")
    assert type(training) is RunConfig and training == RunConfig(
        **{one.name: getattr(training, one.name) for one in fields(RunConfig)}
    )
    assert replace(training, name=config.name) == config.training()
    assert {one.name for one in fields(config)} - {one.name for one in fields(training)} == {"tiny"}


def test_a_method_that_the_job_names_has_a_row_and_no_training(config, trained, capsys):
    method = {"name": "structure", "image_keep_rate": 0.5, "output_keep_rate": None}
    folder = main(replace(config, method=method))
    assert [mode for _, mode, _, _ in trained] == ["both", "none"]
    rows = json.loads((folder / "seed4" / "results.json").read_text())["rows"]
    assert rows[-1]["key"] == "method" and rows[-1]["title"].startswith("control + structure (layer ")
    assert rows[-1]["metrics"]["keep_image"] == 0.5 and rows[-1]["metrics"]["keep_output_forced"] == 1.0
    assert "control + structure" in (folder / "table.md").read_text()
    before = (folder / "seed4" / "results.json").read_bytes()
    main(replace(config, method=method))
    assert (folder / "seed4" / "results.json").read_bytes() == before  # finished already
    main(replace(config, method={**method, "image_keep_rate": 0.25}))
    assert "belongs to other settings" in capsys.readouterr().out


def test_a_method_that_learns_is_refused_before_anything_is_trained(config, trained):
    with pytest.raises(ValueError, match="learns something, and the main job trains Dynamic-LLaVA"):
        main(replace(config, method="dynamic"))
    with pytest.raises(ValueError, match="did you mean 'structure'"):
        main(replace(config, method="structur"))
    assert not trained
