"""`dynamic-llava report`: pages of every kind of run stand alone, can be made again, and survive what files hold."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
import yaml
from PIL import Image

from dynamic_llava.config import SparsityConfig
from dynamic_llava.config.run import RunConfig
from dynamic_llava.eval.compare.table import page as compared_page
from dynamic_llava.eval.summary import page as summary_page
from dynamic_llava.report import main, report_of
from dynamic_llava.tiny.job.config import JobConfig
from dynamic_llava.tiny.job.page import in_short, report_text
from dynamic_llava.train.report import BROKEN
from dynamic_llava.viz.run_report import REPORT
from tests.pages import HOSTILE, check_alone
from tests.spoiling import HOSTILE as ODD
from tests.spoiling import SPOILS, spoil
from tests.tiny.job.test_page import ENVIRONMENT, made_up

MARK = HOSTILE.replace("|", "")
WRITTEN = {"device": "cpu", "commit": MARK, "command": ["python", "-m", "x y"]}


def write(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    elif path.suffix == ".png":
        Image.new("RGB", value).save(path)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))


def curve(steps=12, **more):
    return [
        {"step": step, "lm_loss": 2 - step / 20, "image_keep_rate": 0.5 - step / 50, "output_keep_rate": 0.5, **more}
        for step in range(steps)
    ]


def training(folder):
    config = RunConfig(name="mine", data=RunConfig().data.__class__(json=MARK))
    write(folder, "config.yaml", yaml.safe_dump(asdict(config)))
    lines = [line | {"tau": 1 - line["step"] / 20, "learning_rate": 1e-5} for line in curve()]
    write(folder, "metrics.jsonl", [*lines, {"step": 11, "train_runtime": 3.5}])
    write(folder, "environment.json", WRITTEN)
    write(folder, BROKEN, [{"index": 3}])


def evaluation(folder):
    row = {
        "title": MARK, "metric": "accuracy", "value": 61.25, "unit": "percent", "shown": ["accuracy"], "paper": {},
        "metrics": {"accuracy": {"value": 61.25, "unit": "percent"}}, "counts": {}, "warnings": [MARK],
        "difference": None, "differences": {}, "efficiency": {}, "answers": None, "error": None, "settings": {},
        "paper_note": "",
    }  # fmt: skip
    found = {
        "model": MARK, "sparsity": None, "method": MARK, "size": None, "identity": "x", "tasks": {"pope": row},
        "settings": {"batch_size": 3, "dtype": MARK}, "environment": WRITTEN,
    }  # fmt: skip
    write(folder, "summary.json", found)
    write(folder, "table.md", summary_page(found))
    kept = {"image_kept": [12], "output_kept": 3, "output_tokens": 4}
    answer = {"question_id": 1, "prompt": "Is it?", "text": f"{MARK}\n\u202egnp", "metadata": kept}
    write(folder, "answers/pope.jsonl", [answer, {"question_id": MARK, "text": "x" * 5000}])


def comparison(folder):
    def row(method, value, flop, front, reference=False):
        metric = {
            "value": value, "unit": "percent", "lower_is_better": False, "difference": value - 60, "low": value - 62.0,
            "high": value - 57.0,
        }  # fmt: skip
        return {
            "model": "m", "reference": reference, "method": method, "metrics": {"accuracy": metric}, "counts": {},
            "costs": {"prefill_flop_exact": flop, "kv_bytes": 2.0**20}, "times": {}, "groups": {}, "answers": None,
            "error": None, "warnings": [], "front": front,
        }  # fmt: skip

    rows = [row("dense", 60.0, 2e12, ["prefill_flop_exact"], True), row(MARK, 55.0, 1e12, ["prefill_flop_exact"])]
    methods = [{"model": "m", "method": name, "described": name, "set": None} for name in ("dense", MARK)]
    found = {
        "models": ["m"], "methods": methods, "left_out": [MARK], "equal": None, "environment": WRITTEN,
        "bootstrap": {"resamples": 10, "seed": 0, "level": 0.95}, "settings": {"speed_batch": 2, "batch_size": 2},
        "tasks": {"toy": {"title": MARK, "shown": ["accuracy"], "rows": rows, "warnings": [], "split": None}},
    }  # fmt: skip
    write(folder, "compare.json", found)
    write(folder, "compare.md", compared_page(found))


def sweep(folder):
    cells = {"a": {"ours": 1.0, "paper": 2.0, "difference": -1.0}}
    found = {
        "name": "few", "title": MARK, "rows": [{"title": "I|T", "model": MARK, "cells": cells}], "cells": 1,
        "missing": 0, "seeds": [0], "date": "2026-11-29", "environment": WRITTEN, "made_by": "python -m x",
    }  # fmt: skip
    write(folder, "results.json", found)
    write(folder, "table.md", f"# {MARK}\n\n| row | a |\n|:--|--:|\n| I\\|T | 1.00 (2.00, -1.00) |\n\n{MARK}\n")


def job(folder):
    results = [made_up(0, environment=ENVIRONMENT | {"commit": MARK}), made_up(1)]
    write(folder, "results.json", {"seeds": results})
    write(folder, "table.md", report_text(results, SparsityConfig()))
    write(folder, "config.yaml", yaml.safe_dump(asdict(JobConfig(name="job", output_folder=MARK))))
    keys = ("both", "both_35", "image", "control", MARK)
    write(folder, "metrics.jsonl", [{"seed": seed, "training": key, **line} for seed in (0, 1) for key in keys
                                    for line in curve()])  # fmt: skip
    for name in ("kept_patches", "training_curves"):
        write(folder, f"seed0/pictures/{name}.png", (9, 7))
    comparison(folder / "compare")
    write(folder, "budgets.md", "| row | 3 of 64 |\n|:--|--:|\n| dense | 1.0 |\n")


KINDS = {
    training: ("Training: run", "Language-model loss", "tau", "1 samples with a broken", "target of image tokens",
               "python -m 'x y'", "Other than the defaults", "image tokens kept", "11 steps logged"),
    evaluation: ("Evaluation: run", "61.2", "Is it?", "12 image tokens; 3 of 4 output tokens", "batch_size"),
    comparison: ("Methods compared: run", "Quality against cost", "TFLOP (calculated)", "55 at 1", "reference"),
    sweep: ("Sweep: run", "I|T", "1.00 (2.00, -1.00)", "2026-11-29"),
    job: ("The tiny world: run", "short answers", "Dynamic I|T, r_OT 0.35", "seeds 0, 1", "Rivals", "kept patches",
          "3 of 64"),
}  # fmt: skip
"""Kind of run -> what its page says."""


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def run(request, tmp_path):
    folder = tmp_path / "runs" / "run"
    request.param(folder)
    return folder


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != REPORT)


def text_of(page):
    return "".join(page.texts["main"])


def test_a_page_says_what_the_run_was_and_stands_alone(run, request, capsys):
    assert main([str(run)]) == 0
    said = capsys.readouterr()
    assert said.out == f"report: {run / REPORT}\n" and not said.err
    page = check_alone((run / REPORT).read_text(encoding="utf-8"))
    kind = next(kind for kind in KINDS if kind.__name__ == request.node.callspec.id)
    for word in KINDS[kind]:
        assert word in text_of(page), word
    assert MARK in text_of(page) and "\u202e" not in text_of(page)


def test_the_same_files_make_the_same_page(run, tmp_path, monkeypatch):
    main([str(run)])
    first = (run / REPORT).read_bytes()
    monkeypatch.chdir(run)
    assert main(["."]) == 0 and (run / REPORT).read_bytes() == first
    shutil.copytree(run, tmp_path / "elsewhere" / "run")
    main([str(tmp_path / "elsewhere" / "run")])
    assert (tmp_path / "elsewhere" / "run" / REPORT).read_bytes() == first


def check_no_empty_part(text):
    assert not re.search(r"</h[2-4]>\s*(</section>|</article>|<h2|<section>|</main>)", text)
    assert not re.search(r"<(ul|tbody|details|section|article|div[^>]*)>\s*</", text)


def test_what_a_run_lacks_is_left_out(run):
    whole = files_of(run)
    for path in whole:
        data = path.read_bytes()
        path.unlink()
        try:
            report = report_of(run)
        except FileNotFoundError as error:
            assert str(run) in str(error)
        else:
            assert not report.problems, path
            check_alone(report.page())
            check_no_empty_part(report.page())
        path.write_bytes(data)


def test_a_half_written_file_is_named(run, capsys):
    for path in files_of(run):
        if path.suffix == ".md" or path.name == "config.yaml":
            continue  # half of a text is a text
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 9])
        assert main([str(run)]) == 0
        said, name = capsys.readouterr().err, path.relative_to(run).as_posix()
        if path.stem == "training_curves" or name.endswith("/compare.md"):
            assert not said  # the page draws the curves itself
        else:
            assert name in said and said.count("\n") == 1, (name, said)
            assert name in text_of(check_alone((run / REPORT).read_text(encoding="utf-8")))
        path.write_bytes(data)


def test_spoilt_files_make_no_traceback_and_no_markup(run):
    for path in files_of(run):
        data = path.read_bytes()
        for place, odd in enumerate(ODD[::2]):
            ways = ("bytes", "cut") if path.suffix == ".png" else SPOILS if place < 2 else SPOILS[:1]
            for how in ways:
                path.write_bytes(spoil(data, path.suffix, how, 7 * place + len(how), odd))
                page = report_of(run).page()
                check_alone(page)
                check_no_empty_part(page)
        path.write_bytes(data)


def test_endless_settings_are_refused(tmp_path):
    training(tmp_path)
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else '1, 2, 3'}]" for i in range(9)]
    (tmp_path / "config.yaml").write_text("\n".join(levels))
    report = report_of(tmp_path)
    assert any("config.yaml holds too much" in problem for problem in report.problems)
    (tmp_path / "config.yaml").write_text("a: &a\n  b: *a\n")
    assert any("config.yaml holds too much" in problem for problem in report_of(tmp_path).problems)


def test_mistakes_are_told(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    training(tmp_path / "runs" / "inner")
    assert main([str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert "holds nothing that a report is made of" in error and str(tmp_path / "runs" / "inner") in error


def test_a_page_that_cannot_be_written_is_told(tmp_path, capsys):
    training(tmp_path / "run")
    (tmp_path / "run" / f"{REPORT}.partial").mkdir()
    assert main([str(tmp_path / "run")]) == 74
    assert REPORT in capsys.readouterr().err


def test_five_lines_say_what_a_job_came_to():
    lines = in_short([made_up(0), made_up(1)], SparsityConfig())
    said = dict(lines)
    assert [name for name, _ in lines] == ["short answers", "descriptions", "kept", "targets"]  # it has no costs
    assert said["short answers"].startswith("dense control 97.0 %, Dynamic I|T 96.0 %, FastV-like 85.0 %")
    assert "perplexity dense control 1.100" in said["descriptions"] and "50.0 % of output tokens" in said["kept"]
    assert re.match(r"(\d+) of \1 met$", said["targets"])
    bad = made_up(0, shift=0.5)
    assert "MISSED: accuracy, dense control minus Dynamic I|T" in dict(in_short([bad], SparsityConfig()))["targets"]
