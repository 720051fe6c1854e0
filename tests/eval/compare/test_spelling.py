"""The list of methods on a command line: one reading for each list, and an error for what has none."""

import pytest

from dynamic_llava.config import SparsityConfig
from dynamic_llava.eval.compare.spelling import read_methods
from dynamic_llava.methods import get_method

CONFIG = SparsityConfig(sparse_layer=3)


def read(text):
    return [one.read(CONFIG) for one in read_methods(text)]


def test_the_list_of_the_manual():
    found = read_methods("dense, dynamic,fastv:layer=3,keep=0.25,tests.toys.norm:Norm")
    assert [one.label for one in found] == ["dense", "dynamic", "fastv:layer=3,keep=0.25", "tests.toys.norm:Norm"]
    methods = [one.read(CONFIG) for one in found]
    assert methods[2] == get_method("fastv", layer=3, image_keep_rate=0.25)
    assert type(methods[3]).__name__ == "Norm"
    assert methods[1].layer == 3, "what is not said is the checkpoint's"


@pytest.mark.parametrize(
    ("text", "name", "settings"),
    [
        ("pyramiddrop:layers=(2,4),keep=0.3", "pyramiddrop", {"layers": (2, 4), "stage_keep_rate": 0.3}),
        ("tova:keep=0.4,recent=2", "tova", {"keep_rate": 0.4, "recent": 2}),
        ("random:image-keep-rate=none", "random", {"image_keep_rate": None, "layer": 3}),
        ("streaming_llm:window=7", "streaming_llm", {"window": 7}),
    ],
)
def test_settings(text, name, settings):
    assert read(text) == [get_method(name, **settings)]


def test_settings_of_inner_methods_and_of_classes_of_ones_own():
    mixed, norm = read("mixed:image_by=fastv,image_by.layer=2,keep=0.5,tests.toys.norm:Norm:keep=0.1")
    assert mixed.image_by == get_method("fastv", layer=2, image_keep_rate=0.5)
    assert norm.image_keep_rate == 0.1
    (mixed,) = read("mixed:image_by=tests.toys.norm:Norm")
    assert type(mixed.image_by).__name__ == "Norm"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "something is missing beside a comma"),
        ("dense,,fastv", "something is missing beside a comma"),
        ("layer=3", "no method stands before it; write NAME:layer=3"),
        ("fastv,layer=3", "fastv before it has no ':'; write NAME:layer=3"),
        ("fastv:layer=", "is not understood; a setting is written"),
        ("fastv:=3", "is not understood; a setting is written"),
        (":layer=3", "is not understood; a setting is written"),
        ("pyramiddrop:layers=2,4", r"put the value into brackets: layers=\(2,4\)"),
        ("pyramiddrop:layers=(2,4", "a bracket is not closed"),
        ("pyramiddrop:layers=2)", "brackets do not match"),
        ("fastvv", "did you mean 'fastv'"),
        ("fastv:layer=3,layer=4", "layer is given twice"),
        ("dense,fastv:layer=3,dense", "methods dense are named twice"),
        ("fastv:keep=0.2,image_keep_rate=0.3", "keep is short for image_keep_rate, which is given too"),
        ("h2o:keep=0.3", r"has several rates \(heavy_rate, recent_rate\)"),
        ("streaming_llm:keep=0.3", "has no rate; name its settings: sinks, window"),
        ("dense:keep=0.3", "has no rate"),
        ("fastv:kepe=0.3", "has no setting 'kepe'"),
        ("fastv:keep=much", "is not a number"),
        ("no_such_module:Mine", "there is no module no_such_module"),
    ],
)
def test_what_has_no_reading_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        read(text)
