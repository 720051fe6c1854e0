"""DeepSpeed's files and its start: what is shipped, what is refused, and that no tensor is left random."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file, save_file

from dynamic_llava.config import DataConfig, ModelConfig, TrainConfig
from dynamic_llava.profile.training import sharding_of
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.train import distributed
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.distributed import join, read_deepspeed, zero_stage
from dynamic_llava.train.run import load, run, training_arguments
from tests.builders import TINY_SPARSITY
from tests.sft_builders import write_checkpoint, write_data

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"
ZERO3 = str(CONFIGS / "zero3.json")


def test_the_shipped_files_are_read_and_leave_the_run_its_values():
    stages = {path.stem: zero_stage(read_deepspeed(str(path))) for path in CONFIGS.glob("*.json")}
    assert stages == {"zero2": 2, "zero3": 3, "zero3_offload": 3}
    for path in CONFIGS.glob("*.json"):
        settings = read_deepspeed(str(path))
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert settings[name] == "auto", f"{path.name}: {name} is the run's"
        assert settings["gradient_clipping"] == settings["bf16"]["enabled"] == "auto"
    assert zero_stage(None) == zero_stage({}) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no valid JSON"),
        ("[]", r"holds \[\]; a DeepSpeed file is a JSON object"),
        ("null", "holds null; a DeepSpeed file is a JSON object"),
        ("[" * 100_000, "is no valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is no valid JSON"),
        (b'{"zero_optimization": {"stage": 2}, "a": "\xff"}', "is no valid JSON: 'utf-8' codec"),
        ('{"zero_optimization": "3"}', 'zero_optimization is "3"; it must be a JSON object'),
        ('{"zero_optimization": [3]}', r"zero_optimization is \[3\]; it must be a JSON object"),
        ('{"zero_optimization": null}', "sets no zero_optimization.stage"),
        ('{"zero_optimization": {"stage": "3"}}', r'sets no zero_optimization.stage of 1, 2 or 3 .it is "3"'),
        ('{"zero_optimization": {"stage": true}}', "sets no zero_optimization.stage of 1, 2 or 3 .it is true"),
        ('{"zero_optimization": {"stage": 2.0}}', "sets no zero_optimization.stage of 1, 2 or 3 .it is 2.0"),
        ('{"zero_optimization": {"stage": [2]}}', r"sets no zero_optimization.stage of 1, 2 or 3 .it is \[2\]"),
        ('{"zero_optimization": {"stage": 2, "offload_param": "cpu"}}', 'offload_param is "cpu"; it must be'),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": []}}}', r"offload_param.device is \[\];"),
        ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": {}}}', "zero_optimization.reduce_bucket_size is"),
        ('{"zero_optimization": {"stage": 2}, "bf16": true}', "bf16 is true; it must be a JSON object"),
        ('{"zero_optimization": {"stage": 2}, "train_batch_size": NaN}', "train_batch_size is NaN; it must"),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": "1"}', 'gradient_clipping is "1"; it must'),
        ('{"zero_optimization": {"stage": 2}, "optimizer": null}', "section 'optimizer'"),
        ('{"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": "no"}}', "save: true"),
        ("{}", "sets no zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 4}}', "sets no zero_optimization.stage of 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}', "section 'optimizer', which would"),
        ('{"zero_optimization": {"stage": 2}, "scheduler": {}}', "section 'scheduler'"),
        ('{"zero_optimization": {"stage": 3}}', "stage3_gather_16bit_weights_on_model_save: true"),
    ],
)  # fmt: skip
def test_a_file_that_would_not_do_what_the_run_says_is_refused(tmp_path, text, message):
    (tmp_path / "ds.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_deepspeed(str(tmp_path / "ds.json"))
    assert str(error.value).startswith(str(tmp_path / "ds.json")) and type(error.value) is ValueError
    with pytest.raises(FileNotFoundError, match="there is no DeepSpeed file"):
        read_deepspeed(str(tmp_path / "nowhere.json"))


MUTATIONS = (None, True, 0, -1, 3, 2.5, float("nan"), "", "3", [], [1], {}, {"stage": 3})


def test_a_mutated_file_is_read_or_refused_by_name(tmp_path):
    """Every value of the shipped files in turn replaced by every kind of JSON: all readers take it, or it is named."""
    file, refused = tmp_path / "ds.json", 0
    for path in CONFIGS.glob("*.json"):
        for place in places(json.loads(path.read_text())):
            for value in MUTATIONS:
                settings = json.loads(path.read_text())
                put(settings, place, value)
                file.write_text(json.dumps(settings))
                try:
                    read = read_deepspeed(str(file))
                except ValueError as error:
                    assert type(error) is ValueError and str(file) in str(error)
                    refused += 1
                else:
                    assert zero_stage(read) in (1, 2, 3)
                    sharding_of(read, 2, 64)
                    HfDeepSpeedConfig(read).is_true("bf16.enabled")
    assert refused > 100


def places(settings, above=()):
    for name, value in settings.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from places(value, (*above, name))


def put(settings, place, value):
    *above, last = place
    for name in above:
        settings = settings[name]
    settings[last] = value


def test_settings_that_exclude_one_another():
    with pytest.raises(ValueError, match="clip_predictors_separately needs whole gradients"):
        TrainConfig(deepspeed=ZERO3, clip_predictors_separately=True)
    with pytest.raises(ValueError, match="main job trains in one process"):
        JobConfig(train=TrainConfig(deepspeed=ZERO3))
    half = ModelConfig(dtype="bfloat16")
    for train in (TrainConfig(), TrainConfig(bf16=True), TrainConfig(deepspeed=ZERO3)):
        with pytest.raises(ValueError, match="would lose the small updates"):
            RunConfig(model=half, train=train)
    RunConfig(model=half, train=TrainConfig(bf16=True, deepspeed=ZERO3))


def test_deepspeed_without_a_launcher_is_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    config = RunConfig(train=TrainConfig(deepspeed=ZERO3))
    with pytest.raises(ValueError, match=r"needs a launcher \(RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR is not set"):
        join(training_arguments(config))


def test_processes_that_do_not_find_one_another_are_refused(monkeypatch):
    """accelerate falls back to one process, without a word, under launchers and settings that it does not expect."""
    monkeypatch.setattr(distributed, "TrainingArguments", lambda **arguments: SimpleNamespace(world_size=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but this process found 1: each would train alone"):
        join({})


HEAD, UP = "lm_head.weight", "model.language_model.layers.3.mlp.up_proj.weight"
DAMAGES = {
    "missing": (lambda weights: weights.pop(HEAD), r"missing tensors lm_head\.weight"),
    "misshapen": (lambda weights: weights.update({UP: torch.ones(3, 3)}), r"wrongly shaped tensors .*up_proj"),
    "unknown": (lambda weights: weights.update(extra=torch.ones(2)), "tensors without a place extra"),
    "part of a predictor": (
        lambda weights: weights.pop("model.language_model.output_predictor.head.4.bias"),
        r"missing tensors .*output_predictor\.head\.4\.bias",
    ),
}


@pytest.mark.parametrize("deepspeed", [None, ZERO3], ids=["alone", "zero3"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_ends_the_run_before_it_trains(tmp_path, damage, deepspeed):
    base = write_checkpoint(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    spoil, message = DAMAGES[damage]
    spoil(weights)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    file, images = write_data(tmp_path, samples=4)
    config = RunConfig(
        output_folder=str(tmp_path / "runs"),
        model=ModelConfig(base=str(base)),
        data=DataConfig(json=str(file), image_folder=str(images)),
        sparsity=TINY_SPARSITY,
        train=TrainConfig(max_steps=1, batch_size=2, deepspeed=deepspeed),
    )
    with pytest.raises(ValueError, match=message) as error:
        run(config)
    assert str(base) in str(error.value)
    assert not (config.folder / "metrics.jsonl").exists() and not (config.folder / "model").exists()


def test_a_whole_or_dense_base_passes_the_check_that_reads_no_value(tmp_path):
    from dynamic_llava import DynamicLlavaForConditionalGeneration as Model

    for dense in (False, True):
        base = write_checkpoint(tmp_path / f"{dense}", dense=dense)
        Model.check_checkpoint(base, sparsity=TINY_SPARSITY.to_dict())
        files = json.loads((base / "config.json").read_text())
        files["text_config"]["intermediate_size"] += 8
        (base / "config.json").write_text(json.dumps(files))
        with pytest.raises(ValueError, match="wrongly shaped tensors"):
            Model.check_checkpoint(base, sparsity=TINY_SPARSITY.to_dict())


def test_a_checkpoint_in_several_files_is_checked_too(tmp_path):
    from dynamic_llava import DynamicLlavaForConditionalGeneration as Model
    from tests.builders import build_model

    build_model().save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    Model.check_checkpoint(tmp_path)
    (first, *_) = sorted(tmp_path.glob("*.safetensors"))
    weights = load_file(first)
    weights.popitem()
    save_file(weights, first, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing tensors"):
        Model.check_checkpoint(tmp_path)


def test_new_predictors_depend_on_the_seed_alone(tmp_path):
    config = RunConfig(model=ModelConfig(base=str(write_checkpoint(tmp_path, dense=True))), sparsity=TINY_SPARSITY)

    def predictors(seed, draws):
        torch.manual_seed(seed)
        torch.rand(draws)
        state = torch.get_rng_state()
        model, _ = load(config)
        assert torch.equal(state, torch.get_rng_state()), "loading draws nothing from the run's generator"
        return torch.cat([value.flatten() for name, value in model.state_dict().items() if "_predictor." in name])

    assert torch.equal(predictors(1, 0), predictors(1, 99))
    assert not torch.equal(predictors(1, 0), predictors(2, 0))
