"""A random tiny checkpoint and a handful of real scenes, small enough for the whole evaluation in a test."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.processing.prompts import conversation_prompt
from dynamic_llava.tiny.base.model import tiny_config
from dynamic_llava.tiny.base.sequences import build_tokenizer
from dynamic_llava.tiny.job.testset import Query, TestSet
from dynamic_llava.tiny.world.scenes import IMAGE_SIZE, PATCH_SIZE, sample_pictures
from dynamic_llava.tiny.world.texts import KINDS, REQUESTS, ask, describe, scene_attributes

SPARSITY = {"predictor_width": 16, "predictor_heads": 2, "predictor_mlp": 32, "predictor_blocks": 1, "cache_block": 8}


def write_checkpoint(folder: Path, seed: int) -> Path:
    """A random model of the tiny world's classes at width 32, with its processor."""
    tokenizer = build_tokenizer([conversation_prompt([("", None)])])
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    config = tiny_config(len(tokenizer), *ids, tokenizer.convert_tokens_to_ids("<image>"))
    values = config.to_dict()
    values["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    values["vision_config"] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(seed)
    model = DynamicLlavaForConditionalGeneration(DynamicLlavaConfig(**values, sparsity=SPARSITY))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)  # decisions and answers differ from token to token
    model.save_pretrained(folder)
    DynamicLlavaProcessor(tokenizer, IMAGE_SIZE, PATCH_SIZE).save_pretrained(folder)
    return folder


def write_test_set(folder: Path, images: int = 6) -> TestSet:
    """Scenes of the world with two questions of each kind in turn and one description each."""
    scenes, pictures = sample_pictures(images, (11,))
    questions, descriptions, attributes, patches = [], [], {}, {}
    for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        path = folder / f"{i}.png"
        Image.fromarray(picture.pixels).save(path)
        rng = np.random.default_rng(i)
        asked = [ask(scene, KINDS[(2 * i + k) % len(KINDS)], rng) for k in range(2)]
        for question in [one for one in asked if one is not None]:
            number = len(questions)
            questions.append(
                Query(
                    f"q{number}",
                    number,
                    path,
                    f"<image>\n{question.text}",
                    question.answer,
                    question.kind,
                    question.negative or "",
                )
            )
        text = describe(scene, "list").text
        descriptions.append(Query(f"d{i}", 1000 + i, path, f"<image>\n{REQUESTS['list'][0]}", text, "description"))
        attributes[path] = frozenset(scene_attributes(scene))
        patches[path] = [np.flatnonzero(picture.patch_object == j).tolist() for j in range(len(scene.objects))]
    return TestSet(questions, descriptions, attributes, patches)
