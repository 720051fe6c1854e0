"""A method of any kind is one new file: each toy in tests/toys runs on every path, found by its name alone."""

import ast
from pathlib import Path

import pytest
import torch

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.methods import method_class, read_method
from dynamic_llava.methods.base import Method
from tests.builders import assert_same_logits, collate, fixed_rows, prompts, shared_model, tiny_config

ROOT = Path(__file__).resolve().parents[2]
TOYS = sorted((ROOT / "tests" / "toys").glob("*.py"))
STEPS = 7
CALL = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
MOST_LINES = 80
"""Of a toy's file, docstrings and imports included."""


def spelled(path):
    """Return the name package.module:Class of the method in a toy's file, its last class."""
    classes = [node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
    return f"tests.toys.{path.stem}:{classes[-1]}"


@pytest.fixture(params=TOYS, ids=lambda path: path.stem)
def toy(request):
    return request.param


def model_for(name):
    """Return the shared random model, or, for a method that learns, one that holds new weights of it."""
    if method_class(name).build is Method.build:
        return shared_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DynamicLlavaForConditionalGeneration(tiny_config(method={"name": name})).eval()
    model.generation_config.eos_token_id = None
    return model


def test_there_is_a_toy_of_each_kind():
    kinds = {path.read_text("utf-8").partition("of the kind ")[2].partition(":")[0] for path in TOYS}
    assert kinds >= {"prefill cut", "decode bit", "learned"}


def test_a_toy_is_one_file_and_nothing_else_knows_it(toy):
    assert toy.read_text("utf-8").count("\n") <= MOST_LINES
    name = spelled(toy).partition(":")[2]
    for file in (ROOT / "dynamic_llava").rglob("*.py"):
        words = file.read_text("utf-8")
        assert f"toys.{toy.stem}" not in words and f"class {name}(" not in words, f"{file} knows {name}"


@torch.no_grad()
def test_a_toy_gives_the_same_on_every_path(toy):
    name, batch = spelled(toy), fixed_rows(seed=20, output=0)
    model, inputs, keys = model_for(name), prompts(batch), torch.arange(len(batch)) + 5
    cached = model.generate(**inputs, **CALL, method=name, sample_key=keys)
    record = cached.sparsity
    dropped = (record.layout.valid & ~record.keep_mask.bool()).sum()
    assert dropped > 0, "a method that drops nothing shows nothing"
    assert record.keep_mask[record.layout.prompt].bool().all()
    uncached = model.generate(**inputs, **CALL, method=name, sample_key=keys, use_cache=False)
    steps = torch.stack(cached.logits, 1)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_same_logits(torch.stack(uncached.logits, 1), steps)
    width = inputs["input_ids"].shape[1]
    output = (torch.arange(width + STEPS) >= width)[None].expand_as(cached.sequences)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1)
    teacher = {"input_ids": cached.sequences, "attention_mask": mask, "output_mask": output, "labels": cached.sequences}
    masked = model(**teacher, pixel_values=inputs["pixel_values"], method=name, sample_key=keys)
    assert_same_logits(masked.logits[:, width - 1 : -1], steps)
    for index, row in enumerate(batch):
        alone = model.generate(**prompts([row]), **CALL, method=name, sample_key=keys[index : index + 1])
        assert_same_logits(torch.stack(alone.logits, 1)[0], steps[index], what=f"row {index}")


def test_a_toy_trains(toy):
    name = spelled(toy)
    method = read_method(name)
    settings = {} if type(method).build is Method.build else {"method": {"name": name}}
    model = DynamicLlavaForConditionalGeneration(tiny_config(**settings)).train()
    inputs = {key: value for key, value in collate(fixed_rows()).items() if key != "keep_mask"}
    out = model(**inputs, labels=inputs["input_ids"], method=method, sample_key=torch.arange(4))
    out.loss.backward()
    assert all(layer.mlp.up_proj.weight.grad.abs().sum() > 0 for layer in model.model.language_model.layers)
    own = [p for part in method.used_parts for p in model.model.language_model.get_submodule(part).parameters()]
    assert all(parameter.grad.abs().sum() > 0 for parameter in own)
    assert bool(own) == bool(out.method_losses)
