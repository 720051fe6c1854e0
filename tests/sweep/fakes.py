"""A sweep whose commands are small scripts: they do in milliseconds what trainings and evaluations leave behind."""

import runpy
import sys
from pathlib import Path

import yaml

from dynamic_llava.cli import read_yaml
from dynamic_llava.sweep import plan as planning
from dynamic_llava.sweep.config import SweepConfig
from dynamic_llava.sweep.plan import SweepPlan, make_plan
from dynamic_llava.train.run import write_config

TRAIN = """
import os, pathlib, shutil, signal, sys, time
here = pathlib.Path(sys.argv[0]).parent
name = sys.argv[sys.argv.index("--name") + 1] if "--name" in sys.argv else "base"
with (here / "calls.txt").open("a") as calls:
    calls.write(f"train {name}\\n")
if (here / f"fail-{name}").exists():
    sys.exit(3)
if (here / f"full-{name}").exists():
    sys.exit(74)
if (here / f"stop-{name}").exists():
    inherited = [str(fd.resolve()) for fd in pathlib.Path("/proc/self/fd").iterdir()]
    (here / "inherited.txt").write_text("\\n".join(inherited))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(30)
    sys.exit(9)
if not (here / f"nothing-{name}").exists():
    model = here / "runs" / name / "model"
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    (model / "model.safetensors").write_text(f"{name} {time.time_ns()}")
    shutil.copy(here / "settings" / f"{name}.yaml", model / "run.yaml")
    (model / "config.json").write_text("{}")
"""
EVALUATE = """
import json, pathlib, sys
here = pathlib.Path(sys.argv[0]).parent
value = lambda option: sys.argv[sys.argv.index(option) + 1]
model, folder = value("--model"), pathlib.Path(value("--output-folder"))
name = pathlib.Path(model).parent.name if model.endswith("model") else pathlib.Path(model).name
with (here / "calls.txt").open("a") as calls:
    calls.write(f"evaluate {name} {value('--sparsity')}\\n")
if (here / f"fail-evaluate-{name}").exists():
    sys.exit(4)
metrics = {"accuracy/all": 0.5 + len(name) / 100, "ppl": 1.25}
(folder / "summary.json").write_text(json.dumps({"metrics": metrics}))
"""

BASE = {
    "name": "base",
    "model": {"base": "tiny"},
    "train": {"max_steps": 7},
}
SWEEP = {
    "name": "few",
    "title": "A few rows",
    "tiny": {"train_images": 2, "test_images": 4, "questions": 3, "descriptions": 1},
    "columns": [
        {"header": "accuracy", "task": "tiny", "metric": "accuracy/all", "scale": 100},
        {"header": "PPL", "task": "tiny", "metric": "ppl", "digits": 2},
    ],
    "rows": [
        {"title": "dense", "model": "tiny"},
        {"title": "I|T", "config": "configs/base.yaml", "paper": {"accuracy": 54.3, "PPL": 1.2}},
        {
            "title": "half",
            "config": "configs/base.yaml",
            "overrides": ["--sparsity.image-keep-rate", "0.5", "--name", "half"],
            "paper": {"accuracy": 60},
        },
        {"title": "l = 2", "config": "configs/base.yaml"},
    ],
}

ENVIRONMENT = {name: name for name in ("torch", "transformers", "python", "machine", "cores", "commit")}


class InThisProcess:
    """Stands in for subprocess.Popen: runs a script here, which saves the start of an interpreter."""

    def __init__(self, command, **_) -> None:
        self.command = command

    def wait(self) -> int:
        """Run the script; return its exit code."""
        before, sys.argv = sys.argv, list(self.command[1:])
        try:
            runpy.run_path(self.command[1])
        except SystemExit as end:
            return end.code
        finally:
            sys.argv = before
        return 0


class FakeSweep:
    """A folder with a sweep's file, its run's file, and the scripts that stand in for the two programs."""

    def __init__(self, folder: Path, monkeypatch, *, processes: bool = False, **changes) -> None:
        """Write everything below `folder`; `changes` replace keys of SWEEP. `processes`: start the scripts for real."""
        self.folder = folder
        if not processes:
            monkeypatch.setattr("dynamic_llava.sweep.run.subprocess.Popen", InThisProcess)
            monkeypatch.setattr("dynamic_llava.sweep.table.environment", lambda: dict(ENVIRONMENT))
        monkeypatch.chdir(folder)
        monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(folder / "cache"))
        for name, script in (("TRAIN", TRAIN), ("EVALUATE", EVALUATE), ("MEASURE_TINY", EVALUATE)):
            (folder / f"{name.lower()}.py").write_text(script)
            monkeypatch.setattr(planning, name, (sys.executable, str(folder / f"{name.lower()}.py")))
        (folder / "configs").mkdir()
        (folder / "configs" / "base.yaml").write_text(yaml.safe_dump(BASE))
        self.path = folder / "few.yaml"
        self.path.write_text(yaml.safe_dump(SWEEP | changes, sort_keys=False))
        (folder / "settings").mkdir()
        self.plan()

    def plan(self, *overrides: str) -> SweepPlan:
        """Return the plan, and write the settings that the training script gives its models."""
        plan = make_plan(read_yaml(SweepConfig, self.path), self.path, overrides)
        for planned in plan.rows:
            if planned.training is not None:
                write_config(planned.training.config, self.folder / "settings" / f"{planned.training.config.name}.yaml")
        return plan

    def calls(self) -> list[str]:
        """Return what has been called since the last look, a line each."""
        path = self.folder / "calls.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines
