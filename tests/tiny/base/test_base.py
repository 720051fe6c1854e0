"""The shipped dense base: small, honest about its origin, readable by transformers, and good on unseen pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from dynamic_llava.processing.images import preprocess
from dynamic_llava.processing.prompts import SYSTEM
from dynamic_llava.tiny import BASE_WEIGHTS
from dynamic_llava.tiny.base.pipeline import description_scores, question_accuracy, sample_questions
from dynamic_llava.tiny.base.sequences import build_tokenizer
from dynamic_llava.tiny.base.vision import pixel_values
from dynamic_llava.tiny.world.scenes import sample_pictures

SCENES, PICTURES = sample_pictures(60, (990,))


@pytest.fixture(scope="module")
def base():
    return LlavaForConditionalGeneration.from_pretrained(BASE_WEIGHTS).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_WEIGHTS)


def test_the_folder_is_complete_and_small():
    names = {path.name for path in BASE_WEIGHTS.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "provenance.json",
        "training_log.jsonl",
    } <= names
    assert sum(path.stat().st_size for path in BASE_WEIGHTS.iterdir()) <= 10 * 2**20


def test_provenance_says_how_it_was_made_and_that_it_is_good_enough():
    provenance = json.loads((BASE_WEIGHTS / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["storage_dtype"] == "float32"
    assert {"config", "crutches", "versions", "commit", "made_by"} <= set(provenance)
    assert provenance["language_steps_done"] == provenance["config"]["language"]["steps"]
    scores = provenance["unseen_data_scores"]
    assert scores["short_answers"]["all"] >= 0.93 and min(scores["short_answers"].values()) >= 0.85
    assert scores["descriptions"]["attribute_recall"] >= 0.85


def test_config_names_what_loaders_need(base):
    stored = json.loads((BASE_WEIGHTS / "config.json").read_text(encoding="utf-8"))
    assert stored.get("image_token_id", stored.get("image_token_index")) == 4
    assert base.dtype == torch.float32
    assert base.config.image_seq_length == 64 and base.config.text_config.num_hidden_layers == 6


def test_the_shipped_tokenizer_is_the_built_one(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer([SYSTEM, "USER: ASSISTANT:"]).get_vocab()


def test_training_and_processing_prepare_pictures_alike():
    settings = json.loads((BASE_WEIGHTS / "preprocessor_config.json").read_text(encoding="utf-8"))
    images = [Image.fromarray(p.pixels) for p in PICTURES[:4]]
    ours = preprocess(images, 64, settings["image_mean"], settings["image_std"])
    trained = pixel_values(torch.from_numpy(np.stack([p.pixels for p in PICTURES[:4]])))
    torch.testing.assert_close(ours, trained, atol=1e-5, rtol=1e-5)


def test_fresh_questions_and_descriptions(base, tokenizer):
    accuracy = question_accuracy(base, tokenizer, PICTURES, sample_questions(SCENES, 20, (991,)))
    assert accuracy["all"] >= 0.9
    scores = description_scores(base, tokenizer, SCENES[:16], PICTURES[:16], 992)
    assert scores["attribute_recall"] >= 0.85
