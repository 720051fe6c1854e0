"""How methods are spelled: names, own classes and mappings are read into the same objects that are printed back."""

import json
import sys
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava import METHODS, Method, SparsityConfig
from dynamic_llava.methods import Dynamic, FastV, describe_method, get_method, print_method, read_method
from dynamic_llava.model.switches import choose_method

CHECKPOINT = SparsityConfig(sparse_layer=4, image_keep_rate=0.3, image_selection="threshold", output_threshold=0.5)


@dataclass(frozen=True)
class EveryType(FastV):
    """Settings of every type that text can spell."""

    name: ClassVar[str] = "every_type"

    flag: bool = False
    count: int | None = 3
    share: float = 0.5
    word: str = "w"
    choice: Literal["none", "all", 4] | None = "all"
    layers: tuple[int, ...] = (2, 4)
    pair: tuple[int, float] = (1, 0.5)
    other: Method | None = None
    either: Literal["auto"] | int = "auto"


class NoDataclass(FastV):
    """Its setting would be ignored."""

    strength: float = 1.0


class Nameless(Method):
    """A class that forgets its name."""


EVERY_TYPE = f"{__name__}:EveryType"
VALUES = {
    bool: st.booleans(),
    int: st.integers(0, 40),
    float: st.floats(0.01, 1),
    str: st.text("abz-_ .", min_size=1).filter(lambda text: text.lower() not in ("none", "null")),
}


def values_of(kind):
    """Return a strategy for the values of a field's type."""
    if kind is type(None):
        return st.none()
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        if rest == [Ellipsis]:
            return st.lists(values_of(first), max_size=4).map(tuple)
        return st.tuples(*map(values_of, (first, *rest)))
    if isinstance(kind, type) and issubclass(kind, Method):
        return st.sampled_from([name for name in METHODS if issubclass(METHODS[name], kind)]).map(get_method)
    return VALUES[kind] if kind in VALUES else st.one_of(*map(values_of, get_args(kind)))


def methods_of(kind):
    """Return a strategy for the methods of a class, every setting drawn."""
    hints = get_type_hints(kind)

    def build(settings):
        try:
            return kind(**settings)
        except ValueError:  # some settings exclude each other
            return None

    drawn = st.fixed_dictionaries({one.name: values_of(hints[one.name]) for one in fields(kind) if one.init})
    return drawn.map(build).filter(lambda method: method is not None)


def as_text(value):
    """Return a printed value as a command line spells it."""
    if isinstance(value, list):
        return ",".join(map(as_text, value))
    if isinstance(value, dict):
        return {name: as_text(inner) for name, inner in value.items()}
    return str(value)


@pytest.mark.parametrize("kind", [*METHODS.values(), EveryType], ids=lambda kind: kind.name)
@given(data=st.data())
def test_what_is_printed_is_read_as_the_same_method(kind, data):
    method = data.draw(methods_of(kind))
    printed = print_method(method)
    assert list(printed) == ["name", *(one.name for one in fields(kind) if one.init)]
    for spelled in (
        printed,
        json.loads(json.dumps(printed)),
        yaml.safe_load(yaml.safe_dump(printed)),
        as_text(printed),
    ):
        # What is said stands, whatever a checkpoint says.
        assert read_method(spelled) == read_method(spelled, CHECKPOINT) == method
        assert print_method(read_method(spelled)) == printed
    assert printed["name"] in describe_method(method)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_spellings_of_one_method_are_one(name):
    path = f"{METHODS[name].__module__}:{METHODS[name].__name__}"
    spelled = (name, path, {"name": name}, {"name": path})
    assert len({read_method(one) for one in spelled}) == 1
    assert len({read_method(one, CHECKPOINT) for one in spelled}) == 1
    assert {print_method(read_method(one))["name"] for one in spelled} == {name}
    if "layer" in METHODS[name].settings_from(CHECKPOINT):
        assert read_method(name, CHECKPOINT).layer == 4
        assert read_method({"name": name, "layer": 3}, CHECKPOINT).layer == 3
    chosen = choose_method(CHECKPOINT, method=name)
    assert chosen == choose_method(CHECKPOINT, method=read_method(name, CHECKPOINT))
    assert (chosen == choose_method(CHECKPOINT)) == (name == "dynamic")


def test_a_class_of_ones_own_needs_no_registration():
    method = read_method({"name": EVERY_TYPE, "layers": "5 6", "other": {"name": "fastv", "layer": "3"}})
    assert method == EveryType(layers=(5, 6), other=FastV(layer=3))
    assert print_method(method)["name"] == EVERY_TYPE and EVERY_TYPE not in METHODS


WRONG = {
    "near name": ("fastvv", ["'fastvv' is not known", "did you mean 'fastv'", "package.module:Class"]),
    "near setting": ({"name": "fastv", "layr": 3}, ["fastv", "no setting 'layr'", "did you mean 'layer'"]),
    "settings below a key": (
        {"name": "fastv", "settings": {"layer": 3}},
        ["'settings'; the settings are 'layer'"],
    ),
    "no name": ({"layer": 3}, ["does not say its name", "fastv"]),
    "a number": (3, ["method=3 is neither", "Method object"]),
    "a list": (["fastv"], ["is neither", "fastv"]),
    "a key that is no text": ({"name": "fastv", 3: 3}, ["3 is no setting"]),
    "whole number": ({"name": "fastv", "layer": 2.5}, ["layer=2.5 is not a whole number"]),
    "truth for a number": ({"name": "fastv", "layer": True}, ["layer=True is not a whole number"]),
    "nan": ({"name": "random", "image_keep_rate": "nan"}, ["image_keep_rate='nan' is not a number", "or none"]),
    "none": ({"name": "fastv", "layer": None}, ["layer=None is not a whole number"]),
    "range": ({"name": "fastv", "image_keep_rate": 2}, ["image_keep_rate=2.0 is not a keep rate"]),
    "near word": ({"name": "dynamic", "sparsity": "bth"}, ["sparsity='bth'", "did you mean 'both'", "'output'"]),
    "flag": ({"name": EVERY_TYPE, "flag": "maybe"}, ["flag='maybe' is neither true nor false"]),
    "pair": ({"name": EVERY_TYPE, "pair": "1,2,3"}, ["has 3 values; give 2"]),
    "part of a tuple": ({"name": EVERY_TYPE, "layers": "2,x"}, ["layers='2,x' is not a whole number"]),
    "inner method": ({"name": EVERY_TYPE, "other": "fastvv"}, ["other", "did you mean 'fastv'"]),
    "no module": ("nowhere.at_all:Cut", ["no module nowhere", "PYTHONPATH"]),
    "no class": (f"{__name__}:EveryTyp", ["has no EveryTyp", "did you mean 'EveryType'"]),
    "no method": ("pathlib:Path", ["no class that extends dynamic_llava.Method"]),
    "no dataclass": (f"{__name__}:NoDataclass", ["'strength'", "@dataclass(frozen=True)"]),
    "no class name": (f"{__name__}:", ["package.module:Class"]),
    "nameless": (f"{__name__}:Nameless", ["has no name", "ClassVar[str]"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_spelling_says_what_is_allowed(case):
    spelled, words = WRONG[case]
    for read in (read_method, lambda one: choose_method(CHECKPOINT, method=one)):
        with pytest.raises(ValueError) as caught:
            read(spelled)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"method": "fastv", "sparsity": "image"}, "sparsity='image' and method 'fastv' contradict"),
        ({"method": {"name": "fastv"}, "output_threshold": 1.0}, "output_threshold=1.0 and method 'fastv' contradict"),
        ({"method": "dense", "sparsity": "none"}, "sparsity='none' and method 'dense' contradict"),
        ({"method": {"name": "dynamic", "sparsity": "both"}, "sparsity": "image"}, "both say sparsity"),
        ({"method": {"name": "fastv", "image_keep_rate": 0.5}, "image_keep_rate": 0.3}, "both say image_keep_rate"),
        ({"method": FastV(), "image_keep_rate": 0.3}, "together with the method object"),
        ({"method": "dense", "image_keep_rate": 0.3}, "image_keep_rate=0.3 means nothing to method 'dense'"),
        ({"method": {"name": "dynamic", "sparsity": "output"}, "image_keep_rate": 0.3}, "no use with sparsity"),
    ],
)
def test_switches_that_contradict_a_method_are_refused(switches, words):
    with pytest.raises(ValueError, match=words):
        choose_method(SparsityConfig(), **switches)


def test_switches_are_short_for_settings():
    config = SparsityConfig()
    assert choose_method(config, sparsity="image") == choose_method(
        config, method={"name": "dynamic", "sparsity": "image"}
    )
    assert choose_method(config, method="dynamic", sparsity="image") == Dynamic(sparsity="image")
    assert choose_method(config, method="fastv", image_keep_rate=0.3) == FastV(image_keep_rate=0.3)


def test_a_checkpoint_s_word_imports_no_code(tmp_path, monkeypatch):
    (tmp_path / "harmful.py").write_text("raise SystemExit('this code has run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for spelled in ("harmful:Cut", {"name": "harmful:Cut", "layer": 2}):
        with pytest.raises(ValueError, match="a checkpoint's word imports no code"):
            read_method(spelled, trusted=False)
    assert "harmful" not in sys.modules
    assert read_method("fastv", trusted=False) == FastV()


def test_what_a_module_of_ones_own_does_wrong_is_said(tmp_path, monkeypatch):
    (tmp_path / "own_broken.py").write_text("import does_not_exist_anywhere\n")
    (tmp_path / "own_wrong.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"importing own_broken failed: ModuleNotFoundError.*does_not_exist_anywhere"):
        read_method("own_broken:Cut")
    with pytest.raises(ValueError, match="importing own_wrong failed: ZeroDivisionError"):
        read_method("own_wrong:Cut")
