"""Two checkouts compared: the same one is as fast, a slower one is noticed, one that fails is named."""

import shutil
import statistics
from pathlib import Path

import numpy
import pytest

from dynamic_llava.profile.__main__ import main
from dynamic_llava.profile.against import HERE, Compared, against_report, check_folder, compare, median_interval
from dynamic_llava.profile.presets import Preset, small_shape

TINY = Preset("tiny", small_shape(64, 4, 256), 2, (8,), "")
SLOWER = """
import functools, time
from .llava import DynamicLlavaForConditionalGeneration as Slower
def slower(forward):
    @functools.wraps(forward)
    def wait(*args, **kwargs):
        begun = time.perf_counter()
        found = forward(*args, **kwargs)
        time.sleep(0.05 + 2 * (time.perf_counter() - begun))
        return found
    return wait
Slower.forward = slower(Slower.forward)
"""


@pytest.fixture
def copy(tmp_path):
    """Another checkout: this package's source, and a line of its own in model/."""

    def make(line):
        folder = tmp_path / "other"
        package = folder / "dynamic_llava"
        shutil.copytree(HERE / "dynamic_llava", package, ignore=shutil.ignore_patterns("*.safetensors"))
        with (package / "model" / "__init__.py").open("a") as file:
            file.write(line)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize("call", ["generate", "prefill", "training"])
def test_a_slower_checkout_is_noticed(call, copy):
    row = compare(Compared(call, TINY, call, turns=5), copy(SLOWER), pairs=1)
    print(row)
    assert row["ratio"] < 0.8 and row["there"] > row["here"] and row["same"] == 1 and row["turns"] == 5


@pytest.mark.slow
def test_a_checkout_beside_itself_has_a_ratio_of_one_within_its_interval():
    row = compare(Compared("score", TINY, "score", turns=8), HERE, pairs=1)
    print(against_report([row], HERE).table())
    assert row["low"] <= 1 <= row["high"] and 0.5 < row["ratio"] < 2 and row["same"] == 1


@pytest.mark.slow
def test_a_checkout_that_fails_is_named(copy, capsys):
    """What could be compared is shown all the same."""
    other = copy("raise RuntimeError('nothing works')\n")
    assert main(["against", str(other), "--pairs", "1", "--calls", "small-prefill", "score", "--limit", "1e-3"]) == 1
    said = capsys.readouterr()
    assert f"prefill failed in {other}: RuntimeError: nothing works" in said.err
    assert "slower than 0.001 times: score" in said.err and "score  cpu-small" in said.out


def test_a_folder_without_the_package_is_a_mistake(tmp_path, capsys):
    assert main(["against", str(tmp_path)]) == 2
    assert "git worktree add" in capsys.readouterr().err
    assert main(["against", str(HERE), "--pairs", "0"]) == 2
    assert check_folder(Path(HERE)) == HERE


@pytest.mark.parametrize("size", [6, 9, 25, 60])
def test_the_interval_holds_the_median_as_often_as_it_says(size):
    """Of a skewed distribution, 95 times of 100 and hardly more often than needed."""
    draw, held, tries = numpy.random.default_rng(size), 0, 2000
    for _ in range(tries):
        low, high = median_interval(list(draw.exponential(size=size)))
        held += low <= numpy.log(2) <= high
    assert 0.94 <= held / tries <= 0.995


@pytest.mark.parametrize("size", [1, 2, 5])
def test_few_values_give_all_of_them(size):
    values = [float(number) for number in range(size)]
    assert median_interval(values) == (0.0, size - 1.0) and statistics.median(values) <= values[-1]
