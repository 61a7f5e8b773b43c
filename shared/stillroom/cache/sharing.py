"""Decide whether one value may be given to many callers, because none of them can change it. Pure."""

from __future__ import annotations

import dataclasses
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from pydantic import BaseModel

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
    if isinstance(value, BaseModel):
        has_more = bool(value.__pydantic_private__ or value.__pydantic_extra__)
        is_frozen_model = bool(kind.model_config.get("frozen")) and not has_more  # type: ignore[attr-defined]
        return list(vars(value).values()) if is_frozen_model else None
    if dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return [getattr(value, field.name) for field in dataclasses.fields(kind)]
    return None
