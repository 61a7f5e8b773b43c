"""Loaders, limits and rules are counted by name, in the report, the metrics and the advice."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stillroom import API, InlineDispatch, Limit, NoDispatch, Settings, Stillroom
from stillroom.counted import OTHERS
from stillroom.health.metrics import exposition
from stillroom.health.report import LoaderStats, Report
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room

pytestmark = pytest.mark.usefixtures("calm_machine")
CANARY = "canary-in-a-message"


@pytest.fixture(params=FACES)
def room(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    given = {"redis_url": settings.redis_url}
    with open_room(request.param, Settings(**given | PATIENT), InlineDispatch()) as room:
        yield room


@pytest.fixture
def last_minute(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Report]:
    """Write down the counts, move the server's clock past the minute and return its report."""

    def report(room: Any) -> Report:
        for stats in {id(one): one for one in (room.stats, room.state_stats)}.values():
            stats.due = 0.0
        room.upkeep.flush_cache_stats()
        room.upkeep.flush_session_stats()
        server = getattr(room, "inner", room).state_wire.server
        now_ms = server.now_ms()
        with monkeypatch.context() as patch:
            patch.setattr(type(server), "now_ms", lambda self: now_ms + 60_000)
            found: Report = room.health.check()
        return found

    return report


def loader_of(report: Report, name: str) -> LoaderStats:
    assert report.cache is not None
    return next(one for one in report.cache.loaders or () if one.name == name)


def test_a_loader_has_its_own_figures(
    room: Any, last_minute: Callable[[Any], Report], client: Any
) -> None:
    """A loader's figures are its lookups, loads, load times and refreshes, and its last error with its place."""

    @room.cache.cached("good:{id}", ttl=60, swr=60, tags=["good"])
    def good(id: int) -> int:
        time.sleep(0.01)
        return id

    @room.cache.cached("bad:{id}")
    def bad(id: int) -> int:
        raise ConnectionError(CANARY)

    for number in (1, 1, 2):
        assert good(number) == number
    room.cache.invalidate_by_tag("good", soft=True)
    assert good(1) == 1
    for _ in range(2):
        with pytest.raises(ConnectionError):
            bad(1)
    report = last_minute(room)
    assert report.cache is not None
    found = loader_of(report, "good")
    assert (found.hits, found.stale, found.misses, found.hit_ratio) == (1, 1, 2, 0.5)
    assert (found.loads, found.load_errors, found.refreshes) == (3, 0, 1)
    assert found.load_p50_ms is not None
    assert 5 < found.load_p50_ms <= (found.load_p95_ms or 0) < 1_000
    failing = loader_of(report, "bad")
    assert (failing.loads, failing.load_errors, failing.misses) == (0, 2, 2)
    error = report.cache.last_error("bad")
    assert error is not None
    assert (error.kind, error.place.partition(":")[0]) == ("ConnectionError", __name__)
    assert CANARY not in report.model_dump_json()
    assert CANARY.encode() not in b"".join(client.hgetall(room.keys.errors).values())


def test_the_advice_names_the_loader(room: Any, last_minute: Callable[[Any], Report]) -> None:
    """The advice names the worst loader first, with its last error."""

    @room.cache.cached("one:{id}")
    def one(id: int) -> int:
        raise KeyError(CANARY)

    def load() -> int:
        raise OSError(CANARY)

    for _ in range(2):
        with pytest.raises(KeyError):
            one(1)
    with pytest.raises(OSError, match=CANARY):
        room.cache.get_or_set("k", load)
    (found,) = [a for a in last_minute(room).advice if a.code == "loading"]
    place = f"{__name__}.test_the_advice_names_the_loader.<locals>.load"
    assert found.what.startswith(f"3 loads failed in the last minute: one (2), {place} (1). ")
    said = rf"The last error, of {re.escape(place)}: OSError at {__name__}:\d+\.$"
    assert re.search(said, found.what), "not of the worst one"
    assert CANARY not in found.what


def test_a_limit_has_its_own_figures(room: Any, last_minute: Callable[[Any], Report]) -> None:
    """A limit's figures are its checks and denials, with those from memory and in shadow apart."""
    narrow, shadow = Limit("narrow", 1, 600), Limit("shadow", 1, 600, shadow=True)
    for _ in range(3):
        room.limits.check("203.0.113.9", [API, narrow, shadow])
    report = last_minute(room)
    assert report.limits is not None
    each = {one.name: one for one in report.limits.each or ()}
    assert (each["api"].checks, each["api"].denials) == (3, 0)
    assert (each["narrow"].checks, each["narrow"].denials, each["narrow"].cached) == (3, 2, 1)
    assert each["shadow"].denials == 0
    assert report.limits.checks == 3


def test_there_are_only_so_many_names(room: Any, last_minute: Callable[[Any], Report]) -> None:
    """A hundred names are counted, and the rest together, so that requests cannot make up any number of names."""
    for n in range(150):
        room.limits.check("203.0.113.9", [Limit(f"made-up-{n}", 10, 60)])
    report = last_minute(room)
    assert report.limits is not None
    each = {one.name: one.checks for one in report.limits.each or ()}
    assert len(each) == 100
    assert sum(each.values()) + 0 <= 150
    assert (report.totals or {})[f"limit:checks:{OTHERS}"] == 50
    text = exposition(report, 0.0).decode()
    names = set(re.findall(r'stillroom_limit_requests_total\{limit="([^"]+)"', text))
    assert len(names) == 101
    assert OTHERS in names


def test_names_of_processes_that_come_and_go_are_bounded(
    room: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each snapshot adds up the rarest names where there are too many, however many processes made them up."""
    monkeypatch.setattr("stillroom.health.body.COUNTS_MOST", 100)
    made_up = {f"limit:checks:tenant-{n}": 1 + n % 3 for n in range(200)}
    made_up |= {f"limit_would_deny:tenant-{n}": 1 for n in range(200)}
    kept = {"limit:checks:api": 5_000, "loader:hits:page": 9_000, "loader:took_1:page": 7}
    kept |= {"hits": 9_000, "limit_checks": 5_400}
    client.hset(room.keys.counts, mapping={**made_up, **kept})
    room.upkeep.snapshot()
    found = {name.decode(): int(n) for name, n in client.hgetall(room.keys.counts).items()}
    assert len(found) <= 60
    assert found | kept == found
    for what in ("limit:checks", "limit_would_deny"):
        before = sum(n for field, n in (made_up | kept).items() if field.startswith(f"{what}:"))
        assert sum(n for field, n in found.items() if field.startswith(f"{what}:")) == before
    room.upkeep.snapshot()
    after = {name.decode(): int(n) for name, n in client.hgetall(room.keys.counts).items()}
    assert found.items() <= after.items()


def test_the_metrics_are_by_name(room: Any, last_minute: Callable[[Any], Report]) -> None:
    """The metrics are Prometheus histograms by name: buckets grow and end with the total."""

    @room.cache.cached("page:{id}")
    def page(id: int) -> int:
        return id

    for number in (1, 1, 2):
        page(number)
    text = exposition(last_minute(room), 0.0).decode()
    assert 'stillroom_loader_requests_total{loader="page",result="hit"} 1.0' in text
    assert 'stillroom_loader_loads_total{loader="page"} 2.0' in text
    assert "# TYPE stillroom_loader_load_seconds histogram" in text
    buckets = re.findall(r'load_seconds_bucket\{loader="page",le="([^"]+)"\} (\d+)\.0', text)
    assert [bound for bound, _ in buckets][-1] == "+Inf"
    counts = [int(count) for _, count in buckets]
    assert counts == sorted(counts)
    assert counts[-1] == 2
    assert 'stillroom_loader_load_seconds_count{loader="page"} 2.0' in text
    assert len(set(text.splitlines())) == len(text.splitlines())


def test_a_snapshot_has_no_names(room: Any, client: Any) -> None:
    """A snapshot has no figures by name, because they would be kept 1,440 times."""

    @room.cache.cached("page:{id}")
    def page(id: int) -> int:
        return id

    page(1)
    snapshot = room.upkeep.snapshot()
    assert snapshot.cache is None or snapshot.cache.loaders is None
    (kept,) = client.xrange(room.keys.health)
    assert b"page" not in kept[1][b"snapshot"]


def test_figures_of_several_minutes_are_added_up(room: Any, client: Any) -> None:
    """The page and the command add up figures of several whole minutes."""
    minute = getattr(room, "inner", room).state_wire.server.now_ms() // 60_000
    for ago, hits in ((0, 100), (1, 2), (5, 3), (20, 50)):
        client.hset(room.keys.stats(minute - ago), "loader:hits:page", hits)
    client.hset(room.keys.errors, "page", json.dumps({"kind": "KeyError", "place": "a:1", "at": 5}))
    about = '{{"kind": "{}", "place": "a:1", "at": {}}}'
    foreign = ["no JSON", "[" * 99_999, about.format(r"\ud800", 5), about.format("K", "NaN")]
    foreign += [about.format("K", "1e300"), about.format("K", "9" * 400)]
    for number, text in enumerate(foreign):
        client.hset(room.keys.errors, f"foreign-{number}", text)
    figures = room.health.figures(15)
    assert figures.cache is not None
    assert [(one.name, one.hits) for one in figures.cache.loaders or ()] == [("page", 5)]
    assert [one.name for one in figures.cache.errors or ()] == ["page"]
    with pytest.raises(ValueError, match="from 1 to 119"):
        room.health.figures(120)


def test_who_does_not_answer_tells_no_figures() -> None:
    """When Redis is away the figures are null and nothing is raised."""
    settings = Settings(redis_url="redis://127.0.0.1:1", **PATIENT)
    with Stillroom(settings, dispatch=NoDispatch()) as room:
        figures = room.health.figures()
    assert (figures.cache, figures.limits) == (None, None)
