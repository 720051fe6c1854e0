"""The rehearsal: the parts of the GPU set at tiny sizes on a CPU, by the same code; some made to fail in the middle."""

import shutil
import sys
from pathlib import Path

import pytest

from dynamic_llava.profile.results import read
from dynamic_llava.profile.runner import SETS, new_folder, part_command, plan, run
from dynamic_llava.profile.summary import found_in

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
FAULTY = """
import os, signal, sys, time
from dynamic_llava.profile.__main__ import main
from dynamic_llava.profile.results import Results
fault, add = sys.argv[1], Results.add
def misbehave(self, **entry):
    add(self, **entry)
    if "row" in entry:
        if fault == "raise": raise RuntimeError("an illegal address was met\\nand more lines")
        while fault == "hang": time.sleep(1)
        if fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
Results.add = misbehave
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def rehearse(folder, names, faults=None, hanging=30.0):
    """Run these parts of the rehearsal, those in `faults` with a fault after their first row; returns what is found.

    There is no time beyond the parts' own, which a part that hangs would use up.
    """
    faults, parts = faults or {}, [part for part in SETS["rehearsal"] if part.name in names]
    parts = tuple(type(p)(p.name, hanging if faults.get(p.name) == "hang" else 200, p.about) for p in parts)

    def command(name):
        whole = part_command(name, "rehearsal", folder / "results.jsonl", "cpu")
        assert whole[1:3] == ["-m", "dynamic_llava.profile"]
        return [sys.executable, "-c", FAULTY, faults[name], *whole[3:]] if name in faults else whole

    run(plan("rehearsal", parts), command, new_folder(folder))
    return found_in(folder)


def test_real_parts_raise_hang_and_are_killed_and_the_others_finish(tmp_path):
    faults = {"attention": "raise", "ragged": "kill", "prefill": "hang"}
    # Alone: what the parts before it did not need, a part may use, and one that hangs uses all of it.
    found = rehearse(tmp_path / "x", {"prefill"}, faults)
    assert found.parts["prefill"]["state"] == "timed out" and found.parts["prefill"]["seconds"] < 40
    assert [row["phase"] for report in found.reports for row in report.rows] == ["prefill"]
    found = rehearse(tmp_path / "y", {"attention", "ragged", "predictors"}, faults)
    states = {name: (part["state"], part.get("reason")) for name, part in found.parts.items()}
    assert states == {
        "attention": ("failed", "RuntimeError: an illegal address was met"),
        "ragged": ("failed", "killed by SIGKILL"),
        "predictors": ("done", None),
    }
    rows = {report.name: len(report.rows) for report in found.reports}
    assert rows == {"attention": 1, "ragged": 1, "shares": 2} and "image_predictor_share" in found.values
    assert found.about["device"] == "cpu" and found.about["commit"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_steps_run_eager_compiled_and_beside_both_dense_baselines(tmp_path):
    found = rehearse(tmp_path / "x", {"compiling", "steps-batch-1"})
    for part in ("compiling", "steps-batch-1"):
        assert found.parts[part]["state"] == "done", (tmp_path / "x/log.txt").read_text()[-2000:]
    fresh, timed = (report.rows for report in found.reports)
    assert {(row["preset"], row["engine"], row["outputs"]) for row in fresh} == {
        ("7b-b8", "compiled", 8),
        ("7b-b8", "StaticCache, compiled", 8),
        ("7b-b8", "StaticCache, compiled", 16),
        ("7b-b1", "compiled", 8),
        ("7b-b1", "StaticCache, compiled", 8),
    }
    seconds = {row["engine"]: row["seconds"] for row in fresh if row["preset"] == "7b-b1"}
    again = {row["engine"]: row["ready"] for row in timed if row["engine"] in seconds}
    assert sum(again.values()) < sum(seconds.values()), "a part that times a step finds it compiled on the disk"
    engines = [(row["way"], row["engine"]) for row in timed]
    assert engines == [
        ("both", "eager"),
        ("dense", "DynamicCache"),
        ("both", "compiled"),
        ("dense", "StaticCache, compiled"),
        ("image", "eager"),
    ]
    keys = {entry for line in read(tmp_path / "x/results.jsonl") for entry in line.get("values", {})}
    assert {"step_7b-b1_8_both_over_dense", "step_7b-b1_8_compiled_over_static", "step_7b-b1_8_ms"} <= keys
