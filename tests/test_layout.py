"""The layout's bookkeeping against its definition, token by token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava import TokenLayout


@given(st.data())
def test_answers_are_runs_of_output_tokens(data):
    rows, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    flags = st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)
    output, valid = torch.tensor(data.draw(flags)), torch.tensor(data.draw(flags))
    layout = TokenLayout.build(torch.zeros(rows, tokens, dtype=torch.bool), valid, output, 1)
    places, sizes = [], []
    for row in layout.output.tolist():
        for column, is_output in enumerate(row):
            if is_output and (column == 0 or not row[column - 1]):
                sizes.append(0)
            if is_output:
                places.append((len(sizes) - 1, sizes[-1]))
                sizes[-1] += 1
    answer_T, place_T = layout.answer_places()
    assert list(zip(answer_T.tolist(), place_T.tolist(), strict=True)) == places
    assert layout.answer_lengths()[layout.output].tolist() == [sizes[answer] for answer, _ in places]
    assert layout.answer_lengths()[~layout.output].eq(0).all()
