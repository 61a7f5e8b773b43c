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
    SettingsError,
    StillroomError,
    UnknownLoader,
    ValueTooLarge,
)
from stillroom.room import AsyncStillroom, Stillroom
from stillroom.settings import Settings

__all__ = [
    "AsyncCache",
    "AsyncCachedFunction",
    "AsyncStillroom",
    "Cache",
    "CachedFunction",
    "CachedValue",
    "CeleryDispatch",
    "Freshness",
    "ImageInfo",
    "ImageRefused",
    "ImagesUnavailable",
    "InlineDispatch",
    "InvalidKey",
    "NoDispatch",
    "RedisRefused",
    "RedisUnavailable",
    "Settings",
    "SettingsError",
    "Stillroom",
    "StillroomError",
    "UnknownLoader",
    "ValueTooLarge",
]
