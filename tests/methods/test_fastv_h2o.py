"""FastV with H2O: image tokens as FastV alone decides, output tokens by a rule written once more, from which nothing is
ever removed.
"""

import math
from fractions import Fraction

import pytest
import torch

from dynamic_llava.methods import FastV, FastVH2O
from tests.builders import LAYERS, assert_same_logits, build_model, fixed_rows, prompts
from tests.never_remove import NeverRemove

CALL = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


def rule_of(method):
    """Heads keep all of the prompt, the newest output tokens, and of the older ones the heaviest."""
    heavy_rate, recent_rate = Fraction(str(method.heavy_rate)), Fraction(str(method.recent_rate))

    def rule(head, told):
        said = [token for token in head.alive if told.is_output[token]]
        recent = math.floor(recent_rate * told.outputs)
        heavy = math.floor((heavy_rate + recent_rate) * told.outputs) - recent
        newest = said[-max(recent, 1) :]
        older = sorted(said[: -max(recent, 1)], key=lambda token: (-head.mass[token], token))
        return [*(token for token in head.alive if not told.is_output[token]), *newest, *older[:heavy]]

    return rule


@pytest.mark.parametrize(
    "method",
    [FastVH2O(), FastVH2O(image_layer=1, image_keep_rate=0.5, heavy_rate=0.1, recent_rate=0.4)],
    ids=["the paper's", "another"],
)
@torch.no_grad()
def test_generation_is_fastvs_image_and_h2os_answer(method):
    """Logits of every step, and what each head of each layer holds at the end; ragged rows of 0 to 3 images."""
    model, batch, steps = build_model(kv_heads=2), fixed_rows(seed=41, output=0), 12
    out = model.generate(**prompts(batch), **CALL, max_new_tokens=steps, method=method)
    fastv = FastV(layer=method.image_layer, image_keep_rate=method.image_keep_rate)
    for index, row in enumerate(batch):
        kept = model(**prompts([row]), method=fastv).sparsity.keep_mask[0].bool()

        def keeps(ids, output, kept=kept):
            return torch.cat([kept, torch.ones(len(ids), dtype=torch.bool)])[: len(ids)]

        never = NeverRemove(model, row, rule_of(method), cut=method.image_layer, keeps=keeps)
        logits = [never.say(len(row.ids))[-1]]
        logits += [never.say(1, token[None])[-1] for token in out.sequences[index, -steps:-1]]
        assert_same_logits(torch.stack(out.logits, 1)[index], torch.stack(logits), what=f"row {index}")
        assert torch.equal(out.sparsity.head_lengths[index], never.lengths())
        prompt = len(row.ids)
        assert out.sparsity.head_lengths[index, 0].tolist() == [prompt + (steps - 1) // 2] * 2
        assert int(out.sparsity.head_lengths[index, LAYERS - 1, 0]) == int(kept.sum()) + (steps - 1) // 2


def test_impossible_settings_are_refused():
    for settings in ({"image_keep_rate": 0}, {"heavy_rate": 1.5}, {"recent_rate": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            FastVH2O(**settings)
