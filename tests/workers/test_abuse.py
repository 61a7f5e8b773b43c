"""Real workers find abuse within seconds and ban once, however often a worker is killed."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillroom import DEFAULT, Limit, NoDispatch, Stillroom
from stillroom.abuse import LOG_TASK
from stillroom.abuse.body import SCAN_S
from stillroom.embedded import EmbeddedServer
from stillroom_workers.schedule import SCHEDULE
from tests.support.abuse import (
    CLIENT,
    abandon,
    ban_of,
    patterns,
    pending,
    put,
    rules_found,
)
from tests.support.celery_process import CeleryProcess, until
from tests.support.processes import Program

StartCelery = Callable[..., CeleryProcess]
QUICK = "tests.support.quick_beat"


@pytest.fixture
def environment(environment: dict[str, str], rules: Path) -> dict[str, str]:
    return environment | {"STILLROOM_ABUSE_RULES": str(rules)}


def test_a_hammering_client_is_banned_within_seconds(
    start: StartCelery, start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """A hammering client is banned within seconds: limit, script, beat, worker and the limit again."""
    process = start_worker()
    start("beat", "-S", "celery.beat:Scheduler", "--pidfile=", app=QUICK)
    for n in range(70):  # another window each time, or the denials would be answered from memory
        room.limits.check(CLIENT, [Limit("login", 5, 3_600 + n)], route="/login")
    until(lambda: ban_of(db, room), "a ban")
    decision = room.limits.check(CLIENT, [DEFAULT])
    assert not decision.allowed
    assert decision.banned
    (pattern,) = patterns(db, room)
    assert (pattern["rule"], pattern["route"], pattern["action"]) == ("hammer", "/login", "ban")
    process.await_line('abuse.pattern {"rule": "hammer"')
    assert [ban.subject for ban in room.abuse.bans()] == [CLIENT]
    assert room.abuse.lift(CLIENT)
    with Stillroom(room.settings, dispatch=NoDispatch()) as another:
        assert another.limits.check(CLIENT, [DEFAULT]).allowed


def test_a_worker_killed_between_the_ban_and_its_ack_bans_once(
    start_worker: StartCelery, room: Stillroom, db: Any
) -> None:
    """Workers killed twice between ban and acknowledgement leave one ban, level and entry, and nothing pending."""
    for n in range(20):
        put(db, room, "not_found", ip=CLIENT, route=f"/{n}")
    names = [name for name, _ in db.xrange(room.keys.abuse)]
    bans = []
    for left in (
        20,
        1,
    ):  # the second has acknowledged what was before the one that completes the pattern
        stuck = start_worker(app="tests.support.stuck_abuse")
        room.dispatch.wake(LOG_TASK)
        assert db.blpop(["db:stuck"], 30), "the worker found nothing"
        stuck.kill()
        assert pending(db, room) == left
        bans.append(ban_of(db, room))
        abandon(db, room, names[-left:])
    start_worker()
    room.dispatch.wake(LOG_TASK)
    until(lambda: pending(db, room) == 0, "an empty list of the pending")
    assert bans == [ban_of(db, room)] * 2
    assert bans[0] is not None
    assert db.get(room.keys.ban_level(CLIENT)) == b"1"
    assert rules_found(db, room) == ["scanner"]


def test_the_task_reports_and_takes_no_arguments(
    own_server: EmbeddedServer, room: Stillroom, db: Any
) -> None:
    """The task's result is what a person reads in Flower, and a message with arguments is refused."""
    for n in range(20):
        room.abuse.report("not_found", ip=CLIENT, route=f"/{n}")
    program = Program(
        f"""
        from stillroom import Settings
        from stillroom_workers import make_app
        app = make_app(Settings(redis_url={own_server.url!r}))
        task = app.tasks["stillroom.log_abuse"]
        try:
            task.run(limit=3)
        except Exception as error:
            print("refused", " ".join(str(error).split()))
        print("report", task.run())
        """
    )
    with program:
        assert "limit" in program.read_word("refused ")
        report = ast.literal_eval(program.read_word("report "))
    assert report == {
        "events": 20,
        "patterns": 1,
        "bans": 0,
        "aside": 0,
        "late": 0,
        "done": True,
    }


def test_the_schedule_has_the_scan() -> None:
    """The schedule has the scan as often as it may take, so that workers read without a pause in an attack."""
    assert [tick.every for tick in SCHEDULE if tick.task == LOG_TASK] == [SCAN_S]
