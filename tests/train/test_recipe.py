"""A frozen model as its own teacher: sums over a step, where predictors start, rates on a schedule, and resuming."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava.cli import read_yaml
from dynamic_llava.config import DataConfig, DistillConfig, KeepRateSchedule, ModelConfig, TrainConfig
from dynamic_llava.model.switches import choose_method
from dynamic_llava.sparsity import OutputPredictor, gumbel_keep
from dynamic_llava.sparsity.noise import gumbel_noise
from dynamic_llava.sparsity.training import scheduled_keep_rate
from dynamic_llava.train.config import RunConfig, changes, compared_settings, run_method
from dynamic_llava.train.optimizer import prepare
from dynamic_llava.train.run import load, run
from tests.builders import TINY_SPARSITY, build_model, collate, fixed_rows, make_row, predictors, prompt_segments
from tests.sft_builders import take_step, trainer_around, write_checkpoint, write_data

DISTILL = DistillConfig(weight=3.0, temperature=2.0)
LENGTHS = (9, 5, 6)
"""Output tokens of three samples: a step's denominator is none of its batches'."""


def batch_of(places):
    rows = [make_row([*prompt_segments(1, [1, 2]), ("output", LENGTHS[place])], seed=place) for place in places]
    batch = collate(rows)
    del batch["keep_mask"]
    labels = torch.where(batch["output_mask"], batch["input_ids"], -100)
    return {**batch, "labels": labels, "sample_ids": torch.tensor(places)}


def test_a_steps_distillation_does_not_depend_on_how_its_batch_is_split(tmp_path):
    model = prepare(build_model(), RunConfig(train=TrainConfig(tune="predictors")))
    trainer = trainer_around(model, tmp_path, distill=DISTILL)
    batch = batch_of([0, 1, 2])
    terms, _, gradients = take_step(trainer, [batch])
    key = trainer.sample_key(batch.pop("sample_ids"))
    own = model(**batch, tau=trainer.tau(), sample_key=key, distill=DISTILL)
    assert terms["distill_loss"] == pytest.approx(own.distill_loss.item(), rel=1e-6) and own.distill_loss > 0
    assert terms["loss"] == pytest.approx(own.loss.item(), rel=1e-6)
    for split in ([[0], [1, 2]], [[0], [1], [2]]):
        parts = [batch_of(part) for part in split]
        trainer = trainer_around(model, tmp_path, distill=DISTILL, gradient_accumulation=len(split))
        found, _, split_gradients = take_step(trainer, parts)
        assert found == pytest.approx(terms, rel=1e-6, abs=1e-7)
        for part in ("image_predictor", "output_predictor"):
            ours, whole = (
                torch.cat([g.flatten() for name, g in one.items() if part in name])
                for one in (split_gradients, gradients)
            )
            assert (ours - whole).norm() <= 5e-6 * whole.norm() and whole.norm() > 0, part


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_schedule_falls_from_one_to_the_target_and_stays(shape):
    rates = [scheduled_keep_rate(step, 40, 0.2, 0.5, shape) for step in range(41)]
    assert rates[0] == 1 and rates[20:] == [0.2] * 21
    assert sorted(rates, reverse=True) == rates and len(set(rates)) == 21
    assert [rates[step] + rates[20 - step] for step in range(21)] == pytest.approx([1.2] * 21), "symmetric"
    assert rates[10] == pytest.approx(0.6) and (rates[5] == pytest.approx(0.8)) == (shape == "linear")
    assert scheduled_keep_rate(3, 10, 1.0, 1.0, shape) == 1
    for step, total, share in ((5, 4, 0.5), (-1, 4, 0.5), (0, 0, 0.5), (1, 4, 0.0), (1, 4, 1.5)):
        with pytest.raises(ValueError, match=r"does not exist|no share"):
            scheduled_keep_rate(step, total, 0.2, share, shape)


@pytest.mark.parametrize("relaxation", ["gumbel_st", "soft_topk"])
@pytest.mark.parametrize("step", [0, 3, 8])
def test_a_scheduled_step_is_one_with_those_rates(tmp_path, relaxation, step):
    """Losses, decisions and logged targets are those of a model whose settings say the rates; inference's stay."""
    model = build_model(relaxation=relaxation)
    trainer = trainer_around(model, tmp_path, keep_rate_schedule=KeepRateSchedule(share=0.6))
    trainer.state.global_step = step
    batch = batch_of([0, 1, 2])
    terms, (out,), _ = take_step(trainer, [batch])
    left = max(0.0, 1 - step / 6)
    rates = {"image_keep_rate": 0.25 + 0.75 * left, "output_keep_rate": 0.5 + 0.5 * left}
    assert trainer.targets() == pytest.approx(rates)
    logged = trainer.meter.collect(trainer.accelerator, step + 1)
    assert [logged[name.replace("rate", "target")] for name in rates] == pytest.approx(list(rates.values()))
    key = trainer.sample_key(batch.pop("sample_ids"))
    own = model.train()(**batch, tau=trainer.tau(), sample_key=key, **trainer.targets())
    assert torch.equal(out.sparsity.keep_mask, own.sparsity.keep_mask)
    assert terms["loss"] == pytest.approx(own.loss.item(), rel=1e-6)
    assert choose_method(model.config.sparsity).image_keep_rate == 0.25


def test_a_new_predictor_starts_at_its_rate():
    """Sampled decisions on hidden states that it has never seen, at any temperature."""
    torch.manual_seed(0)
    predictor, hidden = OutputPredictor(64, 32), torch.randn(4000, 64)
    for rate in (0.5, 0.9, 0.98):
        predictor.start_at(rate)
        noise = gumbel_noise(torch.arange(4000), torch.zeros(1, dtype=torch.int64))[:, 0]
        for tau in (1.0, 0.1):
            kept = gumbel_keep(predictor(hidden), noise, tau).mean().item()
            assert kept == pytest.approx(rate, abs=0.03)


def config_of(folder, **train):
    settings = {
        "tune": "predictors", "batch_size": 4, "max_steps": 4, "predictor_learning_rate": 1e-3, "log_every": 1,
        "distill": DISTILL, "start_keep_rate": 0.98, "keep_rate_schedule": KeepRateSchedule("cosine", 1.0),
    }  # fmt: skip
    return RunConfig(
        name="run",
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(folder / "base")),
        data=DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=400),
        sparsity=replace(TINY_SPARSITY, output_min_length=14),
        train=TrainConfig(**{**settings, **train}),
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    write_checkpoint(folder / "base", dense=True)
    write_data(folder, samples=16)
    return folder


def test_a_run_resumed_in_the_middle_of_its_schedule_equals_the_undisturbed_one(dense):
    """A frozen model and its new predictors: they start with almost every token, and the same bits come out."""
    config = config_of(dense, save_every=2)
    whole = run(config)
    lines = (config.folder / "metrics.jsonl").read_text().splitlines()
    weights = load_file(whole.folder / "model.safetensors")
    first, targets = json.loads(lines[0]), [line["image_keep_target"] for line in whole.history]
    assert first["image_keep_rate"] > 0.9 and first["output_keep_rate"] > 0.8 and first["distill_loss"] > 0
    assert targets == [scheduled_keep_rate(step, 4, 0.25, 1.0, "cosine") for step in range(4)]
    shutil.rmtree(config.folder / "model")
    again = run(config)
    assert json.loads((config.folder / "environment.json").read_text())["resumed_from_step"] == 2

    def untimed(line):
        return {name: value for name, value in json.loads(line).items() if name != "tokens_per_second"}

    resumed = (config.folder / "metrics.jsonl").read_text().splitlines()
    assert [untimed(line) for line in resumed if "lm_loss" in line] == [untimed(x) for x in lines if "lm_loss" in x]
    assert all(torch.equal(weights[n], tensor) for n, tensor in load_file(again.folder / "model.safetensors").items())
    before = load(config)[0].state_dict()
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in weights if "_predictor" in name}, "the language model stays as it is"


def test_where_predictors_cannot_start(dense, tmp_path):
    model, _ = load(config_of(dense))
    assert all(not predictor.last_bias.any() for predictor in predictors(model)), "without the setting the bias is 0"
    write_checkpoint(dense / "trained")
    with pytest.raises(
        ValueError, match=r"start_keep_rate=0.98 is where new predictors begin, .* a trained image_pred"
    ):
        run(replace(config_of(dense), model=ModelConfig(base=str(dense / "trained")), name="trained"))
    own = replace(TINY_SPARSITY, method={"name": "tests.toys.linear:Linear", "image_keep_rate": 0.3})
    with pytest.raises(ValueError, match=r"sets the last bias of a predictor .* and method is a Scorer"):
        run(replace(config_of(dense), sparsity=own, name="own"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {distill: {weigth: 1}}", r"unknown key train\.distill\.weigth; did you mean train\.distill\.weight\?"),
        ("train: {distill: 2.0}", r"train\.distill is 2\.0; lines of settings are due there: weight, temperature"),
        ("train: {distill: {weight: 0}}", r"train\.distill\.weight=0\.0 must be positive"),
        ("train: {distill: {temperature: -1}}", r"train\.distill\.temperature=-1\.0 must be positive"),
        ("train: {distill: {}, sparsity_mode: none}", r"train\.distill with train\.sparsity_mode='none'"),
        ("train: {start_keep_rate: 1}", r"train\.start_keep_rate=1\.0 must lie between 0 and 1"),
        ("train: {start_keep_rate: .nan}", r"train\.start_keep_rate=nan is no finite number"),
        ("train: {start_keep_rate: 0.9, sparsity_mode: none}", r"train\.start_keep_rate with train\.sparsity_mode"),
        ("train: {keep_rate_schedule: {share: 0}}", r"keep_rate_schedule\.share=0\.0 is a share of the steps"),
        ("train: {keep_rate_schedule: {share: 1.5}}", r"keep_rate_schedule\.share=1\.5 is a share of the steps"),
        ("train: {keep_rate_schedule: {shape: steps}}", r"train\.keep_rate_schedule\.shape: Invalid value 'steps'"),
        ("train: {keep_rate_schedule: linear}", r"train\.keep_rate_schedule is \"?'?linear"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_yaml(RunConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("settings", "sparsity", "method", "message"),
    [
        ({"distill": DISTILL}, {}, "dense", "train.distill with method 'dense'"),
        ({"keep_rate_schedule": KeepRateSchedule()}, {}, "fastv", "train.keep_rate_schedule with method 'fastv'"),
        ({"start_keep_rate": 0.9}, {}, "fastv", "train.start_keep_rate with method 'fastv', which has no predictors"),
        ({"start_keep_rate": 0.9}, {"relaxation": "soft_topk"}, None, "which keeps the budget of the keep rate"),
    ],
)
def test_what_does_nothing_with_a_method_is_refused(settings, sparsity, method, message):
    config = RunConfig(train=TrainConfig(**settings), sparsity=replace(TINY_SPARSITY, **sparsity), method=method)
    with pytest.raises(ValueError, match=message):
        run_method(config)
    assert run_method(RunConfig(train=TrainConfig(distill=DISTILL), method="fastv")).name == "fastv"


def test_old_checkpoints_go_on():
    """A run of an earlier version recorded none of these settings, and they had their defaults' meaning."""
    now = compared_settings(RunConfig(), 1)
    added = {name for name in now if name.split(".")[1:2] in (["distill"], ["start_keep_rate"], ["keep_rate_schedule"])}
    assert len(added) == 3
    then = {name: value for name, value in now.items() if name not in added}
    assert changes(then, now) == []
    other = compared_settings(RunConfig(train=TrainConfig(distill=DISTILL)), 1)
    assert changes(then, other) == [
        "train.distill.temperature was None and is 2.0", "train.distill.weight was None and is 3.0"
    ]  # fmt: skip


def test_a_batch_of_fixed_rows_trains_under_every_setting_at_once(tmp_path):
    """Rows with several images and without any, recomputed activations, separate clipping."""
    model = build_model().train()
    settings = {"distill": DISTILL, "keep_rate_schedule": KeepRateSchedule(), "gradient_checkpointing": True}
    trainer = trainer_around(model, tmp_path, **settings)
    batch = collate(fixed_rows())
    del batch["keep_mask"]
    batch["labels"] = torch.where(batch["output_mask"], batch["input_ids"], -100)
    terms, _, gradients = take_step(trainer, [{**batch, "sample_ids": torch.arange(4)}])
    assert terms["distill_loss"] > 0 and all(torch.isfinite(gradient).all() for gradient in gradients.values())
