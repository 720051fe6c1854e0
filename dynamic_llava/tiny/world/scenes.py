"""Scenes of the tiny world and their pictures: 64 x 64 pixels, one to four flat objects on one of three grounds.

A picture is cut into 8 x 8 patches of 8 pixels by the vision tower, hence 64 image tokens. Objects never overlap and
cover about a fifth of the patches (a third in the long world, whose scenes have up to seven), so most image tokens
carry no content: the situation image sparsity is made for.
Everything is a pure function of a `numpy.random.Generator`; nothing here touches files or torch.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

IMAGE_SIZE = 64
PATCH_SIZE = 8
GRID = IMAGE_SIZE // PATCH_SIZE
TOKENS_PER_IMAGE = GRID * GRID
COVERAGE_THRESHOLD = 0.1

COLOR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (45, 165, 65),
    "blue": (45, 80, 215),
    "yellow": (235, 210, 50),
    "purple": (145, 55, 180),
    "cyan": (55, 195, 205),
    "orange": (240, 135, 35),
    "pink": (245, 140, 190),
}
COLORS = tuple(COLOR_VALUES)
# Slightly uneven frequencies: without them POPE's "popular" negatives would have no meaning.
COLOR_WEIGHTS = (0.17, 0.15, 0.14, 0.13, 0.12, 0.11, 0.10, 0.08)
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SHAPE_WEIGHTS = (0.23, 0.21, 0.20, 0.19, 0.17)
RADII = {"small": 4.6, "medium": 7.4, "large": 11.4}
SIZES = tuple(RADII)
BACKGROUNDS = ("plain", "noisy", "striped")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
MAX_OBJECTS = 4
COUNT_WEIGHTS = (0.10, 0.25, 0.35, 0.30)

_SUPERSAMPLING = 2
_OBJECT_GAP = 1.2  # pixels between two objects, and between an object and the border
_COLUMN_GAP = 4.5  # least distance of two centres in x: descriptions name objects from left to right
_THIRD_GAP = 1.5  # least distance of a centre to a border between thirds: rows and columns are unambiguous
_RADIUS_SPREAD = 0.08
_CROWD_TRIES = 300
_CROWD_SIZE_WEIGHTS = (0.42, 0.36, 0.22)


@dataclass(frozen=True)
class SceneObject:
    """One flat object; `x`, `y` (centre) and `radius` are in pixels."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def row(self) -> str:
        """Third of the picture, from top to bottom, that holds the centre."""
        return ROWS[min(2, int(self.y * 3 / IMAGE_SIZE))]

    @property
    def column(self) -> str:
        """Third of the picture, from left to right, that holds the centre."""
        return COLUMNS[min(2, int(self.x * 3 / IMAGE_SIZE))]


@dataclass(frozen=True)
class Scene:
    """Objects ordered from left to right, and the kind of ground."""

    objects: tuple[SceneObject, ...]
    background: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; rows and columns are written out for readers that do not import this module."""
        objects = [{**vars(o), "row": o.row, "column": o.column} for o in self.objects]
        return {"background": self.background, "objects": objects}


@dataclass(frozen=True)
class Picture:
    """A rendered scene.

    pixels: (64, 64, 3) uint8. patch_object: (64,) int64, index of the object that covers most of the patch, -1 where
    its share is at most 0.1. patch_coverage: (64,) float32, this share.
    """

    pixels: np.ndarray
    patch_object: np.ndarray
    patch_coverage: np.ndarray


def sample_scene(rng: np.random.Generator, *, dense: bool = False) -> Scene:
    """Draws a scene. `dense` packs 3 to 8 objects with free columns: more labels per picture for the vision tower."""
    wanted = int(rng.integers(3, 9)) if dense else 1 + int(rng.choice(MAX_OBJECTS, p=COUNT_WEIGHTS))
    objects: list[SceneObject] = []
    for _ in range(60 if dense else 200):
        if len(objects) == wanted:
            break
        candidate = _sample_object(rng)
        if _fits(candidate, objects, dense):
            objects.append(candidate)
    objects.sort(key=lambda o: o.x)
    return Scene(tuple(objects), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])


def sample_crowd(rng: np.random.Generator, *, fewest: int, most: int, alike: int) -> Scene:
    """Draws a scene of `fewest` to `most` objects, smaller ones more often; of no size and no column more than `alike`.

    Where the drawn number does not fit, as many stay as do; a scene that is left with too few is drawn anew.
    """
    while True:
        wanted = int(rng.integers(fewest, most + 1))
        objects: list[SceneObject] = []
        for _ in range(_CROWD_TRIES):
            candidate = _sample_object(rng, SIZES[int(rng.choice(len(SIZES), p=_CROWD_SIZE_WEIGHTS))])
            counts = (sum(getattr(o, name) == getattr(candidate, name) for o in objects) for name in ("size", "column"))
            if max(counts) < alike and _fits(candidate, objects, dense=False):
                objects.append(candidate)
            if len(objects) == wanted:
                break
        if len(objects) >= fewest:
            objects.sort(key=lambda o: o.x)
            return Scene(tuple(objects), BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])


def render_scene(scene: Scene, rng: np.random.Generator) -> Picture:
    """Paints the scene with anti-aliased edges, a random tint and pixel noise."""
    image_HWC = _paint_background(scene.background, rng)
    coverage_OP = np.zeros((len(scene.objects), TOKENS_PER_IMAGE), np.float32)
    for i, obj in enumerate(scene.objects):
        alpha_HW = _coverage(obj)
        color = np.array(COLOR_VALUES[obj.color], np.float32) * np.float32(rng.uniform(0.88, 1.1))
        image_HWC += alpha_HW[..., None] * (color - image_HWC)
        coverage_OP[i] = alpha_HW.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((1, 3)).ravel()
    image_HWC += rng.normal(0, 4, (IMAGE_SIZE, IMAGE_SIZE, 1)).astype(np.float32)
    coverage_P = coverage_OP.max(0)
    owner_P = np.where(coverage_P > COVERAGE_THRESHOLD, coverage_OP.argmax(0), -1).astype(np.int64)
    return Picture(np.clip(image_HWC, 0, 255).astype(np.uint8), owner_P, coverage_P)


def sample_pictures(count: int, seed: tuple[int, ...], *, dense: bool = False) -> tuple[list[Scene], list[Picture]]:
    """`count` scenes and pictures; picture i depends on (seed, i) alone, so any prefix of a longer run is the same."""
    scenes, pictures = [], []
    for i in range(count):
        rng = np.random.default_rng((*seed, i))
        scenes.append(sample_scene(rng, dense=dense))
        pictures.append(render_scene(scenes[-1], rng))
    return scenes, pictures


def _sample_object(rng: np.random.Generator, size: str | None = None) -> SceneObject:
    size = SIZES[int(rng.integers(len(SIZES)))] if size is None else size
    radius = RADII[size] * float(rng.uniform(1 - _RADIUS_SPREAD, 1 + _RADIUS_SPREAD))
    reach = radius + _OBJECT_GAP
    x, y = (float(v) for v in rng.uniform(reach, IMAGE_SIZE - reach, 2))
    color = COLORS[int(rng.choice(len(COLORS), p=COLOR_WEIGHTS))]
    shape = SHAPES[int(rng.choice(len(SHAPES), p=SHAPE_WEIGHTS))]
    return SceneObject(color, shape, size, x, y, radius)


def _fits(new: SceneObject, objects: list[SceneObject], dense: bool) -> bool:
    if not dense and any(abs(v - third) < _THIRD_GAP for v in (new.x, new.y) for third in _thirds()):
        return False
    for other in objects:
        if (new.color, new.shape) == (other.color, other.shape):
            return False
        if max(abs(new.x - other.x), abs(new.y - other.y)) < new.radius + other.radius + _OBJECT_GAP:
            return False
        if not dense and abs(new.x - other.x) < _COLUMN_GAP:
            return False
    return True


def _thirds() -> tuple[float, float]:
    return IMAGE_SIZE / 3, 2 * IMAGE_SIZE / 3


def _paint_background(kind: str, rng: np.random.Generator) -> np.ndarray:
    image_HWC = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image_HWC[:] = rng.uniform(90, 190) + rng.uniform(-12, 12, 3)
    if kind == "noisy":
        image_HWC += rng.normal(0, 22, (IMAGE_SIZE, IMAGE_SIZE, 1)).astype(np.float32)
    elif kind == "striped":
        angle, frequency = rng.uniform(0, math.pi), rng.uniform(0.8, 1.4)
        y_HW, x_HW = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
        wave_HW = np.sin(frequency * (math.cos(angle) * x_HW + math.sin(angle) * y_HW))
        image_HWC += (22 * np.sign(wave_HW))[..., None]
    elif kind != "plain":
        raise ValueError(f"unknown background {kind!r}; allowed: {', '.join(BACKGROUNDS)}")
    return image_HWC


def _coverage(obj: SceneObject) -> np.ndarray:
    """Share of every pixel inside the object, (64, 64) float32, from 2 x 2 samples per pixel of its bounding box."""
    rows, columns = (slice(max(0, int(c - obj.radius) - 1), int(c + obj.radius) + 2) for c in (obj.y, obj.x))
    inside = _inside(obj.shape, _samples(columns)[None, :] - obj.x, _samples(rows)[:, None] - obj.y, obj.radius)
    boxes = inside.reshape(inside.shape[0] // _SUPERSAMPLING, _SUPERSAMPLING, -1, _SUPERSAMPLING)
    alpha_HW = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    alpha_HW[rows, columns] = boxes.mean((1, 3), dtype=np.float32)
    return alpha_HW


def _samples(pixels: slice) -> np.ndarray:
    """Coordinates of the sample points of a range of pixels along one axis."""
    stop = min(pixels.stop, IMAGE_SIZE)
    points = np.arange(pixels.start * _SUPERSAMPLING, stop * _SUPERSAMPLING, dtype=np.float32)
    return (points + 0.5) / _SUPERSAMPLING


def _inside(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Membership of the points (dx, dy) relative to the centre; the arrays broadcast to (H, W)."""
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    if shape == "square":
        return (np.abs(dx) <= 0.85 * radius) & (np.abs(dy) <= 0.85 * radius)
    if shape == "triangle":
        return (dy <= 0.8 * radius) & (dy >= -radius) & (np.abs(dx) <= 0.55 * (dy + radius))
    if shape == "cross":
        bar, arm = 0.33 * radius, radius
        upright = (np.abs(dx) <= bar) & (np.abs(dy) <= arm)
        return upright | ((np.abs(dy) <= bar) & (np.abs(dx) <= arm))
    if shape == "ring":
        distance = dx * dx + dy * dy
        return (distance <= radius * radius) & (distance >= (0.55 * radius) ** 2)
    raise ValueError(f"unknown shape {shape!r}; allowed: {', '.join(SHAPES)}")
