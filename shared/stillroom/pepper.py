"""The secrets that tokens and names are hashed with, before Redis sees them."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence

from pydantic import SecretStr

from stillroom.errors import SettingsError
from stillroom.setting_types import PEPPER_LEAST
from stillroom.settings import Settings

log = logging.getLogger("stillroom")

_stand_in = secrets.token_bytes(32)  # of this process, for want of a setting


def ring(
    settings: Settings, peppers: Sequence[SecretStr], name: str, *, without: str
) -> tuple[bytes, ...]:
    """Return the peppers of the setting called `name`: the first for what is new, all of them for what is out
    there.

    Where it has none: a random one of this process, logged with what that means (`without`).
    In production that is an error: SettingsError. Ask for them when the first is needed, and keep them: workers and
    the command line need none.
    """
    if peppers:
        return tuple(pepper.get_secret_value().encode() for pepper in peppers)
    if settings.production:
        raise SettingsError(
            f"{name} is missing: in production it is a secret of {PEPPER_LEAST} characters or more"
        )
    log.warning("%s is not set: %s", name, without)
    return (_stand_in,)
