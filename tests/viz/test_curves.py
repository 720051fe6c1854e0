"""The curves that are written: not blank, and refused without rows."""

import numpy as np
import pytest
from PIL import Image

from dynamic_llava.profile.presets import PRESETS
from dynamic_llava.profile.tables import curve_report
from dynamic_llava.viz.curves import draw_cost_curves


def test_cost_curves(tmp_path):
    rows = curve_report(PRESETS["table14"], 1000).rows
    plain, marked = tmp_path / "plain.png", tmp_path / "new" / "marked.png"
    assert draw_cost_curves(plain, rows, title="costs") == plain
    draw_cost_curves(marked, rows, device_gib=80)
    first, second = (np.asarray(Image.open(path).convert("L")) for path in (plain, marked))
    assert first.std() > 5 and first.shape[1] > 1000 and not np.array_equal(first, second)
    with pytest.raises(ValueError, match="no rows were given"):
        draw_cost_curves(plain, [])
