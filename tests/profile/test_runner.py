"""The runner: whatever a part does, and whenever the whole is killed, finished results stay and the rest is named."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamic_llava.profile.__main__ import main
from dynamic_llava.profile.parts import PARTS
from dynamic_llava.profile.results import Results, append, read
from dynamic_llava.profile.runner import CPU_PARTS, GPU_PARTS, SETS, Part, new_folder, plan, run
from dynamic_llava.profile.summary import found_in, publish, write_summary
from tests.profile.stub_part import stub

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {
    "raise": ("failed", "RuntimeError: told to"),
    "exit": ("failed", "exit code 3: the last words of the log"),
    "kill": ("failed", "killed by SIGKILL"),
    "tear": ("failed", "killed by SIGKILL"),
    "hang": ("timed out", "ended after"),
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def rows_of(folder, name):
    return [
        entry["row"]["row"] for entry in read(folder / "results.jsonl") if entry.get("part") == name and "row" in entry
    ]


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=5.0):
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def check(folder, faults):
    """Every finished row is there, every part that did not finish is named with its reason, and nothing runs on."""
    found, summary = found_in(folder), (folder / "summary.md").read_text()
    for name, fault in faults.items():
        state, reason = FAULTS.get(fault, ("done", ""))
        entry = found.parts[name]
        assert entry["state"] == state and reason in entry.get("reason", ""), (fault, entry)
        assert rows_of(folder, name) == ([0, 1, 2] if fault == "none" else [0])
        assert f"| {name} | " in summary and reason in summary
        assert summary.count(f"The part {name} did not finish") == (fault != "none")
    assert gone(value for key, value in found.values.items() if key.startswith("child_of"))
    assert len(list(folder.iterdir())) == 4
    assert json.loads((folder / "summary.json").read_text())["parts"] == list(found.parts.values())


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, 5))])
def test_each_part_in_turn_fails_and_takes_nothing_with_it(tmp_path, turn):
    """The GPU's parts by name; over the turns each of them ends in every way, a good one included."""
    kinds = [*(fault for fault in FAULTS if fault != "hang"), "none"]
    faults = {part.name: kinds[(place + turn) % len(kinds)] for place, part in enumerate(GPU_PARTS)}
    folder = new_folder(tmp_path / "x")
    assert not run(plan("gpu", GPU_PARTS), stub(folder, faults), folder)
    check(folder, faults)


QUICK = {GPU_PARTS[0].name, GPU_PARTS[-1].name}


@pytest.mark.parametrize(
    "name", [part.name if part.name in QUICK else pytest.param(part.name, marks=pytest.mark.slow) for part in GPU_PARTS]
)
def test_each_part_in_turn_hangs_and_is_ended_with_all_it_started(tmp_path, name):
    folder, faults = new_folder(tmp_path / "x"), {name: "hang", "behind": "none"}
    run(plan("gpu", [Part(name, 4, ""), Part("behind", 30, "")]), stub(folder, faults), folder)
    check(folder, faults)
    log = (folder / "log.txt").read_text()
    assert "stub_part.py" in log and "in misbehave" in log, "the log says where it stood"


def test_a_budget_is_kept_and_time_left_over_goes_to_later_parts(tmp_path):
    folder = new_folder(tmp_path / "x")
    parts = [Part("quick", 6, ""), Part("hangs", 2, ""), Part("after", 6, "")]
    begun = time.monotonic()
    run(plan("gpu", parts), stub(folder, {"hangs": "hang"}), folder)
    assert time.monotonic() - begun < sum(part.seconds for part in parts)
    found = found_in(folder).parts
    assert [part["state"] for part in found.values()] == ["done", "timed out", "done"]
    assert found["hangs"]["seconds"] > parts[1].seconds, "it had what the first part did not need"


@pytest.mark.parametrize(("kind", "early"), [("gpu", True), ("cpu", False)])
def test_beside_an_accelerator_the_next_part_starts_early_and_waits_for_its_turn(tmp_path, kind, early):
    folder = new_folder(tmp_path / "x")
    run(plan(kind, [Part(name, 20, "") for name in "abc"]), stub(folder, {}, pause=0.5), folder)
    at = found_in(folder).values
    for one, other in ("ab", "bc"):
        assert (at[f"started_{other}"] < at[f"ended_{one}"]) == early, "when the process was started"
        assert at[f"begun_{other}"] > at[f"ended_{one}"], "a part began before the one before it had ended"


def test_time_beyond_the_plan_is_to_spare(tmp_path, capsys):
    """Both parts need more than their plan; what was given beyond it is enough for the first, and all that it needs."""
    folder = new_folder(tmp_path / "x")
    chosen = plan("gpu", [Part("slow", 1.1, ""), Part("hangs", 1.1, "")], 7)
    begun = time.monotonic()
    run(chosen, stub(folder, {"hangs": "hang"}, pause=0.3), folder)
    assert time.monotonic() - begun < 7
    assert [part["state"] for part in found_in(folder).parts.values()] == ["done", "timed out"]
    assert "4.8 seconds to spare" in capsys.readouterr().out


def test_a_process_that_cannot_be_started_is_a_failed_part(tmp_path):
    folder = new_folder(tmp_path / "x")
    run(plan("gpu", [Part("a", 5, ""), Part("b", 5, "")]), lambda name: ["/nowhere/python", name], folder)
    assert [part["state"] for part in found_in(folder).parts.values()] == ["failed", "failed"]
    assert "/nowhere/python" in (folder / "summary.md").read_text()


def started(folder, faults, pause):
    """The runner in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from dynamic_llava.profile.runner import *\n"
        "from tests.profile.stub_part import stub\n"
        f"folder, parts = Path({str(folder)!r}), [Part(name, 30, 'about') for name in 'abcd']\n"
        f"run(plan('gpu', parts), stub(folder, {faults!r}, {pause}), folder)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finished(folder):
    """What the parts said they had finished, by name."""
    said = re.findall(r"^finished (\w) (\d)$", (folder / "log.txt").read_text(), re.MULTILINE)
    return {name: [int(row) for part, row in said if part == name] for name, _ in said}


def waited_for(folder, text, seconds=30.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        log = folder / "log.txt"
        if log.exists() and text in log.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"{text!r} was not in the log within {seconds} s")


def test_the_whole_killed_at_a_random_second_leaves_everything_that_was_finished(tmp_path):
    """SIGKILL of the runner: its part ends itself, and the summary that is built afterwards names what is missing."""
    draw = random.Random()
    for attempt in range(3):
        folder = new_folder(tmp_path / str(attempt))
        process = started(folder, {"b": "raise"}, pause=0.05)
        waited_for(folder, "=== a, at most")
        time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.wait()
        pids = {entry["row"]["pid"] for entry in read(folder / "results.jsonl") if "row" in entry}
        assert gone(pids), "a part runs on without its runner"
        for name, rows in finished(folder).items():
            assert rows_of(folder, name)[: len(rows)] == rows
        write_summary(folder)
        parts, summary = found_in(folder).parts, (folder / "summary.md").read_text()
        assert list(parts) == ["a", "b", "c", "d"]
        for name, part in parts.items():
            assert part["state"] in ("done", "failed", "cut off", "not begun"), part
            assert f"| {name} | about | {part['state']} |" in summary
            assert (part["state"] == "not begun") <= (not rows_of(folder, name))
            assert part["state"] != "done" or rows_of(folder, name) == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_whole_asked_to_end_writes_its_summary_and_ends_what_runs(tmp_path, number):
    folder = new_folder(tmp_path / "x")
    process = started(folder, {"b": "hang"}, pause=0.0)
    waited_for(folder, "finished b 0")
    process.send_signal(number)
    assert process.wait(10) != 0
    found = json.loads((folder / "summary.json").read_text())
    assert [part["state"] for part in found["parts"]] == ["done", "cut off", "not begun", "not begun"]
    assert found["parts"][1]["reason"] == "the whole benchmark was ended"
    assert gone({value for key, value in found["values"].items() if key.startswith("child_of")})


def test_torn_lines_harm_nobody(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"b": ')
    append(path, {"c": 3})
    Results(path, "p").values(d=4.0)
    assert read(path) == [{"a": 1}, {"c": 3}, {"part": "p", "values": {"d": 4.0}}]
    with pytest.raises(FileNotFoundError, match=r"results\.jsonl"):
        read(tmp_path / "none.jsonl")


def test_plans_fit_their_time_and_say_at_once_what_they_leave_out(capsys):
    assert sum(part.seconds for part in GPU_PARTS) <= 570
    assert sum(part.seconds for part in CPU_PARTS) <= 360
    for parts in SETS.values():
        for seconds in (*range(30, 541, 30), 10**6):
            chosen = plan("gpu", parts, seconds) if seconds >= min(p.seconds for p in parts) else None
            if chosen is None:
                continue
            assert sum(part.seconds for part in chosen.parts) <= seconds
            assert sorted(chosen.parts + chosen.left_out, key=parts.index) == list(parts)
            first = next(part for part in parts if part.seconds <= seconds)
            assert chosen.parts[0] == first, "the most telling part that fits comes first"
            said = "\n".join(chosen.lines())
            assert all(f"left out, {part.seconds:g} s: {part.name}" in said for part in chosen.left_out)


@pytest.mark.parametrize("name", SETS)
def test_every_planned_part_is_one_that_can_run(name):
    assert [part.name for part in SETS[name]] == list(PARTS[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["benchmark", "--set", "gpu", "--seconds", "5"], "--seconds 5 is too little: the shortest part needs 15"),
        (["benchmark", "--set", "gpu", "--parts", "kernel"], "has no such part; choose of device, methods"),
        (["benchmark", "--set", "gpu", "--output-folder", "USED"], "holds the results of an earlier benchmark"),
        (["summary", "NONE"], "results.jsonl does not exist; give the folder"),
        (["summary", "USED", "--publish", "OUT"], "name no device"),
        (["part", "kernel", "--set", "cpu", "--results", "OUT"], "is not in the cpu set; choose one of device"),
    ],
)
def test_mistakes_cost_no_time_and_no_result(tmp_path, capsys, arguments, message):
    used = tmp_path / "USED"
    used.mkdir()
    append(used / "results.jsonl", {"part": "device", "values": {"a": 1}})
    places = {name: str(tmp_path / name) for name in ("USED", "NONE", "OUT")}
    before = (used / "results.jsonl").read_bytes()
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert (used / "results.jsonl").read_bytes() == before
    assert set(os.listdir(tmp_path)) == {"USED"} and set(os.listdir(used)) <= {
        "results.jsonl",
        "summary.md",
        "summary.json",
    }


def test_a_dead_torch_fails_its_parts_and_not_the_benchmark(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("raise ImportError('libtorch is broken')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    command = [sys.executable, "-m", "dynamic_llava.profile", "benchmark", "--output-folder", str(tmp_path / "x")]
    done = subprocess.run([*command, "--set", "gpu", "--seconds", "60"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    chosen, summary = plan("gpu", GPU_PARTS, 60), (tmp_path / "x/summary.md").read_text()
    assert summary.count("| failed |") == summary.count("libtorch is broken") == len(chosen.parts) >= 2
    assert summary.count("| left out |") == len(chosen.left_out)
    assert f"left out, {chosen.left_out[0].seconds} s: {chosen.left_out[0].name}" in done.stdout
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 2 and "libtorch is broken" in asked.stderr and "--set" in asked.stderr


def test_a_folder_that_cannot_be_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = ["benchmark", "--set", "rehearsal", "--output-folder", str(tmp_path / "file" / "x")]
    assert main(arguments) == 74
    assert capsys.readouterr().err.count("\n") == 1


def test_the_gpu_set_on_a_machine_without_one_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    path = tmp_path / "results.jsonl"
    assert main(["part", "device", "--set", "gpu", "--results", str(path)]) == 1
    assert "torch finds no accelerator here" in read(path)[-1]["error"]


def test_publishing(tmp_path):
    folder = new_folder(tmp_path / "x")
    run(plan("gpu", [Part("a", 30, "")]), stub(folder, {}), folder)
    paths = publish(folder, tmp_path / "results")
    names = ["benchmark_stub.md", "benchmark_stub.json", "benchmark_nvidia-h200.md"]
    assert [path.name for path in paths] == names
    assert paths[0].read_text() == (folder / "summary.md").read_text()
    (tmp_path / "results/benchmark_nvidia-h200.json").write_text("{}")
    assert [path.name for path in publish(folder, tmp_path / "results")] == names[:2], "a measured page stays"
    run(plan("rehearsal", [Part("a", 30, "")]), stub(tmp_path / "y", {}), new_folder(tmp_path / "y"))
    with pytest.raises(ValueError, match="rehearsal, whose numbers mean nothing"):
        publish(tmp_path / "y", tmp_path / "results")
