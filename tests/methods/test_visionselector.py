"""VisionSelector: its scores begin near 0, its soft top-k has the gradient of one, and it trains before a frozen model.

Decisions on every path, in every family: tests/methods/test_references.py.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dynamic_llava import DynamicLlavaForConditionalGeneration
from dynamic_llava.config import DataConfig, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.costs import llava_shape, parameter_counts
from dynamic_llava.engine.learned import learned_costs
from dynamic_llava.methods import Draw, ImageTokens, VisionSelector
from dynamic_llava.methods.visionselector import ImportanceScorer
from dynamic_llava.train.config import RunConfig
from dynamic_llava.train.run import load, run
from tests.builders import HIDDEN, TINY_SPARSITY, build_model, fixed_rows, prompts, tiny_config, training_passes
from tests.sft_builders import write_checkpoint, write_data

METHOD = {"name": "visionselector", "image_keep_rate": 0.25}
SPARSITY = replace(TINY_SPARSITY, method=METHOD)
WEIGHTS = ("query", "key", "query_bias", "key_bias")
OWN = {f"model.language_model.method.{name}" for name in WEIGHTS}


def config_of(folder, **train):
    known = {"batch_size": 4, "max_steps": 2, "tune": "predictors", "predictor_learning_rate": 1e-2, "log_every": 1}
    return RunConfig(
        name="run",
        output_folder=str(folder / "runs"),
        model=ModelConfig(base=str(folder / "base")),
        data=DataConfig(json=str(folder / "data.json"), image_folder=str(folder / "images"), max_length=400),
        sparsity=SPARSITY,
        train=TrainConfig(**known | train),
    )


def memberships(scores, count):
    """sigmoid(score + t) of one image, where t makes them sum to `count`; t by Newton's method, differentiable."""
    t = torch.zeros((), dtype=scores.dtype)
    for _ in range(60):
        found = torch.sigmoid(scores + t)
        t = t - (found.sum() - count) / (found * (1 - found)).sum()
    return torch.sigmoid(scores + t)


def test_training_keeps_the_budget_with_the_gradient_of_the_soft_top_k():
    torch.manual_seed(0)
    scorer, method = ImportanceScorer(8).double(), VisionSelector(image_keep_rate=0.5)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter.normal_(std=0.5)
    valid = torch.arange(9) < torch.tensor([[9], [6]])
    images = ImageTokens(torch.randn(2, 9, 8).double(), valid, torch.arange(2))
    keep = method.sample(None, images, scorer, Draw(tau=0.3, settings=SparsityConfig()))
    assert keep.sum(1).tolist() == [4, 3] and set(keep[valid].tolist()) == {0, 1}
    assert keep.bool().equal(method.keep_image(None, images, scorer) & valid)
    weight = torch.randn(2, 9).double()
    found = torch.autograd.grad((keep * weight)[valid].sum(), [*scorer.parameters()])
    scores = scorer(images.hidden, valid).double()
    soft = sum((memberships(scores[i, :n], k) * weight[i, :n]).sum() for i, (n, k) in enumerate(((9, 4), (6, 3))))
    wanted = torch.autograd.grad(soft, [*scorer.parameters()])
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_it_trains_before_a_frozen_model_and_travels_with_it(tmp_path):
    write_checkpoint(tmp_path / "base", dense=True)
    write_data(tmp_path, samples=8)
    config = config_of(tmp_path)
    before, _ = load(config)
    scorer = before.model.language_model.method
    assert 5e-5 < scorer.query.std() < 2e-4 and not scorer.key_bias.any(), "what trains begins near 0"
    assert before.config.untrained_predictors == ["method"]
    trained = run(config)
    for line in trained.history:
        assert line["loss"] == line["lm_loss"] and line["image_keep_rate"] == pytest.approx(0.25)
        assert line["mask_gradient"] > 0 and "output_keep_rate" not in line
    after, start = load_file(trained.folder / "model.safetensors"), before.state_dict()
    assert set(after) >= OWN and not any("_predictor" in name for name in after)
    moved = {name for name, value in after.items() if not value.equal(start[name])}
    assert moved and moved <= OWN, "the model stays as it is"
    stored = json.loads((trained.folder / "config.json").read_text())
    assert stored["sparsity"]["method"] == METHOD and stored["untrained_predictors"] == []
    model = DynamicLlavaForConditionalGeneration.from_pretrained(trained.folder).eval()
    batch = prompts(fixed_rows(seed=20, output=0))
    own = model(**batch).sparsity
    assert all(len(image) == 4 for row in own.image_indices for image in row)
    less = model(**batch, method={**METHOD, "image_keep_rate": 0.125}).sparsity
    assert all(len(image) == 2 for row in less.image_indices for image in row)


def test_a_checkpoint_without_its_weights_is_refused():
    with pytest.raises(ValueError, match="'visionselector' decides by weights of its own, and this checkpoint"):
        build_model()(**prompts(fixed_rows(output=0)), method="visionselector")


def test_every_weight_has_a_gradient_whatever_a_batch_holds():
    model = DynamicLlavaForConditionalGeneration(tiny_config(method=METHOD)).train()
    for _ in training_passes(model):
        assert all(parameter.grad is not None for parameter in model.model.language_model.method.parameters())


def test_what_it_costs():
    costs = learned_costs(SPARSITY, HIDDEN)["method"]
    built = ImportanceScorer(HIDDEN)
    assert costs.parameters == sum(weight.numel() for weight in built.parameters()) == 2 * 1792 * (HIDDEN + 1)
    assert costs.flops == 2 * (built.query.numel() + built.key.numel()) and costs.judges_images
    shape = llava_shape(tiny_config(method=METHOD))
    assert parameter_counts(shape, learned_costs(SPARSITY, HIDDEN))["method"] == costs.parameters
    with torch.device("meta"):
        published = ImportanceScorer(3584)
    assert sum(weight.numel() for weight in published.parameters()) == 12_848_640, "12.85 M, as published"
