"""The health report on a real server says what is known and what is not, and is kept each minute."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any
from unicodedata import category

import pytest
from kombu.transport.redis import Channel

from stillroom import NoDispatch, Settings, Stillroom
from stillroom.broker import SENT_HEADER
from stillroom.embedded import EmbeddedServer
from stillroom.health.body import SCHEDULED
from stillroom.health.metrics import exposition
from stillroom.health.report import Measures, Snapshot, System, WorkerStats
from stillroom.health.rfc import details_json
from stillroom.web.status import render
from tests.support.crowd import PATIENT
from tests.support.faces import open_room
from tests.support.health import age_stream, count_in_last_minute, within_a_minute
from tests.support.status import a_day, a_week, patterns, seed, seed_patterns
from tests.support.threads import together

pytestmark = pytest.mark.usefixtures("calm_machine")


def test_a_report_has_every_part(room: Any, client: Any) -> None:
    """The report of a healthy room has connection, server, machine and services."""
    report = room.health.check()
    assert report.status == "pass", report.advice
    (server,) = report.servers
    assert (server.name, server.roles) == ("redis", ("cache", "state"))
    assert server.connection.is_up
    assert server.connection.breaker == "closed"
    assert 0 < server.connection.latency_ms < report.took_ms
    info = client.info()
    assert server.redis.run_id == info["run_id"]
    assert server.redis.role == "master"
    assert server.redis.version == info.get("valkey_version", info["redis_version"])
    assert server.redis.product == ("valkey" if "valkey_version" in info else "redis")
    assert server.redis.memory.policy == "noeviction"
    assert server.redis.memory.limit is None, "no maxmemory is no limit, not a limit of 0"
    assert server.redis.memory.used > 0
    assert server.redis.clients.connected >= 1
    assert report.system.fds > 0
    assert {queue.name for queue in report.tasks.queues} == {
        "stillroom.refresh",
        "stillroom.maintenance",
    }


def test_what_happened_is_counted_by_the_minute(room: Any, client: Any) -> None:
    """The report has all processes' counts of the last whole minute, and ratios only where there were lookups."""
    report = room.health.check()
    assert (report.cache.hits, report.cache.hit_ratio) == (0, None)
    count_in_last_minute(
        client, room, hits=70, stale=20, misses=10, limit_denials=3, sessions_created=2
    )
    report = room.health.check()
    assert (report.cache.hits, report.cache.stale, report.cache.misses) == (70, 20, 10)
    assert report.cache.hit_ratio == pytest.approx(0.9)
    assert report.limits.denials == 3
    assert report.limits.checks == 0
    assert report.sessions.created == 2


def test_totals_only_grow(room: Any, client: Any) -> None:
    """The totals of /metrics only grow: they are written with each minute's counts."""
    for n in range(3):
        room.cache.get(f"k{n}")
        room.state_stats.due = 0.0
        room.health.check()
    assert room.health.check().totals["misses"] == 3
    assert client.ttl(room.keys.counts) > 86_400


def test_sessions_are_counted(room: Any, client: Any) -> None:
    """The report counts live sessions, sessions due for the sweep, and revoked ones that are not deleted yet."""
    for n in range(3):
        room.sessions.create(f"u{n}")
    found = room.health.check().sessions
    assert (found.active, found.expired_pending, found.revoked_pending) == (3, 0, 0)
    for shard in range(room.settings.session_shards):
        due = room.keys.due_sessions(shard)
        for member in client.zrange(due, 0, 0):
            client.zadd(due, {member: 1})
    assert room.health.check().sessions.expired_pending >= 1


def test_waiting_work_is_seen(room: Any, client: Any) -> None:
    """The report has queue depths, the age of the next message if it says so, and the work of invalidations."""
    queue = room.keys.queue("refresh")
    sent_ms = int((time.time() - 40) * 1000)
    client.lpush(queue, json.dumps({"headers": {"stillroom_sent_ms": sent_ms}}))
    client.lpush(queue, json.dumps({"headers": {"stillroom_sent_ms": sent_ms + 30_000}}))
    client.lpush(room.keys.queue("maintenance"), b"\xff not a message")
    client.hset(room.keys.unacked, "tag", "message")
    client.zadd(room.keys.bans, {"a": int(time.time() * 1000) + 60_000, "b": 1})
    room.cache.set("k", 1, tags=["t"])
    room.cache.invalidate_by_tag("t")
    report = room.health.check()
    refresh, maintenance = report.tasks.queues
    assert refresh.depth == 2
    assert refresh.oldest_s == pytest.approx(40, abs=10)
    assert (maintenance.depth, maintenance.oldest_s) == (1, None)
    assert (report.tasks.unacked, report.tasks.todo) == (1, 1)
    assert report.limits.banned == 1
    codes = {advice.code for advice in report.advice}
    assert {"queue-age", "workers"} <= codes


def test_work_of_any_priority_is_seen(room: Any, client: Any) -> None:
    """Messages that a sender gave a priority wait in lists of their own; they count, and the oldest is found."""
    channel = Channel.__new__(Channel)  # for its names alone
    queue, now_ms = room.keys.queue("maintenance"), int(time.time() * 1000)
    for priority in (3, 9):
        sent = {"headers": {"stillroom_sent_ms": now_ms - priority * 10_000}}
        client.lpush(channel._q_for_pri(queue, priority), json.dumps(sent))
    (_, found) = room.health.check().tasks.queues
    assert found.depth == 2
    assert found.oldest_s == pytest.approx(90, abs=10)


@pytest.mark.parametrize("said", ["-Infinity", "NaN", "-1e300", "true", "0", '"long ago"'])
def test_a_time_that_no_clock_has_said_is_none(room: Any, client: Any, said: str) -> None:
    """Whoever may publish writes any time into a message; one that is not plausible tells nothing."""
    client.lpush(room.keys.queue("refresh"), f'{{"headers": {{"stillroom_sent_ms": {said}}}}}')
    report = room.health.check()
    assert report.tasks.queues[0].oldest_s in (None, 0)
    assert "queue-age" not in {advice.code for advice in report.advice}


def test_another_broker_is_not_looked_into(settings: Settings) -> None:
    """The queues of a broker other than Redis are unknown, not empty."""
    changed = Settings(redis_url=settings.redis_url, broker_url="amqp://broker", **PATIENT)
    with Stillroom(changed, dispatch=NoDispatch()) as room:
        tasks = room.health.check().tasks
    assert tasks is not None
    assert (tasks.queues, tasks.unacked) == (None, None)


def test_signs_of_life(room: Any, client: Any) -> None:
    """Workers and ticks are listed by when they were last seen, and both expire."""
    room.health.seen("celery@one")
    room.health.seen("celery@two")
    room.health.ticked("stillroom.snapshot_health")
    tasks = room.health.check().tasks
    assert tasks.workers == 2
    assert tasks.beat_s == pytest.approx(0, abs=5)
    client.zincrby(room.keys.workers, -31_000, "celery@one")
    assert room.health.check().tasks.workers == 1
    client.zincrby(room.keys.workers, -700_000, "celery@two")
    room.health.seen("celery@three")
    assert client.zrange(room.keys.workers, 0, -1) == [b"celery@one", b"celery@three"]
    assert 0 < client.ttl(room.keys.workers) <= 600
    assert 0 < client.ttl(room.keys.ticks) <= 30 * 86_400


def test_a_worker_that_is_seen_writes_its_counts_down(room: Any, client: Any) -> None:
    """A worker that reports itself writes its counts down, because it makes no read that could carry them."""
    room.state_stats.counts["refreshes_done"] += 5
    room.state_stats.due = 0.0
    room.health.seen("celery@one")
    assert client.hget(room.keys.counts, "refreshes_done") == b"5"


RIGHTS = "+time +info +slowlog|len +get +pttl +hgetall +hlen +zcard +zcount +llen +lindex +xlen +xrevrange +zrange"
RIGHTS_OF_SNAPSHOTS = "+memory|doctor +evalsha +script|load +hincrby +expire +hsetnx +hdel +xadd"


def test_these_rights_are_all_it_takes(server: EmbeddedServer, client: Any) -> None:
    """A check works with the documented rights and snapshots with a few more.

    Neither needs to read keys or settings.
    """
    rights = ["-@all", *RIGHTS.split(), *RIGHTS_OF_SNAPSHOTS.split()]
    client.execute_command("ACL", "SETUSER", "health", "on", ">h", "resetkeys", "~*", *rights)
    url = f"redis://health:h@127.0.0.1:{server.port}"
    try:
        with Stillroom(Settings(**{"redis_url": url} | PATIENT), dispatch=NoDispatch()) as room:
            assert room.health.check().advice == ()
            assert room.upkeep.snapshot().error is None
            assert client.xlen(room.keys.health) == 1
    finally:
        client.execute_command("ACL", "DELUSER", "health")


class Broken:
    """A probe with a mistake in it."""

    part = "limits"

    def commands(self, now_ms: int) -> Any:
        return [(b"GET", b"somebody's")]

    def read(self, replies: Any, now_ms: int) -> Any:
        raise ZeroDivisionError

    def count(self, counts: Any) -> Any:
        return {}


def test_a_probes_mistake_costs_its_part(room: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A probe that raises costs its own part of the report, and the log says what happened."""
    room.health.register("state", Broken())
    report = room.health.check()
    assert report.limits is None
    assert report.cache is not None
    assert report.sessions is not None
    assert "'limits' of the report" in caplog.text


def test_a_probe_that_can_not_ask_costs_what_it_would_have_told(
    room: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A probe that raises before it has asked is left out, of the report and of the figures; the log says why."""
    broken = Broken()
    broken.commands = lambda now_ms: 1 / 0  # type: ignore[method-assign]
    room.health.register("state", broken)
    assert room.health.check().limits.banned == 0
    assert room.health.figures(5).limits is not None
    assert room.upkeep.snapshot().error is None
    assert "'limits' can't say what to ask" in caplog.text


def test_junk_among_our_keys_is_passed_over(room: Any, client: Any) -> None:
    """The check passes over keys of other types and texts in place of numbers, and reports the rest."""
    client.hset(room.keys.counts, mapping={"hits": 3, "odd": "many"})
    client.hset(room.keys.ticks, "task", "yesterday")
    client.set(room.keys.workers, "a string")
    client.xadd(room.keys.health, {"snapshot": "{"})
    client.set(room.keys.health_open, "a string")
    client.lpush(room.keys.queue("refresh"), json.dumps(["no", "message"]))
    report = room.health.check()
    assert report.totals == {"hits": 3}
    assert report.tasks.workers is None
    assert report.tasks.ticks == {}
    assert report.tasks.queues[0].depth == 1
    assert report.servers[0].connection.error == "wrongtype"
    (refused,) = [found for found in report.advice if found.code == "refused"]
    assert "STILLROOM_NAMESPACE" in refused.todo


ENDLESS, LONG = "9" * 5_000, "9" * 400
NO_NUMBERS = [ENDLESS, LONG, "nan", "inf", "-1e12", "1e300"]


@pytest.mark.parametrize("number", NO_NUMBERS)
def test_a_number_that_is_none_costs_its_record(room: Any, client: Any, number: str) -> None:
    """Another writer's number that JSON or a page can't show costs its own record, and no report, page or list."""
    good = {"rule": "hammer", "subject": "203.0.113.7", "count": "3", "last": "1"}
    good |= {"action": "log", "shadow": "false"}
    for bad in ({}, {"last": number}, {"ban_seconds": number}, {"count": LONG}):
        client.xadd(room.keys.abuse_log, good | bad)
    word = {"nan": "NaN", "inf": "Infinity"}.get(number, number)
    for key in (room.keys.counts, room.keys.health_open, room.keys.ticks):
        client.hset(key, mapping={"limit_checks": number, "good": 1})
    for minute in range(3):
        stats = room.keys.stats(int(time.time()) // 60 - minute)
        client.hset(stats, mapping={"limit_checks": number, "limit_denials": 2})
        client.expire(stats, 60)
    room.upkeep.record_heartbeat("one")
    client.hset(room.keys.workers_about, "one", f'{{"up_s": {word}, "done": {word}}}')
    message = {"headers": {SENT_HEADER: float(number) if len(number) < 10 else 0}}
    client.lpush(room.keys.queue("refresh"), json.dumps(message))
    report, past = room.health.check(), room.health.past()
    assert [pattern.subject for pattern in past.patterns] == ["203.0.113.7"]
    assert report.totals == {"good": 1}
    assert report.limits.denials == past.figures.limits.denials / 2 == 2
    assert [(one.name, one.done) for one in report.tasks.crew] == [("one", None)]
    json.loads(details_json(report, 0.0), parse_constant=pytest.fail)
    assert exposition(report, 0.0)
    page = render(report, past.history, past.patterns, now=time.time(), figures=past.figures)
    assert "203.0.113.7" in page


OF_OTHERS = {
    "stillroom:counts": {"hits": "9" * 5_000, "loader:hits:\x1b[31m": "1"},
    "stillroom:health:open": {"redis:memory memory": "9" * 5_000},
    "stillroom:ticks": {"stillroom.warm": "9" * 5_000},
    "stillroom:errors": {
        "\x1b]0;owned\x07": '{"kind": "\\ud800\\u202e", "place": "x", "at": 0}',
        "a": '{"kind": "KeyError", "place": "x", "at": 1e999}',
        "b": "[" * 100_000,
    },
    "stillroom:limits:windows": {"auth": "9" * 5_000},
}


def test_hostile_junk_costs_no_report(room: Any, client: Any) -> None:
    """Numbers that are none, half characters and escape sequences are left out, or shown as text."""
    for key, fields in OF_OTHERS.items():
        client.hset(key, mapping=fields)
    client.set("stillroom:paused:refresh", '{"by": "\\ud800"}', px=60_000)
    client.zadd("stillroom:workers", {"w": "-inf"})
    client.lpush("stillroom.refresh", '{"headers": {"stillroom_sent_ms": -1e999}}')
    count_in_last_minute(client, room, hits=1)
    report = room.health.check()
    assert report.cache is not None
    assert report.tasks is not None
    json.dumps(report.model_dump(mode="json"), allow_nan=False)
    assert room.health.snapshot().error is None
    figures = room.health.figures(15)
    page = render(report, [], [], now=time.time(), figures=figures)
    assert not {one for one in page if category(one) in ("Cc", "Cf", "Cs")} - {"\n"}
    assert room.limits.names() == ["auth"]


# Snapshots


def test_a_minute_has_one_snapshot(room: Any, client: Any) -> None:
    """Two beats or ten workers make one snapshot a minute. The week keeps every fifth minute's."""
    streams = (room.keys.health, room.keys.health_week)

    def snapshots() -> list[list[int]]:
        """Make snapshots; return how many both streams have after those of one minute, and after three minutes."""
        client.delete(*streams)
        for _ in range(3):
            room.upkeep.snapshot()
        counts = [[client.xlen(one) for one in streams]]
        age_stream(client, room.keys.health, 60)
        room.upkeep.snapshot()
        age_stream(client, room.keys.health, 60)
        age_stream(client, room.keys.health_week, 300)
        room.upkeep.snapshot()
        return [*counts, [client.xlen(one) for one in streams]]

    assert within_a_minute(client, snapshots) == [[1, 1], [3, 2]]
    moments = [snapshot.time for snapshot in room.health.history()]
    assert moments == sorted(moments)
    assert len(room.health.history(hours=7 * 24)) == 2


def test_the_streams_are_bounded(room: Any, client: Any) -> None:
    """The streams keep a day of minutes and a week of five minutes, and expire eight days after the last entry."""
    with client.pipeline() as pipeline:
        for n in range(1, 1_500):
            pipeline.xadd(room.keys.health, {"snapshot": "{}"}, id=f"{n}-0")
        for n in range(1, 2_100):
            pipeline.xadd(room.keys.health_week, {"snapshot": "{}"}, id=f"{n}-0")
        pipeline.execute()
    room.upkeep.snapshot()
    assert client.xlen(room.keys.health) == 1_440
    assert client.xlen(room.keys.health_week) == 2_016
    for key in (room.keys.health, room.keys.health_week):
        assert 0 < client.ttl(key) <= 8 * 86_400


def test_a_day_is_read_in_bites(room: Any, client: Any) -> None:
    """A day is read in bites: every snapshot in order, without what another program wrote."""
    now_ms = int(time.time() * 1000)
    with client.pipeline() as pipeline:
        for n in range(500):
            moment = now_ms - (500 - n) * 60_000
            text = Snapshot(time=moment / 1000, servers=(), status="pass").model_dump_json()
            pipeline.xadd(room.keys.health, {"snapshot": text}, id=f"{moment}-0")
            if n % 100 == 0:
                pipeline.xadd(room.keys.health, {"other": "nonsense"}, id=f"{moment}-1")
        pipeline.execute()
    found = room.health.history()
    assert [round((now_ms / 1000 - one.time) / 60) for one in found] == list(range(500, 0, -1))
    assert len(room.health.history(hours=1)) in (59, 60)


def test_the_past_is_a_day_and_the_newest_patterns(room: Any, client: Any) -> None:
    """The past is the snapshots, oldest first, and the patterns, newest first, without foreign entries."""
    now = time.time()
    assert room.health.past()[:2] == ([], [])
    seed(client, room.keys.health, a_day(now, minutes=30))
    client.xadd(room.keys.abuse_log, {"rule": "hammer", "count": "many"}, id="1-0")
    seed_patterns(client, room.keys.abuse_log, [*patterns(now)] * 20)
    history, found, since, _ = room.health.past()
    assert [one.time for one in history] == [one.time for one in a_day(now, minutes=30)]
    assert found == (patterns(now) * 20)[:50]
    assert since == pytest.approx(history[0].time, abs=0.01)


def test_the_past_of_a_week_is_made_of_every_fifth_minute(room: Any, client: Any) -> None:
    """The past of a week has every fifth minute, and says when the first snapshot was made."""
    now = time.time()
    week = [one for one in a_week(now) if one.time > now - 6.5 * 86_400]
    seed(client, room.keys.health_week, week[::5])
    seed(client, room.keys.health, week[-30:])
    history, _, since, figures = room.health.past(hours=168)
    assert figures.minutes == 60
    assert len(history) == len(week[::5])
    assert since == pytest.approx(week[0].time, abs=0.01)
    history, _, since, figures = room.health.past(hours=0.25)
    assert figures.minutes == 15
    assert 13 <= len(history) <= 16
    assert since == pytest.approx(week[0].time, abs=0.01)


def test_workers_say_what_they_do(room: Any, client: Any) -> None:
    """The report lists each worker by name, the last seen first, and passes over impossible entries."""
    room.health.seen("one", WorkerStats(queues=("q",), threads=8, busy=3, done=12, per_min=4.5))
    room.health.seen("two")
    client.hset(room.keys.workers_about, "two", "nonsense")
    client.hset(room.keys.workers_about, "nobody", "{}")
    first, second = room.health.check().tasks.crew
    assert (first.name, first.threads) == ("two", None)
    assert (second.name, second.threads, second.busy, second.per_min) == ("one", 8, 3, 4.5)
    assert 0 <= second.seen_s < 30
    client.zadd(room.keys.workers, {"one": (time.time() - 700) * 1000})
    room.health.seen("two", WorkerStats(threads=1))
    (only,) = room.health.check().tasks.crew
    assert (only.name, only.threads) == ("two", 1)
    assert not client.hexists(room.keys.workers_about, "one"), "it is forgotten with its name"
    assert 0 < client.ttl(room.keys.workers_about) <= 600


def test_the_newest_tick_is_beats_sign_of_life(room: Any, client: Any) -> None:
    """The newest tick of a task that only beat sends is beat's sign of life."""
    room.health.ticked("stillroom.reclaim")
    assert room.health.check().tasks.beat_s is None
    room.health.ticked("stillroom.snapshot_health")
    client.hset(room.keys.ticks, "stillroom.snapshot_health", int((time.time() - 50) * 1000))
    assert room.health.check().tasks.beat_s == pytest.approx(50, abs=10)
    room.health.ticked("stillroom.log_abuse")
    assert room.health.check().tasks.beat_s < 10


def test_a_scheduled_task_that_always_fails_is_a_finding(room: Any, client: Any) -> None:
    """A task that has not ended well for ten minutes while others did is a finding from the second snapshot on."""

    def tick(*late: str) -> list[str]:
        for task in SCHEDULED:
            if task not in late:
                room.upkeep.record_tick(task)
        age_stream(client, room.keys.health, 60)
        snapshot = room.upkeep.snapshot()
        return [name for name in snapshot.findings if "standing" in name]

    assert tick() == []
    ago = int((time.time() - 700) * 1_000)
    client.hset(room.keys.ticks, mapping={"stillroom.log_abuse": ago, "retired": ago})
    assert tick("stillroom.log_abuse") == []
    assert tick("stillroom.log_abuse") == ["tasks:beat standing"]
    (found,) = [one for one in room.health.check().advice if one.code == "standing"]
    assert "stillroom.log_abuse (12 min ago)." in found.what
    assert "retired" not in found.what
    assert tick() == []


def test_a_scheduled_task_that_never_ended_well_is_a_finding(room: Any) -> None:
    """A task that was never done is a finding once a worker has worked for ten minutes, and beat with it."""
    for task in SCHEDULED[1:]:
        room.upkeep.record_tick(task)
    room.upkeep.snapshot()
    for up_s, expected in ((500, []), (700, [f"{SCHEDULED[0]} (never)."])):
        room.upkeep.record_heartbeat("one", WorkerStats(up_s=up_s))
        advice = room.health.check().advice
        found = [one.what.rpartition(": ")[2] for one in advice if one.code == "standing"]
        assert found == expected
    room.upkeep.record_tick(SCHEDULED[0])
    assert "standing" not in {one.code for one in room.health.check().advice}


def test_workers_that_begin_again_are_not_late(room: Any, client: Any) -> None:
    """Tasks that are late because no worker was there are no finding while the first of them are done."""
    for task in SCHEDULED:
        room.upkeep.record_tick(task)
        client.hset(room.keys.ticks, task, int((time.time() - 7_200) * 1_000))
    room.upkeep.snapshot()
    age_stream(client, room.keys.health, 60)
    for done in (SCHEDULED[:3], SCHEDULED):
        for task in done:
            room.upkeep.record_tick(task)
        assert "tasks:beat standing" not in room.upkeep.snapshot().findings
        age_stream(client, room.keys.health, 60)


def test_the_past_of_a_server_that_is_away_is_not_known(own_server: EmbeddedServer) -> None:
    """The past of a server that is away is unknown, not empty."""
    with Stillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch()) as room:
        own_server.kill()
        assert room.health.past() == (None, None, None, None)


def test_rates_are_differences_of_one_server_run(room: Any, client: Any) -> None:
    """Rates are differences to the last snapshot of the same server run. After a restart they are unknown."""
    assert room.health.check().servers[0].redis.operations.errors_per_s is None
    room.upkeep.snapshot()
    age_stream(client, room.keys.health, 60)
    for _ in range(3):
        with pytest.raises(Exception, match="WRONGTYPE"):
            client.execute_command("LPUSH", room.keys.health, "x")
    operations = room.health.check().servers[0].redis.operations
    assert operations.errors_per_s > 0
    assert operations.evicted_per_s == 0
    (_, fields), *_ = client.xrevrange(room.keys.health, count=1)
    other = json.loads(fields[b"snapshot"])
    other["servers"][0]["redis"]["run_id"] = "another"
    client.xadd(room.keys.health, {"snapshot": json.dumps(other)})
    assert room.health.check().servers[0].redis.operations.errors_per_s is None


def test_a_finding_is_told_when_it_begins_and_when_it_ends(
    room: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A finding is logged once when it begins and once when it ends, and the report says since when it lasts."""
    caplog.set_level(logging.WARNING, "stillroom.health")
    client.xadd(room.keys.dead_letters, {"kind": "message"})
    for _ in range(3):
        room.upkeep.snapshot()
        age_stream(client, room.keys.health, 60)
    begun = [line for line in caplog.messages if "tasks:queues dead-letters" in line]
    assert len(begun) == 1
    assert "1 dead letter waits" in begun[0]
    assert "stillroom dead-letters list" in begun[0]
    (advice,) = [one for one in room.health.check().advice if one.code == "dead-letters"]
    assert advice.since == pytest.approx(time.time(), abs=30)
    client.delete(room.keys.dead_letters)
    for _ in range(2):
        room.upkeep.snapshot()
        age_stream(client, room.keys.health, 60)
    lines = [line for line in caplog.messages if "tasks:queues dead-letters" in line]
    assert len(lines) == 2
    assert "over after" in lines[1]
    assert client.ttl(room.keys.health_open) > 0 or not client.exists(room.keys.health_open)


def test_a_finding_that_becomes_a_failure_is_told_again(
    make_room: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning that becomes a failure is told as one, once, by each machine for itself; its beginning stays."""
    caplog.set_level(logging.WARNING, "stillroom.health")
    machines = {name: make_room(webhook_url="http://127.0.0.1:9/") for name in ("one", "other")}
    disks = {"one": 0.9, "other": 0.96}
    for name, room in machines.items():
        body = room.health._body
        body._machine = name
        body._system.look = lambda name=name: System(disk=disks[name])

    def told(*names: str) -> list[tuple[str, str]]:
        caplog.clear()
        for name in names:
            machines[name].upkeep.snapshot()
            age_stream(client, room.keys.health, 60)
        return [(line.levelname, line.message.partition(":")[0]) for line in caplog.records]

    begun = [("WARNING", "system disk on one"), ("ERROR", "system disk on other")]
    assert told("one", "other", "one", "other") == begun
    since = client.hget(room.keys.health_open, "system disk on one")
    disks["one"] = 0.97
    assert told("other", "one", "other", "one") == [("ERROR", "system disk on one")]
    assert client.hget(room.keys.health_open, "system disk on one") == since
    events = [json.loads(fields[b"event"]) for _, fields in client.xrange(room.keys.webhook)]
    assert [one["severity"] for one in events] == ["warn", "fail", "fail"]
    disks["one"] = 0.9
    assert told("one", "one") == []
    disks["one"] = 0.97
    assert told("one") == [("ERROR", "system disk on one")]
    disks |= {"one": 0.1, "other": 0.1}
    assert [level for level, _ in told("one", "other")] == ["WARNING", "WARNING"]
    assert not client.exists(room.keys.health_open)


def test_machines_that_take_turns_tell_a_finding_once(
    make_room: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What is found of a machine begins once and ends once, though workers of others take most of the snapshots.

    It is over when that machine says so, or has not been heard of for an hour.
    """
    caplog.set_level(logging.WARNING, "stillroom.health")
    machines = {name: make_room() for name in ("one", "other")}
    disks = {"one": 0.9, "other": 0.9}
    for name, room in machines.items():
        body = room.health._body
        body._machine = name
        body._system.look = lambda name=name: System(disk=disks[name])

    def take_turns(*names: str) -> list[str]:
        caplog.clear()
        for name in names:
            machines[name].upkeep.snapshot()
            age_stream(client, room.keys.health, 60)
        return [line.partition(":")[0] for line in caplog.messages]

    assert take_turns("one", "other", "one", "other") == [
        "system disk on one",
        "system disk on other",
    ]
    (found,) = machines["one"].health.check().advice
    assert found.since == pytest.approx(time.time(), abs=30)
    disks["one"] = 0.3
    assert take_turns("other", "other") == []
    assert take_turns("one", "other", "one") == ["system disk on one"]
    open_now = client.hgetall(room.keys.health_open)
    assert sorted(open_now) == [b"@other", b"system disk on other"]
    client.hincrby(room.keys.health_open, "@other", -3_000_000)
    assert take_turns("one") == []
    client.hincrby(room.keys.health_open, "@other", -3_000_000)
    assert take_turns("one") == ["system disk on other"]
    assert not client.exists(room.keys.health_open)


def test_a_snapshot_has_the_measures_of_a_report(room: Any) -> None:
    """A snapshot has the same fields as a report, so that one chart draws both, and the words of MEMORY DOCTOR."""
    snapshot = room.upkeep.snapshot()
    assert set(Measures.model_fields) <= set(Snapshot.model_fields)
    (kept,) = room.health.history()
    assert kept == snapshot
    assert snapshot.error is None
    assert "Sam" in snapshot.servers[0].redis.memory.doctor
    words = snapshot.servers[0].redis.memory.doctor
    assert room.health.check().servers[0].redis.memory.doctor == words, "a check has the last words"


def test_a_snapshot_is_kept_when_memory_is_full(room: Any, client: Any) -> None:
    """A snapshot is kept when memory is full, where the server lets a script write then."""
    room.upkeep.snapshot()
    age_stream(client, room.keys.health, 60)
    client.config_set("maxmemory", "1")
    try:
        snapshot = room.upkeep.snapshot()
        assert "redis:memory memory" in snapshot.findings
        assert snapshot.status == "fail"
    finally:
        client.config_set("maxmemory", "0")
    assert client.xlen(room.keys.health) == 2


def test_signs_of_life_are_taken_when_memory_is_full(room: Any, client: Any) -> None:
    """A full server knows of its workers and ticks: no finding says that there are none."""
    client.config_set("maxmemory", "1")
    try:
        room.upkeep.record_heartbeat("one", WorkerStats(busy=1))
        room.upkeep.record_tick("stillroom.warm")
        tasks = room.health.check().tasks
    finally:
        client.config_set("maxmemory", "0")
    assert tasks.workers == 1
    assert tasks.crew[0].busy == 1
    assert tasks.beat_s == pytest.approx(0, abs=5)


def test_workers_in_a_race_tell_a_finding_once(
    make_room: Any, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight workers that see a finding begin and end at one moment make one snapshot and one line each time."""
    caplog.set_level(logging.WARNING, "stillroom.health")
    rooms = [make_room() for _ in range(8)]
    keys = rooms[0].keys
    for junk, expected in ((True, 1), (False, 2)):
        if junk:
            client.xadd(keys.dead_letters, {"kind": "message"})
        else:
            client.delete(keys.dead_letters)
            age_stream(client, keys.health, 60)
        together(*[room.upkeep.snapshot for room in rooms])
        lines = [line for line in caplog.messages if "tasks:queues dead-letters" in line]
        assert len(lines) == expected
        assert client.xlen(keys.health) in (expected, expected + 1)  # a minute may begin meanwhile


# Two servers


@pytest.fixture(params=["sync", "async"])
def two_roles(
    request: pytest.FixtureRequest, server: EmbeddedServer, own_server: EmbeddedServer
) -> Iterator[Any]:
    """Open a room whose cache has a server of its own, which is the test's."""
    changes = {"redis_url": server.url, "cache_url": own_server.url} | PATIENT
    settings = Settings(**changes)
    with open_room(request.param, settings, NoDispatch()) as room:
        yield room


def test_two_servers_are_reported_by_their_roles(two_roles: Any, client: Any) -> None:
    """Two servers are reported by their roles, and each service is read from the server it lives on."""
    two_roles.cache.get("k")
    two_roles.sessions.create("u1")
    report = two_roles.health.check()
    assert [(server.name, server.roles) for server in report.servers] == [
        ("redis.cache", ("cache",)),
        ("redis.state", ("state",)),
    ]
    runs = {server.name: server.redis.run_id for server in report.servers}
    assert runs["redis.state"] == client.info("server")["run_id"]
    assert runs["redis.cache"] != runs["redis.state"]
    assert report.sessions.active == 1
    assert report.cache.hits == 0
    assert report.tasks.todo == 0


def test_one_of_two_is_away(two_roles: Any, own_server: EmbeddedServer) -> None:
    """When one of two servers is away it is named and its part unknown; the other is reported and the snapshot
    kept.
    """
    own_server.kill()
    report = two_roles.health.check()
    cache, state = report.servers
    assert (cache.connection.is_up, cache.redis) == (False, None)
    assert state.connection.is_up
    assert report.status == "fail"
    assert report.advice[0].name == "redis.cache:connection away"
    assert report.cache is None
    assert report.sessions is not None
    assert report.tasks.todo is None
    assert report.tasks.workers == 0
    assert report.totals is None, "a part of them is unknown, so is the sum"
    snapshot = two_roles.health.snapshot()
    assert snapshot.error == f"redis.cache: {cache.connection.error}"
    assert two_roles.health.history()[-1].error == snapshot.error
