"""In the tiny world a calibrated model meets the rates that it is asked for, on scenes that it has never seen."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.cli import read_yaml
from dynamic_llava.config import CalibrateConfig, DataConfig
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.data.prepare import base_processor
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.tiny.world.dataset import build_world
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run

RATES = (0.75, 0.5, 0.35, 0.2, 0.1)
POINTS = 0.02


@pytest.mark.slow
@torch.no_grad()
def test_asked_rates_are_met_within_two_points_on_held_scenes(tmp_path, monkeypatch, pytestconfig):
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    folder = build_world(tmp_path / "world", train=300, test=1200)
    described = [one for one in json.loads((folder / "test.json").read_text()) if one["kind"] == "description"]
    files = {name: folder / f"{name}.json" for name in ("held", "seen_by_nobody")}
    for place, file in enumerate(files.values()):
        file.write_text(json.dumps(described[place::2]))
    base = read_yaml(JobConfig, pytestconfig.rootpath / "configs" / "tiny.yaml").training()
    config = RunConfig(
        name="calibrated",
        output_folder=str(tmp_path / "runs"),
        model=base.model,
        data=DataConfig(json=str(folder / "train.json"), image_folder=str(folder), max_length=512),
        sparsity=base.sparsity,
        train=replace(base.train, tune="predictors", max_steps=40, calibrate=CalibrateConfig(str(files["held"]))),
    )
    with torch.enable_grad():
        result = run(config)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(result.folder).eval()
    model.config.sparsity = replace(model.config.sparsity, image_selection="threshold")
    data = replace(config.data, json=str(files["seen_by_nobody"]))
    dataset = SftDataset(data, base_processor(config.model))
    inputs = ("input_ids", "attention_mask", "pixel_values", "output_mask")
    kept = {(kind, rate): [] for kind in ("image", "output") for rate in RATES}
    for batch in DataLoader(dataset, 30, collate_fn=Collator(dataset.processor)):
        given = {name: batch[name] for name in inputs}
        for rate in RATES:
            record = model(**given, image_keep_rate=rate, output_keep_rate=rate, use_cache=False).sparsity
            for kind, where in (("image", record.layout.is_image), ("output", record.layout.output)):
                kept[kind, rate].append(record.keep_mask[where])
    for (kind, rate), found in kept.items():
        assert float(torch.cat(found).double().mean()) == pytest.approx(rate, abs=POINTS), kind
