"""The whole evaluation on random checkpoints and a few real scenes: every row, and what no batch may change."""

import json
from dataclasses import replace

import pytest
import torch

from dynamic_llava.costs import decoder_shape
from dynamic_llava.eval import predict
from dynamic_llava.methods import Random
from dynamic_llava.model import DynamicLlavaForConditionalGeneration
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.tiny.job import outputs, testset
from dynamic_llava.tiny.job.config import TinyJobConfig
from dynamic_llava.tiny.job.evaluation import Evaluator
from dynamic_llava.tiny.job.outputs import RowFiles
from dynamic_llava.tiny.job.rows import Row, equal_keep_rows
from dynamic_llava.tiny.job.tables import aggregate, answer_columns, table
from tests.tiny_pipeline import write_checkpoint, write_test_set

CONFIG = TinyJobConfig(
    questions=11, descriptions=5, uncached_questions=4, uncached_descriptions=2, batch_size=4, description_tokens=16,
    timing_batch=2, timing_tokens=2, timing_repeats=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    checkpoints = {key: write_checkpoint(folder / key, seed) for seed, key in enumerate(("control", "image", "both"))}
    test = write_test_set(folder).first(CONFIG.questions, CONFIG.descriptions)
    return {"base": checkpoints["control"], **checkpoints}, test


@pytest.fixture(scope="module")
def evaluated(world):
    checkpoints, test = world
    lines = []
    evaluator = Evaluator(checkpoints, test, CONFIG, say=lines.append)
    return evaluator, evaluator.run(), lines


@pytest.fixture(scope="module")
def model(world):
    model = DynamicLlavaForConditionalGeneration.from_pretrained(world[0]["both"])
    return model, DynamicLlavaProcessor.from_pretrained(world[0]["both"])


def metrics_of(evaluation, key):
    return next(row for row in evaluation.rows if row["key"] == key)["metrics"]


def untimed(metrics):
    return {name: value for name, value in metrics.items() if name not in ("prefill_ms", "decode_ms")}


def test_every_row_is_measured_and_reported(evaluated):
    _, evaluation, lines = evaluated
    keys = [row["key"] for row in evaluation.rows]
    assert keys == [
        "base", "control", "dynamic_image", "dynamic", "uncached", "dynamic_subset", "fastv", "random_image",
        "no_image", "random_output", "alternate_output", "inside_random", "inside_alternate", "inside_topk",
        "sinks_output", "recent_output", "inside_sinks", "inside_recent",
    ]  # fmt: skip
    assert len(lines) == len(keys) and evaluation.seconds > 0
    said = set(keys) - {"inside_topk"}
    for key in said:
        assert {"accuracy/all", "ppl", "attribute_recall"} <= set(metrics_of(evaluation, key))
    for key in said - {"dynamic_subset"}:
        assert {"kv_kib", "prefill_gflop_exact", "decode_ms"} <= set(metrics_of(evaluation, key))
    rows = aggregate([{"rows": evaluation.rows}])
    assert r"Dynamic I\|T, no cache" in table(rows, answer_columns(rows))


def test_one_model_in_two_roles_gives_the_same_numbers(evaluated):
    _, evaluation, _ = evaluated
    base, control = (metrics_of(evaluation, key) for key in ("base", "control"))
    assert untimed(base) == untimed(control)


def test_the_row_without_a_cache_equals_the_cached_one(evaluated):
    _, evaluation, _ = evaluated
    agreement = evaluation.agreement
    assert agreement["answers"] == 4 and agreement["descriptions"] == 2
    assert all(value == 1.0 for name, value in agreement.items() if name.endswith("equal"))
    uncached, cached = (metrics_of(evaluation, key) for key in ("uncached", "dynamic_subset"))
    for name in ("accuracy/all", "ppl", "attribute_recall", "keep_output_generated"):
        assert uncached[name] == cached[name]
    assert uncached["kv_kib"] == 0


def test_keep_rates_are_those_of_the_methods(evaluated):
    _, evaluation, _ = evaluated
    for key in ("base", "control"):
        assert metrics_of(evaluation, key)["keep_image"] == metrics_of(evaluation, key)["keep_output_forced"] == 1.0
    for key in ("dynamic", "dynamic_image", "fastv", "random_image", "inside_random"):
        assert metrics_of(evaluation, key)["keep_image"] == 12 / 64  # floor(0.2 * 64) patches
        assert metrics_of(evaluation, key)["image_tokens_per_layer"] == pytest.approx((2 * 64 + 12) / 3)
    assert metrics_of(evaluation, "no_image")["keep_image"] == 0
    assert metrics_of(evaluation, "random_image")["keep_output_forced"] == 1.0
    learned = metrics_of(evaluation, "dynamic")["keep_output_forced"]
    assert 0.05 < learned < 0.95  # mixed decisions, or the rows below show nothing
    for key in ("alternate_output", "inside_alternate", "inside_topk"):
        assert metrics_of(evaluation, key)["keep_output_forced"] == pytest.approx(learned, abs=0.02)
    assert metrics_of(evaluation, "random_output")["keep_output_forced"] == pytest.approx(learned, abs=0.15)


def test_windows_have_the_slots_of_the_learned_selection(evaluated):
    evaluator, evaluation, _ = evaluated
    learned = metrics_of(evaluation, "dynamic")["slots"]
    assert 0.02 < learned < 0.98
    for key in ("base", "control", "dynamic_image", "fastv"):
        assert metrics_of(evaluation, key)["slots"] == 1.0
    for model in ("control", "inside"):
        names = ("sinks_output", "recent_output") if model == "control" else ("inside_sinks", "inside_recent")
        sinks, recent = (metrics_of(evaluation, name)["slots"] for name in names)
        assert learned <= sinks < learned + 0.04  # one step more of a window in answers of about 75 tokens
        assert recent == pytest.approx(learned, abs=0.1)  # drawn: as much in expectation
        assert metrics_of(evaluation, names[0])["keep_output_forced"] < learned
    forced = DynamicLlavaForConditionalGeneration.from_pretrained(evaluator_checkpoint(evaluator))
    batch = evaluator.whole.answers[0].inputs
    record = forced.eval()(**batch, sparsity="both").sparsity
    pairs = seen = 0
    for keep, output in zip(record.keep_mask.bool(), record.layout.output, strict=True):
        kept = keep[output]
        past = torch.ones(len(kept), len(kept)).tril(-1)
        pairs, seen = pairs + int(past.sum()), seen + int((past * kept).sum())
    whole = testset.likelihood(forced, evaluator.whole.answers[:1], switches={"sparsity": "both"})
    assert whole.slots == seen / pairs


def test_measured_rows_are_not_measured_again(world, evaluated, tmp_path, monkeypatch):
    checkpoints, test = world
    more = replace(CONFIG, more_output_rates=[0.35])
    checkpoints = {**checkpoints, "both_35": checkpoints["both"]}
    seen = []
    measure = Evaluator._measure

    def measured(self, row):
        seen.append(row.key)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return measure(self, row)

    monkeypatch.setattr(Evaluator, "_measure", measured)
    with pytest.raises(KeyboardInterrupt):
        Evaluator(checkpoints, test, CONFIG, print, files=RowFiles(tmp_path, "a")).run()
    first = seen[:3]
    first_run = Evaluator(checkpoints, test, CONFIG, print, files=RowFiles(tmp_path, "a")).run()
    assert not {*first} & {*seen[4:]} and len({*seen}) == len(first_run.rows) - 1  # the subset row computes nothing
    for row in first_run.rows:
        assert untimed(row["metrics"]) == untimed(metrics_of(evaluated[1], row["key"]))
    for key, output in evaluated[1].outputs.items():
        assert output == first_run.outputs[key]
    del seen[:]
    files = RowFiles(tmp_path, "a")
    added = Evaluator(checkpoints, test, more, print, files=files).run()
    assert seen == ["dynamic_35", "inside_sinks_35", "inside_recent_35"] and not files.older
    assert metrics_of(added, "dynamic_35")["ppl"] == metrics_of(added, "dynamic")["ppl"]
    assert added.rows[0] == first_run.rows[0] and added.outputs["control"] == first_run.outputs["control"]
    monkeypatch.setattr(outputs, "source_digest", lambda: "other code")
    files = RowFiles(tmp_path, "a")
    base = Row("base", "dense base", "base", {"sparsity": "none"})
    assert files.read(base) is not None and files.older == ["base"]
    assert RowFiles(tmp_path, "b").read(base) is None and files.read(replace(base, model="control")) is None
    (tmp_path / "base.json").write_text("{")
    assert files.read(base) is None


def test_one_word_answers_are_shared_and_longer_ones_are_not(evaluated):
    evaluator, evaluation, _ = evaluated
    row = next(row for row in equal_keep_rows(evaluator.settings, 0.5) if row.key == "inside_random")
    assert max(len(answer.tokens) for answer in evaluation.outputs["dynamic"].answers) > 2
    assert not evaluator._shared_answers(row)
    batches = evaluator.whole.questions
    short = [
        predict.generate_answers(
            evaluator.models["both"], evaluator.processor, batches, max_new_tokens=2, switches=switches
        )
        for switches in ({"sparsity": "both"}, row.switches)
    ]
    assert [answer.tokens for answer in short[0]] == [answer.tokens for answer in short[1]]
    before = evaluator.outputs["dynamic"]
    evaluator.outputs["dynamic"] = replace(before, answers=short[0])
    assert evaluator._shared_answers(row) == short[0]
    evaluator.outputs["dynamic"] = before


def test_cache_bytes_are_those_of_the_kept_tokens(evaluated):
    evaluator, evaluation, _ = evaluated
    shape = decoder_shape(evaluator.models["both"].config)
    slot = 2 * shape.kv_width * 4  # keys and values, float32
    for said in evaluation.outputs["dynamic"].descriptions:
        fed = len(said.tokens) - 1
        dense = said.prompt_tokens + fed
        sparse = said.prompt_tokens - 64 + 12 + sum(said.output_kept)
        ended = (2 * slot * 1, slot * 3)  # a row that ended early has fed its end token too: it may have been admitted
        assert said.cache_bytes - (2 * slot * dense + slot * sparse) in {0, *ended}
        assert said.allocated_bytes >= said.cache_bytes
    for said in evaluation.outputs["control"].descriptions:
        assert said.cache_bytes - 3 * slot * (said.prompt_tokens + len(said.tokens) - 1) in {0, 3 * slot}


@pytest.mark.parametrize("switches", [{"sparsity": "both"}, {"method": Random(image_keep_rate=0.2)}], ids=str)
def test_predictions_do_not_depend_on_the_batch(world, model, switches):
    test = world[1].first(5, 3)
    answered = []
    for size in (1, 5):
        batches = testset.prompt_batches(model[1], test.questions, size)
        answered.append(predict.generate_answers(*model, batches, max_new_tokens=8, switches=switches))
    fields = ("tokens", "image_kept", "output_kept", "prompt_tokens", "text")
    for alone, together in zip(*answered, strict=True):
        assert all(getattr(alone, name) == getattr(together, name) for name in fields)


def test_perplexity_is_the_sum_over_samples(world, model):
    test = world[1].first(1, 3)
    together = testset.likelihood(
        model[0], testset.answer_batches(model[1], test.descriptions, 3), switches={"sparsity": "both"}
    )
    alone = [
        testset.likelihood(model[0], testset.answer_batches(model[1], [query], 1), switches={"sparsity": "both"})
        for query in test.descriptions
    ]
    assert together.tokens == sum(one.tokens for one in alone)
    assert together.nll == pytest.approx(sum(one.nll for one in alone), rel=1e-5)
    assert testset.perplexity(together.nll, together.tokens) > 1


def test_perplexity_scores_the_answer_and_its_end(world, model):
    query = world[1].descriptions[0]
    batch = testset.answer_batches(model[1], [query], 1)[0]
    labels = batch.inputs["labels"][0]
    scored = labels[labels != -100].tolist()
    assert model[1].decode(scored[:-1]).strip() == query.answer
    assert scored[-1] == model[0].generation_config.eos_token_id
    assert torch.equal(batch.inputs["output_mask"][0], labels != -100)


def test_overlap_counts_each_image_once(evaluated):
    evaluator, evaluation, _ = evaluated
    rows = {row["key"]: row["metrics"] for row in evaluation.overlap}
    assert set(rows) == {"dynamic", "dynamic_image", "fastv", "random_image"}
    assert all(row["kept_share"] == 12 / 64 for row in rows.values())
    before = len(evaluation.overlap)
    evaluator.add_untrained(evaluation, evaluator_checkpoint(evaluator))
    assert len(evaluation.overlap) == before + 1
    assert evaluation.overlap.pop()["metrics"] == rows["dynamic"]  # the same checkpoint keeps the same patches


def evaluator_checkpoint(evaluator):
    return evaluator.models["both"].config._name_or_path


def test_outputs_are_written_per_row(evaluated, tmp_path):
    evaluator, evaluation, _ = evaluated
    evaluation.write_outputs(tmp_path, evaluator.test)
    lines = [json.loads(line) for line in (tmp_path / "dynamic.jsonl").read_text().splitlines()]
    assert len(lines) == len(evaluator.test.questions) + len(evaluator.test.descriptions)
    assert len({line["id"] for line in lines}) == len(lines)
    assert all(len(line["image_kept"]) == 12 for line in lines)


def test_missing_checkpoints_are_named(world):
    with pytest.raises(ValueError, match=r"\['both', 'control'\] are missing"):
        Evaluator({"base": world[0]["base"]}, world[1], CONFIG)
