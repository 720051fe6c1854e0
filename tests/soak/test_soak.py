"""The soak itself: it finds what is wrong, makes it small, says how to see it again, and counts what did not run."""

import json
import os
import subprocess
import sys
import time

import pytest

from dynamic_llava.model import text_tower
from tests.clip_folders import PUBLISHED, tiny_clip
from tests.soak import __main__ as runner
from tests.soak import fuzz, jobs, kills, long_runs, worlds
from tests.soak.ledger import Ledger
from tests.soak.parsers import Parser
from tests.soak.table import is_whole, merged, page, totals
from tests.world_laws import QUICK_LAWS, Laws

ABOUT = {
    "command": "c", "seed": 1, "date": "d", "seconds": 3.0, "minutes": 1, "ended": False, "torch": "2", "cores": 2,
    "transformers": "5", "python": "3", "machine": "m", "commit": "c", "means": "none",
}  # fmt: skip


def test_what_did_not_run_has_not_passed(tmp_path):
    ledger = Ledger(tmp_path / "part.json", {"a law": 3, "another": 1}, 60)
    ledger.passed("a law")
    with ledger.case("a law", "run it"):
        raise AssertionError("two | three")
    ledger.save()
    results = {"part": merged([json.loads(ledger.path.read_text())] * 2)}
    assert totals(results) == (8, 4, 2) and not is_whole(results)
    text = page(results, ABOUT)
    assert "| part | a law | 6 | 4 | 2 |" in text and "| part | another | 2 | 0 | 0 |" in text
    assert "## Failure: part, a law" in text and "run it" in text and "interrupted" in text
    one = {"part": {"a law": {"planned": 2, "ran": 2, "failures": 0}}}
    assert is_whole(one)
    one["part"]["a law"]["ran"] = 1
    assert not is_whole(one)


def test_a_broken_law_is_found_and_its_world_made_small(tmp_path, monkeypatch):
    law = QUICK_LAWS[0]

    def broken(self):
        assert self.world.shape.layers < 4 or self.rows < 2, "four layers"

    monkeypatch.setattr(Laws, law, broken)
    monkeypatch.setattr(worlds, "LAWS", (law,))
    monkeypatch.setattr(worlds, "QUICK_LAWS", [law])
    name = law.replace("_", " ")
    ledger = Ledger(tmp_path / "worlds.json", {name: 6}, 60)
    worlds.run(ledger, 0, 3, tmp_path)
    check = ledger.checks[name]
    assert check.ran == 6 and check.failures and check.found[0]["what"].startswith("AssertionError: four")
    code = check.found[0]["reproduction"]
    assert "layers=4" in code and code.count("'text'") <= 2, code
    with pytest.raises(AssertionError, match="four layers"):
        exec(code, {})


def test_worlds_that_read_clips_text_tower_ask_no_hub_for_it(tmp_path, monkeypatch):
    """No fixture is there where the soak runs."""
    law, asked = QUICK_LAWS[0], []
    monkeypatch.setattr(text_tower, "open_clip", lambda source, *fit: asked.append(source))
    monkeypatch.setattr(Laws, law, lambda self: text_tower.open_clip(PUBLISHED, 8, "cpu"))
    monkeypatch.setattr(worlds, "LAWS", (law,))
    monkeypatch.setattr(worlds, "QUICK_LAWS", [law])
    ledger = Ledger(tmp_path / "worlds.json", {law.replace("_", " "): 2}, 60)
    worlds.run(ledger, 0, 3, tmp_path)
    assert asked == [str(tiny_clip(8))] * 2


VALID = {"slow": 1, "dead": 2, "bug": 3, "name": 4, "nobody": 5, "fine": 6}


class Reading:
    """A parser of an object in which every changed value says what happens."""

    @staticmethod
    def files(folder):
        (folder / "a.json").write_text(json.dumps(VALID))
        return [folder / "a.json"]

    @staticmethod
    def read(folder):
        try:
            found = json.loads((folder / "a.json").read_bytes())
            changed = [name for name, value in VALID.items() if found.get(name) != value]
        except (ValueError, AttributeError):
            raise ValueError("a.json is no JSON object") from None
        for name in changed:
            if name == "slow":
                time.sleep(60)
            if name == "dead":
                os._exit(3)
            if name == "bug":
                raise KeyError("bug")
            if name != "fine":
                raise ValueError("a.json: name is wrong" if name == "name" else "something is wrong here")


def test_a_parser_that_hangs_dies_or_says_nothing_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "LONGEST", 0.2)
    monkeypatch.setitem(fuzz.PARSERS, "toy", Parser(Reading.files, Reading.read, cases=150))
    ledger = Ledger(tmp_path / "fuzz.json", {"toy": 150}, 60)
    monkeypatch.setattr("tests.soak.ledger.SHOWN", 100)
    assert fuzz.cases(ledger, "toy", 2, tmp_path / "corpus", 60) == 150
    found = "\n".join(one["what"] for one in ledger.checks["toy"].found)
    assert ledger.checks["toy"].ran == 150 and 5 < ledger.checks["toy"].failures < 150
    for wrong in ("no end within", "hung or died", "KeyError: 'bug'", "names no file"):
        assert wrong in found, f"{wrong} was not found"
    bug = next(one for one in ledger.checks["toy"].found if "KeyError: 'bug'" in one["what"])
    number = bug["reproduction"].split()[-1]
    assert fuzz.main("toy", "2", number) == 1


SLOPPY = """
import pathlib, time
half, whole = pathlib.Path("half"), pathlib.Path("done")
half.write_text("begun again" if half.exists() else "begun")
time.sleep({wait})
whole.write_text(half.read_text())
"""


@pytest.mark.parametrize("sloppy", [True, False])
def test_a_job_that_is_not_the_same_after_a_kill_is_found(tmp_path, monkeypatch, sloppy):
    code = SLOPPY.format(wait=0.6) if sloppy else SLOPPY.format(wait=0.6).replace("begun again", "begun")
    job = jobs.Job(("-c", code), lambda work: jobs.digests(work, "done"), lambda folder: None)
    monkeypatch.setitem(jobs.JOBS, "toy", job)
    monkeypatch.setattr(kills, "CHAIN", 2)
    ledger = Ledger(tmp_path / "kills.json", {"toy": 2}, 60)
    kills.run(ledger, 0, 7, tmp_path)
    check = ledger.checks["toy"]
    assert check.ran == 2 and bool(check.failures) == sloppy
    if sloppy:
        assert "other files than an undisturbed run's: done" in check.found[0]["what"]
        assert check.found[0]["reproduction"].count("killed by") == 1


@pytest.mark.parametrize("how", kills.HOW)
@pytest.mark.parametrize(
    ("said", "exit_code", "wrong"), [("", 0, False), ("new is there already", 2, False), ("something else", 2, True)]
)
def test_a_kill_that_comes_when_the_job_is_at_its_end_finds_it_done(tmp_path, said, exit_code, wrong, how):
    code = f"import sys; print({said!r}); sys.exit({exit_code})"
    job = jobs.Job(("-c", code), lambda work: {}, lambda folder: None, done="new is there already")
    bench = jobs.Bench(job, tmp_path / "toy")
    bench.clear()
    process = bench.start()
    process.wait(60)
    assert (kills.stop(bench, process, kills.Kill(how, 0.0)) is not None) == wrong


@pytest.mark.slow
def test_an_interrupted_soak_leaves_a_valid_table(tmp_path):
    """Stopped while it runs, by the signal of a scheduler."""
    given = ["60", "--only", "worlds", "--seed", "1", "--output", str(tmp_path / "page.md")]
    process = subprocess.Popen([sys.executable, "-m", "tests.soak", *given], cwd=runner.ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "page.md").exists() and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 143
    found = json.loads((tmp_path / "page.json").read_text())
    assert not found["about"]["ended"] and found["about"]["seed"] == 1
    assert {check["planned"] for check in found["parts"]["worlds"].values()} == {5000, 20}
    assert "interrupted or still running" in (tmp_path / "page.md").read_text()


@pytest.mark.slow
def test_long_runs_in_small():
    assert "as by formula" in long_runs.one_generation(1500, 1)
    assert len(list(long_runs.many_calls(100, 1))) == 100
    assert len(list(long_runs.eight_threads(24, 1))) == 24
    assert "of the decisions agree" in long_runs.drift(1, 64)
