"""The console command: every entry point under one name, imported when asked for, its help and exit codes its own."""

import re
import subprocess
import sys
from contextlib import suppress
from importlib import import_module

import pytest

from dynamic_llava import __main__ as console
from tests.test_entry_points import HELP, ROOT, options_of
from tests.test_public_api import OPTIONAL, loaded_after

ELSEWHERE = {
    "train.__main__": "train.launch", "tiny.train_base": "tiny.__main__", "eval.vlmevalkit": "docs/lmms-eval.md",
}  # fmt: skip
"""Entry points without a command of their own: the one that starts each, or whose help names it, or the page."""


def asked(words, monkeypatch, capsys, program="dynamic-llava"):
    monkeypatch.setattr(sys, "argv", [program, *words])
    code = 0
    try:
        code = console.main()
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_every_entry_point_has_a_command():
    assert {command.module for command in console.COMMANDS.values()} == set(HELP) - set(ELSEWHERE)
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic-llava = "dynamic_llava.__main__:main"' in text.split("[project.scripts]")[1].split("\n[")[0]


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_alone_it_lists_them_one_line_each(words, monkeypatch, capsys):
    code, out, err = asked(words, monkeypatch, capsys)
    assert code == 0 and not err and out.startswith("usage: dynamic-llava COMMAND")
    for name, command in console.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(command.about)}$", out, re.MULTILINE)
    assert max(map(len, out.split("\n"))) <= 100


def test_the_list_needs_no_package_and_no_second():
    code = "import sys; sys.argv = ['dynamic-llava']; from dynamic_llava.__main__ import main; main()"
    assert not loaded_after(code) & {"torch", "transformers", "numpy", "PIL", *OPTIONAL}
    timed = (
        f"{code}; import time; print(time.process_time(), file=sys.stderr)"  # of the processor: others run beside it
    )
    done = subprocess.run([sys.executable, "-c", timed], check=True, capture_output=True, text=True, cwd=ROOT)
    assert float(done.stderr) < 1


@pytest.mark.parametrize("name", console.COMMANDS)
def test_help_passes_through_in_the_words_that_were_typed(name, monkeypatch, capsys):
    module = console.COMMANDS[name].module
    code, out, err = asked([name, "--help"], monkeypatch, capsys)
    assert code == 0 and not err
    own = "checkpoints convert" if name == "convert" else name
    assert out.startswith(f"usage: dynamic-llava {own}"), out
    assert "python -m dynamic_llava." not in re.sub(r"python -m dynamic_llava\.tiny\.\w+", "", out)
    monkeypatch.setattr(sys, "argv", ["x/chat/__main__.py"])  # what `python -m` leaves there
    with suppress(SystemExit):
        import_module(f"dynamic_llava.{module}").main([*console.COMMANDS[name].before, "--help"])
    plain = capsys.readouterr().out
    assert plain.startswith(f"usage: python -m dynamic_llava.{own}")
    assert dict(options_of(plain)).keys() == dict(options_of(out)).keys()


@pytest.mark.parametrize("code", [0, 1, 2, 74, 75, 130])
def test_exit_codes_and_arguments_pass_through(code, monkeypatch, capsys):
    given = []
    monkeypatch.setattr("dynamic_llava.chat.__main__.main", lambda words: given.append(words) or code)
    assert asked(["chat", "--model", "x", "--", "--help"], monkeypatch, capsys)[0] == code
    assert given == [["--model", "x", "--", "--help"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lok"], "error: there is no command 'lok'; did you mean look?\n"),
        (["xyzzy"], "error: there is no command 'xyzzy'; the commands are look, chat,"),
        (["convert", "nowhere"], "usage: dynamic-llava checkpoints convert"),
        (["chat", "--modell", "x"], "did you mean --model?"),
    ],
)
def test_mistakes_are_told_with_exit_code_2(words, said, monkeypatch, capsys):
    code, out, err = asked(words, monkeypatch, capsys)
    assert code == 2 and said in err and not out


def test_the_module_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "dynamic_llava", "--version"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == f"dynamic-llava {console.dynamic_llava.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "dynamic_llava", "lok"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "did you mean look?" in done.stderr
