"""The documents of tests/eval/lmms/toy, and what the model itself answers to them, one by one."""

import json

from PIL import Image

from dynamic_llava import DynamicLlavaForConditionalGeneration, DynamicLlavaProcessor
from dynamic_llava.processing.prompts import conversation_prompt
from tests.sft_builders import picture

MAX_NEW_TOKENS = 12
"""As in toy.yaml."""
# Ragged, with no, one and several images, places of their own in the text, and an odd number for two processes.
QUESTIONS = (
    (1, "What is it?", "<image>\nWhat is it?"),
    (
        2,
        "Which one is larger, and why do you think so?",
        "<image> <image>\nWhich one is larger, and why do you think so?",
    ),
    (0, "How many legs has a spider?", "How many legs has a spider?"),
    (1, "Is it a cat?\nAnswer with yes or no.", "<image>\nIs it a cat?\nAnswer with yes or no."),
    (2, "Between <image> and <image>: which?", "Between <image> and <image>: which?"),
    (3, "Count.", "<image> <image> <image>\nCount."),
    (1, "", "<image>\n"),
)
"""Images, what the task asks, and the user's text that has to become of it."""


def write_toy(folder):
    """Write the pictures and questions.jsonl; return the documents."""
    (folder / "images").mkdir(parents=True)
    documents = []
    for number, (images, question, _) in enumerate(QUESTIONS):
        names = [f"images/{number}_{place}.png" for place in range(images)]
        for place, name in enumerate(names):
            picture(10 * number + place, (40 + 9 * number, 64)).save(folder / name)
        documents.append({"images": names, "question": question, "answer": "yes"})
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "questions.jsonl").write_text(lines, encoding="utf-8")
    return documents


def pictures(folder, document):
    """Return the opened pictures of a document."""
    return [Image.open(folder / name).convert("RGB") for name in document["images"]]


def own_answers(checkpoint, folder, documents, end=None, max_new_tokens=MAX_NEW_TOKENS, **arguments):
    """Return the greedy answer of generate() to each document alone; `end` is the end token's id, if there is one."""
    processor = DynamicLlavaProcessor.from_pretrained(checkpoint)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    model.generation_config.eos_token_id = end
    answers = []
    for document, (_, _, text) in zip(documents, QUESTIONS, strict=True):
        inputs = processor(text=conversation_prompt([(text, None)]), images=[pictures(folder, document)])
        sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **arguments)
        answers.append(processor.decode(sequences[0, inputs["input_ids"].shape[1] :]).strip())
    return answers
