"""kill -9 of Redis (with its append-only file) in the middle of invalidations: what was acknowledged is true."""

from __future__ import annotations

import random
import threading

import pytest

from stillroom import NoDispatch, RedisUnavailable, Settings, Stillroom
from stillroom.embedded import EmbeddedServer
from tests.support.crowd import PATIENT

ROUNDS, KEYS = {True: 20, False: 4}, 500


@pytest.mark.long
def test_no_acknowledged_invalidation_is_lost(own_server: EmbeddedServer, is_full: bool) -> None:
    """Kills among thousands, by key, tag and pattern: not in the reads after, nor in the work left to do.

    The server comes back with its file, and whatever that lost: it is another run, and for the cache another epoch.
    """
    dice = random.Random(11)
    settings = Settings(**{**PATIENT, "redis_url": own_server.url})
    came_back = 0
    for _ in range(ROUNDS[is_full]):
        with Stillroom(settings, dispatch=NoDispatch()) as room:
            names = [f"k:{n}" for n in range(KEYS)]
            for name in names:
                room.cache.set(name, "old", tags=[name], ttl=3_600)
            acknowledged: list[str] = []
            enough, fatal = threading.Event(), dice.randrange(100, KEYS)
            invalidating = threading.Thread(
                target=invalidate, args=(room, names, acknowledged, fatal, enough)
            )
            invalidating.start()
            assert enough.wait(30)
            own_server.kill()
            invalidating.join()
            assert len(acknowledged) >= fatal
            own_server.restart()
        with Stillroom(settings, dispatch=NoDispatch()) as anew:
            came_back += len(entries_of(anew))
            assert anew.cache.get_many(names) == {}
            anew.cache.reclaim(budget=30)
            assert entries_of(anew) == []
    assert came_back  # in the server's file: else nothing would have been proved


def entries_of(room: Stillroom) -> list[bytes]:
    """Return the keys of all entries, dead or alive."""
    keys: list[bytes] = room.wire.execute([(b"KEYS", room.keys.entry_prefix + b"*")], 10.0)[0]
    return keys


def invalidate(
    room: Stillroom, names: list[str], acknowledged: list[str], fatal: int, enough: threading.Event
) -> None:
    """Invalidate one after the other until Redis is away: mostly tags, often keys, sometimes patterns."""
    for number, name in enumerate(names):
        try:
            if number % 50 == 0:
                room.cache.invalidate_by_pattern(name)
            elif number % 3 == 0:
                room.cache.invalidate(name)
            else:
                room.cache.invalidate_by_tag(name)
        except RedisUnavailable:
            return
        acknowledged.append(name)
        if len(acknowledged) == fatal:
            enough.set()
