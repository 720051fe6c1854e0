"""Every file in configs/ is read by the program it is for, and says its command and its cost."""

from pathlib import Path

import pytest

from dynamic_llava.cli import read_yaml
from dynamic_llava.train.config import RunConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OTHER_PROGRAMS = {"tiny_base.yaml"}
"""Files that `python -m dynamic_llava.train` does not read; their own tests do."""
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name not in OTHER_PROGRAMS)


def test_there_are_configs():
    assert CONFIGS / "tiny.yaml" in RUNS
    assert all((CONFIGS / name).is_file() for name in OTHER_PROGRAMS)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_run_is_read_and_explained(path):
    config = read_yaml(RunConfig, path)
    assert config.name == path.stem, "a run's folder carries the name of its file"
    assert config.model.base
    text = path.read_text(encoding="utf-8")
    head = text[: text.index("\nname:")]
    assert "Command:" in head and "Cost:" in head


def test_the_tiny_job_is_the_papers_method_with_disclosed_changes():
    config = read_yaml(RunConfig, CONFIGS / "tiny.yaml")
    paper = RunConfig().sparsity
    same = ("sparse_layer", "image_keep_rate", "output_keep_rate", "keep_rate_weight", "keep_rate_distance")
    assert all(getattr(config.sparsity, name) == getattr(paper, name) for name in same)
    assert config.tiny is not None and config.train.sparsity_mode == "both"
