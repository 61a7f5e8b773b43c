"""One HTTP request: JSON to an address, within a few seconds, and nowhere else than there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WITHIN_S = 5.0
ANSWER_LIMIT = 1_024  # bytes that are read of the answer, and thrown away


class Refused(Exception):
    """The address did not take it; the message says why, and never has the address: that may be a secret."""


def post(url: str, body: bytes, headers: Mapping[str, str] = {}) -> None:
    """Post JSON. Raises Refused for anything but 2xx, a redirect too: whoever sends it on is not who was named."""
    import urllib.error
    import urllib.request

    class Still(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any, **__: Any) -> None:
            return None

    opener = urllib.request.build_opener(Still)
    request = urllib.request.Request(
        url, body, {"Content-Type": "application/json", "User-Agent": "stillroom", **headers}
    )
    try:
        with opener.open(request, timeout=WITHIN_S) as answer:
            answer.read(ANSWER_LIMIT)
    except urllib.error.HTTPError as error:
        error.close()
        raise Refused(f"HTTP {error.code}") from None
    except Exception as error:  # a name that is unknown, a certificate, a protocol: all of them
        raise Refused(_named(error)) from None


def _named(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return type(reason if isinstance(reason, Exception) else error).__name__
