"""Requests that another site's page makes in a visitor's name (CSRF), told by what browsers say. Pure.

Sources: W3C Fetch Metadata (Sec-Fetch-Site), RFC 6454 (Origin). A browser that sends neither is from before 2020,
and most clients that send neither are no browsers: they have no visitor's cookie to misuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from stillroom.errors import SettingsError

SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})  # RFC 9110: they change nothing
OWN = frozenset({"same-origin", "none"})  # none: the visitor himself, by a bookmark
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?|[0-9a-f:.]+", re.ASCII)  # a name, or of IPv6


class SameOrigin:
    """Refuse requests that pages of other sites send.

    `trusted`: origins of other sites that may send them, such as https://app.example.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = frozenset(map(_origin, trusted))

    def refuses(self, method: str, site: str, origin: str, host: str) -> bool:
        """Tell whether to refuse a request of this method, by its Sec-Fetch-Site, Origin and Host."""
        if method in SAFE:
            return False
        return self.is_foreign(site, origin, host)

    def is_foreign(self, site: str, origin: str, host: str) -> bool:
        """Tell whether another site's page sent it; a websocket is foreign whatever its method."""
        if origin and origin.lower() in self._trusted:
            return False
        if site:
            return site not in OWN
        return bool(origin) and not is_of(origin, host)


def same_origin(given: bool | Iterable[str]) -> SameOrigin | None:
    """Return the guard that the middlewares' option asks for. Raises SettingsError."""
    if isinstance(given, bool):
        return SameOrigin() if given else None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise SettingsError(f"same_origin={given!r}: True, or a list of origins")
    return SameOrigin(given)


def _origin(text: object) -> str:
    """Return an origin as browsers write it: without the scheme's own port, and with an ASCII host."""
    try:
        written = text.lower() if isinstance(text, str) else ""
        parts = urlsplit(written)
        host = _encoded(parts.hostname or "")
        port = "" if parts.port in (None, _PORTS.get(parts.scheme)) else f":{parts.port}"
        is_origin = (
            parts.scheme in _PORTS
            and _HOST.fullmatch(host)
            and "@" not in parts.netloc
            and written == f"{parts.scheme}://{parts.netloc}"
        )
    except ValueError:
        is_origin = False
    if not is_origin:
        raise SettingsError(f"same_origin: {text!r} is no origin, such as https://app.example")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def _encoded(host: str) -> str:
    """Return a host in ASCII. Raises ValueError where browsers know another host by these letters, as with ß."""
    encoded = host.encode("idna")
    if not host.isascii() and encoded.decode("idna") != host:
        raise ValueError(host)
    return encoded.decode()


def is_of(origin: str, host: str) -> bool:
    """Return whether a page of this origin is of this host. Behind a proxy the visitor's scheme is unknown."""
    try:
        page, own = urlsplit(origin), urlsplit(f"//{host}")
        port = page.port or _PORTS.get(page.scheme)
        same_port = own.port in (port, None) if page.port is None else own.port == page.port
    except ValueError:
        return False
    is_page = page.scheme in _PORTS and bool(page.hostname)
    return is_page and page.hostname == own.hostname and same_port
