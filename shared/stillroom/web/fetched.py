"""Who meant a request: its client, or the page that its browser shows. Pure. Source: W3C Fetch Metadata."""

from __future__ import annotations

# What a visitor or a program asks for. Everything else (an image, a style, a script) a page has asked for.
MEANT = ("", "document", "empty", "iframe", "frame")


def is_meant(site: str, destination: str) -> bool:
    """Tell whether a client meant what it asked for, by its Sec-Fetch-Site and Sec-Fetch-Dest.

    What another site's page makes its visitors' browsers ask for is not theirs, nor is a broken image in our own
    page. A client that sends neither header meant it.
    """
    return site != "cross-site" and destination in MEANT
