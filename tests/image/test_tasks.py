"""The image's worker, with a broker of its own, does each task."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from stillroom import Settings, Stillroom
from tests.support import sessions as session_time
from tests.support.crowd import PATIENT
from tests.support.entries import age
from tests.support.swarm import until

pytestmark = [pytest.mark.docker, pytest.mark.long, pytest.mark.timeout(180)]


@pytest.fixture
def url(celery_setup: Any) -> str:
    """Return the broker's URL from here, once the worker is ready."""
    return str(celery_setup.broker.config()["host_url"])


@pytest.fixture
def room(url: str) -> Iterator[Stillroom]:
    """Open the app's process, outside."""
    with Stillroom(Settings(**PATIENT | {"redis_url": url.removesuffix("/0")})) as room:
        yield room


@pytest.fixture
def db(celery_setup: Any) -> Any:
    client = celery_setup.broker.container.client
    client.connection_pool.connection_kwargs["decode_responses"] = False
    return client


def test_the_image_does_every_task(celery_setup: Any, room: Stillroom, db: Any) -> None:
    """The image's worker refreshes, invalidates, reclaims, sweeps, logs abuse, takes a snapshot and trims."""

    def order(task: str) -> None:
        """Send a task as beat does."""
        celery_setup.app.send_task(f"stillroom.{task}", queue="stillroom.maintenance")

    @room.cache.cached("stock:{id}", ttl=60, swr=600, name="stock")
    def stock(id: int) -> dict[str, Any]:
        return {"id": id, "loaded": 0.0}

    stock(7)
    age(db, b"stillroom:{0}:e:stock:7", 61)
    assert stock(7)["loaded"] == 0
    until(lambda: stock(7)["loaded"] > 0, "a refresh")

    for key in ("by-key", "by-tag", "a-pattern"):
        room.cache.set(key, 1, ttl=60, tags=[f"t-{key}"])
    room.tasks.invalidate_keys("by-key")
    room.tasks.invalidate_tags("t-by-tag")
    room.tasks.invalidate_pattern("a-*")
    until(lambda: room.cache.get_many(["by-key", "by-tag", "a-pattern"]) == {}, "orders")
    until(lambda: not db.keys("stillroom:{0}:e:*-*"), "their memory")

    ended = room.sessions.create("u1", {})
    session_time.age(db, room, ended.handle, 2 * 86_400)
    room.dispatch.wake("stillroom.sweep_sessions")
    until(lambda: not db.exists(session_time.record_of(room, ended.handle)), "the sweep")

    for n in range(60):
        room.abuse.report("auth_fail", ip="203.0.113.9", user=f"user{n}", route="/login")
    order("log_abuse")
    until(lambda: db.xlen("stillroom:abuse:log"), "a pattern of abuse")
    order("snapshot_health")
    until(lambda: db.xlen("stillroom:health"), "a snapshot")
    assert room.health.history()[-1].error is None

    for task in ("trim_marks", "trim_indexes"):
        order(task)
        until(lambda task=task: f"stillroom.{task}" in celery_setup.worker.logs(), task)
    assert "ERROR" not in celery_setup.worker.logs()


def test_it_stops_within_its_grace_and_finishes_what_it_does(
    celery_setup: Any, room: Stillroom
) -> None:
    """`docker stop` ends the worker within seconds with exit code 0, and no earlier order is left."""
    for n in range(200):
        room.tasks.invalidate_keys(f"k{n}")
    began = time.monotonic()
    container = celery_setup.worker.container._container
    container.stop(timeout=30)
    assert time.monotonic() - began < 15
    assert container.wait()["StatusCode"] == 0
