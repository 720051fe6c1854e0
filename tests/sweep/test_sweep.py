"""A sweep does each step once, shares runs between rows, reports failures and goes on, wherever it was interrupted."""

import fcntl
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dynamic_llava.cli import read_yaml
from dynamic_llava.cli.commands import take_method
from dynamic_llava.eval.summary import Summary, TaskRow
from dynamic_llava.eval.tasks import get_task
from dynamic_llava.files import EXIT_WRITE_FAILED
from dynamic_llava.methods import get_method, print_method
from dynamic_llava.sweep import plan as planning
from dynamic_llava.sweep import table
from dynamic_llava.sweep.__main__ import main
from dynamic_llava.sweep.config import SweepConfig
from dynamic_llava.sweep.run import lock_of, run_plan
from dynamic_llava.sweep.table import results, write_table
from dynamic_llava.train.config import file_inputs
from dynamic_llava.train.finished import write_record
from tests.sweep.fakes import SWEEP, FakeSweep

ALL = [
    "evaluate weights none",
    "train base",
    "evaluate base both",
    "train half",
    "evaluate half both",
]


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    return FakeSweep(tmp_path, monkeypatch)


def run(sweep, *arguments):
    return main([str(sweep.path), *arguments])


def test_every_step_is_done_once_and_rows_share_runs(sweep, capsys):
    assert run(sweep) == 0
    assert sweep.calls() == ALL
    page = (sweep.folder / "runs/sweeps/few/table.md").read_text()
    assert "| I\\|T " in page and "54.0 (54.3, -0.3)" in page and "54.0 (60.0, -6.0)" in page
    assert "0 of 8 cells" in page and "1.25 (1.20, +0.05)" in page
    assert "I|T" in capsys.readouterr().out
    assert run(sweep) == 0
    assert sweep.calls() == []


def test_a_dry_run_prints_every_command_and_starts_none(sweep, capsys):
    assert run(sweep, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert sweep.calls() == [] and not (sweep.folder / "runs").exists()
    assert "0 of 5 steps are done" in shown and "train runs/base: missing" in shown and "as above (missing)" in shown
    for planned in sweep.plan().rows:
        for step in planned.steps:
            assert all(part in shown for part in step.command)
    run(sweep)
    capsys.readouterr()
    run(sweep, "--dry-run")
    assert "5 of 5 steps are done" in capsys.readouterr().out


def test_a_failed_training_is_reported_and_the_others_go_on(sweep, capsys):
    (sweep.folder / "fail-base").touch()
    assert run(sweep) == 1
    assert sweep.calls() == ["evaluate weights none", "train base", "train half", "evaluate half both"]
    shown = capsys.readouterr()
    assert shown.err.count("failed: train runs/base") == 1 and "exit code 3" in shown.err
    assert "not done for want of the model: evaluate tiny" in shown.out and "failed above" in shown.out
    found = json.loads((sweep.folder / "runs/sweeps/few/results.json").read_text())
    assert found["missing"] == 4
    assert found["rows"][1]["cells"]["PPL"] == {"ours": None, "paper": 1.2, "difference": None}
    assert "- (1.20)" in (sweep.folder / "runs/sweeps/few/table.md").read_text()
    (sweep.folder / "fail-base").unlink()
    assert run(sweep) == 0
    assert sweep.calls() == ["train base", "evaluate base both"]


def test_a_file_that_cannot_be_written_ends_the_sweep_with_an_exit_code_of_its_own(sweep, capsys):
    (sweep.folder / "full-base").touch()
    assert run(sweep) == EXIT_WRITE_FAILED
    assert sweep.calls() == ["evaluate weights none", "train base"], "later steps could not write either"
    assert "FAILED: train runs/base" in capsys.readouterr().out
    (sweep.folder / "full-base").unlink()
    (sweep.folder / "runs/sweeps").rename(sweep.folder / "runs/before")
    (sweep.folder / "runs/sweeps").write_text("no folder")
    assert run(sweep) == EXIT_WRITE_FAILED
    assert "runs/sweeps" in capsys.readouterr().err
    (sweep.folder / "runs/sweeps").unlink()
    assert run(sweep) == 0
    assert sweep.calls() == ALL[1:]


@pytest.mark.parametrize("rows", ["[[]]", "[1.5, 2]", "[{titel: x}]", "{a: 1}"])
def test_rows_that_are_none_are_named(tmp_path, rows):
    (tmp_path / "odd.yaml").write_text(f"name: odd\nrows: {rows}\n")
    with pytest.raises(
        ValueError, match=r"odd\.yaml: (rows, entry 1,|unknown key rows(, entry 1, titel; did you|\.a))"
    ):
        read_yaml(SweepConfig, tmp_path / "odd.yaml")


def test_a_failed_evaluation_costs_its_own_cells_only(sweep, capsys):
    (sweep.folder / "fail-evaluate-half").touch()
    assert run(sweep) == 1
    assert sweep.calls() == ALL
    assert "evaluate tiny (runs/half/eval/both/tiny): its command ended with exit code 4" in capsys.readouterr().err
    assert results(sweep.plan())["missing"] == 2


def test_a_command_that_leaves_nothing_has_failed(sweep, capsys):
    (sweep.folder / "nothing-base").touch()
    assert run(sweep) == 1
    assert "ended well but the result is not there" in capsys.readouterr().err


def test_a_model_of_other_settings_is_neither_taken_nor_overwritten(sweep, capsys):
    run(sweep)
    sweep.calls()
    assert run(sweep, "--train.max-steps", "9") == 1
    assert sweep.calls() == []
    error = capsys.readouterr().err
    assert "train.max_steps was 7 and is 9" in error and "Move runs/base away" in error
    (sweep.folder / "runs/base/model/run.yaml").unlink()
    assert run(sweep) == 1
    assert "no run.yaml" in capsys.readouterr().err


def test_settings_that_change_no_weight_do_not_matter(sweep):
    run(sweep)
    sweep.calls()
    assert run(sweep, "--train.log-every", "3") == 0
    assert sweep.calls() == []


def test_a_new_model_is_evaluated_anew_and_old_answers_are_kept_aside(sweep):
    run(sweep)
    sweep.calls()
    shutil.rmtree(sweep.folder / "runs/base/model")
    assert run(sweep) == 0
    assert sweep.calls() == ["train base", "evaluate base both"]
    places = sorted(path.name.split(".")[0] for path in (sweep.folder / "runs/base/eval/both").glob("tiny*"))
    assert places == ["tiny", "tiny"]


def test_what_was_evaluated_is_told_by_content_not_by_dates(sweep):
    run(sweep)
    sweep.calls()
    weights = sweep.folder / "runs/base/model/model.safetensors"
    dates = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    os.utime(weights, (1, 1))
    assert run(sweep) == 0
    assert sweep.calls() == []
    weights.write_text(weights.read_text()[::-1])
    os.utime(weights, ns=dates)
    assert run(sweep) == 0
    assert sweep.calls() == ["evaluate base both"]


def test_a_benchmark_of_other_questions_is_evaluated_anew_and_one_whose_data_are_gone_is_not(benchmarks):
    data = benchmarks.folder / "pope.jsonl"
    (task, _) = benchmarks.plan().rows[0].evaluations

    def stale(text):
        data.write_text(text)
        return replace(task, data=(data,))

    stale("old").begin()
    stale("old").finish()
    assert stale("old").is_done() and not stale("new").is_done()
    data.unlink()
    assert replace(task, data=(data,)).is_done()
    before = set(task.folder.parent.iterdir())
    stale("new").begin()
    (aside,) = set(task.folder.parent.iterdir()) - before
    assert (aside / "summary.json").is_file() and not task.summary.exists()


def test_a_run_of_other_data_or_base_is_not_the_rows(sweep, monkeypatch):
    """Files of the same name that hold something else, found where the model says what it was trained on."""
    run(sweep)
    training = sweep.plan().rows[1].training
    inputs = file_inputs(training.config, training.config.model.source)
    write_record(training.model, training.config, 1, inputs)
    assert training.is_done()
    data = Path(training.config.data.json)
    data.write_text(data.read_text() + " ")
    with pytest.raises(ValueError, match=r"data\.json was [\d,]+ bytes, sha256 \w+ and is [\d,]+ bytes, sha256"):
        training.is_done()
    data.unlink()
    assert training.is_done(), "data that are gone are compared by name"


def test_other_questions_are_another_evaluation(sweep):
    run(sweep)
    sweep.calls()
    text = sweep.path.read_text()
    sweep.path.write_text(text.replace("questions: 3", "questions: 2"))
    assert run(sweep) == 0
    assert sweep.calls() == ["evaluate weights none", "evaluate base both", "evaluate half both"]


def test_a_step_that_another_process_is_at_is_left_alone(sweep, capsys):
    place = lock_of(sweep.plan().rows[1].training)
    place.parent.mkdir()
    with place.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(sweep) == 1
    assert "train base" not in sweep.calls()
    assert "another process is at it" in capsys.readouterr().err
    assert run(sweep) == 0


def test_a_signal_reaches_the_running_step_and_ends_the_sweep(tmp_path, monkeypatch, capfd):
    sweep = FakeSweep(tmp_path, monkeypatch, processes=True)
    before = signal.getsignal(signal.SIGTERM)
    (sweep.folder / "stop-base").touch()
    assert run(sweep) == 75
    assert sweep.calls() == ["evaluate weights none", "train base"]
    assert "ended with exit code 75. The same command goes on" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    lock = lock_of(sweep.plan().rows[1].training).resolve()
    assert str(lock) in (tmp_path / "inherited.txt").read_text(), "a killed sweep's command would not hold the lock"
    (sweep.folder / "stop-base").unlink()
    assert run(sweep) == 0
    assert sweep.calls() == ALL[1:]


class Killed(BaseException):
    """What the test below throws: nothing in the product catches it."""


def test_killed_at_any_kind_of_write_it_goes_on_and_repeats_nothing_finished(sweep, monkeypatch):
    """The last write is in turn each of a row's (begun, complete, results.json, table.md), and the very last."""
    real, plan, left = planning.replace_file, sweep.plan(), 0

    def write(path, text):
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(path, text)

    def run_it():
        return run_plan(plan, print, lambda: write_table(plan, "x"))

    for moment in (0, 4, 5, 6, 7, 13):
        with monkeypatch.context() as patch:
            patch.setattr(planning, "replace_file", write)
            patch.setattr(table, "replace_file", write)
            left = moment
            with pytest.raises(Killed):
                run_it()
        first = sweep.calls()
        finished = [planned.evaluations[0].is_done() for planned in plan.rows[:3]]
        assert run_it() == []
        calls = first + sweep.calls()
        assert [call for call in calls if call.startswith("train")] == ["train base", "train half"]
        assert all(calls.count(call) == 1 for call, done in zip(ALL[::2], finished, strict=True) if done)
        assert all(calls.count(call) <= 2 for call in ALL) and set(calls) == set(ALL)
        assert len(calls) == len(ALL) + (moment == 5)
        assert results(plan)["missing"] == 0
        shutil.rmtree("runs")


def test_commands_are_those_that_a_user_starts(tmp_path, monkeypatch):
    sweep = FakeSweep(tmp_path, monkeypatch)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))
    half = sweep.plan("--train.batch-size", "4").rows[2]
    assert half.training.command[1:4] == ("-m", "dynamic_llava.train.launch", f"{tmp_path}/configs/base.yaml")
    assert half.training.command[-6:] == (*SWEEP["rows"][2]["overrides"], "--train.batch-size", "4")
    assert half.training.config.train.batch_size == 4 and half.training.config.sparsity.image_keep_rate == 0.5
    assert half.training.config.data.json.endswith("train.json")
    assert half.evaluations[0].command[1:4] == ("-m", "dynamic_llava.tiny", "measure")
    assert half.evaluations[0].model == "runs/half/model"


def test_benchmarks_are_evaluated_one_command_each_on_what_the_run_was_trained_for(tmp_path, monkeypatch):
    columns = [
        {"header": "POPE", "task": "pope"},
        {"header": "VQAv2", "task": "vqav2:val"},
        {"header": "again", "task": "pope", "metric": "accuracy"},
    ]
    rows = [
        {"title": "dense", "model": "hub/llava"},
        {"title": "I", "config": "configs/base.yaml", "overrides": ["--train.sparsity-mode", "image"]},
        {"title": "all of it", "model": "x/sparse", "sparsity": "both"},
    ]
    sweep = FakeSweep(tmp_path, monkeypatch, tiny=None, columns=columns, rows=rows, data_root="data", batch_size=8)
    plan = sweep.plan()
    assert [[evaluation.task for evaluation in planned.evaluations] for planned in plan.rows] == [
        ["pope", "vqav2:val"]
    ] * 3
    commands = [" ".join(planned.evaluations[1].command[2:]) for planned in plan.rows]
    tail = "--tasks vqav2:val --data-root data --batch-size 8"
    assert commands == [
        f"--model hub/llava --sparsity none --output-folder runs/models/llava/eval/none/vqav2-val {tail}",
        f"--model runs/base/model --sparsity image --output-folder runs/base/eval/image/vqav2-val {tail}",
        f"--model x/sparse --sparsity both --output-folder runs/models/sparse/eval/both/vqav2-val {tail}",
    ]


def test_rows_of_a_table_may_differ_by_their_method_alone(tmp_path, monkeypatch):
    """A row's method, or that of its run, is what its evaluations are asked under, in a folder of its own."""
    fastv = {"name": "fastv", "layer": 3}
    rows = [
        {"title": "dense", "model": "hub/llava"},
        {"title": "FastV", "model": "hub/llava", "method": fastv},
        {"title": "FastV again", "model": "hub/llava", "method": {**fastv, "image_keep_rate": 0.5}},
        {"title": "FastV, less", "model": "hub/llava", "method": {**fastv, "image_keep_rate": 0.2}},
        {"title": "tuned", "config": "configs/base.yaml", "overrides": ["--method", "fastv", "--method.layer", "3"]},
    ]
    columns = [{"header": "POPE", "task": "pope"}]
    sweep = FakeSweep(tmp_path, monkeypatch, tiny=None, columns=columns, rows=rows)
    evaluations = [planned.evaluations[0] for planned in sweep.plan().rows]
    words = [evaluation.command for evaluation in evaluations]
    assert "--sparsity" in words[0] and all("--sparsity" not in one for one in words[1:])
    assert take_method(words[1])[1] == {"name": "fastv", "layer": "3", "image_keep_rate": "0.5"}
    assert words[1] == words[2] and evaluations[1].folder == evaluations[2].folder  # one evaluation for both
    assert take_method(words[3])[1]["image_keep_rate"] == "0.2"
    assert take_method(words[4])[1] == take_method(words[1])[1] and "runs/base/model" in words[4]
    assert len({evaluation.folder for evaluation in evaluations}) == 4
    assert len({evaluation.fingerprint() for evaluation in evaluations[:4]}) == 3
    assert evaluations[1].settings["method"] == print_method(get_method("fastv", layer=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [{"title": "x", "model": "tiny", "method": "fastvv"}]}, "row 'x': .*did you mean 'fastv'"),
        ({"rows": [{"title": "x", "model": "tiny", "method": {"name": "fastv", "layr": 1}}]}, "did you mean 'layer'"),
        ({"rows": [{"title": "x", "model": "tiny", "method": "fastv", "sparsity": "image"}]}, "contradict each other"),
        ({"rows": []}, "at least one row and one column"),
        ({"name": "a/b"}, "plain folder name"),
        ({"tiny": None}, "needs a metric, and the sweep a `tiny` section"),
        ({"columns": [{"header": "x", "task": "nothing"}]}, "task 'nothing' is not known"),
        ({"columns": [{"header": "x", "task": "tiny"}]}, "needs a metric"),
        ({"columns": SWEEP["columns"] * 2}, "every header must be given, and given once"),
        ({"rows": SWEEP["rows"] * 2}, "every title must be given, and given once"),
        ({"rows": [{"title": "x"}]}, "needs either a config"),
        ({"rows": [{"title": "x", "model": "tiny", "config": "a.yaml"}]}, "needs either a config"),
        ({"rows": [{"title": "x", "model": "tiny", "overrides": ["--seed", "1"]}]}, "overrides belong to a run"),
        ({"rows": [{"title": "x", "model": "tiny", "paper": {"PLP": 1}}]}, "no column; did you mean 'PPL'"),
        ({"rows": [{"title": "x", "model": "tiny", "papre": {}}]}, "papre"),
        ({"rows": [{"title": "x", "config": "configs/nothing.yaml"}]}, "no configuration file .*configs/nothing.yaml"),
        ({"batch": 3}, "unknown key batch; did you mean batch_size"),
    ],
)
def test_mistakes_in_a_sweep_are_named(tmp_path, monkeypatch, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        FakeSweep(tmp_path, monkeypatch, **changes)


def test_a_run_with_two_settings_is_refused(tmp_path, monkeypatch):
    rows = [SWEEP["rows"][1], SWEEP["rows"][2] | {"overrides": ["--sparsity.image-keep-rate", "0.5"]}]
    with pytest.raises(
        ValueError, match=r"rows 'I\|T' and 'half' both keep their files in runs/base but are different"
    ):
        FakeSweep(tmp_path, monkeypatch, rows=rows)
    rows = [{"title": "a", "model": "x/model"}, {"title": "b", "model": "y/model"}]
    (tmp_path / "more").mkdir()
    with pytest.raises(ValueError, match="both keep their files in runs/models/model"):
        FakeSweep(tmp_path / "more", monkeypatch, rows=rows)


def test_the_main_job_is_no_row(sweep):
    path = sweep.folder / "configs/base.yaml"
    path.write_text(path.read_text() + "\ntiny: {}\n")
    with pytest.raises(ValueError, match=r"base\.yaml has a `tiny` section, so it is a file of `python -m dynamic"):
        sweep.plan()


def test_a_users_mistake_is_one_line_and_exit_code_2(sweep, capsys):
    assert main(["nothing.yaml"]) == 2
    assert "error: there is no configuration file nothing.yaml" in capsys.readouterr().err


def test_evaluations_use_every_process_they_can(tmp_path, monkeypatch):
    columns = [{"header": "POPE", "task": "pope"}]
    sweep = FakeSweep(
        tmp_path, monkeypatch, tiny=None, columns=columns, rows=[{"title": "dense", "model": "hub/llava"}]
    )
    monkeypatch.setattr("dynamic_llava.sweep.plan.EVALUATE", ("python", "-m", "dynamic_llava.eval"))
    monkeypatch.setenv("PROCESSES", "3")
    command = sweep.plan().rows[0].evaluations[0].command
    assert command[:6] == ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m")
    assert command[6:10] == ("--", "dynamic_llava.eval", "--model", "hub/llava")


BENCHMARKS = [
    {"header": "POPE", "task": "pope"},
    {"header": "accuracy", "task": "pope", "metric": "accuracy", "digits": 2},
    {"header": "KV MB", "task": "pope", "metric": "kv_bytes", "scale": 1e-6},
    {"header": "VQAv2", "task": "vqav2"},
]


def summary_of(name, metrics=None, costs=None):
    """What `python -m dynamic_llava.eval` writes for one task; without metrics it has no score here."""
    task = get_task(name)
    score = None if metrics is None else task.result(metrics, {}, [])
    row = TaskRow(name, task, score, costs=costs or {})
    return Summary("hub/llava", "none", "7b", {}, {}, [row]).to_json()


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """A sweep over a benchmark with a score and one whose score a server gives, evaluated."""
    paper = {"POPE": 85.9, "VQAv2": 78.5}
    rows = [{"title": "dense", "model": "hub/llava", "paper": paper}]
    sweep = FakeSweep(tmp_path, monkeypatch, tiny=None, columns=BENCHMARKS, rows=rows)
    metrics = {"mean_f1": (85.25, "percent"), "accuracy": (86.0, "percent")}
    for task, summary in {
        "pope": summary_of("pope", metrics, {"kv_bytes": 3e6}),
        "vqav2": summary_of("vqav2"),
    }.items():
        (tmp_path / f"{task}.json").write_text(json.dumps(summary))
    (tmp_path / "evaluate.py").write_text(
        "import pathlib, shutil, sys\n"
        "task, folder = (sys.argv[sys.argv.index(name) + 1] for name in ('--tasks', '--output-folder'))\n"
        "shutil.copy(f'{task}.json', pathlib.Path(folder) / 'summary.json')\n"
    )
    assert run(sweep) == 0
    return sweep


def cells(sweep):
    return {header: cell["ours"] for header, cell in results(sweep.plan())["rows"][0]["cells"].items()}


def test_a_column_is_a_benchmarks_number_another_metric_or_a_cost(benchmarks):
    assert cells(benchmarks) == {"POPE": 85.25, "accuracy": 86.0, "KV MB": pytest.approx(3.0), "VQAv2": None}
    page = (benchmarks.folder / "runs/sweeps/few/table.md").read_text()
    assert "85.2 (85.9, -0.7)" in page and "- (78.5)" in page and "1 of 4 cells" in page


def test_a_servers_number_comes_from_a_file_beside_the_submission(benchmarks):
    place = benchmarks.folder / "runs/models/llava/eval/none/vqav2/server.json"
    place.write_text('{"score": 78.0}')
    assert cells(benchmarks)["VQAv2"] == 78.0
    place.write_text('{"scores": 78.0}')
    with pytest.raises(ValueError, match=r'server\.json must hold {"score": NUMBER}'):
        cells(benchmarks)


def test_a_metric_that_the_benchmark_does_not_have_is_named(benchmarks):
    benchmarks.path.write_text(benchmarks.path.read_text().replace("metric: accuracy", "metric: acuracy"))
    with pytest.raises(ValueError, match=r"pope has no metric 'acuracy'; it has kv_bytes, .*mean_f1, accuracy"):
        cells(benchmarks)
