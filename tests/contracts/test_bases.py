"""One gate for bases: every entry point carries the same ones and refuses others by name, before weights are read."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from dynamic_llava import Conversation, DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.eval.answering import Asked, prompt_inputs
from dynamic_llava.eval.tasks.questions import Question
from dynamic_llava.model.supported import check_architecture
from tests.base_folders import LLAMA_3, OTHER_PARTS, THINKS, write_base
from tests.builders import TINY_SPARSITY
from tests.eval.task_data import pope

SPARSITY = {**TINY_SPARSITY.to_dict(), "output_min_length": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base with Llama 3's way of writing conversations."""
    return write_base(tmp_path_factory.mktemp("base") / "base", LLAMA_3, "<|eot_id|>")


def command(module, *arguments):
    from importlib import import_module

    return import_module(f"dynamic_llava.{module}").main([*map(str, arguments)])


def run_file(folder, answer="That."):
    """Write data of one sample and the file of a run over the base in `folder`; return the file."""
    place = folder.parent
    Image.new("RGB", (20, 30), "red").save(place / "0.png")
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    (place / "data.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": said}] * 2))
    values = {
        "name": "run",
        "output_folder": str(place / "runs"),
        "model": {"base": str(folder)},
        "data": {"json": str(place / "data.json"), "image_folder": str(place)},
        "sparsity": SPARSITY,
        "train": {"batch_size": 2, "epochs": 1.0},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return place / "run.yaml"


def evaluation(folder):
    pope(folder.parent)
    return command(
        "eval.__main__", "--model", folder, "--tasks", "pope", "--data-root", folder.parent, "--output-folder",
        folder.parent / "out",
    )  # fmt: skip


def auto(name):
    def load(folder):
        import transformers

        # transformers has a class of its own for "llava"; ours is asked where config.json names it.
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, "model_type": "dynamic_llava"}))
        (folder / "processor_config.json").write_text(json.dumps({"processor_class": "DynamicLlavaProcessor"}))
        return getattr(transformers, name).from_pretrained(folder)

    return load


ENTRIES = {
    "config": DynamicLlavaConfig.from_pretrained,
    "model": DynamicLlavaForConditionalGeneration.from_pretrained,
    "processor": DynamicLlavaProcessor.from_pretrained,
    "AutoConfig": auto("AutoConfig"),
    "AutoModel": auto("AutoModelForImageTextToText"),
    "AutoProcessor": auto("AutoProcessor"),
    "train": lambda folder: command("train.__main__", run_file(folder)),
    "data check": lambda folder: command("data.__main__", "check", run_file(folder)),
    "data first-batch": lambda folder: command("data.__main__", "first-batch", run_file(folder)),
    "profile": lambda folder: command("profile.__main__", "memory", run_file(folder)),
    "eval": evaluation,
    "chat": lambda folder: command("chat.__main__", "--model", folder, "--sparsity", "none"),
    "convert": lambda folder: command("checkpoints.__main__", "convert", folder, folder.parent / "new"),
    "check": lambda folder: command("checkpoints.__main__", "check", folder),
}
CONFIGURATION_ALONE = ("config", "model", "AutoConfig", "AutoModel", "profile")
"""Entry points that never look at a tokenizer."""


def refuse(name, folder, words, capsys):
    """Assert that an entry point refuses a folder and says why."""
    if name[0].isupper() or name in ("config", "model", "processor"):
        with pytest.raises(ValueError, match=words):
            ENTRIES[name](folder)
        return
    assert ENTRIES[name](folder) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("kind", OTHER_PARTS)
def test_another_architecture_is_refused_before_weights_are_read(base, tmp_path, monkeypatch, capsys, name, kind):
    parts, words = OTHER_PARTS[kind]
    folder = shutil.copytree(base, tmp_path / "base")
    values = json.loads((folder / "config.json").read_text())
    values |= {part: config.to_dict() for part, config in parts.items()}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # whatever reads it misses every tensor
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    refuse(name, folder, words, capsys)


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in CONFIGURATION_ALONE])
def test_a_tokenizer_that_cannot_be_used_is_refused_before_weights_are_read(base, tmp_path, monkeypatch, capsys, name):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    if name not in ("convert", "check"):  # which compare the tensors' names with config.json first, from the heads
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    refuse(name, folder, "there is no chat template", capsys)


def test_a_base_of_its_own_trains_answers_and_converts(base, tmp_path, monkeypatch, capsys):
    """The end token of the base is learned, and prompts are its own, in every stage."""
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(base, tmp_path / "base")
    file = run_file(folder)
    assert command("data.__main__", "check", file) == 0
    assert command("train.__main__", file) == 0
    trained = tmp_path / "runs" / "run" / "model"
    assert command("checkpoints.__main__", "convert", trained, tmp_path / "hf", "--to", "llava-hf") == 0
    assert command("checkpoints.__main__", "convert", folder, tmp_path / "converted") == 0
    for path in (folder, trained, tmp_path / "hf", tmp_path / "converted"):
        processor = DynamicLlavaProcessor.from_pretrained(path)
        assert processor.chat_template == LLAMA_3 and processor.prompt_format.end_token == "<|eot_id|>"
    model = DynamicLlavaForConditionalGeneration.from_pretrained(trained).eval()
    assert model.generation_config.eos_token_id == processor.end_token_id
    asked = processor.conversation_prompt([("<image>\nWhat?", None)])
    ids = processor.encode_prompt(asked)
    pixels = processor.preprocess_images([Image.new("RGB", (20, 30))])
    rows = prompt_inputs(processor, [Asked(0, Question("q", "What?", None), pixels)])
    assert rows["input_ids"][0].tolist() == ids and rows["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    chat = Conversation(model, processor, max_new_tokens=3)
    chat.ask("What?", [Image.new("RGB", (20, 30))])
    chat.ask("And?")
    said = processor.tokenizer.decode(chat.ids[0])
    assert said.startswith(asked.replace("<image>", "<image>" * 16)) and "USER:" not in said and "</s>" not in said
    assert "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>" in said


def test_a_conversation_that_a_template_treats_apart_is_found_in_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    file = run_file(write_base(tmp_path / "base", THINKS, "<|im_end|>"), answer="<think>hm</think>That.")
    assert command("data.__main__", "check", file) == 1
    assert "chat template has a way of its own" in capsys.readouterr().out
    assert command("data.__main__", "first-batch", file) == 2
    assert "2 of 2 samples cannot be used" in capsys.readouterr().err


HUGE = [
    ("text_config", "vocab_size"), ("text_config", "hidden_size"), ("text_config", "num_hidden_layers"),
    ("text_config", "intermediate_size"), ("text_config", "head_dim"), ("vision_config", "image_size"),
    ("vision_config", "hidden_size"), ("vision_config", "num_hidden_layers"), ("vision_config", "patch_size"),
    ("vision_config", "num_channels"), ("sparsity", "predictor_width"), ("sparsity", "predictor_mlp"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "key"), HUGE)
@pytest.mark.parametrize("stored", ["safetensors", "bin"])
def test_wrong_sizes_are_found_before_anything_is_allocated(base, tmp_path, part, key, stored):
    folder = shutil.copytree(base, tmp_path / "base")
    if stored == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    values = json.loads((folder / "config.json").read_text())
    values.setdefault(part, {})[key] = 10**9 + (8 - 10**9 % 8)
    (folder / "config.json").write_text(json.dumps(values))
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as error:
        DynamicLlavaForConditionalGeneration.from_pretrained(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert str(folder) in str(error.value) and grown * (1 if sys.platform == "darwin" else 1024) < 2e8


WRONG = [0, -1, None, "a", 1.5, True, [1], {}]


@pytest.mark.slow
@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "place",
    [
        "text_config.vocab_size", "text_config.num_attention_heads", "text_config.num_key_value_heads",
        "text_config.hidden_act", "text_config.rope_parameters", "text_config.model_type", "vision_config.image_size",
        "vision_config.patch_size", "vision_config.model_type", "vision_feature_layer", "image_token_index",
        "text_config", "vision_config", "vision_feature_select_strategy", "projector_hidden_act", "sparsity",
        "untrained_predictors", "tie_word_embeddings", "dtype", "model_type", "eos_token_id", "architectures",
        "auto_map",
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_an_error_that_names_the_folder(base, tmp_path, place, value):
    folder = shutil.copytree(base, tmp_path / "base")
    values = json.loads((folder / "config.json").read_text())
    *parts, key = place.split(".")
    target = values[parts[0]] if parts else values
    target[key] = value
    (folder / "config.json").write_text(json.dumps(values))
    for load in (DynamicLlavaConfig, DynamicLlavaProcessor, DynamicLlavaForConditionalGeneration):
        try:
            load.from_pretrained(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), error


def test_a_configuration_made_by_hand_passes_the_gate_too():
    for parts, words in OTHER_PARTS.values():
        with pytest.raises(ValueError, match=words):
            DynamicLlavaConfig(**parts)
    check_architecture("nothing", {})
