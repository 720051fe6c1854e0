"""A character tokenizer that fits the tiny random model, its checkpoint folder, and LLaVA-format data with pictures."""

import json
import string
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TrainingArguments

from dynamic_llava.config import TrainConfig
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import training_arguments
from dynamic_llava.train.trainer import DynamicLlavaTrainer
from tests.builders import BOS, EOS, IMAGE_SIZE, IMAGE_TOKEN, PAD, PATCH, build_model, dense_twin

SPECIALS = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<image>": IMAGE_TOKEN}
SHAPES_OF_PICTURES = ((64, 48), (20, 90), (56, 56), (200, 33))


def character_tokenizer():
    """Return a tokenizer with one token per character, ids below the tiny model's vocabulary."""
    characters = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
    vocabulary = {**SPECIALS, **{character: 4 + i for i, character in enumerate(characters)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.add_special_tokens(list(SPECIALS))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_processor():
    """Return the processor of the tiny random model."""
    return DynamicLlavaProcessor(character_tokenizer(), IMAGE_SIZE, PATCH)


def write_checkpoint(folder, seed=0, dense=False, **settings):
    """Save a tiny random model with its processor, `dense` without the predictors; return the folder."""
    model = build_model(seed=seed, **settings)
    (dense_twin(model) if dense else model).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return Path(folder)


def picture(seed=0, size=(64, 48), mode="RGB"):
    """Return a random picture of (width, height) `size` in any of Pillow's common modes."""
    rng = np.random.default_rng(seed)
    colours = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    if mode == "RGBA":
        colours.putalpha(Image.fromarray(rng.integers(0, 256, (size[1], size[0]), dtype=np.uint8)))
        return colours
    return colours.convert(mode)


def conversation(question="<image>\nWhat is it?", answer="A cat.", *more):
    """Return messages of one or more (question, answer) pairs."""
    texts = (question, answer, *more)
    return [{"from": "gpt" if place % 2 else "human", "value": text} for place, text in enumerate(texts)]


def write_data(folder, samples=12, long_answer="It shows a cat that sits on a mat.", seed=0):
    """Write pictures and a LLaVA-format file with short and long answers; return (file, image folder)."""
    folder = Path(folder)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(samples):
        name = f"{number}.png"
        picture(seed + number, SHAPES_OF_PICTURES[number % len(SHAPES_OF_PICTURES)]).save(images / name)
        answer = "No." if number % 3 == 0 else long_answer[: 8 + 3 * (number % 7)]
        messages = conversation(f"<image>\nQuestion {number}?", answer)
        entries.append({"id": f"sample-{number}", "image": name, "conversations": messages})
    file = folder / "data.json"
    file.write_text(json.dumps(entries), encoding="utf-8")
    return file, images


def trainer_around(model, folder, **train):
    """Return the trainer of a model in memory, at step 0; it has no data: tests hand it batches with `take_step`."""
    settings = TrainConfig(**{"max_steps": 10, **train})
    config = RunConfig(output_folder=str(folder), sparsity=model.config.sparsity, train=settings)
    arguments = TrainingArguments(**training_arguments(config))
    trainer = DynamicLlavaTrainer(model=model, args=arguments, train_config=settings)
    trainer.state.max_steps = settings.max_steps
    return trainer


def take_step(trainer, batches):
    """Send the batches of one optimizer step down the trainer's own path: count, loss, backward; nothing is updated.

    Returns the loss terms as they are logged, the model's outputs, and the step's gradients by parameter.
    """
    outputs, model = [], trainer.model
    model.zero_grad(set_to_none=True)
    trainer.restart_meter()
    handle = model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    fetched, tokens = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    losses = [trainer.training_step(model, batch, tokens) for batch in fetched]
    handle.remove()
    terms = {"loss": sum(losses).item(), **{name: share.item() for name, share in trainer.meter.shares.items()}}
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return terms, outputs, found
