"""Runs one app of the page in a process, with a Redis of its own, and a worker where it is ours."""

from __future__ import annotations

import json
import urllib.request
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import redis
from bench.page import shop
from bench.page.traffic import send
from bench.processes import cpus, on, pin, python, worker
from bench.stage import server_cpu_us
from stillroom.embedded import EmbeddedServer, free_port

WARM_UP_S = 1.0
TURNS = 3  # at most
OURS = ["ours", "gathered", "near"]  # variants


class Figures(NamedTuple):
    """Holds the rate of a turn, its latencies in ms, and what one request cost."""

    rate: float
    p50: float
    p99: float
    app_us: float
    redis_us: float
    commands: float
    bytes_out: float


class App:
    """A framework with some parts, ready to be asked for the page."""

    def __init__(self, framework: str, variant: str) -> None:
        self.framework = framework
        self.variant = variant
        self.port = free_port()
        self._its_cpu, self._others = cpus()

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        server = self._stack.enter_context(EmbeddedServer())
        pin(self._others, server.pid)
        self._client: Any = self._stack.enter_context(redis.Redis.from_url(server.url))
        environment = {"REDIS_URL": server.url, "STILLROOM_SESSION_PEPPERS": "p" * 32}
        started = python(self._words(), self._its_cpu, environment)
        self._app = self._stack.enter_context(started)
        if self.variant in OURS:
            started = worker(server.url, self._others, "bench.page.worker")
            self._stack.enter_context(started)
        self._app.wait_for(self._answers)
        self._cookie = "" if self.variant == "bare" else self._log_in()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _words(self) -> list[str]:
        made = f"bench.page.{self.framework}_app:{self.variant}"
        if self.framework == "fastapi":
            words = ["-m", "uvicorn", made, "--factory", "--no-access-log", "--log-level", "error"]
            return [*words, "--host", "127.0.0.1", "--port", str(self.port)]
        words = ["-m", "gunicorn", f"{made}()", "-w", "1", "-k", "gthread", "--threads", "8"]
        return [*words, "--bind", f"127.0.0.1:{self.port}", "--keep-alive", "30"]

    def _answers(self) -> bool:
        try:
            with self._ask("/" if self.variant == "bare" else "/login"):
                return True
        except OSError:
            return False

    def _log_in(self) -> str:
        """Log in; return the cookie of the session. It also checks that the page is one."""
        with self._ask("/login") as answer:
            cookies = answer.headers.get_all("set-cookie") or []
        cookie = "; ".join(one.partition(";")[0] for one in cookies)
        with self._ask("/", cookie) as answer:
            page = json.load(answer)
        assert page["theme"] == "dark"
        assert len(page["products"]) == shop.ON_A_PAGE
        return cookie

    def _ask(self, path: str, cookie: str = "") -> Any:
        where = f"http://127.0.0.1:{self.port}{path}"
        return urllib.request.urlopen(urllib.request.Request(where, headers={"Cookie": cookie}))

    def warm_up(self) -> None:
        """Load the 300 products once, and with that do every lazy import."""
        self._send(WARM_UP_S)

    def measure(self, seconds: float) -> Figures:
        """Measure; once more where requests fail, as some do on a busy machine: they may be quicker than a page."""
        for _ in range(TURNS):
            before = self._costs()
            load = self._send(seconds)
            if not load.errors:
                break
        else:
            what = f"requests to {self.framework}, {self.variant}"
            raise RuntimeError(f"{load.errors:,} of {load.requests:,} {what} failed")
        app, server, commands, out = (
            (now - then) / load.requests for now, then in zip(self._costs(), before, strict=True)
        )
        return Figures(load.rate, load.p50, load.p99, app, server, commands, out)

    def _send(self, seconds: float) -> Any:
        with on(self._others):
            return send(self.port, self._cookie, seconds)

    def _costs(self) -> tuple[float, float, float, float]:
        """Return what was spent so far: CPU µs of the app and its Redis, commands with those in scripts, bytes."""
        stats = self._client.info("commandstats")
        commands = sum(one["calls"] for one in stats.values())
        out = self._client.info("stats")["total_net_output_bytes"]
        return self._app.cpu_us, server_cpu_us(self._client), float(commands), float(out)
