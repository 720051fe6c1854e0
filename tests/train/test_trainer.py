"""The Trainer's laws: the loss of a step depends on its samples alone; what is frozen stays; nothing becomes NaN."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.data import Collator, SftDataset
from dynamic_llava.sparsity.noise import fold_key
from dynamic_llava.sparsity.training import temperature
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.optimizer import learning_rates, parts, prepare
from dynamic_llava.train.run import build_trainer, load, run
from tests.builders import TINY_SPARSITY
from tests.sft_builders import conversation, picture, write_checkpoint, write_data

SPARSITY = replace(TINY_SPARSITY, output_min_length=14)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), samples=24)


def config_of(tmp_path, base, data, *, sparsity=SPARSITY, name="run", workers=0, **train):
    settings = {"batch_size": 8, "max_steps": 3, "learning_rate": 1e-3, "predictor_learning_rate": 1e-3, "log_every": 1}
    return RunConfig(
        name=name,
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(base)),
        data=DataConfig(json=str(data[0]), image_folder=str(data[1]), max_length=400, workers=workers),
        sparsity=sparsity,
        train=TrainConfig(**{**settings, **train}),
    )


def trainer_of(config):
    """Return the trainer, and run nothing."""
    model, processor = load(config)
    config.folder.mkdir(parents=True)
    return build_trainer(config, prepare(model, config), processor, SftDataset(config.data, processor))


def weights(result):
    return load_file(result.folder / "model.safetensors")


@pytest.mark.parametrize("reduction", ["batch", "applicable"])
def test_accumulation_changes_nothing(tmp_path, base, data, reduction):
    """8 x 1, 4 x 2 and 2 x 4 samples per step, noise and both regularisers on, label counts uneven."""
    sparsity = replace(SPARSITY, keep_rate_reduction=reduction)
    results = [
        run(
            config_of(
                tmp_path, base, data, sparsity=sparsity, name=f"x{count}", batch_size=8 // count,
                gradient_accumulation=count, max_steps=4,
            )
        )
        for count in (1, 2, 4)
    ]  # fmt: skip
    whole = results[0]
    assert any(line["output_keep_loss"] > 0 for line in whole.history)
    for split in results[1:]:
        for name in ("loss", "lm_loss", "image_keep_loss", "output_keep_loss"):
            for ours, theirs in zip(whole.history, split.history, strict=True):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-7), (name, ours["step"])
        for name in ("image_keep_rate", "output_keep_rate"):
            assert [line[name] for line in whole.history] == [line[name] for line in split.history]
        assert max((weights(split)[name] - tensor).abs().max() for name, tensor in weights(whole).items()) < 1e-5


def test_applicable_differs_from_batch(tmp_path, base, data):
    """Otherwise the test above would prove less than it says: a third of the answers are short."""
    lines = {}
    for reduction in ("batch", "applicable"):
        sparsity = replace(SPARSITY, keep_rate_reduction=reduction)
        config = config_of(tmp_path, base, data, sparsity=sparsity, name=reduction, max_steps=1, batch_size=24)
        lines[reduction] = run(config).history[0]
    assert lines["applicable"]["image_keep_loss"] == pytest.approx(lines["batch"]["image_keep_loss"])
    assert lines["applicable"]["output_keep_loss"] > 1.2 * lines["batch"]["output_keep_loss"]


def test_the_loss_is_the_models_own(tmp_path, base, data):
    """One step's loss equals the model's own mean over the same batch, with the same keys and temperature."""
    config = config_of(tmp_path, base, data, max_steps=1, batch_size=24)
    line = run(config).history[0]
    model, processor = load(config)
    dataset = SftDataset(config.data, processor)
    batch = Collator(processor)([dataset[number] for number in range(24)])
    key = fold_key(config.train.seed, 0, 0, batch.pop("sample_ids"))
    outputs = model.train()(**batch, sparsity="both", tau=1.0, sample_key=key)
    assert line["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert line["lm_loss"] == pytest.approx(outputs.lm_loss.item(), rel=1e-5)
    assert line["image_keep_rate"] == pytest.approx(outputs.sparsity.image_keep_rate.item(), rel=1e-6)
    assert line["output_keep_rate"] == pytest.approx(outputs.sparsity.output_keep_rate.item(), rel=1e-6)
    assert line["mask_gradient"] > 0 and line["tokens_per_second"] > 0


def test_runs_repeat_and_seeds_differ(tmp_path, base, data):
    def losses(name, seed):
        history = run(config_of(tmp_path, base, data, name=name, seed=seed)).history
        return [line["loss"] for line in history]

    assert losses("a", 0) == losses("b", 0) != losses("c", 1)


def test_worker_processes_change_nothing(tmp_path, base, data):
    histories = [run(config_of(tmp_path, base, data, name=f"w{n}", workers=n, max_steps=2)).history for n in (0, 1)]
    assert [line["loss"] for line in histories[0]] == [line["loss"] for line in histories[1]]


def test_temperature_and_keys_follow_the_step(tmp_path, base, data):
    history = run(config_of(tmp_path, base, data, max_steps=3)).history
    assert [line["tau"] for line in history] == pytest.approx([temperature(step, 3) for step in range(3)])
    trainer = trainer_of(config_of(tmp_path, base, data, name="keys"))
    ids = torch.tensor([5, 7])
    before = trainer.sample_key(ids)
    assert torch.equal(before[1:], trainer.sample_key(ids[1:])), "a sample's key does not depend on its batch"
    trainer.state.global_step = 1
    assert not torch.equal(before, trainer.sample_key(ids))


MOVING = {
    "both": {"language_model", "image_predictor", "output_predictor"},
    "image": {"language_model", "image_predictor"},
    "output": {"language_model", "output_predictor"},
    "none": {"language_model"},
}


@pytest.mark.parametrize("mode", MOVING)
def test_only_what_the_mode_trains_moves(tmp_path, base, data, mode):
    config = config_of(tmp_path, base, data, sparsity_mode=mode, weight_decay=0.1)
    before, _ = load(config)
    result = run(config)
    after, _ = load(replace(config, model=ModelConfig(base=str(result.folder))))
    old, new = parts(before), parts(after)
    moved = {part for part in old if any(not torch.equal(a, b) for a, b in zip(old[part], new[part], strict=True))}
    assert moved == MOVING[mode]
    assert ("image_keep_rate" in result.history[0]) == (mode != "none")
    assert ("output_keep_rate" in result.history[0]) == (mode in ("both", "output"))


def test_modes_see_the_same_data(tmp_path, base, data):
    """The dense control is only a control if its samples come in the same order."""
    seen = {}
    for mode in ("both", "none"):
        trainer = trainer_of(config_of(tmp_path, base, data, name=mode, sparsity_mode=mode))
        seen[mode] = [batch["sample_ids"].tolist() for batch in trainer.get_train_dataloader()]
    assert seen["both"] == seen["none"]
    assert sorted(number for batch in seen["both"] for number in batch) == list(range(24))


def test_every_parameter_has_one_part_and_its_rate(tmp_path, base, data):
    config = config_of(tmp_path, base, data, projector_learning_rate=3e-5, predictor_learning_rate=2e-4)
    trainer = trainer_of(config)
    by_part = parts(trainer.model)
    assert sum(map(len, by_part.values())) == len(list(trainer.model.parameters()))
    assert not any(parameter.requires_grad for parameter in by_part["vision_tower"])
    groups = {group["name"]: group for group in trainer.create_optimizer().param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == learning_rates(config.train, config.sparsity)
    assert groups["projector"]["lr"] == 3e-5 and groups["image_predictor"]["lr"] == 2e-4
    assert all(group["weight_decay"] == 0 for group in groups.values())
    head = trainer.model.lm_head.weight
    assert any(parameter is head for parameter in groups["language_model"]["params"])


def test_a_sample_without_learned_tokens_adds_nothing(tmp_path, base):
    """An answer behind max_length leaves a sample without labels: alone it gives 0, beside others it adds 0."""
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    entries = [
        {"id": n, "image": "a.png", "conversations": conversation(f"<image>\n{'x' * 200 if n else 'What?'}", "A cat.")}
        for n in range(4)
    ]
    losses = {}
    for name, chosen in (("beside", entries), ("alone", entries[:1]), ("nothing", entries[1:])):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(entries if name == "beside" else chosen))
        config = config_of(tmp_path, base, (file, tmp_path / "images"), name=name, max_steps=2, batch_size=4)
        config = replace(config, data=replace(config.data, max_length=220))
        losses[name] = [line["lm_loss"] for line in run(config).history]
    assert losses["nothing"] == [0.0, 0.0]
    assert losses["beside"][0] == pytest.approx(losses["alone"][0], rel=1e-5) and losses["alone"][0] > 0


def test_text_only_rows_leave_the_others_sparse(tmp_path, base, data):
    file, images = data
    entries = json.loads(file.read_text())[:6]
    for entry in entries[::2]:
        del entry["image"]
        entry["conversations"] = conversation("What is a cat?", "A small animal that purrs a lot.")
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(entries))
    config = config_of(tmp_path, base, (mixed, images), batch_size=6, max_steps=2)
    line = run(replace(config, data=replace(config.data, text_only="dense"))).history[0]
    assert 0 < line["image_keep_rate"] < 1 and 0 < line["output_keep_rate"] < 1
    text_alone = tmp_path / "text.json"
    text_alone.write_text(json.dumps(entries[::2]))
    config = config_of(tmp_path, base, (text_alone, images), batch_size=3, max_steps=2, name="text")
    line = run(replace(config, data=replace(config.data, text_only="dense"))).history[0]
    assert line["image_keep_loss"] == line["output_keep_loss"] == 0 and line["loss"] == line["lm_loss"]
    config = config_of(tmp_path, base, (text_alone, images), batch_size=3, max_steps=2, name="sparse")
    line = run(replace(config, data=replace(config.data, text_only="sparse"))).history[0]
    assert line["image_keep_loss"] == 0 < line["output_keep_loss"] and 0 < line["output_keep_rate"] < 1


def test_separate_clipping_bounds_every_part(tmp_path, base, data):
    config = config_of(tmp_path, base, data, clip_predictors_separately=True, max_grad_norm=0.5)
    trainer = trainer_of(config)
    for parameters in parts(trainer.model).values():
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 10.0) if parameter.requires_grad else None
    trainer.clip_separately()
    shares = {
        part: [p.grad.norm() for p in found if p.grad is not None] for part, found in parts(trainer.model).items()
    }
    norms = {part: torch.stack(share).norm().item() for part, share in shares.items() if share}
    assert norms == pytest.approx(dict.fromkeys(MOVING["both"], 0.5), rel=1e-4)
    line = run(replace(config, name="whole")).history[0]
    assert {name for name in line if name.startswith("grad_norm_")} == {f"grad_norm_{p}" for p in MOVING["both"]}


def test_gradient_checkpointing_and_bf16(tmp_path, base, data):
    plain = run(config_of(tmp_path, base, data, name="plain", max_steps=2)).history
    recomputed = run(config_of(tmp_path, base, data, name="again", max_steps=2, gradient_checkpointing=True)).history
    half = run(config_of(tmp_path, base, data, name="half", max_steps=2, bf16=True)).history
    assert [line["loss"] for line in recomputed] == pytest.approx([line["loss"] for line in plain], rel=1e-6)
    assert [line["lm_loss"] for line in half] == pytest.approx([line["lm_loss"] for line in plain], rel=0.05)


def test_the_trainer_is_for_training(tmp_path, base, data):
    trainer = trainer_of(config_of(tmp_path, base, data))
    with pytest.raises(RuntimeError, match="belongs to training"):
        trainer.compute_loss(trainer.model.eval(), {})
