"""The picture of the cache's growth: one curve per line, at the values that were given."""

import pytest

from dynamic_llava.viz import style
from dynamic_llava.viz.cache_growth import draw_cache_growth


def test_the_curves_are_the_bytes(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(style, "save", lambda figure, path, **_: figures.append(figure) or path)
    lines = {"dense": [1024, 2048, 3072], "sparse": [512, 1024]}
    assert draw_cache_growth(tmp_path / "a.png", lines) == tmp_path / "a.png"
    curves = figures[0].axes[0].get_lines()
    assert {curve.get_label(): curve.get_xydata().tolist() for curve in curves} == {
        "dense": [[1, 1], [2, 2], [3, 3]],
        "sparse": [[1, 0.5], [2, 1]],
    }
    assert sorted(text.get_text() for text in figures[0].axes[0].texts) == ["1", "3"]


def test_the_picture_is_written(tmp_path):
    path = draw_cache_growth(tmp_path / "new" / "growth.png", {"dense": [1.0, 2.0]})
    assert path.stat().st_size > 5000


@pytest.mark.parametrize("lines", [{}, {"dense": []}])
def test_nothing_to_draw_is_an_error(tmp_path, lines):
    with pytest.raises(ValueError, match="no bytes were given"):
        draw_cache_growth(tmp_path / "a.png", lines)
