"""Build what looks at the servers: the check of health, by their roles and with the services' probes, and types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stillroom.cache import CacheProbe, TodoProbe, shard_keys
from stillroom.errors import RedisRefused, RedisUnavailable
from stillroom.health import TICKS_OF_BEAT, CrewProbe, HealthBody, PauseProbe, Source, TaskProbe
from stillroom.keys import Keys
from stillroom.limits import LimitsProbe
from stillroom.operation import Operation
from stillroom.sessions import SessionProbe
from stillroom.settings import Settings
from stillroom.stats import Stats


def wires_of_cache(settings: Settings, wires: Sequence[Any]) -> Sequence[Any]:
    """Return whom to ask besides the state's server: a cluster's shards; nobody if one server has both roles."""
    if settings.cluster:
        return wires
    is_one = settings.cache_server == settings.redis_url and not settings.state_cluster
    return [] if is_one else wires[:1]


def state_keys(settings: Settings) -> Keys:
    """Return the keys of sessions, limits, abuse, orders and health."""
    return Keys(settings.namespace, state_in_cluster=settings.state_cluster)


def types_of(keys: Sequence[bytes]) -> Operation[Sequence[Any]]:
    """Return the type of each key, with an error in the place of one that this user may not ask for."""
    try:
        replies: Sequence[Any] = yield [(b"TYPE", key) for key in keys]
    except RedisRefused as refused:
        return refused.replies
    except RedisUnavailable:
        return ()
    return replies


def health_on(
    settings: Settings,
    state: Any,
    state_stats: Stats,
    cache: Sequence[Any],
    cache_breaker: Any,
    cache_stats: Stats,
) -> HealthBody:
    """Return health's operations, for drivers of `state` and then of the wires in `cache`."""
    cache_stats.breaker, state_stats.breaker = cache_breaker, state.breaker
    keys = state_keys(settings)
    first = Source(
        name="redis.state" if cache else "redis",
        roles=("state",) if cache else ("cache", "state"),
        clock=state.server,
        breaker=state.breaker,
        keys=keys,
        stats=state_stats,
        probes=[
            LimitsProbe(keys),
            SessionProbe(keys, settings.session_shards),
            TaskProbe(settings, keys, TICKS_OF_BEAT),
            CrewProbe(keys),
            PauseProbe(keys),
        ],
        replicas=settings.replicas,
        nodes=state.server.described if settings.state_cluster else tuple,
    )
    wanted = settings.replicas_of_cache
    of_cache = [
        Source("redis.cache", ("cache",), clock, cache_breaker, own, cache_stats, [], wanted)
        for clock, own in zip(_clocks(settings, cache), shard_keys(settings), strict=False)
    ]
    for source, shards in _shards_on(settings, of_cache or [first]):
        source.probes.extend([CacheProbe(source.keys, source.stats), TodoProbe(shards)])
    return HealthBody(settings, keys, [first, *of_cache])


def _clocks(settings: Settings, wires: Sequence[Any]) -> Sequence[Any]:
    """Return the clocks; a shard's clock is that of its node."""
    return wires if settings.cluster else [wire.server for wire in wires]


def _shards_on(
    settings: Settings, sources: Sequence[Source]
) -> list[tuple[Source, Sequence[Keys]]]:
    """Return which shards of the cache each source has."""
    keys = shard_keys(settings)
    if settings.cluster:
        return [(source, [own]) for source, own in zip(sources, keys, strict=True)]
    return [(sources[0], keys)]
