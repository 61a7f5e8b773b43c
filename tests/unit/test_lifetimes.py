"""Old servers are reported, and the table of servers is sound."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.health.advice import advise
from stillroom.health.lifetimes import REDIS, SOON_S, VALKEY, why_old
from stillroom.health.report import Connection, Measures, RedisInfo, Server

NOW = datetime(2026, 11, 27, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("product", "version", "severity", "says"),
    [
        ("redis", "6.0.16", "fail", "older than 6.2"),
        ("redis", "6.2.21", "warn", "6.2.22 has them"),
        ("redis", "7.0.15", "warn", "no repairs since 29 July 2024"),
        ("redis", "7.2", "warn", "7.2.14 has them"),
        ("redis", "8.0.9", "warn", "no repairs from 1 December 2026 on"),
        ("redis", "8.4.2", "warn", "8.4.3 has them"),
        ("valkey", "7.2.12", "warn", "7.2.13 has them"),
    ],
)
def test_an_old_server_is_a_finding(product: str, version: str, severity: str, says: str) -> None:
    """A server without repairs is a finding that names its version and what is wrong with it."""
    info = RedisInfo(product=product, version=version)
    up = Connection(is_up=True, breaker="closed")
    server = Server(name="redis", roles=("cache", "state"), connection=up, redis=info)
    (found,) = advise(Measures(time=NOW, servers=(server,)))
    assert (found.name, found.severity) == ("redis:version server_old", severity)
    assert version in found.what
    assert says in found.what


@pytest.mark.parametrize(
    ("product", "version"),
    [
        *(("redis", v) for v in ("6.2.22", "7.2.14", "7.4.10", "8.2.6", "8.6.3", "9.9.0")),
        *(("valkey", v) for v in ("7.2.13", "8.1.8", "9.1.2", "10.0.0")),
        ("redis", "unstable"),
        ("keydb", "6.3.4"),
    ],
)
def test_nothing_is_said_of_a_server_that_nothing_is_known_against(
    product: str, version: str
) -> None:
    """A repaired, newer or unknown server is no finding."""
    assert product == "keydb" or why_old(product, version, NOW) is None


@pytest.mark.parametrize("line", [line for line in REDIS.items() if line[1].ends])
def test_the_end_of_repairs_is_said_before_it_comes(line: tuple[tuple[int, int], object]) -> None:
    """A safe patch level is fine until 60 days before the end, and old from then on."""
    (major, minor), about = line
    version = f"{major}.{minor}.99"
    ends = about.ends  # type: ignore[attr-defined]
    assert why_old("redis", version, ends - SOON_S - 1) is None
    before, after = why_old("redis", version, ends - 1), why_old("redis", version, ends)
    assert before is not None
    assert after is not None
    assert about.end_date in before[1]  # type: ignore[attr-defined]
    assert "since" in after[1]
    assert datetime.fromtimestamp(ends, UTC).strftime("%d %B %Y").lstrip("0") == about.end_date  # type: ignore[attr-defined]


@given(st.sampled_from(["redis", "valkey"]), st.text("0123456789.-rc", max_size=12))
def test_any_version_is_judged_without_an_error(product: str, version: str) -> None:
    """A server may say anything of its version."""
    why_old(product, version, NOW)
    assert VALKEY
