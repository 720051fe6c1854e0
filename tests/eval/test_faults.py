"""What goes wrong while a model is evaluated: logits that are no numbers, a full disk, too little memory."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.eval import answering, folder, predict, tasks, writing
from dynamic_llava.eval import run as runner
from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.answers import AnswerLine, write_answers
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.files import EXIT_WRITE_FAILED
from tests.eval.run_builders import Toy, ragged_checkpoint, run, summary, toy_data
from tests.eval.task_data import TASK_DATA


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return ragged_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "TIMED_TOKENS", 2)
    monkeypatch.setattr(runner, "TIMED_REPEATS", 1)
    monkeypatch.setitem(tasks.TASKS, Toy.name, Toy)


@pytest.fixture
def toy(tmp_path):
    return toy_data(tmp_path)


def spoilt(checkpoint, folder, name, value):
    """Return a copy of a checkpoint with one value of a tensor changed."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if name in key)
    tensors[key].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["toy", "lvis_single", pytest.param("lvis_multi", marks=pytest.mark.slow)])
def test_logits_that_are_no_numbers_are_refused(checkpoint, tmp_path, toy, task, value):
    """Nothing is said, nothing is scored, and the exit code tells: for answers and for perplexities."""
    for name in ("lvis_single", "lvis_multi"):
        TASK_DATA[name](tmp_path)
    broken = spoilt(checkpoint, tmp_path / "broken", "lm_head", value)
    assert run(broken, task, tmp_path, tmp_path / "out") == 1
    row = summary(tmp_path / "out")["tasks"][task]
    assert row["value"] is None and predict.NOT_FINITE in row["error"] and "question" in row["error"]
    assert not list((tmp_path / "out" / "answers").glob(f"{task}.jsonl"))


def test_empty_answers_are_said(checkpoint, tmp_path, monkeypatch, toy):
    said = answering.answer

    def empty(model_run, asked):
        return [answering.Said("" if one.place < 2 else "x", own.metadata) for one, own in
                zip(asked, said(model_run, asked), strict=True)]  # fmt: skip

    monkeypatch.setattr(runner, "answer", empty)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    warnings = summary(tmp_path / "out")["tasks"]["toy"]["warnings"]
    assert any(one.startswith("empty answers: 2 ('q0', 'q0')") for one in warnings)
    assert "empty answers: 2" in (tmp_path / "out" / "table.md").read_text()


FULL, READ_ONLY = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EROFS, "Read-only file system")
FILES = (
    ("vizwiz-test.part0.jsonl", FULL), ("vizwiz-test.run", READ_ONLY), ("vizwiz-test.jsonl", FULL),
    ("vizwiz_upload.json", READ_ONLY), ("summary.json", FULL), ("table.md", READ_ONLY),
)  # fmt: skip
"""What an evaluation writes, in its order."""


def refusing(patch, name, error):
    """Let the disk refuse the file of this name: as it is opened for writing, appended to, or put in place."""

    def check(path):
        if name in str(path):
            raise error

    opened, replaced, appended = Path.open, Path.replace, folder.append_answers
    patch.setattr(
        Path, "open", lambda path, mode="r", *a, **k: ("w" in mode and check(path)) or opened(path, mode, *a, **k)
    )
    patch.setattr(Path, "replace", lambda path, target: check(target) or replaced(path, target))
    patch.setattr(folder, "append_answers", lambda file, answers: check(file.name) or appended(file, answers))


@pytest.fixture(scope="module")
def undisturbed(checkpoint, tmp_path_factory):
    """The answers of a run to which nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed")
    TASK_DATA["vizwiz"](root)
    assert run(checkpoint, "vizwiz:test", root, root / "out") == 0
    return (root / "out" / "answers" / "vizwiz-test.jsonl").read_bytes()


FEW = ("vizwiz-test.part0.jsonl", "summary.json")
"""These are refused in the fast tests as well."""


@pytest.mark.parametrize(
    ("name", "error"),
    [pytest.param(*one, id=one[0], marks=() if one[0] in FEW else pytest.mark.slow) for one in FILES],
)
def test_a_disk_that_takes_no_more_ends_the_run_with_its_own_code(
    checkpoint, tmp_path, capsys, toy, undisturbed, name, error
):
    """The path is named, rows that were written stay, the table is printed; with room the same command goes on."""
    out = tmp_path / "out"
    TASK_DATA["vizwiz"](tmp_path)
    assert run(checkpoint, "toy", tmp_path, out) == 0
    before = summary(out)["tasks"]["toy"]
    with pytest.MonkeyPatch.context() as patch:
        refusing(patch, name, error)
        capsys.readouterr()
        assert run(checkpoint, "vizwiz:test", tmp_path, out) == EXIT_WRITE_FAILED
    printed = capsys.readouterr()
    assert f"{out}/" in printed.err and "could not be written" in printed.err and error.strerror in printed.err
    assert "| benchmark" in printed.out and "Traceback" not in printed.err
    assert summary(out)["tasks"]["toy"] == before and (out / "table.md").is_file()
    assert run(checkpoint, "vizwiz:test", tmp_path, out) == 0
    assert (out / "answers" / "vizwiz-test.jsonl").read_bytes() == undisturbed
    assert list(summary(out)["tasks"]) == ["toy", "vizwiz:test"]
    assert not list(out.rglob("*.part*"))


@pytest.mark.parametrize("task", ["pope", "vizwiz", "mmbench", "seed:all", "llava_bench", "mmvet", "vqav2"])
def test_a_file_of_scoring_that_cannot_be_written_is_named(tmp_path, capsys, task):
    """Metrics as JSON, and the file of every server and judge."""
    made = TASK_DATA[task.split(":")[0]](tmp_path)
    asked = get_task(task).questions(tmp_path)
    answers = [AnswerLine(one.id, "A", prompt=one.logged_prompt) for one in asked]
    path = write_answers(tmp_path / "answers.jsonl", answers)
    assert made
    given = ["score", "--task", task, "--answers", path, "--data-root", tmp_path, "--json", tmp_path / "score.json"]
    given += [] if task == "pope" else ["--submission-dir", tmp_path / "up"]
    name = "score.json" if task == "pope" else str(tmp_path / "up")
    for error in (FULL, READ_ONLY):
        with pytest.MonkeyPatch.context() as patch:
            refusing(patch, name, error)
            patch.setattr(writing.os, "replace", lambda *_, error=error: (_ for _ in ()).throw(error))
            assert main(list(map(str, given))) == EXIT_WRITE_FAILED
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path}/") and error.strerror in said and said.count("\n") == 1


class Memory:
    """Answers batches up to a size; larger ones run out of memory, as an accelerator or the CPU's allocator says it."""

    def __init__(self, rows, error):
        self.rows, self.error, self.sizes = rows, error, []

    def __call__(self, model_run, asked):
        self.sizes.append(len(asked))
        if len(asked) > self.rows:
            raise self.error
        return answering.answer(model_run, asked)


OUT_OF_MEMORY = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_whatever_says_that_memory_ran_out_halves_a_batch(capsys, error):
    sizes = []

    def respond(model_run, asked):
        sizes.append(len(asked))
        if len(asked) > 2:
            raise error
        return [one.place for one in asked]

    model_run = answering.ModelRun(None, None, "both", 5, 1)
    within = answering.WithinMemory(respond, model_run)
    asked = [answering.Asked(place, tasks.Question(place, "?")) for place in range(7)]
    assert within(asked[:5]) == [0, 1, 2, 3, 4] and within(asked[5:]) == [5, 6] and within([]) == []
    assert sizes == [5, 2, 2, 1, 2]
    assert "out of memory at 5 questions at once; going on with 2" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="something else"):
        answering.WithinMemory(Memory(0, RuntimeError("something else")), model_run)(asked)


def test_a_batch_that_does_not_fit_is_halved(checkpoint, tmp_path, monkeypatch, capsys, toy):
    assert run(checkpoint, "toy", tmp_path, tmp_path / "whole") == 0
    memory = Memory(2, OUT_OF_MEMORY["accelerator"])
    monkeypatch.setattr(runner, "answer", memory)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out", "--batch-size", 5) == 0
    assert memory.sizes[:2] == [5, 2] and set(memory.sizes[1:]) <= {1, 2}
    files = [tmp_path / name / "answers" / "toy.jsonl" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    monkeypatch.setattr(runner, "answer", Memory(0, OUT_OF_MEMORY["python"]))
    assert run(checkpoint, "toy", tmp_path, tmp_path / "none", "--batch-size", 5) == 1
    assert "alone does not fit into memory" in summary(tmp_path / "none")["tasks"]["toy"]["error"]


def test_costs_of_a_batch_that_does_not_fit_are_those_of_a_smaller_one(checkpoint, tmp_path, monkeypatch, capsys, toy):
    """What takes memory is generating, for the answers as for the times of a row."""
    generate, sizes = DynamicLlavaForConditionalGeneration.generate, []

    def little_memory(self, *arguments, **settings):
        sizes.append(len(settings["input_ids"]))
        if sizes[-1] > 2:
            raise OUT_OF_MEMORY["cpu"]
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(DynamicLlavaForConditionalGeneration, "generate", little_memory)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out", "--batch-size", 5) == 0
    row = summary(tmp_path / "out")["tasks"]["toy"]
    assert row["efficiency"]["speed_batch"]["value"] == 2 and not row["error"]
    assert sizes.count(5) == 2, "once for the answers, once for the times"
    assert capsys.readouterr().err.count("out of memory at 5 questions at once; going on with 2") == 2
