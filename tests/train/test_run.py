"""A run from end to end: ordinary photographs in, a checkpoint that loads and generates out."""

import json

import pytest
import torch
import yaml

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.processing.prompts import conversation_prompt
from dynamic_llava.train.__main__ import main
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run
from tests.builders import TINY_SPARSITY
from tests.sft_builders import conversation, picture, write_checkpoint

PHOTOGRAPHS = [
    ("holiday.jpg", "RGB", (640, 427)),
    ("tall.jpeg", "RGB", (90, 301)),
    ("scan.png", "L", (333, 200)),
    ("logo.png", "RGBA", (48, 48)),
    ("moving.gif", "P", (120, 75)),
    ("print.jpg", "CMYK", (210, 99)),
    ("sub/x-ray.png", "I;16", (77, 140)),
    ("tiny.png", "1", (3, 2)),
    ("web.webp", "RGB", (256, 257)),
    ("old.bmp", "RGB", (64, 31)),
]


@pytest.fixture
def photographs(tmp_path):
    """A small folder as a user may have it: many sizes and formats, one sample with two pictures."""
    folder = tmp_path / "photographs"
    (folder / "sub").mkdir(parents=True)
    entries = []
    for number, (name, mode, size) in enumerate(PHOTOGRAPHS):
        picture(number, size, mode).save(folder / name)
        messages = conversation("<image>\nDescribe it.", f"A picture named {name}.", "Is it nice?", "Yes.")
        entries.append({"id": name, "image": name, "conversations": messages})
    both = [PHOTOGRAPHS[0][0], PHOTOGRAPHS[4][0]]
    entries.append({"id": "two", "image": both, "conversations": conversation("<image>\n<image>\nSame?", "No.")})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def test_a_folder_of_photographs_trains_from_the_command_line(tmp_path, photographs, capsys):
    base = write_checkpoint(tmp_path / "base")
    config = {
        "name": "photographs",
        "output_folder": str(tmp_path / "runs"),
        "model": {"base": str(base)},
        "data": {"json": str(photographs / "data.json"), "image_folder": str(photographs / "photographs")},
        "sparsity": TINY_SPARSITY.to_dict(),
        "train": {"batch_size": 4, "epochs": 2.0, "log_every": 1},
    }
    file = tmp_path / "photographs.yaml"
    file.write_text(yaml.safe_dump(config))
    assert main([str(file), "--train.learning-rate", "1e-4"]) == 0
    folder = tmp_path / "runs" / "photographs"
    assert str(folder / "model") in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["learning_rate"] == 1e-4
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5, 6]
    wanted = {"lm_loss", "image_keep_loss", "output_keep_loss", "image_keep_rate", "output_keep_rate", "tau"}
    assert wanted | {"tokens_per_second", "mask_gradient", "learning_rate", "grad_norm"} <= set(lines[0])
    check_generation(folder / "model", photographs / "photographs" / "holiday.jpg")


def check_generation(folder, photograph):
    model, info = DynamicLlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert model.config.sparsity == TINY_SPARSITY
    processor = DynamicLlavaProcessor.from_pretrained(folder)
    inputs = processor(conversation_prompt([("<image>\nWhat is it?", None)]), photograph)
    answer = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4


def test_training_learns(tmp_path, photographs):
    config = RunConfig(
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(write_checkpoint(tmp_path / "base"))),
        data=DataConfig(json=str(photographs / "data.json"), image_folder=str(photographs / "photographs")),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(batch_size=11, max_steps=15, learning_rate=3e-3, predictor_learning_rate=3e-3, log_every=5),
    )
    result = run(config)
    assert result.history[-1]["lm_loss"] < 0.7 * result.history[0]["lm_loss"]
    assert result.metrics["steps"] == 15 and result.metrics["train_seconds"] > 0
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in result.history)


def test_a_broken_photograph_stops_the_run_by_name(tmp_path, photographs, capsys):
    base = write_checkpoint(tmp_path / "base")
    broken = photographs / "photographs" / "tall.jpeg"
    broken.write_bytes(broken.read_bytes()[:1000])
    arguments = ["--model.base", str(base), "--data.json", str(photographs / "data.json"), "--output-folder"]
    arguments += [str(tmp_path / "runs"), "--data.image-folder", str(photographs / "photographs")]
    for name, value in TINY_SPARSITY.to_dict().items():
        arguments += [f"--sparsity.{name.replace('_', '-')}", str(value)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "index 1, id 'tall.jpeg': " in error and "broken or cut off" in error and "Traceback" not in error


def test_what_is_missing_is_named(tmp_path, photographs):
    with pytest.raises(ValueError, match=r"model\.base is not set"):
        run(RunConfig(output_folder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.json is not set"):
        run(RunConfig(output_folder=str(tmp_path), model=ModelConfig(base="tiny")))
