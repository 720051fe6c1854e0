"""What a run shows while it trains: lines in a log file, a bar on a terminal, warnings about keep rates."""

import io
import json
import logging

import pytest
from transformers import TrainerControl, TrainerState

from dynamic_llava.config import SparsityConfig, TrainConfig
from dynamic_llava.methods import Dynamic
from dynamic_llava.train.callbacks import KeepRateWarning, MetricsFile, Progress


def state(step, total=100):
    made = TrainerState(global_step=step, max_steps=total)
    made.is_world_process_zero = True
    return made


def line(**values):
    return {"lm_loss": 1.25, "tokens_per_second": 1234.0, **values}


def feed(callback, steps, logs, **arguments):
    for step in steps:
        callback.on_log(None, state(step, **arguments), TrainerControl(), logs=dict(logs))


def test_metrics_file_holds_one_object_per_line(tmp_path):
    callback = MetricsFile(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("old\n")
    callback.on_train_begin(None, state(0), TrainerControl())
    feed(callback, (10, 20), line())
    callback.on_train_begin(None, state(20), TrainerControl())
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in lines] == [10, 20] and lines[0]["lm_loss"] == 1.25


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_in_a_log_file_is_lines():
    stream = io.StringIO()
    callback = Progress("image", stream)
    callback.on_train_begin(None, state(0), TrainerControl())
    feed(callback, (10, 20), line())
    assert stream.getvalue() == "", "no line before ten seconds have passed"
    callback.last_line -= 20
    feed(callback, (30,), line(image_keep_rate=0.2))
    feed(callback, (100,), line())
    callback.on_train_end(None, state(100), TrainerControl())
    first, last = stream.getvalue().splitlines()
    assert first.startswith("image: step 30/100, loss 1.250, image kept 0.20, 1,234 tokens/s, ")
    assert first.endswith(" s left") and last.startswith("image: step 100/100")
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_a_bar():
    stream = Terminal()
    callback = Progress("image", stream)
    callback.on_train_begin(None, state(0), TrainerControl())
    callback.on_step_end(None, state(100), TrainerControl())
    feed(callback, (100,), line(output_keep_rate=0.5))
    callback.on_train_end(None, state(100), TrainerControl())
    assert "100/100" in stream.getvalue() and "output kept 0.50" in stream.getvalue()


@pytest.mark.parametrize(("rate", "warnings"), [(0.65, 1), (0.35, 1), (0.58, 0)])
def test_a_keep_rate_off_target_is_warned_about_after_the_first_window(caplog, rate, warnings):
    config = TrainConfig(log_every=10, keep_rate_window=50, keep_rate_tolerance=0.1)
    callback = KeepRateWarning(config, Dynamic().keep_rates(SparsityConfig()))
    with caplog.at_level(logging.WARNING):
        feed(callback, range(10, 110, 10), line(output_keep_rate=rate, image_keep_rate=0.2))
    assert len(caplog.records) == warnings
    if warnings:
        assert (
            caplog.records[0]
            .getMessage()
            .startswith(f"step 100: output_keep_rate was {rate:.2f} over the last 50 steps, its target is 0.50")
        )


@pytest.mark.parametrize(("rate", "warnings"), [(0.9, 0), (0.5, 1)])
def test_a_target_that_moves_is_the_one_that_counts(caplog, rate, warnings):
    """On a schedule 0.9 is near a target of 0.85, and the keep rate of inference, 0.5, is far from it."""
    callback = KeepRateWarning(TrainConfig(), Dynamic(sparsity="output").keep_rates(SparsityConfig()))
    with caplog.at_level(logging.WARNING):
        feed(callback, range(10, 110, 10), line(output_keep_rate=rate, output_keep_target=0.85))
    assert len(caplog.records) == warnings
    if warnings:
        assert "output_keep_rate was 0.50 over the last 50 steps, its target is 0.85" in caplog.records[0].getMessage()


def test_what_is_not_sparsified_is_not_warned_about(caplog):
    config = TrainConfig(keep_rate_window=10)
    callback = KeepRateWarning(config, Dynamic(sparsity="image").keep_rates(SparsityConfig()))
    with caplog.at_level(logging.WARNING):
        feed(callback, (10, 20), line(output_keep_rate=1.0))
    assert not caplog.records
