"""Names a user's device: the browser and its system, as the User-Agent names them. Pure.

Versions are left out, so that an update is no new device. Two machines with the same browser and system are one
device: it is what a browser tells by itself. An app that knows better says `device=` at the login.
"""

from __future__ import annotations

import re

LIMIT = 512  # characters of a User-Agent
_VERSION = re.compile(r"[/ ]?v?\d[\w.]*")


def device_of(agent: str) -> str:
    """Return the name, or nothing where there is no User-Agent.

    >>> device_of("Mozilla/5.0 (X11; Linux x86_64; rv:142.0) Gecko/20100101 Firefox/142.0")
    'Mozilla (X11; Linux x; rv:) Gecko Firefox'
    """
    return _VERSION.sub("", agent[:LIMIT]).strip()
