"""`bash scripts/train.sh` in small: the shipped configuration and base, a few real training steps, every row."""

import json

import pytest

from dynamic_llava.tiny.__main__ import main

SMALL = {
    "train.max-steps": 4, "train.batch-size": 4, "tiny.train-images": 40, "tiny.test-images": 40, "tiny.questions": 24,
    "tiny.descriptions": 4, "tiny.uncached-questions": 4, "tiny.uncached-descriptions": 1, "tiny.timing-repeats": 1,
    "tiny.timing-tokens": 2, "tiny.description-tokens": 90,
}  # fmt: skip


@pytest.mark.slow
def test_the_main_job_runs_from_the_command_line(tmp_path, monkeypatch, capsys, pytestconfig):
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    arguments = ["job", str(pytestconfig.rootpath / "configs" / "tiny.yaml"), "--seed", "2", "--full"]
    for name, value in SMALL.items():
        arguments += [f"--{name}", str(value)]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "runs" / "tiny" / "results.json").read_text())["seeds"][0]
    metrics = {row["key"]: row["metrics"] for row in result["rows"]}
    assert metrics["base"]["accuracy/all"] > 0.85  # the shipped base on unseen images
    assert metrics["base"]["accuracy/all"] > metrics["no_image"]["accuracy/all"] + 0.2
    assert metrics["base"]["attribute_recall"] > 0.8
    assert result["agreement"]["answers_equal"] == result["agreement"]["descriptions_equal"] == 1.0
    assert [row["key"] for row in result["overlap"]][-1] == "untrained"
    assert "## Targets" in capsys.readouterr().out
