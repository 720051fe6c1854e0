"""Files that outlive a process: written whole, held by one process at a time, told apart by their content.

Standard library only; training, evaluation, sweeps and the tiny world share it.
"""

import errno
import fcntl
import getpass
import hashlib
import json
import logging
import os
import reprlib
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from dynamic_llava.config import cache_folder

log = logging.getLogger(__name__)

EXIT_WRITE_FAILED = 74
"""Exit code of every command that could not write a file."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a file system that nothing else than writing meets."""
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120
REMEMBERED = 2**24
"""Least size, in bytes, of a file whose digest is remembered between processes."""
SETTLED_SECONDS = 2.0
"""A file that was changed this short a time ago may change again without its dates showing it."""
HEARTBEAT_SECONDS = 10.0
"""How often the holder of a lock shows that it lives; three silent ones are its death for another machine."""
ENDING_SECONDS = 30.0
"""How long a lock waits for what a killed holder has started: its data workers notice within seconds."""


class WriteError(OSError):
    """A file or folder could not be written: the disk is full or read-only, or a permission is missing."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError while `path`, or what is in it, is written into a WriteError that names it.

    An error that names a file elsewhere passes as it is: something that was read.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        own = type(error) is not OSError and error.errno is None  # a message of this library
        if own or (named is not None and not _near(named, path)):
            raise
        raise WriteError(_unwritten(path, error)) from error


def replace_file(path: Path, text: str) -> None:
    """Write a text file that is there in full or not at all; WriteError when it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def give_usual_modes(place: Path) -> None:
    """Give a file or folder, and what is in it, the modes that umask gives new ones.

    safetensors and tempfile make what only its owner may read; a checkpoint is read by others like any other file.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for path in (place, *(place.rglob("*") if place.is_dir() else ())):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def brief(value: Any) -> str:
    """Return a value as Python writes it, long ones cut: what a message shows of something that a file says."""
    return _REPR.repr(value)


def brief_text(text: object) -> str:
    """Return a message or a path that can be printed, a long one without its middle.

    What it quotes of a file may be of any length, and hold halves of escaped pairs (lone surrogates).
    """
    whole = str(text).encode(errors="backslashreplace").decode()
    return whole if len(whole) <= 1000 else f"{whole[:500]} ... {whole[-400:]}"


def amount(size: float) -> str:
    """Return a number of bytes in the unit that suits it: "812 bytes", "3.4 kB", "13.5 GB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of all bytes of a file, in hexadecimal digits.

    That of a large file is remembered in the cache folder under its place, inode, size and both dates; the second date
    (of the last change of anything) cannot be set, so a file that changed is never taken for what it was.
    """
    found = path.stat()
    facts = [str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    remembered = cache_folder() / "digests" / name if found.st_size >= REMEMBERED else None
    if remembered is not None and remembered.is_file():
        return remembered.read_text(encoding="ascii")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    after = path.stat()
    settled = time.time() - after.st_ctime > SETTLED_SECONDS and after.st_ctime_ns == found.st_ctime_ns
    if remembered is not None and settled:
        with suppress(OSError):  # a cache that cannot be written costs seconds, nothing else
            remembered.parent.mkdir(parents=True, exist_ok=True)
            aside = remembered.with_name(f"{name}.{os.getpid()}")
            aside.write_text(digest.hexdigest(), encoding="ascii")
            aside.replace(remembered)
    return digest.hexdigest()


def content_of(path: Path) -> str:
    """Return a file's size and the beginning of its digest, in words: what a message shows of it."""
    return f"{path.stat().st_size:,} bytes, sha256 {file_digest(path)[:16]}"


def is_held(path: Path) -> bool:
    """Whether a process on this machine holds the lock of a file; not where there is no such file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


class Lock:
    """A file that a process holds while it works in a place, with a line in it that says who it is and since when.

    The system releases it when its holder, and whatever the holder has forked, are gone; a line that is left in it is
    then stale, and is replaced. Where the file system does not lock between machines, a holder on another one is known
    by the file's date, which it renews every HEARTBEAT_SECONDS. `work` says in messages what is being done, in
    what place: "training in runs/x".
    """

    def __init__(self, path: Path, work: str) -> None:
        self.path, self.work = path, work
        self._file: IO[str] | None = None
        self._locks = True
        self._ended = threading.Event()

    def __enter__(self) -> "Lock":
        return self.take()

    def __exit__(self, *exception: object) -> None:
        self.release()

    def fileno(self) -> int:
        """Return the descriptor of the locked file: who inherits it holds the lock, too."""
        assert self._file is not None
        return self._file.fileno()

    def take(self, *, wait: bool = False) -> "Lock":
        """Hold the lock alone; ValueError that names the holder when another process has it, unless it is to `wait`."""
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            begun = time.monotonic()
            while (file := self._open(fcntl.LOCK_EX)) is None:
                holder = self.holder()
                ending = _is_dead(holder) and time.monotonic() - begun < ENDING_SECONDS
                if not (wait or ending):
                    raise ValueError(self._busy(holder))
                time.sleep(0.1)
            self._file = file
            self._check_elsewhere()
            file.seek(0)
            file.truncate()
            file.write(json.dumps(_this_process()) + "\n")
            file.flush()
        threading.Thread(target=self._show_life, daemon=True).start()
        return self

    def share(self) -> None:
        """Let the other processes of the same work `join`; nobody else can take the lock as long as one has it."""
        assert self._file is not None
        if not self._lock(self._file, fcntl.LOCK_SH):
            raise ValueError(self._busy(self.holder()))

    def join(self) -> None:
        """Hold the lock beside the process that has taken and shared it."""
        self._file = self._open(fcntl.LOCK_SH)
        if self._file is None:
            raise ValueError(self._busy(self.holder()))

    def release(self) -> None:
        """Give the lock back; the last one that does removes the file."""
        if self._file is None:
            return
        self._ended.set()
        with suppress(OSError):  # another process of the same work still has it
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink()
        self._file.close()
        self._file = None

    def holder(self) -> dict[str, Any]:
        """Return user, host, pid, since and command of the process that wrote the line; empty where none is."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _open(self, operation: int) -> IO[str] | None:
        """Return the file, locked; None when it is held in a way that excludes `operation`."""
        while True:
            file = self.path.open("a+", encoding="utf-8")
            if not self._lock(file, operation):
                file.close()
                return None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            file.close()  # its former holder removed it after it was opened here

    def _lock(self, file: IO[str], operation: int) -> bool:
        """Whether the file is locked now, or lies where nothing can be locked and only its line and date can tell."""
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            self._locks = False
        return True

    def _check_elsewhere(self) -> None:
        """Look at a line that was left: it is stale, unless its holder is on another machine and shows life."""
        holder = self.holder()
        if not holder:
            return
        if holder.get("host") != socket.gethostname() or not self._locks:
            log.warning("%s: waiting to see whether %s still works", self.work, _described(holder))
            before, patience = self.path.stat().st_mtime_ns, time.monotonic() + 3 * HEARTBEAT_SECONDS
            while time.monotonic() < patience:
                time.sleep(HEARTBEAT_SECONDS / 10)
                if self.path.stat().st_mtime_ns != before:
                    assert self._file is not None
                    self._file.close()
                    self._file = None
                    raise ValueError(self._busy(holder))
        log.warning("%s: %s has ended without saying so; its lock is taken over", self.work, _described(holder))

    def _show_life(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(self.path)

    def _busy(self, holder: dict[str, Any]) -> str:
        return (
            f"{self.work}: {_described(holder)} is at it ({self.path}); wait until it has ended, stop it, or choose "
            "another name or folder to work beside it"
        )


def _this_process() -> dict[str, Any]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user
        user = str(os.getuid())
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"user": user, "host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": sys.orig_argv}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} of {holder.get('user')} on {holder.get('host')}, since {holder.get('since')},"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the process of a lock's line ran on this machine and is gone."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _near(file: Path, path: Path) -> bool:
    """Whether `file` lies in, above or beside `path`, or in an unfinished one of it, `path.part...`."""
    file, path = Path(os.path.abspath(file)), Path(os.path.abspath(path))
    if file.is_relative_to(path) or path.is_relative_to(file) or file.parent == path.parent:
        return True
    top = file.relative_to(path.parent).parts[0] if file.is_relative_to(path.parent) else ""
    return ".part" in top and top.removeprefix(".").split(".part")[0] == path.name.removeprefix(".")


def _unwritten(path: Path, error: OSError) -> str:
    path = path if path.name else Path(os.path.abspath(path))  # "." names nothing
    reason = error.strerror or str(error)
    if error.errno in NO_ROOM and error.errno != errno.EROFS:
        with suppress(OSError):
            reason += f"; {amount(shutil.disk_usage(_existing(path)).free)} are free there"
        advice = "make room"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        advice = "make it writable or choose another folder"
    else:
        advice = "mend that or choose another folder"
    return f"{path} could not be written ({reason}): {advice}, and run the same command again"


def _existing(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return next(folder for folder in (path, *path.parents) if folder.exists())
