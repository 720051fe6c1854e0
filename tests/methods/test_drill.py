"""A method or a projector of any kind is one new file: each toy in tests/toys runs everywhere, by its name alone."""

import ast
import json
import shutil
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn.functional import pad
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.costs import decoder_shape, flops_exact, kv_bytes
from dynamic_llava.eval import run as runner
from dynamic_llava.eval import tasks
from dynamic_llava.methods import METHODS, describe_method, read_method
from dynamic_llava.methods.base import Method
from dynamic_llava.processing.prompts import SYSTEM
from dynamic_llava.profile.__main__ import main as profile
from dynamic_llava.projectors import PROJECTORS
from tests.builders import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    PATCH,
    Row,
    assert_same_logits,
    collate,
    fixed_rows,
    prompts,
    shared_model,
    tiny_config,
)
from tests.eval.run_builders import TOKENS, Toy, lines_of, run, summary, toy_data
from tests.sft_builders import character_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STEPS = 7
CALL = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
MOST_LINES = 80
"""Of a toy's file, docstrings and imports included."""


@dataclass(frozen=True)
class Drilled:
    """A toy: what its file says of it."""

    file: Path

    @property
    def kind(self):
        """What the first line of the file calls it."""
        return self.file.read_text("utf-8").partition("of the kind ")[2].partition(":")[0]

    @property
    def name(self):
        """package.module:Class of the last class in the file."""
        classes = [node.name for node in ast.parse(self.file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
        return f"tests.toys.{self.file.stem}:{classes[-1]}"

    @property
    def method(self):
        """The method that decides where the toy is used: itself, or, for a projector, Dynamic-LLaVA."""
        return read_method("dynamic" if self.kind == "projector" else self.name)

    @property
    def learns(self):
        """Whether it has weights of its own."""
        return self.kind == "projector" or type(self.method).build is not Method.build

    @property
    def config(self):
        """The settings of a model that can carry it."""
        if self.kind == "projector":
            import_module(f"tests.toys.{self.file.stem}")  # a configuration imports no code
            values = {key: value for key, value in tiny_config().to_dict().items() if key != "model_type"}
            return DynamicLlavaConfig(**{**values, "projector": self.name})
        return tiny_config(method={"name": self.name}) if self.learns else tiny_config()

    def model(self):
        """A random model that tests share; one with new weights of the toy where it learns."""
        return _new_model(self) if self.learns else shared_model()

    def given(self):
        """What a call is told of it: nothing of a projector, which is part of the model."""
        return {} if self.kind == "projector" else {"method": self.name}

    def rows(self, seed=20, output=0):
        """Ragged rows with as many tokens for each image as the model makes."""
        count = self.model().model.tokens_per_image
        return [_shortened(row, count) for row in fixed_rows(seed, output)]


TOYS = [Drilled(file) for file in sorted((ROOT / "tests" / "toys").glob("*.py"))]


@lru_cache
def _new_model(toy):
    config = toy.config
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DynamicLlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def _shortened(row, count):
    """Leave the first `count` tokens of each image, which have 16."""
    image = row.ids == IMAGE_TOKEN
    keep = ~image | ((image.cumsum(0) - 1) % 16 < count)
    return Row(row.ids[keep], row.output[keep], row.pixels, row.keep[keep])


@pytest.fixture(params=TOYS, ids=lambda toy: toy.file.stem)
def toy(request):
    return request.param


def test_there_is_a_toy_of_each_kind():
    assert sorted(toy.kind for toy in TOYS) == [
        "decode bit", "eviction", "learned", "merging", "prefill cut", "projector", "two cuts", "vision stage",
    ]  # fmt: skip


def test_a_toy_is_one_file_and_nothing_else_knows_it(toy):
    assert toy.file.read_text("utf-8").count("\n") <= MOST_LINES
    assert toy.file.stem not in {**METHODS, **PROJECTORS}
    marks = (f"toys.{toy.file.stem}", f"toys import {toy.file.stem}", f"class {toy.name.partition(':')[2]}(")
    files = [*(ROOT / "dynamic_llava").rglob("*.py"), *(other.file for other in TOYS)]
    assert [file for file in files if any(mark in file.read_text("utf-8") for mark in marks)] == [toy.file]


def taught(toy, model, inputs, sequences, keys, copies=1):
    """The masked pass over generated sequences, as training and teacher forcing run it; `copies` rows of each row."""
    width = inputs["input_ids"].shape[1]
    new = sequences.shape[1] - width
    images = (inputs["input_ids"] == IMAGE_TOKEN).sum(1) // model.model.tokens_per_image
    pixels = [one for one in inputs["pixel_values"].split(images.tolist()) for _ in range(copies)]
    out = model(
        input_ids=sequences,
        attention_mask=pad(inputs["attention_mask"].repeat_interleave(copies, 0), (0, new), value=1),
        pixel_values=torch.cat(pixels),
        output_mask=(torch.arange(width + new) >= width).expand_as(sequences),
        labels=sequences,
        sample_key=keys.repeat_interleave(copies, 0),
        **toy.given(),
    )
    return out.logits[:, width - 1 : -1]


@torch.no_grad()
def test_a_toy_gives_the_same_on_every_path(toy):
    """With a cache, without, and in one masked pass; rows alone as in their batch. Eviction has one path, its cache."""
    batch = toy.rows()
    model, inputs, keys = toy.model(), prompts(batch), torch.arange(len(batch)) + 5
    cached = model.generate(**inputs, **CALL, **toy.given(), sample_key=keys)
    steps = torch.stack(cached.logits, 1)
    if toy.method.evicts:
        for refused in (
            lambda: model.generate(**inputs, **CALL, **toy.given(), use_cache=False),
            lambda: taught(toy, model, inputs, cached.sequences, keys),
        ):
            with pytest.raises(ValueError, match=f"'{toy.method.name}' evicts"):
                refused()
    else:
        uncached = model.generate(**inputs, **CALL, **toy.given(), sample_key=keys, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        assert_same_logits(torch.stack(uncached.logits, 1), steps)
        assert_same_logits(taught(toy, model, inputs, cached.sequences, keys), steps)
    for index, row in enumerate(batch):
        alone = model.generate(**prompts([row]), **CALL, **toy.given(), sample_key=keys[index : index + 1])
        assert_same_logits(torch.stack(alone.logits, 1)[0], steps[index], what=f"row {index}")


@torch.no_grad()
def test_a_toys_beams_are_scored_as_they_are_taught(toy):
    """Each beam's score is that of its own masked pass; where something is evicted, that of the row alone."""
    batch = toy.rows(seed=21)
    model, inputs, keys = toy.model(), prompts(batch), torch.arange(len(batch)) + 5
    call = {**CALL, **toy.given(), "num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    out = model.generate(**inputs, **call, sample_key=keys)
    if toy.method.evicts:
        for index, row in enumerate(batch):
            alone = model.generate(**prompts([row]), **call, sample_key=keys[index : index + 1])
            assert_same_logits(alone.sequences_scores, out.sequences_scores[2 * index : 2 * index + 2])
        return
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    logits = taught(toy, model, inputs, out.sequences, keys, copies=2).log_softmax(-1)
    assert_same_logits(out.sequences_scores, logits.gather(-1, said[..., None])[..., 0].mean(1))


@torch.no_grad()
def test_a_toys_record_and_costs_are_what_the_modules_did(toy):
    """FLOPs counted on the layers, and slots and bytes of the cache, are those of the tokens that the record tells."""
    batch = toy.rows(seed=22)
    model, inputs = toy.model(), prompts(batch[:1])
    shape, dropped = decoder_shape(model.config), 0
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        out = model(**inputs, **toy.given(), use_cache=True)
    model.set_attn_implementation("sdpa")
    counts = counter.get_flop_counts()
    layers = [name for name in counts if name.rpartition(".")[0].endswith("language_model.layers")]
    tokens = out.sparsity.tokens_per_layer()[0].tolist()
    evidence = toy.method.evidence_flops(tokens, shape)
    assert sum(sum(counts[name].values()) for name in layers) == flops_exact(tokens, shape) + evidence
    out = model.generate(**prompts(batch), **CALL, **toy.given())
    record, stored = out.sparsity, torch.stack([layer.slots.lengths for layer in out.cache.layers], 1)
    assert record.keep_mask[record.layout.prompt].bool().all()
    if toy.method.evicts:
        assert torch.equal(stored, record.head_lengths)
        dropped = (stored < record.tokens_per_layer()[..., None]).sum()
    else:
        assert torch.equal(stored, record.tokens_per_layer())
        assert stored[:, -1].tolist() == record.cache_lengths.tolist()
        dropped = (record.layout.valid & ~record.keep_mask.bool()).sum()
        filled = [kv_bytes(shape, row.tolist(), bytes_per_value=4) for row in stored]
        assert sum(filled) <= out.cache.allocated_bytes()
    assert dropped > 0, "a method that drops nothing shows nothing"


def test_a_toy_trains(toy):
    """The layers get a gradient, and so do all weights of the toy; what evicts is refused by name."""
    torch.manual_seed(0)
    model = DynamicLlavaForConditionalGeneration(toy.config).train()
    inputs = {key: value for key, value in collate(toy.rows(seed=0, output=6)).items() if key != "keep_mask"}
    call = {**inputs, **toy.given(), "labels": inputs["input_ids"], "sample_key": torch.arange(4)}
    if toy.method.evicts:
        with pytest.raises(ValueError, match=f"'{toy.method.name}' evicts"):
            model(**call)
        return
    out = model(**call)
    out.loss.backward()
    assert all(layer.mlp.up_proj.weight.grad.abs().sum() > 0 for layer in model.model.language_model.layers)
    own = [p for part in toy.method.used_parts for p in model.model.language_model.get_submodule(part).parameters()]
    assert bool(own) == bool(out.method_losses)
    if toy.kind == "projector":
        own = [*model.model.multi_modal_projector.parameters()]
    assert bool(own) == toy.learns and all(parameter.grad.abs().sum() > 0 for parameter in own)


@pytest.mark.parametrize("toy", [toy for toy in TOYS if toy.learns], ids=lambda toy: toy.file.stem)
@torch.no_grad()
def test_a_toy_that_learns_is_saved_and_loaded(toy, tmp_path):
    model, inputs = toy.model(), prompts(toy.rows())
    model.save_pretrained(tmp_path)
    again = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    first, second = (one.generate(**inputs, **CALL) for one in (model, again))
    assert torch.equal(torch.stack(first.logits), torch.stack(second.logits))
    assert torch.equal(first.sparsity.keep_mask, second.sparsity.keep_mask)


@pytest.fixture
def asked(toy, monkeypatch, tmp_path):
    """Run the tiny benchmark with a toy, named on the command line; return its questions, output folder, processor."""
    monkeypatch.setattr(runner, "TIMED_TOKENS", 2)
    monkeypatch.setattr(runner, "TIMED_REPEATS", 1)
    monkeypatch.setitem(tasks.TASKS, Toy.name, Toy)
    questions, out, model = toy_data(tmp_path, 4), tmp_path / "out", toy.model()
    own = {"projector": toy.name} if toy.kind == "projector" else {}
    processor = DynamicLlavaProcessor(character_tokenizer(), IMAGE_SIZE, PATCH, **own)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    words = [word for name, value in toy.given().items() for word in (f"--{name}", value)]
    assert run(tmp_path / "model", "toy", tmp_path, out, "--batch-size", 4, *words) == 0
    return questions, out, processor


@pytest.mark.parametrize(
    "toy",
    [
        pytest.param(
            toy, id=toy.file.stem, marks=() if toy.kind in ("merging", "eviction", "learned") else pytest.mark.slow
        )
        for toy in TOYS
    ],
)
@torch.no_grad()
def test_a_toy_is_benchmarked_by_its_name(toy, asked, tmp_path):
    """Answers and counts are those of generate(), the table says whose they are, and has its efficiency."""
    questions, out, processor = asked
    model = DynamicLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    for place, (line, question) in enumerate(zip(lines_of(out / "answers" / "toy.jsonl"), questions, strict=True)):
        text = f"{SYSTEM} USER: {'<image>' + chr(10) if question['image'] else ''}{question['text']} ASSISTANT:"
        images = [tmp_path / "toy" / "images" / question["image"]] if question["image"] else None
        inputs = dict(processor(text=text, images=images), sample_key=torch.tensor([place]))
        said = model.generate(
            **inputs, **toy.given(), max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True
        )
        answer = said.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        assert line["metadata"]["tokens"] == answer[: len(line["metadata"]["tokens"])]
        assert line["metadata"]["image_kept"] == [len(kept) for kept in said.sparsity.image_indices[0]]
    found = summary(out)
    if toy.kind != "projector":
        assert found["method"] == describe_method(toy.method) and found["method"] in (out / "table.md").read_text()
    costs = {name: one["value"] for name, one in found["tasks"]["toy"]["efficiency"].items()}
    assert costs["prefill_flop_exact"] > 0 and costs["kv_bytes"] > 0
    assert 0 < costs["image_tokens_per_layer"] <= model.model.tokens_per_image


@pytest.mark.parametrize("command", ["memory", pytest.param("latency", marks=pytest.mark.slow)])
@pytest.mark.parametrize("toy", [toy for toy in TOYS if toy.kind != "projector"], ids=lambda toy: toy.file.stem)
def test_a_toy_is_profiled_by_its_name(toy, command, capsys):
    """Its layers hold less than dense ones; what would decide by random weights is refused."""
    words = ["--preset", "cpu-bytes", "--layers", "4", "--outputs", "8", "--json", "--method", toy.name]
    words += ["--batch-size", "1", "--device", "cpu"] if command == "latency" else []
    if toy.learns:
        assert profile([command, *words]) == 2
        assert "models have random weights" in capsys.readouterr().err
        return
    assert profile([command, *words]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    rows = [row for row in rows if command == "memory" or (row["phase"] == "step" and row["outputs"] == 8)]
    held = {row["way"]: row["cache" if command == "memory" else "bytes"] for row in rows}
    assert held["both"] < held["dense"] or (toy.kind == "decode bit" and command == "memory")  # in whole blocks
    assert command == "memory" or all(row["seconds"] > 0 for row in rows)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.slow
@torch.no_grad()
def test_a_toys_compiled_steps_are_its_steps(toy):
    """On a model that was asked for hidden states before, as a shared one may have been or not."""
    model, inputs = toy.model(), prompts(toy.rows())
    torch._dynamo.reset()
    if toy.method.evicts:
        with pytest.raises(ValueError, match="compile"):
            model.generate(**inputs, **CALL, **toy.given(), compile=True)
        return
    model(**inputs, **toy.given(), output_hidden_states=True)
    eager, compiled = (model.generate(**inputs, **CALL, **toy.given(), compile=on) for on in (False, True))
    assert_same_logits(torch.stack(compiled.logits), torch.stack(eager.logits))
    assert torch.equal(compiled.sparsity.until, eager.sparsity.until)
    torch._dynamo.reset()
