"""A training under another method than Dynamic-LLaVA: its fixed rule shapes the model, its name every comparison."""

import json

import pytest
import torch
import yaml

from dynamic_llava import METHODS, DynamicLlavaForConditionalGeneration, get_method
from dynamic_llava.train.__main__ import main
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data

FREE = [name for name in ("fastv", "random", "structure") if METHODS[name].training_free]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A dense base and data."""
    folder = tmp_path_factory.mktemp("method")
    write_checkpoint(folder / "base", dense=True)
    file, images = write_data(folder, samples=6)
    return {
        "model": {"base": str(folder / "base")},
        "data": {"json": str(file), "image_folder": str(images)},
        "sparsity": TINY_SPARSITY.to_dict(),
        "train": {"batch_size": 3, "max_steps": 2, "log_every": 1, "learning_rate": 1e-3},
    }


def train(world, folder, *words, name="run", **more):
    """Train from a file; return the exit code."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"name": name, "output_folder": str(folder), **world, **more}))
    return main([str(file), *words])


@pytest.mark.parametrize("name", FREE)
def test_a_run_trains_under_the_fixed_rule_of_a_method(name, world, tmp_path, monkeypatch, caplog):
    """No predictor learns, no keep rate is aimed at, and what the model is shown is what the rule keeps."""
    calls, forward = [], DynamicLlavaForConditionalGeneration.forward

    def watched(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append((kwargs.get("method"), output.sparsity))
        return output

    monkeypatch.setattr(DynamicLlavaForConditionalGeneration, "forward", watched)
    assert train(world, tmp_path, method={"name": name, "image_keep_rate": 0.5}) == 0
    expected = get_method(name, image_keep_rate=0.5, layer=TINY_SPARSITY.sparse_layer)
    assert calls and all(method == expected for method, _ in calls)
    for _, record in calls:
        kept = (record.keep_mask.bool() & record.layout.is_image).sum(1)
        assert kept.tolist() == [8] * len(kept)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    base = DynamicLlavaForConditionalGeneration.from_pretrained(world["model"]["base"])
    assert model.config.untrained_predictors == ["image_predictor", "output_predictor"]
    tensors, before = model.state_dict(), base.state_dict()
    changed = {key for key in tensors if "_predictor" not in key and not torch.equal(tensors[key], before[key])}
    assert any("layers.4" in key for key in changed) and not any("vision_tower" in key for key in changed)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("tau" in line or "image_keep_loss" in line for line in lines)


def test_the_command_line_and_the_file_name_one_method(world, tmp_path, capsys):
    """Another spelling of the same settings is the same run; another method or setting is another one."""
    assert train(world, tmp_path, method={"name": "fastv", "layer": 3}) == 0
    assert train(world, tmp_path, "--method", "fastv", "--method.layer", "3") == 0
    assert train(world, tmp_path, "--method.layer=3", "--method.image-keep-rate=0.5", method="fastv") == 0
    capsys.readouterr()
    for words, difference in (
        (("--method.layer", "4"), "method.layer was 3 and is 4"),
        (("--method", "random"), "method.name was 'fastv' and is 'random'"),
        (("--method", "none"), "method.name was 'fastv' and is None"),
    ):
        assert train(world, tmp_path, *words, method={"name": "fastv", "layer": 3}) == 2
        assert difference in capsys.readouterr().err


def test_runs_of_different_methods_have_different_names(world, tmp_path):
    from dynamic_llava.cli import load_config
    from dynamic_llava.config.run import RunConfig

    def named(*words):
        return load_config(RunConfig, ["--data.json", "x.json", *words], "", "").run_name

    assert named("--method", "fastv", "--method.layer", "3") == named("--method.layer=3", "--method=fastv")
    assert len({named(), named("--method", "fastv"), named("--method", "fastv", "--method.layer", "3")}) == 3
    assert named() == "x-" + named().removeprefix("x-") and named("--method", "none") == named()


def test_an_extending_file_names_another_method_or_changes_a_setting(world, tmp_path):
    from dynamic_llava.cli import read_yaml
    from dynamic_llava.config.run import RunConfig

    (tmp_path / "a.yaml").write_text("method: {name: fastv, layer: 3}\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nmethod: {layer: 4}\n")
    (tmp_path / "c.yaml").write_text("extends: b.yaml\nmethod: {name: random, seed: 2}\n")
    (tmp_path / "d.yaml").write_text("extends: c.yaml\nmethod: null\n")
    found = [read_yaml(RunConfig, tmp_path / f"{name}.yaml").method for name in "abcd"]
    assert found == [{"name": "fastv", "layer": 3}, {"name": "fastv", "layer": 4}, {"name": "random", "seed": 2}, None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method": "fastvv"}, "did you mean 'fastv'"),
        ({"method": {"name": "fastv", "layr": 3}}, "did you mean 'layer'"),
        ({"method": {"layer": 3}}, "does not say its name"),
        ({"method": 3}, "neither a registered name nor a Method object"),
        ({"method": {"name": "dynamic", "sparsity": "image"}}, "stand in the section `sparsity`"),
        ({"method": "fastv", "train": {"sparsity_mode": "image"}}, "contradict each other"),
        ({"method": "fastv", "train": {"tune": "predictors"}}, "trains nothing"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(world, tmp_path, more, message, capsys):
    assert train(world, tmp_path, **{**more, "train": world["train"] | more.get("train", {})}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_learned_method_of_ones_own_is_imported_from_the_runs_file(world, tmp_path, monkeypatch):
    """The file names a class whose module nothing has imported: a run's file is its user's word."""
    source = "from dataclasses import dataclass\n\nfrom tests.toys.linear import Linear\n\n\n"
    source += "@dataclass(frozen=True)\nclass Later(Linear):\n    pass\n"
    (tmp_path / "not_imported_yet.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    sparsity = {**world["sparsity"], "method": {"name": "not_imported_yet:Later", "image_keep_rate": 0.5}}
    assert train(world, tmp_path, sparsity=sparsity) == 0
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved["sparsity"]["method"] == sparsity["method"]
