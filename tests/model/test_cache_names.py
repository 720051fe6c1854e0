"""The cache goes by its name of transformers 5.24 and by the earlier one, with whichever release is installed."""

import pytest
import torch

from dynamic_llava.model import cache_of
from tests.builders import fixed_rows, prompts, shared_model


@pytest.mark.parametrize("sparsity", ["both", "none"])
@torch.no_grad()
def test_both_names_are_given_and_taken(sparsity):
    model = shared_model()
    inputs = prompts(fixed_rows())
    first = model(**inputs, sparsity=sparsity, use_cache=True)
    assert first.cache is first.past_key_values is cache_of(first)
    token = first.logits[:, -1:].argmax(-1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": token, "attention_mask": mask, "sparsity": sparsity, "use_cache": True}
    by_name = [
        model(**step, **{name: model(**inputs, sparsity=sparsity, use_cache=True).cache}).logits
        for name in ("cache", "past_key_values")
    ]
    assert torch.equal(*by_name)
    assert cache_of(model(**inputs, sparsity=sparsity, use_cache=False)) is None


@torch.no_grad()
def test_generate_takes_both_names():
    model = shared_model()
    call = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = []
    for name in ("cache", "past_key_values"):
        one = model.generate(**prompts(fixed_rows()), **call)
        ids = torch.nn.functional.pad(one.sequences, (0, 2), value=9)
        mask = torch.nn.functional.pad(prompts(fixed_rows())["attention_mask"], (0, 5), value=1)
        found.append(model.generate(ids, attention_mask=mask, **{name: cache_of(one)}, **call).sequences)
    assert torch.equal(*found)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_cache_under_both_names_is_refused(call):
    model = shared_model()
    cache = model(**prompts(fixed_rows()), use_cache=True).cache
    with pytest.raises(ValueError, match="two names of one argument"):
        getattr(model, call)(input_ids=torch.ones(1, 1, dtype=torch.long), cache=cache, past_key_values=cache)
