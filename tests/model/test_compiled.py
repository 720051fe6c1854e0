"""The compiled decoding step: one graph without breaks, the same answers, in place, whatever the rows admit."""

import shutil

import pytest
import torch
from accelerate import cpu_offload
from torch._dynamo.utils import counters
from torch.nn.functional import pad
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import ProfilerActivity, profile

from dynamic_llava import get_method
from dynamic_llava.engine.step import _mark, as_one_graph, decode_step
from tests.builders import assert_same_logits, build_model, fixed_rows, prompts

HALF = get_method("random", image_keep_rate=0.25, output_keep_rate=0.5)
SWITCHES = [{"method": HALF, "sample_key": torch.arange(4)}, {}]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generated(model, inputs, tokens=40, **switches):
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **switches,
    )


@needs_compiler
@pytest.mark.slow
def test_compiled_steps_answer_as_eager_ones():
    """Ragged rows, several images, mixed decisions, five growths: equal tokens, decisions and lengths; one graph."""
    model, inputs = build_model(kv_heads=2, layers=4, cache_block=8), prompts(fixed_rows(seed=40, output=0))
    for count, switches in enumerate(SWITCHES, 1):
        eager, compiled = (generated(model, inputs, compile=flag, **switches) for flag in (False, True))
        assert torch.equal(compiled.sequences, eager.sequences)
        assert torch.equal(compiled.sparsity.keep_mask, eager.sparsity.keep_mask)
        assert torch.equal(compiled.sparsity.cache_lengths, eager.sparsity.cache_lengths)
        torch.testing.assert_close(torch.stack(compiled.logits), torch.stack(eager.logits), rtol=0, atol=1e-4)
        rates = compiled.sparsity.output_keep_rate
        assert not switches or 0.2 < rates < 0.8
        assert counters["stats"]["unique_graphs"] == count and not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
def test_graphs_are_not_counted_by_the_limit_of_other_functions():
    """A process may compile for many models and batch sizes; torch's own limit, here 1, would be an error."""
    model = build_model(layers=3, cache_block=8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for rows in (1, 2, 3):
            inputs = prompts(fixed_rows(seed=40, output=0)[:rows])
            answers = [generated(model, inputs, 3, method=HALF, compile=flag).sequences for flag in (False, True)]
            assert torch.equal(*answers)
    assert counters["stats"]["unique_graphs"] == 3


class OpenCache:
    """A cache opened by a prompt, and what a step on it needs besides its token."""

    def __init__(self, model, **switches):
        self.model, self.switches = (
            model,
            {"use_cache": True, "method": HALF, "sample_key": torch.arange(4), **switches},
        )
        inputs = prompts(fixed_rows(seed=41, output=0))
        out = model(**inputs, logits_to_keep=1, **self.switches)
        self.cache, self.mask, self.token = out.cache, inputs["attention_mask"], out.logits[:, -1:].argmax(-1)

    def step(self, **more):
        mask = pad(self.mask, (0, 1), value=1)
        out = self.model(input_ids=self.token, attention_mask=mask, cache=self.cache, **{**self.switches, **more})
        self.mask = mask  # a refused step is none
        return out


@pytest.mark.parametrize("window", [0, 3])
@torch.no_grad()
def test_the_step_is_one_graph_that_growth_does_not_change(monkeypatch, window):
    """Traced with fullgraph, which refuses breaks and host reads; twenty steps through several blocks, one graph."""
    traced = torch.compile(decode_step, fullgraph=True, dynamic=False, backend="eager")

    def run(*inputs, **kwargs):
        _mark(inputs[-1])
        return traced(*inputs, **kwargs)

    monkeypatch.setattr("dynamic_llava.engine.decoder.decode_step", run)
    opened = OpenCache(build_model(cache_block=4, output_window=window))
    capacities = set()
    for _ in range(20):
        opened.step()
        capacities.add((opened.cache.dense.capacity, opened.cache.sparse.capacity))
    assert len(capacities) > 3
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
@torch.no_grad()
def test_a_compiled_step_works_in_place(window):
    """No storage is copied: a step allocates less than one of them holds, and leaves all where they are."""
    torch.use_deterministic_algorithms(False)  # in that mode the compiler copies what it writes to
    opened = OpenCache(build_model(layers=3, cache_block=4096, output_window=window), compile=True)
    opened.step()
    storages = [storage for layer in opened.cache.layers for storage in layer.storages()]
    places = [storage.data.data_ptr() for storage in storages]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        opened.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in trace.events())
    one = storages[0].data.numel() * storages[0].data.element_size()
    assert allocated < one, f"{allocated} bytes were allocated in a step, one storage has {one}"
    assert [storage.data.data_ptr() for storage in storages] == places


@pytest.fixture
def traced(monkeypatch):
    """A compiled step is one graph without breaks as ever, but its operations are PyTorch's own: no wait for code."""
    graph = as_one_graph(backend="eager")
    monkeypatch.setattr("dynamic_llava.engine.step._compiled", lambda replayed: graph)


def compiled_as_eager(model, inputs):
    """Return the logits of compiled steps, after they were held against those of eager ones."""
    eager, compiled = (
        torch.stack(generated(model, inputs, 4, compile=flag, **SWITCHES[0]).logits) for flag in (False, True)
    )
    assert_same_logits(compiled, eager)
    return compiled


@torch.no_grad()
def test_captures_and_compiled_steps_leave_each_other_alone(traced):
    """A model once asked for hidden states and attentions keeps transformers' hooks; in any order a call is itself."""
    untouched, model = (build_model(attention="eager", layers=3) for _ in range(2))
    inputs = prompts(fixed_rows(seed=40, output=0))
    asked = {"output_hidden_states": True, "output_attentions": True, **SWITCHES[0]}
    expected = untouched(**inputs, **asked)
    assert len(expected.hidden_states) == 4 and len(expected.attentions) == 3
    for _ in range(2):
        compiled_as_eager(model, inputs)
        captured = model(**inputs, **asked)
        for name in ("hidden_states", "attentions"):
            assert len(captured[name]) == len(expected[name]) and all(map(torch.equal, captured[name], expected[name]))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@torch.no_grad()
def test_a_hook_that_comes_or_goes_is_followed(traced):
    """A hook of one's own that changes what an MLP says, registered behind the first compiled steps, then removed."""
    model, inputs = build_model(layers=3), prompts(fixed_rows(seed=40, output=0))
    before = compiled_as_eager(model, inputs)
    hook = model.model.language_model.layers[1].mlp.register_forward_hook(lambda module, given, out: 2 * out)
    assert not torch.allclose(compiled_as_eager(model, inputs), before)
    hook.remove()
    assert torch.equal(compiled_as_eager(model, inputs), before)


@pytest.mark.slow
@torch.no_grad()
def test_a_decoder_that_is_compiled_as_a_whole_takes_compiled_steps(traced):
    model = build_model(layers=3, cache_block=8)
    opened, compiled = OpenCache(model), OpenCache(model, compile=True)
    model.model.language_model.compile(backend="eager")
    said = compiled.step()
    model.model.language_model._compiled_call_impl = None
    assert_same_logits(said.logits, opened.step().logits)


def test_calls_without_compilable_steps_are_refused():
    model, inputs = build_model(), prompts(fixed_rows(seed=40, output=0))
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        generated(model, inputs, compile=True, sparsity="none")
    with pytest.raises(ValueError, match="cached decoding steps"):
        generated(model, inputs, compile=True, use_cache=False)
    opened = OpenCache(model, compile=True)
    with pytest.raises(ValueError, match="gradients are being recorded"):
        opened.step()
    opened = OpenCache(model, compile=True)
    with torch.no_grad(), pytest.raises(ValueError, match="output_hidden_states"):
        opened.step(output_hidden_states=True)


@torch.no_grad()
def test_models_whose_modules_a_graph_cannot_follow_are_refused(monkeypatch):
    """Settings that capture, weights that accelerate moves, and a hook for all modules: before a graph is made."""
    model, offloaded = build_model(layers=3), cpu_offload(build_model(layers=3), torch.device("cpu"))
    opened, moved = OpenCache(model, compile=True), OpenCache(offloaded, compile=True)
    with pytest.raises(ValueError, match="stays on one device"):
        moved.step()
    monkeypatch.setattr(model.config.text_config, "output_hidden_states", True)
    with pytest.raises(ValueError, match=r"output_hidden_states.*configuration"):
        opened.step()
    monkeypatch.undo()
    hook = register_module_forward_hook(lambda module, given, out: None)
    try:
        with pytest.raises(ValueError, match="hook for all modules"):
            opened.step()
    finally:
        hook.remove()
