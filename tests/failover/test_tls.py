"""Sentinels and servers that are met by TLS alone, and ask for a certificate and a password."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stillroom import RedisUnavailable
from stillroom.embedded import EmbeddedServerError
from tests.support.celery_process import CeleryProcess, until
from tests.support.certificates import Authority
from tests.support.sentinels import Sentinels


@pytest.fixture(scope="module")
def formed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sentinels]:
    """Form Sentinels of redis-server: the embedded server has no TLS."""
    if not Authority.is_possible() or shutil.which("redis-server") is None:
        pytest.skip("there is no openssl, or no redis-server with TLS")
    folder = tmp_path_factory.mktemp("tls")
    given: Any = {"binary": "redis-server", "password": "canary", "authority": Authority(folder)}
    try:
        with Sentinels(folder, **given) as formed:
            yield formed
    except EmbeddedServerError as error:
        pytest.skip(f"this redis-server has no TLS: {error}")


def test_a_room_goes_on_by_tls(sentinels: Sentinels, make: Callable[..., Any]) -> None:
    """To the Sentinels as to the servers, with the one authority, before a failover and after it."""
    patient = {"connect_timeout": 2, "command_timeout": 2, "call_timeout": 5}
    room = make(sentinels.url, **patient)
    room.connect()
    assert room.cache.set("k", 1)
    session = room.sessions.create("u1")
    sentinels.await_copies()
    with sentinels.accident("killed"):
        sentinels.promote_another()
        until(lambda: room.cache.set("k", 2), "a write", 30)
        assert room.cache.get("k") == 2
        assert room.sessions.get(room.sessions.create("u2")).user_id == "u2"
    assert room.sessions.get(session) is not None


def test_an_authority_that_is_not_trusted_is_said(
    sentinels: Sentinels, make: Callable[..., Any], tmp_path: Path
) -> None:
    """The error is that of TLS, names the setting, and holds no password."""
    another = Authority(tmp_path, "another")
    url = sentinels.url.partition("?")[0] + f"?ssl_ca_certs={another.certificate}"
    room = make(url, connect_attempts=1, connect_timeout=2, command_timeout=2)
    with pytest.raises(RedisUnavailable, match=r"\(tls\).*REDIS_URL") as caught:
        room.connect()
    assert "canary" not in str(caught.value)


def test_sentinels_that_close_are_told_from_sentinels_that_do_not_run(
    sentinels: Sentinels, make: Callable[..., Any]
) -> None:
    """A client without a certificate, or without TLS, is closed: the error names the option that is missing."""
    by_tls, _, options = sentinels.url.partition("?")
    patient = {"connect_attempts": 1, "connect_timeout": 2, "command_timeout": 2}
    for url, missing in (
        (f"{by_tls}?{options.partition('&ssl_certfile')[0]}", "ssl_certfile"),
        (by_tls.replace("rediss+", "redis+"), r"rediss\+sentinel://"),
    ):
        with pytest.raises(RedisUnavailable, match=missing):
            make(url, **patient).connect()


@pytest.mark.long
def test_a_worker_comes_by_tls(sentinels: Sentinels, tmp_path: Path) -> None:
    """kombu is told the same of Sentinels, servers, authority and certificate."""
    worker = CeleryProcess(tmp_path / "log", {"REDIS_URL": sentinels.url}, "worker", "-l", "INFO")
    try:
        worker.await_line("ready.", 60)
        assert worker.terminate() == 0
    finally:
        worker.kill()
