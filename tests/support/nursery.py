"""Start Python programs that have imported already what nearly all of them import.

Celery, Redis' client and Stillroom take a second of CPU to import, and tests start hundreds of programs. A nursery
is a process that has imported them and does nothing else. A program is a fork of it, with an environment, a
directory, files and arguments of its own; its modules run as `python -m`, `python -c` or a script run them.

A nursery imports nothing that reads the environment, and nothing that a program may do without on purpose: no web
framework, no gevent. Where it can't watch processes (it needs Linux), programs are started one by one.

Run as a script it is the nursery: it reads orders from the socket that it is given.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import json
import os
import runpy
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple
from weakref import finalize

from stillroom import pepper

ROOT = Path(__file__).parents[2]
# Without stillroom_workers.app: the package makes its app when `celery -A stillroom_workers` asks for it.
IMPORTED = (
    *("celery.bin.celery", "celery.bin.worker", "celery.apps.beat", "celery.apps.worker"),
    *("celery.concurrency.thread", "celery.fixups.django", "kombu.transport.redis"),
    *("stillroom", "stillroom.cli", "stillroom.room", "stillroom.upkeep"),
    *("stillroom_workers.beat", "stillroom_workers.lifecycle", "stillroom_workers.logs"),
    *("stillroom_workers.worker", "stillroom_workers.tasks.refresh", "tests.support.crowd"),
)
LENGTH = 4  # bytes of an order's length
NO_STATUS = 255  # of a program whose nursery was killed


class Order(NamedTuple):
    """What a program is started with."""

    arguments: list[str]  # -m module …, -c source …, or a script …
    environment: dict[str, str]
    folder: str
    is_session: bool  # else it leads a process group


# In the tests


def start(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    folder: str | Path | None = None,
    new_session: bool = False,
    **files: int | IO[bytes] | None,
) -> Child | subprocess.Popen[bytes]:
    """Start a Python program in a process group of its own.

    `arguments`: what follows `python`. `files`: stdin, stdout and stderr, as subprocess.Popen takes them. A program
    that patches the standard library first, as for gevent, is started without a nursery.
    """
    if not hasattr(os, "pidfd_open") or any("gevent" in word for word in arguments):
        return start_alone(arguments, environment, folder=folder, new_session=new_session, **files)
    order = Order([*arguments], {**environment}, str(folder or Path.cwd()), new_session)
    standard = [files.get(name) for name in ("stdin", "stdout", "stderr")]
    return _nursery().bear(order, *standard)


def start_alone(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    folder: str | Path | None = None,
    new_session: bool = False,
    **files: Any,
) -> subprocess.Popen[bytes]:
    """Start a program without a nursery: it imports everything itself."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        start_new_session=new_session,
        process_group=None if new_session else 0,
        **files,
    )


def run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str | Path | None = None,
    timeout: float = 100.0,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end; return what it wrote."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        child = start(arguments, environment, folder=folder, **files)
        try:
            code = child.wait(timeout)
        finally:
            child.kill()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([*arguments], code, out.read(), err.read())


def run_text(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: str | Path | None = None,
    timeout: float = 100.0,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; return the text it wrote."""
    done = run(arguments, environment, folder, timeout)
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


class Child:
    """A program that was started in a nursery. It has the methods of subprocess.Popen that tests use."""

    def __init__(self, told: int, stdout: IO[bytes] | None) -> None:
        self._told = told
        self._lock = threading.Lock()
        self.stdout = stdout
        self.returncode: int | None = None
        self.pid = int(os.read(told, LENGTH * 2))
        finalize(self, os.close, told)

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or minus the signal that ended it. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._told, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            with self._lock:  # a timer's thread may kill it meanwhile
                if self.returncode is None:
                    self.returncode = int(os.read(self._told, LENGTH) or NO_STATUS)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Nursery:
    """The other end of a nursery."""

    def __init__(self) -> None:
        self._orders, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=ROOT,
                # This tree's: in a worktree with a shared environment that imports another one's.
                env={
                    **os.environ,
                    "PYTHONPATH": f"{ROOT / 'shared'}{os.pathsep}{ROOT / 'workers'}",
                },
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        atexit.register(self.close)

    def bear(self, order: Order, *files: int | IO[bytes] | None) -> Child:
        ours, opened = None, []
        told, tell = os.pipe()
        opened.append(tell)
        given = []
        for usual, file in enumerate(files):
            match file:
                case None:
                    given.append(usual)
                case subprocess.PIPE:
                    reads, writes = os.pipe()
                    ours = os.fdopen(reads, "rb")
                    opened.append(writes)
                    given.append(writes)
                case subprocess.DEVNULL:
                    opened.append(os.open(os.devnull, os.O_RDWR))
                    given.append(opened[-1])
                case subprocess.STDOUT:
                    given.append(given[-1])
                case _:
                    given.append(file if isinstance(file, int) else file.fileno())
        packed = json.dumps(order).encode()
        with self._lock:
            socket.send_fds(self._orders, [len(packed).to_bytes(LENGTH)], [*given, tell])
            self._orders.sendall(packed)
        for file_number in opened:
            os.close(file_number)
        return Child(told, ours)

    def close(self) -> None:
        """End the nursery, which has nothing to do once nobody can order. Its programs go on."""
        self._orders.close()
        self._process.wait()


@cache
def _nursery() -> _Nursery:
    """Return the nursery of this process, started when it is first asked for."""
    return _Nursery()


# In the nursery


def _serve(orders: socket.socket) -> Order:
    """Fork for each order. Returns in the programs alone: the nursery ends here, with the tests."""
    living: dict[int, tuple[int, int]] = {}  # by the descriptor of the process: its id, who is told
    with selectors.DefaultSelector() as selector:
        selector.register(orders, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != orders.fileno():
                    selector.unregister(key.fd)
                    _tell_end(key.fd, *living.pop(key.fd))
                    continue
                head, files, *_ = socket.recv_fds(orders, LENGTH, 4)
                if not head:
                    os._exit(0)
                *standard, tell = files
                order = Order(*json.loads(_read(orders, int.from_bytes(head))))
                if not (pid := os.fork()):
                    orders.close()
                    os.close(tell)
                    for watched, (_, others) in living.items():
                        os.close(watched)
                        os.close(others)
                    _be_born(order, standard)
                    return order
                for file in standard:
                    os.close(file)
                os.write(tell, b"%*d" % (LENGTH * 2, pid))
                watched = os.pidfd_open(pid)
                living[watched] = pid, tell
                selector.register(watched, selectors.EVENT_READ)


def _tell_end(watched: int, pid: int, tell: int) -> None:
    os.close(watched)
    _, status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError):
        os.write(tell, b"%d" % os.waitstatus_to_exitcode(status))
    os.close(tell)


def _read(orders: socket.socket, size: int) -> bytes:
    read = b""
    while len(read) < size:
        if not (some := orders.recv(size - len(read))):
            os._exit(0)  # the tests were killed in the middle of an order
        read += some
    return read


def _be_born(order: Order, files: Sequence[int]) -> None:
    """Take over what the order says, in place of what the nursery has."""
    os.setsid() if order.is_session else os.setpgid(0, 0)
    for usual, file in enumerate(files):
        os.dup2(file, usual)
    for file in {*files} - {0, 1, 2}:
        os.close(file)
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    pepper._stand_in = secrets.token_bytes(32)  # of each process its own: it was drawn on import
    if action := os.environ.get("PYTHONWARNINGS"):
        warnings.simplefilter(action)  # type: ignore[arg-type]  # one word: "error"
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        usual = getattr(sys, name)
        how = "backslashreplace" if name == "stderr" else errors or usual.errors
        stream = _stream(number, encoding or usual.encoding, how)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _stream(number: int, encoding: str, errors: str) -> io.TextIOWrapper:
    is_unbuffered = number > 0 and "PYTHONUNBUFFERED" in os.environ
    raw: Any = open(  # noqa: SIM115  # for as long as it lives
        number, "wb" if number else "rb", buffering=0 if is_unbuffered else -1, closefd=False
    )
    is_by_line = number == 2 or raw.isatty()
    return io.TextIOWrapper(
        raw, encoding, errors, line_buffering=is_by_line, write_through=is_unbuffered
    )


def _live(order: Order, base: list[str]) -> None:
    """Run the program, as `python` runs it with these arguments."""
    first, *rest = order.arguments
    paths = order.environment.get("PYTHONPATH", "").split(os.pathsep)
    script = "" if first in ("-c", "-m") else str(Path(first).parent)
    sys.path[:] = [script, *filter(None, paths), *base]
    importlib.invalidate_caches()
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = ["-c", *rest[1:]] if first == "-c" else order.arguments
    source = rest[0] if first == "-c" else Path(first).read_text(encoding="utf-8")
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    exec(compile(source, "<string>" if first == "-c" else first, "exec"), main.__dict__)


def _main(descriptor: int) -> None:
    base = sys.path[1:]
    sys.path.insert(0, str(ROOT))
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is shared stays so
    _live(_serve(socket.socket(fileno=descriptor)), base)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
