"""Tell which settings are in force, and where each of them comes from. Secrets are never told."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from pydantic import SecretStr

from stillroom.environment import PREFIX, SECRETS
from stillroom.settings import URLS, Settings, environment_names
from stillroom.urls import redact

HIDDEN = "***"
DEFAULT = "default"


class InForce(NamedTuple):
    """One setting."""

    name: str  # as the environment has it
    value: str  # as a person reads it; `***` for a secret, `` where there is none
    source: str  # `default`, `environment`, `code`, or the file that a secret was read from

    @property
    def is_default(self) -> bool:
        return self.source == DEFAULT


def in_force(settings: Settings) -> list[InForce]:
    """Return every setting, in the order in which settings.py explains them."""
    given = {name.upper() for name, value in os.environ.items() if value}
    return [
        InForce(name, said(field, getattr(settings, field)), _source(settings, field, name, given))
        for field, name in environment_names().items()
    ]


def said(field: str, value: Any) -> str:
    """Return a setting's value for a person: no secret, and no password in a URL.

    >>> said("cache_url", "redis://:pass@cache:6379"), said("ready_requires", ("state",)), said("release", None)
    ('redis://:***@cache:6379', 'state', '')
    """
    if value is None:
        return ""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, tuple):
        return " ".join(said(field, one) for one in value)
    if isinstance(value, float):
        return f"{value:.15g}"
    text = str(value)
    return redact(text) if field.endswith(URLS) else text


def unread(settings: Settings, names: Iterable[str]) -> dict[str, str]:
    """Return the settings that stand among a framework's own, where no room reads them: variable and field.

    Not those that the environment or the code gives the room, too; and not REDIS_URL, which apps read themselves.
    """
    given = set(names)
    return {
        name: field
        for field, name in environment_names().items()
        if name in given and name.startswith(PREFIX) and field not in settings.model_fields_set
    }


def _source(settings: Settings, field: str, name: str, given: set[str]) -> str:
    if settings.is_in_code(field, name):
        return "code"
    if field not in settings.model_fields_set:
        return DEFAULT
    if field in SECRETS and f"{name}_FILE".upper() in given and name.upper() not in given:
        return f"{name}_FILE"
    return "environment"
