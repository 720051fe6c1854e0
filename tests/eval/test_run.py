"""The run command: every benchmark end to end, the same answers whatever the batch, resuming, and what goes wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from safetensors.torch import load_file, save_file

from dynamic_llava.eval import answering, tasks
from dynamic_llava.eval import run as runner
from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.answers import read_answers
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.processing.prompts import SYSTEM
from dynamic_llava.tiny.__main__ import main as tiny_main
from tests.builders import TOKENS_PER_IMAGE, dense_twin, shared_model
from tests.eval.run_builders import TOKENS, Toy, lines_of, ragged_checkpoint, run, summary, toy_data
from tests.eval.task_data import TASK_DATA, save_hub
from tests.sft_builders import picture, tiny_processor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return ragged_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times on two tokens; the toy benchmark is registered."""
    monkeypatch.setattr(runner, "TIMED_TOKENS", 2)
    monkeypatch.setattr(runner, "TIMED_REPEATS", 1)
    monkeypatch.setitem(tasks.TASKS, Toy.name, Toy)


@pytest.fixture
def toy(tmp_path):
    return toy_data(tmp_path)


def answers(out):
    return (out / "answers" / "toy.jsonl").read_bytes()


class Counter:
    """Counts the questions that reach the model, and may stop the run."""

    def __init__(self, monkeypatch, stop_after=None):
        self.asked, self.stop_after = [], stop_after
        monkeypatch.setattr(runner, "answer", self)

    def __call__(self, model_run, asked):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [one.place for one in asked]
        return answering.answer(model_run, asked)


@pytest.fixture(scope="module")
def every_task(tmp_path_factory, checkpoint):
    """One run of every benchmark and split that has made data, and what was made."""
    root, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    made = [build(root) for build in TASK_DATA.values()]
    names = dict.fromkeys([*TASK_DATA, *(one.task for one in made)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "TIMED_TOKENS", 2)
        patch.setattr(runner, "TIMED_REPEATS", 1)
        code = run(checkpoint, ",".join(names), root, out, "--batch-size", 4)
    return root, out, code


@pytest.mark.parametrize("name", TASK_DATA)
def test_every_benchmark_runs_from_questions_to_score_or_submission(every_task, tmp_path, name):
    root, out, _ = every_task
    found = {label: row for label, row in summary(out)["tasks"].items() if label.split(":")[0] == name}
    assert found
    for label, row in found.items():
        assert row["error"] is None
        task, path = get_task(label), out / "answers" / f"{label.replace(':', '-')}.jsonl"
        questions = task.questions(root)
        lines = lines_of(path)
        assert [line["question_id"] for line in lines] == [question.id for question in questions]
        assert [line["prompt"] for line in lines] == [question.logged_prompt for question in questions]
        assert all(line.items() >= question.extra.items() for line, question in zip(lines, questions, strict=True))
        if row["value"] is None:
            assert row["submission"]["send_to"] == task.send_to
            assert all(Path(file).read_bytes() for file in row["submission"]["files"])
            continue
        main(
            ["score", "--task", label, "--answers", str(path), "--data-root", str(root), "--json", str(tmp_path / "s")]
        )
        scored = json.loads((tmp_path / "s").read_text())
        assert scored["metrics"] == row["metrics"] and row["metrics"][row["metric"]]["value"] == row["value"]
        assert scored["counts"] == row["counts"]


def test_a_run_of_every_benchmark_succeeds(every_task):
    _, out, code = every_task
    assert code == 0
    assert "failed" not in (out / "table.md").read_text()


def test_hugging_face_datasets_run_from_local_folders(checkpoint, tmp_path):
    """The questions and scores of all datasets are compared with the layout's in test_tasks.py."""
    pytest.importorskip("datasets")
    given, names = [], [name for name in ("pope", "mmvp", "realworldqa", "cvbench") if name in TASK_DATA]
    for name in names:
        made = TASK_DATA[name](tmp_path / "layout")
        folder = save_hub(made, tmp_path / "hub" / name, get_task(name).hub_data().split)
        given += ["--dataset", f"{name}={folder}"]
    assert run(checkpoint, ",".join(names), tmp_path / "nothing", tmp_path / "out", *given) == 0
    for row in summary(tmp_path / "out")["tasks"].values():
        assert row["value"] is not None and row["counts"]["questions"] == row["counts"]["answered"]


def test_a_dataset_that_cannot_be_had_fails_its_task_alone(checkpoint, tmp_path, monkeypatch, toy):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    given = ("--dataset", f"pope={tmp_path / 'empty'}")
    assert run(checkpoint, "pope,toy", tmp_path, tmp_path / "out", *given) == 1
    rows = summary(tmp_path / "out")["tasks"]
    assert "cannot be had" in rows["pope"]["error"] and rows["toy"]["error"] is None
    assert run(checkpoint, "toy", tmp_path, tmp_path / "hf", "--source", "hf") == 1
    assert "task toy has no Hugging Face dataset" in summary(tmp_path / "hf")["tasks"]["toy"]["error"]


def shuffled(seed):
    return lambda questions: random.Random(seed).sample(range(len(questions)), len(questions))


@pytest.mark.parametrize(
    "sparsity", ["both", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("image", "output", "none"))]
)
def test_batches_and_their_order_change_no_byte(checkpoint, tmp_path, monkeypatch, toy, sparsity):
    """Batch sizes 1, 4 and 16, sorted or shuffled; answers end after different numbers of tokens."""
    contents, costs = [], []
    for size, order in ((1, None), (4, None), (16, None), (4, shuffled(1)), (16, shuffled(2))):
        if order is not None:
            monkeypatch.setattr(runner, "by_length", order)
        out = tmp_path / f"out{len(contents)}"
        assert run(checkpoint, "toy", tmp_path, out, "--batch-size", size, "--sparsity", sparsity) == 0
        contents.append(answers(out))
        efficiency = summary(out)["tasks"]["toy"]["efficiency"]
        timed = {name: efficiency.pop(name)["value"] for name in ("prefill_ms", "decode_ms", "speed_batch")}
        assert timed["speed_batch"] == min(size, len(toy)) and timed["prefill_ms"] > 0
        costs.append(efficiency)
    assert set(contents) == {contents[0]} and all(one == costs[0] for one in costs)
    lines = [json.loads(line) for line in contents[0].splitlines()]
    assert [line["question_id"] for line in lines] == [line["id"] for line in toy]
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert len({line["metadata"]["output_tokens"] for line in lines}) > 2  # ragged indeed
    kept = {"both": 4, "image": 4}.get(sparsity, TOKENS_PER_IMAGE)
    assert {tuple(line["metadata"]["image_kept"]) for line in lines} == {(), (kept,)}


def test_answers_are_those_of_one_question_at_a_time(checkpoint, tmp_path, toy):
    """The prompt is vicuna_v1's with the image first, decoding is greedy whatever the checkpoint's settings say."""
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    model, processor = shared_model(), tiny_processor()
    end = runner.DynamicLlavaForConditionalGeneration.from_pretrained(checkpoint).generation_config.eos_token_id
    for line, question in list(zip(lines_of(tmp_path / "out" / "answers" / "toy.jsonl"), toy, strict=True))[:6]:
        text = f"{SYSTEM} USER: {'<image>' + chr(10) if question['image'] else ''}{question['text']} ASSISTANT:"
        images = [tmp_path / "toy" / "images" / question["image"]] if question["image"] else None
        inputs = processor(text=text, images=images)
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=end)[0].tolist()
        said = ids[inputs["input_ids"].shape[1] :]
        assert line["metadata"]["tokens"] == said and line["text"] == processor.decode(said).strip()
        assert line["model_id"] == checkpoint.name


def test_the_image_is_put_first_wherever_the_text_says():
    pixels = tiny_processor().preprocess_images([picture()])
    asked = answering.Asked(0, tasks.Question(1, "Look at <image>"), pixels)
    inputs = answering.prompt_inputs(tiny_processor(), [asked])
    ids = tiny_processor()(text=f"{SYSTEM} USER: <image>\nLook at ASSISTANT:", images=[picture()])["input_ids"]
    assert inputs["input_ids"].tolist() == ids.tolist()


def test_an_interrupted_run_goes_on_where_it_was(checkpoint, tmp_path, monkeypatch, toy):
    """Nothing is computed twice, no line is lost or doubled, and a line that was cut off is answered anew."""
    assert run(checkpoint, "toy", tmp_path, tmp_path / "whole") == 0
    counter = Counter(monkeypatch, stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, "toy", tmp_path, tmp_path / "out", "--batch-size", 4)
    part = tmp_path / "out" / "answers" / "toy.part0.jsonl"
    assert len(part.read_bytes().splitlines()) == 8
    with part.open("a") as file:
        file.write('{"question_id": "q1", "te')
    again = Counter(monkeypatch)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out", "--batch-size", 5) == 0
    assert sorted(counter.asked + again.asked) == list(range(len(toy)))
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")
    assert not part.exists()
    third = Counter(monkeypatch)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    assert not third.asked and answers(tmp_path / "out") == answers(tmp_path / "whole")


KILLER = """
import os, signal, sys
from dynamic_llava.eval import folder, tasks
from dynamic_llava.eval.__main__ import main
from tests.eval.run_builders import Toy
tasks.TASKS["toy"] = Toy
append, batches = folder.AnswerStore.append, []
def cut(self, answers):
    append(self, answers)
    batches.append(answers)
    if len(batches) == 2:
        self._file.write(folder.append_answers.__doc__[:20])
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
folder.AnswerStore.append = cut
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_line_goes_on(checkpoint, tmp_path, monkeypatch, toy):
    assert run(checkpoint, "toy", tmp_path, tmp_path / "whole") == 0
    places = ["--model", checkpoint, "--tasks", "toy", "--data-root", tmp_path, "--output-folder", tmp_path / "out"]
    command = [sys.executable, "-c", KILLER, *places, "--max-new-tokens", TOKENS, "--batch-size", 4]
    killed = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    counter = Counter(monkeypatch)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    assert len(counter.asked) == len(toy) - 8
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")


def test_a_changed_run_refuses_to_resume_and_says_what_differs(checkpoint, tmp_path, capsys, toy):
    out = tmp_path / "out"
    assert run(checkpoint, "toy", tmp_path, out) == 0
    before = answers(out)
    changed = shutil.copytree(checkpoint, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    config["sparsity"]["image_keep_rate"] = 0.5
    (changed / "config.json").write_text(json.dumps(config))
    tuned = shutil.copytree(checkpoint, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    moved = shutil.copytree(checkpoint, tmp_path / "moved" / checkpoint.name)
    tables = {name: (out / name).read_bytes() for name in ("summary.json", "table.md")}
    for model, more, message in (
        (checkpoint, ("--sparsity", "image"), "sparsity was both and is image"),
        (checkpoint, ("--dtype", "bfloat16"), "model.dtype was float32 and is bfloat16"),
        (changed, (), "model.config.sparsity.image_keep_rate was 0.25 and is 0.5"),
        (tuned, (), "model.weights.model.safetensors was "),
    ):
        assert run(model, "toy", tmp_path, out, *more) == 2
        assert message in capsys.readouterr().err and answers(out) == before
        assert {name: (out / name).read_bytes() for name in tables} == tables
    for more, message in (
        (("--max-new-tokens", 3), "max_new_tokens was 8 and is 3"),
        (("--limit", 3), "questions.count was 12 and is 3"),
    ):
        assert run(checkpoint, "toy", tmp_path, out, *more) == 1
        assert message in capsys.readouterr().out and answers(out) == before
        row = summary(out)["tasks"]["toy"]
        assert row["value"] is not None and row["error"] is None and message in row["warnings"][-1]
    assert run(moved, "toy", tmp_path, out, "--batch-size", 3) == 0  # a folder's name and the batch change nothing
    (tmp_path / "toy" / "questions.json").write_text(json.dumps([{**toy[0], "text": "Else?"}, *toy[1:]]))
    assert run(checkpoint, "toy", tmp_path, out) == 1
    assert "questions.digest was " in capsys.readouterr().out


def test_an_image_that_changed_since_it_was_answered_about_is_refused(checkpoint, tmp_path, monkeypatch, capsys, toy):
    """By its content: the same bytes under another date are the same image, and one not yet answered may change."""
    monkeypatch.setattr(runner, "by_length", lambda questions: list(range(len(questions))))
    with pytest.raises(KeyboardInterrupt):
        Counter(monkeypatch, stop_after=4)
        run(checkpoint, "toy", tmp_path, tmp_path / "out", "--batch-size", 4)
    monkeypatch.setattr(runner, "answer", answering.answer)
    images = tmp_path / "toy" / "images"
    whole = (images / "0.png").read_bytes()
    shutil.copy(images / "1.png", images / "0.png")
    shutil.copy(images / "1.png", images / "9.png")
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 1
    assert "images are others than those that were answered about" in (said := capsys.readouterr().out)
    assert "1 ('0.png')" in said and str(tmp_path / "out") in said
    (images / "0.png").write_bytes(whole)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    (images / "9.png").unlink()
    shutil.copy(images / "0.png", images / "9.png")
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 1
    assert "1 ('9.png')" in capsys.readouterr().out


def test_a_folder_keeps_the_rows_of_earlier_commands(checkpoint, tmp_path, toy):
    for name in ("pope", "mme"):
        TASK_DATA[name](tmp_path)
    out = tmp_path / "out"
    for names in ("toy", "pope,gqa", "mme"):  # the files of gqa are missing
        run(checkpoint, names, tmp_path, out)
    rows = summary(out)["tasks"]
    assert list(rows) == ["toy", "pope", "gqa", "mme"]
    assert [name for name, row in rows.items() if row["value"] is None] == ["gqa"]
    table = (out / "table.md").read_text()
    assert all(f"| {title}" in table for title in ("Toy", "POPE", "GQA", "MME"))
    shutil.rmtree(tmp_path / "pope")
    assert run(checkpoint, "pope", tmp_path, out) == 1  # without any files no model is loaded, nothing is written
    assert summary(out)["tasks"] == rows
    assert run(checkpoint, "pope,mme", tmp_path, out) == 1
    later = summary(out)["tasks"]
    assert later["pope"]["value"] == rows["pope"]["value"] and "get it from" in later["pope"]["warnings"][-1]
    assert {name: row["metrics"] for name, row in later.items()} == {name: row["metrics"] for name, row in rows.items()}


def test_answers_without_a_row_are_in_the_table(checkpoint, tmp_path, monkeypatch, toy):
    """A command that was killed between its answers and its score, or whose summary was removed."""
    TASK_DATA["pope"](tmp_path)
    out = tmp_path / "out"
    assert run(checkpoint, "toy", tmp_path, out) == 0
    value = summary(out)["tasks"]["toy"]["value"]
    (out / "summary.json").unlink()
    assert run(checkpoint, "pope", tmp_path, out) == 0
    row = summary(out)["tasks"]["toy"]
    assert row["value"] is None and "name the task again" in row["warnings"][0]
    assert "name the task again" in (out / "table.md").read_text()
    counter = Counter(monkeypatch)
    assert run(checkpoint, "toy", tmp_path, out) == 0
    assert summary(out)["tasks"]["toy"]["value"] == value and not counter.asked


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"model": "m"}', '{"model": "m", "sparsity": "both", "tasks": [], "x": 1}']
)
def test_a_summary_that_is_none_is_refused_before_anything_is_written(checkpoint, tmp_path, capsys, toy, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.json").write_text(content)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 2
    assert "summary.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["summary.json"]


def test_missing_files_are_reported_and_the_other_tasks_go_on(checkpoint, tmp_path, capsys, toy):
    assert run(checkpoint, "pope,toy,gqa", tmp_path, tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "2 of 3 tasks failed: pope, gqa" in printed.err
    assert "failed: pope: " in printed.err and "failed: gqa: " in printed.err, "the reasons stand beside it"
    rows = summary(tmp_path / "out")["tasks"]
    assert rows["toy"]["value"] is not None and rows["pope"]["value"] is None
    assert "llava_pope_test.jsonl, get it from LLaVA's eval.zip" in rows["pope"]["error"]
    assert rows["pope"]["error"] in (tmp_path / "out" / "table.md").read_text()


def test_without_any_files_no_model_is_loaded(tmp_path):
    assert run(tmp_path / "no-model", "pope", tmp_path, tmp_path / "out") == 1
    assert "get it from" in summary(tmp_path / "out")["tasks"]["pope"]["error"]


def test_missing_images_stop_a_task_before_it_computes(checkpoint, tmp_path, monkeypatch, toy):
    for name in ("0.png", "4.png"):
        (tmp_path / "toy" / "images" / name).unlink()
    counter = Counter(monkeypatch)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 1
    assert not counter.asked
    assert "2 of 8 images are not in" in (error := summary(tmp_path / "out")["tasks"]["toy"]["error"])
    assert "'0.png', '4.png'" in error


def test_an_unreadable_image_is_named_and_everything_else_is_kept(checkpoint, tmp_path, monkeypatch, toy):
    assert run(checkpoint, "toy", tmp_path, tmp_path / "whole") == 0
    image = tmp_path / "toy" / "images" / "6.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:60])
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 1
    error = summary(tmp_path / "out")["tasks"]["toy"]["error"]
    assert "1 images cannot be read" in error and "question 'q3'" in error and "6.png is broken" in error
    image.write_bytes(whole)
    counter = Counter(monkeypatch)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    assert counter.asked == [6]
    assert answers(tmp_path / "out") == answers(tmp_path / "whole")


def test_a_task_that_skips_unreadable_images_counts_them(checkpoint, tmp_path, monkeypatch, toy):
    monkeypatch.setattr(Toy, "skips_unreadable", True)
    (tmp_path / "toy" / "images" / "6.png").write_bytes(b"no image")
    (tmp_path / "toy" / "images" / "7.png").unlink()
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    lines = lines_of(tmp_path / "out" / "answers" / "toy.jsonl")
    assert [place for place, line in enumerate(lines) if "skipped" in line["metadata"]] == [6, 7]
    assert "left out: 2 ('q3', 'q3')" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("error", [ValueError("broken labels"), RuntimeError("out of memory")])
def test_a_task_that_fails_loses_neither_its_answers_nor_the_others(checkpoint, tmp_path, monkeypatch, toy, error):
    TASK_DATA["pope"](tmp_path)

    def fail(*arguments, **more):
        raise error

    monkeypatch.setattr(Toy, "score", fail)
    assert run(checkpoint, "toy,pope", tmp_path, tmp_path / "out") == 1
    rows = summary(tmp_path / "out")["tasks"]
    assert rows["toy"]["error"].startswith("score: ") and rows["toy"]["error"].endswith(str(error))
    assert rows["pope"]["error"] is None
    assert rows["toy"]["efficiency"] and rows["toy"]["answers"] == str(tmp_path / "out" / "answers" / "toy.jsonl")
    assert len(read_answers(tmp_path / "out" / "answers" / "toy.jsonl")) == len(toy)


def test_a_score_survives_costs_that_cannot_be_measured(checkpoint, tmp_path, monkeypatch, capsys, toy):
    def fail(*arguments, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "measure_speed", fail)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 1
    row = summary(tmp_path / "out")["tasks"]["toy"]
    assert row["value"] is not None and row["error"] == "costs: RuntimeError: out of memory"
    assert "Toy: failed: costs" in (printed := capsys.readouterr().out) and "accuracy" in printed


def test_an_answer_whose_costs_cannot_be_read_is_named_with_its_line(checkpoint, tmp_path, toy):
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out", "--limit", 2) == 0
    path = tmp_path / "out" / "answers" / "toy.jsonl"
    first, second = lines_of(path)
    del second["metadata"]["image_kept"]
    path.write_text("".join(json.dumps(line) + "\n" for line in (first, second)))
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out", "--limit", 2) == 1
    error = summary(tmp_path / "out")["tasks"]["toy"]["error"]
    assert error.startswith(f"costs: {path}:2: metadata has no 'image_kept'; it has ")


def test_broken_question_files_fail_with_their_line(checkpoint, tmp_path):
    TASK_DATA["pope"](tmp_path)
    path = tmp_path / "pope" / "llava_pope_test.jsonl"
    lines = path.read_text().splitlines()
    for broken, message in (("{", "llava_pope_test.jsonl:13 is no valid JSON"), (lines[0], "stands already in line 1")):
        path.write_text("\n".join([*lines, broken]))
        assert run(checkpoint, "pope", tmp_path, tmp_path / "out") == 1
        assert message in summary(tmp_path / "out")["tasks"]["pope"]["error"]


def test_a_limit_asks_the_first_questions_only(checkpoint, tmp_path, toy):
    for name in ("textvqa", "pope"):
        TASK_DATA[name](tmp_path)
    assert run(checkpoint, "toy,textvqa,pope", tmp_path, tmp_path / "out", "--limit", 2) == 0
    rows = summary(tmp_path / "out")["tasks"]
    assert rows["toy"]["value"] is not None and "only the first 2 questions" in rows["toy"]["warnings"][0]
    assert rows["textvqa"]["counts"]["answered"] == 2
    pope = rows["pope"]
    assert pope["value"] is not None and pope["counts"]["answered"] == 2 and pope["difference"] is None
    assert any("2 of 12 are answered" in warning for warning in pope["warnings"])
    assert "2 of 12 are answered" in (tmp_path / "out" / "table.md").read_text()
    assert len(lines_of(tmp_path / "out" / "answers" / "toy.jsonl")) == 2


def test_a_measuring_task_puts_its_own_fields_on_lines(checkpoint, tmp_path, monkeypatch, toy):
    class Measured(Toy):
        settings: ClassVar = {"separator": "official"}

        def measure(self, model_run, asked):
            assert model_run.max_new_tokens == TOKENS and model_run.batch_size == 16
            return [answering.Said("x", {}, {"ppl": one.place / 2}) for one in asked]

    monkeypatch.setitem(tasks.TASKS, "toy", Measured)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 0
    lines = lines_of(tmp_path / "out" / "answers" / "toy.jsonl")
    assert [line["ppl"] for line in lines] == [place / 2 for place in range(len(toy))]
    row = summary(tmp_path / "out")["tasks"]["toy"]
    assert row["value"] == 100 and row["efficiency"] == {}
    monkeypatch.setattr(Measured, "settings", {"separator": "template"})
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out") == 1
    assert "task.separator was official and is template" in summary(tmp_path / "out")["tasks"]["toy"]["warnings"][-1]


def test_a_dense_checkpoint_is_evaluated_dense_or_refused(tmp_path, capsys, toy):
    dense_twin(shared_model()).save_pretrained(tmp_path / "dense")
    tiny_processor().save_pretrained(tmp_path / "dense")
    assert run(tmp_path / "dense", "toy", tmp_path, tmp_path / "out") == 2
    assert "dense checkpoint without predictors" in capsys.readouterr().err
    assert run(tmp_path / "dense", "toy", tmp_path, tmp_path / "out", "--sparsity", "none") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "pope"], "--model is missing"),
        (["--model", "m", "--tasks", "pope"], "--output-folder is missing"),
        (["--model", "m", "--tasks", "pop", "--output-folder", "o"], "'pop' is not known"),
        (
            ["--model", "m", "--tasks", "pope", "--output-folder", "o", "--batch-size", "0"],
            "batch_size=0 is not possible",
        ),
        (["--model", "m", "--tasks", "pope", "--output-folder", "o", "--dataset", "pope"], "give TASK=ID_OR_PATH"),
        (["--model", "m", "--tasks", "pope", "--output-folder", "o", "--dataset", "gqa=x"], "--tasks does not name"),
    ],
)
def test_mistakes_on_the_command_line(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_list_says_what_is_there_and_starts_without_torch(tmp_path):
    TASK_DATA["pope"](tmp_path)
    shutil.rmtree(tmp_path / "pope" / "coco")
    code = (
        "import sys; from dynamic_llava.eval.__main__ import main; "
        f"main(['--tasks', 'list', '--data-root', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    *text, torch_loaded = done.stdout.splitlines()
    assert torch_loaded == "False"
    listed = "\n".join(text)
    assert all(f"\n{name}  (" in listed for name in tasks.TASKS if name != "toy")
    pope = listed[listed.index("\npope ") :].split("\n\n")[0]
    assert "pope: 1 missing" in pope and "found    pope/llava_pope_test.jsonl  (questions)" in pope
    assert "MISSING  pope/coco  (labels)" in pope and "get it from https://" in pope
    assert "vqav2:val: " in listed and "lmms-lab/POPE" in pope


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **more}


@pytest.mark.slow
def test_two_processes_write_the_file_of_one(checkpoint, tmp_path, capfd):
    """Through scripts/eval.sh; the second run resumes, in two processes, what one process had begun."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts" / "eval.sh", scripts)
    (scripts / "setup.sh").write_text("exit 0\n")
    for name in ("pope", "mme"):
        TASK_DATA[name](tmp_path)
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "python").chmod(0o755)
    assert run(checkpoint, "pope,mme,gqa", tmp_path, tmp_path / "one") == 1
    half = tmp_path / "two" / "answers"
    half.mkdir(parents=True)
    lines = (tmp_path / "one" / "answers" / "pope.jsonl").read_text().splitlines(keepends=True)
    shutil.copy(tmp_path / "one" / "answers" / "pope.run.json", half)
    (half / "pope.part0.jsonl").write_text("".join(lines[::3]) + lines[1][:30])
    places = [
        "--model",
        checkpoint,
        "--tasks",
        "pope,mme,gqa",
        "--data-root",
        tmp_path,
        "--output-folder",
        tmp_path / "two",
    ]
    command = ["bash", scripts / "eval.sh", *places, "--max-new-tokens", TOKENS, "--batch-size", 2]
    done = subprocess.run(
        list(map(str, command)),
        env=environment(VENV=str(tmp_path / "venv"), PROCESSES="2"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1, done.stderr  # gqa's files are missing
    assert "1 of 3 tasks failed: gqa" in done.stderr
    assert summary(tmp_path / "two")["settings"]["processes"] == 2
    for name in ("pope", "mme"):
        files = [tmp_path / folder / "answers" / f"{name}.jsonl" for folder in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert not list(half.glob("*.part*"))
        rows = [summary(tmp_path / folder)["tasks"][name] for folder in ("one", "two")]
        assert rows[0]["metrics"] == rows[1]["metrics"]
    commands = subprocess.run(
        ["bash", scripts / "eval.sh", "--tasks", "list", "--data-root", tmp_path],
        env=environment(VENV=str(tmp_path / "venv"), PROCESSES="2"),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert commands.stdout.count("pope: ready") == 1


@pytest.mark.parametrize("options", [["--model", "x"], ["--limit", "5"], ["--output-folder", "x", "--tasks", "pope"]])
def test_options_of_a_run_before_a_command_are_refused(options, capsys):
    assert main([*options, "build-lvis", "--kind", "single", "--source", "x", "--output", "y"]) == 2
    assert f"error: {options[0]} stands before the command build-lvis, which ignores it" in capsys.readouterr().err


@pytest.mark.parametrize(("former", "now"), [("page", "page"), ("budgets", "budgets"), ("model", "measure")])
def test_a_command_of_an_earlier_version_says_where_it_is_now(former, now, capsys):
    assert main([f"tiny-{former}", "runs/tiny"]) == 2
    assert f"tiny-{former} is now: python -m dynamic_llava.tiny {now}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        tiny_main([now, "--help"])
