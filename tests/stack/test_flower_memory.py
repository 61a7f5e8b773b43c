"""Flower on its bad day fits the memory that stack.yml gives it, and can be started again."""

from __future__ import annotations

import re
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import redis
from stillroom import Settings
from stillroom.embedded import EmbeddedServer, free_port
from stillroom_workers import make_app
from stillroom_workers.request import EVENT_LIMITS
from tests.support.celery_process import CeleryProcess, until

STACK_FILE = (Path(__file__).parents[2] / "stack.yml").read_text(encoding="utf-8")
FLOWER = STACK_FILE[STACK_FILE.index("\n  flower:\n") : STACK_FILE.index("\nnetworks:")]
FAILURES, BATCH = 10_000, 500
REASON = "could not connect to server: Connection refused. Is it running on host db and accepting connections?"
SPARE = 0.75  # of the limit: what the worst day may take


def options(folder: Path) -> list[str]:
    """Return Flower's options as in the stack, without its login and file."""
    given = re.findall(r"^      - (--[^ ]+)", FLOWER, flags=re.MULTILINE)
    own = ("--conf", "--db", "--read_only", "--xheaders", "--state_save_interval")
    return [*(one for one in given if not one.startswith(own)), f"--db={folder}/flower"]


def limit_mb() -> int:
    found = re.search(r"limits: \{memory: (\d+)M", FLOWER)
    assert found
    return int(found[1])


def peak_mb(process: CeleryProcess) -> float:
    status = Path(f"/proc/{process.process.pid}/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


@contextmanager
def flower(server: EmbeddedServer, folder: Path) -> Iterator[tuple[CeleryProcess, int]]:
    port = free_port()
    words = ("flower", "--address=127.0.0.1", f"--port={port}", *options(folder))
    process = CeleryProcess(folder / "flower.log", {"REDIS_URL": server.url}, *words)
    try:
        until(lambda: answers(port) or process.process.poll() is not None, "Flower", 150)
        with redis.Redis.from_url(server.url) as client:
            until(client.pubsub_numpat, "Flower to listen", 60)
        yield process, port
        assert process.terminate(60) == 0
    finally:
        process.kill()


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=30).close()
    except OSError:
        return False
    return True


def seen(port: int) -> int:
    """Return how many failures Flower has counted."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.search(r'^flower_events_total\{.*type="task-failed".*\} (\S+)$', text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def fail(server: EmbeddedServer, count: int) -> None:
    """Send events of failing tasks, each as large as a worker's largest."""
    app = make_app(Settings(redis_url=server.url))
    traceback = "x" * EVENT_LIMITS["traceback"]
    with app.connection_for_write() as connection:
        tell = app.events.Dispatcher(connection, hostname="celery@stillroom-refresh-1").send
        for _ in range(count):
            about = {"uuid": str(uuid.uuid4()), "name": "stillroom.refresh: product"}
            shown = {"args": "", "kwargs": '{"loader": "product", "orders": 1}', "retries": 0}
            tell("task-received", **about, **shown, eta=None, expires=None, root_id=about["uuid"])
            tell("task-started", **about)
            tell("task-failed", **about, exception=REASON, traceback=traceback)


@pytest.mark.full
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_failures_fit(own_server: EmbeddedServer, tmp_path: Path) -> None:
    """While an app's database is away every refresh fails. Flower keeps its history within three quarters of its
    limit, also when it reads its file again: killed then, it would be killed for ever."""
    with flower(own_server, tmp_path) as (process, port):
        while (already := seen(port)) < FAILURES:  # what nobody hears is lost: no event is kept
            fail(own_server, BATCH)
            until(lambda already=already: seen(port) > already, "events", 60)
        peaks = {"at work": peak_mb(process)}
    size = sum(one.stat().st_size for one in tmp_path.iterdir() if "flower" in one.name) / 2**20
    with flower(own_server, tmp_path) as (process, port):
        peaks["started again"] = peak_mb(process)
    print(f"{peaks} MB; its file: {size:.0f} MB; limit: {limit_mb()} MB", file=sys.stderr)
    assert max(peaks.values()) < SPARE * limit_mb(), peaks
