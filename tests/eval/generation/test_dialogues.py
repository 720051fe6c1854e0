"""Greedy answers on a live cache: generate()'s, whatever the batch; later rounds see the model's own answers."""

import pytest
import torch

from dynamic_llava.eval.generation.dialogues import LiveDialogues, answer_dialogues
from tests.builders import BOS, IMAGE_SIZE, IMAGE_TOKEN, TOKENS_PER_IMAGE, deciding, shared_model, words

SPARSITIES = ("both", "image", "output", "none")


def questions(*rows, seed=0):
    """Return prompts by row and round of the given lengths, and pixels."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [[words(count, generator).tolist() for count in row] for row in rows]
    for row in prompts:
        row[0] = [BOS, *[IMAGE_TOKEN] * TOKENS_PER_IMAGE, *row[0]]
    return prompts, torch.randn(len(rows), 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def answers(prompts, pixels, sparsity, ends=frozenset(), limit=9):
    live = LiveDialogues(shared_model(), pixels, deciding(sparsity))
    return answer_dialogues(live, prompts, limit, set(ends)), live


def an_end(said):
    """Return a token that ends some answers early and others not at all, but none at its first place."""
    rows = [one for row in said for one in row]
    usable = {token for one in rows for token in one} - {one[0] for one in rows}
    return max(usable, key=lambda token: (sum(token in one for one in rows) % len(rows), token))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_one_round_is_what_generate_says(sparsity):
    prompts, pixels = questions([4], [9], [2])
    end = an_end(answers(prompts, pixels, sparsity)[0])
    said, live = answers(prompts, pixels, sparsity, {end})
    assert len({len(row[0]) for row in said}) > 1
    for row, (prompt, its) in enumerate(zip(prompts, said, strict=True)):
        output = shared_model().generate(
            torch.tensor(prompt), pixel_values=pixels[row : row + 1], sparsity=sparsity, max_new_tokens=9,
            do_sample=False, eos_token_id=end, return_dict_in_generate=True,
        )  # fmt: skip
        assert output.sequences[0, len(prompt[0]) :].tolist() == its[0]
        fed = len(its[0]) - 1
        kept = fed if output.sparsity is None else int(output.sparsity.output_decisions[0].sum())
        assert live.output_seen[row, -1] == kept <= fed
        assert live.image_seen[row, -1] == (4 if sparsity in ("both", "image") else TOKENS_PER_IMAGE)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_rounds_of_ragged_rows_are_those_of_each_row_alone(sparsity):
    prompts, pixels = questions([4, 3, 6], [9], [2, 5])
    end = an_end(answers(prompts, pixels, sparsity)[0])
    together, live = answers(prompts, pixels, sparsity, {end})
    assert [len(row) for row in together] == [3, 1, 2]
    for row, its in enumerate(together):
        alone, one = answers([prompts[row]], pixels[row : row + 1], sparsity, {end})
        assert alone == [its]
        assert torch.equal(one.image_seen[0], live.image_seen[row])
        assert torch.equal(one.output_seen[0], live.output_seen[row])


def test_a_later_round_sees_the_models_own_answer_and_not_its_last_token():
    """A dense dialogue is one sequence: the second answer continues prompt, answer less its last token, question."""
    prompts, pixels = questions([4, 3])
    (first, second), _ = answers(prompts, pixels, "none")[0][0], None
    ids = torch.tensor([prompts[0][0] + first[:-1] + prompts[0][1]])
    output = shared_model().generate(ids, pixel_values=pixels, sparsity="none", max_new_tokens=9, do_sample=False)
    assert output[0, ids.shape[1] :].tolist() == second


def test_a_limit_of_one_token_feeds_none():
    prompts, pixels = questions([4, 3])
    said, live = answers(prompts, pixels, "both", limit=1)
    assert [len(one) for one in said[0]] == [1, 1] and not live.output_seen.any()
