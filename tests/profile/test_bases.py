"""The roofline of bases: a calculation by hand, the published sizes, configurations on disk, and the page's table."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlavaConfig, LlavaNextConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig

from dynamic_llava.costs import BASES, DEVICE_PEAKS, decoder_shape
from dynamic_llava.profile.__main__ import main
from dynamic_llava.profile.bases import roofline

ROOT = Path(__file__).resolve().parents[2]


def only(name, batch, outputs=2048, device="A100"):
    (row,) = roofline([BASES[name]], [batch], [outputs], device).rows
    return row


def test_a_row_by_hand():
    """LLaVA-1.5-7B, 8 rows, 2,048 tokens: every number from the sizes alone."""
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32064 * 4096)
    token = 2 * 4096 * 2  # bytes of a layer's key and value
    dense = weights + 8 * 32 * (50 + 576 + 1024) * token
    kept = 50 + 115 + 512
    predictor = 2 * 4096 + 4096 * 512 + 512 + 512 * 256 + 256 + 256 * 128 + 128 + 128 * 2 + 2  # norm, three halvings
    sparse = weights + 8 * (2 * (50 + 576 + 1024) + 30 * kept) * token + 2 * predictor
    row = only("llava-1.5-7b", 8)
    assert (row["step_bytes_dense"], row["step_bytes"]) == (dense, sparse)
    assert row["step_speedup"] == pytest.approx(dense / sparse) == pytest.approx(1.234, abs=5e-4)
    assert row["step_seconds_dense"] == pytest.approx(dense / 2.039e12)
    assert row["kv_per_token"] == 512 * 1024
    assert row["cache_dense"] == 8 * 32 * (50 + 576 + 2048) * token
    assert row["cache"] == 8 * (2 * (50 + 576 + 2048) + 30 * (50 + 115 + 1024)) * token
    layer, head = 4 * 4096**2 + 3 * 4096 * 11008, 2 * 32064 * 4096
    flops = 8 * (32 * (2 * 626 * layer + 4 * 4096 * 626 * 627 // 2) + head)
    assert row["prefill_flops_dense"] == flops
    late = 2 * 165 * layer + 4 * 4096 * 165 * 166 // 2
    short = 8 * (2 * (2 * 626 * layer + 4 * 4096 * 626 * 627 // 2) + 30 * late + head)
    assert 0 < row["prefill_flops"] - short < 0.01 * short, "the image predictor comes on top"
    whole = flops / 312e12 + 2048 * dense / 2.039e12
    assert row["speedup"] == pytest.approx(whole / (row["prefill_flops"] / 312e12 + 2048 * sparse / 2.039e12))
    assert row["pays"] == "yes"


@pytest.mark.parametrize(
    ("name", "kibibytes", "speedups"),
    [
        ("llava-1.5-7b", 512, (1.04, 1.23, 1.60)), ("llava-next-vicuna-7b", 512, (1.10, 1.59, 2.26)),
        ("llava-next-mistral-7b", 128, (1.02, 1.18, 1.56)), ("qwen2.5-vl-7b", 56, (1.01, 1.04, 1.17)),
        ("qwen2-vl-7b", 56, (1.01, 1.04, 1.17)), ("qwen3-vl-8b", 144, (1.01, 1.11, 1.35)),
        ("llava-1.5-13b", 800, (1.03, 1.20, 1.54)), ("llava-next-vicuna-13b", 800, (1.08, 1.51, 2.18)),
    ],
)  # fmt: skip
def test_keys_and_values_and_steps_of_every_base(name, kibibytes, speedups):
    """The quotients were worked out apart, without the output predictor's bytes: two digits hold."""
    for batch, speedup in zip((1, 8, 32), speedups, strict=True):
        row = only(name, batch)
        assert row["kv_per_token"] == kibibytes * 1024
        assert row["step_speedup"] == pytest.approx(speedup, abs=0.011)


def test_a_large_batch_of_small_images_is_bound_by_flops():
    """Past the device's balance a step's time is that of its FLOPs, which sparsity hardly changes."""
    base = replace(BASES["qwen2.5-vl-7b"], image_tokens=64)
    (row,) = roofline([base], [1024], [2], "A100").rows
    assert row["step_seconds_dense"] == pytest.approx(row["step_flops_dense"] / 312e12)
    assert row["step_speedup"] < 1.02 < row["step_bytes_dense"] / row["step_bytes"]
    assert row["image_tokens"] == 64 and all(name == one.name and one.about for name, one in BASES.items())


QWEN2 = {
    "hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32064,
}  # fmt: skip
QWEN3 = {
    "hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
}  # fmt: skip
CONFIGS = {
    "llava-1.5-7b": lambda: LlavaConfig(text_config={"model_type": "llama", "vocab_size": 32064}),
    "llava-next-mistral-7b": lambda: LlavaNextConfig(text_config=MISTRAL),
    "qwen2-vl-7b": lambda: Qwen2VLConfig(text_config=QWEN2),
    "qwen2.5-vl-7b": lambda: Qwen2_5_VLConfig(text_config=QWEN2),
    "qwen3-vl-8b": lambda: Qwen3VLConfig(text_config=QWEN3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_on_disk_gives_the_bases_sizes(name, tmp_path, capsys):
    config = CONFIGS[name]()
    found, base = decoder_shape(config), BASES[name].decoder
    assert replace(found, head_dim=found.head_width) == replace(base, head_dim=base.head_width)
    config.save_pretrained(tmp_path)
    tokens = ["--image-tokens", str(BASES[name].image_tokens)] if name != "llava-1.5-7b" else []
    assert main(["roofline", "--base", str(tmp_path / "config.json"), "--batch-size", "8", *tokens, "--json"]) == 0
    row = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    expected = only(name, 8)
    assert {key: row[key] for key in expected if key != "base"} == {k: v for k, v in expected.items() if k != "base"}
    assert row["report"] == "bases" and row["device"] == "none (calculated)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--base", "llava-2"], "base 'llava-2' is not known; choose all, llava-1.5-7b"),
        (["--base", "all", "--device", "TPU"], "device 'TPU' has no peaks here; choose one of H100 PCIe"),
        (["--base", "all", "--batch-size", "0"], "batch=0"),
        (["--base", "all", "--outputs", "0"], "at least 1 generated token"),
        (["--base", "all", "--image-tokens", "0"], "--image-tokens 0 is not possible"),
        (["--base", "all", "--dtype", "float16"], "--dtype have no use beside --base"),
        (["--base", "all", "--layers", "8", "--compiled"], "--layers, --compiled have no use"),
        (["--base", "all", "--preset", "table14"], "--preset have no use"),
        (["--batch-size", "8", "1"], "more than one --batch-size, belong to --base"),
        (["--image-tokens", "8"], "belong to --base"),
    ],
)
def test_mistakes_say_what_to_do(given, message, capsys):
    assert main(["roofline", *given]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_configuration_of_a_base(tmp_path, capsys):
    qwen = tmp_path / "qwen"
    CONFIGS["qwen2.5-vl-7b"]().save_pretrained(qwen)
    (tmp_path / "text.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken.json").write_text("{")
    for path, message in (
        (qwen, "images differ in length; give --image-tokens"),
        (tmp_path / "text.json", "text.json is no config.json of a vision-language model"),
        (tmp_path / "broken.json", "broken.json is no config.json of a vision-language model"),
    ):
        assert main(["roofline", "--base", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_the_page_holds_the_table_of_its_command():
    page = (ROOT / "docs" / "roofline.md").read_text(encoding="utf-8")
    assert roofline(list(BASES.values()), (1, 8, 32), (2048,), "A100").markdown() in page
    assert "Calculated, not measured" in page and "A100" in DEVICE_PEAKS
