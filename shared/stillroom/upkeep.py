"""`room.upkeep`: what workers, beat and the command line do for a room. An app needs none of it."""

from __future__ import annotations

from typing import Any

from stillroom.abuse import AbuseBody
from stillroom.cache import CacheBody, Housekeeping
from stillroom.face import Face, Part
from stillroom.health import HealthBody
from stillroom.limits import LimitsBody
from stillroom.pauses import Pauses
from stillroom.sessions import SessionsBody

CACHE, SESSIONS, LIMITS = Part("_cache"), Part("_sessions"), Part("_limits")
ABUSE, HEALTH = Part("_abuse"), Part("_health")
HOUSEKEEPING, PAUSES = Part("_housekeeping"), Part("_pauses")


class _Parts(Face):
    """The faces of the services, of which each knows its operations and what runs them."""

    def __init__(
        self,
        housekeeping: Any,
        cache: Any,
        sessions: Any,
        limits: Any,
        abuse: Any,
        health: Any,
        pauses: Any,
    ) -> None:
        self._housekeeping = housekeeping
        self._cache = cache
        self._sessions = sessions
        self._limits = limits
        self._abuse = abuse
        self._health = health
        self._pauses = pauses


class Upkeep(_Parts):
    """The work behind the services, for threads. A task of the workers is a name for one of these methods."""

    refresh = CACHE.blocking(CacheBody.refresh)
    refresh_piece = CACHE.blocking(CacheBody.refresh_piece)
    load = CACHE.blocking(CacheBody.load)
    explain = CACHE.blocking(CacheBody.explain)
    reclaim = HOUSEKEEPING.blocking(Housekeeping.reclaim)
    pending = HOUSEKEEPING.blocking(Housekeeping.pending)
    warm = HOUSEKEEPING.blocking(Housekeeping.warm)
    order = HOUSEKEEPING.blocking(Housekeeping.order)
    order_load = HOUSEKEEPING.blocking(Housekeeping.order_load)
    trim_marks = HOUSEKEEPING.blocking(Housekeeping.trim_marks)
    trim_indexes = HOUSEKEEPING.blocking(Housekeeping.trim_indexes)
    flush_cache_stats = CACHE.blocking(CacheBody.flush_stats)
    sweep_sessions = SESSIONS.blocking(SessionsBody.sweep)
    deliver_logouts = SESSIONS.blocking(SessionsBody.deliver)
    flush_session_stats = SESSIONS.blocking(SessionsBody.flush_stats)
    deliver_charges = LIMITS.blocking(LimitsBody.deliver)
    scan_abuse = ABUSE.blocking(AbuseBody.scan)
    deliver_events = ABUSE.blocking(AbuseBody.deliver)
    snapshot = HEALTH.blocking(HealthBody.snapshot)
    tell_webhook = HEALTH.blocking(HealthBody.tell_webhook)
    record_heartbeat = HEALTH.blocking(HealthBody.seen)
    record_tick = HEALTH.blocking(HealthBody.ticked)
    pause = PAUSES.blocking(Pauses.pause)
    resume = PAUSES.blocking(Pauses.resume)
    pauses = PAUSES.blocking(Pauses.pauses)
    refreshes_are_paused = PAUSES.blocking(Pauses.refreshes_are_paused)


class AsyncUpkeep(_Parts):
    """The work behind the services, for asyncio. The same names, awaited."""

    refresh = CACHE.awaiting(CacheBody.refresh)
    refresh_piece = CACHE.awaiting(CacheBody.refresh_piece)
    load = CACHE.awaiting(CacheBody.load)
    explain = CACHE.awaiting(CacheBody.explain)
    reclaim = HOUSEKEEPING.awaiting(Housekeeping.reclaim)
    pending = HOUSEKEEPING.awaiting(Housekeeping.pending)
    warm = HOUSEKEEPING.awaiting(Housekeeping.warm)
    order = HOUSEKEEPING.awaiting(Housekeeping.order)
    order_load = HOUSEKEEPING.awaiting(Housekeeping.order_load)
    trim_marks = HOUSEKEEPING.awaiting(Housekeeping.trim_marks)
    trim_indexes = HOUSEKEEPING.awaiting(Housekeeping.trim_indexes)
    flush_cache_stats = CACHE.awaiting(CacheBody.flush_stats)
    sweep_sessions = SESSIONS.awaiting(SessionsBody.sweep)
    deliver_logouts = SESSIONS.awaiting(SessionsBody.deliver)
    flush_session_stats = SESSIONS.awaiting(SessionsBody.flush_stats)
    deliver_charges = LIMITS.awaiting(LimitsBody.deliver)
    scan_abuse = ABUSE.awaiting(AbuseBody.scan)
    deliver_events = ABUSE.awaiting(AbuseBody.deliver)
    snapshot = HEALTH.awaiting(HealthBody.snapshot)
    tell_webhook = HEALTH.awaiting(HealthBody.tell_webhook)
    record_heartbeat = HEALTH.awaiting(HealthBody.seen)
    record_tick = HEALTH.awaiting(HealthBody.ticked)
    pause = PAUSES.awaiting(Pauses.pause)
    resume = PAUSES.awaiting(Pauses.resume)
    pauses = PAUSES.awaiting(Pauses.pauses)
    refreshes_are_paused = PAUSES.awaiting(Pauses.refreshes_are_paused)


# Methods that stood among the services' own before: service → old name → name of today.
MOVED = {
    "cache": {
        **{name: name for name in ("refresh", "load", "reclaim", "pending", "trim_marks")},
        "trim_indexes": "trim_indexes",
        "flush_stats": "flush_cache_stats",
    },
    "sessions": {
        "sweep": "sweep_sessions",
        "deliver": "deliver_logouts",
        "flush_stats": "flush_session_stats",
    },
    "limits": {"deliver": "deliver_charges"},
    "abuse": {"scan": "scan_abuse", "deliver": "deliver_events"},
    "tasks": {"warm": "warm"},
    "health": {
        **{name: name for name in ("snapshot", "tell_webhook")},
        "seen": "record_heartbeat",
        "ticked": "record_tick",
    },
}
