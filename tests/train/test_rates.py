"""A training's end: rates that inference does not meet are told, and a run calibrates the model that it leaves."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.calibrate.measure import calibrate
from dynamic_llava.cli import read_yaml
from dynamic_llava.config import CalibrateConfig, DataConfig, ModelConfig, TrainConfig
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.model.margins import margins_of
from dynamic_llava.train import rates
from dynamic_llava.train.config import RunConfig, run_method
from dynamic_llava.train.optimizer import prepare
from dynamic_llava.train.run import build_trainer, load, run
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data

LONG = 12
"""Characters of an answer that is sparsified."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base with new predictors, one with trained ones, data and held data."""
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "dense", dense=True)
    write_checkpoint(folder / "trained", seed=1)
    write_data(folder / "train", samples=10)
    write_data(folder / "held", samples=9, seed=50, long_answer="Nothing but a dog that runs over a field.")
    return folder


def config_of(world, base="dense", held=False, sparsity=None, **train):
    calibrating = CalibrateConfig(str(world / "held" / "data.json"), str(world / "held" / "images"), samples=8)
    settings = {"batch_size": 4, "max_steps": 1, "predictor_learning_rate": 1e-6, "learning_rate": 1e-6, **train}
    if held:
        settings["calibrate"] = calibrating
    return RunConfig(
        name="run",
        output_folder=str(world / "runs" / str(len(list(world.glob("runs/*"))))),
        model=ModelConfig(base=str(world / base)),
        data=DataConfig(json=str(world / "train/data.json"), image_folder=str(world / "train/images"), max_length=400),
        sparsity=replace(TINY_SPARSITY, **{"output_min_length": LONG, **(sparsity or {})}),
        train=TrainConfig(**settings),
    )


def stored(result):
    return json.loads((result.folder / "config.json").read_text())["sparsity"].get("calibration")


def warnings_of(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


def test_what_inference_does_not_keep_is_told(world, caplog):
    """Predictors whose bias alone speaks: 70 % of the samples stay, and by its sign every token."""
    with caplog.at_level(logging.INFO):
        result = run(config_of(world, start_keep_rate=0.7))
    output, image = sorted(text for text in warnings_of(caplog) if "hard_rate_tolerance=0.1" in text)[::-1]
    assert output.startswith("output_keep_rate: training ends with samples that keep 0.")
    assert "inference keeps 1.00" in output and "calibrate the model (train.calibrate, or" in output
    assert output.endswith("ask for a rate in each call, such as output_keep_rate=0.5")
    assert "inference keeps 0.25" in image and image.endswith("train longer, or raise sparsity.keep_rate_weight")
    assert stored(result) is None


def test_nothing_is_measured_that_is_not_asked_for(world, caplog, monkeypatch):
    monkeypatch.setattr(rates, "measured_rates", None)
    with caplog.at_level(logging.INFO):
        run(config_of(world, start_keep_rate=0.7, hard_rate_tolerance=1.0))
    assert not any("keep_rate" in text for text in warnings_of(caplog))


@pytest.mark.parametrize("mode", ["both", "output"])
def test_measured_rates_are_those_of_the_tokens_that_training_decides_on(world, tmp_path, mode):
    """Any batch gives the same; inference's are counted by margins, training's from a pass of its own per sample."""
    config = config_of(world, "trained", sparsity_mode=mode)
    model, processor = load(config)
    dataset = SftDataset(config.data, processor)
    found = []
    for batch_size in (1, 4):
        own = replace(config, train=replace(config.train, batch_size=batch_size))
        trainer = build_trainer(own, prepare(model, own), processor, dataset)
        trainer.state.max_steps = trainer.state.global_step = 3
        found.append(rates.measured_rates(trainer, dataset))
    assert set(found[0]) == {"output_keep_rate", *(["image_keep_rate"] if mode == "both" else [])}
    for name, shares in found[0].items():
        assert shares == pytest.approx(found[1][name], abs=1e-6)
    batches = [Collator(processor)([dataset[number]]) for number in range(len(dataset))]
    margins = torch.cat(margins_of(model.eval(), batches, LONG)["output"])
    assert found[0]["output_keep_rate"][1] == pytest.approx(float((margins > 0).double().mean()), abs=1e-6)
    kept = total = 0
    for batch in batches:
        key = trainer.sample_key(batch.pop("sample_ids"))
        with torch.no_grad():
            record = model.train()(**batch, sparsity=mode, tau=0.1, sample_key=key).sparsity
        kept += float((record.keep_mask * record.sparsified_output).sum())
        total += int(record.sparsified_output.sum())
    assert total == len(margins) and found[0]["output_keep_rate"][0] == pytest.approx(kept / total, abs=1e-6)
    if mode == "both":
        assert found[0]["image_keep_rate"][1] == 0.25


def test_only_some_samples_are_compared(world, monkeypatch):
    config = config_of(world, "trained")
    model, processor = load(config)
    dataset = SftDataset(config.data, processor)
    trainer = build_trainer(config, prepare(model, config), processor, dataset)
    trainer.state.max_steps = trainer.state.global_step = 3
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **given: [seen.append(len(given["input_ids"])), forward(**given)][1])
    monkeypatch.setattr(rates, "COMPARED", 3)
    rates.measured_rates(trainer, dataset)
    assert seen == [3, 3]


@pytest.mark.parametrize("tune", ["predictors", "lora"])
def test_a_run_calibrates_as_the_command_does(world, tmp_path, tune, caplog):
    config = config_of(world, "trained", held=True, tune=tune)
    with caplog.at_level(logging.INFO):
        result = run(config)
    assert any("calibrated by 8 samples of" in one.getMessage() for one in caplog.records)
    own = stored(result)
    assert set(own) == {"image", "output"} and len(own["output"]) == 101
    held = config.train.calibrate
    calibrate(result.folder, held.json, image_folder=held.image_folder, samples=8)
    for kind, quantiles in stored(result).items():
        assert own[kind] == pytest.approx(quantiles, abs=1e-4)
    if tune == "lora":
        adapter = json.loads((result.run_folder / "adapter" / "config.json").read_text())
        assert adapter["sparsity"]["calibration"] == own
    model = DynamicLlavaForConditionalGeneration.from_pretrained(result.folder).eval()
    dataset = rates.held_samples(config, load(config)[1])
    batch = next(iter(DataLoader(dataset, 9, collate_fn=Collator(dataset.processor))))
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "output_mask")}
    with torch.no_grad():
        record = model(**given, output_keep_rate=0.5).sparsity
    assert 0.3 < float(record.output_keep_rate) < 0.7
    again = run(config)
    assert again.folder == result.folder, "a finished run has nothing to do"


def test_images_alone_are_calibrated_where_they_alone_are_sparsified(world):
    assert set(stored(run(config_of(world, held=True, sparsity_mode="image")))) == {"image"}


def test_a_model_is_saved_although_it_cannot_be_calibrated(world, caplog, monkeypatch):
    result = run(config_of(world, held=True, sparsity={"output_min_length": 60}, hard_rate_tolerance=1.0))
    assert stored(result) is None
    (warning,) = [text for text in warnings_of(caplog) if "could not be measured" in text]
    assert "has 0 answers of 60 tokens among 8 samples" in warning and "python -m dynamic_llava.calibrate" in warning
    monkeypatch.setattr(rates, "margins_of", lambda *given: 1 / 0)
    assert stored(run(config_of(world, held=True))) is None
    assert "(ZeroDivisionError: division by zero)" in warnings_of(caplog)[-1]


def test_an_image_that_cannot_be_read_is_named(world, tmp_path, caplog):
    file, images = write_data(tmp_path, samples=4)
    config = config_of(world, hard_rate_tolerance=1.0)
    held = CalibrateConfig(str(file), str(images))
    config = replace(config, train=replace(config.train, calibrate=held))
    model, processor = load(config)
    dataset = rates.held_samples(config, processor)
    trainer = build_trainer(config, prepare(model, config), processor, dataset)
    (images / "1.png").write_bytes(b"no picture")
    rates.finish_rates(config, trainer, dataset)
    assert "sample 'sample-1' (index 1): " in warnings_of(caplog)[-1]
    assert model.config.sparsity.calibration is None


def test_other_held_data_is_another_run(world, tmp_path):
    file, images = write_data(tmp_path, samples=9, seed=50)
    config = replace(config_of(world, held=True), output_folder=str(tmp_path / "runs"))
    held = replace(config.train.calibrate, json=str(file), image_folder=str(images))
    run(replace(config, train=replace(config.train, calibrate=held)))
    with pytest.raises(ValueError, match=r"another run: .*train\.calibrate\.json was .* and is"):
        run(replace(config, train=replace(config.train, calibrate=replace(held, json=config.train.calibrate.json))))
    with pytest.raises(ValueError, match=r"another run: .*train\.calibrate\.samples was 8 and is"):
        run(replace(config, train=replace(config.train, calibrate=None)))
    looser = replace(config.train, calibrate=held, hard_rate_tolerance=0.5)
    assert run(replace(config, train=looser)).folder.is_dir(), "a tolerance alters no model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {calibrate: {}}", r"train\.calibrate\.json is not set; name a file"),
        ("train: {calibrate: {json: a.json, samples: 1}}", r"train\.calibrate\.samples=1 is below its least value 2"),
        (
            "train: {calibrate: {json: a.json}, sparsity_mode: none}",
            r"train\.calibrate with train\.sparsity_mode='none'",
        ),
        ("{data: {json: a.json}, train: {calibrate: {json: ./a.json}}}", r"is the file that is trained on"),
        ("train: {calibrate: held.json}", r"train\.calibrate is \"?'?held\.json"),
        ("train: {hard_rate_tolerance: -0.1}", r"train\.hard_rate_tolerance=-0\.1 is below its least value 0"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(RunConfig, tmp_path / "a.yaml")


def test_a_method_without_margins_is_not_calibrated():
    train = TrainConfig(calibrate=CalibrateConfig("held.json"))
    for own in ({"method": "fastv"}, {"sparsity": replace(TINY_SPARSITY, method={"name": "tests.toys.linear:Linear"})}):
        with pytest.raises(ValueError, match=r"train\.calibrate with method '.*': the margins of Dynamic-LLaVA's"):
            run_method(RunConfig(train=train, **own))
