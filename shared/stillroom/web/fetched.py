"""This module tells who meant a request: its client, or the page that its browser shows. Pure.

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
    said = [environ.get(f"HTTP_SEC_FETCH_{name}", "") for name in ("SITE", "DEST")]
    return is_meant(*map(str, said))


def is_meant_in_scope(scope: Mapping[str, Any]) -> bool:
    """Return whether an ASGI request is meant."""
    site = destination = b""
    for name, value in scope["headers"]:
        if name == b"sec-fetch-site":
            site = value
        elif name == b"sec-fetch-dest":
            destination = value
    return is_meant(site.decode("latin-1"), destination.decode("latin-1"))
