"""The tiny world's main job: train I|T, I and the dense control, evaluate every row, draw, report.

    runs/<name>/                 config.yaml, metrics.jsonl, results.json, table.md and report.html of the whole job
    runs/<name>/seed<k>/         the same of one seed, and a folder per training (both, image, control, untrained, and
                                 both_35 for r_OT 0.35)
    runs/<name>/seed<k>/rows/    a file for each measured row
    runs/<name>/base/            with tiny.base_steps, the training of the base that all seeds start from

A finished seed is taken from its results.json, if its fingerprint (settings, rows, base weights, library versions) is
that of this job, a finished training from its folder, and a measured row from its file: an interrupted job goes on
where it stopped, the same command again computes nothing, and further rows or r_OT cost no more than themselves.
Trainings of other settings are refused; an evaluation of other settings is made anew, and what it would replace is
moved aside. train.overwrite makes everything anew; without rows/ and results.json a seed is measured anew.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from dynamic_llava.checkpoints.convert import convert
from dynamic_llava.config import DataConfig, SparsityMode
from dynamic_llava.eval.predict import hide_library_progress
from dynamic_llava.files import Lock, give_usual_modes, replace_file, writing
from dynamic_llava.methods import Method, describe_method, print_method, read_method
from dynamic_llava.model.loading import new_weights_expected
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.provenance import environment, fingerprint, source_digest
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.tiny.job.evaluation import UNTRAINED, Evaluator, SeedEvaluation
from dynamic_llava.tiny.job.outputs import RowFiles
from dynamic_llava.tiny.job.page import in_short, report_text
from dynamic_llava.tiny.job.pictures import draw_pictures
from dynamic_llava.tiny.job.report import job_report
from dynamic_llava.tiny.job.rivals import check_rivals, compare_rivals, compared_in
from dynamic_llava.tiny.job.rows import BOTH, other_rate, row_keys
from dynamic_llava.tiny.job.testset import TestSet, read_test_set
from dynamic_llava.tiny.world.dataset import build_world
from dynamic_llava.train.run import RunResult, run, write_config

log = logging.getLogger(__name__)

CONTROL = "control"
"""Folder of the dense control's training; that of Dynamic I|T is BOTH."""
NO_NUMBERS = (
    "seeds", "picture_scenes", "picture_answers", "rivals", "rival_questions", "dynamic_image", "untrained_base",
    "more_output_rates",
)  # fmt: skip
"""Settings of the job that say which rows and pictures there are; they change no row."""
END_OF_TRAINING = 0.2
"""Share of a training's log, from its end, over which realised keep rates are averaged."""


@dataclass(frozen=True)
class SeedJob:
    """One seed of the job: its settings and where its files lie."""

    config: JobConfig
    folder: Path
    world: Path
    base: Path

    @property
    def trainings(self) -> dict[str, tuple[str, SparsityMode, float]]:
        """Folder of a training -> its title, what it sparsifies, and its r_OT."""
        main, tiny = self.config.sparsity.output_keep_rate, self.config.tiny
        others = {f"{BOTH}{other_rate(rate)}": rate for rate in tiny.more_output_rates}
        return {
            BOTH: ("Dynamic I|T", "both", main),
            **{key: (f"Dynamic I|T, r_OT {rate:g}", "both", rate) for key, rate in others.items()},
            **({"image": ("Dynamic I", "image", main)} if tiny.dynamic_image else {}),
            CONTROL: ("dense control", "none", main),
        }

    @property
    def data(self) -> DataConfig:
        """The data of its trainings: the job's settings on the world it has generated."""
        return replace(self.config.data, json=str(self.world / "train.json"), image_folder=str(self.world))

    @property
    def method(self) -> Method | None:
        """The method of the row that the job names; ValueError for one that no training of the job could serve."""
        if self.config.method is None:
            return None
        method = read_method(self.config.method, self.config.sparsity)
        if not method.training_free:
            raise ValueError(
                f"method={self.config.method!r} learns something, and the main job trains Dynamic-LLaVA and the dense "
                "control alone; name a method that learns nothing, or train this one by python -m dynamic_llava.train"
            )
        return method

    @property
    def results(self) -> Path:
        """File of the seed's numbers."""
        return self.folder / "results.json"

    @property
    def rows(self) -> Path:
        """Folder of its measured rows."""
        return self.folder / "rows"

    def fingerprint(self) -> str:
        """Digest of everything the seed's numbers depend on, the source code apart."""
        tiny = self.config.tiny
        keys = row_keys(
            self.config.sparsity,
            tiny.more_output_rates,
            dynamic_image=tiny.dynamic_image,
            uncached=tiny.with_uncached,
        )
        return hashlib.sha256(f"{self.measured}{self.named}{keys}{tiny.untrained_base}".encode()).hexdigest()[:16]

    @property
    def named(self) -> dict[str, Any] | None:
        """The row that the job names, as text."""
        return None if self.method is None else print_method(self.method)

    @property
    def measured(self) -> str:
        """Digest of everything that a row's numbers depend on beside the row, the source code apart."""
        settings = asdict(self.config) | {"data": asdict(self.data), "sparsity": self.config.sparsity.to_dict()}
        for key in ("name", "output_folder", "method"):
            del settings[key]
        for key in NO_NUMBERS:
            del settings["tiny"][key]
        for key in ("overwrite", "accept_changed_inputs"):
            del settings["train"][key]
        return fingerprint(settings, self.base)


def main(config: JobConfig) -> Path:
    """Run the job that `config` describes; returns the folder of its files.

    Raises ValueError when the settings do not fit the world.
    """
    hide_library_progress()
    with Lock(config.folder / "job.lock", f"the main job in {config.folder}"):
        return _main(config, config.folder)


def _main(config: JobConfig, folder: Path) -> Path:
    begun, tiny = time.perf_counter(), config.tiny
    check_rivals(tiny.rivals, config.sparsity)
    print(
        f"building the tiny world ({tiny.world}): {tiny.train_images} training and {tiny.test_images} test images",
        flush=True,
    )
    world = build_world(train=tiny.train_images, test=tiny.test_images, seed=tiny.data_seed, world=tiny.world)
    if not config.model.base:
        raise ValueError("model.base is not set; configs/tiny.yaml starts from tiny, which comes with the package")
    base = Path(config.model.source)
    if tiny.base_steps:
        with new_weights_expected():
            base = _base_of_world(SeedJob(config, folder, world, base))
        config = replace(config, model=replace(config.model, base=str(base)))
    seeds = range(config.train.seed, config.train.seed + tiny.seeds)
    jobs = [
        SeedJob(replace(config, train=replace(config.train, seed=seed)), folder / f"seed{seed}", world, base)
        for seed in seeds
    ]
    if jobs[0].method is not None:
        print(f"a row of its own: control + {describe_method(jobs[0].method)}", flush=True)
    with new_weights_expected():  # every training starts from a dense base
        results = [_seed_result(job) for job in jobs]
        for job in jobs if tiny.rivals else ():
            _compare(job)
    compared = compared_in(folder, seeds) if tiny.rivals else None
    _write_job(folder, config, jobs, results, compared)
    page, seconds = job_report(folder).write(), time.perf_counter() - begun
    print(f"\n{seconds:.0f} s in all; tables: {folder / 'table.md'}; pictures: {jobs[0].folder / 'pictures'}\n")
    print("\n".join(f"{name:<14} {text}" for name, text in in_short(results, config.sparsity)))
    print(f"\nreport: {page}")
    return folder


def _base_of_world(job: SeedJob) -> Path:
    """Train the job's base further, dense and on its world, in <folder>/base; return the result in llava-hf layout.

    It is the same whatever the job's seeds, and has no predictors: each training draws its own.
    """
    train = replace(job.config.train, sparsity_mode="none", max_steps=job.config.tiny.base_steps, seed=0)
    print(f"training the base of all seeds: dense, {train.max_steps} steps", flush=True)
    settings = {"output_folder": str(job.folder), "data": job.data, "train": train, "method": None}
    trained = run(job.config.training(name="base", **settings))
    plain = trained.run_folder / "plain"
    if train.overwrite:
        shutil.rmtree(plain, ignore_errors=True)
    return plain if plain.is_dir() else convert(trained.folder, plain, to="llava-hf", say=log.info)


def _compare(job: SeedJob) -> None:
    """Compare the rivals, on the seed's dense control, with the learned selection of Dynamic I|T."""
    print(f"seed {job.config.train.seed}: rivals at equal image tokens", flush=True)
    models = [job.config.training(name=key, output_folder=str(job.folder)).folder / "model" for key in (CONTROL, BOTH)]
    patches = DynamicLlavaProcessor.from_pretrained(job.base).tokens_per_image
    compare_rivals(job.folder, job.world, models, job.config.sparsity, job.config.tiny, patches, job.measured)


def _seed_result(job: SeedJob) -> dict[str, Any]:
    """The seed's results: read, if they are there and not to be made anew, else made."""
    seed = job.config.train.seed
    found = None if job.config.train.overwrite else _read_results(job.results)
    if found is None or found["fingerprint"] != job.fingerprint():
        return _run_seed(job)
    print(f"seed {seed}: taken from {job.results}: finished already, nothing to do", flush=True)
    if found["environment"]["source"] != source_digest():
        log.warning(
            "%s was made by other source code than this; without it and %s the seed is measured anew, not trained",
            job.results,
            job.rows,
        )
    return found


def _read_results(file: Path) -> dict[str, Any] | None:
    """A seed's results.json; None where there is none that is whole."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def _move_aside(job: SeedJob) -> None:
    """Rename results and table of other settings, so that this job's do not replace them."""
    former = _read_results(job.results)
    if former is None or former["fingerprint"] == job.fingerprint():
        return
    for file in (job.results, job.folder / "table.md"):
        if file.is_file():
            aside = file.with_name(f"{file.stem}.{former['fingerprint']}{file.suffix}")
            file.rename(aside)
            print(f"{file} belongs to other settings, rows or weights and is moved to {aside}", flush=True)


def _run_seed(job: SeedJob) -> dict[str, Any]:
    seed = job.config.train.seed
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    test = read_test_set(job.world, job.config.tiny.questions, job.config.tiny.descriptions)
    _warn_of_cut_descriptions(job, test)
    if job.config.train.overwrite:
        shutil.rmtree(job.rows, ignore_errors=True)
    trained = {key: _train(job, key, mode, title, rate) for key, (title, mode, rate) in job.trainings.items()}
    _move_aside(job)  # not before: a training of other settings is refused and leaves everything as it is
    amount = f"{len(test.questions)} questions and {len(test.descriptions)} descriptions"
    print(f"seed {seed}: evaluation, {amount} per row", flush=True)
    checkpoints = {"base": job.base, **{key: result.folder for key, result in trained.items()}}
    files = RowFiles(job.rows, job.measured)
    evaluator = Evaluator(checkpoints, test, job.config.tiny, method=job.method, files=files)
    evaluation = evaluator.run()
    if files.older:
        log.warning("other source code has measured %s; without %s they are measured anew", files.older, job.rows)
    if job.config.tiny.untrained_base:
        _add_untrained(job, evaluator, evaluation)
    result = {
        "seed": seed,
        "fingerprint": job.fingerprint(),
        "world": job.config.tiny.world,
        "seconds": round(evaluation.seconds + sum(one.metrics.get("train_seconds", 0) for one in trained.values()), 1),
        "questions": len(test.questions),
        "descriptions": len(test.descriptions),
        "timing_batch": job.config.tiny.timing_batch,
        "rows": evaluation.rows,
        "overlap": evaluation.overlap,
        "agreement": evaluation.agreement,
        "training": _end_of_training(trained[BOTH].history),
        "trainings": {key: one.metrics for key, one in trained.items()},
        "environment": environment(),
    }
    _write_seed(job, test, evaluation, trained, result)
    return result


def _warn_of_cut_descriptions(job: SeedJob, test: TestSet) -> None:
    tokenizer = DynamicLlavaProcessor.from_pretrained(job.base).tokenizer
    texts = [query.answer for query in test.descriptions]
    longest = 1 + max(map(len, tokenizer(texts, add_special_tokens=False).input_ids))  # and the end
    if longest > job.config.tiny.description_tokens:
        log.warning(
            "descriptions have up to %d tokens, of which tiny.description_tokens=%d lets a model say the first; raise "
            "it, and for the long world start from configs/tiny_long.yaml",
            longest,
            job.config.tiny.description_tokens,
        )


def _train(
    job: SeedJob, key: str, mode: SparsityMode, title: str, output_rate: float, base: Path | None = None
) -> RunResult:
    """One training of the seed, in its own folder below the seed's."""
    print(f"seed {job.config.train.seed}: training {title}", flush=True)
    config = job.config.training(
        name=key,
        output_folder=str(job.folder),
        data=job.data,
        model=job.config.model if base is None else replace(job.config.model, base=str(base)),
        sparsity=replace(job.config.sparsity, output_keep_rate=output_rate),
        train=replace(job.config.train, sparsity_mode=mode),
        method=None,
    )
    return run(config)


def _add_untrained(job: SeedJob, evaluator: Evaluator, evaluation: SeedEvaluation) -> None:
    """Train I|T from a random language model and add its overlap: how much of it needs no trained base at all."""
    base = write_untrained_base(job.base, job.folder / UNTRAINED / "base", job.config.train.seed)
    rate = job.config.sparsity.output_keep_rate
    trained = _train(job, UNTRAINED, "both", "the untrained-base control", rate, base)
    evaluator.add_untrained(evaluation, trained.folder)


def write_untrained_base(base: Path, folder: Path, seed: int) -> Path:
    """Write `base` with a newly initialised language model and head to `folder`, in llava-hf layout; returns it.

    Vision tower and projector stay as trained. The global random state is left as it was.
    """
    trained = LlavaForConditionalGeneration.from_pretrained(str(base), trust_remote_code=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = LlavaForConditionalGeneration(trained.config)
    fresh.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    fresh.model.multi_modal_projector.load_state_dict(trained.model.multi_modal_projector.state_dict())
    fresh.generation_config = trained.generation_config
    fresh.save_pretrained(str(folder))
    DynamicLlavaProcessor.from_pretrained(base).save_pretrained(folder)
    give_usual_modes(folder)
    return folder


def _end_of_training(history: Sequence[dict[str, float]]) -> dict[str, float]:
    """Realised keep rates, averaged over the last part of the log."""
    last = history[-max(1, round(END_OF_TRAINING * len(history))) :]
    rates = {}
    for name in ("image", "output"):
        values = [line[f"{name}_keep_rate"] for line in last if f"{name}_keep_rate" in line]
        if values:
            rates[name] = sum(values) / len(values)
    return rates


def _write_seed(
    job: SeedJob, test: TestSet, evaluation: SeedEvaluation, trained: dict[str, RunResult], result: dict[str, Any]
) -> None:
    """Write a seed's metrics, outputs, pictures, table, and last results.json, which marks it as finished."""
    write_config(job.config, job.folder / "config.yaml")
    lines = [json.dumps({"training": key, **line}) for key, one in trained.items() for line in one.history]
    replace_file(job.folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
    with writing(job.folder):
        evaluation.write_outputs(job.folder / "outputs", test)
        _draw(job, test, evaluation, trained)
    replace_file(job.folder / "table.md", report_text([result], job.config.sparsity) + "\n")
    replace_file(job.results, json.dumps(result, indent=1) + "\n")


def _draw(job: SeedJob, test: TestSet, evaluation: SeedEvaluation, trained: dict[str, RunResult]) -> None:
    draw_pictures(
        job.folder / "pictures",
        test,
        evaluation,
        DynamicLlavaProcessor.from_pretrained(job.base),
        job.config.tiny,
        {job.trainings[key][0]: one.history for key, one in trained.items()},
        job.config.sparsity,
    )


def _write_job(
    folder: Path,
    config: JobConfig,
    jobs: Sequence[SeedJob],
    results: Sequence[dict[str, Any]],
    compared: Path | None,
) -> None:
    """Write the files of the whole job beside those of its seeds."""
    write_config(config, folder / "config.yaml")
    lines = []
    for job in jobs:
        for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            lines.append(json.dumps({"seed": job.config.train.seed, **json.loads(line)}))
    replace_file(folder / "metrics.jsonl", "".join(f"{line}\n" for line in lines))
    replace_file(folder / "results.json", json.dumps({"seeds": results}, indent=1) + "\n")
    replace_file(folder / "table.md", report_text(results, config.sparsity, compared) + "\n")
