"""Every command of README and docs: run to its end where nothing is missing, else up to the first thing that is.

A command that names a checkpoint, a data set or a folder which only its reader has must get past its arguments and end
in one line that names what is missing. What would run a 7B model, or for minutes, has its arguments checked alone.
"""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dynamic_llava.cli import load_config
from dynamic_llava.train.config import RunConfig
from tests.test_configs import class_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
RUN_BY_CI = ("setup.sh", "test.sh", "test_lmms_eval.sh", "nltk_data.sh")
"""Scripts that .ci/run runs whole."""
MEASURES = ("latency", "roofline", "training", "curve", "attention", "benchmark", "data", "against")
LONG = (*(f"profile {name}" for name in MEASURES), "tiny benchmarks")
"""Commands whose arguments alone are checked."""
WHOLE = ("profile flops", "profile tokens", "profile memory", "eval --tasks list", "sweep")
"""Commands that lack nothing here, as does `look` alone."""
IN_PLACE_OF = {"scripts/eval.sh": "dynamic_llava.eval", "scripts/sweep.sh": "dynamic_llava.sweep"}
BENCHMARK = ["dynamic_llava.profile", "benchmark"]


def commands():
    """Return (page, command) of every line that starts a script or a module of ours."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").split("\n"):
                if re.search(r"\bbash scripts/|python -m dynamic_llava|^dynamic-llava ", line):
                    found.append((page.name, line.split(" #")[0].strip()))
    return sorted(set(found))


def words_of(command):
    """Return the module and arguments that a command starts, or the script with its arguments."""
    words = [word for word in shlex.split(command) if not re.match(r"^[A-Z_]+=", word)]
    if words[0] == "bash":
        script = words[1]
        if script == "scripts/benchmark.sh":
            return [*BENCHMARK, *words[2:]]
        return [IN_PLACE_OF.get(script, script), *words[2:]]
    return words[words.index("-m") + 1 :] if "-m" in words else ["dynamic_llava", *words[1:]]


def starts(words, known):
    """Whether the command without its package is one of `known`."""
    text = " ".join(words).removeprefix("dynamic_llava.").removeprefix("dynamic_llava ")
    return any(text == name or text.startswith(name + " ") for name in known)


class Parsed(Exception):
    """The command line has been understood."""


def run_module(words, monkeypatch):
    """Run a module as `python -m` does, in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", words)
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=False)
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with the configurations and the class of a page's own, norm.py, and nothing else."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    (tmp_path / "norm.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    sys.modules.pop("norm", None)
    yield
    sys.modules.pop("norm", None)


@pytest.mark.parametrize(("page", "command"), commands())
def test_command(page, command, elsewhere, monkeypatch, capsys):
    words = words_of(command)
    if words[0].startswith("scripts/"):
        check_script(words)
    elif starts(words, LONG) and "--help" not in words:
        check_arguments(words, monkeypatch)
    elif starts(words, WHOLE) or "--help" in words or words == ["dynamic_llava", "look"]:
        words += ["--dry-run"] if words[0] == "dynamic_llava.sweep" and "--dry-run" not in words else []
        assert run_module(words, monkeypatch) == 0, capsys.readouterr().err
    else:
        code = run_module(words, monkeypatch)
        shown = capsys.readouterr()
        said = (shown.out + shown.err).strip()
        assert code in (1, 2) and "usage:" not in said and "Traceback" not in said, said
        given = [word for word in words[1:] if "/" in word or "." in word]
        for file in (word for word in given if word.startswith("configs/")):
            config = load_config(RunConfig, [file], "", "")
            given += [config.model.base, config.data.json]
        assert any(word in said or Path(word).name in said for word in given), said


def check_script(words):
    """Scripts are run by CI; here the shell reads them, and a configuration that they are given is loaded."""
    script, *rest = words
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    if script == "scripts/train.sh" and rest:
        if "/" in rest[0]:  # without one it is the reader's own file
            load_config(class_of(ROOT / rest[0]), rest, "train", "")
    else:
        assert script == "scripts/train.sh" or Path(script).name in RUN_BY_CI, f"{script} is run by no test"


def check_arguments(words, monkeypatch):
    """Let the command parse its arguments, and stop it there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *given, **named):
        parse(parser, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed):
        run_module(words, monkeypatch)
