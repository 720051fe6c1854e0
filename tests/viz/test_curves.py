"""The curves that are written: not blank, and refused without rows."""

import numpy as np
import pytest
from PIL import Image

from dynamic_llava.profile.presets import PRESETS
from dynamic_llava.profile.tables import curve_report
from dynamic_llava.viz.curves import draw_cost_curves, draw_quality_against_cost, draw_training_curves


def test_cost_curves(tmp_path):
    rows = curve_report(PRESETS["table14"], 1000).rows
    plain, marked = tmp_path / "plain.png", tmp_path / "new" / "marked.png"
    assert draw_cost_curves(plain, rows, title="costs") == plain
    draw_cost_curves(marked, rows, device_gib=80)
    first, second = (np.asarray(Image.open(path).convert("L")) for path in (plain, marked))
    assert first.std() > 5 and first.shape[1] > 1000 and not np.array_equal(first, second)
    with pytest.raises(ValueError, match="no rows were given"):
        draw_cost_curves(plain, [])


def test_training_curves_show_every_keep_rate(tmp_path):
    log = [{"step": step, "lm_loss": 2.0, "image_keep_rate": 0.2, "output_keep_rate": 0.5} for step in range(5)]
    of_questions = [{**line, "prompt_keep_rate": 0.7 + line["step"] / 50} for line in log]
    targets = {"image_keep_rate": 0.2, "output_keep_rate": 0.5, "prompt_keep_rate": 0.7}
    two, three = (
        np.asarray(Image.open(draw_training_curves(tmp_path / f"{len(found[0])}.png", {"run": found}, targets)))
        for found in (log, of_questions)
    )
    assert two.shape == three.shape and not np.array_equal(two, three)
    with pytest.raises(ValueError, match="no training records were given"):
        draw_training_curves(tmp_path / "none.png", {"run": []}, targets)


def test_quality_against_cost(tmp_path):
    """A PNG, and an SVG that is the same file each time."""
    points = [
        {
            "name": f"method {i}",
            "cost": i,
            "quality": 3 + i,
            "interval": (i - 0.5, i + 0.25),
            "difference": i,
            "front": i < 3,
        }
        for i in range(5)
    ]
    points.append({"name": "alone", "cost": 2, "quality": 1, "interval": None, "difference": None, "front": False})
    panel = {"title": "Toy", "cost": "prefill, TFLOP", "quality": "ppl", "lower_is_better": True, "points": points}
    for name in ("one", "two"):
        png, svg = draw_quality_against_cost(tmp_path / f"{name}.png", [panel, {**panel, "cost": "bytes"}])
        assert (png.suffix, svg.suffix) == (".png", ".svg")
    assert np.asarray(Image.open(png).convert("L")).std() > 5
    assert (tmp_path / "one.svg").read_bytes() == svg.read_bytes()
    with pytest.raises(ValueError, match="no panels were given"):
        draw_quality_against_cost(tmp_path / "none.png", [])
