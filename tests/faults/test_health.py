"""The health endpoints answer in time with the right status, whatever is wrong with Redis."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

import redis
from stillroom import DEFAULT, AsyncStillroom, NoDispatch, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from stillroom.health import Report
from stillroom.health.system import SystemWatch
from stillroom.web import health as web_health
from tests.support.celery_process import until
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room
from tests.support.full_disk import want_replicas
from tests.support.lag import Stopwatch
from tests.support.processes import Program
from tests.support.web import Reply, serving_health

pytestmark = pytest.mark.usefixtures("calm_machine")

IN_TIME = 0.3
AT_ONCE = 0.01
SECRET = "canary-password-7f3a"
TOKEN = "canary-token-9b1c-long-enough"
VISITOR = "198.51.100.77"
BEARER = {"Authorization": f"Bearer {TOKEN}"}

Ask = Callable[..., Reply]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a report serve everybody for a moment only, so that a test need not wait for the next."""
    monkeypatch.setattr(web_health, "HELD_S", 0.02)


@pytest.fixture(params=["wsgi", "asgi"])
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[[Settings], Ask]]:
    """Serve the endpoints of a room with these settings; yield a function that asks them."""
    with serving_health(request.param) as serve:
        yield serve


def timed(asking: Ask, path: str, limit: float) -> Reply:
    """Return the answer and whether it came in time, in up to three tries on a busy machine."""
    for attempt in range(3):
        with Stopwatch() as watch:
            answer = asking(path, headers=BEARER)
        if watch.seconds < limit:
            return answer
        assert attempt < 2, f"{path} took {watch.seconds:.3f} s"
    raise AssertionError("unreachable")


@contextmanager
def frozen(server: EmbeddedServer) -> Iterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@contextmanager
def killed(server: EmbeddedServer) -> Iterator[None]:
    server.kill()
    yield
    server.restart()


@contextmanager
def full(server: EmbeddedServer) -> Iterator[None]:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", "1")
        yield
        client.config_set("maxmemory", "0")


@contextmanager
def read_only(server: EmbeddedServer) -> Iterator[None]:
    with redis.Redis.from_url(server.url) as client:
        client.replicaof("127.0.0.1", "1")
        yield
        client.replicaof("NO", "ONE")


@contextmanager
def wrong_password(server: EmbeddedServer) -> Iterator[None]:
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "another")
        client.client_kill_filter(skipme=True, _type="normal")
        yield
        client.config_set("requirepass", "")


def as_user(rights: str) -> Callable[[EmbeddedServer], Any]:
    """Take these rights from the default user."""

    @contextmanager
    def change(server: EmbeddedServer) -> Iterator[None]:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("ACL", "SETUSER", "other", "on", ">x", "~*", "&*", "+@all")
        with redis.Redis.from_url(server.url, username="other", password="x") as client:
            client.execute_command("ACL", "SETUSER", "default", *rights.split())
            client.client_kill_filter(skipme=True, _type="normal")
            yield
            client.execute_command("ACL", "SETUSER", "default", "+@all")

    return change


FAULTS: dict[str, tuple[Any, str, int, str]] = {
    "killed": (killed, "redis:connection away", 503, "refused"),
    "frozen": (frozen, "redis:connection away", 503, "timeout"),
    "full": (full, "redis:memory memory", 503, ""),
    "read-only": (read_only, "redis:connection away", 503, "readonly"),
    "wrong password": (wrong_password, "redis:connection away", 503, "auth"),
    "no INFO": (as_user("-info"), "redis:connection rights", 200, "noperm"),
    "nothing but TIME": (as_user("-@all +time +auth"), "redis:connection rights", 200, "noperm"),
    "not even TIME": (as_user("-time"), "redis:connection away", 503, "time"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_endpoint_answers_in_time_with_the_right_status(
    serve: Callable[[Settings], Ask], own_server: EmbeddedServer, fault: str
) -> None:
    """Whatever Redis does, alive answers at once, ready stays as it was, and health says the state."""
    break_it, finding, status, error = FAULTS[fault]
    asking = serve(Settings(redis_url=own_server.url, health_token=TOKEN))
    until(lambda: asking("/health/ready").status == 200, "the first contact")
    with break_it(own_server):
        until(lambda: finding in named(asking("/health", headers=BEARER)), finding, 10)
        health = timed(asking, "/health", IN_TIME)
        assert health.status == status
        body = json.loads(health.body)
        assert body["status"] == ("fail" if status == 503 else "warn")
        (connection,) = body["checks"]["redis:connection"]
        assert connection["error"] == (error or None)
        assert timed(asking, "/health/live", AT_ONCE).status == 200
        assert timed(asking, "/health/ready", IN_TIME).status == 200
        metrics = timed(asking, "/metrics", IN_TIME)
        assert metrics.status == 200
        up = b'stillroom_redis_up{server="redis"} ' + (b"0.0" if "away" in finding else b"1.0")
        assert up in metrics.body
    until(lambda: finding not in named(asking("/health", headers=BEARER)), "recovery", 10)


def named(answer: Reply) -> set[str]:
    advice = json.loads(answer.body).get("advice", ())
    return {f"{found['component']} {found['code']}" for found in advice}


@pytest.mark.parametrize("freeze", [False, True], ids=["killed", "frozen"])
def test_the_first_answer_of_all_comes_in_time(
    serve: Callable[[Settings], Ask], own_server: EmbeddedServer, freeze: bool
) -> None:
    """Without any connection or report the first answer is in time: not ready, and failing."""
    with frozen(own_server) if freeze else killed(own_server):
        asking = serve(Settings(redis_url=own_server.url))
        with Stopwatch() as watch:
            answer = asking("/health")
        assert watch.seconds < IN_TIME
        assert (answer.status, json.loads(answer.body)["status"]) == (503, "fail")
        assert timed(asking, "/health/ready", IN_TIME).status == 503


def test_a_server_that_is_loading(serve: Callable[[Settings], Ask]) -> None:
    """A loading server is away: the report has the reason, and its memory from INFO."""
    options = {
        "enable-debug-command": "yes",
        "key-load-delay": "2000",
        "loading-process-events-interval-bytes": "1024",
    }
    with EmbeddedServer(options=options) as server:
        with redis.Redis.from_url(server.url) as client:
            # What can't be compressed: it looks for us every 1,024 bytes, so after ten keys of 2 ms.
            client.mset({f"k{n}": os.urandom(100) for n in range(5_000)})
        asking = serve(Settings(redis_url=server.url, health_token=TOKEN))
        reloading = threading.Thread(target=reload, args=(server,))
        reloading.start()
        until(lambda: connection_of(asking)["error"] == "loading", "a report of it", 20)
        for path, limit, status in (
            ("/health", IN_TIME, 503),
            ("/health/live", AT_ONCE, 200),
            ("/metrics", IN_TIME, 200),
        ):
            assert timed(asking, path, limit).status == status
        server.kill()
        reloading.join()


def reload(server: EmbeddedServer) -> None:
    with redis.Redis.from_url(server.url, socket_timeout=60) as client:
        try:
            client.execute_command("DEBUG", "RELOAD")
        except redis.ConnectionError:
            return


def connection_of(asking: Ask) -> Any:
    return json.loads(asking("/health", headers=BEARER).body)["checks"]["redis:connection"][0]


@pytest.mark.parametrize("required", ["state", "cache", ""])
def test_ready_may_require_a_role(
    serve: Callable[[Settings], Ask],
    own_server: EmbeddedServer,
    server: EmbeddedServer,
    required: str,
) -> None:
    """Ready may require a role: when the state's server is away, only apps that need it are not ready."""
    settings = Settings(
        redis_url=own_server.url, cache_url=server.url, ready_requires=required, health_token=TOKEN
    )
    asking = serve(settings)
    until(lambda: asking("/health/ready").status == 200, "the first contact")
    with killed(own_server):
        until(lambda: asking("/health").status == 503, "a report of it")
        assert asking("/health/ready").status == (503 if required == "state" else 200)
        body = json.loads(asking("/health", headers=BEARER).body)
        (cache,) = body["checks"]["redis.cache:connection"]
        assert (cache["status"], cache["is_up"]) == ("pass", True)
        assert body["checks"]["sessions:stats"][0]["observedValue"] is None


def test_two_frozen_servers_are_told_of_in_time(
    serve: Callable[[Settings], Ask], own_server: EmbeddedServer
) -> None:
    """Two frozen servers are reported within the time of one, one after the other or at once."""
    with EmbeddedServer() as second:
        asking = serve(Settings(redis_url=own_server.url, cache_url=second.url, health_token=TOKEN))
        assert asking("/health").status == 200
        both = {"redis.cache:connection away", "redis.state:connection away"}
        with frozen(own_server), frozen(second):
            until(lambda: named(timed(asking, "/health", IN_TIME)) >= both, "both away")
            assert timed(asking, "/health", IN_TIME).status == 503


def test_a_resolver_that_hangs_holds_nobody_up(
    serve: Callable[[Settings], Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver that hangs delays no answer, though the operating system's look-up has no deadline."""
    answered, look_up = threading.Event(), socket.getaddrinfo

    def hanging(host: Any, *rest: Any, **options: Any) -> Any:
        if host in ("nowhere.example", b"nowhere.example"):
            answered.wait(10)
            raise socket.gaierror("no such name")
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    try:
        asking = serve(Settings(redis_url="redis://nowhere.example"))
        for path, status in (("/health", 503), ("/health/ready", 503), ("/metrics", None)):
            answer = timed(asking, path, IN_TIME)
            assert status in (answer.status, None)
        assert timed(asking, "/health/live", AT_ONCE).status == 200
    finally:
        answered.set()


@pytest.mark.parametrize("face", FACES)
def test_a_disk_that_hangs_holds_up_no_check(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, face: str
) -> None:
    """While the disk that is looked at hangs, checks tell of everything else, and what was known of the machine."""
    looks, answers = SystemWatch.look, threading.Event()
    with open_room(face, Settings(redis_url=server.url), NoDispatch()) as room:
        assert room.health.check().system is not None
        monkeypatch.setattr(SystemWatch, "look", lambda one: answers.wait(10) and looks(one))
        try:
            for _ in range(3):
                with Stopwatch() as watch:
                    report = room.health.check()
                assert watch.seconds < 1
                assert report.servers[0].connection.is_up
                assert report.system is not None
        finally:
            answers.set()


def test_threads_that_are_all_busy_hold_up_no_check(server: EmbeddedServer) -> None:
    """A check in asyncio needs none of the loop's threads, which slow loaders may all have."""
    done = threading.Event()

    async def check_beside_slow_work() -> Report:
        settings = Settings(redis_url=server.url)
        async with AsyncStillroom(settings, dispatch=NoDispatch()) as room:
            await room.health.check()
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(1))
            work = loop.run_in_executor(None, done.wait, 10)
            try:
                return await asyncio.wait_for(room.health.check(), 5)
            finally:
                done.set()
                await work

    report = asyncio.run(check_beside_slow_work())
    assert report.system is not None


def test_a_forked_child_asks_for_itself(own_server: EmbeddedServer) -> None:
    """A forked child makes its own report, because it does not have its parent's."""
    program = Program(
        f"""
        import os
        from stillroom import NoDispatch, Settings, Stillroom
        from stillroom.web import HealthWSGI
        settings = Settings(**{PATIENT | {"redis_url": own_server.url}!r})
        app = HealthWSGI(Stillroom(settings, dispatch=NoDispatch()))
        def ask():
            environ = {{"REQUEST_METHOD": "GET", "PATH_INFO": "/health", "REMOTE_ADDR": "127.0.0.1"}}
            said = []
            app(environ, lambda status, _: said.append(status))
            return said[0]
        print("parent", ask())
        if os.fork() == 0:
            print("child", ask())
            os._exit(0)
        os.wait()
        """
    )
    with program:
        assert program.read_word("parent ") == "200 OK"
        assert program.read_word("child ") == "200 OK"


def test_what_is_counted_during_an_outage_is_told_after_it(own_server: EmbeddedServer) -> None:
    """Fallbacks counted during an outage are kept in the process and written when Redis is back."""
    with Stillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch()) as room:
        room.cache.get("k")
        with killed(own_server):
            until(
                lambda: room.cache.get("k") is None and room.wire.breaker.is_open, "an open breaker"
            )
            for _ in range(50):
                room.stats.due = 0.0
                room.cache.get("k")
                room.health.check()
        until(lambda: not room.wire.breaker.is_open, "recovery")
        room.stats.due = 0.0
        room.health.check()
        totals = room.health.check().totals
    assert totals is not None
    assert totals["fallbacks"] >= 50


@pytest.mark.parametrize("fault", ["killed", "frozen", "read-only"])
def test_a_snapshot_that_nobody_keeps(
    own_server: EmbeddedServer, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A snapshot that cannot be stored returns the same fields with the error, logs it, and does not raise."""
    break_it, finding, *_ = FAULTS[fault]
    with Stillroom(Settings(redis_url=own_server.url), dispatch=NoDispatch()) as room:
        well = room.health.snapshot()
        with break_it(own_server):
            snapshot = room.health.snapshot()
            room.health.seen("celery@one")
            room.health.ticked("a task")
        assert finding in snapshot.findings
        assert set(snapshot.model_dump()) == set(well.model_dump())
        assert snapshot.error
        assert "is not kept" in caplog.text
        until(lambda: not room.wire.breaker.is_open, "recovery")
        assert [kept.error for kept in room.health.history()] == [None]


def test_secrets_are_nowhere(
    serve: Callable[[Settings], Ask], own_server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No secret from the password, token, keys, users or addresses is in an answer, a metric or the log."""
    caplog.set_level(logging.DEBUG)
    settings = Settings(
        redis_url=own_server.url, redis_password=SECRET, health_token=TOKEN, metrics_open=True
    )
    with redis.Redis.from_url(own_server.url) as client:
        client.config_set("requirepass", SECRET)
    names = ["canary-key", "canary-user", "canary-task", "canary-tag", "canary-host"]
    planted = [SECRET, TOKEN, VISITOR, *names]
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        room.cache.set("canary-key", 1, tags=["canary-tag"])
        room.cache.invalidate_by_tag("canary-tag")
        room.sessions.create("canary-user")
        room.limits.check(VISITOR, [DEFAULT])
        room.health.seen("canary-host")
        message = json.dumps({"headers": {"stillroom_sent_ms": 1, "task": "canary-task"}})
        with redis.Redis.from_url(own_server.url, password=SECRET) as client:
            client.lpush(room.keys.queue("refresh"), message)
            client.config_set("slowlog-log-slower-than", "0")
        texts = [room.health.snapshot().model_dump_json()]
        asking = serve(settings)
        texts += answers_of(asking)
        with killed(own_server):
            texts += answers_of(asking)
            texts.append(room.health.snapshot().model_dump_json())
            until(lambda: asking("/health").status == 503, "a report of it")
            texts += answers_of(asking)
            until(lambda: room.cache.get("canary-key") or room.wire.breaker.is_open, "the breaker")
    assert "Redis is away" in caplog.text
    for text in [*texts, caplog.text]:  # nor where Redis is
        assert [word for word in [*planted, "127.0.0.1"] if word in text] == []


def answers_of(asking: Ask) -> list[str]:
    paths = ("/health", "/metrics", "/health/ready", "/health/live")
    with_token = [asking(path, headers=BEARER).body.decode() for path in paths]
    return [*with_token, *(asking(path, headers={"Via": "p"}).body.decode() for path in paths)]


@pytest.mark.parametrize("face", FACES)
def test_a_server_that_refuses_writes_for_want_of_replicas_is_a_failure(
    own_server: EmbeddedServer, face: str
) -> None:
    """A server that wants more replicas than follow it answers the check, and the report says that it takes no
    writes. A server that wants none is well without any.
    """
    settings = Settings(**{**PATIENT, "redis_url": own_server.url})
    with open_room(face, settings, NoDispatch()) as room:
        assert room.health.check().advice == ()
        want_replicas(own_server)
        (found,) = room.health.check().advice
        assert (found.name, found.severity) == ("redis:replication read-only", "fail")
        assert "min-replicas-to-write" in found.what
