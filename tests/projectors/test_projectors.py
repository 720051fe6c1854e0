"""Every projector says how many tokens it makes, and costs what it does; one of one's own is one file."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.costs import ProjectorShape, llava_shape, parameter_counts, training_flops
from dynamic_llava.projectors import PROJECTORS, Mlp, find_projector, image_tokens, name_of, tokens_of
from dynamic_llava.projectors.registry import projector_costs
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import run
from tests.builders import IMAGE_SIZE, PATCH, TINY_SPARSITY, tiny_config
from tests.sft_builders import character_tokenizer, picture, write_data
from tests.toys.pooled import Pooled

OWN = "tests.toys.pooled:Pooled"
EVERY = [*PROJECTORS, OWN]
LAYERS = [-2, [-3, -1]]


def size_of(name):
    """Return pixels a side of images of 4 x 4 patches, or 6 x 6 for blocks that these do not divide into."""
    return IMAGE_SIZE if (IMAGE_SIZE // PATCH) % getattr(find_projector(name), "scale", 1) == 0 else 6 * PATCH


def config_of(projector, layers=-2, **more):
    """Return the tiny configuration with a projector that reads these layers of the tower."""
    values = {key: value for key, value in tiny_config().to_dict().items() if key != "model_type"}
    known = projector in EVERY
    values["vision_config"]["image_size"] = size_of(projector) if known else IMAGE_SIZE
    config = DynamicLlavaConfig(**{**values, "projector": projector, "vision_feature_layer": layers, **more})
    config._attn_implementation = "eager"
    return config


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu"])
def test_mlp_is_transformers_own(layers, bias, activation):
    own = {"multimodal_projector_bias": bias, "projector_hidden_act": activation}
    config = config_of("mlp", layers, **own)
    theirs = LlavaMultiModalProjector(LlavaConfig(
        vision_config=config.vision_config, text_config=config.text_config, vision_feature_layer=layers, **own,
    ))  # fmt: skip
    ours = Mlp(config, ACT2FN[activation])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = torch.randn(2, 16, theirs.linear_1.in_features)
    assert torch.equal(ours(features), theirs(features))


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_everybody_says_the_same_number_of_tokens(name, layers):
    """The projector, the configuration, the processor, the costs, and the model that makes them."""
    config, size = config_of(name, layers), size_of(name)
    tokens = find_projector(name).tokens((size // PATCH,) * 2)
    model = DynamicLlavaForConditionalGeneration(config)
    features = model.model.encode_images(torch.randn(2, 3, size, size)).pooler_output
    processor = DynamicLlavaProcessor(character_tokenizer(), size, PATCH, projector=name)
    said = [image_tokens(config), tokens_of(size, PATCH, projector=name), llava_shape(config).tokens_per_image]
    said += [model.model.tokens_per_image, processor.tokens_per_image, *map(len, features)]
    assert {*said} == {tokens}
    image = {"images": picture(), "text": "<image>"}
    assert int((processor(**image)["input_ids"] == processor.image_token_id).sum()) == tokens


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_costs_are_those_of_the_module(name, layers):
    config = config_of(name, layers)
    shape, projector = llava_shape(config), find_projector(name)(config, nn.GELU())
    assert shape.projector == ProjectorShape(*projector_costs(config))
    counts = parameter_counts(shape, {})
    assert counts["projector"] == sum(weight.numel() for weight in projector.parameters())
    model = DynamicLlavaForConditionalGeneration(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.encode_images(torch.randn(2, 3, size_of(name), size_of(name)))
    frozen = training_flops(shape, config.sparsity, {}, TrainConfig(sparsity_mode="none"))
    assert counter.get_total_flops() == 2 * frozen.per_image


def test_mlp_with_a_class_token_costs_one_token_more():
    shape = llava_shape(config_of("mlp", vision_feature_select_strategy="full"))
    assert shape.tokens_per_image == 17
    assert shape.projector == ProjectorShape(*projector_costs(config_of("mlp", vision_feature_select_strategy="full")))


@pytest.mark.parametrize("how", ["registered", "package.module:Class"])
def test_a_projector_of_ones_own_is_one_file(how, tmp_path, monkeypatch):
    """It trains, is saved, loads again with its processor, and decodes, on as many image tokens as it makes."""
    name = OWN
    if how == "registered":
        monkeypatch.setitem(PROJECTORS, Pooled.name, Pooled)
        name = Pooled.name
    assert name_of(Pooled) == name
    torch.manual_seed(0)
    DynamicLlavaForConditionalGeneration(config_of(name)).save_pretrained(tmp_path / "base")
    DynamicLlavaProcessor(character_tokenizer(), IMAGE_SIZE, PATCH, projector=name).save_pretrained(tmp_path / "base")
    file, images = write_data(tmp_path / "data", samples=4)
    trained = run(RunConfig(
        name="pooled", output_folder=str(tmp_path / "runs"), model=ModelConfig(base=str(tmp_path / "base")),
        data=DataConfig(json=str(file), image_folder=str(images), max_length=400, workers=0),
        sparsity=replace(TINY_SPARSITY, output_min_length=14),
        train=TrainConfig(batch_size=4, max_steps=2, learning_rate=1e-3, projector_learning_rate=1e-2, log_every=1),
    ))  # fmt: skip
    found = [load_file(folder / "model.safetensors") for folder in (tmp_path / "base", trained.folder)]
    before, after = (next(its[key] for key in its if "multi_modal_projector.map.weight" in key) for its in found)
    assert not torch.equal(before, after), "nothing was learned"
    model = DynamicLlavaForConditionalGeneration.from_pretrained(trained.folder).eval()
    processor = DynamicLlavaProcessor.from_pretrained(trained.folder)
    assert isinstance(model.model.multi_modal_projector, Pooled) and processor.projector == name
    inputs = processor(images=picture(), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert out.sparsity.layout.image_lengths().tolist() == [4]
    assert [len(kept) for kept in out.sparsity.image_indices[0]] == [1], "floor(0.25 * 4)"


UNFIT = {
    "unknown": ("perceiver", ["'mlp'", "package.module:Class"]),
    "no text": (7, ["'mlp'"]),
    "not imported": ("antigravity:Projector", ["is not imported", "import antigravity"]),
    "no projector": ("json:JSONDecoder", ["extends Projector"]),
    "not there": ("json:Nothing", ["'Nothing'"]),
}


@pytest.mark.parametrize("way", UNFIT)
def test_a_projector_that_is_none_is_named_and_nothing_is_imported(way, tmp_path):
    name, words = UNFIT[way]
    values = tiny_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**values, "projector": name}, default=str), encoding="utf-8")
    for load in (DynamicLlavaConfig.from_pretrained, lambda folder: config_of(name)):
        with pytest.raises(ValueError) as error:
            load(tmp_path)
        for word in (repr(name), *words):
            assert word in str(error.value), error.value
    assert "antigravity" not in sys.modules


def test_a_grid_that_a_projector_cannot_serve_is_an_error_of_the_configuration():
    with pytest.raises(ValueError, match="even number of patches"):
        config_of(OWN, vision_feature_select_strategy="full")


COMMANDS = {
    "eval": ["--model", "x", "--tasks", "pope", "--output-folder", "out"],
    "chat": ["--model", "x"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_imports_what_its_user_names(command, tmp_path, monkeypatch, capsys):
    """So a checkpoint that names a class of one's own can be asked from the command line."""
    name = f"own_projector_of_{command}"
    (tmp_path / f"{name}.py").write_text("from tests.toys.pooled import Pooled as Mine\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"or name it on the command line \\(--projector {name}:Mine\\)"):
        find_projector(f"{name}:Mine")
    parser = import_module(f"dynamic_llava.{command}.__main__")._parser()
    given = parser.parse_args([*COMMANDS[command], "--projector", f"{name}:Mine"])
    assert find_projector(f"{name}:Mine") is Pooled and "projector" not in vars(given)
    for wrong, words in (("mlp", "leave the option out"), ("json:Nothing", "no class 'Nothing'")):
        with pytest.raises(SystemExit):
            parser.parse_args([*COMMANDS[command], "--projector", wrong])
        assert words in capsys.readouterr().err


def test_an_mlp_is_not_written_into_the_files(tmp_path):
    """So they are read by earlier versions, and by transformers' own classes."""
    config_of("mlp").save_pretrained(tmp_path)
    DynamicLlavaProcessor(character_tokenizer(), IMAGE_SIZE, PATCH).save_pretrained(tmp_path)
    for file in ("config.json", "processor_config.json"):
        assert "projector" not in json.loads((tmp_path / file).read_text(encoding="utf-8"))


def test_costs_of_published_sizes_need_no_torch():
    code = "import sys, dynamic_llava.costs as c; c.LLAVA_SHAPES['7b'].projector; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
