"""A keep rate that is asked for is the rate that is met: margins, thresholds, and the bytes that a budget allows."""

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.calibrate.__main__ import main
from dynamic_llava.config import SparsityConfig
from dynamic_llava.config.calibration import check_calibration, threshold_at
from dynamic_llava.config.run import RunConfig
from dynamic_llava.engine.cache import CACHE
from dynamic_llava.methods import Dynamic
from dynamic_llava.model.kv_budget import LEAST_RATE, bytes_of, keep_rate_within
from dynamic_llava.model.margins import margins_of, quantiles_of
from dynamic_llava.model.switches import choose_method
from tests.builders import collate, fixed_rows, prompts, shared_model
from tests.sft_builders import write_checkpoint, write_data

RATES = (0.9, 0.5, 0.2)
CALL = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def batch():
    return collate(fixed_rows(seed=3, output=24))


@pytest.fixture(scope="module")
def calibrated(batch):
    """The shared model's settings, calibrated by one batch."""
    found = margins_of(shared_model(), [batch], 1)
    quantiles = {kind: quantiles_of(each) for kind, each in found.items()}
    return replace(shared_model().config.sparsity, calibration=quantiles)


@pytest.fixture
def model(calibrated, monkeypatch):
    monkeypatch.setattr(shared_model().config, "sparsity", calibrated)
    return shared_model()


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=300, unique=True), st.floats(0, 1))
def test_a_threshold_keeps_the_rate(values, rate):
    margin = torch.tensor(values, dtype=torch.float64)
    quantiles = quantiles_of([margin])
    kept = float((margin > threshold_at(quantiles, rate)).double().mean())
    assert kept == rate if rate in (0, 1) else abs(kept - rate) <= 0.01 + 1 / len(values)
    check_calibration({"output": quantiles})


@torch.no_grad()
@pytest.mark.parametrize("rate", RATES)
def test_a_pass_keeps_what_is_asked_of_the_tokens_it_was_calibrated_by(model, batch, rate):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "output_mask", "pixel_values")}
    record = model(**inputs, output_keep_rate=rate, use_cache=False).sparsity
    assert abs(float(record.output_keep_rate) - rate) <= 0.01 + 1 / int(batch["output_mask"].sum())
    model.config.sparsity = replace(model.config.sparsity, image_selection="threshold")
    record = model(**inputs, image_keep_rate=rate, use_cache=False).sparsity
    assert abs(float(record.image_keep_rate) - rate) <= 0.01 + 1 / int((batch["input_ids"] == 3).sum())


@torch.no_grad()
def test_margins_do_not_depend_on_the_batch_or_on_decisions(model, batch):
    rows = fixed_rows(seed=3, output=24)
    together = margins_of(model, [batch], 1)
    apart = margins_of(model, [collate([row]) for row in rows], 1)
    for kind, margins in together.items():
        torch.testing.assert_close(apart[kind], margins, rtol=1e-4, atol=1e-4)
    assert [len(each) for each in together["output"]] == [24] * len(rows) and len(together["image"]) == 6
    assert not margins_of(model, [batch], 25)["output"], "answers of 24 tokens are too short"


@torch.no_grad()
def test_generate_with_a_rate_is_generate_with_its_threshold(model):
    inputs, rate = prompts(fixed_rows(seed=4)), 0.35
    threshold = threshold_at(model.config.sparsity.calibration["output"], rate)
    by_rate = model.generate(**inputs, **CALL, output_keep_rate=rate)
    by_threshold = model.generate(**inputs, **CALL, output_threshold=threshold)
    assert torch.equal(by_rate.sequences, by_threshold.sequences)
    assert torch.equal(by_rate.sparsity.keep_mask, by_threshold.sparsity.keep_mask)
    random = model.generate(**inputs, **CALL, method="random", output_keep_rate=0.5)
    spelled = model.generate(**inputs, **CALL, method={"name": "random", "output_keep_rate": 0.5})
    assert torch.equal(random.sequences, spelled.sequences), "a rate is that of any method which has one"


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_a_budget_is_the_bytes_of_its_rate(model, share):
    """Evenly spaced tokens keep the rate exactly, so the cache of the longest row is as large as the budget says."""
    inputs, config = prompts(fixed_rows(seed=5)), model.config
    method, size = Dynamic.from_config(config.sparsity), 4
    text = config.text_config
    one = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * size
    above = text.num_hidden_layers - method.layer

    def filled(rate):
        exact = replace(method, output_selection="spread", output_keep_rate=rate)
        out = model.generate(**inputs, **CALL, method=exact)
        return one * int(out.sparsity.tokens_per_layer().sum(1).max())

    least, most = filled(0.0001), filled(1.0)
    allowed = int(least + share * (most - least))
    rate = keep_rate_within(allowed, config, method, inputs, CALL["max_new_tokens"], size)
    assert allowed - one * above < filled(round(rate, 4)) <= allowed
    by_budget = model.generate(**inputs, **CALL, kv_budget=allowed)
    assert torch.equal(by_budget.sequences, model.generate(**inputs, **CALL, output_keep_rate=rate).sequences)
    assert keep_rate_within(10**9, config, method, inputs, 12, size) == 1


@torch.no_grad()
@pytest.mark.parametrize("share", [0.1, 0.45, 0.8])
def test_a_budget_counts_the_window(model, share):
    """Of evenly spaced tokens: the cache of the longest row is as large as the budget says, but for a token or two."""
    inputs, window, size = prompts(fixed_rows(seed=5)), 3, 4
    method = replace(Dynamic.from_config(model.config.sparsity), output_window=window)
    text = model.config.text_config
    one = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * size

    def filled(rate):
        exact = replace(method, output_selection="spread", output_keep_rate=rate)
        return one * int(model.generate(**inputs, **CALL, method=exact).sparsity.tokens_per_layer().sum(1).max())

    least, most = filled(0.0001), filled(1.0)
    allowed, above = int(least + share * (most - least)), text.num_hidden_layers - method.layer
    assert most - least == one * above * (CALL["max_new_tokens"] - 1 - window)
    rate = keep_rate_within(allowed, model.config, method, inputs, CALL["max_new_tokens"], size)
    assert abs(filled(round(rate, 4)) - allowed) <= 2 * one * above
    assert keep_rate_within(least, model.config, method, inputs, CALL["max_new_tokens"], size) == LEAST_RATE
    short = replace(method, output_window=50)
    assert keep_rate_within(most, model.config, short, inputs, CALL["max_new_tokens"], size) == 1


@torch.no_grad()
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_budget_counts_what_a_live_cache_holds(model, share):
    """A second turn with evenly spaced tokens: at its end the longest row's cache is as large as the budget says."""
    inputs, size, text = prompts(fixed_rows(seed=5)), 4, model.config.text_config
    method = Dynamic.from_config(model.config.sparsity)
    one = 2 * text.num_key_value_heads * text.hidden_size // text.num_attention_heads * size
    above, new = text.num_hidden_layers - method.layer, 6

    def second_turn():
        """Return all ids so far, whose last ones are a question, and a cache of the first turn."""
        first = model.generate(**inputs, **CALL)
        rows, begun = len(first.sequences), inputs["input_ids"].shape[1]
        ids = torch.cat([first.sequences, torch.full((rows, new), 7)], dim=1)
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, begun:])], dim=1)
        output = (columns >= begun) & (columns < first.sequences.shape[1])
        return {"input_ids": ids, "attention_mask": mask, "output_mask": output, CACHE: first.cache}

    def filled(rate):
        exact = replace(method, output_selection="spread", output_keep_rate=rate)
        record = model.generate(**second_turn(), **CALL, method=exact).sparsity
        return one * int((method.layer * record.dense_cache_lengths + above * record.cache_lengths).max())

    least, most = filled(0.0001), filled(1.0)
    allowed = int(least + share * (most - least))
    rate = keep_rate_within(allowed, model.config, method, second_turn(), CALL["max_new_tokens"], size)
    assert abs(filled(round(rate, 4)) - allowed) <= 2 * one * above, "but for the token between the turns, and rounding"
    by_budget = model.generate(**second_turn(), **CALL, kv_budget=allowed)
    by_rate = model.generate(**second_turn(), **CALL, output_keep_rate=rate)
    assert torch.equal(by_budget.sequences, by_rate.sequences)
    with pytest.raises(ValueError, match="the longest row takes"):
        model.generate(**second_turn(), **CALL, kv_budget=least // 2)


@torch.no_grad()
def test_sinks_are_part_of_an_asked_rate(batch, monkeypatch):
    """With 6 sinks in answers of 24 tokens: 0.5 is met, and of 0.1 the sinks are left."""
    settings = replace(shared_model().config.sparsity, output_sinks=6, output_window=2)
    monkeypatch.setattr(shared_model().config, "sparsity", settings)
    found = margins_of(shared_model(), [batch], 1)
    assert all(one[:6].isposinf().all() and one[6:].isfinite().all() for one in found["output"])
    quantiles = {kind: quantiles_of(each) for kind, each in found.items()}
    monkeypatch.setattr(shared_model().config, "sparsity", replace(settings, calibration=quantiles))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "output_mask", "pixel_values")}
    for asked, met in ((0.5, 0.5), (0.1, 0.25)):
        record = shared_model()(**inputs, output_keep_rate=asked, use_cache=False).sparsity
        assert abs(float(record.output_keep_rate) - met) <= 0.01 + 1 / int(batch["output_mask"].sum())
    with pytest.raises(ValueError, match="every token of these answers is a sink"):
        quantiles_of([torch.full((3,), torch.inf)])
    with pytest.raises(ValueError, match="not finite"):
        quantiles_of([torch.tensor([0.0, torch.nan])])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"kv_budget": 1000}, r"the longest row takes [\d,]+ without any output token behind layer 2; give more"),
        (
            {"kv_budget": 1000, "method": {"name": "dynamic", "output_window": 9, "output_sinks": 7}},
            r"with the 11 output tokens of window and sinks behind layer 2; give more",
        ),
        ({"kv_budget": "12 pounds"}, "'12 pounds' is no number of bytes"),
        ({"kv_budget": "1MiB", "output_keep_rate": 0.5}, "kv_budget and output_keep_rate both say"),
        ({"kv_budget": "1MiB", "method": "fastv"}, "kv_budget means nothing to method 'fastv'"),
        ({"kv_budget": "1MiB", "sparsity": "image"}, "decides by none"),
        ({"output_keep_rate": 0.5, "output_threshold": 1.0}, "both say where the threshold is"),
        ({"output_keep_rate": 0.5, "sparsity": "image"}, "output_keep_rate has no use with sparsity='image'"),
        ({"output_keep_rate": 1.5}, "output_keep_rate=1.5 is not a keep rate"),
        ({"output_keep_rate": 0.5, "method": "fastv"}, "means nothing to method 'fastv'"),
    ],
)
def test_what_cannot_be_is_said(model, asked, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**prompts(fixed_rows(seed=5)), **CALL, **asked)


def test_a_rate_needs_a_calibration():
    remedy = r"has not been calibrated: run python -m dynamic_llava\.calibrate MODEL --data FILE"
    for settings, asked in (
        (SparsityConfig(), {"output_keep_rate": 0.5}),
        (SparsityConfig(image_selection="threshold"), {"image_keep_rate": 0.5}),
    ):
        with pytest.raises(ValueError, match=remedy):
            choose_method(settings, **asked)
    assert choose_method(SparsityConfig(), image_keep_rate=0.5).image_keep_rate == 0.5


@pytest.mark.parametrize(("said", "size"), [(7, 7), ("1 KB", 1000), ("1.5KiB", 1536), ("512MiB", 2**29)])
def test_bytes(said, size):
    assert bytes_of(said) == size


@pytest.mark.parametrize("said", [0, -1, True, "MiB", "5 MB per row", "1kb", "0B"])
def test_no_bytes(said):
    with pytest.raises(ValueError, match="is no number of bytes"):
        bytes_of(said)


@pytest.mark.parametrize("value", [[1.0], {"text": [0.0, 1.0]}, {"output": [1.0]}, {"output": "ab"}])
def test_a_spoilt_calibration_is_named(value):
    with pytest.raises(ValueError, match=r"calibration.*run python -m dynamic_llava\.calibrate again"):
        SparsityConfig(calibration=value)


@pytest.mark.parametrize("values", [[1.0, 0.0], [0.0, float("nan")], [0.0, True]])
def test_quantiles_ascend_and_are_finite(values):
    with pytest.raises(ValueError, match="calibration of 'image'"):
        SparsityConfig(calibration={"image": values})


def test_a_run_sets_no_calibration():
    with pytest.raises(ValueError, match="measured on a trained model"):
        RunConfig(sparsity=SparsityConfig(calibration={"output": [0.0, 1.0]}))


def test_the_command_writes_into_the_checkpoint_and_nothing_else(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "model", output_min_length=8)
    file, images = write_data(tmp_path / "data")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = [str(folder), "--data", str(file), "--image-folder", str(images), "--batch-size", "5"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "calibrated by 12 samples" in said and len(re.findall(r"^\| \d+% \|", said, re.MULTILINE)) == 5
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in after if before.get(name) != after[name]} == {"config.json"}
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    calibration = new["sparsity"].pop("calibration")
    assert old == new and set(calibration) == {"image", "output"} and len(calibration["output"]) == 101
    model = DynamicLlavaForConditionalGeneration.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["sparsity"]["calibration"] == calibration
    assert main([*words, "--min-length", "30"]) == 2
    assert "lower --min-length" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == after["config.json"]


def test_samples_without_an_image_calibrate_output_tokens_alone(tmp_path, capsys):
    """As a model is trained on them with data.text_only: sparse; left out, nothing is there to calibrate by."""
    folder = write_checkpoint(tmp_path / "model", output_min_length=8)
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "That is what there is to say of it."}]
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(4)]))
    words = [str(folder), "--data", str(file)]
    assert main(words) == 2
    assert "4 text-only skipped" in capsys.readouterr().err
    assert main([*words, "--text-only", "sparse"]) == 0
    assert "calibrated by 4 samples" in capsys.readouterr().out
    calibration = json.loads((folder / "config.json").read_text())["sparsity"]["calibration"]
    assert set(calibration) == {"output"}


def test_what_cannot_be_calibrated_is_said_in_one_line(tmp_path, capsys):
    file, images = write_data(tmp_path / "data")
    dense = write_checkpoint(tmp_path / "dense", dense=True)
    for words, message in (
        ([dense], "holds no trained predictors"),
        ([tmp_path / "none"], "holds no config.json"),
        ([dense, "--samples", 0], "--samples 0 is not possible"),
    ):
        assert main([*map(str, words), "--data", str(file), "--image-folder", str(images)]) == 2
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("error: ") and message in error
