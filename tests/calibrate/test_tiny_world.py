"""In the tiny world a calibrated model meets the rates that it is asked for, on scenes that it has never seen."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.cli import read_yaml
from dynamic_llava.config import CalibrateConfig, DataConfig
from dynamic_llava.config.calibration import threshold_at
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.model.margins import margins_of
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.tiny.world.dataset import build_world
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import load, run

RATES = (0.75, 0.5, 0.35, 0.2, 0.1)
POINTS = 0.02


def held_files(folder):
    """Halve the scenes of the test split: descriptions, and short questions about other images; none is shared."""
    entries = json.loads((folder / "test.json").read_text())
    described = {one["image"]: one for one in entries if one["kind"] == "description"}
    asked = {one["image"]: one for one in entries if one["image"] not in described}
    files = {name: folder / f"{name}.json" for name in ("held", "unseen")}
    for place, file in enumerate(files.values()):
        file.write_text(json.dumps([*list(described.values())[place::2], *list(asked.values())[place::2][:350]]))
    return files


def chance(kind, found, threshold):
    """Three standard errors between two halves of images: one background is in all patches of its image at once."""
    shares = torch.stack([(one > threshold).double().mean() for one in found])
    return 3 * float(shares.std()) * (2 / len(found)) ** 0.5 if kind == "image" else 0.0


@pytest.mark.slow
@torch.no_grad()
def test_asked_rates_are_met_within_two_points_on_held_scenes(tmp_path, monkeypatch, pytestconfig):
    """Sampled training keeps half of the outputs here, and by the margins' sign inference keeps all of them."""
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    folder = build_world(tmp_path / "world", train=200, test=1600)
    files = held_files(folder)
    base = read_yaml(JobConfig, pytestconfig.rootpath / "configs" / "tiny.yaml").training()
    calibrating = CalibrateConfig(str(files["held"]), samples=1000)
    config = RunConfig(
        name="calibrated",
        output_folder=str(tmp_path / "runs"),
        model=base.model,
        data=DataConfig(json=str(folder / "train.json"), image_folder=str(folder), max_length=512),
        sparsity=replace(base.sparsity, image_selection="threshold"),
        train=replace(base.train, tune="predictors", max_steps=20, calibrate=calibrating, hard_rate_tolerance=1.0),
    )
    with torch.enable_grad():
        result = run(config)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(result.folder).eval()
    dataset = SftDataset(replace(config.data, json=str(files["unseen"])), load(config)[1])
    batches = list(DataLoader(dataset, 50, collate_fn=Collator(dataset.processor)))
    margins = margins_of(model, batches, model.config.sparsity.output_min_length)
    for kind, found in margins.items():
        quantiles, values = model.config.sparsity.calibration[kind], torch.cat(found)
        for rate in RATES:
            threshold = threshold_at(quantiles, rate)
            met = float((values > threshold).double().mean())
            assert met == pytest.approx(rate, abs=POINTS + chance(kind, found, threshold)), (kind, rate)
    inputs = ("input_ids", "attention_mask", "pixel_values", "output_mask")
    image, output = [], []
    for batch in batches:
        given = {name: batch[name] for name in inputs}
        record = model(**given, image_keep_rate=0.2, output_keep_rate=0.35, use_cache=False).sparsity
        image.append(record.keep_mask[record.layout.is_image])
        output.append(record.keep_mask[record.layout.output & (record.layout.answer_lengths() >= 40)])
    threshold = threshold_at(model.config.sparsity.calibration["image"], 0.2)
    of_image = float((torch.cat(margins["image"]) > threshold).double().mean())
    assert float(torch.cat(image).double().mean()) == pytest.approx(of_image, abs=1e-3)
    assert float(torch.cat(output).double().mean()) == pytest.approx(0.35, abs=POINTS)
