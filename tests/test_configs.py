"""Every file in configs/ is read by the program it is for, says its command and its cost, and agrees with the others.

The paper's numbers stand twice, in a run's head for its reader and in a sweep's rows for the table; both must agree.
"""

import functools
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from dynamic_llava import cli
from dynamic_llava.eval.summary import PAPER_COSTS
from dynamic_llava.eval.summary import UNITS as COSTS
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.projectors import PROJECTORS, tokens_of
from dynamic_llava.smol.config import SmolJobConfig
from dynamic_llava.sparsity import budget
from dynamic_llava.sweep.config import TINY, SweepConfig
from dynamic_llava.sweep.plan import make_plan
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.train.config import RunConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OTHER_PROGRAMS = {"tiny_base.yaml"}
"""Files that `python -m dynamic_llava.train` does not read; their own tests do."""
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name not in OTHER_PROGRAMS and path not in SWEEPS)
ABLATIONS = [path for path in RUNS if path.parent.name == "ablations"]
PAPER_SWEEPS = [path for path in SWEEPS if path.name != "tiny.yaml"]
ROWS_OF_THE_TABLES = {
    "table1_fastv_trained": {
        "method.name": "fastv",
        "method.layer": 3,
        "method.image_keep_rate": 0.25,
        "sparsity.dropped_tokens": "zero_vectors",
    },
    "table5_vision_20": {},
    "table5_vision_50": {"sparsity.image_keep_rate": 0.5},
    "table5_vision_80": {"sparsity.image_keep_rate": 0.8},
    "table5_language_20": {"sparsity.output_keep_rate": 0.2},
    "table5_language_50": {},
    "table5_language_80": {"sparsity.output_keep_rate": 0.8},
    "table6_sparse_layer_1": {"sparsity.sparse_layer": 1},
    "table6_sparse_layer_2": {},
    "table6_sparse_layer_4": {"sparsity.sparse_layer": 4},
    "table6_len_ot_0": {"sparsity.output_min_length": 0},
    "table6_len_ot_50": {},
    "table6_len_ot_100": {"sparsity.output_min_length": 100},
    "table6_lambda_10": {"sparsity.keep_rate_weight": 10.0},
    "table6_lambda_100": {},
    "table6_lambda_1000": {"sparsity.keep_rate_weight": 1000.0},
    "table7_masked_softmax": {},
    "table7_zero_vectors": {"sparsity.dropped_tokens": "zero_vectors"},
    "table9_prompt_predictor": {"sparsity.prompt_keep_rate": 0.7},
}
"""File -> what it changes in the main configuration; {}: the row is that run."""

PRINTED_OTHERWISE = {
    ("table7", "VQAv2", "both"),
    ("table9", "VQAv2", "both"),
    ("table2", "MM-Vet", "none"),
    ("table2", "POPE", "image"),
}
"""Table, column and mode of numbers that the paper prints otherwise than in its other tables."""


read_yaml = functools.cache(cli.read_yaml)
"""Configurations are frozen; each file is read once."""


def class_of(path):
    """The files of the tiny and of the smol world's jobs are those of other commands."""
    return {"tiny.yaml": JobConfig, "tiny_long.yaml": JobConfig, "smol.yaml": SmolJobConfig}.get(path.name, RunConfig)


def name_of(path):
    return str(path.relative_to(CONFIGS))


def head_of(path):
    """The comment that a file begins with, without its hashes."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return "\n".join(line[2:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def paper_numbers(path):
    """Table -> header -> number, from the lines `Paper, Table 5: VQAv2 78.8, LVIS PPL 4.88` of a head."""
    found = {}
    for table, numbers in re.findall(r"^Paper, Table (\d+): (.+)$", head_of(path), re.MULTILINE):
        pairs = [part.rsplit(" ", 1) for part in numbers.split(", ")]
        found[f"table{table}"] = {header: float(value) for header, value in pairs}
    return found


def changes(config, base):
    """Dotted name -> value of every setting that differs from those of `base`, names and folders apart."""
    flat, other = (_flat(asdict(one)) for one in (config, base))
    return {name: value for name, value in flat.items() if other.get(name) != value and name != "name"}


def _flat(values, prefix=""):
    return {
        key: leaf
        for name, value in values.items()
        for key, leaf in (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        ).items()
    }


def test_every_file_has_a_reader():
    assert CONFIGS / "tiny.yaml" in RUNS and CONFIGS / "sweeps" / "tiny.yaml" in SWEEPS
    assert all((CONFIGS / name).is_file() for name in OTHER_PROGRAMS)
    assert {path.stem for path in ABLATIONS} == set(ROWS_OF_THE_TABLES)
    assert {path.parent.name for path in CONFIGS.rglob("*.yaml")} == {"configs", "ablations", "projectors", "sweeps"}


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_a_run_is_read_and_explained(path):
    config = read_yaml(class_of(path), path)
    assert config.model.base
    head = head_of(path)
    assert re.search(r"Command: (bash|python -m) ", head) and re.search("Cost: ", head)
    if not path.name.startswith("tiny"):
        assert f"Command: bash scripts/train.sh configs/{name_of(path)}\n" in head
        assert "Paper, Table " in head or "Paper: no number" in head
    if config.train.deepspeed is not None:
        assert (CONFIGS.parent / config.train.deepspeed).is_file()
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if set(raw) == {"extends"}:  # a row that is another file's run: same folder, trained once
        assert config == read_yaml(RunConfig, path.parent / raw["extends"])
    else:
        assert config.name == path.stem, "a run's folder carries the name of its file"


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_the_paper_recipe_spells_out_every_value(size):
    """Sections that stand for other ways of training (`lora`) apart, and what no run may set (`calibration`)."""
    raw = yaml.safe_load((CONFIGS / f"dynamic_llava_{size}.yaml").read_text(encoding="utf-8"))

    def untold(config_class, values, prefix=""):
        types = get_type_hints(config_class)
        for field in fields(config_class):
            kind = types[field.name]
            if is_dataclass(kind):
                yield from untold(kind, values.get(field.name, {}), f"{prefix}{field.name}.")
            elif field.name not in {*values, "calibration"} and not any(map(is_dataclass, get_args(kind))):
                yield f"{prefix}{field.name}"

    assert list(untold(RunConfig, raw)) == []
    config = read_yaml(RunConfig, CONFIGS / f"dynamic_llava_{size}.yaml")
    defaults = RunConfig().sparsity
    assert {name: value for name, value in changes(config, RunConfig()).items() if name.startswith("sparsity")} == {}
    paper = (0.2, 0.5, 2, 50, 100.0, "squared", "batch", "gumbel_st", "masked_softmax", "last")
    names = (
        "image_keep_rate", "output_keep_rate", "sparse_layer", "output_min_length", "keep_rate_weight",
        "keep_rate_distance", "keep_rate_reduction", "relaxation", "dropped_tokens", "output_segments",
    )  # fmt: skip
    assert tuple(getattr(defaults, name) for name in names) == paper
    train = config.train
    assert train.batch_size * train.gradient_accumulation * 8 == 64
    assert (train.learning_rate, train.predictor_learning_rate, train.projector_learning_rate) == (5e-6, 2e-4, None)
    assert (train.tau_start, train.tau_end, train.warmup_ratio, train.epochs, train.max_steps) == (
        1,
        0.1,
        0.03,
        1,
        None,
    )
    assert (train.weight_decay, train.bf16, train.gradient_checkpointing, train.tune) == (0, True, True, "full")
    assert (config.data.max_length, config.data.text_only, train.sparsity_mode) == (2048, "skip", "both")
    assert config.model.base == f"llava-hf/llava-1.5-{size}-hf"


def test_the_other_full_size_runs_differ_in_what_their_names_say():
    read = {path.stem: read_yaml(class_of(path), path) for path in RUNS if path.parent == CONFIGS}
    main = read["dynamic_llava_7b"]
    assert changes(read["dynamic_llava_13b"], main) == {"model.base": "llava-hf/llava-1.5-13b-hf"}
    for size in ("7b", "13b"):
        image = changes(read[f"dynamic_llava_{size}_image_only"], read[f"dynamic_llava_{size}"])
        assert image == {"train.sparsity_mode": "image"}
    assert changes(read["dense_control_7b"], main) == {"train.sparsity_mode": "none"}
    for name, tune in (("predictor_only_7b", "predictors"), ("lora_7b", "lora")):
        changed, train = changes(read[name], main), read[name].train
        assert changed.pop("train.tune") == tune and changed.pop("train.deepspeed") is None
        assert train.batch_size * train.gradient_accumulation == 64
        assert {key.split(".")[0] for key in changed} <= {"train", "lora"} and not any("sparsity" in k for k in changed)
    recipe = changes(read["frozen_kl_7b"], read["predictor_only_7b"])
    names = {f"train.{name}" for name in ("max_steps", "start_keep_rate")}
    names |= {f"train.distill.{name}" for name in ("weight", "temperature")}
    assert recipe.keys() == names | {f"train.keep_rate_schedule.{name}" for name in ("shape", "share")}
    voco = changes(read["voco_llama_7b"], read["sft_projector_7b"])
    assert voco == {
        "model.base": "runs/pretrain_mlp_7b/model", "sparsity.method.name": "voco_llama", "sparsity.method.tokens": 128,
        "train.sparsity_mode": "both", "train.predictor_learning_rate": 2e-5, "train.batch_size": 8,
        "train.gradient_accumulation": 2, "train.epochs": 2.0,
    }, "LLaVA-1.5's second stage, twice, with the embedding at the same rate"  # fmt: skip
    assert changes(read["tiny_sft"], read["tiny"].training()).keys() == {"train.max_steps"}


def test_runs_on_other_projectors_are_llavas_two_stages_and_the_papers_training():
    read = {
        path.stem: read_yaml(class_of(path), path) for path in RUNS if path.parent.name in ("configs", "projectors")
    }
    for size in ("7b", "13b"):
        own = changes(read[f"tokenpacker_{size}"], read[f"dynamic_llava_{size}"])
        assert own == {"model.base": f"checkpoints/tokenpacker_{size}", "sparsity.image_keep_rate": 0.4}
        assert budget(0.4, tokens_of(336, 14, projector="tokenpacker")) == 57
        image = changes(read[f"tokenpacker_{size}_image_only"], read[f"tokenpacker_{size}"])
        assert image == {"train.sparsity_mode": "image"}
    first, second = read["pretrain_projector_7b"], read["sft_projector_7b"]
    assert first.train.learning_rates(()) == {"projector": 1e-3} and first.data.template == "plain"
    assert second.train.learning_rates(()) == {"language_model": 2e-5, "projector": 2e-5}
    assert (first.train.batch_size * 8, second.train.batch_size * 8) == (256, 128)
    assert second.model.base == f"{first.folder}/model" and second.data.text_only == "dense"
    for name, run in read.items():
        if (CONFIGS / "projectors" / f"{name}.yaml").is_file():
            assert changes(run, second) == {"model.base": f"runs/pretrain_{name}/model"}
            told = re.search(
                r"--model.projector (\w+)\s.*?--name (\w+)", head_of(CONFIGS / "projectors" / f"{name}.yaml"), re.DOTALL
            )
            assert told[1] in PROJECTORS and told[2] == f"pretrain_{name}"


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_changes_what_its_row_says_and_nothing_else(path):
    config = read_yaml(RunConfig, path)
    changed = changes(config, read_yaml(RunConfig, CONFIGS / "dynamic_llava_7b.yaml"))
    assert changed == ROWS_OF_THE_TABLES[path.stem]
    assert config.name == (path.stem if changed else "dynamic_llava_7b")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_read_and_every_row_has_a_command(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dynamic_llava.sweep.plan.build_world", lambda **_: tmp_path / "world")
    sweep = read_yaml(SweepConfig, path)
    assert sweep.name == path.stem
    head = head_of(path)
    assert f"configs/sweeps/{path.name}" in head and "\nCost: " in head
    plan = make_plan(sweep, path)
    assert all(planned.steps for planned in plan.rows)


@pytest.mark.parametrize("path", PAPER_SWEEPS, ids=lambda path: path.stem)
def test_columns_name_metrics_that_benchmarks_have(path):
    for column in read_yaml(SweepConfig, path).columns:
        task = get_task(column.task)
        assert column.metric in ("", *task.paper, *COSTS), f"{column.header}: {column.task} has no {column.metric}"


@pytest.mark.parametrize("path", PAPER_SWEEPS, ids=lambda path: path.stem)
def test_the_papers_numbers_agree_between_heads_and_sweeps(path):
    sweep = read_yaml(SweepConfig, path)
    for row in sweep.rows:
        if not row.config:
            continue
        file = (path.parent / row.config).resolve()
        head = paper_numbers(file).get(path.stem, {})
        assert head.items() <= row.paper.items(), f"{name_of(file)}: {path.stem} prints other numbers"
        assert row.paper.keys() == head.keys() or path.stem in ("table13", "table17"), name_of(file)
        assert not row.paper or head, (
            f"{name_of(file)} lacks a line 'Paper, {path.stem.replace('table', 'Table ')}: ...'"
        )


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_no_head_has_numbers_that_no_sweep_has(path):
    for table in paper_numbers(path):
        sweep = CONFIGS / "sweeps" / f"{table}.yaml"
        rows = [sweep.parent / row.config for row in read_yaml(SweepConfig, sweep).rows if row.config]
        assert path in [row.resolve() for row in rows], f"{table} has no row of {name_of(path)}"


@pytest.mark.parametrize("path", PAPER_SWEEPS, ids=lambda path: path.stem)
def test_rows_of_the_main_runs_agree_with_what_the_benchmarks_know(path):
    """LLaVA-1.5 and the main configurations stand in several tables, and in the tasks."""
    sweep = read_yaml(SweepConfig, path)
    compared = others = 0
    for row in sweep.rows:
        run = None if row.model else read_yaml(RunConfig, path.parent / row.config)
        if not (row.model or run.name).startswith(("llava-hf/", "dynamic_llava_")):
            others += 1
            continue
        if row.method is not None:
            continue  # what another method makes of the checkpoint
        size = "13b" if "13b" in (row.model or run.model.base) else "7b"
        mode = "none" if run is None else run.train.sparsity_mode
        for column in sweep.columns:
            task = get_task(column.task)
            known = task.paper.get(column.metric or task.table_metric, {}).get(size, {}).get(mode)
            if column.metric in COSTS:
                known = PAPER_COSTS[size].get(column.metric, {}).get(mode)
            if known is None or (path.stem, column.header, mode) in PRINTED_OTHERWISE:
                continue
            assert row.paper[column.header] == pytest.approx(known * column.scale), (row.title, column.header)
            compared += 1
    assert compared or others == len(sweep.rows)


def test_tables_5_16_and_17_share_their_runs():
    rows = {
        table: [(row.title, row.config or row.model) for row in read_yaml(SweepConfig, path).rows]
        for table in ("table5", "table16", "table17")
        for path in [CONFIGS / "sweeps" / f"{table}.yaml"]
    }
    assert rows["table5"] == rows["table16"] == rows["table17"]


def test_the_tiny_sweep_varies_what_the_papers_tables_vary():
    path = CONFIGS / "sweeps" / "tiny.yaml"
    sweep = read_yaml(SweepConfig, path)
    assert sweep.tasks == [TINY] and not any(row.paper for row in sweep.rows)
    varied = {row.overrides[0] for row in sweep.rows if row.overrides}
    assert varied == {
        "--train.sparsity-mode", "--sparsity.image-keep-rate", "--sparsity.output-keep-rate", "--sparsity.sparse-layer",
        "--sparsity.output-min-length", "--sparsity.keep-rate-weight", "--sparsity.dropped-tokens",
    }  # fmt: skip


def test_the_long_world_differs_in_its_texts_and_budgets():
    own = changes(read_yaml(JobConfig, CONFIGS / "tiny_long.yaml"), read_yaml(JobConfig, CONFIGS / "tiny.yaml"))
    assert own.pop("tiny.world") == "long" and own.pop("tiny.more_output_rates") == [0.35, 0.2]
    assert own.pop("tiny.description_tokens") >= 219 + 1  # the longest reference description and a margin
    assert own.keys() == {
        "sparsity.image_keep_rate", "train.max_steps", "train.save_every", "tiny.base_steps", "tiny.dynamic_image",
        "tiny.questions", "tiny.rivals",
    }  # fmt: skip


def test_the_tiny_job_is_the_papers_method_with_disclosed_changes():
    config = read_yaml(JobConfig, CONFIGS / "tiny.yaml")
    paper = RunConfig().sparsity
    same = ("sparse_layer", "image_keep_rate", "output_keep_rate", "keep_rate_weight", "keep_rate_distance")
    assert all(getattr(config.sparsity, name) == getattr(paper, name) for name in same)
    assert config.train.sparsity_mode == "both"
