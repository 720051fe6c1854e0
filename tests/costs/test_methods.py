"""What any method costs, from the tokens that its record says each layer sees, against counts on real modules."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynamic_llava import METHODS
from dynamic_llava.costs import decoder_shape, flops_exact, flops_paper, kv_bytes
from dynamic_llava.eval.efficiency import computed_tokens
from tests.builders import LAYERS, make_row, method_of, model_of, prompts, shared_model


@pytest.mark.parametrize("name", sorted(METHODS))
@torch.no_grad()
def test_flops_and_bytes_of_a_prefill(name):
    model, method = model_of(name, 2, "eager"), method_of(name)
    shape = decoder_shape(model.config)
    inputs = prompts([make_row([("text", 3), ("image", 0), ("text", 2), ("image", 0), ("text", 2)], seed=8)])
    with FlopCounterMode(display=False) as counter:
        out = model(**inputs, method=method, use_cache=True)
    if method.is_dense:
        assert out.sparsity is None
        return
    stored = out.sparsity.tokens_per_layer()[0].tolist()
    assert len(stored) == LAYERS and stored == sorted(stored, reverse=True)
    tokens = computed_tokens(stored, inputs["input_ids"].shape[1], method)
    where = [name for name in counter.get_flop_counts() if name.rpartition(".")[0].endswith("language_model.layers")]
    counted = sum(sum(counter.get_flop_counts()[name].values()) for name in where)
    evidence = method.evidence_flops(tokens, shape, question=4)
    rows = {"question_row", "question_rows"}
    assert bool(evidence) == (
        bool(method.evict_sees & {"mass", "latest"}) or any(rows & cut.sees for cut in method.cuts(LAYERS))
    )
    assert len(where) == LAYERS and counted == flops_exact(tokens, shape) + evidence
    if method.evicts:
        return  # what heads hold does not follow from what layers see
    assert kv_bytes(shape, stored, bytes_per_value=4) == out.cache.allocated_bytes()


def test_a_count_for_each_layer_says_what_two_groups_say():
    shape = decoder_shape(shared_model(2, "eager").config)
    every = [20, 20, *[7] * (LAYERS - 2)]
    assert flops_exact(every, shape, causal=True) == flops_exact(20, shape, kept=7, sparse_layer=2, causal=True)
    assert kv_bytes(shape, every) == kv_bytes(shape, 20, kept=7, sparse_layer=2)
    assert flops_paper(every, 64, LAYERS) == flops_paper(20, 64, LAYERS, kept=7, sparse_layer=2)
    with pytest.raises(ValueError, match="one count a layer"):
        flops_exact(every[1:], shape)
