"""A URL leads to a place: one server has many spellings, and another may differ by a digit."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from stillroom import Settings
from stillroom.health.queues import BrokerHere
from stillroom.place import is_same_place, place_of
from tests.support.celery_process import until

SAME = [
    ("redis://redis", "redis://redis:6379/0"),
    ("redis://web@redis:6379", "redis://producer@redis:6379"),
    ("redis://:pw@redis", "rediss://redis:6379?ssl_cert_reqs=none"),
    ("redis://Redis.Example.ORG", "redis://redis.example.org./"),
    ("redis://redis?db=3", "redis://redis/3"),
    ("redis://redis/", "redis://redis?db=0"),
    ("redis://[::1]:6379", "redis://[::1]"),
    ("unix:///run/redis.sock", "redis+socket:///run/redis.sock?virtual_host=0"),
    ("redis://", "redis://localhost"),
    ("redis+sentinel://web@a,b:26379/main", "rediss+sentinel://producer:pw@B,a/main/0"),
]
OTHER = [
    ("redis://redis/0", "redis://redis/1"),
    ("redis://redis:6379", "redis://redis:6380"),
    ("unix:///a.sock", "unix:///b.sock"),
    ("unix:///a.sock", "redis://a.sock"),
    ("redis://redis", "amqp://redis"),
    ("redis://redis", "redis://a;redis://redis"),
    ("redis://redis", None),
    ("redis://redis", "redis://redis:port"),
    ("redis://redis", "redis://redis/three"),
    ("redis+sentinel://a,b/main", "redis+sentinel://a,b/main/1"),
    ("redis+sentinel://a,b/main", "redis+sentinel://a,b/other"),
    ("redis+sentinel://a,b/main", "redis+sentinel://a,c/main"),
    ("redis+sentinel://a/main", "redis+sentinel://a"),
    ("redis+sentinel://a/main", "redis://a:26379"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_one_place(one: str, other: str) -> None:
    """User, password, scheme, case, defaults and the form of the database make no other place."""
    assert is_same_place(one, other) is True
    assert is_same_place(other, one) is True
    assert place_of(one) == place_of(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other_places(one: str | None, other: str | None) -> None:
    """Another port, database, file or broker, several URLs in one and an unreadable one are other places."""
    assert is_same_place(one, other) is False


def test_names_are_known_when_the_resolver_has_answered() -> None:
    """Names are compared once the resolver has answered, and a check does not wait for it."""
    here = BrokerHere(Settings(redis_url="redis://localhost:7", broker_url="redis://127.0.0.1:7"))
    until(lambda: here.answer is True, "the resolver")


def test_a_resolver_that_does_not_know_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed resolver is asked again. Until then the queues are unknown and no check fails."""
    answers: list[Any] = [OSError("no such name"), [(0, 0, 0, "", ("192.0.2.1", 7))]]
    asked = threading.Event()

    def resolve(*_: Any, **__: Any) -> Any:
        asked.set()
        if isinstance(answers[0], Exception):
            raise answers[0]
        return answers[0]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    here = BrokerHere(Settings(redis_url="redis://redis:7", broker_url="redis://alias:7"))
    assert here.answer is None
    assert asked.wait(10)
    del answers[0]
    until(lambda: here.answer is True, "another try")
