"""A real server whose wall clock a test can move while it runs."""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import redis
from stillroom.embedded import EmbeddedServer, _binary_from_wheel
from stillroom.leash import until
from stillroom.wire import Server

SHIM = Path(__file__).with_name("clock_shim.c")


def misjudge(server: Server, seconds: float) -> None:
    """Let this process believe that the server's clock is this much further on than it knew."""
    known = server._reading
    server._reading = known._replace(offset=known.offset + round(seconds * 1e9))


class ClockedServer(EmbeddedServer):
    """A server under a preloaded library that moves its clock. Skips the test where it can't be had.

    `binary`: redis-server, or None for the embedded one.
    """

    def __init__(self, binary: str | None = "redis-server", **options: Any) -> None:
        given = shutil.which(binary) if binary else str(_binary_from_wheel())
        compiler = shutil.which("gcc")
        if given is None or compiler is None:
            pytest.skip(f"moving a server's clock needs {binary or 'the embedded server'} and gcc")
        self._folder = folder = Path(tempfile.mkdtemp(prefix="clocked-"))
        library, offset, wrapper = folder / "shim.so", folder / "offset", folder / "server"
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SHIM], check=True)
        offset.write_bytes(bytes(16))
        with offset.open("r+b") as file:
            self._words = mmap.mmap(file.fileno(), 16)
        wrapper.write_text(
            f"#!/bin/sh\nexport LD_PRELOAD={library} CLOCK_OFFSET_FILE={offset}\n"
            f'exec {given} "$@"\n'
        )
        wrapper.chmod(0o755)
        super().__init__(binary=str(wrapper), **options)

    def stop(self) -> None:
        """End it and remove what moved its clock."""
        super().stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def set_clock(self, seconds: float) -> None:
        """Let the server's clock stand off from the machine's by this many seconds, at once."""
        struct.pack_into("<qq", self._words, 0, round(seconds * 1_000_000), 0)
        with redis.Redis.from_url(self.url) as client:
            until(lambda: self._is_at(client, seconds), 5.0)

    def show(self, us: int) -> None:
        """Let the server's clock stand still at this time, µs since 1970."""
        struct.pack_into("<q", self._words, 8, us)

    @staticmethod
    def _is_at(client: redis.Redis, seconds: float) -> bool:
        at, us = client.time()
        return abs(at + us / 1e6 - time.time() - seconds) < 0.5
