"""Comparisons of several seeds: means of scores, differences within each seed, and what is no such comparison."""

import json

import pytest

from dynamic_llava.eval.__main__ import main
from dynamic_llava.eval.compare.seeds import Seeds

VALUES = {"dense": (90.0, 80.0, 85.0), "fastv": (88.0, 79.0, 81.0)}
"""Scores of three seeds: dense itself varies more than what fastv costs of it."""


def comparison(seed, **changes):
    """Return the compare.json of a seed."""
    model = f"runs/seed{seed}/both/model"
    rows = [
        {
            "model": model, "method": name, "reference": name == "dense", "counts": {}, "answers": None, "error": None,
            "metrics": {"accuracy": {
                "value": values[seed], "unit": "percent", "lower_is_better": False, "low": -1.0, "high": 1.0,
                "difference": values[seed] - VALUES["dense"][seed],
            }},
            "costs": {"prefill_flop_exact": 1e12 * (1 + (name == "dense")), "kv_bytes": 2.0**20 * (1 + seed)},
            "times": {"prefill_ms": 10.0 + seed, "prefill_ms_low": 1, "prefill_ms_high": 99, "decode_ms": 5.0},
            "warnings": [], "front": [],
        }
        for name, values in VALUES.items()
    ]  # fmt: skip
    methods = [
        {"model": model, "method": name, "described": name, "set": f"rate 0.5 -> 0.{seed % 2 + 1}"} for name in VALUES
    ]
    found = {
        "models": [model], "methods": methods, "left_out": [], "equal": "image-tokens=5", "environment": {"torch": "2"},
        "bootstrap": {"resamples": 1, "seed": 0, "level": 0.95}, "settings": {"batch_size": 4, "speed_batch": 4},
        "tasks": {"toy": {"title": "Toy", "shown": ["accuracy"], "rows": rows, "warnings": []}},
    }  # fmt: skip
    return found | changes


def write(folder, found):
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps(found))
    return folder


def test_differences_are_taken_within_a_seed(tmp_path):
    folders = [write(tmp_path / str(seed), comparison(seed)) for seed in range(3)]
    assert main(["compare-seeds", *map(str, folders), "--output-folder", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    dense, fastv = found["tasks"]["toy"]["rows"]
    assert dense["metrics"]["accuracy"]["value"] == 85.0 and dense["metrics"]["accuracy"]["low"] == 0.0
    its = fastv["metrics"]["accuracy"]
    # differences -2, -1, -4: mean -7/3, standard error sqrt(7/3/3), t-quantile of two degrees of freedom 4.30265
    assert its["difference"] == pytest.approx(-7 / 3)
    assert its["high"] - its["difference"] == pytest.approx(4.30265 * (7 / 9) ** 0.5, rel=1e-4)
    assert fastv["costs"]["kv_bytes"] == 2 * 2**20
    assert [fastv["times"][name] for name in ("prefill_ms_low", "prefill_ms", "prefill_ms_high")] == [10.5, 11.0, 11.5]
    assert (dense["front"], fastv["front"]) == (["prefill_flop_exact", "kv_bytes"], ["prefill_flop_exact"])
    assert found["models"] == ["runs/seed*/both/model"]
    assert found["methods"][1]["set"] == "rate 0.5 -> 0.1; rate 0.5 -> 0.2"
    page = " ".join((tmp_path / "out" / "compare.md").read_text().split())
    assert "Means over 3 seeds" in page and "bootstrap" not in page and "| `fastv` | accuracy, percent | 82.7 |" in page
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000 and (tmp_path / "out" / "compare.svg").is_file()
    assert (tmp_path / "out" / "compare.csv").read_text().count("\n") == 3


def test_what_a_seed_lacks_is_left_out(tmp_path):
    lacking = comparison(1)
    row = lacking["tasks"]["toy"]["rows"][1]
    row |= {"metrics": {}, "times": {}, "error": "images cannot be read"}
    folders = [write(tmp_path / "a", comparison(0)), write(tmp_path / "b", lacking)]
    found = Seeds.read(folders).joined()["tasks"]["toy"]["rows"]
    assert not found[1]["metrics"] and not found[1]["times"] and found[1]["error"] == "images cannot be read"
    assert found[0]["metrics"]["accuracy"]["value"] == 85.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"equal": None}, "the equal budget differ"),
        ({"settings": {"limit": 3}}, "settings differ"),
        ({"tasks": {"other": comparison(1)["tasks"]["toy"]}}, "benchmarks differ"),
        ({"methods": comparison(1)["methods"][:1]}, "methods differ"),
    ],
)
def test_other_comparisons_are_refused(tmp_path, capsys, changes, says):
    folders = [write(tmp_path / "a", comparison(0)), write(tmp_path / "b", comparison(1, **changes))]
    assert main(["compare-seeds", *map(str, folders), "--output-folder", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_folder_and_one_twice_are_refused(tmp_path, capsys):
    folder = str(write(tmp_path / "a", comparison(0)))
    for given in ([folder], [folder, folder], [folder, str(tmp_path / "nothing")]):
        assert main(["compare-seeds", *given, "--output-folder", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.count("two folders or more") == 2 and "there is no file" in errors
