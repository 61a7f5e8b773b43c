"""A finding begins at its threshold and not before, and odd INFO, snapshots and metrics do no harm."""

from __future__ import annotations

import inspect
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from stillroom.cache.probe import LAG_LONGER, LAG_SUM, CacheProbe, lag_bucket
from stillroom.health import findings as others
from stillroom.health.advice import RULES, Counted, advise, codes, status_of
from stillroom.health.metrics import exposition
from stillroom.health.redis_info import parse_info
from stillroom.health.report import (
    CacheStats,
    Connection,
    Counters,
    Follower,
    Limits,
    LoaderStats,
    Measures,
    QueueStats,
    RedisInfo,
    Replication,
    Report,
    Server,
    SessionStats,
    System,
    TaskStats,
    WorkerStats,
)
from stillroom.health.snapshot import packed, rates_between, snapshot_of, unpacked, with_rates
from stillroom.health.system import SystemWatch
from stillroom.keys import Keys
from stillroom.stats import Stats

UP = Connection(is_up=True, breaker="closed", latency_ms=0.5)
BOTH, STATE, CACHE = ("cache", "state"), ("state",), ("cache",)
MIB = 1024 * 1024


def info(**parts: Any) -> RedisInfo:
    return RedisInfo.model_validate(parts)


def server(redis: RedisInfo | None, roles: Any = BOTH, connection: Connection = UP) -> Server:
    name = "redis" if roles == BOTH else f"redis.{roles[0]}"
    return Server(name=name, roles=roles, connection=connection, redis=redis)


def measures(*servers: Server, **parts: Any) -> Measures:
    return Measures(time=1_000.0, servers=servers, **parts)


def findings(*servers: Server, **parts: Any) -> set[tuple[str, str]]:
    return {(found.code, found.severity) for found in advise(measures(*servers, **parts))}


def test_nothing_known_is_no_finding() -> None:
    """Unknown values make no finding, and a server that is up and says nothing more is just up."""
    assert findings(server(RedisInfo())) == set()
    assert findings() == set()
    everything = {"cache": CacheStats(), "sessions": SessionStats(), "limits": Limits()}
    assert findings(server(None), **everything, tasks=TaskStats(), system=System()) == set()


def test_a_finding_names_what_it_is_about() -> None:
    """A finding about queues or replicas names those that are late, and only those, and is one."""
    queues = [("refresh", 40), ("maintenance", 400), ("idle", 3), ("silent", None)]
    tasks = TaskStats(queues=tuple(QueueStats(name=name, oldest_s=age) for name, age in queues))
    followers = [Follower(address=f"10.0.0.{n}:6379", is_online=True, lag_s=n) for n in (1, 12, 37)]
    primary = server(None).model_copy(
        update={"replication": Replication(followers=tuple(followers))}
    )
    assert [found.what for found in advise(measures(primary, tasks=tasks))] == [
        "A task has waited for 400 s: maintenance (400 s), refresh (40 s).",
        "A replica was last heard of 37 s ago: 10.0.0.37:6379 (37 s), 10.0.0.12:6379 (12 s). Were it promoted now, "
        "what was written since would be missing.",
    ]


@pytest.mark.parametrize(
    ("crew", "said"),
    [
        ([WorkerStats(queues=("refresh",))], ". No worker takes from maintenance."),
        ([WorkerStats(queues=("refresh",)), WorkerStats(queues=("maintenance",))], "."),
        # It has gone, or it does not say what it takes.
        ([WorkerStats(queues=("refresh",)), WorkerStats()], "."),
        ([WorkerStats(queues=("refresh",), seen_s=31)], "."),
    ],
)
def test_a_queue_that_no_worker_takes_from_is_named(crew: list[WorkerStats], said: str) -> None:
    """Where tasks wait because workers were started for the other queue alone, the finding says so."""
    queues = (QueueStats(name="maintenance", oldest_s=40),)
    (found,) = advise(measures(server(None), tasks=TaskStats(queues=queues, crew=tuple(crew))))
    assert found.what == f"A task has waited for 40 s: maintenance (40 s){said}"


def operations(**rates: float) -> RedisInfo:
    return info(operations=rates)


@pytest.mark.parametrize(
    ("said", "roles", "expected"),
    [
        (info(memory={"used": 74, "limit": 100}), BOTH, set()),
        (info(memory={"used": 75, "limit": 100}), BOTH, {("memory", "warn")}),
        (info(memory={"used": 90, "limit": 100}), STATE, {("memory", "fail")}),
        (
            info(memory={"used": 100, "limit": 100}),
            CACHE,
            set(),
        ),  # a full cache evicts: that is its work
        (info(memory={"used": 100}), STATE, set()),
        (operations(evicted_per_s=0), BOTH, set()),
        (operations(evicted_per_s=0.001), BOTH, {("evictions", "fail")}),
        (operations(evicted_per_s=0.001), STATE, {("evictions", "fail")}),
        (operations(evicted_per_s=0.001), CACHE, {("evictions", "warn")}),
        (operations(rejected_per_s=0.1), CACHE, {("rejected", "fail")}),
        (operations(slow_per_s=0.1), STATE, {("slow", "warn")}),
        (info(clients={"connected": 79, "limit": 100}), STATE, set()),
        (info(clients={"connected": 80, "limit": 100}), STATE, {("clients", "warn")}),
        (info(clients={"connected": 95, "limit": 100}), STATE, {("clients", "fail")}),
        (info(persistence={"aof_ok": False}), STATE, {("aof", "fail")}),
        (info(persistence={"aof_ok": True, "rdb_ok": False}), STATE, {("rdb", "warn")}),
        (info(role="slave", link_up=True), STATE, {("read-only", "fail")}),
        (info(role="slave", link_up=False), STATE, {("read-only", "fail"), ("replica", "fail")}),
        (info(memory={"policy": "allkeys-lru"}), BOTH, {("policy", "fail")}),
        (info(memory={"policy": "allkeys-lfu"}), CACHE, set()),
        (
            info(memory={"policy": "noeviction", "limit": 100, "used": 1}),
            CACHE,
            {("policy", "warn")},
        ),
        (info(memory={"policy": "noeviction", "limit": 100, "used": 1}), STATE, set()),
        (info(memory={"policy": "volatile-lru"}), BOTH, set()),
        (info(memory={"policy": "volatile-lfu"}), BOTH, {("policy", "warn")}),
        (info(memory={"policy": "volatile-ttl"}), BOTH, {("policy", "warn")}),
        (info(memory={"policy": "volatile-random"}), BOTH, {("policy", "warn")}),
        (info(memory={"policy": "volatile-ttl"}), STATE, {("policy", "warn")}),
        (info(memory={"policy": "volatile-lru"}), CACHE, set()),
        (
            info(memory={"used": 20 * MIB, "rss": 40 * MIB, "fragmentation": 2.0}),
            STATE,
            {("fragmentation", "warn")},
        ),
        (info(memory={"used": 20 * MIB, "rss": 25 * MIB, "fragmentation": 1.5}), STATE, set()),
        (info(memory={"used": 4 * MIB, "rss": 40 * MIB, "fragmentation": 10.0}), STATE, set()),
    ],
)
def test_a_servers_findings(said: RedisInfo, roles: Any, expected: set[Any]) -> None:
    """Each finding of a server begins at its threshold and not before, by the server's role."""
    assert findings(server(said, roles)) == expected


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"cache": CacheStats(fallbacks=1)}, {("fallbacks", "warn")}),
        ({"cache": CacheStats(decode_errors=1)}, {("decoding", "warn")}),
        ({"cache": CacheStats(load_errors=1)}, {("loading", "warn")}),
        ({"cache": CacheStats(not_kept={"price": 3})}, {("not-kept", "warn")}),
        ({"cache": CacheStats(not_kept={})}, set()),
        ({"cache": CacheStats(refresh_lag_p95_s=15)}, set()),
        ({"cache": CacheStats(refresh_lag_p95_s=300)}, {("refresh-lag", "warn")}),
        (
            {"limits": Limits(degraded=1, dropped=1)},
            {("degraded", "warn"), ("abuse-dropped", "warn")},
        ),
        ({"sessions": SessionStats(replayed=1)}, {("replays", "warn")}),
        ({"tasks": TaskStats(beat_s=149)}, set()),
        ({"tasks": TaskStats(beat_s=151)}, {("beat", "warn")}),
        ({"tasks": TaskStats(beat_s=601)}, {("beat", "fail")}),
        # A beat that nobody has started yet, and one that may have been started with the worker.
        ({"tasks": TaskStats(ticks={}, crew=(WorkerStats(up_s=151),))}, {("no-beat", "warn")}),
        ({"tasks": TaskStats(ticks={}, crew=(WorkerStats(up_s=149),))}, set()),
        ({"tasks": TaskStats(ticks={}, crew=(WorkerStats(up_s=999, seen_s=31),))}, set()),
        ({"tasks": TaskStats(ticks=None, crew=(WorkerStats(up_s=999),))}, set()),
        ({"tasks": TaskStats(ticks={}, beat_s=9, crew=(WorkerStats(up_s=999),))}, set()),
        ({"tasks": TaskStats(dead_letters=1)}, {("dead-letters", "warn")}),
        ({"tasks": TaskStats(workers=0, queues=(), todo=0)}, set()),
        ({"tasks": TaskStats(workers=0, queues=(), todo=1)}, {("workers", "warn")}),
        # Another broker, whose queues nobody sees: workers and what is left to do are known all the same.
        ({"tasks": TaskStats(workers=0, todo=1)}, {("workers", "warn")}),
        ({"tasks": TaskStats(todo=1)}, set()),
        ({"tasks": TaskStats(queues=(QueueStats(name="q", oldest_s=29),))}, set()),
        (
            {"tasks": TaskStats(queues=(QueueStats(name="q", oldest_s=31),))},
            {("queue-age", "warn")},
        ),
        (
            {"tasks": TaskStats(queues=(QueueStats(name="q", oldest_s=301),))},
            {("queue-age", "fail")},
        ),
        ({"system": System(disk=0.86, memory=0.91)}, {("disk", "warn"), ("ram", "warn")}),
        ({"system": System(fds=81, fd_limit=100, load1=4)}, {("fds", "warn"), ("load", "warn")}),
    ],
)
def test_the_services_findings(parts: dict[str, Any], expected: set[Any]) -> None:
    """Each finding of cache, limits, sessions, tasks and machine begins at its threshold and not before."""
    assert findings(**parts) == expected


@pytest.mark.parametrize(
    ("hits", "usual", "expected"),
    [(700, 0.89, set()), (700, 0.91, {("hit-ratio", "warn")}), (70, 0.91, set())],
)
def test_a_drop_of_the_hit_ratio(hits: int, usual: float, expected: set[Any]) -> None:
    """The hit ratio is a finding at twenty points under the hour's average and a thousand lookups or more."""
    cache = CacheStats(hits=hits, stale=0, misses=hits * 3 // 7, hit_ratio=0.7, usual_ratio=usual)
    assert findings(cache=cache) == expected


def test_a_drop_of_the_hit_ratio_names_the_loaders_that_miss() -> None:
    """Where the hit ratio falls, the finding names the loaders with the most misses."""
    loaders = tuple(
        LoaderStats(name=name, misses=n) for name, n in [("a", 9), ("b", 700), ("c", 0)]
    )
    cache = CacheStats(
        hits=300, stale=0, misses=709, hit_ratio=0.3, usual_ratio=0.9, loaders=loaders
    )
    (found,) = advise(measures(cache=cache))
    assert (
        found.what == "The hit ratio is 60% below what is usual. The most misses: b (700), a (9)."
    )


def test_whoever_is_away_is_a_failure_with_its_reason() -> None:
    """A server that is away is a failure with its reason and advice.

    The worst finding is first and sets the status.
    """
    away = Connection(is_up=False, breaker="open", error="auth")
    advice = advise(
        measures(server(None, CACHE, away), server(info(persistence={"rdb_ok": False}), STATE))
    )
    assert [found.severity for found in advice] == ["fail", "warn"]
    assert advice[0].component == "redis.cache:connection"
    assert "auth" in advice[0].what
    assert {"REDIS_PASSWORD", "STILLROOM_SENTINEL_PASSWORD"} <= {
        *re.findall(r"\w+", advice[0].todo)
    }
    assert status_of(advice) == "fail"
    assert status_of(advice[1:]) == "warn"
    assert status_of([]) == "pass"


@pytest.mark.parametrize(
    ("reason", "roles", "setting"),
    [
        ("refused", CACHE, "STILLROOM_CACHE_URL"),
        ("name", CACHE, "STILLROOM_CACHE_URL"),
        ("refused", STATE, "REDIS_URL"),
        ("name", BOTH, "REDIS_URL"),
    ],
)
def test_who_is_away_is_told_with_the_setting_that_leads_there(
    reason: str, roles: Any, setting: str
) -> None:
    """The advice for a server that is away names the setting of its address, and no other one."""
    away = Connection(is_up=False, breaker="open", error=reason)
    (found,) = advise(measures(server(None, roles, away)))
    assert re.findall(r"\w+_URL", found.todo) == [setting]


def test_a_node_that_is_away_is_told_without_a_setting() -> None:
    """No setting leads to a node whose address a cluster has told, so the advice for it names none."""
    away = Connection(is_up=False, breaker="open", error="refused")
    node = server(None, CACHE, away).model_copy(update={"name": "redis.cache@127.0.0.1:7001"})
    (found,) = advise(measures(node))
    assert "_URL" not in found.todo


def test_a_user_without_rights_is_told_which() -> None:
    """A user without rights is told which are missing, as a warning that names what stays unknown."""
    no_info = Connection(is_up=True, breaker="closed", error="noperm")
    (found,) = advise(measures(server(None, BOTH, no_info)))
    assert (found.code, found.severity) == ("rights", "warn")
    assert "Without INFO" in found.what
    assert "+info" in found.todo


def test_a_server_that_lacks_a_command_of_the_check_may_be_accepted() -> None:
    """Managed servers have no SLOWLOG, and no log that anybody can look at: the finding says how to accept it."""
    lacks = Connection(is_up=True, breaker="closed", error="unsupported")
    (found,) = advise(measures(server(RedisInfo(), BOTH, lacks)))
    assert (found.code, found.severity) == ("refused", "warn")
    assert "STILLROOM_HEALTH_ACCEPT=refused" in found.todo


def test_every_rule_is_complete() -> None:
    """Every rule has sentences for cause, good values and advice, a source, and a name that is unique
    in its place.
    """
    for rule in RULES:
        assert rule.warn is not None or rule.fail is not None
        assert all((rule.what, rule.good, rule.todo, rule.source)), rule.code
        for sentence in (rule.what.format(v=Counted(0.5), whose=""), rule.good):
            assert sentence[0].isalnum(), sentence
            assert sentence.endswith("."), sentence


@pytest.mark.parametrize(
    "rule", [one for one in RULES if " a second" not in one.what], ids=lambda rule: rule.code
)
def test_one_thing_is_not_counted_as_several(rule: Any) -> None:
    """A finding about one thing says "1 dead letter waits", one about two "2 dead letters wait"."""
    one, two = (rule.what.format(v=Counted(n), whose="") for n in (1, 2))
    assert not re.search(r"\b1 (\w+ )?\w{3,}s\b(?<!loses)(?<!was)(?<!waits)", one), one
    assert not re.search(r"\b2 \w+ (waits|is|was)\b", two), two


# INFO


def test_what_info_does_not_say_is_null() -> None:
    """A value that INFO lacks, or that is no number, is null and not 0."""
    nothing = parse_info(b"")
    assert nothing == RedisInfo()
    odd = parse_info(
        b"used_memory:many\r\nmaxmemory:0\r\nno colon\r\n# Server:1\r\nrole:master:x\r\n"
    )
    assert odd.memory.used is None
    assert odd.memory.limit is None
    assert odd.role == "master:x"
    assert parse_info(b"redis_version:7.2.4\r\n").product == "redis"
    valkey = parse_info(b"redis_version:7.2.4\r\nvalkey_version:9.0.1\r\n")
    assert (valkey.product, valkey.version) == ("valkey", "9.0.1")


@given(st.binary(max_size=200))
def test_any_text_can_be_read(text: bytes) -> None:
    """Any text of a server, or of something else on its port, can be read."""
    assert isinstance(parse_info(text), RedisInfo)


# Differences


def test_rates_between_two_looks() -> None:
    """Rates are growth by the server's clock, and unknown where a value is missing or the count was reset."""
    before = Counters(at=100.0, evicted=5, hits=10, misses=10, errors=7)
    now = Counters(at=160.0, evicted=65, hits=40, misses=20, errors=3, rejected=1)
    rates = rates_between(before, now)
    assert rates["evicted_per_s"] == 1.0
    assert rates["hit_ratio"] == 0.75
    assert rates["errors_per_s"] is None
    assert rates["rejected_per_s"] is None
    assert set(rates_between(now, before).values()) == {None}


def test_the_usual_ratio_moves_slowly() -> None:
    """The usual ratio remembers an hour: a minute without lookups changes nothing and a bad one little."""

    def at(ratio: float | None, usual: float | None = None) -> Measures:
        return measures(cache=CacheStats(hit_ratio=ratio, usual_ratio=usual))

    def usual(now: Measures, before: Measures) -> float | None:
        cache = with_rates(now, before).cache
        assert cache is not None
        return cache.usual_ratio

    assert usual(at(0.5), at(None, 0.9)) == pytest.approx(0.9 - 0.4 / 60)
    assert usual(at(None), at(None, 0.9)) == 0.9
    assert usual(at(0.5), at(None)) == 0.5
    assert usual(at(None), at(None)) is None


def cache_probe() -> CacheProbe:
    """Return the probe of a process that has counted nothing."""
    keys = Keys("stillroom")
    return CacheProbe(keys, Stats(keys))


@given(st.floats(0, 1e6))
def test_a_lag_has_a_bucket(seconds: float) -> None:
    """Every lag has a bucket, whose bound is above it."""
    name = lag_bucket(seconds)
    counted = cache_probe().count({name: 1, LAG_SUM: int(seconds * 1000)})
    assert counted["refresh_lag_s"] == pytest.approx(seconds, abs=0.001)
    assert counted["refresh_lag_p95_s"] >= min(seconds, 86_400)


def test_a_lag_is_the_95th_of_a_hundred() -> None:
    """The lag is the 95th of a hundred, and unknown without a refresh."""
    probe = cache_probe()
    assert probe.count({"refresh_lag_1": 95, "refresh_lag_60": 5})["refresh_lag_p95_s"] == 1
    assert probe.count({"refresh_lag_1": 94, LAG_LONGER: 6})["refresh_lag_p95_s"] == 86_400
    assert "refresh_lag_s" not in probe.count({"hits": 1})


# The machine


def test_the_machine_is_looked_at() -> None:
    """The machine's ratios are from 0 to 1, and CPU use is known from the second look on."""
    watch = SystemWatch()
    first = watch.look()
    assert first is not None
    assert first.cpu is None, "one look is no difference"
    assert first.fds is not None
    assert first.fds > 0
    assert first.rss is not None
    assert first.rss > 1_000_000
    for share in (first.memory, first.disk):
        assert share is not None
        assert 0 <= share <= 1
    until = time.thread_time() + 0.05
    while time.thread_time() < until:
        pass
    again = watch.look()
    assert again is not None
    assert again.cpu is None or 0 <= again.cpu <= 1


class Times(NamedTuple):
    """What psutil tells of a machine's CPUs, seconds."""

    user: float
    idle: float
    iowait: float


def test_time_that_goes_back_makes_no_more_than_a_whole_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CPU use is at most 1, though Linux lets the time that it waited for disks go back."""
    watch, told = SystemWatch(), iter([Times(10.0, 10.0, 1.0), Times(11.0, 10.0, 0.5)])
    monkeypatch.setattr("psutil.cpu_times", lambda: next(told))
    watch.look()
    again = watch.look()
    assert again is not None
    assert again.cpu == 1


def test_what_a_system_does_not_tell_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that a system lacks, as Windows its load, is null, and the others are reported."""
    monkeypatch.delattr("os.getloadavg")
    monkeypatch.setattr("psutil.disk_usage", lambda _: 1 / 0)
    looked = SystemWatch().look()
    assert looked is not None
    assert (looked.load1, looked.disk) == (None, None)
    assert looked.memory is not None


# Texts

names = st.text(max_size=20)


@settings(max_examples=40)
@given(names, names, st.dictionaries(names, st.integers(0, 2**63)))
def test_metrics_are_a_text_that_can_be_read(
    queue: str, event: str, totals: dict[str, int]
) -> None:
    """The metrics parse whatever is in Redis, and each sample is there once."""
    queues = (QueueStats(name=queue, depth=1), QueueStats(name=f"{queue}2", oldest_s=99))
    report = Report(
        time=1.0,
        servers=(server(info(memory={"used": 5})),),
        tasks=TaskStats(queues=queues),
        status="pass",
        totals=totals | {event: 3},
    )
    samples = [
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(exposition(report, 0.0).decode())
        for sample in family.samples
    ]
    assert len(samples) == len(set(samples)) > 3


def test_a_snapshot_survives_the_stream() -> None:
    """A snapshot comes back from the stream with its nulls, and a newer version's fields are ignored."""
    report = Report(
        time=1.0, servers=(server(info(role="master")),), status="pass", totals={"a": 1}
    )
    snapshot = snapshot_of(report, "an error")
    text = packed(snapshot)
    assert b"null" not in text
    assert unpacked([(b"1-0", [b"snapshot", text])]) == [snapshot]
    newer = text[:-1] + b',"of_the_future":{"a":1}}'
    assert unpacked([(b"1-0", [b"snapshot", newer]), (b"2-0", [b"x"])]) == [snapshot]


def test_every_finding_has_a_code_that_can_be_accepted() -> None:
    """STILLROOM_HEALTH_ACCEPT knows the code of each finding that is made anywhere."""
    source = Path(inspect.getfile(others)).read_text(encoding="utf-8")
    made = {"rights", "refused", *re.findall(r'code="([^"]+)"', source)}
    assert made == set(others.OTHERS)
    assert codes() == made | {rule.code for rule in RULES}
