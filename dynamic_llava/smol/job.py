"""The smol world's job: assemble the base, sample its answers, train predictors on them, and measure every rule.

    runs/<name>/w<window>_seed<k>/   a training
    runs/<name>/rows/                a file for each row of the table
    runs/<name>/                     config.yaml, table.md, table.json, table.png of what is there so far

Everything that is finished is found again, so an interrupted job goes on where it stopped. Trainings of other settings
are refused (train.overwrite makes them anew); rows of other settings or weights are made anew.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamic_llava.eval.predict import hide_library_progress
from dynamic_llava.eval.shard import own_device
from dynamic_llava.eval.writing import write_json, write_text
from dynamic_llava.files import Lock
from dynamic_llava.methods import Dense, describe_method, print_method
from dynamic_llava.model import DynamicLlavaConfig, DynamicLlavaForConditionalGeneration
from dynamic_llava.model.loading import new_weights_expected
from dynamic_llava.processing import DynamicLlavaProcessor
from dynamic_llava.provenance import environment, fingerprint
from dynamic_llava.smol.config import SmolJobConfig
from dynamic_llava.smol.measure import (
    HeldAnswer,
    Reference,
    agreement,
    answer_greedily,
    compare,
    margins_on,
    read_held,
    reference_of,
    see,
)
from dynamic_llava.smol.rules import Rule, controls, fed_margins, learned_rule
from dynamic_llava.smol.table import DENSE, panels, read_row, table
from dynamic_llava.smol.world import build_base, build_world
from dynamic_llava.train.run import RunResult, run, write_config
from dynamic_llava.viz.curves import draw_quality_against_cost

RESULT, TABLE, PICTURE, ROWS = "table.json", "table.md", "table.png", "rows"


@dataclass(frozen=True)
class Trained:
    """A training of the job."""

    window: int
    seed: int
    folder: Path
    seconds: float


def main(config: SmolJobConfig) -> Path:
    """Run the job that `config` describes; return the folder of its files."""
    hide_library_progress()
    with Lock(config.folder / "job.lock", f"the smol world's job in {config.folder}"):
        begun = time.perf_counter()
        base = build_base(config.model.base)
        print(f"base: {base}", flush=True)
        world = build_world(base, config.smol)
        print(f"answers: {world}", flush=True)
        write_config(config, config.folder / "config.yaml")
        with new_weights_expected():  # every training starts from a base without predictors
            trained = [_train(config, base, world, *one) for one in _trainings(config)]
            result = TableMaker(config, base, world, trained).run()
        print(f"\n{table(result)}\n\n{time.perf_counter() - begun:.0f} s in all; table: {config.folder / TABLE}")
    return config.folder


def _trainings(config: SmolJobConfig) -> Iterator[tuple[int, int]]:
    """Yield window and seed of each training, seed by seed, so that a job that is stopped early has whole seeds."""
    for seed in range(config.train.seed, config.train.seed + config.smol.seeds):
        for window in config.smol.windows:
            yield window, seed


def _train(config: SmolJobConfig, base: Path, world: Path, window: int, seed: int) -> Trained:
    print(f"training: window {window}, seed {seed}", flush=True)
    done: RunResult = run(
        config.training(
            name=f"w{window}_seed{seed}",
            output_folder=str(config.folder),
            model=replace(config.model, base=str(base)),
            data=replace(config.data, json=str(world / "train.json")),
            sparsity=replace(config.sparsity, output_window=window),
            train=replace(config.train, seed=seed),
        )
    )
    return Trained(window, seed, done.folder, done.metrics["train_seconds"])


class TableMaker:
    """The rows of the table, made or found, and the files that are written of them."""

    def __init__(self, config: SmolJobConfig, base: Path, world: Path, trained: Sequence[Trained]) -> None:
        self.config, self.base, self.world, self.trained = config, base, world, trained
        self.processor = DynamicLlavaProcessor.from_pretrained(base)
        self.answers: list[HeldAnswer] = read_held(world / "held.json", self.processor, config.data.max_length)
        self.layer = config.sparsity.sparse_layer
        self.rows: list[dict[str, Any]] = []
        self.without: list[str] = []
        self._reference: Reference | None = None
        self._loaded: tuple[Path, Any] | None = None

    def run(self) -> dict[str, Any]:
        """Make the rows that are missing; return everything that the table is made of."""
        amount = f"{len(self.answers)} answers, {sum(one.fed for one in self.answers)} tokens"
        print(f"measuring: {amount}", flush=True)
        self._add(Rule(DENSE, DENSE, 1.0, Dense(), "everything"), self.base)
        lengths, smol = [one.fed for one in self.answers], self.config.smol
        for budget in smol.budgets:
            rules, without = controls(
                lengths, budget, self.layer, window=smol.control_window, sinks=smol.sinks, seed=smol.data_seed
            )
            self.without += without
            for rule in rules:
                self._add(rule, self.base)
            self._write()
        for one in self.trained:
            self._add_learned(one)
            self._write()
        result = self.result()
        draw_quality_against_cost(
            self.config.folder / PICTURE, panels(result), title="Output tokens: what a budget costs"
        )
        return result

    def _add_learned(self, one: Trained) -> None:
        margins = self._margins(one)
        for budget in self.config.smol.budgets:
            rule = learned_rule(margins, budget, self.layer, one.window, one.seed)
            if rule is not None:
                self._add(rule, one.folder)
            elif one.seed == self.config.train.seed:
                self.without.append(f"learned, w = {one.window}: its window alone is more than {budget:.0%}")

    def _margins(self, one: Trained) -> list[np.ndarray]:
        """Return the predictor's margins on the held-out answers, from a file beside the rows where they are there."""
        path, content = self._rows / f"margins_w{one.window}_seed{one.seed}.json", self._fingerprint(one.folder, {})
        found = read_row(path, content)
        if found is None:
            smol, held = self.config.smol, self.world / "held.json"
            model, length = self._model(one.folder), self.config.data.max_length
            margins = fed_margins(margins_on(model, held, self.processor, smol.score_batch, length))
            found = {"fingerprint": content, "margins": [its.tolist() for its in margins]}
            write_json(path, found)
        return [np.array(its) for its in found["margins"]]

    def _add(self, rule: Rule, folder: Path) -> None:
        """Add a row: read from its file, if that is of this rule, these weights and answers, else measured."""
        path = self._rows / f"{rule.key}.json"
        content = self._fingerprint(folder, {"method": print_method(rule.method), "title": rule.title})
        row = read_row(path, content)
        if row is None:
            begun = time.perf_counter()
            row = {"fingerprint": content, **self._measure(rule, folder)}
            row["seconds"] = seconds = time.perf_counter() - begun
            write_json(path, row)
            seed = "" if rule.seed is None else f", seed {rule.seed}"
            print(f"  {rule.title}, {100 * rule.budget:g} %{seed}: {seconds:.0f} s", flush=True)
        self.rows.append(row)

    def _measure(self, rule: Rule, folder: Path) -> dict[str, Any]:
        smol, reference = self.config.smol, self._dense_model()
        model = self._model(folder)
        batch = smol.step_batch if rule.method.evicts else smol.score_batch
        seen = see(model, self.answers, rule.method, self.layer, batch)
        sums = compare(seen, model.lm_head.weight, reference, self.answers)
        said, seconds = answer_greedily(model, self.processor, self.answers, rule.method, smol.continuation)
        shares = agreement(said, reference.greedy)
        answers = [
            {"id": one.id, **its, "agreement": share}
            for one, its, share in zip(self.answers, sums, shares, strict=True)
        ]
        named = {"title": rule.title, "kind": rule.kind, "budget": rule.budget, "setting": rule.setting}
        described = {"described": describe_method(rule.method), "seed": rule.seed}
        return {**named, **described, "seconds_per_token": seconds, "answers": answers}

    def _dense_model(self) -> Reference:
        """Return what the dense base makes of the answers; once, and only where a row has to be measured."""
        if self._reference is None:
            smol, model = self.config.smol, self._model(self.base)
            self._reference = reference_of(model, self.processor, self.answers, smol.score_batch, smol.continuation)
        return self._reference

    def _model(self, folder: Path) -> Any:
        """Return the model of a folder; one is in memory at a time."""
        if self._loaded is None or self._loaded[0] != folder:
            self._loaded = None
            settings = asdict(self.config.sparsity) if folder == self.base else {}
            model = DynamicLlavaForConditionalGeneration.from_pretrained(folder, sparsity=settings)
            self._loaded = folder, model.eval().to(own_device())
        return self._loaded[1]

    def _fingerprint(self, folder: Path, more: dict[str, Any]) -> str:
        settings = {"continuation": self.config.smol.continuation, "world": self.world.name, "layer": self.layer}
        return fingerprint({**settings, **more}, folder)

    @property
    def _rows(self) -> Path:
        return self.config.folder / ROWS

    def result(self) -> dict[str, Any]:
        """Return table.json: all rows so far, and what they were made of."""
        config = DynamicLlavaConfig.from_pretrained(self.base)
        text, number = config.text_config, config.dtype or torch.float32
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return {
            "settings": {"base": self.config.model.base, **asdict(self.config.smol)},
            "model": {
                "layers": text.num_hidden_layers,
                "sparse_layer": self.layer,
                "token_bytes_per_layer": 2 * text.num_key_value_heads * head * number.itemsize,
            },
            "without": list(self.without),
            "training_seconds": [one.seconds for one in self.trained],
            "rows": list(self.rows),
            "environment": environment(),
        }

    def _write(self) -> None:
        """Write what is known so far."""
        folder, result = self.config.folder, self.result()
        write_json(folder / RESULT, result, indent=1)
        write_text(folder / TABLE, table(result) + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    """Return the table.json of a job. FileNotFoundError where there is none."""
    path = folder / RESULT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {RESULT}; run bash scripts/train.sh configs/smol.yaml first")
    return dict(json.loads(path.read_text(encoding="utf-8")))
