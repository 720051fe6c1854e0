"""`method` goes everywhere: every registered method, and a class of one's own, through every entry point, and back."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from dynamic_llava import METHODS, Conversation
from dynamic_llava.chat.__main__ import main as chat
from dynamic_llava.cli.commands import method_words, take_method
from dynamic_llava.costs import decoder_shape, kv_bytes
from dynamic_llava.eval import run as runner
from dynamic_llava.eval import tasks
from dynamic_llava.eval.__main__ import main as evaluate
from dynamic_llava.eval.identity import method_settings
from dynamic_llava.methods import describe_method, import_named, print_method, read_method
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing.prompts import SYSTEM
from dynamic_llava.profile.__main__ import main as profile
from tests.builders import build_model, dense_twin, tiny_config
from tests.eval.run_builders import TOKENS, Toy, lines_of, toy_data
from tests.eval.task_data import save_picture
from tests.sft_builders import tiny_processor

OWN_MODULE = '''
"""A method of one's own: the image tokens of the largest norm, in a file beside the library."""

from dataclasses import dataclass
from typing import ClassVar

from dynamic_llava.methods.base import OneCut
from dynamic_llava.sparsity.decisions import top_k_keep


@dataclass(frozen=True)
class Norm(OneCut):
    name: ClassVar[str] = "norm"
    training_free: ClassVar[bool] = True
    image_keep_rate: float = 0.25

    def keep_image(self, cut, images, learned):
        return top_k_keep(images.hidden.norm(dim=-1), rate=self.image_keep_rate, valid=images.valid)
'''
OWN = "own_method_of_a_user:Norm"
FREE = (*(name for name, method in sorted(METHODS.items()) if method.training_free), OWN)
"""Methods that need no weights of their own."""


@pytest.fixture(scope="module", autouse=True)
def own_module(tmp_path_factory):
    """A module that Python finds, as with PYTHONPATH."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_method_of_a_user.py").write_text(OWN_MODULE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense checkpoint in llava-hf layout, as transformers saves it."""
    folder = tmp_path_factory.mktemp("dense")
    twin = dense_twin(build_model())
    twin.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llava"
    return folder


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "TIMED_TOKENS", 2)
    monkeypatch.setattr(runner, "TIMED_REPEATS", 1)
    monkeypatch.setitem(tasks.TASKS, Toy.name, Toy)
    return toy_data(tmp_path, 6)


def asked(model, root, out, *words):
    """Run the benchmark; return the exit code."""
    places = ("--model", model, "--tasks", "toy", "--data-root", root, "--output-folder", out, "--batch-size", 4)
    return evaluate([str(word) for word in (*places, "--max-new-tokens", TOKENS, *words)])


def settings_of(name):
    """Return settings that are not the defaults, as far as a method has them."""
    if name == "mixed":
        return {"name": name, "image_by": settings_of("fastv"), "output_by": settings_of("random")}
    known = {"layer": 3, "layers": [1, 3], "image_keep_rate": 0.25, "stage_keep_rate": 0.25, "seed": 5, "window": 6}
    method = read_method(name)
    return {"name": name} | {setting: value for setting, value in known.items() if hasattr(method, setting)}


@pytest.mark.parametrize("name", [*sorted(METHODS), OWN])
def test_a_method_is_the_same_from_words(name):
    printed = print_method(read_method(settings_of(name)))
    words = ["--limit", "3", *method_words(printed), "--", "--method", "x"]
    rest, method = take_method(words)
    assert rest == ["--limit", "3", "--", "--method", "x"]
    assert print_method(read_method(method)) == printed
    split = [part for word in method_words(printed) for part in word.split("=", 1)]
    assert take_method(split)[1] == method


@pytest.mark.parametrize("name", FREE)
def test_a_dense_checkpoint_is_benchmarked_with_any_method_that_learns_nothing(
    name, dense, toy, tmp_path, caplog, capsys
):
    spelled, out = settings_of(name), tmp_path / "out"
    assert asked(dense, tmp_path, out, *method_words(spelled)) == 0
    assert "predictor" not in caplog.text + capsys.readouterr().err
    lines = lines_of(out / "answers" / "toy.jsonl")
    model, processor = DynamicLlavaForConditionalGeneration.from_pretrained(dense).eval(), tiny_processor()
    method = read_method(spelled, model.config.sparsity)
    for place, (line, question) in enumerate(zip(lines, toy, strict=True)):
        text = f"{SYSTEM} USER: {'<image>' + chr(10) if question['image'] else ''}{question['text']} ASSISTANT:"
        images = [tmp_path / "toy" / "images" / question["image"]] if question["image"] else None
        inputs = dict(processor(text=text, images=images), sample_key=torch.tensor([place]))
        said = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, method=spelled, return_dict_in_generate=True
        )
        assert line["metadata"]["tokens"] == said.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        if said.sparsity is not None:
            assert line["metadata"]["image_kept"] == [len(kept) for kept in said.sparsity.image_indices[0]]
            assert line["metadata"]["output_kept"] == int(said.sparsity.output_decisions[0].sum())
    summary = json.loads((out / "summary.json").read_text())
    if method.is_dense:
        assert summary["sparsity"] == "none" and summary["method"] is None
    else:
        record = json.loads((out / "answers" / "toy.run.json").read_text())
        said = method_settings(method, model.config.sparsity)["method"]  # without what files of before do not say
        assert said.items() <= record["method"].items() and "sparsity" not in record
        assert summary["sparsity"] is None and summary["method"] == describe_method(method)
        table = (out / "table.md").read_text()
        assert summary["method"] in table.splitlines()[0] and f"ours, method `{summary['method']}`" in table


def test_answers_of_different_methods_never_mix(dense, toy, tmp_path, capsys, own_module):
    out = tmp_path / "out"
    first = ("--method", "fastv", "--method.layer", "3")
    assert asked(dense, tmp_path, out, *first) == 0
    before = (out / "answers" / "toy.jsonl").read_bytes()
    for words, difference in (
        (("--method", "fastv"), "method.layer was 3 and is 2"),
        (("--method", "random", "--method.layer", "3"), "method.name was fastv and is random"),
        (("--sparsity", "none"), "sparsity was absent and is none"),
        (("--method", "dense"), "sparsity was absent and is none"),
    ):
        assert asked(dense, tmp_path, out, *words) == 2
        assert difference in capsys.readouterr().err
    assert asked(dense, tmp_path, out, "--method.layer=3", "--method=fastv") == 0  # another spelling of the same
    assert (out / "answers" / "toy.jsonl").read_bytes() == before
    ids = {line["answer_id"] for line in lines_of(out / "answers" / "toy.jsonl")}
    assert asked(dense, tmp_path, tmp_path / "other", "--method", "random") == 0
    assert not ids & {line["answer_id"] for line in lines_of(tmp_path / "other" / "answers" / "toy.jsonl")}
    # The code of a class of one's own belongs to what its answers depend on.
    assert asked(dense, tmp_path, tmp_path / "own", "--method", OWN) == 0
    with (own_module / "own_method_of_a_user.py").open("a") as file:
        file.write("\n# another version\n")
    assert asked(dense, tmp_path, tmp_path / "own", "--method", OWN) == 2
    assert "method.file was" in capsys.readouterr().err


def test_the_shipped_model_is_asked_by_its_short_name(toy, tmp_path):
    assert asked("tiny", tmp_path, tmp_path / "out", "--method", "fastv", "--limit", "1") == 0
    assert len(lines_of(tmp_path / "out" / "answers" / "toy.jsonl")) == 1


def test_a_folder_of_an_earlier_version_goes_on(dense, toy, tmp_path, monkeypatch):
    """Summaries without `method`, and records that know `sparsity` alone."""
    out = tmp_path / "out"
    assert asked(dense, tmp_path, out, "--sparsity", "none") == 0
    summary = json.loads((out / "summary.json").read_text())
    del summary["method"]
    (out / "summary.json").write_text(json.dumps(summary))
    assert "method" not in json.loads((out / "answers" / "toy.run.json").read_text())
    monkeypatch.setattr(runner, "answer", None)  # nothing is asked again
    assert asked(dense, tmp_path, out, "--sparsity", "none") == 0


@pytest.mark.parametrize("name", FREE)
@torch.no_grad()
def test_a_chat_with_a_dense_checkpoint(name, dense, monkeypatch, capsys, tmp_path, caplog):
    spelled = settings_of(name)
    save_picture(tmp_path / "a.png", 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nAnd this?\n"))
    words = ["--model", dense, "--image", tmp_path / "a.png", "--max-new-tokens", TOKENS, *method_words(spelled)]
    assert chat(list(map(str, words))) == 0
    out, err = capsys.readouterr()
    assert "predictor" not in err + caplog.text
    model, processor = DynamicLlavaForConditionalGeneration.from_pretrained(dense).eval(), tiny_processor()
    talk = Conversation(model, processor, method=spelled, max_new_tokens=TOKENS)
    answers = [talk.ask("What is it?", [tmp_path / "a.png"]), talk.ask("And this?")]
    assert out.split() == " ".join(answer.text for answer in answers).split()
    assert all(str(answer.use) in err for answer in answers)
    if read_method(spelled).evicts:
        shape, held = decoder_shape(model.config), talk.record.head_lengths
        assert answers[1].use.bytes == kv_bytes(shape, 1, bytes_per_value=4) * int(held.sum()) // held[0].numel()
        return
    if talk.record is not None:
        tokens = talk.record.tokens_per_layer()[0].tolist()
        assert answers[1].use.bytes == kv_bytes(decoder_shape(model.config), tokens, bytes_per_value=4)
    # Two turns on one cache are one sequence, without a cache.
    start = talk.ids.shape[1] - len(answers[1].tokens)
    scratch = model.generate(
        input_ids=talk.ids[:, :start], output_mask=talk.output_mask[:, :start], method=spelled, use_cache=False,
        attention_mask=torch.ones(1, start, dtype=torch.int64), max_new_tokens=len(answers[1].tokens), do_sample=False,
        pixel_values=processor.preprocess_images([tmp_path / "a.png"]),
    )  # fmt: skip
    assert scratch[0, start:].tolist() == answers[1].tokens


WRONG = {
    "contradiction": (("--sparsity", "image", "--method", "fastv"), "sparsity='image' and method 'fastv' contradict"),
    "near name": (("--method", "fastvv"), "did you mean 'fastv'"),
    "near setting": (("--method", "fastv", "--method.layr", "3"), "did you mean 'layer'"),
    "no number": (("--method", "fastv", "--method.layer", "x"), "layer='x' is not a whole number"),
    "no name": (("--method.layer", "3"), "does not say its name"),
    "no class": (("--method", "own_method_of_a_user:Nrm"), "did you mean 'Norm'? the methods are 'Norm'\n"),
    "learned": (("--method", "dynamic"), "is a dense checkpoint without predictors"),
    "learned by default": ((), "give --sparsity none, or a method that learns nothing, such as --method fastv"),
    "layer outside": (("--method", "fastv", "--method.layer", "40"), "40"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_told_before_anything_is_written(case, dense, toy, tmp_path, capsys):
    words, message = WRONG[case]
    assert asked(dense, tmp_path, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err and not Path(tmp_path / "out").exists()


def test_a_value_that_is_missing(capsys):
    with pytest.raises(SystemExit):
        evaluate(["--model", "m", "--method"])
    assert "--method needs a value" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate(["score", "--task", "gqa", "--answers", "a.jsonl", "--method", "fastv"])
    assert "--method" in capsys.readouterr().err


LEARNED_MODULE = """
from dataclasses import dataclass

from tests.toys.linear import Linear


@dataclass(frozen=True)
class Mine(Linear):
    pass
"""
LEARNED = "learned_method_of_a_user:Mine"


@pytest.fixture(scope="module")
def learned(own_module, tmp_path_factory):
    """A checkpoint with the weights of a class of one's own, whose module nothing has imported."""
    (own_module / "learned_method_of_a_user.py").write_text(LEARNED_MODULE)
    folder = tmp_path_factory.mktemp("learned")
    read_method(LEARNED)
    model = DynamicLlavaForConditionalGeneration(tiny_config(method={"name": LEARNED, "image_keep_rate": 0.4}))
    model.config.untrained_predictors = []
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def recorded(out):
    """Return the settings of the method that answers depend on."""
    return json.loads((out / "answers" / "toy.run.json").read_text())["method"]


@pytest.fixture
def not_imported(learned):
    """What a fresh process knows."""
    sys.modules.pop("learned_method_of_a_user", None)
    yield
    read_method(LEARNED)


def test_a_named_class_opens_its_checkpoint_and_what_it_was_trained_with_holds(
    learned, not_imported, toy, tmp_path, capsys
):
    """The user's word on the command line imports what the checkpoint's word must not."""
    assert asked(learned, tmp_path, tmp_path / "refused") != 0
    assert f"--method {LEARNED}" in capsys.readouterr().err
    assert asked(learned, tmp_path, tmp_path / "out", "--method", LEARNED) == 0
    assert recorded(tmp_path / "out")["image_keep_rate"] == 0.4
    assert asked(learned, tmp_path, tmp_path / "half", "--method", LEARNED, "--method.image-keep-rate", "0.5") == 0
    assert recorded(tmp_path / "half")["image_keep_rate"] == 0.5


def test_a_class_that_a_setting_names_is_imported_too(learned, not_imported):
    import_named({"name": "mixed", "image_by": LEARNED, "output_by": "none"})
    assert "learned_method_of_a_user" in sys.modules
    import_named({"name": "mixed", "image_by": "no such method"})  # reading it says what is wrong, and where


def test_a_named_class_opens_its_checkpoint_in_a_chat(learned, not_imported, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    save_picture(picture)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    words = ["--model", str(learned), "--image", str(picture), "--method", LEARNED, "--max-new-tokens", "2"]
    assert chat(words) == 0, capsys.readouterr().err


def test_memory_is_reckoned_for_a_run_that_names_a_class(learned, not_imported, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    settings = {"model": {"base": str(learned)}, "sparsity": {"method": {"name": LEARNED}}}
    file.write_text(json.dumps(settings))
    assert profile(["memory", str(file), "--gpus", "1"]) == 0, capsys.readouterr().err


def test_a_model_tuned_under_a_rule_does_not_decide_by_untrained_predictors(toy, tmp_path, capsys):
    """A run that trained under a fixed rule saves predictors that have learned nothing, and says so."""
    folder = tmp_path / "tuned"
    model = build_model()
    model.config.untrained_predictors = ["image_predictor", "output_predictor"]
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    assert asked(folder, tmp_path, tmp_path / "out") != 0
    assert "untrained image_predictor and output_predictor" in capsys.readouterr().err
    assert asked(folder, tmp_path, tmp_path / "fastv", "--method", "fastv") == 0
