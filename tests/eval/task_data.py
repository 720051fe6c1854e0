"""Small made data of every benchmark in its real layout, one function a task, and the right answers to it.

TASK_DATA["pope"](root) writes the files below root (as LLaVA's playground/data/eval) and returns what was made. A new
task adds its function here; the contract tests over the registry pick it up.
"""

import base64
import csv
import io
import json
from dataclasses import dataclass, field, replace

from dynamic_llava.eval.answers import AnswerLine
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.eval.tasks.base import LETTER, SHORT, UNANSWERABLE
from tests.sft_builders import picture


@dataclass
class Made:
    """What was made: `task` is its name, with the split that has labels; `right` answers its questions in order."""

    task: str
    right: list
    best: float
    """What the right answers are worth, in the table's metric; None when that takes a server or a judge."""
    rows: dict = field(default_factory=dict)
    """Configuration ("" for none) -> the same questions as rows of the Hugging Face dataset, images as pictures."""
    lower_is_better: bool = False

    def answers(self, root, hub=None, texts=None):
        """Return answers to the task's questions, the right ones unless `texts` gives others."""
        questions = get_task(self.task).questions(root, hub)
        return [
            AnswerLine(question.id, text, prompt=question.logged_prompt, extra=question.extra, line=number)
            for number, (question, text) in enumerate(zip(questions, texts or self.right, strict=True), 1)
        ]


def save_hub(made, folder, split):
    """Write the rows of `made` as a local dataset folder of parquet files; return its path."""
    import datasets

    for config, rows in made.rows.items():
        path = folder / config / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(path)
    return folder


def write_lines(path, lines):
    """Write objects as JSON lines."""
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def write(path, content):
    """Write text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def save_picture(path, seed=0):
    """Write a small picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, (40, 24)).save(path)


def people(*answers):
    """Return ten human answers as VQA annotates them: the given ones, the last repeated."""
    texts = [*answers, *[answers[-1]] * (10 - len(answers))]
    return [{"answer_id": number, "answer": text, "answer_confidence": "yes"} for number, text in enumerate(texts, 1)]


def pope(root):
    """Three categories of four questions; the ids of labels and questions differ, as in the real files."""
    lines, rows = [], []
    labels = ["yes", "no", "yes", "no"]
    for start, category in ((1, "adversarial"), (10_000_001, "random"), (20_000_001, "popular")):
        named = []
        for number, label in enumerate(labels):
            image = f"COCO_val2014_{number // 2:012d}.jpg"
            save_picture(root / "pope" / "val2014" / image, number // 2)
            text = f"Is there a {category} thing {number} in the image?"
            lines.append({"question_id": start + number, "image": image, "text": text + SHORT, "category": category})
            named.append({"question_id": 1 + number, "image": image, "text": text, "label": label})
            rows.append({
                "id": str(len(rows)), "question_id": str(1 + number), "question": text, "answer": label,
                "image_source": image, "image": picture(number // 2), "category": category,
            })  # fmt: skip
        write_lines(root / "pope" / "coco" / f"coco_pope_{category}.json", named)
    write_lines(root / "pope" / "llava_pope_test.jsonl", lines)
    return Made("pope", ["Yes", "No", "Yes", "No"] * 3, 100.0, {"": rows})


GQA_QUESTIONS = (
    ("201307251", "Is it overcast?", "no", "verify", "global"),
    ("201640614", "Who is wearing the dress?", "woman", "query", "rel"),
    ("202225914", "Is the tray on top of the table black or light brown?", "light brown", "choose", "attr"),
)


def gqa(root):
    """Three balanced questions and one that is not."""
    labels, lines, rows, images = {}, [], [], []
    for number, (name, question, answer, structural, semantic) in enumerate(GQA_QUESTIONS):
        types = {"structural": structural, "semantic": semantic, "detailed": "any"}
        labels[name] = {
            "question": question, "imageId": f"n{number}", "answer": answer, "isBalanced": True, "types": types,
        }  # fmt: skip
        lines.append({"question_id": name, "image": f"n{number}.jpg", "text": question + SHORT, "category": "default"})
        rows.append({"id": name, **labels[name]})
        images.append({"id": f"n{number}", "image": picture(number)})
        save_picture(root / "gqa" / "data" / "images" / f"n{number}.jpg", number)
    labels["1"] = labels["201307251"] | {"isBalanced": False}
    write(root / "gqa" / "data" / "testdev_balanced_questions.json", labels)
    write_lines(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", lines)
    hub = {"testdev_balanced_instructions": rows, "testdev_balanced_images": images[::-1]}
    return Made("gqa", ["No.", "Woman", "light brown"], 100.0, hub)


TEXTVQA_QUESTIONS = (
    ("003a8ae2ef43b901", "what is the brand of this camera?", ["DAKOTA", "Pire"], "dakota"),
    ("003a8ae2ef43b901", "is this a camera?", [], "yes"),
    ("0054c91397f2fe05", "what is the number?", ["3"], "3"),
)


def textvqa(root):
    """Three questions about two images, one without OCR tokens."""
    lines, data, rows = [], [], []
    for number, (image, question, tokens, answer) in enumerate(TEXTVQA_QUESTIONS):
        text = f"{question.capitalize()}\nReference OCR token: {', '.join(tokens)}{SHORT}"
        lines.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
        record = {"question_id": 34602 + number, "image_id": image, "question": question, "answers": [answer] * 10}
        data.append(record)
        rows.append(record | {"image": picture(number), "ocr_tokens": tokens})
        save_picture(root / "textvqa" / "train_images" / f"{image}.jpg")
    write_lines(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", lines)
    write(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": data})
    return Made("textvqa", ["Dakota.", "Yes", "three"], 100.0, {"": rows})


VQA_QUESTIONS = (
    (1000, "What is it?", "dog", "other"),
    (1001, "Is it red?", "yes", "yes/no"),
    (2000, "How many?", "2", "number"),
)


def vqav2(root):
    """Three val questions, two of test-dev, and test with one more."""
    home = root / "vqav2"
    questions, annotations, rows = [], [], []
    for name, question, answer, kind in VQA_QUESTIONS:
        image = name // 1000
        questions.append({"image_id": image, "question": question, "question_id": name})
        record = {
            "question_id": name, "image_id": image, "question_type": "what is", "answer_type": kind,
            "multiple_choice_answer": answer, "answers": people("cat", answer),
        }  # fmt: skip
        annotations.append(record)
        rows.append(record | {"question": question, "image": picture(image)})
        save_picture(home / "val2014" / f"COCO_val2014_{image:012d}.jpg", image)
    write(home / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(home / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    lines = []
    for number in range(3):
        image = f"COCO_test2015_{262144 + number:012d}.jpg"
        save_picture(home / "test2015" / image, number)
        name = 262144000 + 1000 * number
        lines.append({"question_id": name, "image": image, "text": f"Is it {number}?{SHORT}", "category": "default"})
    write_lines(home / "llava_vqav2_mscoco_test-dev2015.jsonl", lines[:2])
    write_lines(home / "llava_vqav2_mscoco_test2015.jsonl", lines)
    return Made("vqav2:val", ["Dog", "Yes", "Two"], 100.0, {"": rows})


def vizwiz(root):
    """Three val questions and two of test."""
    home = root / "vizwiz"
    records, rows = [], []
    for number, answer in enumerate(("black", "unanswerable", "2")):
        image = f"VizWiz_val_{number:08d}.jpg"
        save_picture(home / "val" / image, number)
        question = f"what colour is Number {number}?"
        records.append({
            "image": image, "question": question, "answers": people("cat", answer), "answer_type": "other",
            "answerable": 1,
        })  # fmt: skip
        rows.append({
            "question_id": image[:-4], "image": picture(number), "question": question,
            "answers": [person["answer"] for person in records[-1]["answers"]], "category": "other",
        })  # fmt: skip
    write(home / "val.json", records)
    lines = []
    for number in range(2):
        image = f"VizWiz_test_{number:08d}.jpg"
        save_picture(home / "test" / image, number)
        text = f"What is this {number}?{UNANSWERABLE}{SHORT}"
        lines.append({"question_id": number, "image": image, "text": text, "category": "default"})
    write_lines(home / "llava_test.jsonl", lines)
    return Made("vizwiz:val", ["Black", "Unanswerable", "two"], 100.0, {"": rows})


MME_IMAGES = (
    ("existence", "0020.png", "", 1), ("code_reasoning", "0007.png", "", 2), ("artwork", "14777.jpg", "images/", 1),
)  # fmt: skip


def mme(root):
    """One image of a flat perception category, of a flat cognition one (two spaces), and of one with folders."""
    home = root / "MME" / "MME_Benchmark_release_version"
    lines, rows = [], []
    for number, (category, image, folder, spaces) in enumerate(MME_IMAGES):
        save_picture(home / category / folder / image, number)
        asked = [(f"Is it {word}?", label) for word, label in (("so", "Yes"), ("other", "No"))]
        texts = [f"{question}{' ' * spaces}Please answer yes or no.\t{label}\n" for question, label in asked]
        names = "questions_answers_YN/" if folder else ""
        write(home / category / names / f"{image.split('.')[0]}.txt", "".join(texts))
        for question, label in asked:
            name = f"{category}/{folder}{image}"
            lines.append({"question_id": name, "image": name, "text": question + SHORT, "category": category})
            rows.append({
                "question_id": name, "image": picture(number), "answer": label, "category": category,
                "question": f"{question}{' ' * spaces}Please answer yes or no.",
            })  # fmt: skip
    write_lines(root / "MME" / "llava_mme.jsonl", lines)
    return Made("mme", ["Yes", "No"] * 3, 400.0, {"": rows})


SEED_QUESTIONS = (("101669", "A", "image", 5), ("v1234", "B", "image", 5), ("101", "C", "video", 10))


def seed(root):
    """Two questions about images and one about a video."""
    home = root / "seed_bench"
    lines, questions, rows = [], [], []
    for number, (name, answer, kind, type_id) in enumerate(SEED_QUESTIONS):
        data_id = f"{number}_image"
        folder = "SEED-Bench-image/" if kind == "image" else "SEED-Bench-video-image/"
        image = folder + (data_id if kind == "image" else f"{name}.png")
        save_picture(home / f"{image}.png", number)
        (home / f"{image}.png").rename(home / image)  # images have no ending
        choices = {f"choice_{letter}": f"{number} {letter}" for letter in "abcd"}
        text = f"How many {number}?" + "".join(f"\n{letter.upper()}. {number} {letter}" for letter in "abcd") + LETTER
        asked = int(name) if name.isdigit() else name
        lines.append({"question_id": asked, "image": image, "text": text, "category": type_id})
        record = {
            "answer": answer, **choices, "data_id": data_id, "data_type": kind, "question": f"How many {number}?",
            "question_id": name, "question_type_id": type_id,
        }  # fmt: skip
        questions.append(record)
        rows.append(record | {"image": [picture(number)] * (1 if kind == "image" else 8)})
    write_lines(home / "llava-seed-bench.jsonl", lines)
    types = {"Instances Counting": 5, "Action Recognition": 10}
    write(home / "SEED-Bench.json", {"question_type": types, "questions": questions})
    return Made("seed", ["A", "B"], 100.0, {"": rows})


SCIENCEQA_QUESTIONS = (
    ("5", "Which is it?", "A map is shown.", ("here", "there", "nowhere"), 1, True),
    ("7", "Is it so?", "", ("yes", "no"), 0, False),
    ("11", "Which one?", "", ("1", "2", "3", "4", "5"), 4, True),
)


def scienceqa(root):
    """Three test questions, one of text alone, and a training problem."""
    home = root / "scienceqa"
    items, problems, rows = [], {"1": {"choices": ["x"], "answer": 0, "image": None, "split": "train"}}, []
    for number, (name, question, hint, choices, answer, pictured) in enumerate(SCIENCEQA_QUESTIONS):
        options = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCDE", choices, strict=False))
        text = (f"Context: {hint}\n" if hint else "") + question + options
        item = {"id": name, "image": f"{name}/image.png"} if pictured else {"id": name}
        asked = {"from": "human", "value": f"<image>\n{text}" if pictured else text}
        items.append(item | {"conversations": [asked, {"from": "gpt", "value": "A"}]})
        if pictured:
            save_picture(home / "images" / "test" / name / "image.png", number)
        problems[name] = {
            "question": question, "choices": list(choices), "answer": answer, "hint": hint, "split": "test",
            "image": "image.png" if pictured else None,
        }  # fmt: skip
        rows.append(problems[name] | {"image": picture(number) if pictured else None})
    write(home / "llava_test_CQM-A.json", items)
    write(home / "problems.json", problems)
    write(home / "pid_splits.json", {"train": ["1"], "test": [name for name, *_ in SCIENCEQA_QUESTIONS]})
    return Made("scienceqa", ["B", "A. yes", "The answer is E."], 100.0, {"ScienceQA-FULL": rows})


def cell_of(image):
    """Return a picture as the base64 text of a table's cell."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_table(path, columns, rows, delimiter="\t"):
    """Write a table with a head line, tab-separated by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip
MMBENCH_ROWS = (
    (3, "Which?", "Look\nwell.", ("red", "green", "blue", ""), "A", "colour", "attribute"),
    (8, 'Is "it" so?', "", ("yes", "no", "", ""), "B", "logic", "reasoning"),
    (1000003, "Which?", "Look\nwell.", ("blue", "red", "green", ""), "B", "colour", "attribute"),
)


def mmbench(root):
    """Two questions, one of them in two rotations; a hint of two lines, quotation marks, missing options."""
    lines, rows = [], []
    for index, question, hint, options, answer, category, kind in MMBENCH_ROWS:
        image = picture(index % 5, (40, 24))
        row = dict(zip("ABCD", options, strict=True)) | {
            "index": index, "question": question, "hint": hint, "answer": answer, "category": category, "split": "dev",
        }  # fmt: skip
        lines.append(row | {"image": cell_of(image), "l2-category": kind, "source": "made", "comment": ""})
        rows.append({name: value or "nan" for name, value in row.items()} | {"image": image, "L2-category": kind})
    write_table(root / "mmbench" / "mmbench_dev_20230712.tsv", MMBENCH_COLUMNS, lines)
    return Made("mmbench", ["A", "B", "B"], 100.0, {"en": rows})


MMVP_ROWS = (
    ("Are the wings open or closed?", "(a) Open (b) Closed", "(a)"),
    ("Are the wings open or closed?", "(a) Open (b) Closed", "(b)"),
    ("How many eyes, can you see?", "(a) 1 (b) 2", "(b)"),
    ("How many eyes, can you see?", "(a) 1 (b) 2", "(a)"),
)


def mmvp(root):
    """Two pairs."""
    home = root / "mmvp"
    columns = ("Index", "Question", "Options", "Correct Answer")
    rows = [dict(zip(columns, (number, *row), strict=True)) for number, row in enumerate(MMVP_ROWS, 1)]
    write_table(home / "Questions.csv", columns, rows, ",")
    for number in range(1, 5):
        save_picture(home / "MMVP Images" / f"{number}.jpg", number)
    hub = [row | {"image": picture(number)} for number, row in enumerate(rows, 1)]
    return Made("mmvp", ["A", "(b)", "2", "The answer is A."], 100.0, {"": hub})


def realworldqa(root):
    """A question for a letter, one for a word, one for a number."""
    asked = (
        ("Which way?\nA. left\nB. right\nPlease answer directly with only the letter of the correct option.", "B"),
        ("What colour?\nPlease answer directly with a single word or number.", "Red"),
        ("How many?\nPlease answer directly with a single word or number.", "2"),
    )
    rows = []
    for number, (question, answer) in enumerate(asked):
        save_picture(root / "realworldqa" / "images" / f"{number}.webp", number)
        rows.append({"image_path": f"{number}.webp", "question": question, "answer": answer})
    write(root / "realworldqa" / "data.json", rows)
    hub = [row | {"image": picture(number)} for number, row in enumerate(rows)]
    return Made("realworldqa", ["(b)", "red.", "2"], 100.0, {"": hub})


CVBENCH_ROWS = (
    ("Count", "ADE20K", "(C)"), ("Relation", "ADE20K", "(A)"), ("Count", "COCO", "(B)"), ("Relation", "COCO", "(B)"),
    ("Count", "COCO", "(A)"),
)  # fmt: skip


def cvbench(root):
    """Two questions about ADE20K, three about COCO, and one of the 3D half."""
    lines, hub = [], []
    for number, (task, source, answer) in enumerate(CVBENCH_ROWS):
        question = f"How is it {number}?"
        row = {
            "idx": number, "type": "2D", "task": task, "question": question, "choices": ["0", "1", "2"],
            "answer": answer, "prompt": f"{question} Select from the following choices.\n(A) 0\n(B) 1\n(C) 2",
            "filename": f"img/2D/{number}.png", "source": source,
        }  # fmt: skip
        save_picture(root / "cvbench" / row["filename"], number)
        lines.append(row)
        hub.append(row | {"image": picture(number)})
    write_lines(root / "cvbench" / "test_2d.jsonl", [*lines, lines[0] | {"idx": 99, "type": "3D", "source": "Omni3D"}])
    return Made("cvbench", ["(C)", "A", "b", "The answer is B.", "A. 0"], 100.0, {"2D": hub})


def for_judge(task, home, hub_prefix=""):
    """Three open questions about two images, for a judge; the dataset's ids may have a prefix."""
    rows, lines = [], []
    for number in range(3):
        image = f"{number // 2:03d}.png"
        save_picture(home / "images" / image, number // 2)
        text = f"What is it {number}?"
        lines.append({"question_id": number, "image": image, "text": text, "category": "conv"})
        own = f"{hub_prefix}{number}" if hub_prefix else number
        rows.append({"question_id": own, "question": text, "image": picture(number // 2)})
    return lines, Made(task, ["A cat \u00fc.", "A dog.", "Two lines.\nHere."], None, {"": rows})


def mmvet(root):
    """Open questions; the dataset's ids have MM-Vet's own prefix."""
    lines, made = for_judge("mmvet", root / "mm-vet", "v1_")
    write_lines(root / "mm-vet" / "llava-mm-vet.jsonl", lines)
    return made


def llava_bench(root):
    """Open questions."""
    lines, made = for_judge("llava_bench", root / "llava-bench-in-the-wild")
    write_lines(root / "llava-bench-in-the-wild" / "questions.jsonl", lines)
    return made


@dataclass
class Measured(Made):
    """Lines hold what was measured: the right texts have perplexity 1 and METEOR 1, others 9 and 0."""

    several: bool = False

    def answers(self, root, hub=None, texts=None):
        """Return lines as a run writes them, numbers included."""
        return [
            replace(answer, extra={**answer.extra, **self.measured(answer.text in self.right)})
            for answer in super().answers(root, hub, texts)
        ]

    def measured(self, right):
        """Return the fields of one line."""
        names = ("total_token_length", "instruct_token_length", "output_token_length", "output_cache_length")
        names += ("max_prefill_memory", "max_decode_memory", "decode_flop", "decode_kv_bytes")
        extra = {prefix + name: 100 for name in names for prefix in ("", "meteor_")}
        ppl, meteor = (1.0, 1.0) if right else (9.0, 0.0)
        if not self.several:
            return extra | {"ppl": ppl, "meteor": meteor}
        return extra | {"ppl": [ppl], "meteor": [meteor], "mean_round_ppl": ppl, "mean_round_meteor": meteor}


def generation_items(root, name, images, several=False):
    """Write four items; with `several`, of one to four rounds. An answer is a list of texts then."""
    items = []
    for number in range(4):
        image = f"train2017/{number:012d}.jpg"
        save_picture(root / images / image, number)
        asked = [f"What is it {place}?" for place in range(number + 1 if several else 1)]
        answers = [f"The cat sits {'there ' * (1 + 3 * place % 5)}and looks." for place in range(len(asked))]
        asked[0] = f"<image>\n{asked[0]}"
        sides = (asked, answers) if several else (asked[0], answers[0])
        items.append({"id": f"i_{number}", "image": image, "question": sides[0], "answer": sides[1]})
    write(root / name, items)


def lvis_single(root):
    """One round."""
    generation_items(root, "lvis_vqa/single_round.json", "lvis_vqa/images")
    return Measured("lvis_single", [f"Right {number}." for number in range(4)], 1.0, lower_is_better=True)


def lvis_multi(root):
    """One to four rounds."""
    generation_items(root, "lvis_vqa/multi_round.json", "lvis_vqa/images", several=True)
    right = [f"Right {number}." for number in range(4)]
    return Measured("lvis_multi", right, 1.0, lower_is_better=True, several=True)


def sharegpt4v(root):
    """One round."""
    generation_items(root, "sharegpt4v_vqa/sharegpt4v_vqa.json", "sharegpt4v_vqa/images")
    return Measured("sharegpt4v", [f"Right {number}." for number in range(4)], 1.0, lower_is_better=True)


def document_questions(root, name, images, image_field, kinds, asked):
    """Write two questions of val and two of test, and return the right answers and the dataset's rows."""
    folder, val, test = asked
    rows, hub = [], []
    answers = (["1/8/93"], ["$ 28,000", "28,000"])
    for number, (question, labels, own) in enumerate(
        zip(("what is the date?", "how much?"), answers, kinds[1:], strict=True)
    ):
        image = f"{number}.png"
        save_picture(root / images / image, number)
        shown = f"documents/{image}" if name == "docvqa" else image
        record = {"questionId": 100 + number, "question": question, image_field: shown, "data_split": "val"}
        rows.append(record | {"answers": labels, kinds[0]: own})
        hub.append({
            "questionId": str(100 + number), "question": question, "answers": labels, "image": picture(number),
        })  # fmt: skip
    write(root / folder / val, {"dataset_name": name, "dataset_split": "val", "data": rows})
    unlabelled = [
        {"questionId": 900 + number, "question": f"what is {number}?", image_field: rows[number][image_field]}
        for number in range(2)
    ]
    write(root / folder / test, {"dataset_name": name, "dataset_split": "test", "data": unlabelled})
    return hub


def docvqa(root):
    """Two val questions, the second with two labels, and two of test."""
    kinds = ("question_types", ["handwritten", "form"], ["form"])
    asked = ("docvqa", "val_v1.0_withQT.json", "test_v1.0.json")
    hub = document_questions(root, "docvqa", "docvqa/documents", "image", kinds, asked)
    return Made("docvqa:val", ["1/8/93", "28,000"], 100.0, {"DocVQA": hub})


def infovqa(root):
    """The same of infographics."""
    kinds = ("answer_type", ["single span"], ["non-extractive"])
    asked = ("infovqa", "infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_test_v1.0.json")
    hub = document_questions(root, "infovqa", "infovqa/infographicsvqa_images", "image_local_name", kinds, asked)
    return Made("infovqa:val", ["1/8/93", "$  28,000"], 100.0, {"InfographicVQA": hub})


def chartqa(root):
    """Two questions of people, one that was made."""
    halves = {"human": [("How many bars?", "14"), ("Which bar?", "Green")], "augmented": [("What share?", "32.5")]}
    hub, number = [], 0
    for half, asked in halves.items():
        rows = []
        for question, label in asked:
            save_picture(root / "chartqa" / "png" / f"{number}.png", number)
            rows.append({"imgname": f"{number}.png", "query": question, "label": label})
            hub.append({
                "type": f"{half}_test", "question": question, "answer": label, "image": picture(number),
            })  # fmt: skip
            number += 1
        write(root / "chartqa" / f"test_{half}.json", rows)
    return Made("chartqa", ["14.5", "green", "32"], 100.0, {"": hub})


OCRBENCH_ROWS = (
    ("IIIT5K", "Regular Text Recognition", "what is written in the image?", "CENTRE"),
    ("IAM", "Handwriting Recognition", "what is written in the image?", "of the"),
    ("docVQA", "Doc-oriented VQA", "what is the date?", ["1/8/93", "8 January"]),
    ("HME100k", "Handwritten Mathematical Expression Recognition", "Please write it in LaTeX.", "\\frac { A } { 2 }"),
)


def ocrbench(root):
    """Four questions of three components; two have one id, and one label is a list."""
    rows, hub = [], []
    for number, (source, kind, question, answers) in enumerate(OCRBENCH_ROWS):
        image = f"{source}/imgs/{number}.png"
        save_picture(root / "ocrbench" / "OCRBench_Images" / image, number)
        rows.append({
            "dataset_name": source, "id": number // 2, "image_path": image, "question": question,
            "answers": answers, "type": kind,
        })  # fmt: skip
        labels = answers if isinstance(answers, list) else [answers]
        hub.append({
            "dataset": source, "question": question, "question_type": kind, "answer": labels, "image": picture(number),
        })  # fmt: skip
    write(root / "ocrbench" / "OCRBench.json", rows)
    right = ["It says centre.", "OF THE", "on 8 january", "$\\frac{A}{2}$"]
    return Made("ocrbench", right, 100.0, {"": hub})


MMSTAR_ROWS = (
    ("Which is it?\nOptions: A: red, B: green", "B", "coarse perception", "image emotion"),
    ("Which is it?\nOptions: A: 1, B: 2, C: 3, D: 4", "D", "math", "geometry"),
    ("Where is it?\nOptions: A: here, B: there", "A", "math", "statistical reasoning"),
)


def mmstar(root):
    """Three questions of two categories, whose options stand in the question."""
    lines, hub = [], []
    for index, (question, answer, category, finer) in enumerate(MMSTAR_ROWS):
        row = {"index": index, "question": question, "answer": answer, "category": category, "l2_category": finer}
        lines.append(row | {"image": cell_of(picture(index, (40, 24))), "bench": "made"})
        hub.append(row | {"image": picture(index)})
    columns = ("index", "question", "image", "answer", "category", "l2_category", "bench")
    write_table(root / "mmstar" / "MMStar.tsv", columns, lines)
    return Made("mmstar", ["(b) green", "The answer is D", "A"], 100.0, {"val": hub})


TASK_DATA = {
    "vqav2": vqav2, "gqa": gqa, "textvqa": textvqa, "pope": pope, "mme": mme, "seed": seed, "vizwiz": vizwiz,
    "scienceqa": scienceqa, "mmbench": mmbench, "mmvp": mmvp, "realworldqa": realworldqa, "cvbench": cvbench,
    "mmvet": mmvet, "llava_bench": llava_bench,
    "lvis_single": lvis_single, "lvis_multi": lvis_multi, "sharegpt4v": sharegpt4v,
    "docvqa": docvqa, "infovqa": infovqa, "chartqa": chartqa, "ocrbench": ocrbench, "mmstar": mmstar,
}  # fmt: skip
"""Task -> the function that makes its data below a root and returns `Made`."""
