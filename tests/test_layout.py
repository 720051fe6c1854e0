"""The layout's bookkeeping against its definition, token by token."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava import TokenLayout
from dynamic_llava.layout import Packing
from dynamic_llava.sparsity.cache import DecisionLog


@given(st.data())
def test_answers_are_runs_of_output_tokens(data):
    rows, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    flags = st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=rows, max_size=rows)
    output, valid = torch.tensor(data.draw(flags)), torch.tensor(data.draw(flags))
    layout = TokenLayout.build(torch.zeros(rows, tokens, dtype=torch.bool), valid, output)
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


def ragged(data):
    """Draw rows of text, images and padding: the masks (B, N), and each image's tokens as (row, columns)."""
    pieces = st.tuples(st.sampled_from(["text", "image", "image", "output", "padding"]), st.integers(1, 4))
    rows = data.draw(st.lists(st.lists(pieces, max_size=5), min_size=1, max_size=4))
    width = max(1, *(sum(length for _, length in row) for row in rows))
    masks, images = {kind: torch.zeros(len(rows), width, dtype=torch.bool) for kind in ("image", "output", "valid")}, []
    for row, its in enumerate(rows):
        start = 0
        for kind, length in its:
            masks["valid"][row, start : start + length] = kind != "padding"
            if kind in masks:
                masks[kind][row, start : start + length] = True
            images += [(row, range(start, start + length))] if kind == "image" else []
            start += length
    return masks, images


@given(st.data())
def test_images_of_any_lengths_are_numbered_gathered_and_put_back(data):
    """Neighbours too; and cutting rows into chunks, joining them and choosing rows number anew."""
    masks, images = ragged(data)
    lengths = [len(columns) for _, columns in images]
    layout = TokenLayout.build(masks["image"], masks["valid"], masks["output"], lengths)
    expected = torch.full(layout.valid.shape, -1)
    for number, (row, columns) in enumerate(images):
        expected[row, list(columns)] = number
    assert torch.equal(layout.image, expected)
    assert torch.equal(layout.prompt, masks["valid"] & ~masks["image"] & ~masks["output"])
    rows = [row for row, _ in images]
    assert layout.image_lengths().tolist() == lengths and layout.image_rows().tolist() == rows
    assert layout.images_before().tolist() == [rows[:number].count(row) for number, row in enumerate(rows)]
    values = torch.rand(*expected.shape, 3)
    gathered = layout.gather_images(values)
    assert gathered.shape == (len(images), max(lengths, default=0), 3)
    for number, (row, columns) in enumerate(images):
        assert torch.equal(gathered[number][layout.image_valid[number]], values[row, list(columns)])
        assert not gathered[number][~layout.image_valid[number]].any()
    put = layout.scatter_images(gathered[..., 0] + 1, torch.zeros(expected.shape))
    assert torch.equal(put, torch.where(masks["image"], values[..., 0] + 1, 0))
    order = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=5))
    chosen = layout.select_rows(lambda mask: mask[order])
    again = [length for row in order for length, its in zip(lengths, rows, strict=True) if its == row]
    assert chosen.image_lengths().tolist() == again
    log = DecisionLog(block=2, layers=9)
    chunks = [layout.select_rows(lambda mask: mask[:, :0]), layout]
    for chunk in chunks:
        log.add(chunk, 9 * chunk.valid)
    noted, until = log.so_far()
    for other in (TokenLayout.joined(chunks), noted):
        for kind in ("valid", "image", "output"):
            assert torch.equal(getattr(other, kind), getattr(layout, kind)), kind
    assert torch.equal(until, 9 * layout.valid)


@given(st.data())
def test_newlines_stand_among_the_tokens_of_images_and_are_none_of_them(data):
    """They are no prompt either, wherever chunks are cut, joined, chosen or noted."""
    masks, images = ragged(data)
    newlines = [place > 0 and data.draw(st.booleans()) for _, columns in images for place in range(len(columns))]
    expected = torch.zeros_like(masks["image"])
    expected[masks["image"]] = torch.tensor(newlines, dtype=torch.bool)
    plain = TokenLayout.build(masks["image"], masks["valid"], masks["output"], [len(its) for _, its in images])
    layout = replace(plain, newline=expected)
    built = TokenLayout.build(
        masks["image"],
        masks["valid"],
        masks["output"],
        [len(its) for _, its in images],
        newlines=torch.tensor(newlines),
    )
    assert torch.equal(layout.is_image, masks["image"] & ~expected) and torch.equal(layout.prompt, plain.prompt)
    assert layout.image_lengths().sum() == len(newlines) - sum(newlines)
    for kind in ("image_starts", "in_image"):
        assert torch.equal(getattr(layout, kind), getattr(plain, kind)), kind
    assert torch.equal(layout.same_image(), plain.same_image())
    values = torch.rand(expected.shape)
    put = layout.scatter_images(layout.gather_images(values) + 1, torch.zeros(expected.shape))
    assert torch.equal(put, torch.where(layout.is_image, values + 1, 0))
    order = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=5))
    chosen = layout.select_rows(lambda mask: mask[order])
    assert torch.equal(chosen.newline, expected[order]) and torch.equal(chosen.is_image, layout.is_image[order])
    log = DecisionLog(block=2, layers=9)
    parts = [plain.select_rows(lambda mask: mask[:, :0]), layout]
    for part in parts:
        log.add(part, 9 * part.valid)
    packing = Packing.of(layout.valid)
    packed = layout.packed(packing)
    assert torch.equal(packed.newline[packing.valid], expected[layout.valid])
    for other in (TokenLayout.joined(parts), log.so_far()[0], *([built] if newlines else [])):
        assert torch.equal(other.newline, expected) and torch.equal(other.image, layout.image)
