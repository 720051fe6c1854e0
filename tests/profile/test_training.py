"""`python -m dynamic_llava.profile memory`: shapes, DeepSpeed's settings, the table, the JSON line, mistakes."""

import json
import re
from pathlib import Path

import pytest

from dynamic_llava.config import SparsityConfig
from dynamic_llava.costs import LLAVA_SHAPES
from dynamic_llava.costs.memory import Sharding
from dynamic_llava.profile.__main__ import main
from dynamic_llava.profile.training import shape_of, sharding_of
from tests.builders import TINY_SPARSITY, build_model

ROOT = Path(__file__).resolve().parents[2]
PREDICTORS = """
model: {base: someone/llava-1.5-7b-hf, dtype: bfloat16}
train: {tune: predictors, bf16: true, gradient_checkpointing: true, batch_size: 4}
"""


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "a.yaml").write_text(text)
        return str(tmp_path / "a.yaml")

    return write


def test_the_table_and_the_line_say_the_same(file, capsys):
    assert main(["memory", file(PREDICTORS), "--gpu-memory", "24", "--json"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    values = json.loads(line)
    rows = dict(re.findall(r"^(\w+) +([\d.]+)$", "\n".join(table), re.MULTILINE))
    assert list(rows) == ["weights", "gradients", "optimizer", "activations", "buffers", "total"]
    for row, shown in rows.items():
        assert float(shown) == pytest.approx(values[row] / 1e9, abs=0.005)
    assert values["total"] == sum(values[row] for row in rows if row != "total") < 24e9
    assert table[-1] == "fits into 24 GB" and values["fits"] is True and values["learning"] == 10_842_372
    assert "10,842,372 of 7,074,269,444 parameters learn" in table[0] and "4 x 2048 tokens, 1 GPU(s)" in table[1]


def test_a_dense_pass_to_distill_from_is_counted(file, capsys):
    found = {}
    for distill in ("null", "{}"):
        assert main(["memory", file(PREDICTORS.replace("tune:", f"distill: {distill}, tune:")), "--json"]) == 0
        table, line = capsys.readouterr().out.rsplit("\n", 2)[:2]
        found[distill] = json.loads(line)
        assert found[distill]["distill"] == ("a dense pass to distill from" in table) == (distill == "{}")
    gradient = 4 * (2048 - 576) * 2 * LLAVA_SHAPES["7b"].decoder.vocab
    assert found["{}"]["activations"] - found["null"]["activations"] == gradient, "of the divergence, in the logits"
    assert found["{}"]["weights"] == found["null"]["weights"] and found["{}"]["total"] > found["null"]["total"]


def test_what_does_not_fit_has_an_exit_code(file, capsys):
    assert main(["memory", file(PREDICTORS), "--gpu-memory", "12"]) == 1
    assert capsys.readouterr().out.endswith("does not fit into 12 GB\n")
    assert main(["memory", file(PREDICTORS)]) == 0
    assert "fit" not in capsys.readouterr().out


def test_zero_3_on_eight_gpus(file, tmp_path, capsys):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": True}
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": zero}))
    text = f"""
model: {{base: llava-1.5-7b, dtype: bfloat16}}
train: {{bf16: true, gradient_checkpointing: true, deepspeed: {tmp_path / "zero3.json"}}}
"""
    assert main(["memory", file(text), "--gpus", "8", "--gpu-memory", "80", "--json"]) == 0
    eight = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["memory", file(text), "--gpus", "8", "--gpu-memory", "80", "--json", "--shape", "13b"]) == 0
    larger = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["memory", file(text), "--gpus", "1", "--gpu-memory", "80", "--json"]) == 1
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert one["weights"] == pytest.approx(8 * eight["weights"], abs=8) and eight["spread"] == "ZeRO stage 3"
    assert larger["weights"] / eight["weights"] == pytest.approx(13.36 / 7.07, abs=0.01)


RECIPES = [
    ("predictor_only_7b", 1, 24, None),
    ("frozen_kl_7b", 1, 24, None),
    ("frozen_kl_7b", 1, 80, 16),
    ("lora_7b", 1, 40, None),
    ("lora_7b", 1, 24, 2),
    ("dynamic_llava_7b", 8, 80, None),
    ("dynamic_llava_13b", 8, 80, None),
]


@pytest.mark.parametrize(("name", "gpus", "gpu_memory", "batch_size"), RECIPES)
def test_the_repositorys_recipes_fit(monkeypatch, capsys, name, gpus, gpu_memory, batch_size):
    monkeypatch.chdir(ROOT)  # train.deepspeed is relative to where training is started
    arguments = ["memory", f"configs/{name}.yaml", "--gpus", str(gpus), "--gpu-memory", str(gpu_memory)]
    assert main(arguments + ([] if batch_size is None else ["--batch-size", str(batch_size)])) == 0
    assert f"batches of {batch_size or ''}" in capsys.readouterr().out


def test_shapes(tmp_path):
    for name, size in (("llava-hf/llava-1.5-7b-hf", "7b"), ("LLaVA-1.5-13B", "13b"), ("my_7b", "7b")):
        assert shape_of(name, SparsityConfig()) == LLAVA_SHAPES[size]
    for name in ("", "llava-1.7b", "llava-70b", "llava-17b", "llava-7bit", "llava-v1.6-34b"):
        with pytest.raises(ValueError, match="names no known size; give --shape"):
            shape_of(name, SparsityConfig())
    assert shape_of("tiny", SparsityConfig()).decoder.layers > 2
    build_model().save_pretrained(tmp_path / "llava-7b")
    shape = shape_of(str(tmp_path / "llava-7b"), TINY_SPARSITY)
    assert (shape.decoder.hidden, shape.tokens_per_image) == (64, 16), "a folder's own sizes count, not its name"
    with pytest.raises(ValueError, match="sparse_layer=6"):
        shape_of(str(tmp_path / "llava-7b"), SparsityConfig(sparse_layer=6))


def test_deepspeed_settings():
    assert sharding_of(None, 4, 64) == Sharding(4)
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    zero |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_max_live_parameters": 1e8}
    found = sharding_of({"zero_optimization": zero}, 2, 100)
    assert found == Sharding(2, True, 3, True, False, 10**8, 10_000, 9_000)
    assert sharding_of({"zero_optimization": {"stage": 2}}, 2, 100) == Sharding(2, True, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["memory", "{model: {base: mine}}"], "names no known size"),
        (["memory", "{train: {tun: lora}}"], "did you mean train.tune"),
        (["memory", "{model: {base: 7b}}", "--gpus", "0"], "gpus=0"),
        (["memory", "{model: {base: 7b}}", "--batch-size", "0"], "train.batch_size=0"),
        (["memory", "{model: {base: 7b}, train: {deepspeed: gone.json}}"], "no DeepSpeed file gone.json"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(file, capsys, arguments, message):
    given = [file(argument) if argument.startswith("{") else argument for argument in arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_help_and_mistyped_commands(capsys):
    for arguments, expected in ((["memory", "--help"], "--gpu-memory"), (["--help"], "memory"), (["memry"], "memory")):
        with pytest.raises(SystemExit):
            main(arguments)
        shown = capsys.readouterr()
        assert expected in shown.out + shown.err
