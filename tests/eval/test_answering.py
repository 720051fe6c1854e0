"""What answer lines record, what follows from it, which questions a process takes, and how a checkpoint is known."""

import os
import re
import shutil
from functools import partial

import pytest
import torch

from dynamic_llava import METHODS
from dynamic_llava.config import SPARSITY_MODES
from dynamic_llava.costs import decoder_shape
from dynamic_llava.eval import identity
from dynamic_llava.eval.answering import Asked, by_length, facts, greedy, prompt_inputs, read_ahead
from dynamic_llava.eval.efficiency import Counted, mean_kv_bytes
from dynamic_llava.eval.predict import QueryBatch, generate_answers
from dynamic_llava.eval.shard import Shard, joined_processes, own_device
from dynamic_llava.eval.tasks import Question
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor
from tests.builders import TOKENS_PER_IMAGE, deciding, model_of
from tests.eval.run_builders import ragged_checkpoint
from tests.sft_builders import picture, tiny_processor


class Picture:
    name = "picture"

    def __init__(self, seed):
        self.seed = seed

    def load(self):
        if self.seed < 0:
            raise ValueError("picture is broken")
        return picture(self.seed)

    def digest(self):
        return str(self.seed)


QUESTIONS = [Question(i, "What is it? " * (i % 3) + "?", None if i == 4 else Picture(i)) for i in range(7)]


@pytest.mark.parametrize(
    "how", [*SPARSITY_MODES, *sorted(METHODS), {"name": "dynamic", "output_window": 3, "output_threshold": 9}], ids=str
)
def test_bytes_by_arithmetic_are_those_in_the_cache(how):
    """The counts on a line give what one row's cache holds when its answer ends."""
    model, processor = model_of(how), tiny_processor()
    for question in QUESTIONS[2:5]:
        (asked, _), *_ = read_ahead([question], [0], 1, processor)
        batch = QueryBatch((0,), prompt_inputs(processor, asked))
        (said,) = generate_answers(model, processor, [batch], max_new_tokens=6, switches={"method": deciding(how)})
        recorded = facts(said)
        shape, method = decoder_shape(model.config), deciding(how)
        counted = Counted.read(recorded, method, shape.layers, TOKENS_PER_IMAGE, "a.jsonl:1")
        calculated = mean_kv_bytes(shape, method, [counted], TOKENS_PER_IMAGE, 4)
        assert calculated == said.cache_bytes
        assert ("heads_hold" in recorded) == method.evicts
        assert recorded.get("window_holds", 0) == method.drop_delay  # it drops all that it may
        if len(method.cuts(shape.layers)) < 2 and not method.evicts:  # as the lines of earlier versions
            recorded.pop("image_seen")
            assert Counted.read(recorded, method, shape.layers, TOKENS_PER_IMAGE, "a.jsonl:1") == counted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_kept": None}, "metadata: 'image_kept' is None; a list of numbers of tokens"),
        ({"image_kept": [10**30]}, "metadata: 'image_kept' is "),
        ({"image_seen": [4, 4, 4]}, "metadata: 'image_seen' has 3 counts and the model 4 layers"),
        ({"prompt_tokens": "7"}, "metadata: 'prompt_tokens' is '7'; a number of tokens is due there"),
    ],
)
def test_facts_that_cannot_be_so_name_the_line(change, words):
    recorded = {"prompt_tokens": 9, "image_kept": [4], "image_seen": [4] * 4, "output_tokens": 2, "output_kept": 1}
    read = partial(Counted.read, method=METHODS["dense"](), layers=4, tokens_per_image=4, place="a.jsonl:7")
    assert read(recorded).prompt_tokens == 9
    with pytest.raises(ValueError, match=re.escape(f"a.jsonl:7: {words}")):
        read({**recorded, **change})
    with pytest.raises(ValueError, match=r"a\.jsonl:7: metadata has no 'output_kept'"):
        read({name: value for name, value in recorded.items() if name != "output_kept"})


def test_what_heads_hold_is_recorded_when_an_answer_ends_and_does_not_depend_on_its_batch(tmp_path):
    """Answers end at different tokens, while the others of the batch go on."""
    folder = ragged_checkpoint(tmp_path)
    model = DynamicLlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = DynamicLlavaProcessor.from_pretrained(folder)
    model.generation_config = greedy(model, processor)
    method = METHODS["h2o"](shares_of="tokens", heavy_rate=0.25, recent_rate=0.25)
    call = {"max_new_tokens": 8, "switches": {"method": method}}
    (asked, _), *_ = read_ahead(QUESTIONS, range(7), 7, processor)
    together = QueryBatch(tuple(range(7)), prompt_inputs(processor, asked))
    found = generate_answers(model, processor, [together], **call)
    alone = [QueryBatch((place,), prompt_inputs(processor, [one])) for place, one in enumerate(asked)]
    assert [facts(one) for one in found] == [facts(one) for one in generate_answers(model, processor, alone, **call)]
    assert len({len(one.tokens) for one in found}) > 1 and all(one.heads_hold for one in found)


def test_questions_are_read_in_order_with_what_is_wrong_beside_them():
    questions = [*QUESTIONS, Question("x", "Bad?", Picture(-1))]
    found = list(read_ahead(questions, [7, 3, 4, 0, 1], 2, tiny_processor()))
    assert [[one.place for one in asked] for asked, _ in found] == [[3], [4, 0], [1]]
    assert [problems for _, problems in found] == [{7: "question 'x': picture is broken"}, {}, {}]
    pixels = [one.pixels for asked, _ in found for one in asked]
    assert pixels[1] is None
    assert torch.equal(pixels[2], tiny_processor().preprocess_images([picture(0)]))


def test_longest_first_and_texts_alone_last():
    order = by_length(QUESTIONS)
    assert sorted(order) == list(range(7)) and order == [2, 5, 1, 0, 3, 6, 4]


def test_mixed_batches_hold_an_image_for_each_row_that_has_one():
    processor = tiny_processor()
    (asked, _), *_ = read_ahead(QUESTIONS, [3, 4, 5], 3, processor)
    inputs = prompt_inputs(processor, asked)
    assert inputs["pixel_values"].shape[0] == 2
    images = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert images == [TOKENS_PER_IMAGE, 0, TOKENS_PER_IMAGE]
    assert "pixel_values" not in prompt_inputs(processor, [Asked(4, QUESTIONS[4], None)])


def test_shares_hold_every_question_once():
    for world in (1, 2, 3, 8):
        shares = [Shard(rank, world).take(range(7)) for rank in range(world)]
        assert sorted(place for share in shares for place in share) == list(range(7))
    with joined_processes({}) as alone:
        assert alone.first and alone.gather(3) == [3]
    with joined_processes({"WORLD_SIZE": "1", "RANK": "0"}) as alone:
        assert alone == Shard()


def test_a_process_without_an_accelerator_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert own_device({"LOCAL_RANK": "1"}) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert own_device({"LOCAL_RANK": "1"}) == torch.device("xpu", 1)
    with pytest.raises(ValueError, match="process 2 of this machine has no accelerator of its own: 2 are visible"):
        own_device({"LOCAL_RANK": "2"})


def test_weights_are_told_apart_by_their_bytes_alone(tmp_path):
    """Neither a date nor a name makes another checkpoint, and one changed value does, however large the file."""
    folder = ragged_checkpoint(tmp_path / "one")
    processor = DynamicLlavaProcessor.from_pretrained(folder)

    def weights(path):
        model = DynamicLlavaForConditionalGeneration.from_pretrained(str(path))
        return identity.model_settings(model, processor, str(path))["weights"]

    before = weights(folder)
    moved = shutil.copytree(folder, tmp_path / "two")
    file = moved / "model.safetensors"
    os.utime(file, ns=(1, 1))
    assert weights(moved) == before
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    assert weights(moved) != before
