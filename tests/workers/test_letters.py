"""A refused order is a failed task, is counted, and is kept until a person sends it again or drops it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from socket import gethostname
from typing import Any

import pytest
from celery import Celery
from kombu.utils.json import loads
from typer.testing import CliRunner

from stillroom import Settings, Stillroom
from stillroom.cli import app as command
from stillroom.embedded import EmbeddedServer
from stillroom_workers.app import make_app
from stillroom_workers.letters import KINDS_REMEMBERED, REFRESHES, readable
from tests.support.celery_process import PATIENCE_S, CeleryProcess, until
from tests.workers.test_hygiene import message, protocol_1

StartWorker = Callable[..., CeleryProcess]
QUEUE = "stillroom.maintenance"


@pytest.fixture
def environment(environment: dict[str, str]) -> dict[str, str]:
    return environment | {
        "STILLROOM_LOADERS": "tests.support.shop_app",
        "STILLROOM_WORKER_THREADS": "2",
    }


def letters(room: Stillroom) -> list[Any]:
    return list(room.state.run(room.dead_letters.list()))


ORDER = {"loader": "product", "key": "product:1", "token": "0" * 16}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("invalidate_tags", {"args": [["k"]]}, "1 positional arguments"),
    ("invalidate_tags", {"kwargs": {"tags": "k"}}, "tags: Input should be a valid array"),
    ("invalidate_tags", {"kwargs": {"tags": ["k"], "hard": True}}, "hard: Extra inputs"),
    ("invalidate_keys", {"kwargs": {"keys": ["k"], "self": 1}}, "self: Extra inputs"),
    ("invalidate_tags", {"kwargs": {"tags": ["t" * 1_025]}}, "at most 1024 characters"),
    ("invalidate_keys", {"kwargs": {"keys": ["k"] * 1_001}}, "at most 1000 items"),
    ("invalidate_pattern", {}, "pattern: Field required"),
    ("trim_marks", {"kwargs": {"all": True}}, "all: Extra inputs"),
    ("sweep_sessions", {"args": [1]}, "1 positional arguments"),
    # What Celery's JSON has besides JSON's own.
    ("invalidate_keys", {"args": [[uuid.UUID(int=1)]]}, "1 positional arguments"),
    ("invalidate_tags", {"kwargs": {"tags": [uuid.UUID(int=1)]}}, "tags.0: Input should be"),
    ("invalidate_tags", {"kwargs": {"tags": [b"t"]}}, "tags.0: Input should be"),
    ("invalidate_pattern", {"kwargs": {"pattern": datetime.now(UTC)}}, "pattern: Input should"),
    ("refresh", {"kwargs": ORDER | {"args": {"id": Decimal("1E+999999999")}}}, "product: id: "),
]


def test_a_refused_order_fails_and_is_kept(
    start_worker: StartWorker, stranger: Celery, room: Stillroom, db: Any
) -> None:
    """A refused order fails in Flower, is a finding and a count, and its dead letter has the order and
    the reason.
    """
    start_worker()
    failed: list[dict[str, Any]] = []
    with stranger.connection_for_read() as connection:
        handlers = {"task-failed": failed.append, "task-succeeded": failed.append}
        heard = stranger.events.Receiver(connection, handlers=handlers).consume(
            limit=None, timeout=PATIENCE_S
        )
        next(heard)
        for task, how, _ in REFUSED:
            stranger.send_task(f"stillroom.{task}", queue=QUEUE, **how)
        while len(failed) < len(REFUSED):
            next(heard)
        heard.close()
    assert {event["type"] for event in failed} == {"task-failed"}
    assert all("OrderRefused" in event["exception"] for event in failed)
    kept = [(letter.reason, loads(letter.body)) for letter in letters(room)]
    assert len(kept) == len(REFUSED)
    for task, how, reason in REFUSED:  # threads of the worker keep them in any order
        order = {"task": f"stillroom.{task}", "args": [], "kwargs": {}} | how
        order["queue"] = "stillroom.refresh" if task == "refresh" else QUEUE
        assert [told for told, body in kept if order.items() <= body.items() and reason in told]
    assert "dead-letters" in {found.code for found in room.health.check().advice}
    until(
        lambda: db.hget(room.keys.counts, "orders_refused") == b"%d" % len(REFUSED), "the count", 15
    )


def test_what_is_sent_again_is_carried_out(
    start_worker: StartWorker,
    room: Stillroom,
    own_server: EmbeddedServer,
    db: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A message refused for an extra request runs without it when a person sends it again."""
    worker = start_worker()
    room.cache.set("k", 1, ttl=100, tags=["t"])
    call = {"task": "x", "args": [], "kwargs": {}, "options": {"queue": "stillroom:{0}:todo"}}
    db.lpush(
        QUEUE, message("stillroom.invalidate_tags", {"tags": ["t"]}, embed={"callbacks": [call]})
    )
    (letter,) = until(lambda: letters(room), "the letter")
    assert room.cache.get("k") == 1
    monkeypatch.setenv("REDIS_URL", own_server.url)
    done = CliRunner().invoke(command, ["dead-letters", "retry", letter.id])
    assert done.exit_code == 0, done.output
    until(lambda: room.cache.get("k") is None, "the invalidation")
    assert letters(room) == []
    assert "Traceback" not in worker.log


def test_refreshes_that_nobody_can_do_do_not_push_out_other_letters(
    start_worker: StartWorker, stranger: Celery, room: Stillroom
) -> None:
    """A worker without the app's loaders writes one dead letter a minute for its refreshes."""
    worker = start_worker()
    order = {"args": {"id": 1}, "token": "0" * 16}
    for n in range(20):
        fields = order | {"loader": "of a newer release", "key": f"k:{n}"}
        stranger.send_task("stillroom.refresh", kwargs=fields, queue="stillroom.refresh")
    until(lambda: worker.log.count("RefreshOrder refused") == 20, "all to be refused")
    (letter,) = letters(room)
    assert "no loader named 'of a newer release'" in letter.reason
    assert f"(refused by {gethostname()} (process " in letter.reason, "others may have it"


def test_a_flood_of_reasons_takes_no_memory() -> None:
    """A worker whose refreshes are refused for ever other reasons remembers two hundred of them."""
    letters = make_app(Settings()).letters
    for task in REFRESHES:
        assert all(letters._is_new(task, str(n)) for n in range(3 * KINDS_REMEMBERED))
        assert not letters._is_new(task, str(3 * KINDS_REMEMBERED - 1))
    assert len(letters._kept) <= KINDS_REMEMBERED


def test_a_letter_that_can_not_be_written_does_not_end_the_worker(
    own_server: EmbeddedServer, db: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """When the server takes no writes a dead letter is two lines of the log and no exception."""
    with make_app(Settings(redis_url=own_server.url)) as app, caplog.at_level(logging.ERROR):
        assert app.room is not None
        db.config_set("min-replicas-to-write", 1)
        try:
            app.letters.bury(b"raw\x00", "q", "a\ntest")
        finally:
            db.config_set("min-replicas-to-write", 0)
        app.room.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "No dead letter could be written" in caplog.text
    assert "a\\ntest" in caplog.messages[0]


@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        (message("t", {"a": 1}), {"task": "t", "args": [], "kwargs": {"a": 1}}),
        (protocol_1(args=[5]), {"task": "stillroom.trim_marks", "args": [5], "kwargs": {}}),
        (message("t", headers={"compression": "zlib"}), None),
        (message(raw=b"\xff"), None),
        (message(raw=b"[1, 2, 3]"), None),
        (message(raw=b"[" * 100_000), None),
        ("[]", None),
        ("{", None),
    ],
    ids=[
        "protocol 2",
        "protocol 1",
        "compressed",
        "no text",
        "no task",
        "deep",
        "a list",
        "no JSON",
    ],
)
def test_a_letter_has_the_order_where_there_is_one(raw: str, kept: dict[str, Any] | None) -> None:
    """A dead letter holds the order where there is one, and else the bytes."""
    body = readable(raw.encode(), "q")
    assert body == ({"queue": "q"} | (kept or {"raw": raw}))
