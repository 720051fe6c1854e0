"""A random language model of four layers in place of SmolLM2, and a job that takes seconds on it."""

from dataclasses import replace

from dynamic_llava.config import DataConfig, DistillConfig, KeepRateSchedule, ModelConfig, SparsityConfig, TrainConfig
from dynamic_llava.smol.config import SmolConfig, SmolJobConfig
from tests.checkpoints.test_assemble import FAMILIES, language_model

SMALL = SmolConfig(
    train_prompts=6, held_prompts=4, min_tokens=12, max_tokens=30, sample_batch=4, temperature=1.0, windows=(0, 3),
    seeds=1, budgets=(0.6, 0.2), control_window=3, sinks=2, continuation=6, score_batch=3,
)  # fmt: skip


def job_of(folder, language, **changes):
    """Return the job's configuration over a language model's folder; `changes` are of its `smol` section."""
    return SmolJobConfig(
        name="smol",
        output_folder=str(folder),
        model=ModelConfig(base=str(language)),
        data=DataConfig(max_length=300, text_only="sparse"),
        sparsity=SparsityConfig(
            output_keep_rate=0.5, output_min_length=8, predictor_width=16, predictor_heads=2, predictor_mlp=16,
            keep_rate_reduction="applicable",
        ),
        train=TrainConfig(
            tune="predictors", sparsity_mode="output", distill=DistillConfig(), start_keep_rate=0.9,
            keep_rate_schedule=KeepRateSchedule(), predictor_learning_rate=1e-2, batch_size=3, max_steps=2, log_every=1,
        ),
        smol=replace(SMALL, **changes),
    )  # fmt: skip


def write_language(folder):
    """Write the language model; return its folder."""
    language_model(folder, FAMILIES["llama, tied"])
    return folder
