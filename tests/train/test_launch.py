"""Which launcher a run gets and why, that arguments pass through it unharmed, and how a signal passes through it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamic_llava.train import stopping
from dynamic_llava.train.launch import main, plan, plan_alone, supervise
from dynamic_llava.train.stopping import LAUNCH_FOLDER, StopRequest

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN, DEEPSPEED = "torch.distributed.run", "deepspeed.launcher.runner"
MACHINE_1_OF_2 = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"}


def planned(devices, deepspeed=False, **environment):
    return plan(devices=devices, deepspeed=deepspeed, environment=environment)


def alone(devices, **environment):
    return plan_alone("the main job", "dynamic_llava.tiny", devices=devices, environment=environment)


@pytest.mark.parametrize(
    ("launch", "launcher", "processes", "reason"),
    [
        (planned(0), None, 1, "no GPU visible: plain python"),
        (planned(1), None, 1, "1 GPU visible: plain python"),
        (planned(8), TORCHRUN, 8, "8 GPUs visible: torchrun with 8 processes"),
        (planned(8, PROCESSES="2"), TORCHRUN, 2, "8 GPUs visible and PROCESSES=2: torchrun with 2 processes"),
        (planned(8, PROCESSES="1"), TORCHRUN, 1, "8 GPUs visible and PROCESSES=1: torchrun with 1 process"),
        (planned(0, PROCESSES="2"), TORCHRUN, 2, "no GPU visible and PROCESSES=2: torchrun with 2 processes"),
        (planned(8, True), DEEPSPEED, 8, "8 GPUs visible and train.deepspeed set: deepspeed launcher with 8 processes"),
        (planned(1, True), DEEPSPEED, 1, "1 GPU visible and train.deepspeed set: deepspeed launcher with 1 process"),
        (planned(0, True), DEEPSPEED, 1, "no GPU visible and train.deepspeed set: deepspeed launcher with 1 process"),
        (planned(8, True, **MACHINE_1_OF_2), TORCHRUN, 8, "8 GPUs visible on each of 2 machines: torchrun with 8 "),
        (alone(8), TORCHRUN, 1, "the main job on the first of 8 GPUs: torchrun with 1 process"),
        (alone(0), None, 1, "the main job: plain python"),
        (alone(8, RANK="0", WORLD_SIZE="1"), None, 1, "plain python, process 0 of 1 of another launcher"),
        (planned(8, RANK="3", WORLD_SIZE="8"), None, 1, "plain python, process 3 of 8 of another launcher"),
    ],
)  # fmt: skip
def test_the_launcher_and_why(launch, launcher, processes, reason):
    assert reason in launch.reason and "\n" not in launch.reason
    assert launch.processes == processes
    command = launch.command("python", ["run.yaml"])
    assert command[:3] == ["python", "-m", launcher or "dynamic_llava.train"]


ARGUMENTS = ["run.yaml", "--name", "--n", "--no", "-h", "--help", "--train.seed=1", "--master_port", "5", "--module"]


def test_arguments_reach_the_training_as_they_are():
    """torchrun and deepspeed accept abbreviated options of their own, also among those meant for the program."""
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    command = planned(0, PROCESSES="2").command("python", ARGUMENTS)
    read = get_args_parser().parse_args(command[3:])
    assert (read.module, read.training_script, read.nproc_per_node) == (True, "dynamic_llava.train", "2")
    assert read.training_script_args == ARGUMENTS and read.standalone
    command = planned(8, **MACHINE_1_OF_2).command("python", ARGUMENTS)
    read = get_args_parser().parse_args(command[3:])
    assert (read.nnodes, read.node_rank, read.master_addr, read.master_port) == ("2", 1, "10.0.0.7", 29501)
    assert read.training_script_args == ARGUMENTS and not read.standalone
    for launch, number in ((planned(0, True, PROCESSES="2"), 2), (planned(8, True), -1)):
        read = parse_args(launch.command("python", ARGUMENTS)[3:])
        assert (read.module, read.no_local_rank, read.user_script) == (True, True, "dynamic_llava.train")
        assert read.num_gpus == number, "counted from the machine's first GPU, not from the first visible one"
        assert read.user_args == ARGUMENTS
    assert planned(0).command("python", ARGUMENTS) == ["python", "-m", "dynamic_llava.train", *ARGUMENTS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"devices": 2, "PROCESSES": "3"}, "PROCESSES=3 but 2 GPUs are visible"),
        ({"devices": 0, "PROCESSES": "two"}, "PROCESSES='two' is no number"),
        ({"devices": 0, "PROCESSES": "0"}, "PROCESSES='0' is no number"),
        ({"devices": 8, "deepspeed": True, "PROCESSES": "4"}, "make 4 visible instead"),
        ({"devices": 8, "NNODES": "2"}, "also needs NODE_RANK, MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        planned(**settings)


@pytest.mark.parametrize("environment", [{"PROCESSES": "2"}, {"NNODES": "2"}])
def test_a_program_of_one_process_refuses_several(environment):
    with pytest.raises(ValueError, match="the main job runs in one process; unset PROCESSES and NNODES"):
        alone(0, **environment)
    assert alone(8).command("python", ["job"])[-3:] == ["--", "dynamic_llava.tiny", "job"]


def test_cores_are_shared_out():
    assert int(planned(0, PROCESSES="1000").environment["OMP_NUM_THREADS"]) == 1
    assert planned(0, True).environment["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in planned(1, True).environment


def test_mistakes_are_answered_before_anything_starts(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "nowhere.yaml")]) == 2
    assert "there is no configuration file" in capsys.readouterr().err
    monkeypatch.setenv("PROCESSES", "many")
    assert main(["--model.base", "x"]) == 2
    assert "PROCESSES='many'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "--train.deepspeed" in capsys.readouterr().out


CHILD = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["DYNAMIC_LLAVA_LAUNCH_FOLDER"])
for _ in range({signals}):
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(0.2)
for _ in range(100):
    if (folder / "stop").exists():
        (folder / "exit-code").write_text("75")
        time.sleep({lasts})
        sys.exit(1)
    time.sleep(0.1)
sys.exit(3)
"""


def child(signals, lasts=0):
    return supervise([sys.executable, "-c", CHILD.format(signals=signals, lasts=lasts)], os.environ)


def test_a_signal_reaches_the_run_through_its_launcher_and_its_exit_code_comes_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert child(signals=1) == 75
    assert "asked the run to save and stop" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_it_at_once():
    assert child(signals=2, lasts=60) == 128 + signal.SIGTERM


def test_other_exit_codes_pass():
    assert supervise([sys.executable, "-c", "raise SystemExit(3)"], os.environ) == 3
    assert supervise([sys.executable, "-c", "pass"], os.environ) == 0


def test_the_first_signal_is_a_wish_and_an_echo_of_it_is_none(monkeypatch):
    monkeypatch.delenv(LAUNCH_FOLDER, raising=False)
    with StopRequest() as request:
        assert not request.asked()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.asked()


def test_a_later_signal_ends_the_process(tmp_path):
    """A quarter of a second counts as later here."""
    program = (
        "import os, signal, time; from dynamic_llava.train import stopping; stopping.ECHO_SECONDS = 0.2\n"
        "with stopping.StopRequest() as request:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(request.asked(), flush=True); time.sleep(0.25)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still here')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGTERM and done.stdout == "True\n"


def test_the_launchers_wish_is_heard_without_a_signal(tmp_path, monkeypatch):
    monkeypatch.setenv(LAUNCH_FOLDER, str(tmp_path))
    with StopRequest() as request:
        assert not request.asked()
        (tmp_path / "stop").touch()
        assert request.asked()
    stopping.tell_launcher(75)
    assert (tmp_path / "exit-code").read_text() == "75"


WATCHED = """
import os, pathlib, time
from dynamic_llava.train import stopping
stopping.WATCH_SECONDS = 0.05
stopping.end_with_launcher()
pathlib.Path("worker").write_text(str(os.getpid()))
time.sleep(60)
"""
AGENT = """
import os, pathlib, subprocess, sys
pathlib.Path("agent").write_text(str(os.getpid()))
subprocess.run([sys.executable, "-c", pathlib.Path("watched.py").read_text()])
"""
SUPERVISED = """
import os, sys
from pathlib import Path
from dynamic_llava.train.launch import supervise
Path("launcher").write_text(str(os.getpid()))
supervise([sys.executable, "-c", Path("agent.py").read_text()], os.environ)
"""


@pytest.mark.parametrize(
    ("killed", "environment", "ends"),
    [
        ("launcher", {}, True),
        ("agent", {}, True),
        ("agent", {"TORCHELASTIC_RUN_ID": "7"}, True),
        ("agent", {"CROSS_RANK": "0"}, True),
        ("agent", None, False),
    ],
    ids=["this launcher", "its torchrun", "another torchrun", "another deepspeed", "no launcher"],
)
def test_a_training_ends_with_what_launched_it(tmp_path, killed, environment, ends):
    """A launcher that is killed can pass nothing on, and whoever was started by no launcher outlives its parent."""
    (tmp_path / "watched.py").write_text(WATCHED)
    (tmp_path / "agent.py").write_text(AGENT)
    program = SUPERVISED if environment == {} else AGENT
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    kept = {name: value for name, value in os.environ.items() if name not in stopping.LAUNCHED}
    start = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env={**kept, "PYTHONPATH": path, **(environment or {})}
    )
    try:
        wait_for(lambda: (tmp_path / "worker").is_file() and (tmp_path / "worker").read_text(), 60)
        os.kill(int((tmp_path / killed).read_text()), signal.SIGKILL)
        worker = int((tmp_path / "worker").read_text())
        if ends:
            wait_for(lambda: not is_running(worker), 20)
        else:
            time.sleep(1)
            assert is_running(worker)
    finally:
        for name in ("worker", "agent"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((tmp_path / name).read_text()), signal.SIGKILL)
        start.kill()
        start.wait()


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def is_running(process):
    """Whether a process exists that has not ended; its parent may never ask for its end."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
