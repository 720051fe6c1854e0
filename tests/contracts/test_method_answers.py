"""What a method of one's own answers wrongly is named with the method, the hook, what came and what is allowed."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.methods import METHODS, Choice, Cut, Method
from tests.builders import LAYERS, fixed_rows, prompts, shared_model, tiny_config


@dataclass(frozen=True)
class Answering(Method):
    """Answers what it is told to."""

    name: ClassVar[str] = "answering"
    training_free: ClassVar[bool] = True

    image: Any = None
    output: Any = None
    its_cuts: Any = (Cut(2, output=True),)

    def cuts(self, layers):
        return self.its_cuts

    def keep_image(self, cut, images, learned):
        return images.valid if self.image is None else self.image(images.valid)

    def keep_output(self, outputs, learned):
        every = torch.ones_like(outputs.rank, dtype=torch.bool)
        return every if self.output is None else self.output(every)


def first_stays(valid):
    return torch.arange(valid.shape[1]).expand(valid.shape) == 0


IMAGE = {
    "floats": (lambda valid: valid.float(), r"answered keep_image with torch.float32 .*return bool"),
    "indices": (lambda valid: valid.long(), r"torch.int64.*return bool"),
    "one row": (lambda valid: valid[0], r"of shape \(16,\); let it return bool of shape \(6, 16\) \(images"),
    "another length": (lambda valid: valid[:, :3], r"of shape \(6, 3\)"),
    "nothing": (lambda valid: [], r"answered keep_image with \[\]"),
    "an heir that is dropped": (lambda valid: Choice(first_stays(valid), valid.long()), "heir that is no kept token"),
    "an heir outside": (lambda valid: Choice(first_stays(valid), valid.long() * 99), "heir that is no kept token"),
    "heirs as floats": (lambda valid: Choice(first_stays(valid), valid.float()), "heirs torch.float32.*int64"),
    "weights of bool": (lambda valid: Choice(first_stays(valid), 0 * valid.long(), valid), "weight torch.bool.*float"),
    "weights of NaN": (
        lambda valid: Choice(first_stays(valid), 0 * valid.long(), valid / 0 - torch.inf),
        "the weight that is not finite at real tokens",
    ),
    "shares of another shape": (
        lambda valid: Choice(first_stays(valid), shares=valid.float()),
        r"shares torch.float32 of shape \(6, 16\); let it return float of shape \(6, 16, 16\)",
    ),
    "shares of infinity": (
        lambda valid: Choice(first_stays(valid), shares=torch.full((*valid.shape, valid.shape[1]), torch.inf)),
        "shares that is not finite",
    ),
}
OUTPUT = {
    "floats": (lambda every: every.float(), r"answered keep_output with torch.float32 .*return bool"),
    "a column": (lambda every: every[:, None], r"let it return bool of shape \(\d+,\) \(output tokens\)"),
    "a number": (lambda every: True, "answered keep_output with True"),
}
CUTS = {
    "numbers": ((1, 2), "Cut objects"),
    "a layer of 1.5": ((Cut(1.5),), "their layer an int"),
    "evidence that is none": ((Cut(2, frozenset({"smell"})),), "question_row"),
}


@pytest.mark.parametrize(("image", "message"), IMAGE.values(), ids=IMAGE)
@torch.no_grad()
def test_answers_about_images(image, message):
    with pytest.raises(ValueError, match=f"'answering' .*{message}"):
        shared_model()(**prompts(fixed_rows(output=0)), method=Answering(image))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("output", "message"), OUTPUT.values(), ids=OUTPUT)
def test_answers_about_output_tokens(output, message, use_cache):
    call = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    with pytest.raises(ValueError, match=f"'answering' .*{message}"):
        shared_model().generate(**prompts(fixed_rows(output=0)), **call, method=Answering(output=output))


@pytest.mark.parametrize(("cuts", "message"), CUTS.values(), ids=CUTS)
@torch.no_grad()
def test_cuts(cuts, message):
    with pytest.raises(ValueError, match=f"'answering' .*{message}"):
        shared_model()(**prompts(fixed_rows(output=0)), method=Answering(its_cuts=cuts))


class Forgetful(Answering):
    """Evicts."""

    def evict(self, layer, slots):
        return None


@pytest.mark.parametrize("sees", ["mass", frozenset({"smell"})])
@torch.no_grad()
def test_what_an_eviction_sees(sees, monkeypatch):
    monkeypatch.setattr(Forgetful, "evict_sees", sees, raising=False)
    with pytest.raises(ValueError, match=r"'answering' evicts by .*frozenset of names among mass"):
        shared_model()(**prompts(fixed_rows(output=0)), method=Forgetful(its_cuts=()), use_cache=True)


class Late(Answering):
    """Drops output tokens two steps late."""

    drop_delay = 2


@pytest.mark.parametrize(("kind", "words"), [(Forgetful, "evicts"), (Late, "a window")])
@torch.no_grad()
def test_what_cannot_stand_beside_images_that_are_computed_on(kind, words):
    with pytest.raises(ValueError, match=rf"'answering' has a cut that says `within_image`.*and {words}; let it be"):
        shared_model()(**prompts(fixed_rows(output=0)), method=kind(its_cuts=(Cut(0, within_image=True),)))


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method().evicts and hasattr(method, "layer")]
)
@torch.no_grad()
def test_an_eviction_from_a_layer_that_is_not_there(name):
    with pytest.raises(ValueError, match=f"{name!r} evicts from layer 99 on, .* has {LAYERS} layers"):
        shared_model()(**prompts(fixed_rows(output=0)), method={"name": name, "layer": 99}, use_cache=True)


@dataclass(frozen=True)
class Clashing(Answering):
    """Calls a part of its weights as the language model calls one of its own modules."""

    parts: ClassVar[tuple[str, ...]] = ("norm",)

    def build(self, width, settings):
        return torch.nn.LayerNorm(width)


def test_a_learned_part_takes_the_name_of_no_module():
    with pytest.raises(ValueError, match="'norm', and the language model has something of that name"):
        DynamicLlavaForConditionalGeneration(tiny_config(method=f"{__name__}:Clashing"))
