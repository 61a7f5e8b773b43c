"""Loaders of a project that has given kombu's JSON a decoder of its own: what looks like a date is one."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

from kombu.serialization import register

from stillroom import Stillroom


def _with_dates(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: date(2020, 1, 1) if value == "2020-01-01" else value for name, value in found.items()
    }


def _read(text: str) -> Any:
    return json.loads(text, object_hook=_with_dates)


register("json", json.dumps, _read, content_type="application/json", content_encoding="utf-8")
room = Stillroom()


@room.cache.cached("day:{day}", ttl=60, swr=600, name="day")
def day(day: str) -> str:
    """Load a day that is a text."""
    return "the worker's"
