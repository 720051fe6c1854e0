"""The law of pictures, on pixels: what is drawn as kept is exactly what was kept, whatever grid and proportions."""

from itertools import product

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dynamic_llava.processing.images import expand_to_square, preprocess
from dynamic_llava.viz import style
from dynamic_llava.viz.kept_patches import PatchChoice, draw_kept_patches
from dynamic_llava.viz.patches import PatchView, drawn, drawn_size, fade_dropped, heat_map

GRIDS = [(side, side) for side in range(4, 25)]
OBLONG = [(4, 6), (9, 5), (24, 12)]
FEW = ((4, 4), (13, 13), (24, 24), (4, 6), (9, 5))


def slow_but(few, every):
    """Parameters, those that are not among a few of them for the longer runs."""
    return [pytest.param(*one, marks=() if one in few else pytest.mark.slow, id=str(one)) for one in every]


SIZES = [(64, 64), (97, 131), (640, 427), (50, 333), (333, 51), (1201, 800), (333, 333), (61, 60)]
"""Square, portrait, landscape, slim; even and odd paddings."""
RED, SEEN = (200, 30, 30), 100


def noise(size, seed=0):
    """Colours that no faded pixel has."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 140, (height, width, 3), dtype=np.uint8))


def chosen(count, seed):
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(count, size=int(rng.integers(1, count)), replace=False).tolist())


def padded_numbers(size, grid):
    """An independent derivation for square grids: pad an image of row and column numbers as the processor does.

    (H, W): the patch that each pixel of the original lies in, by its centre in the padded square.
    """
    side = max(size)
    ids = np.arange(side)
    along = ((ids + 0.5) * grid[0] / side).astype(int)  # no centre lies on an edge but at a tie, which is either's
    square = along[:, None] * grid[1] + along
    mark = expand_to_square(Image.new("RGB", size, (255, 255, 255)), (0, 0, 0))
    inside = np.asarray(mark)[..., 0] == 255
    return square[inside].reshape(size[1], size[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_patches_lie_where_the_padded_square_has_them(grid, size):
    assert np.array_equal(PatchView(size, grid).numbers(*size), padded_numbers(size, grid))


@pytest.mark.parametrize("size", [(96, 96), (96, 60), (52, 96), (95, 38), (96, 33)])
def test_the_model_sees_a_patch_where_it_is_drawn(size):
    """A patch painted on the original comes out of the processor's own preparation as that patch of the input."""
    grid, scale = (8, 8), 6
    view = PatchView(size, grid)
    numbers = view.numbers(*size)
    for patch in np.unique(numbers):
        pixels = np.zeros((*numbers.shape, 3), np.uint8)
        pixels[numbers == patch] = 255
        values = preprocess([Image.fromarray(pixels)], grid[0] * scale, (0, 0, 0), (1, 1, 1))[0, 0].numpy()
        light = values.reshape(grid[0], scale, grid[1], scale).mean((1, 3))
        assert light.argmax() == patch and light.flat[patch] > 0.9 * light.sum()
    assert view.hidden(*size) == set(range(64)) - set(np.unique(numbers).tolist())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", slow_but([(one,) for one in FEW], [(one,) for one in GRIDS + OBLONG]))
def test_drawn_as_kept_is_kept_pixel_by_pixel(grid, size):
    """At the size that pictures have; and all kept patches are seen but those that are said to be hidden."""
    image, kept = noise(size), chosen(grid[0] * grid[1], seed=sum(size))
    pixels, view = drawn(image), PatchView(size, grid)
    numbers = view.numbers(*pixels.shape[1::-1])
    full = (fade_dropped(pixels, kept, grid, size) == pixels).all(2)
    assert np.array_equal(full, np.isin(numbers, kept))
    assert set(np.unique(numbers[full]).tolist()) == set(kept) - view.hidden(*pixels.shape[1::-1])
    # The edges that a vector drawing has are those of the pixels.
    rows_of, columns_of = numbers[:, 0] // grid[1], numbers[0] % grid[1]
    boxes = view.boxes(*pixels.shape[1::-1])
    assert boxes.keys() >= {*np.unique(numbers)}
    half = 0.5 + 1e-9  # an edge may lie on a pixel's centre; boxes are floats
    for patch in np.unique(numbers).tolist():
        left, top, right, bottom = boxes[patch]
        rows, columns = np.flatnonzero(rows_of == patch // grid[1]), np.flatnonzero(columns_of == patch % grid[1])
        assert abs(columns[0] - left) <= half and abs(columns[-1] + 1 - right) <= half
        assert abs(rows[0] - top) <= half and abs(rows[-1] + 1 - bottom) <= half


@pytest.mark.parametrize("size", SIZES)
def test_proportions_stay_and_every_pixel_is_painted(size):
    width, height = drawn_size(size)
    assert abs(width / height - size[0] / size[1]) < 0.01 * size[0] / size[1] + 1 / height
    assert max(width, height) <= 720 and (max(width, height) == 720 or width % size[0] == 0)
    heat = heat_map(drawn(noise(size)), np.linspace(0, 1, 64), (8, 8), size)
    numbers = PatchView(size, (8, 8)).numbers(width, height)
    means = [heat[numbers == patch].astype(float).mean(0) for patch in np.unique(numbers)]
    assert len(np.unique(np.round(means, 1), axis=0)) == len(means)


SHAPES = {"square": (64, 64), "portrait": (60, 90), "landscape": (400, 150)}


QUICK = [((4, 4), 3, True), ((4, 6), 1, True), ((24, 24), 2, False)]


@pytest.mark.parametrize(
    ("grid", "count", "beside"), slow_but(QUICK, product([(4, 4), (7, 7), (24, 24), (4, 6)], (1, 2, 3), (True, False)))
)
def test_the_figure_shows_each_patch_as_it_was_kept(tmp_path, monkeypatch, grid, count, beside):
    """In the pixels of the whole figure, at the middle of each patch, for one to three images of mixed proportions."""
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path, **_: figures.append(figure) or path)
    sizes = list(SHAPES.values())[:count]
    images = [Image.new("RGB", size, RED) for size in sizes]
    patches = grid[0] * grid[1]
    choices = [PatchChoice(name, [chosen(patches, 7 * i + k) for i in range(count)]) for k, name in enumerate("ab")]
    draw_kept_patches(tmp_path / "x.png", images, choices, grid, beside=beside)
    canvas = figures[0].canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    shown = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    panels = np.array(figures[0].axes).reshape(count, 3)
    for (place, size), (number, choice) in product(enumerate(sizes), enumerate(choices)):
        axes, view = panels[place, number + 1], PatchView(size, grid)
        width, height = drawn_size(size)
        kept = set()
        for patch, (left, top, right, bottom) in view.boxes(width, height).items():
            x, y = axes.transData.transform(((left + right - 1) / 2, (top + bottom - 1) / 2))
            pixel = shown[len(shown) - 1 - int(y), int(x)]
            assert abs(pixel - RED).max() < 8 or pixel.min() > 150, "a patch is neither kept nor faded"
            kept |= {patch} if abs(pixel - RED).max() < 8 else set()
        assert kept == set(choice.kept[place]) - view.hidden(width, height)


def test_a_white_patch_that_is_dropped_is_not_taken_for_a_kept_one():
    white = np.full((40, 40, 3), 255, np.uint8)
    faded = fade_dropped(white, [0], (2, 2))
    assert (faded[:20, :20] == 255).all() and (faded[20:] < 235).all()


def test_one_meaning_per_colour():
    """The same name has the same colour in every figure; names of one meaning differ otherwise."""
    alone = {name: style.looks([name])[name].color for name in ("dense control", "Dynamic I|T", "FastV-like", "random")}
    assert len(set(alone.values())) == 4
    together = style.looks(["mine", *alone, "random image", "yours"])
    assert {name: together[name].color for name in alone} == alone
    assert together["random"].color == together["random image"].color
    assert together["random"][1:] != together["random image"][1:]
    assert not {together["mine"].color, together["yours"].color} & {*alone.values()}
    assert style.looks(["FastV"])["FastV"].color == style.looks(["control + FastV-like"])["control + FastV-like"].color
    assert len({style.IMAGE_TOKENS, style.OUTPUT_TOKENS, style.PROMPT_TOKENS, *alone.values(), *style.OTHERS}) == 7 + 6
