"""CLIP beside the model: which text it is told, what it says of it, and what is refused."""

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel

from dynamic_llava import get_method
from dynamic_llava.config import SHIPPED
from dynamic_llava.engine.plan import cuts_of
from dynamic_llava.layout import TokenLayout
from dynamic_llava.methods import CLIP_EVIDENCE, Choice, Cut, Method
from dynamic_llava.model.text_tower import open_clip, open_tokenizer, question_ids, question_text
from dynamic_llava.processing import DynamicLlavaProcessor
from tests.builders import IMAGE_SIZE, IMAGE_TOKEN, fixed_rows, prompts, shared_model
from tests.clip_folders import READS, Words, tiny_clip, write_clip

READERS = ("trim", "cdpruner")
CPU = torch.device("cpu")


def test_the_question_is_what_stands_behind_each_image_up_to_the_first_answer():
    """Two images in a row, text before and between them, an answer and a later question; padding on the left."""
    one, two = [IMAGE_TOKEN] * 2, [IMAGE_TOKEN] * 2
    ids = torch.tensor([[5, *one, 6, *two, 7, 8, 9, 10], [0, 0, 0, 11, *one, 12, 13, 14, 15]])
    output = torch.zeros_like(ids, dtype=torch.bool)
    output[0, 8], output[1, 9] = True, True
    mask = (ids != 0).long()
    layout = TokenLayout.build(ids == IMAGE_TOKEN, mask, output, 2)
    assert question_ids(ids, layout) == [[6, 7, 8], [7, 8], [12, 13, 14]]
    later = TokenLayout.build(ids == IMAGE_TOKEN, mask, None, 2)
    assert question_ids(ids, later) == [[6, 7, 8, 9, 10], [7, 8, 9, 10], [12, 13, 14, 15]]
    nothing = torch.tensor([[5, IMAGE_TOKEN, IMAGE_TOKEN]])
    assert question_ids(nothing, TokenLayout.build(nothing == IMAGE_TOKEN, None, None, 2)) == [[]]


@pytest.mark.parametrize("closing", [" ASSISTANT:", "\nassistant\n", "assistant\n\n", " [/INST]", ""])
def test_closing_words_of_templates_are_no_part_of_the_question(closing):
    class Says(Words):
        def decode(self, ids, skip_special_tokens):
            return "\nWho is the assistant" + closing

    assert question_text(Says(), []) == "Who is the assistant"


def test_a_prompt_of_the_shipped_checkpoint_is_told_as_its_question():
    processor = DynamicLlavaProcessor.from_pretrained(SHIPPED["tiny"])
    tokenizer = open_tokenizer(str(SHIPPED["tiny"]))
    text = "USER: <image>\ncolor is the circle? ASSISTANT:"
    ids = processor.tokenizer(text.split("<image>")[1], add_special_tokens=False)["input_ids"]
    assert question_text(tokenizer, ids) == "color is the circle?"


@torch.no_grad()
def test_clip_says_of_texts_and_patches_what_transformers_clip_does():
    """Rows of other lengths beside them, an empty text and one of several pieces change nothing."""
    folder = tiny_clip(32)
    clip, whole, tokenizer = (
        open_clip(str(folder), 32, CPU),
        CLIPModel.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    texts = ["a b", "", "one two three four five", "a b"]
    found = clip.texts(texts)
    assert found.valid.sum(1).tolist() == [1, 1, 2, 1], "19 letters, of which 14 fit beside start and end"
    for number, text in enumerate(texts):
        start, *letters, end = tokenizer(text)["input_ids"]
        for piece, at in enumerate(range(0, max(len(letters), 1), READS - 2)):
            ids = torch.tensor([[start, *letters[at : at + READS - 2], end]])
            wanted = whole.get_text_features(ids).pooler_output[0]
            torch.testing.assert_close(found.seen["clip_text"][number, piece], wanted, rtol=1e-4, atol=1e-5)
    features = torch.randn(2, 5, 32)
    wanted = whole.visual_projection(whole.vision_model.post_layernorm(features))
    torch.testing.assert_close(clip.tokens(features), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(clip.tokens(features), wanted)
    assert not any(one.requires_grad for one in clip.parameters()) and not clip.training


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_another_question_is_another_decision(name):
    """Of the same image."""
    model, inputs = shared_model(), prompts(fixed_rows(seed=31, output=0))
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    words = (inputs["input_ids"] != IMAGE_TOKEN) & inputs["attention_mask"].bool()
    other["input_ids"][words] = 127 - other["input_ids"][words] % 60
    method = get_method(name) if name == "cdpruner" else get_method(name, image_keep_rate=0.5)
    first, second = (model(**given, method=method).sparsity.image_indices for given in (inputs, other))
    pairs = [(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)]
    assert pairs and any(not torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def test_an_image_with_no_text_behind_it_is_said_to_have_none(caplog):
    model, layout = shared_model(), {"attention_mask": torch.ones(2, 18, dtype=torch.long)}
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 16, 7], [5, 7, *[IMAGE_TOKEN] * 16]])
    given = {"pixel_values": torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE), **layout, "method": "cdpruner"}
    model(input_ids=ids[:1], **{name: one[:1] if name != "method" else one for name, one in given.items()})
    assert "empty text" not in caplog.text
    model(input_ids=ids, **given)
    assert "'cdpruner' compares patches" in caplog.text and "put the question behind the image" in caplog.text


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_an_image_of_a_later_turn_is_refused(name):
    """Behind the first answer of its row, in one pass: the question that it is asked about would be another."""
    model = shared_model()
    ids = torch.tensor([[5, 7, 8, *[IMAGE_TOKEN] * 16, 9]])
    output = torch.zeros_like(ids, dtype=torch.bool)
    output[0, 1] = True
    with pytest.raises(ValueError, match="cannot decide on an image of a later turn"):
        model(
            input_ids=ids,
            output_mask=output,
            pixel_values=torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE),
            method=name,
        )


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_embeddings_say_no_text(name):
    model, inputs = shared_model(), prompts(fixed_rows(seed=31, output=0))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {
        "inputs_embeds": embeds,
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"],
    }
    with pytest.raises(ValueError, match=rf"'{name}' compares patches.*inputs_embeds.*give input_ids"):
        model(**given, image_mask=inputs["input_ids"] == IMAGE_TOKEN, method=name)


def test_a_checkpoint_that_is_no_whole_clip_is_refused_and_says_what_to_do(tmp_path):
    for source, words in (
        (str(tmp_path / "nowhere"), "cannot be read from.*text_tower"),
        ("nobody/clip-that-is-not-there", "cannot be read from.*whole CLIP model"),
        (str(write_clip(tmp_path / "narrow", 8)), "is 8 wide and that of this model 32"),
    ):
        with pytest.raises(ValueError, match=words):
            open_clip(source, 32, CPU)
    folder = tmp_path / "vision"
    CLIPModel.from_pretrained(tiny_clip(32)).vision_model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_clip(32)).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"give text_tower \(--method.text-tower\)"):
        open_clip(str(folder), 32, CPU)


def test_a_model_without_a_tokenizer_is_refused_and_says_what_to_do(tmp_path):
    for source in ("", str(tmp_path)):
        with pytest.raises(ValueError, match=r"no tokenizer that says it.*from_pretrained.*divprune"):
            open_tokenizer(source)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (Cut(2, frozenset({"clip_text"}), text_tower="x"), "clip_text at layer 2"),
        (Cut(2, frozenset({"clip_tokens"}), text_tower="x"), "clip_tokens at layer 2"),
        (Cut(0, CLIP_EVIDENCE), "says no text_tower"),
        (Cut(0, frozenset({"clip_text"}), text_tower="x"), "clip_text without clip_tokens"),
    ],
)
def test_cuts_that_cannot_be_served_are_refused(cut, words):
    class Asking(Method):
        name = "asking"

        def cuts(self, layers):
            return (cut,)

        def keep_image(self, cut, images, learned) -> torch.Tensor | Choice:
            raise AssertionError

    with pytest.raises(ValueError, match=words):
        cuts_of(Asking(), 6)


def test_no_weight_of_clip_is_saved_with_the_model():
    model, inputs = shared_model(), prompts(fixed_rows(seed=31, output=0))
    names = set(model.state_dict())
    with torch.no_grad():
        model(**inputs, method="trim")
    assert set(model.state_dict()) == names
