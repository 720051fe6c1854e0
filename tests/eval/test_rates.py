"""Keep rates and budgets of an evaluation: they choose its thresholds, answers stay those of their questions."""

import json
import shutil

import pytest

from dynamic_llava.config.calibration import threshold_at
from dynamic_llava.eval import answering, tasks
from dynamic_llava.eval import run as runner
from dynamic_llava.model import DynamicLlavaConfig
from tests.builders import TOKENS_PER_IMAGE
from tests.eval.run_builders import TOKENS, Toy, lines_of, ragged_checkpoint, run, summary, toy_data

QUANTILES = [place / 5 for place in range(-10, 11)]


@pytest.fixture(scope="module")
def uncalibrated(tmp_path_factory):
    return ragged_checkpoint(tmp_path_factory.mktemp("model"))


def calibrate(source, folder, quantiles):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config["sparsity"]["calibration"] = {"image": quantiles, "output": quantiles}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(uncalibrated, tmp_path_factory):
    return calibrate(uncalibrated, tmp_path_factory.mktemp("calibrated"), QUANTILES)


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "TIMED_TOKENS", 2)
    monkeypatch.setattr(runner, "TIMED_REPEATS", 1)
    monkeypatch.setitem(tasks.TASKS, Toy.name, Toy)
    toy_data(tmp_path)


def answers(out):
    return (out / "answers" / "toy.jsonl").read_bytes()


def test_a_rate_is_its_threshold_and_the_rate_that_is_met_is_reported(checkpoint, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    assert run(checkpoint, "toy", tmp_path, out, "--output-keep-rate", 0.35, "--image-keep-rate", 0.5) == 0
    threshold = threshold_at(QUANTILES, 0.35)
    words = ("--method", "dynamic", "--method.output-threshold", threshold, "--method.image-keep-rate", 0.5)
    assert run(checkpoint, "toy", tmp_path, other, *words) == 0
    assert answers(out) == answers(other)
    facts = [line["metadata"] for line in lines_of(out / "answers" / "toy.jsonl")]
    share = sum(one["output_kept"] for one in facts) / sum(one["output_tokens"] - 1 for one in facts)
    found, without = summary(out), summary(other)
    assert 0 < share < 1 and found["tasks"]["toy"]["efficiency"]["output_tokens_kept"]["value"] == pytest.approx(share)
    assert (found["settings"]["output_keep_rate"], found["settings"]["image_keep_rate"]) == (0.35, 0.5)
    assert "output_keep_rate" not in without["settings"]
    said = f"{share:.1%} of the generated tokens were kept"
    assert said in (out / "table.md").read_text() and said not in (other / "table.md").read_text()


def test_a_budget_is_that_of_the_longest_prompt_whatever_the_batch(checkpoint, tmp_path):
    config = DynamicLlavaConfig.from_pretrained(checkpoint)
    text, low = config.text_config, config.sparsity.sparse_layer
    above, one = (
        text.num_hidden_layers - low,
        2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * 4,
    )
    outs = [tmp_path / f"out{batch}" for batch in (3, 12)]
    assert run(checkpoint, "toy", tmp_path, tmp_path / "dense", "--sparsity", "none") == 0
    facts = [line["metadata"] for line in lines_of(tmp_path / "dense" / "answers" / "toy.jsonl")]
    kept = int(config.sparsity.image_keep_rate * TOKENS_PER_IMAGE)
    fixed = one * max(
        low * (its["prompt_tokens"] + TOKENS - 1)
        + above * (its["prompt_tokens"] - len(its["image_kept"]) * (TOKENS_PER_IMAGE - kept))
        for its in facts
    )
    budget = fixed + int(0.4 * one * above * (TOKENS - 1))
    for batch, out in zip((3, 12), outs, strict=True):
        assert run(checkpoint, "toy", tmp_path, out, "--kv-budget", f"{budget}B", "--batch-size", batch) == 0
    assert answers(outs[0]) == answers(outs[1])
    record = json.loads((outs[0] / "answers" / "toy.run.json").read_text())
    rate = (budget - fixed) / (one * above * (TOKENS - 1))
    assert record["method"]["output_threshold"] == pytest.approx(threshold_at(QUANTILES, rate), abs=1e-9)
    assert summary(outs[0])["settings"]["kv_budget"] == f"{budget}B"


def test_a_calibration_leaves_answers_that_asked_for_no_rate(uncalibrated, tmp_path, monkeypatch):
    folder = shutil.copytree(uncalibrated, tmp_path / "model")
    assert run(folder, "toy", tmp_path, tmp_path / "out") == 0
    before = answers(tmp_path / "out")
    calibrate(uncalibrated, folder, QUANTILES)
    monkeypatch.setattr(runner, "answer", None)
    assert run(folder, "toy", tmp_path, tmp_path / "out") == 0
    assert answers(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--output-keep-rate", 0.5],
            "has not been calibrated: run python -m dynamic_llava.calibrate MODEL --data FILE",
        ),
        (["--kv-budget", "1MiB"], "has not been calibrated"),
        (["--kv-budget", "1MiB", "--output-keep-rate", 0.5], "both say how many output tokens stay"),
        (["--output-keep-rate", 0.5, "--sparsity", "image"], "output_keep_rate has no use with sparsity='image'"),
        (["--image-keep-rate", 0.5, "--sparsity", "none"], "image_keep_rate has no use with sparsity='none'"),
    ],
)
def test_what_cannot_be_chosen_is_said(uncalibrated, tmp_path, capsys, words, message):
    assert run(uncalibrated, "toy", tmp_path, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kv-budget", "1kB"], "'1kB' is no number of bytes"),
        (["--kv-budget", "100B"], "kv_budget='100B' is 100 bytes, and the longest row takes"),
        (["--kv-budget", "1MiB", "--method", "fastv"], "kv_budget means nothing to method 'fastv'"),
    ],
)
def test_a_budget_that_cannot_be_is_said(checkpoint, tmp_path, capsys, words, message):
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err


def test_a_budget_is_for_generated_answers(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Toy, "settings", {}, raising=False)
    monkeypatch.setattr(Toy, "measure", lambda self, run, asked: answering.answer(run, asked), raising=False)
    assert run(checkpoint, "toy", tmp_path, tmp_path / "out", "--kv-budget", "1MiB") == 2
    assert "kv_budget is for tasks that generate one answer, and toy asks in its own way" in capsys.readouterr().err
