"""A checkpoint whose answers end early or not, a made benchmark, and the run command on them."""

import json

from transformers import GenerationConfig

from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.answering import prompt_inputs, read_ahead
from dynamic_llava.eval.tasks.base import DataFile, Task, paper_numbers
from dynamic_llava.eval.tasks.questions import ImageFile, Question
from tests.builders import PAD, build_model
from tests.eval.task_data import save_picture
from tests.sft_builders import tiny_processor

TOKENS = 8
"""max_new_tokens of the tests."""


class Toy(Task):
    """Questions of many lengths, a third of them without an image; the answer "x" is right."""

    name = "toy"
    title = "Toy"
    max_new_tokens = TOKENS
    files = (DataFile("toy/questions.json", "questions", "the shop"),)
    table_metric = "accuracy"
    paper = paper_numbers("accuracy", dense=(50.0, 60.0), both=(40.0, None))
    paper_note = "a made one"

    def questions(self, root, hub=None):
        """Return the questions of the file."""
        lines = json.loads(self.path(root, "toy/questions.json").read_text())
        folder = root / "toy" / "images"
        return [
            Question(line["id"], line["text"], ImageFile(folder, line["image"]) if line["image"] else None)
            for line in lines
        ]

    def score(self, answers, root, hub=None, *, part=False):
        """Return the share of "x"; ValueError unless every question is answered once, in order."""
        names = [question.id for question in self.questions(root)][: len(answers) if part else None]
        if [answer.question_id for answer in answers] != names:
            raise ValueError("toy: the answers are not those to its questions")
        right = sum(answer.text == "x" for answer in answers)
        return self.result({"accuracy": (100 * right / len(names), "percent")}, {"questions": len(names)}, [])


def toy_data(root, number=12):
    """Write the toy benchmark; two questions in a row share an id, as in MME."""
    lines = []
    for place in range(number):
        image = None if place % 3 == 2 else f"{place}.png"
        if image:
            save_picture(root / "toy" / "images" / image, place)
        lines.append({"id": f"q{place // 2}", "text": f"What {'is ' * (7 * place % 13)}it {place}?", "image": image})
    (root / "toy").mkdir(parents=True, exist_ok=True)
    (root / "toy" / "questions.json").write_text(json.dumps(lines))
    return lines


def ragged_checkpoint(folder, seed=0):
    """Save a model whose answers to the toy questions end after different numbers of tokens; return its folder."""
    model, processor = build_model(seed=seed), tiny_processor()
    toy_data(folder)
    questions = Toy().questions(folder)
    (asked, _), *_ = read_ahead(questions, range(len(questions)), len(questions), processor)
    inputs = prompt_inputs(processor, asked)
    ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    # The token that comes at most different places of the answers, but is none's first, is made the end token.
    places = {token: {row.index(token) for row in ids if token in row} for row in ids for token in row}
    end = max((token for token in places if 0 not in places[token]), key=lambda token: (len(places[token]), token))
    # The other settings are for a run to leave aside: it decodes greedily.
    model.generation_config = GenerationConfig(
        eos_token_id=[end, processor.tokenizer.eos_token_id],
        pad_token_id=PAD,
        do_sample=True,
        num_beams=3,
        repetition_penalty=3.0,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(model, tasks, root, out, *more):
    """Run the command; return its exit code."""
    places = ("--model", model, "--tasks", tasks, "--data-root", root, "--output-folder", out)
    return main([str(argument) for argument in (*places, "--max-new-tokens", TOKENS, *more)])


def summary(out):
    """Return the summary of a run."""
    return json.loads((out / "summary.json").read_text())


def lines_of(path):
    """Return the decoded lines of an answer file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
