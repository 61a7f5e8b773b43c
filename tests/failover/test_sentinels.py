"""Redis fails over, real Sentinels decide it, and no process is restarted."""

from __future__ import annotations

import os
import re
import resource
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

import redis
from stillroom import AUTH, NoDispatch, RedisUnavailable, Settings
from stillroom.embedded import EmbeddedServer
from stillroom.wire.sentinel import Bell, _watch
from tests.failover.conftest import UNHURRIED
from tests.support.celery_process import until
from tests.support.faces import open_room
from tests.support.lag import least, seconds_of
from tests.support.sentinels import MASTER, Sentinels, beside_the_servers

RECOVERS_S = 1.5  # after another server was made the primary
# Who only reads finds out by asking who answers, which rides along with a read every other second.
READS_S = 4.0
Make = Callable[..., Any]


def recovered_within(room: Any) -> float:
    """Seconds until this room's writes are done again."""
    return seconds_of(lambda: put(room, "recovered"))


def put(room: Any, key: str, value: object = 1) -> None:
    until(lambda: room.cache.set(key, value), "a write", 15)


def test_the_sentinels_say_where_the_primary_is(sentinels: Sentinels, make: Make) -> None:
    """Every service works by a Sentinel URL, and what it writes is on the primary."""
    room = make(sentinels.url)
    room.connect()
    assert room.cache.set("k", 1)
    assert room.cache.get("k") == 1
    session = room.sessions.create("u1", {"a": 1})
    assert room.sessions.get(session).data == {"a": 1}
    assert [bool(room.limits.check("192.0.2.1", [AUTH])) for _ in range(6)] == [True] * 5 + [False]
    primary = sentinels.client(sentinels.primary)
    assert primary.exists(room.keys.entry(b"k"))


def test_a_database_of_the_primary_is_the_last_part_of_the_path(
    sentinels: Sentinels, make: Make
) -> None:
    """What is written with /3 is in database 3, and not in database 0."""
    room = make(sentinels.url_to(sentinels.sentinels, database=3))
    assert room.cache.set("k", 1)
    primary = sentinels.client(sentinels.primary)
    keyspaces = primary.execute_command("INFO", "keyspace").decode()
    assert "db3:" in keyspaces
    assert "db0:" not in keyspaces


def test_queues_are_counted_where_sentinels_name_the_broker(
    sentinels: Sentinels, make: Make
) -> None:
    """Health tells how many tasks wait, though the broker's URL has another user and order of Sentinels."""
    other = sentinels.url_to([*reversed(sentinels.sentinels)]).replace("://", "://producer@")
    room = make(sentinels.url, broker_url=other)
    sentinels.client(sentinels.primary).lpush(room.keys.queue("refresh"), "{}", "{}")
    assert [queue.depth for queue in room.health.check().tasks.queues] == [2, 0]


@pytest.mark.parametrize("accident", ["killed", "frozen", "cut"])
def test_a_running_process_goes_on_with_the_new_primary(
    sentinels: Sentinels, make: Make, accident: str
) -> None:
    """Whatever happened to the old one: within 1.5 s of the promotion reads, writes and logins work again."""
    room, reader = make(sentinels.url), make(sentinels.url)

    def recovery() -> float:
        put(room, "k", "before")
        until(lambda: reader.cache.get("k") == "before", "a read")
        with sentinels.accident(accident):
            sentinels.promote_another()
            seconds = max(recovered_within(room), recovered_within(reader))
            assert room.cache.set("k", "after")
            assert reader.cache.get("k") == "after"
            assert room.sessions.get(room.sessions.create("u1")) is not None
            assert not room.limits.check("192.0.2.1", [AUTH]).degraded
        assert reader.cache.get("k") == "after"
        assert room.cache.set("k", "healed")
        assert reader.cache.get("k") == "healed"
        return seconds

    assert least(recovery, RECOVERS_S) < RECOVERS_S


def test_a_primary_that_is_demoted_by_hand_is_left_at_once(
    sentinels: Sentinels, make: Make
) -> None:
    """`SENTINEL FAILOVER` leaves connections to the old primary open: the first write finds the new one."""
    room, reader = make(sentinels.url), make(sentinels.url)

    def by_hand() -> float:
        """Return the share that was used of what a write, and a read, may take to find the new primary."""
        put(room, "k", "before")
        until(lambda: reader.cache.get("k") == "before", "a read")
        old = sentinels.primary
        sentinels.demote()
        sentinels.await_primary(lambda server: server is not old)
        written = recovered_within(room)
        put(room, "k", "after")
        read = seconds_of(lambda: until(lambda: reader.cache.get("k") == "after", "a read"))
        sentinels.await_replicas()
        return max(written / RECOVERS_S, read / READS_S)

    assert least(by_hand, 1) < 1


def test_an_invalidation_that_is_lost_with_the_primary_makes_a_cold_cache(
    sentinels: Sentinels, make: Make
) -> None:
    """The replica that takes over has never heard of it. What was cached before is served by nobody."""
    reader = make(sentinels.url)
    with beside_the_servers():
        writer = make(sentinels.url)
        assert writer.cache.set("k", "old", tags=["t"])
        assert reader.cache.get("k") == "old"
        sentinels.await_copies()
        with sentinels.accident("cut"):
            # Beside the old primary it is still in office for a moment, and does what it is asked.
            writer.cache.invalidate_by_tag("t")
            new = sentinels.promote_another()
            assert sentinels.client(new).exists(writer.keys.entry(b"k"))
            for room in (reader, writer):
                recovered_within(room)
                assert room.cache.get("k") is None


def test_sentinels_that_agree_on_nothing_name_no_primary(sentinels: Sentinels, make: Make) -> None:
    """A name that no Sentinel knows, and Sentinels that do not answer: the error says which, and where to look."""
    unknown = make(sentinels.url.replace(MASTER, "another"))
    with pytest.raises(RedisUnavailable, match=r"nomaster.*REDIS_URL"):
        unknown.connect()
    nobody = make(f"redis+sentinel://127.0.0.1:1,127.0.0.1:2/{MASTER}/0", connect_attempts=1)
    with pytest.raises(RedisUnavailable, match=r"sentinel.*REDIS_URL.*0 of 2 answered"):
        nobody.connect()


def test_a_primary_that_is_not_where_they_say_is_told_from_sentinels(
    sentinels: Sentinels, make: Make
) -> None:
    """Where they name an address that nobody answers at, or a replica, the error says that they named it."""
    asked = [sentinels.client(one) for one in sentinels.sentinels]
    replica = next(one for one in sentinels.servers if one is not sentinels.primary)
    named = {"gone": 1, "follows": replica.port}
    try:
        for one in asked:
            for name, port in named.items():
                one.execute_command("SENTINEL", "MONITOR", name, "127.0.0.1", port, 2)
        for name, says in (
            ("gone", "refused.*nothing answers"),
            ("follows", "readonly.*a replica"),
        ):
            room = make(sentinels.url.replace(MASTER, name), connect_attempts=1)
            with pytest.raises(RedisUnavailable, match=says) as caught:
                room.connect()
            assert "the Sentinels in REDIS_URL name as primary" in str(caught.value)
            assert "doctor" in str(caught.value)
    finally:
        for one in asked:
            for name in named:
                one.execute_command("SENTINEL", "REMOVE", name)


def test_a_sentinel_of_another_deployment_is_outvoted_and_told(
    sentinels: Sentinels, make: Make
) -> None:
    """The server that most Sentinels name is the primary. The doctor says who names another one."""
    asked = [sentinels.client(one) for one in sentinels.sentinels]
    ports = [1, sentinels.primary.port, sentinels.primary.port]
    try:
        for one, port in zip(asked, ports, strict=True):
            one.execute_command("SENTINEL", "MONITOR", "split", sentinels.host, port, 2)
        room = make(sentinels.url.replace(MASTER, "split"))
        room.connect()
        put(room, "k")
        watch = room.wire.server.watch
        told = until(lambda: all(watch.told.values()) and watch.said(), "all answers")
        assert [is_good for _, is_good, _ in told] == [False, True, True]
        assert "most others do not" in told[0][2]
        assert "they name different servers" in watch.trouble
    finally:
        for one in asked:
            one.execute_command("SENTINEL", "REMOVE", "split")


@pytest.mark.parametrize("is_late", [False, True])
def test_a_newer_configuration_of_another_deployment_takes_no_writes(
    sentinels: Sentinels, make: Make, is_late: bool
) -> None:
    """A server with replicas that one Sentinel names is not used while the others call another one well, also where
    that one answers last.
    """
    asked = [sentinels.client(one) for one in sentinels.sentinels]
    with EmbeddedServer() as theirs, EmbeddedServer() as follower:
        redis.Redis(port=follower.port).replicaof("127.0.0.1", theirs.port)
        their = redis.Redis(port=theirs.port)
        until(lambda: their.info("replication")["connected_slaves"] == 1, "a replica")
        ours = sentinels.host, sentinels.primary.port
        try:
            for one, (host, port) in zip(
                asked, [ours, ours, ("127.0.0.1", theirs.port)], strict=True
            ):
                one.execute_command("SENTINEL", "MONITOR", "mixed", host, port, 2)
            # As another Sentinel tells it of a failover.
            told = f"127.0.0.1,1,{'f' * 40},7,mixed,127.0.0.1,{theirs.port},7"
            until(lambda: their.publish("__sentinel__:hello", told), "a Sentinel that listens")
            until(lambda: b"7" in asked[2].execute_command("SENTINEL", "MASTER", "mixed"), "news")
            room = make(sentinels.url.replace(MASTER, "mixed"), connect_attempts=1)
            if is_late:
                sentinels.sentinels[2].freeze()
                try:
                    room.connect()
                finally:
                    sentinels.sentinels[2].thaw()

            def is_refused() -> bool:
                try:
                    room.connect()
                except RedisUnavailable as error:
                    return bool(re.search("they name different servers.*doctor", str(error)))
                return False  # ours have answered, and theirs has not

            until(is_refused, "all have answered")
            assert not room.cache.set("k", 1)
            assert not their.keys()
        finally:
            for one in asked:
                one.execute_command("SENTINEL", "REMOVE", "mixed")


def test_servers_that_are_no_sentinels_are_told_as_that(sentinels: Sentinels, make: Make) -> None:
    """Whoever names the servers in place of their Sentinels reads what these answer."""
    room = make(sentinels.url_to(sentinels.servers), connect_attempts=1)
    with pytest.raises(RedisUnavailable, match=r"3 of them: .*unknown command .SENTINEL"):
        room.connect()


@pytest.mark.parametrize(
    ("rights", "login", "says"),
    [
        (["resetpass", ">secret"], {}, "NOAUTH"),
        (["resetpass", ">secret"], {"sentinel_password": "another"}, "WRONGPASS"),
        (["-sentinel"], {}, "NOPERM"),
    ],
)
def test_sentinels_that_refuse_a_login_name_its_setting(
    sentinels: Sentinels, make: Make, rights: list[str], login: dict[str, str], says: str
) -> None:
    """Where the Sentinels want a login, the error quotes them and names the setting that holds it."""
    asked = [sentinels.client(one) for one in sentinels.sentinels]
    try:
        for one in asked:
            one.execute_command("ACL", "SETUSER", "default", *rights)
        room = make(sentinels.url, connect_attempts=1, **login)
        with pytest.raises(RedisUnavailable, match=rf"auth.*{says}.*STILLROOM_SENTINEL_PASSWORD"):
            room.connect()
    finally:
        for one in asked:
            one.execute_command("ACL", "SETUSER", "default", "nopass", "+sentinel")


def test_sentinels_that_are_silent_stop_nobody_whose_replicas_follow(
    sentinels: Sentinels, make: Make
) -> None:
    """With two of three frozen nobody says who is the primary. Nobody else can be: its replicas follow it."""
    room = make(sentinels.url)
    assert room.cache.set("k", 1)
    watch = room.wire.server.watch
    silent = sentinels.sentinels[1:]
    for sentinel in silent:
        sentinel.freeze()
    try:
        until(lambda: watch.believed_until < time.monotonic(), "what was said to be too old", 10)
        until(lambda: room.cache.get("k") == 1, "a read", 5)
        until(lambda: room.cache.set("k", 2), "a write", 5)
        assert watch.believed_until < time.monotonic()
    finally:
        for sentinel in silent:
            sentinel.thaw()
    until(lambda: watch.believed_until > time.monotonic(), "the Sentinels", 10)


@pytest.fixture
def crowded_process() -> Iterator[None]:
    """A process with so many descriptors that the next one has a number above 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4_096), hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1_100)]
    try:
        yield
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_with_many_connections_watches_its_sentinels(
    sentinels: Sentinels, crowded_process: None, make: Make
) -> None:
    """Beyond 1,024 descriptors the thread still asks, again and again."""
    room = make(sentinels.url)
    assert room.cache.set("k", 1)
    watch = room.wire.server.watch
    for _ in range(2):
        believed = watch.believed_until
        until(lambda believed=believed: watch.believed_until > believed, "the next answer", 10)


def test_a_watch_that_is_gone_before_its_thread_begins_leaves_nothing() -> None:
    """The thread of a watch that nobody uses any more by then ends, and closes what would have woken it."""
    gone, bell = weakref.ref(Settings()), Bell()
    _watch(gone, bell)  # type: ignore[arg-type]
    assert bell.stopped.is_set()
    assert bell.near.fileno() == -1


def test_a_watch_whose_thread_has_ended_begins_another(sentinels: Sentinels, make: Make) -> None:
    """Whatever ended it: a call that needs to know the primary is answered."""
    room = make(sentinels.url)
    assert room.cache.set("k", 1)
    watch = room.wire.server.watch
    bell = watch._bell
    with patch.object(type(watch), "ask_all", side_effect=MemoryError), _quiet_threads():
        bell.ring()
        assert bell.stopped.wait(10)
    watch.doubt()
    until(lambda: room.cache.set("k", 2), "a write", 10)
    assert watch._bell is not bell


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep the error that ends a thread from the tests' own listener."""
    with patch.object(threading, "excepthook", lambda _: None):
        yield


def test_nothing_is_left_of_rooms_that_were_closed(sentinels: Sentinels, face: str) -> None:
    """Threads and connections to Sentinels end with the room."""

    def watching() -> int:
        return sum(thread.name == "stillroom sentinels" for thread in threading.enumerate())

    def heard() -> int:
        clients = [sentinels.client(one) for one in sentinels.sentinels]
        return sum(len(one.execute_command("CLIENT", "LIST").splitlines()) for one in clients)

    before = watching(), heard()
    for _ in range(3):
        with open_room(face, Settings(redis_url=sentinels.url, **UNHURRIED), NoDispatch()) as room:
            assert room.cache.set("k", 1)
            assert watching() == before[0] + 1
    assert watching() == before[0]
    until(lambda: heard() <= before[1], "the Sentinels see them go")
