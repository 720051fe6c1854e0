"""Files are there in full or not at all, belong to one process at a time, and are told apart by what they hold."""

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dynamic_llava import files
from dynamic_llava.files import Lock, WriteError, amount, file_digest, replace_file, writing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMIC_LLAVA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def a_full_disk():
    """No file may grow beyond 100 bytes: every larger write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_with_the_file_and_leaves_what_was_there(tmp_path, a_full_disk):
    replace_file(tmp_path / "a.json", "short")
    with pytest.raises(
        WriteError, match=r"a\.json could not be written \(File too large.* are free there\): make room"
    ):
        replace_file(tmp_path / "a.json", "x" * 200)
    assert (tmp_path / "a.json").read_text() == "short"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(28, "No space left on device"), "No space left on device; .* are free there.: make room"),
        (OSError(30, "Read-only file system"), "Read-only file system.: make it writable"),
        (PermissionError(13, "Permission denied"), "Permission denied.: make it writable"),
        (OSError("encoder error -2 when writing image file"), "encoder error -2"),
    ],
)
def test_whatever_keeps_a_file_from_being_written_names_it(tmp_path, error, advice):
    with pytest.raises(WriteError, match=f"world could not be written .{advice}"), writing(tmp_path / "world"):
        raise error


def test_a_file_that_was_only_read_is_not_called_unwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no image folder"), writing(tmp_path / "out" / "cache"):
        raise FileNotFoundError("there is no image folder images; set data.image_folder")
    with pytest.raises(PermissionError) as error, writing(tmp_path / "out" / "cache"):
        raise PermissionError(13, "Permission denied", str(tmp_path / "data" / "data.json"))
    assert not isinstance(error.value, WriteError)
    with pytest.raises(WriteError, match="cache could not be written"), writing(tmp_path / "out" / "cache"):
        (tmp_path / "out" / "cache").mkdir()
        (tmp_path / "out" / "cache").mkdir()


@pytest.mark.parametrize("unfinished", ["cache.partial", ".cache.partial", "cache.part", "cache.partial-7"])
def test_a_file_of_an_unfinished_folder_names_the_finished_one(tmp_path, unfinished):
    inner = tmp_path / "out" / unfinished / "images" / "0.png"
    with pytest.raises(WriteError, match=r"out/cache could not be written .Operation not permitted"):  # noqa: SIM117
        with writing(tmp_path / "out" / "cache"):
            raise PermissionError(1, "Operation not permitted", str(inner))
    with pytest.raises(PermissionError) as error, writing(tmp_path / "out" / "cache"):
        raise PermissionError(1, "Operation not permitted", str(tmp_path / "out" / "cached.partial" / "0.png"))
    assert not isinstance(error.value, WriteError)


def test_what_a_message_quotes_is_cut_and_can_be_printed():
    assert files.brief_text("a\ud96fb") == "a\\ud96fb" and files.brief_text("ä, 图") == "ä, 图"
    assert len(files.brief_text("x" * 5000)) < 1000


def test_an_amount_has_a_unit_that_suits_it():
    given = (0, 1, 999, 1000, 4_200_000, 13.5e9, 2e12)
    assert [amount(size) for size in given] == [
        "0 bytes", "1 bytes", "999 bytes", "1.0 kB", "4.2 MB", "13.5 GB", "2.0 TB",
    ]  # fmt: skip


@pytest.mark.parametrize("remembered", [1, 10**9], ids=["large", "small"])
def test_a_digest_is_that_of_the_content_whatever_the_dates_say(tmp_path, monkeypatch, remembered):
    """A change in place that keeps name, inode, size and date of change; a copy; a file that was touched."""
    monkeypatch.setattr(files, "REMEMBERED", remembered)
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    time.sleep(0.02)
    before, dates = file_digest(file), (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    assert file_digest(file) == before
    with file.open("r+b") as open_file:
        open_file.write(b"two")
    os.utime(file, ns=dates)
    assert file_digest(file) != before
    file.write_bytes(b"one")
    assert file_digest(file) == before
    (tmp_path / "copy").write_bytes(b"one")
    assert file_digest(tmp_path / "copy") == before


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REMEMBERED", 1)
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    first = file_digest(file)
    assert not (tmp_path / "cache").exists(), "it may change again within the same tick of the clock"
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0)
    time.sleep(0.02)
    assert file_digest(file) == first
    (remembered,) = (tmp_path / "cache" / "digests").iterdir()
    remembered.write_text("what was remembered")
    assert file_digest(file) == "what was remembered"


HOLDER = """
import sys, time
from pathlib import Path
from dynamic_llava.files import Lock
with Lock(Path(sys.argv[1]), "training in runs/x"):
    print("held", flush=True)
    time.sleep(60)
"""


def start_holder(path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout.readline() == b"held\n"
    return holder


def test_a_lock_names_its_holder_and_outlives_no_killed_one(tmp_path, caplog):
    path = tmp_path / "new" / "run.lock"
    holder = start_holder(path)
    here = socket.gethostname()
    with pytest.raises(ValueError, match=rf"training in runs/x: process {holder.pid} of .* on {here}, since 2") as busy:
        Lock(path, "training in runs/x").take()
    assert str(path) in str(busy.value) and "choose another name or folder" in str(busy.value)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Lock(path, "training in runs/x"):
        assert f"process {holder.pid} of" in caplog.text and "has ended without saying so" in caplog.text
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_a_lock_is_waited_for_where_that_is_asked(tmp_path):
    path = tmp_path / "run.lock"
    lock = Lock(path, "building").take()
    threading.Timer(0.3, lock.release).start()
    began = time.monotonic()
    Lock(path, "building").take(wait=True).release()
    assert time.monotonic() - began > 0.2


def test_what_a_killed_holder_has_started_keeps_the_lock_until_it_ends(tmp_path, monkeypatch):
    """As data workers do, which notice within seconds; nobody works beside a survivor."""
    path = tmp_path / "run.lock"
    holder = start_holder(path)
    descriptor = os.open(path, os.O_RDWR)
    holder.kill()
    holder.wait()
    line = path.read_text()

    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(files, "ENDING_SECONDS", 0.3)
    with pytest.raises(ValueError, match=f"process {holder.pid}"):
        Lock(path, "training").take()
    assert path.read_text() == line
    threading.Timer(0.3, lambda: os.close(descriptor)).start()
    monkeypatch.setattr(files, "ENDING_SECONDS", 30)
    Lock(path, "training").take().release()


def test_processes_of_one_work_share_a_lock_that_the_last_one_removes(tmp_path):
    path = tmp_path / "run.lock"
    first, second = Lock(path, "training"), Lock(path, "training")
    first.take()
    with pytest.raises(ValueError, match="is at it"):
        second.join()
    first.share()
    second.join()
    with pytest.raises(ValueError, match=f"process {os.getpid()} "):
        Lock(path, "training").take()
    first.release()
    with pytest.raises(ValueError, match="is at it"):
        Lock(path, "training").take()
    second.release()
    assert not path.exists()


@pytest.mark.parametrize("locks", [True, False], ids=["a lock of one machine", "no locks at all"])
@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_machine_is_known_by_its_signs_of_life(tmp_path, monkeypatch, alive, locks, caplog):
    path = tmp_path / "run.lock"
    host = "elsewhere" if locks else socket.gethostname()
    path.write_text(json.dumps({"user": "ann", "host": host, "pid": 7, "since": "then"}))
    monkeypatch.setattr(files, "HEARTBEAT_SECONDS", 0.1)
    if not locks:

        def unsupported(file, operation):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(files.fcntl, "flock", unsupported)
    stop = threading.Event()

    def live():
        while not stop.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=live)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(ValueError, match=f"process 7 of ann on {host}, since then, is at it"):
                Lock(path, "training").take()
            assert "elsewhere" in path.read_text() or not locks
        else:
            lock = Lock(path, "training").take()
            assert "has ended without saying so" in caplog.text
            before = path.stat().st_mtime_ns
            time.sleep(0.3)
            assert path.stat().st_mtime_ns > before, "this holder shows life, too"
            lock.release()
    finally:
        stop.set()
        if alive:
            thread.join()
