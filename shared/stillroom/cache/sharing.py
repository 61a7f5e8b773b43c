"""Decide whether one value may be given to many callers, because none of them can change it. Pure."""

from __future__ import annotations

import dataclasses
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any
from uuid import UUID

from pydantic import BaseModel

from stillroom.sameness import is_cached_property

SCALARS = frozenset(
    [int, str, float, bool, type(None), bytes, Decimal, UUID, date, datetime, time, timedelta]
)
DEPTH_LIMIT = 50


def is_frozen(value: Any, depth: int = 0) -> bool:
    """Return whether nobody can change a value.

    That is a scalar, or a tuple, frozen dataclass or frozen model made of scalars.
    """
    kind = type(value)
    if kind in SCALARS:
        return True
    if depth >= DEPTH_LIMIT:
        return False
    if isinstance(value, Enum):
        return True
    parts = _parts(value, kind)
    return parts is not None and all(is_frozen(part, depth + 1) for part in parts)


def _parts(value: Any, kind: type) -> list[Any] | None:
    """Return the parts of a frozen value, or None where the value is not frozen."""
    if kind in (tuple, frozenset):
        return list(value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return None if hasattr(value, "__dict__") else list(value)
    if not _is_frozen_kind(kind):
        return None
    if isinstance(value, BaseModel):
        # Both can be changed in a frozen model, too.
        more = value.__pydantic_private__, value.__pydantic_extra__
        return list(vars(value).values()) if more == (None, None) else None
    fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [*fields, *getattr(value, "__dict__", {}).values()]


@lru_cache(maxsize=1_000)
def _is_frozen_kind(kind: type) -> bool:
    """Return whether a class is a frozen model or dataclass, without what a cached property would make later."""
    if any(is_cached_property(one) for base in kind.__mro__ for one in vars(base).values()):
        return False
    if issubclass(kind, BaseModel):
        return bool(kind.model_config.get("frozen"))
    params = vars(kind).get("__dataclass_params__")  # an undecorated subclass takes new attributes
    return params is not None and bool(params.frozen)
