"""A real RabbitMQ of the test's own: one node, with its data in a folder that goes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from amqp import Connection

from stillroom.embedded import free_port
from tests.support.celery_process import until
from tests.support.processes import halted

PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # as Debian's package has it
CONTROL = PROGRAM.with_name("rabbitmqctl")
STARTED_WITHIN_S = 90.0


def is_installed() -> bool:
    return PROGRAM.exists()


class RabbitServer:
    """Started with the `with` block; it takes connections when that begins."""

    def __init__(self) -> None:
        self.port, self._distribution, self._epmd = free_port(), free_port(), free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="rabbit"))
        self._environment = os.environ | {
            "HOME": str(self._folder),  # of its Erlang cookie
            "ERL_EPMD_PORT": str(self._epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "data"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "plugins"),
        }

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def connection(self) -> Any:
        """Open a plain connection, which shows what the worker's do not."""
        host = f"127.0.0.1:{self.port}"
        connection = Connection(host, "guest", "guest", connect_timeout=2)
        connection.connect()
        return connection

    @contextmanager
    def short_of_memory(self) -> Iterator[None]:
        """Confirm no message meanwhile; what is in the queues is given out."""
        self._control("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            yield
        finally:
            self._control("set_vm_memory_high_watermark", "0.6")

    def heartbeats(self) -> list[int]:
        """Return the seconds between two heartbeats for each connection, as RabbitMQ has agreed to them."""
        told = self._control("-q", "list_connections", "--no-table-headers", "timeout")
        return [int(seconds) for seconds in told.split()]

    def hanging(self) -> AbstractContextManager[None]:
        """Answer nobody meanwhile; connections stay open."""
        return halted(self._process.pid)

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Take the channel away from whoever is connected from now on and has a message for longer than a second,
        instead of half an hour.
        """
        self._set("consumer_timeout", 1_000)
        self._set("channel_tick_interval", 500)
        try:
            yield
        finally:
            self._set("consumer_timeout", 1_800_000)
            self._set("channel_tick_interval", 60_000)

    def _set(self, name: str, value: int) -> None:
        self._control("eval", f"application:set_env(rabbit, {name}, {value}).")

    def url_of(self, user: str, *rights: str, vhost: str = "/", password: str = "right") -> str:
        """Make a user, and the virtual host, if they are not there; return their URL with this password.

        rights: patterns of what the user may configure, write and read.
        """
        for words in (("add_vhost", vhost), ("add_user", user, "right")):
            with suppress(subprocess.CalledProcessError):
                self._control(*words)
        if rights:
            self._control("set_permissions", "-p", vhost, user, *rights)
        return f"amqp://{user}:{password}@127.0.0.1:{self.port}/{vhost}"

    def _control(self, *words: str) -> str:
        command = [CONTROL, "-n", self._environment["RABBITMQ_NODENAME"], *words]
        told = subprocess.run(
            command, env=self._environment, check=True, timeout=60, stdout=subprocess.PIPE
        )
        return told.stdout.decode()

    def __enter__(self) -> Self:
        with (self._folder / "out").open("wb") as out:
            self._process = subprocess.Popen(
                [PROGRAM], env=self._environment, stdout=out, stderr=out, process_group=0
            )
        try:
            until(self._answers, "RabbitMQ takes connections", STARTED_WITHIN_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self._folder / "out").read_text()
        try:
            self.connection().close()
        except OSError:
            return False
        return True

    def _end(self) -> None:
        """End the node, and the daemon that tells Erlang's nodes of each other: it leaves the group."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        epmd = shutil.which("epmd")
        if epmd is not None:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run(
                [epmd, "-port", str(self._epmd), "-kill"], check=False, timeout=10, **quiet
            )
        shutil.rmtree(self._folder, ignore_errors=True)
