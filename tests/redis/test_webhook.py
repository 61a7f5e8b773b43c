"""The webhook tells each event once and in order, and keeps it while nobody takes it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from stillroom import NoDispatch, Settings, SettingsError
from stillroom.health import post
from stillroom.health.webhook import KEPT, TRIES, text_of
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room
from tests.support.health import age_stream
from tests.support.receiver import Receiver, receiving
from tests.support.status import patterns, seed_patterns

SECRET = "a-canary-that-signs"
LONG_S = 10  # longer than any request may take
pytestmark = pytest.mark.usefixtures("calm_machine")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(params=FACES)
def room(
    request: pytest.FixtureRequest, places: dict[str, Any], receiver: Receiver
) -> Iterator[Any]:
    given = places | {"webhook_url": receiver.url, "release": "shop 7"}
    with open_room(request.param, Settings(**given | PATIENT), NoDispatch()) as room:
        yield room


def begin_finding(room: Any, client: Any) -> None:
    client.xadd(room.keys.dead_letters, {"kind": "message"})
    room.upkeep.snapshot()


def next_minute(room: Any, client: Any) -> None:
    age_stream(client, room.keys.health, 60)
    room.upkeep.snapshot()


def test_a_finding_is_told_when_it_begins_and_when_it_is_over(
    room: Any, client: Any, receiver: Receiver
) -> None:
    """A finding is told when it begins and when it ends, with the cause, good values and advice, as
    text and data.
    """
    begin_finding(room, client)
    assert room.upkeep.tell_webhook() == {"told": 1, "outcome": "told"}
    assert room.upkeep.tell_webhook() == {"told": 0, "outcome": "told"}
    next_minute(room, client)
    client.delete(room.keys.dead_letters)
    next_minute(room, client)
    room.upkeep.tell_webhook()
    assert receiver.kinds == ["finding", "finding over"]
    began, over = receiver.events
    assert began["name"] == over["name"] == "tasks:queues dead-letters"
    assert (began["severity"], began["good"]) == ("warn", "None.")
    assert over["lasted_s"] >= 0
    assert began["id"] != over["id"]
    body = receiver.bodies[0]
    assert (body["namespace"], body["release"]) == ("stillroom", "shop 7")
    assert body["text"].startswith("stillroom (shop 7): warn: 1 dead letter waits")


def test_a_pattern_of_abuse_is_told(room: Any, client: Any, receiver: Receiver) -> None:
    """A pattern of abuse is told, except earlier ones and foreign entries of the stream."""
    seed_patterns(client, room.keys.abuse_log, patterns(time.time()))
    assert room.upkeep.tell_webhook()["told"] == 0
    seed_patterns(client, room.keys.abuse_log, patterns(time.time())[:2])
    client.xadd(room.keys.abuse_log, {"not": "a pattern"})
    client.xadd(room.keys.webhook, {"event": "[]"})
    assert room.upkeep.tell_webhook()["told"] == 2
    assert [event["rule"] for event in receiver.events] == ["hammer", "credential-stuffing"]
    assert "abuse: hammer by 198.51.100.7, 2048 events: ban" in receiver.bodies[0]["text"]


def test_what_another_program_wrote_silences_nobody(
    room: Any, client: Any, receiver: Receiver
) -> None:
    """Findings are told behind events that no receiver could read, and where nobody knows how far it was told."""
    for event in ("[" * 100_000, '{"kind": "finding", "severity": NaN}', "x"):
        client.xadd(room.keys.webhook, {"event": event})
    for field in ("findings", "patterns", "failures", "retry_ms"):
        client.hset(room.keys.webhook_at, field, "1e400")
    begin_finding(room, client)
    assert room.upkeep.tell_webhook() == {"told": 1, "outcome": "told"}
    assert receiver.kinds == ["finding"]
    assert room.upkeep.tell_webhook()["told"] == 0


def test_many_are_told_in_few_requests(room: Any, client: Any, receiver: Receiver) -> None:
    """A request tells twenty events and a task a hundred.

    The next task tells the rest, and each event exactly once.
    """
    room.upkeep.tell_webhook()
    for _ in range(33):
        seed_patterns(client, room.keys.abuse_log, patterns(time.time()))
    assert [room.upkeep.tell_webhook()["told"] for _ in range(3)] == [100, 65, 0]
    assert len(receiver.bodies) == 9
    assert len({event["id"] for event in receiver.events}) == len(receiver.events) == 165


def test_findings_are_told_while_memory_is_full(room: Any, client: Any, receiver: Receiver) -> None:
    """A finding that begins while Redis is full, mostly that it is full, is told at once and once."""
    client.config_set("maxmemory", "1")
    try:
        begin = room.upkeep.snapshot().findings
        assert room.upkeep.tell_webhook() == {"told": len(begin), "outcome": "told"}
        assert room.upkeep.tell_webhook()["told"] == 0
    finally:
        client.config_set("maxmemory", "0")
    assert any(event["name"].endswith(":memory memory") for event in receiver.events)


def test_a_finding_is_told_though_the_worker_that_found_it_died(
    room: Any, client: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finding is told where its worker, or its connection, died right behind the snapshot."""

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stillroom.health.body.HealthBody._tell", die)
        with pytest.raises(KeyboardInterrupt):
            begin_finding(room, client)
    next_minute(room, client)
    assert room.upkeep.tell_webhook()["told"] == 1
    assert receiver.kinds == ["finding"]


@pytest.mark.parametrize("status", [0, 302, 404, 500])
def test_what_was_not_taken_is_told_again(
    status: int, room: Any, client: Any, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """An event that was not taken is told again after a minute, then two. Neither log nor Redis has the address."""
    begin_finding(room, client)
    receiver.answers = [status] * 2
    waits = []
    for _ in range(2):
        assert room.upkeep.tell_webhook()["told"] == 0
        assert room.upkeep.tell_webhook()["outcome"] == "waits to try again"
        waits.append(int(client.hget(room.keys.webhook_at, "retry_ms")) - time.time() * 1000)
        client.hset(room.keys.webhook_at, "retry_ms", 0)
    assert waits == pytest.approx([60_000, 120_000], abs=20_000)
    assert room.upkeep.tell_webhook()["told"] == 1
    assert receiver.kinds == ["finding"]
    assert client.hget(room.keys.webhook_at, "failures") == b"0"
    assert "a-secret-path" not in caplog.text
    assert "the webhook did not take 1 events" in caplog.text


def test_an_address_that_takes_nothing_is_given_up_after_ten_tries(
    room: Any, client: Any, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """After ten tries an address gets no more of those events, and gets later ones when it answers again."""
    caplog.set_level(logging.ERROR, "stillroom.health")
    begin_finding(room, client)
    receiver.answers = [400] * TRIES
    for _ in range(TRIES):
        client.hset(room.keys.webhook_at, "retry_ms", 0)
        room.upkeep.tell_webhook()
    assert "given up for 1 events: HTTP 400" in caplog.text
    client.delete(room.keys.dead_letters)
    next_minute(room, client)
    assert room.upkeep.tell_webhook()["told"] == 1
    assert receiver.kinds == ["finding over"]


def test_a_clock_that_was_set_back_does_not_silence_it(
    room: Any, client: Any, receiver: Receiver
) -> None:
    """A retry that a clock a day ahead has noted is not waited for."""
    begin_finding(room, client)
    receiver.answers = [500]
    room.upkeep.tell_webhook()
    client.hincrby(room.keys.webhook_at, "retry_ms", 86_400_000)
    assert room.upkeep.tell_webhook() == {"told": 1, "outcome": "told"}


def test_a_worker_that_died_before_the_clock_was_set_back_does_not_silence_it(
    room: Any, client: Any, receiver: Receiver
) -> None:
    """The place of a worker that died while the clock stood an hour ahead is taken at once, not an hour later."""
    begin_finding(room, client)
    client.set(room.keys.webhook_lease, "another's", px=60_000 + 3_600_000)
    assert room.upkeep.tell_webhook() == {"told": 1, "outcome": "told"}


def test_one_worker_at_a_time_tells_it(room: Any, client: Any, receiver: Receiver) -> None:
    """One worker at a time tells events. A dead worker's place is taken within a minute."""
    begin_finding(room, client)
    client.set(room.keys.webhook_lease, "another's", px=60_000)
    assert room.upkeep.tell_webhook()["outcome"] == "another worker tells it"
    assert client.get(room.keys.webhook_lease) == b"another's"
    client.delete(room.keys.webhook_lease)
    assert room.upkeep.tell_webhook()["told"] == 1
    assert not client.exists(room.keys.webhook_lease)


def test_a_worker_that_stood_still_has_nothing_told_again(
    room: Any,
    places: dict[str, Any],
    client: Any,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that stood still for longer than its lease, as it posted, does not set back how far others told."""
    settings = Settings(**places | {"webhook_url": receiver.url} | PATIENT)
    others: list[Any] = []
    first = iter([True])

    def post_late(*given: Any) -> None:
        if next(first, False):
            with open_room("sync", settings, NoDispatch()) as other:
                client.delete(room.keys.webhook_lease)  # its time is over
                others.append(other.upkeep.tell_webhook())
                client.delete(room.keys.dead_letters)
                next_minute(other, client)
                others.append(other.upkeep.tell_webhook())
        right(*given)

    right = post.post
    monkeypatch.setattr(post, "post", post_late)
    begin_finding(room, client)
    assert room.upkeep.tell_webhook() == {"told": 1, "outcome": "another worker tells it"}
    assert [one["told"] for one in others] == [1, 1]
    room.upkeep.tell_webhook()
    # What was on its way comes twice, and nothing behind it.
    assert receiver.kinds == ["finding", "finding over", "finding"]


def test_it_is_signed_where_there_is_a_secret(
    places: dict[str, Any], client: Any, receiver: Receiver
) -> None:
    """With a secret each request is signed by HMAC-SHA256 of its body, as a receiver can compute."""
    changes = {"webhook_url": receiver.url, "webhook_secret": SECRET}
    given = places | changes | PATIENT
    with open_room("sync", Settings(**given), NoDispatch()) as room:
        begin_finding(room, client)
        room.upkeep.tell_webhook()
    digest = hmac.new(SECRET.encode(), receiver.raw[0], hashlib.sha256).hexdigest()
    assert receiver.headers[0]["stillroom-signature"] == f"sha256={digest}"


def test_everything_that_is_kept_has_a_bound(room: Any, client: Any) -> None:
    """The stream, the position and the lease of the webhook have a TTL, and the stream is short."""
    begin_finding(room, client)
    for _ in range(3):
        with client.pipeline() as pipeline:
            for _ in range(500):
                pipeline.xadd(room.keys.webhook, {"event": "{}"})
            pipeline.execute()
    client.delete(room.keys.dead_letters)
    next_minute(room, client)
    assert client.xlen(room.keys.webhook) <= KEPT + 200  # the server trims whole nodes
    room.upkeep.tell_webhook()
    for key in (room.keys.webhook, room.keys.webhook_at):
        assert 0 < client.ttl(key) <= 8 * 86_400


def test_without_a_webhook_nothing_is_written(settings: Settings, client: Any) -> None:
    """A room without a webhook writes nothing for it."""
    with open_room("sync", settings, NoDispatch()) as room:
        begin_finding(room, client)
        assert room.upkeep.tell_webhook() == {"told": 0, "outcome": "no webhook"}
        assert not client.exists(room.keys.webhook, room.keys.webhook_at)


def test_what_a_chat_would_take_for_a_command_is_text() -> None:
    """A mention or a control sequence in a name is sent as plain text on one line."""
    evil = "<!channel> & \x1b[31m\nbye"
    event = {"kind": "finding", "severity": "warn", "what": evil, "todo": "x" * 999}
    (line,) = text_of([event], "stillroom", evil).splitlines()
    assert "<" not in line
    assert "&lt;!channel&gt; &amp; \\x1b[31m\\nbye" in line
    assert len(line) < 400


@pytest.mark.parametrize("url", ["ftp://h/x", "h/x", "file:///etc/passwd", ""])
def test_an_address_is_a_web_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that is no web address is refused without being shown; an empty one counts as unset."""
    if not url:
        monkeypatch.setenv("STILLROOM_WEBHOOK_URL", url)
        assert Settings().webhook_url is None
        return
    with pytest.raises(SettingsError, match="a webhook's address begins with") as refused:
        Settings(webhook_url=url)
    assert url not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("https://", "has a host"),
        ("https:///a-secret", "has a host"),
        ("https://hooks.example:99999/a-secret", "has a host"),
        ("https://hooks.example/a secret", "is written as %20"),
        ("https://hooks.example/a-sécret", "is written as %20"),
    ],
)
def test_an_address_that_nobody_can_ask_is_refused_at_the_start(url: str, why: str) -> None:
    """An address that no request can be sent to is refused where it is set, and not by each request."""
    with pytest.raises(SettingsError, match=why) as refused:
        Settings(webhook_url=url)
    assert "secret" not in str(refused.value)


def test_a_login_in_the_address_is_sent_as_one(
    places: dict[str, Any], client: Any, receiver: Receiver
) -> None:
    """A user and a password in the address are sent as Basic authentication."""
    url = receiver.url.replace("://", "://shop:p%40ss@") + "\n"
    with open_room(
        "sync", Settings(**places | PATIENT | {"webhook_url": url}), NoDispatch()
    ) as room:
        begin_finding(room, client)
        assert room.upkeep.tell_webhook()["told"] == 1
    login = base64.b64encode(b"shop:p@ss").decode()
    assert receiver.headers[0]["authorization"] == f"Basic {login}"


def test_an_address_that_hangs_ends_within_its_time(
    room: Any, client: Any, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that accepts and never answers costs a task a few seconds and no more."""
    monkeypatch.setattr("stillroom.health.post.WITHIN_S", 0.2)
    begin_finding(room, client)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        given = places | {"webhook_url": url} | PATIENT
        with open_room("sync", Settings(**given), NoDispatch()) as other:
            done: list[Any] = []
            thread = threading.Thread(target=lambda: done.append(other.upkeep.tell_webhook()))
            thread.start()
            thread.join(10)
    assert done == [{"told": 0, "outcome": "TimeoutError"}]
    assert json.dumps(done)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"HTTP/1.1 200 OK\r\n", 1),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n", 1),
        (b"HTTP/1.1 ", 0),
    ],
)
def test_an_address_that_drips_ends_within_its_time(
    room: Any,
    client: Any,
    places: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    said: bytes,
    told: int,
) -> None:
    """A receiver that sends its answer byte by byte, without end, holds a task for a few seconds and no longer.

    What it has said by then counts.
    """
    monkeypatch.setattr("stillroom.health.post.WITHIN_S", 1.0)
    begin_finding(room, client)
    with dripping(said, b"0") as (port, outlasted):
        given = places | {"webhook_url": f"http://127.0.0.1:{port}/"} | PATIENT
        with open_room("sync", Settings(**given), NoDispatch()) as other:
            assert other.upkeep.tell_webhook()["told"] == told
        assert not outlasted.is_set()


@contextlib.contextmanager
def dripping(said: bytes, drop: bytes) -> Iterator[tuple[int, threading.Event]]:
    """Answer one client with this, and then drop by drop until it is gone, was there for long, or the block ends.

    Yield the port, and an event that says that the client was there for long.
    """
    ended, outlasted = threading.Event(), threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(said)
                gives_up = time.monotonic() + LONG_S
                while not ended.wait(0.02) and not outlasted.is_set():
                    connection.sendall(drop)
                    if time.monotonic() > gives_up:
                        outlasted.set()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield listening.getsockname()[1], outlasted
        finally:
            ended.set()
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            thread.join(LONG_S)


def test_a_name_that_resolves_late_ends_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that hangs holds a task for a few seconds and no longer."""
    monkeypatch.setattr("stillroom.health.post.WITHIN_S", 0.2)
    answers, look_up = threading.Event(), socket.getaddrinfo

    def hang(host: Any, *rest: Any, **options: Any) -> Any:
        if host == "hook.test":
            answers.wait(LONG_S)
            answers.set()
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with pytest.raises(post.Refused, match="NameUnanswered"):
            post.post("http://hook.test/a-secret-path", b"{}")
        assert not answers.is_set()
    finally:
        answers.set()


def test_a_handshake_that_drips_ends_within_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that begins TLS byte by byte holds a task for a few seconds and no longer."""
    monkeypatch.setattr("stillroom.health.post.WITHIN_S", 0.3)
    begun = b"\x16\x03\x03\x3f\xff"  # a record of 16 kB is to follow
    with dripping(begun, b"\x02") as (port, outlasted):
        with pytest.raises(post.Refused, match="TimeoutError"):
            post.post(f"https://127.0.0.1:{port}/", b"{}")
        assert not outlasted.is_set()


def test_an_address_without_a_receiver_is_followed_by_the_next(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name with several addresses is posted to the first one that somebody listens on."""
    port, look_up = urlsplit(receiver.url).port, socket.getaddrinfo
    unspoken, spoken = (
        look_up(address, port, type=socket.SOCK_STREAM) for address in ("127.0.0.2", "127.0.0.1")
    )

    def both(host: Any, *rest: Any, **options: Any) -> Any:
        return unspoken + spoken if host == "hook.test" else look_up(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", both)
    post.post(receiver.url.replace("127.0.0.1", "hook.test"), b"{}")
    assert receiver.bodies == [{}]
