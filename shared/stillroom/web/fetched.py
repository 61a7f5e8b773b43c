"""Tells who meant a request: its client, or the page that its browser shows. Pure.

Source: W3C Fetch Metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Requests of a visitor or a program. A page makes all others (an image, a style, a script).
MEANT = ("", "document", "empty", "iframe", "frame")


def is_meant(site: str, destination: str) -> bool:
    """Tell whether a client meant what it asked for, by its Sec-Fetch-Site and Sec-Fetch-Dest.

    What another site's page makes its visitors' browsers ask for is not theirs, nor is a broken image in our own
    page. A client that sends neither header meant it.
    """
    return site != "cross-site" and destination in MEANT


def is_meant_in_environ(environ: Mapping[str, Any]) -> bool:
    """Return whether a WSGI request is meant."""
    site, destination = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_SEC_FETCH_DEST")
    return is_meant(site or "", destination or "")


def is_meant_in_scope(headers: Mapping[bytes, bytes]) -> bool:
    """Return whether an ASGI request with these headers is meant."""
    site, destination = headers.get(b"sec-fetch-site", b""), headers.get(b"sec-fetch-dest", b"")
    return is_meant(site.decode("latin-1"), destination.decode("latin-1"))
