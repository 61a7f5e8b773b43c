"""Stillroom: the Redis services a web app shares, and the workers that keep them fresh."""

from stillroom.cache import (
    AsyncCache,
    AsyncCachedFunction,
    Cache,
    CachedFunction,
    CachedValue,
    Freshness,
    ImageInfo,
)
from stillroom.dispatch import CeleryDispatch, InlineDispatch, NoDispatch
from stillroom.errors import (
    ImageRefused,
    ImagesUnavailable,
    InvalidKey,
    RedisRefused,
    RedisUnavailable,
    SessionConflict,
    SessionDataRefused,
    SessionEnded,
    SessionStoreUnavailable,
    SessionUnreadable,
    SettingsError,
    StillroomError,
    TooManySessions,
    UnknownLoader,
    ValueTooLarge,
)
from stillroom.health import AsyncHealth, Health
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.sessions import AsyncSessions, Device, Session, SessionEvent, Sessions
from stillroom.settings import Settings

__all__ = [
    "AsyncCache",
    "AsyncCachedFunction",
    "AsyncHealth",
    "AsyncSessions",
    "AsyncStillroom",
    "Cache",
    "CachedFunction",
    "CachedValue",
    "CeleryDispatch",
    "Device",
    "Freshness",
    "Health",
    "ImageInfo",
    "ImageRefused",
    "ImagesUnavailable",
    "InlineDispatch",
    "InvalidKey",
    "NoDispatch",
    "RedisRefused",
    "RedisUnavailable",
    "Session",
    "SessionConflict",
    "SessionDataRefused",
    "SessionEnded",
    "SessionEvent",
    "SessionStoreUnavailable",
    "SessionUnreadable",
    "Sessions",
    "Settings",
    "SettingsError",
    "Stillroom",
    "StillroomError",
    "TooManySessions",
    "UnknownLoader",
    "ValueTooLarge",
]
