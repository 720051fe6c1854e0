"""`bash scripts/train.sh` in small: the shipped configuration and base, a few real training steps, every row."""

import json
from pathlib import Path

import pytest

from dynamic_llava.tiny.__main__ import main

SMALL = {
    "train.max-steps": 4, "train.batch-size": 4, "tiny.train-images": 40, "tiny.test-images": 40, "tiny.questions": 24,
    "tiny.descriptions": 4, "tiny.uncached-questions": 4, "tiny.uncached-descriptions": 1, "tiny.timing-repeats": 1,
    "tiny.timing-tokens": 2, "tiny.description-tokens": 90,
}  # fmt: skip


@pytest.fixture
def run_job(tmp_path, monkeypatch, pytestconfig):
    """Run the job of a shipped file in small; return its first seed's results, and the metrics by row."""
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(name, *more, **changes):
        arguments = ["job", str(pytestconfig.rootpath / "configs" / f"{name}.yaml"), *more]
        for setting, value in (SMALL | changes).items():
            arguments += [f"--{setting}", str(value)]
        assert main(arguments) == 0
        result = json.loads((tmp_path / "runs" / name / "results.json").read_text())["seeds"][0]
        return result, {row["key"]: row["metrics"] for row in result["rows"]}

    return run


@pytest.mark.slow
def test_the_main_job_runs_from_the_command_line(run_job, capsys):
    result, metrics = run_job("tiny", "--seed", "2", "--full")
    assert metrics["base"]["accuracy/all"] > 0.85  # the shipped base on unseen images
    assert metrics["base"]["accuracy/all"] > metrics["no_image"]["accuracy/all"] + 0.2
    assert metrics["base"]["attribute_recall"] > 0.8
    assert result["agreement"]["answers_equal"] == result["agreement"]["descriptions_equal"] == 1.0
    assert [row["key"] for row in result["overlap"]][-1] == "untrained"
    printed = capsys.readouterr().out
    assert "\ntargets " in printed and printed.endswith("report: runs/tiny/report.html\n")
    assert "## Targets" in Path("runs/tiny/table.md").read_text()


@pytest.mark.slow
def test_the_long_world_runs_at_three_rates(run_job, capsys):
    result, metrics = run_job("tiny_long", **{"tiny.description-tokens": 230, "tiny.base-steps": 3})
    for suffix in ("", "_35", "_20"):
        slots = metrics[f"dynamic{suffix}"]["slots"]  # of hardly trained predictors: some, all or none
        assert slots <= metrics[f"inside_sinks{suffix}"]["slots"] < max(slots, 0.05) + 0.02  # sinks alone are 0.04
        assert metrics[f"inside_recent{suffix}"]["slots"] == pytest.approx(slots, abs=0.05)
        for key in (f"dynamic{suffix}", f"inside_sinks{suffix}"):
            assert 0 <= metrics[key]["forced/count"] <= 1 and 0 <= metrics[key]["forced/relation"] <= 1
    assert "image" not in result["trainings"] and set(result["trainings"]) == {"both", "both_35", "both_20", "control"}
    printed = "".join(capsys.readouterr())
    table = Path("runs/tiny_long/table.md").read_text()
    assert "late counts, forced, learned minus sinks + window, equal slots, r_OT 0.2" in table
    assert "of which tiny.description_tokens" not in printed
