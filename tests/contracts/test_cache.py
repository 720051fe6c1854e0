"""The admission cache: how many bytes it takes, and what a decoding step does and does not do."""

import copy
import gc
import shutil
import time
from statistics import median
from types import FunctionType, ModuleType

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import CLIPVisionConfig, LlamaConfig

from dynamic_llava import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration, get_method
from dynamic_llava.model import AdmissionCache
from tests.builders import LAYERS, PAD, build_model, fixed_rows, predictors, prompts

HALF = get_method("random", image_keep_rate=0.25, output_keep_rate=0.5)


def storage_bytes(cache, layers):
    return sum(s.data.numel() * s.data.element_size() for layer in layers for s in layer.storages())


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_bytes_follow_the_longest_row(block, kv_heads):
    """256 steps at batch 4: within 2 % of batch x (longest row, rounded up to a block), in both groups of layers."""
    model = build_model(kv_heads, cache_block=block)
    inputs = prompts(fixed_rows(seed=40, output=0))
    keys = torch.arange(4)
    out = model.generate(
        **inputs, max_new_tokens=257, do_sample=False, method=HALF, sample_key=keys, return_dict_in_generate=True
    )
    text, cache = model.config.text_config, out.past_key_values
    # Keys and values, batch 4, float32.
    per_slot = 2 * 4 * kv_heads * (text.hidden_size // text.num_attention_heads) * 4
    groups = {
        "sparse": (cache.layers[2:], out.sparsity.cache_lengths),
        "dense": (cache.layers[:2], out.sparsity.dense_cache_lengths),
    }
    for name, (layers, lengths) in groups.items():
        longest = -(-int(lengths.max()) // block) * block
        allowed = len(layers) * per_slot * longest
        assert storage_bytes(cache, layers) <= 1.02 * allowed, name
    assert len(set(out.sparsity.cache_lengths.tolist())) > 1
    assert out.sparsity.cache_lengths.max() < 0.7 * out.sparsity.dense_cache_lengths.max()
    assert cache.allocated_bytes() == storage_bytes(cache, cache.layers)


class Between:
    """A stopping criterion that ends nothing: looks at something between the steps that are named."""

    def __init__(self, steps, look):
        self.steps, self.look, self.calls, self.seen = steps, look, 0, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        if self.calls in self.steps:
            self.seen.append(self.look())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def live_tensors():
    """Return how many tensors are alive."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def bytes_held(cache):
    """Return the bytes of all tensors that a cache holds, in whatever way, keys and values left out."""
    found, waiting = {}, [cache]
    while waiting:
        one = waiting.pop()
        if id(one) not in found and not isinstance(one, (type, ModuleType, FunctionType)):
            found[id(one)] = one
            waiting += gc.get_referents(one)
    tensors = [one.untyped_storage() for one in found.values() if issubclass(type(one), torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes() for one in tensors}.values()) - cache.allocated_bytes()


COUNTED = [
    pytest.param({}, 50, 400, id="eager"),
    pytest.param({"num_beams": 2}, 10, 40, id="beams"),
    pytest.param({"num_return_sequences": 2, "do_sample": True}, 10, 40, id="several"),
    pytest.param({"compile": True}, 50, 400, id="compiled", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("switches", "few", "many"), COUNTED)
@torch.no_grad()
def test_memory_grows_with_decisions_alone(switches, few, many):
    """As many tensors after many steps as after few, and beside keys and values four bytes for a row's token."""
    if "compile" in switches and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    model, inputs = build_model(layers=3, cache_block=8), prompts(fixed_rows(seed=43, output=0))
    cache = AdmissionCache(3, 2, 8)
    census = Between((few, many), lambda: (live_tensors(), bytes_held(cache)))
    call = {"do_sample": False, **switches, "max_new_tokens": many + 1, "stopping_criteria": [census]}
    model.generate(**inputs, **call, cache=cache)
    (fewer, little), (more, much) = census.seen
    assert more <= fewer, f"{fewer} tensors were alive after {few} tokens, {more} after {many}"
    assert 0 < much - little <= 4 * cache.batch_size * (many - few + 8), f"{little} bytes, then {much}"


@pytest.mark.parametrize("switches", [{}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@torch.no_grad()
def test_the_record_is_whole_between_any_two_steps(switches):
    """And stays what it was when it was asked for, whatever the cache goes through later."""
    model, inputs = build_model(), prompts(fixed_rows(seed=46, output=0))
    cache = AdmissionCache(LAYERS, 2, 8)
    between = Between(range(1, 20), lambda: cache.record)
    call = {"do_sample": False, **switches, "max_new_tokens": 20, "stopping_criteria": [between]}
    last = model.generate(**inputs, **call, cache=cache, return_dict_in_generate=True).sparsity
    cache.batch_select_indices(torch.tensor([1]))
    width = inputs["input_ids"].shape[1]
    for step, record in enumerate(between.seen):
        assert torch.equal(record.keep_mask, last.keep_mask[:, : width + step])
        assert torch.equal(record.layout.output, last.layout.output[:, : width + step])
        assert torch.equal(record.cache_lengths, record.keep_mask.sum(1))
        assert torch.equal(record.dense_cache_lengths, record.layout.valid.sum(1))
    assert torch.equal(cache.record.keep_mask, last.keep_mask[1:2])


class Steps:
    """A model in the middle of a generation; `run` feeds one more token to every row."""

    def __init__(self, model, inputs, **switches):
        self.model, self.switches = model, switches
        out = model(**inputs, **switches, use_cache=True, logits_to_keep=1)
        self.cache, self.mask = out.past_key_values, inputs["attention_mask"]
        self.token = out.logits[:, -1:].argmax(-1)

    def run(self):
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        with record_function("model step"):
            out = self.model(
                input_ids=self.token,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                **self.switches,
            )
        self.token = out.logits[:, -1:].argmax(-1)


HOST_READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
"""Operations whose result the host must wait for (`nonzero` and `masked_select` for the size of theirs)."""


@torch.no_grad()
def test_a_step_neither_concatenates_nor_reads_on_the_host():
    """Profiler trace of single model steps; only a step whose block is used up may read the longest row."""
    model = build_model(cache_block=12)
    steps = Steps(model, prompts(fixed_rows(seed=41, output=0)))
    exhausted, traces = [], []
    for _ in range(25):
        # The host-side bound of each group of layers decides; it is known before the step.
        groups = (steps.cache.dense, steps.cache.sparse)
        exhausted.append(sum(slots._bound + 1 > slots.capacity for slots in groups))
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
            steps.run()
        events = trace.events()
        span = next(event for event in events if event.name == "model step").time_range
        traces.append([e for e in events if span.start <= e.time_range.start and e.time_range.end <= span.end])
    assert sum(len(events) for events in traces) > 1000
    for number, (events, blocks) in enumerate(zip(traces, exhausted, strict=True)):
        reads = [event.name for event in events if event.name in HOST_READS]
        if not blocks:
            assert not reads, f"step {number} reads {reads}"
        assert reads.count("aten::_local_scalar_dense") <= blocks, f"step {number}: {reads} for {blocks} blocks"
        for event in events:
            if event.name == "aten::cat":
                assert all(one_token(shape) for shape in event.input_shapes), f"step {number}: {event.input_shapes}"
    assert 0 < sum(map(bool, exhausted)) < 13


def one_token(shape):
    """Rotary embedding joins the two halves of the new token's own vectors, (..., 1, width): never the past."""
    return not shape or shape[-2] == 1


@torch.no_grad()
def test_growth_happens_in_blocks_and_only_when_needed():
    model = build_model(cache_block=16)
    steps = Steps(model, prompts(fixed_rows(seed=42, output=0)))
    slots, capacities = steps.cache.sparse, []
    for _ in range(60):
        steps.run()
        capacities.append(slots.capacity)
        longest = int(slots.lengths.max())
        assert longest <= slots.capacity
        assert slots.capacity <= -(-(longest + 1) // 16) * 16 or slots.capacity == capacities[0]
    assert len(set(capacities)) > 2


@torch.no_grad()
def test_a_copied_cache_goes_its_own_way():
    """A prompt's cache is copied to be continued twice: what one stores, decides and records, the other never sees."""
    model, inputs = build_model(), prompts(fixed_rows(seed=44, output=0))
    steps = Steps(model, inputs)
    steps.run()
    other, before = copy.deepcopy(steps), steps.cache.record
    for _ in range(12):
        steps.run()
    assert torch.equal(other.cache.record.keep_mask, before.keep_mask)
    for _ in range(12):
        other.run()
    assert torch.equal(other.token, steps.token)
    assert torch.equal(other.cache.record.keep_mask, steps.cache.record.keep_mask)


@torch.no_grad()
def test_layers_show_their_keys_and_values_at_any_time():
    model, inputs = build_model(), prompts(fixed_rows(seed=45, output=0))
    steps = Steps(model, inputs)

    def check(rows):
        for layer in steps.cache.layers:
            assert [layer.keys, layer.values] == [storage.data for storage in layer.storages()]
            assert layer.keys.shape[0] == rows and layer.keys.shape[2] >= int(layer.slots.lengths.max())

    check(4)
    steps.run()
    check(4)
    steps.cache.batch_repeat_interleave(2)
    check(8)
    steps.cache.batch_select_indices(torch.tensor([5, 0]))
    check(2)


def speed_model():
    """Hidden 256, 8 layers, 576 image tokens: large enough that the cache matters, small enough for a CPU."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=1024,
        max_position_embeddings=2048,
    )
    config = DynamicLlavaConfig(vision_config=vision, text_config=text, image_token_id=3, image_seq_length=576)
    model = DynamicLlavaForConditionalGeneration(config).eval()
    output = predictors(model)[1]
    output.head[-1].weight.data.mul_(20)  # margins on both sides of zero, so that about half is admitted
    model.generation_config.pad_token_id = PAD
    return model


@pytest.mark.slow
@torch.no_grad()
def test_a_sparse_step_is_no_slower_than_a_dense_one():
    """Batch 4, 576 image tokens, 256 steps, dense and sparse alternating in one run so that both see the same load."""
    model = speed_model()
    ids = torch.randint(4, 1000, (4, 640))
    ids[:, 20:596] = 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(4, 3, 336, 336)}
    runs = {"dense": Steps(model, inputs, sparsity="none"), "sparse": Steps(model, inputs)}
    seconds = {name: [] for name in runs}
    for _ in range(256):
        for name, steps in runs.items():
            start = time.perf_counter()
            steps.run()
            seconds[name].append(time.perf_counter() - start)
    dense, sparse = (median(times) * 1000 for times in seconds.values())
    print(f"median step: dense DynamicCache {dense:.2f} ms, image and output sparse {sparse:.2f} ms")
    assert sparse <= dense
