"""A projector is trained alone, as in LLaVA's first stage, and the model with it afterwards; one's own is imported."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.cli import load_config
from dynamic_llava.config import DataConfig, LoraConfig, ModelConfig, TrainConfig
from dynamic_llava.data.check import check
from dynamic_llava.data.prepare import base_processor
from dynamic_llava.data.sft import SftDataset
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import load, run
from tests.builders import TINY_SPARSITY
from tests.sft_builders import picture, tiny_processor, write_checkpoint, write_data

ALONE = {"tune": "predictors", "sparsity_mode": "none", "projector_learning_rate": 1e-2}
"""Of the whole model nothing learns but the projector."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    base = write_checkpoint(folder / "base")
    file, images = write_data(folder / "data", samples=8)
    return base, DataConfig(json=str(file), image_folder=str(images), max_length=400)


def run_of(world, folder, projector, base=None, template="plain", **train):
    settings = {"batch_size": 4, "max_steps": 2, "log_every": 1, "learning_rate": 1e-3, **train}
    return RunConfig(
        output_folder=str(folder),
        model=ModelConfig(base=str(base or world[0]), projector=projector),
        data=replace(world[1], template=template),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(**settings),
    )


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_two_steps_of_the_first_stage_move_the_projector_alone_and_sft_follows(world, tmp_path):
    first = run_of(world, tmp_path, "tokenpacker", **ALONE)
    torch.manual_seed(first.train.seed)
    started = load(first)[0].state_dict()
    pretrained = run(first)
    base, after = weights_of(world[0]), weights_of(pretrained.folder)
    new = {name for name in after if "multi_modal_projector" in name}
    assert set(after) - new == {name for name in base if "multi_modal_projector" not in name}
    assert all(torch.equal(after[name], base[name]) for name in set(after) - new)
    assert all(not torch.equal(after[name], started[name]) for name in new), "a weight of the projector did not move"
    values = json.loads((pretrained.folder / "config.json").read_text(encoding="utf-8"))
    assert (values["projector"], values["vision_feature_layer"], values["image_seq_length"]) == (
        "tokenpacker", [1, 2, 1, 2], 4,
    )  # fmt: skip
    processor = DynamicLlavaProcessor.from_pretrained(pretrained.folder)
    assert processor.prompt_format == tiny_processor().prompt_format, "the plain template is of that stage alone"

    second = run_of(world, tmp_path, None, pretrained.folder, "chat", projector_learning_rate=1e-3)
    tuned = weights_of(run(second).folder)
    moved = {name for name in tuned if not torch.equal(tuned[name], after[name])}
    assert moved >= new and any("language_model.layers" in name for name in moved)
    assert not any("vision_tower" in name for name in moved)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(second.folder / "model").eval()
    inputs = processor(images=picture(), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.sparsity.layout.image_lengths().tolist() == [4]


def test_the_first_stage_reads_an_image_and_its_caption(world):
    processor = base_processor(ModelConfig(base=str(world[0]), projector="resampler"), TINY_SPARSITY)
    data = replace(world[1], template="plain")
    dataset = SftDataset(data, processor)
    said = json.loads(Path(data.json).read_text(encoding="utf-8"))
    for sample, entry in zip(dataset, said, strict=True):
        image = sample["input_ids"] == processor.image_token_id
        assert image.tolist() == [False] + [True] * 4 + [False] * (len(image) - 5)
        caption = processor.tokenizer(entry["conversations"][1]["value"] + "\n").input_ids[1:]
        assert sample["input_ids"][5:].tolist() == caption
        assert torch.equal(sample["labels"][5:], sample["input_ids"][5:]) and bool((sample["labels"][:5] == -100).all())
    report = check(data, processor, TINY_SPARSITY)
    assert not report.errors and report.findings.lengths["tokens"] == dataset.lengths.tolist()
    assert dataset.processor.prompt_format == processor.prompt_format


def test_a_sample_that_is_no_caption_is_named(world, tmp_path):
    entries = json.loads(Path(world[1].json).read_text(encoding="utf-8"))
    entries[5]["conversations"] *= 2
    entries[5]["conversations"][2] = {"from": "human", "value": "And now?"}
    (tmp_path / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    data = replace(world[1], json=str(tmp_path / "data.json"), template="plain")
    with pytest.raises(ValueError, match=r"index 5, id 'sample-5': the plain template writes one image.*2 turns"):
        SftDataset(data, tiny_processor())
    assert check(data, tiny_processor(), TINY_SPARSITY).errors == 1


def test_a_new_projector_depends_on_the_seed_alone(world, tmp_path):
    config, found = run_of(world, tmp_path, "resampler", **ALONE), []
    for seed, drawn in ((0, 0), (0, 3), (1, 0)):
        torch.manual_seed(seed)
        torch.randn(drawn)
        found.append(load(config)[0].model.multi_modal_projector.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["queries"], found[2]["queries"])


def test_the_projector_that_is_there_is_kept(world, tmp_path):
    base = weights_of(world[0])
    kept = load(run_of(world, tmp_path, "mlp"))[0].state_dict()
    assert all(torch.equal(kept[name], base[name]) for name in base)


REFUSED = {
    "frozen": ({"projector_learning_rate": None}, None, ["projector_learning_rate is null", "'mlp'"]),
    "adapters": ({"tune": "lora", "projector_learning_rate": 1e-3}, LoraConfig(), ["without their base"]),
}


@pytest.mark.parametrize("way", REFUSED)
def test_a_new_projector_that_would_be_lost_is_refused(world, tmp_path, way):
    train, lora, words = REFUSED[way]
    config = replace(run_of(world, tmp_path, "ldp_v2"), train=TrainConfig(**train), lora=lora)
    with pytest.raises(ValueError, match=r"model.projector='ldp_v2' is newly initialised") as error:
        run(config)
    assert all(word in str(error.value) for word in words)
    assert not (config.folder / "model").exists()


OWN = """
from tests.toys.pooled import Pooled


class Mine(Pooled):
    name = "mine"
"""


@pytest.mark.parametrize("where", ["file", "command line"])
def test_one_of_ones_own_is_named_in_a_file_or_on_the_command_line(world, tmp_path, monkeypatch, where):
    name = f"own_projector_{where.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    projector = f"{name}:Mine"
    config = run_of(world, tmp_path, None if where == "command line" else projector, **ALONE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asdict(config)), encoding="utf-8")
    words = ["--model.projector", projector] if where == "command line" else []
    read = load_config(RunConfig, [str(tmp_path / "run.yaml"), *words], "train", "")
    assert read.model.projector == projector and name not in sys.modules
    trained = run(read)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(trained.folder)
    assert type(model.model.multi_modal_projector) is sys.modules[name].Mine
    assert model.config.projector == DynamicLlavaProcessor.from_pretrained(trained.folder).projector == projector


ABSENT = {"nowhere:Mine": "importing nowhere failed", "json:Mine": "no class 'Mine'", "x": "choose one of"}


@pytest.mark.parametrize("projector", ABSENT)
def test_one_that_is_not_there_is_a_mistake_with_what_to_do(world, tmp_path, projector):
    with pytest.raises(ValueError, match=ABSENT[projector]):
        run(run_of(world, tmp_path, projector, **ALONE))
