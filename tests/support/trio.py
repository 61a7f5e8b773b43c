"""The servers and Sentinels of stack.ha.yml without Docker: started by its scripts, with its users and passwords.

All of them are `localhost`, each with a port of its own: a name, as in the stack, and not an address.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import redis
from stillroom.cli.credentials import write_secrets
from stillroom.embedded import _binary_from_wheel, free_port
from tests.support.celery_process import until
from tests.support.roles import ADMIN

ROOT = Path(__file__).parents[2]
NAME, MASTER, COUNT = "localhost", "stillroom", 3
DOWN_AFTER_MS = 2_000
FORMED_WITHIN_S = 60.0


class Trio:
    """Three servers and three Sentinels, started with the `with` block; each may be killed and started again."""

    def __init__(self, folder: Path, binary: str | None) -> None:
        self.folder, self.secrets = folder, folder / "secrets"
        self.ports = [free_port() for _ in range(COUNT)]
        self.sentinel_ports = [free_port() for _ in range(COUNT)]
        self._programs = self._program(binary or str(_binary_from_wheel()))
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def _program(self, binary: str) -> Path:
        """Return a folder for PATH with the server that is tested, and a redis-cli that `silent` may stop."""
        folder = self.folder / "bin"
        folder.mkdir(parents=True)
        self._silent = self.folder / "silent"
        is_asked = (
            f'[ -e {self._silent} ] && case "$*" in *"$(cat {self._silent})"*) exit 1 ;; esac'
        )
        programs = {
            "redis-server": f'exec {binary} "$@"',
            "redis-cli": f'{is_asked}\nexec {shutil.which("redis-cli")} "$@"',
        }
        for name, lines in programs.items():
            (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
            (folder / name).chmod(0o755)
        return folder

    @contextlib.contextmanager
    def silent(self, question: str) -> Iterator[None]:
        """Let no Sentinel answer this question of a server that starts, as where each answer takes too long."""
        self._silent.write_text(question)
        try:
            yield
        finally:
            self._silent.unlink()

    def __enter__(self) -> Self:
        write_secrets(self.secrets)
        with (self.secrets / "users.acl").open("a") as users:
            users.write(f"user {ADMIN} on nopass ~* &* +@all\n")
        with (self.secrets / "sentinels.acl").open("a") as users:
            users.write(f"user {ADMIN} on nopass &* +@all\n")
        try:
            self.start(*self.ports, *self.sentinel_ports)
            self.await_formed()
        except BaseException:
            self.kill(*self.running)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill(*self.running)

    # Processes

    def start(self, *ports: int) -> None:
        """Start servers and Sentinels, as their containers do."""
        for port in ports:
            folder = self.folder / str(port)
            folder.mkdir(exist_ok=True)
            is_sentinel = port in self.sentinel_ports
            script = "sentinel.sh" if is_sentinel else "redis-member.sh"
            with (folder / "log").open("ab") as log:
                self.running[port] = subprocess.Popen(
                    [
                        "sh",
                        str(ROOT / "deploy" / script),
                        *([] if is_sentinel else self._options()),
                    ],
                    cwd=folder,
                    env=self._environment(port),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

    def _options(self) -> list[str]:
        aclfile = f"--aclfile {self.secrets / 'users.acl'}"
        at_once = "--repl-diskless-sync-delay 0"  # a replica is not kept until others come
        return [aclfile, "--appendonly yes", '--save ""', at_once]

    def _environment(self, port: int) -> dict[str, str]:
        return os.environ | {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "SECRETS_FOLDER": str(self.secrets),
            "DATA": str(self.folder / str(port)),
            "ACL_FILE": str(self.secrets / "sentinels.acl"),
            "HOST": NAME,
            "PORT": str(port),
            "MASTER": MASTER,
            "FIRST": f"{NAME} {self.ports[0]}",
            "SENTINELS": " ".join(f"{NAME}:{sentinel}" for sentinel in self.sentinel_ports),
            "DOWN_AFTER_MS": str(DOWN_AFTER_MS),
            "FAILOVER_TIMEOUT_MS": "4000",
        }

    def heal(self) -> None:
        """Start whoever was killed and not started again, and wait until all are well."""
        self.start(*{*self.ports, *self.sentinel_ports} - self.running.keys())
        self.await_formed()

    def kill(self, *ports: int) -> None:
        """Send SIGKILL, as the kernel does when memory is short."""
        for port in ports:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.running[port].pid, signal.SIGKILL)
        for port in ports:
            self.running.pop(port).wait()

    def stop(self, *ports: int) -> None:
        """Send SIGTERM, as Docker does."""
        for port in ports:
            os.killpg(self.running[port].pid, signal.SIGTERM)
        for port in ports:
            self.running.pop(port).wait()

    def log(self, port: int) -> str:
        return (self.folder / str(port) / "log").read_text(errors="replace")

    # What there is to see

    def url(self, role: str) -> str:
        """Return the URL as stack.ha.yml writes it."""
        hosts = ",".join(f"{NAME}:{port}" for port in self.sentinel_ports)
        return f"redis+sentinel://{role}@{hosts}/{MASTER}/0"

    def password(self, role: str) -> str:
        return (self.secrets / f"{role}_password").read_text()

    def client(self, port: int, role: str = ADMIN) -> Any:
        password = "any" if role == ADMIN else self.password(role)
        return redis.Redis(
            port=port,
            username=role,
            password=password,
            protocol=2,
            decode_responses=True,
            socket_timeout=20,
        )

    def ask(self, port: int, *words: Any, role: str = ADMIN) -> Any:
        """Send one command, on a connection of its own."""
        with self.client(port, role) as client:
            client.response_callbacks.clear()
            return client.execute_command(*words)

    def primary(self) -> int:
        """Return the port that all Sentinels name."""
        until(lambda: len(self.named()) == 1, "one primary", FORMED_WITHIN_S)
        return self.named().pop()

    def named(self) -> set[int]:
        """Return the ports that Sentinels name, one if they agree."""
        question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
        return {int(self.ask(port, *question)[1]) for port in self.sentinel_ports}

    def replication(self, port: int) -> dict[str, Any]:
        """Return the reply to INFO replication."""
        with self.client(port) as client:
            return dict(client.info("replication"))

    def await_formed(self) -> None:
        """Wait until two have all that the primary has, and every Sentinel knows all others."""
        until(self._is_formed, "three servers and three Sentinels", FORMED_WITHIN_S)

    def _is_formed(self) -> bool:
        try:
            (port,) = self.named()
            about = self.replication(port)
            states = {about[f"slave{n}"]["state"] for n in range(COUNT - 1)}
            is_followed = about["role"] == "master" and states == {"online"}
            return is_followed and self._all_have_copied(port) and self._all_known()
        except (redis.RedisError, OSError, ValueError, KeyError):  # KeyError: one is not there
            return False

    def _all_have_copied(self, primary: int) -> bool:
        """Return whether replicas acknowledge: one that is "online" may still load what it was sent."""
        others = {*self.ports} - {primary}
        return all(self.replication(port)["master_link_status"] == "up" for port in others)

    def _all_known(self) -> bool:
        for port in self.sentinel_ports:
            told = self.ask(port, "SENTINEL", "MASTER", MASTER)
            about = dict(zip(told[::2], told[1::2], strict=True))
            if (about["num-slaves"], about["num-other-sentinels"]) != ("2", "2"):
                return False
            # Where a failover begins before this one has ended, Sentinels go on naming two servers.
            if about["flags"] != "master":
                return False
        return True


def has_redis_cli() -> bool:
    """Return whether there is a redis-cli, by which a server asks the Sentinels."""
    return shutil.which("redis-cli") is not None
