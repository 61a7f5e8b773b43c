"""`room.upkeep.explain` says why a read is a hit, stale or a miss."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from stillroom import InvalidKey, NoDispatch, Settings
from stillroom.keys import sanitized
from tests.support.crowd import PATIENT
from tests.support.faces import FACES, open_room


@pytest.fixture(params=FACES)
def room(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Any]:
    given = {"redis_url": settings.redis_url}
    with open_room(request.param, Settings(**given | PATIENT), NoDispatch()) as room:
        yield room


def outcome(room: Any, key: str = "k") -> tuple[str, str, str | None]:
    """Return the explained outcome of a key, and check that a reader sees the same."""
    found = room.upkeep.explain(key)
    entry = room.cache.get_entry(key)
    read = "miss" if entry is None else {"fresh": "hit"}.get(entry.freshness.value, "stale")
    assert read == found.outcome
    return found.outcome, found.cause, found.by


def test_an_entry_is_fresh_then_stale_then_gone(room: Any, client: Any) -> None:
    """explain shows an entry fresh, then stale by its ttl, then gone at its end, and counts nothing."""
    assert outcome(room) == ("miss", "never", None)
    room.cache.set("k", [1, 2], ttl=60, swr=60, tags=["a", "b"])
    assert outcome(room) == ("hit", "fresh", None)
    before = dict(room.stats.counts)
    found = room.upkeep.explain("k", value=True)
    assert dict(room.stats.counts) == before
    assert (found.tags, found.value, found.loader) == (("a", "b"), [1, 2], None)
    assert found.fresh_until == pytest.approx(time.time() + 60, abs=5)
    assert found.ends_at == pytest.approx(time.time() + 120, abs=5)
    assert found.size == client.strlen(room.keys.entry(b"k"))
    assert room.upkeep.explain("k").value is None
    room.cache.set("k", 1, ttl=0.001, swr=60)
    time.sleep(0.01)
    assert outcome(room) == ("stale", "expired", None)


def test_an_invalidation_is_named(room: Any) -> None:
    """explain names the invalidation and its time: tag, hard or soft, pattern, or the end of an epoch."""
    room.cache.set("k", 1, ttl=60, tags=["a", "b"])
    room.cache.invalidate_by_tag("b", soft=True)
    assert outcome(room) == ("stale", "soft", "b")
    room.cache.invalidate_by_tag("a")
    assert outcome(room) == ("miss", "tag", "a")
    at = room.upkeep.explain("k").invalidated_at
    assert at == pytest.approx(time.time(), abs=5)
    room.cache.set("k", 1, ttl=60)
    room.cache.invalidate_by_pattern("x*")
    assert outcome(room) == ("hit", "fresh", None)
    room.cache.invalidate_by_pattern("k*")
    assert outcome(room) == ("miss", "pattern", "k*")
    room.cache.set("k", 1, ttl=60)
    room.cache.clear()
    assert outcome(room)[:2] == ("miss", "epoch")


def test_what_an_invalidation_named_is_said_as_it_was_written(room: Any) -> None:
    """A tag and a pattern stand in an explanation as they were given, whatever escapes are in them."""
    room.cache.set("50%25", 1, tags=["a%25"])
    room.cache.invalidate_by_tag("a%25")
    assert outcome(room, "50%25") == ("miss", "tag", "a%25")
    room.cache.set("50%25", 1)
    room.cache.invalidate_by_pattern("50%25*")
    assert outcome(room, "50%25") == ("miss", "pattern", "50%25*")


def test_what_was_lost_or_changed_is_said(room: Any, client: Any) -> None:
    """explain names a lost clock, and bytes that are no entry."""
    room.cache.set("k", 1, ttl=60)
    client.delete(room.keys.clock)
    assert room.upkeep.explain("k").cause == "epoch"
    client.set(room.keys.entry(b"k"), b"somebody else's")
    assert outcome(room) == ("miss", "unreadable", None)


def test_of_what_is_gone_the_indexes_remember(room: Any, client: Any) -> None:
    """Of an evicted or expired entry explain says when it would have ended, from the index of its tag."""

    @room.cache.cached("product:{number}", ttl=60, swr=60, tags=["product:{number}", "all"])
    def product(number: int) -> int:
        return number

    product(7)
    found = room.upkeep.explain("product:7")
    assert (found.outcome, found.loader) == ("hit", "product")
    assert found.age_s == pytest.approx(0, abs=5)
    client.delete(room.keys.entry(b"product:7"))
    assert outcome(room, "product:7")[:2] == ("miss", "removed")
    for tag in (b"product:7", b"all"):
        client.zadd(room.keys.index(tag), {b"product:7": time.time() * 1000 - 5_000})
    assert outcome(room, "product:7")[:2] == ("miss", "gone")
    assert room.upkeep.explain("product:8").cause == "never"


def test_the_age_of_what_no_loader_stored_is_not_said(room: Any) -> None:
    """explain tells an age only of what the loader stored: another value under its key has another ttl."""

    @room.cache.cached("product:{number}", ttl=3_600)
    def product(number: int) -> int:
        return number

    product(7)
    stored = room.upkeep.explain("product:7")
    room.cache.set("product:7", 1, ttl=10)
    found = room.upkeep.explain("product:7")
    assert 0 <= stored.age_s <= 3_600 * room.settings.jitter + 5
    assert (found.loader, found.age_s) == ("product", None)


def test_another_release_s_value_is_said(settings: Settings) -> None:
    """explain says that another release's value is not read by this one."""
    given = Settings(**{"redis_url": settings.redis_url} | PATIENT)

    def loader_of(room: Any, version: int) -> Any:
        @room.cache.cached("page:{number}", version=version)
        def page(number: int) -> int:
            return number

        return page

    with open_room("sync", given, NoDispatch()) as old:
        loader_of(old, 1)(7)
        with open_room("sync", given, NoDispatch()) as new:
            loader_of(new, 2)
            assert new.upkeep.explain("page:7").cause == "release"
            assert old.upkeep.explain("page:7").cause == "fresh"


def test_of_two_releases_each_is_told_of_its_own_value(settings: Settings, client: Any) -> None:
    """Where two releases keep values under one key, explain tells the size and the end of this release's own."""
    given = Settings(**{"redis_url": settings.redis_url} | PATIENT)
    with (
        open_room("sync", given, NoDispatch()) as old,
        open_room("sync", given, NoDispatch()) as new,
    ):

        @old.cache.cached("page:{number}", version=1, ttl=60)
        def short(number: int) -> str:
            return "short"

        @new.cache.cached("page:{number}", version=2, ttl=6_000)
        def page(number: int) -> str:
            return "long" * 100

        assert (short(7), page(7)) == ("short", "long" * 100)
        places = old.keys.entry(b"page:7"), old.keys.other(b"page:7")
        for room, place in zip((old, new), places, strict=True):
            found = room.upkeep.explain("page:7")
            assert found.size == client.strlen(place)
            left = client.pttl(place) / 1000
            assert found.ends_at == pytest.approx(time.time() + left, abs=5)


def test_who_knows_no_loader_is_told_of_the_value_that_lives(settings: Settings) -> None:
    """Without the loaders, as on the command line, explain sees the living value of two releases, as get does."""
    given = Settings(**{"redis_url": settings.redis_url} | PATIENT)
    with (
        open_room("sync", given, NoDispatch()) as old,
        open_room("sync", given, NoDispatch()) as new,
    ):
        for room, version in (old, 1), (new, 2):

            @room.cache.cached("page:{number}", version=version, tags=["pages"])
            def page(number: int) -> int:
                return number

            page(7)
            room.cache.invalidate_by_tag("pages")
        page(7)
        with open_room("sync", given, NoDispatch()) as other:
            assert outcome(other, "page:7") == ("hit", "fresh", None)


def test_what_is_under_way_is_said(room: Any, client: Any) -> None:
    """explain names a load under way, an ordered refresh, and a failed one in its backoff."""
    for lease, said in {
        b"load.0123456789abcdef.5000": "load",
        b"refresh.0123456789abcdef.5000.0": "refresh asked for",
        b"backoff.5000.1": "backoff",
        b"what": None,
    }.items():
        client.set(room.keys.lease(b"k"), lease, px=60_000)
        assert room.upkeep.explain("k").loading == said
    with pytest.raises(InvalidKey):
        room.upkeep.explain("")


def test_the_loader_that_stored_an_entry_explains_it(room: Any) -> None:
    """Of two loaders whose templates fit a key, the one that stored its entry says whether its readers hit."""

    @room.cache.cached("doc:{name}")
    def doc(name: str) -> str:
        return name

    @room.cache.cached("doc:{name}:{part}")
    def part_of_doc(name: str, part: str) -> dict[str, int]:
        return {name: len(part)}

    doc("a:b")
    found = room.upkeep.explain("doc:a:b")
    assert (found.outcome, found.cause, found.loader) == ("hit", "fresh", "doc")


def test_an_escaped_argument_is_found_in_the_index(room: Any, client: Any) -> None:
    """Of a missing entry the tag that its key's arguments make is known, also where the key has them escaped."""

    @room.cache.cached("page:{path}:{lang}", tags=["page:{path}"])
    def page(path: str, lang: str) -> str:
        return path + lang

    page("a:b", "de")
    client.delete(room.keys.entry(sanitized("page:a%3Ab:de")))
    assert outcome(room, "page:a%3Ab:de")[:2] == ("miss", "removed")
