"""The job on a random language model: every row, found again, made anew where something changed; page and command."""

import json
from dataclasses import asdict, replace

import pytest
import yaml

from dynamic_llava.smol import job
from dynamic_llava.smol.__main__ import main
from dynamic_llava.smol.job import TableMaker, read_result
from tests.smol.worlds import job_of, write_language

TITLES = ("random", "random + last w", "sinks + last w", "H2O", "TOVA", "KNorm", "learned, w = 0", "learned, w = 3")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    return job_of(tmp_path / "runs", write_language(tmp_path / "language"))


@pytest.mark.slow
def test_the_whole_job(config, tmp_path, monkeypatch, capsys):
    folder = job.main(config)
    result = read_result(folder)
    rows = result["rows"]
    assert rows[0]["title"] == "dense"
    found = {(row["title"], row["budget"]) for row in rows[1:]}
    told = " ".join(result["without"])
    for title in TITLES:
        for budget in (0.6, 0.2):
            assert (title, budget) in found or f"{title}: " in told, (title, budget)
    for row in rows:
        total = {name: sum(one[name] for one in row["answers"]) for name in ("pairs", "visible", "kl", "tokens")}
        held = total["visible"] / total["pairs"]
        if row["title"] in ("sinks + last w", "learned, w = 0", "learned, w = 3", "H2O", "TOVA", "KNorm"):
            assert 0.3 * row["budget"] < held <= row["budget"] + 0.1, row["title"]
        assert total["kl"] >= -1e-6 * total["tokens"] and (row["title"] == "dense") is (abs(total["kl"]) < 1e-4)
    text = (folder / "table.md").read_text()
    assert all(title in text for title in TITLES) and "the best control" in text and "SnapKV has no row" in text
    assert (folder / "table.png").stat().st_size > 1000
    assert "training: window 3, seed 0" in capsys.readouterr().out

    def never(*given, **more):
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(TableMaker, "_measure", never)
        job.main(config)
        assert read_result(folder)["rows"] == rows, "found again, from their files"
        (folder / "rows" / "TOVA_20.json").unlink()
        with pytest.raises(AssertionError, match="measured again"):
            job.main(config)
    job.main(replace(config, smol=replace(config.smol, sinks=1)))
    made = [
        {(row["title"], row["budget"]): row["fingerprint"] for row in its}
        for its in (rows, read_result(folder)["rows"])
    ]
    assert {key[0] for key in made[0] if made[0][key] != made[1].get(key)} == {"sinks + last w"}

    page = tmp_path / "docs" / "smol.md"
    assert main(["page", str(folder), "--page", str(page)]) == 0
    page.write_text(page.read_text() + "Learned admission loses here.\n")
    assert main(["page", str(folder), "--page", str(page)]) == 0
    written = page.read_text()
    assert written.count("Learned admission loses here.") == 1 and "| dense" in written
    assert json.loads(page.with_suffix(".json").read_text()) == read_result(folder)
    assert "minutes for 2 trainings and for the rows" in written
    assert page.with_suffix(".png").is_file()
    capsys.readouterr()
    assert main(["table", str(folder)]) == 0 and "| random" in capsys.readouterr().out


def test_a_folder_without_a_job_is_named(tmp_path, capsys):
    assert main(["table", str(tmp_path)]) == 2 and "configs/smol.yaml" in capsys.readouterr().err
    assert main(["job"]) == 2 and "give the file of the job" in capsys.readouterr().err


REFUSED = {
    "data": ({"data.json": "mine.json"}, "data.json='mine.json' and a `smol` section contradict"),
    "no base": ({"model.base": ""}, "model.base is not set"),
    "images": ({"train.sparsity_mode": "both"}, "the smol world has texts alone"),
    "a window": ({"sparsity.output_window": 3}, "name windows there"),
    "sinks": ({"sparsity.output_sinks": 3}, "and without sinks"),
    "the same budget": ({"smol.budgets": [0.5, 0.5]}, "are not different shares"),
    "prompts": ({"smol.held_prompts": 41}, "smol.held_prompts=41 is more than there are; give 40 or fewer"),
    "budget": ({"smol.budgets": [1.5]}, "give one or more numbers between 0 and 1"),
    "windows": ({"smol.windows": [2, 2]}, "each once"),
    "tokens": ({"smol.max_tokens": 3}, "smol.max_tokens=3 is not allowed; give a whole number of at least 12"),
    "share": ({"smol.top_p": 0.0}, "smol.top_p=0.0 draw nothing"),
}


@pytest.mark.parametrize("way", REFUSED)
def test_settings_that_contradict_are_named(config, tmp_path, way, capsys):
    changes, words = REFUSED[way]
    values = json.loads(json.dumps(asdict(config)))
    for name, value in changes.items():
        section, key = name.split(".")
        values[section][key] = value
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    assert main(["job", str(tmp_path / "job.yaml")]) == 2
    assert words in capsys.readouterr().err
