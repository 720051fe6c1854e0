"""Every file that evaluation reads, spoilt: an error is one sentence that names the file and the place, never a bug's.

A file is spoilt where its structure is (a value of another kind, a key gone, a row twice) or where its bytes are. What
once ended in another exception, or without the file's name, stands in `FOUND`.
"""

import json
import shutil

import pytest
from hypothesis import strategies as st

from dynamic_llava.eval.answers import AnswerLine, write_answers
from dynamic_llava.eval.folder import AnswerStore
from dynamic_llava.eval.generation.build import BuildOptions, build
from dynamic_llava.eval.tasks import TASKS, get_task
from tests.eval.task_data import TASK_DATA, save_hub
from tests.properties import few_or_many, for_all
from tests.spoiling import HOSTILE, OF_ANSWERS, SPOILS, TEXT_FILES, checked, readings, spoil


@pytest.fixture(scope="module", params=sorted(TASK_DATA))
def world(request, tmp_path_factory):
    """A task's made data, its right answers, and the text files below its root."""
    root = tmp_path_factory.mktemp(request.param)
    made = TASK_DATA[request.param](root)
    answers = made.answers(root)
    files = sorted(path for path in root.rglob("*") if path.suffix in TEXT_FILES)
    assert files
    return made, answers, root, files


@few_or_many
def test_a_spoilt_file_is_read_or_refused_by_name(world, examples):
    made, answers, root, files = world
    whole = {path: path.read_bytes() for path in files}

    @for_all(
        1 + examples // 3,
        st.sampled_from(files),
        st.sampled_from(SPOILS),
        st.integers(0, 10**4),
        st.sampled_from(range(len(HOSTILE))),
    )
    def check(path, how, place, number):
        path.write_bytes(spoil(whole[path], path.suffix, how, place, HOSTILE[number]))
        try:
            for reading in readings(made, answers, root):
                checked(reading, [*(one.name for one in files), *OF_ANSWERS])
        finally:
            path.write_bytes(whole[path])


@few_or_many
def test_a_spoilt_answer_file_is_read_or_refused_by_name(world, examples, tmp_path):
    made, answers, root, _ = world
    path = write_answers(tmp_path / "answers.jsonl", answers)
    whole, task = path.read_bytes(), get_task(made.task)

    @for_all(
        1 + examples // 3,
        st.sampled_from(SPOILS),
        st.integers(0, 10**4),
        st.sampled_from(range(len(HOSTILE))),
        st.booleans(),
    )
    def check(how, place, number, part):
        path.write_bytes(spoil(whole, ".jsonl", how, place, HOSTILE[number]))
        checked(lambda: task.score_file(path, root, part=part), ["answers.jsonl"])


SOURCE = [
    {"id": f"s{number}", "image": f"coco/{number}.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "word " * 120},
    ]}
    for number in range(3)
]  # fmt: skip


@few_or_many
def test_spoilt_sources_of_items_are_read_or_refused_by_name(examples, tmp_path):
    """The public data that item lists are drawn from, and the training files whose images are left out."""
    source, training = tmp_path / "source.json", tmp_path / "training.json"
    whole = json.dumps(SOURCE).encode()

    @for_all(
        examples,
        st.booleans(),
        st.sampled_from(SPOILS),
        st.integers(0, 10**4),
        st.sampled_from(range(len(HOSTILE))),
    )
    def check(is_source, how, place, number):
        spoilt = spoil(whole, ".json", how, place, HOSTILE[number])
        source.write_bytes(spoilt if is_source else whole)
        training.write_bytes(whole if is_source else spoilt)
        options = BuildOptions("single", source, tmp_path / "out.json", (training,), n=1)
        checked(lambda: build(options), ["source.json", "training.json"])


@few_or_many
def test_a_spoilt_record_of_a_run_is_read_or_refused_by_name(examples, tmp_path):
    """What says in an output folder what made its answers, and the answers of a killed process."""
    settings = {"model": {"dtype": "float32"}, "sparsity": "both", "task": {"name": "toy"}}
    begun = AnswerStore(tmp_path, "toy", settings, 3)
    begun.append([AnswerLine("q0", "said", metadata={"place": 0}), AnswerLine("q1", "said", metadata={"place": 1})])
    begun.close()
    files = [tmp_path / "toy.run.json", tmp_path / "toy.part0.jsonl"]
    whole = {path: path.read_bytes() for path in files}

    @for_all(
        examples,
        st.sampled_from(files),
        st.sampled_from(SPOILS),
        st.integers(0, 10**4),
        st.sampled_from(range(len(HOSTILE))),
    )
    def check(path, how, place, number):
        for file, content in whole.items():
            file.write_bytes(content)
        path.write_bytes(spoil(whole[path], path.suffix, how, place, HOSTILE[number]))
        checked(lambda: AnswerStore(tmp_path, "toy", settings, 3).close(), ["toy.", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, task in TASKS.items() if task.hub is not None))
def test_a_cell_of_another_kind_is_named_with_its_dataset(name, tmp_path):
    """Every column of every dataset, with nothing in its first row."""
    datasets = pytest.importorskip("datasets")
    made = TASK_DATA[name](tmp_path / "data")
    task = get_task(made.task)
    save_hub(made, tmp_path / "hub", task.hub_data().split)
    answers = made.answers(tmp_path / "data", task.hub_data(str(tmp_path / "hub")))
    refused = 0
    for config, rows in made.rows.items():
        for column in rows[0].keys() - {"image"}:
            broken = tmp_path / f"{config}-{column}"
            folder = broken / config / "data"
            shutil.copytree(tmp_path / "hub", broken)
            changed = [rows[0] | {column: None}, *rows[1:]]
            (file,) = folder.iterdir()
            datasets.Dataset.from_list(changed).to_parquet(file)
            hub = task.hub_data(str(broken))
            for reading in (lambda: task.questions(None, hub), lambda: task.score(answers, None, hub)):  # noqa: B023
                try:
                    reading()
                except ValueError as error:
                    refused += str(broken) in str(error)
                    assert str(broken) in str(error) or any(one in str(error) for one in (*OF_ANSWERS, "judge"))
    assert refused


VAL_LABELS, VAL_QUESTIONS = "v2_mscoco_val2014_annotations.json", "v2_OpenEnded_mscoco_val2014_questions.json"
FOUND = {
    "an annotation's answer is a list": (
        "vqav2", f"vqav2/{VAL_LABELS}", "annotations", 0, "answers", 0, "answer", [1],
    ),
    "an image id is a text": ("vqav2", f"vqav2/{VAL_QUESTIONS}", "questions", 0, "image_id", "x"),
    "an image id is infinite": ("vqav2", f"vqav2/{VAL_QUESTIONS}", "questions", 0, "image_id", float("inf")),
    "questions are a number": ("vqav2", f"vqav2/{VAL_QUESTIONS}", "questions", 7),
    "people's answers are no texts": ("vizwiz", "vizwiz/val.json", 0, "answers", 0, "answer", 7),
    "nobody answered": ("vizwiz", "vizwiz/val.json", 0, "answers", []),
    "a question is a number": ("vizwiz", "vizwiz/val.json", 0, "question", 7),
    "a type is a list": ("seed", "seed_bench/SEED-Bench.json", "questions", 0, "question_type_id", [5]),
    "a type's number is a list": ("seed", "seed_bench/SEED-Bench.json", "question_type", "Instances Counting", [5]),
    "types are a list": ("seed", "seed_bench/SEED-Bench.json", "question_type", [5]),
    "seed's questions are a number": ("seed", "seed_bench/SEED-Bench.json", "questions", 5),
    "a label is a list": ("gqa", "gqa/data/testdev_balanced_questions.json", "201307251", "types", ["a"]),
    "ten answers that are no texts": ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "data", 0, "answers", [1] * 10),
    "answers are a number": ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "data", 0, "answers", 7),
    "choices are a number": ("scienceqa", "scienceqa/problems.json", "5", "choices", 7),
    "the split is a number": ("scienceqa", "scienceqa/pid_splits.json", "test", 7),
    "an image is a number": ("scienceqa", "scienceqa/llava_test_CQM-A.json", 0, "image", 7),
    "rounds are no texts": ("lvis_multi", "lvis_vqa/multi_round.json", 0, "question", 7),
    "an image path holds a null byte": ("sharegpt4v", "sharegpt4v_vqa/sharegpt4v_vqa.json", 0, "image", "a\0b"),
    "a real-world answer is a list": ("realworldqa", "realworldqa/data.json", 0, "answer", ["A"]),
}  # fmt: skip
"""What was wrong -> task, file, and the path of a node with the value that it is given."""


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_what_was_found_before(found, tmp_path):
    name, file, *keys, last, value = found
    made = TASK_DATA[name](tmp_path)
    answers, path = made.answers(tmp_path), tmp_path / file
    content = json.loads(path.read_text())
    owner = content
    for key in keys:
        owner = owner[key]
    owner[last] = value
    path.write_text(json.dumps(content))
    refused = 0
    for reading in readings(made, answers, tmp_path):
        try:
            reading()
        except ValueError as error:
            refused += path.name in str(error)
    assert refused


@pytest.mark.parametrize("hostile", ["x" * 5000, "\ud800"], ids=["long", "half a character"])
def test_what_a_file_says_is_shown_cut_and_printable(tmp_path, hostile):
    """A question of a split that is not there, a place that is none, a record of another run."""
    made = TASK_DATA["scienceqa"](tmp_path)
    answers = made.answers(tmp_path)
    splits = tmp_path / "scienceqa" / "pid_splits.json"
    split = json.loads(splits.read_text())
    splits.write_text(json.dumps({**split, "test": [hostile, *split["test"][1:]]}))
    with pytest.raises(ValueError, match="scienceqa") as missing:
        get_task(made.task).score(answers, tmp_path)
    settings = {"sparsity": "both"}
    begun = AnswerStore(tmp_path, "toy", settings, 1)
    begun.append([AnswerLine("q0", "said", metadata={"place": hostile})])
    begun.close()
    with pytest.raises(ValueError, match="in its metadata") as place:
        AnswerStore(tmp_path, "toy", settings, 1)
    (tmp_path / "toy.run.json").write_text(json.dumps({"sparsity": hostile}))
    with pytest.raises(ValueError, match="of another run") as record:
        AnswerStore(tmp_path, "toy", settings, 1)
    for refused in (missing, place, record):
        assert len(str(refused.value)) < 1500 and str(refused.value).encode()
