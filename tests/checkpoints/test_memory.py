"""A conversion holds one input shard at most, however many there are: measured on the process itself."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.checkpoints.convert import convert
from tests.checkpoints.folders import original_config, original_folder, original_weights

SHARDS = 8
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MIB = 2**20


def memory(field):
    """Return bytes of this process: VmRSS is what it holds now, VmHWM the most since the last reset."""
    return 1024 * int(next(line for line in STATUS.read_text().split("\n") if line.startswith(field)).split()[1])


def write_shards(folder, suffix):
    """Write a model of SHARDS files, two layers in each; return the bytes of the largest and of all."""
    text = LlamaConfig(
        hidden_size=256,
        intermediate_size=2560,
        num_hidden_layers=2 * SHARDS,
        num_attention_heads=4,
        vocab_size=128,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = DynamicLlavaForConditionalGeneration(DynamicLlavaConfig(text_config=text, vision_config=vision))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(original_config(model)))
    shards = [{} for _ in range(SHARDS)]
    for name, value in original_weights(model).items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        shards[layer // 2][name] = value
    index = {}
    for number, shard in enumerate(shards):
        file = folder / f"part-{number}.{suffix}"
        save_file(shard, file, metadata={"format": "pt"}) if suffix == "safetensors" else torch.save(shard, file)
        index.update(dict.fromkeys(shard, file.name))
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    sizes = [path.stat().st_size for path in folder.glob(f"part-*.{suffix}")]
    return max(sizes), sum(sizes)


@pytest.mark.skipif(not os.access(RESET, os.W_OK), reason="this system does not let a process reset its peak memory")
@pytest.mark.parametrize(("suffix", "dtype"), [("safetensors", None), ("bin", "bfloat16")])
def test_one_shard_at_a_time(tmp_path, suffix, dtype):
    convert(original_folder(tmp_path / "small"), tmp_path / "warm", dtype=dtype)  # what is loaded once
    shard, everything = write_shards(tmp_path / "source", suffix)
    assert everything > 5 * shard and shard > 15 * MIB
    before = memory("VmRSS")
    RESET.write_text("5")
    convert(tmp_path / "source", tmp_path / "new", dtype=dtype)
    grown = memory("VmHWM") - before
    assert grown < 1.5 * shard + 8 * MIB, f"{grown / MIB:.0f} MiB for shards of {shard / MIB:.0f} MiB"
