"""Answers a request from a stored page: with all of it, its header, or 304. Pure.

Source: RFC 9110 §13 (conditional requests) and §15.4.5, RFC 9111, RFC 9211 (Cache-Status), RFC 9875 (Cache-Groups).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import quote

from stillroom.errors import SettingsError, did_you_mean
from stillroom.web.headers import Header
from stillroom.web.pages.policy import Policy, listed
from stillroom.web.pages.stored import StoredPage
from stillroom.web.problem import Answer

# A 304 repeats these headers, because a cache on the way updates its copy with them.
IN_304 = {
    "cache-control",
    "cache-status",
    "content-location",
    "etag",
    "expires",
    "vary",
    "last-modified",
}
DECIDED_HERE = {"cache-control", "vary"}
CDN_HEADERS = ("Surrogate-Key", "Cache-Tag", "Cache-Groups")
CDN_LIMIT = 8_000  # characters of a header with tags: CDNs take 16 KB, servers on the way less
_ETAGS = re.compile(r'(?:W/)?"([^"]*)"')


def answer_from(
    page: StoredPage,
    policy: Policy,
    method: str,
    asked: Mapping[str, str],
    cdn: Sequence[str],
    status: str,
) -> Answer:
    """Return the answer to a request with these headers (lower case). `status` is its Cache-Status."""
    said = page.header("cache-control") or policy.cache_control
    tags = cdn_headers(cdn, page.tags)
    if tags is None:  # a response that can't be purged must not be kept on the way
        tags, said = [], "public, no-cache"
    vary = merged_vary(page.header("vary"), policy.varies_by)
    headers = [(name, value) for name, value in page.headers if name not in DECIDED_HERE]
    headers += [("cache-control", said), ("cache-status", f"stillroom; {status}"), *tags]
    headers += [("vary", vary)] if vary else []
    if 200 <= page.status < 300 and is_not_modified(page, asked):
        repeated = IN_304 | {name for name, _ in tags}
        return Answer(304, [one for one in headers if one[0] in repeated], b"")
    body = page.body
    headers.append(("content-length", str(len(body))))
    return Answer(page.status, headers, b"" if method == "HEAD" else body)


def fits_origin(page: StoredPage, policy: Policy, asked: Mapping[str, str]) -> bool:
    """Return whether a page is right for a request with these headers as far as CORS goes.

    A page is made for a request without Origin: one that varies by it lacks what a request with an Origin needs.
    """
    if "origin" not in asked or "origin" in map(str.lower, policy.vary):
        return True
    names = (page.header("vary") or "").lower().split(",")
    return "origin" not in map(str.strip, names)


def is_not_modified(page: StoredPage, asked: Mapping[str, str]) -> bool:
    """Return whether the client's copy is still good. If-None-Match decides where it is given."""
    if (tags := asked.get("if-none-match")) is not None:
        mine = _ETAGS.fullmatch((page.header("etag") or "").strip())
        return tags.strip() == "*" or (mine is not None and mine[1] in _ETAGS.findall(tags))
    since, modified = asked.get("if-modified-since"), page.header("last-modified")
    if since is None or modified is None:
        return False
    try:
        return _date(modified) <= _date(since)
    except (ValueError, OverflowError):  # the latter for a day or a time zone of twenty digits
        return False


def merged_vary(said: str | None, more: Sequence[str]) -> str:
    """Return one Vary header with all names, each once."""
    names = [name.strip() for name in (said or "").split(",") if name.strip()]
    known = {name.lower() for name in names}
    return ", ".join([*names, *(name for name in more if name.lower() not in known)])


def bypassed(headers: Sequence[Header], policy: Policy, *, is_private: bool) -> list[Header]:
    """Return the headers of a response that did not come from the cache, though others of its address may.

    A cache on the way must not mix them up.
    """
    said = ", ".join(value for name, value in headers if name.lower() == "vary")
    rest = [one for one in headers if one[0].lower() != "vary"]
    if is_private and not any(name.lower() == "cache-control" for name, _ in rest):
        rest.append(("cache-control", "private"))
    vary = merged_vary(said, policy.varies_by)
    return [*rest, *([("vary", vary)] if vary else []), ("cache-status", "stillroom; fwd=bypass")]


def checked_cdn(cdn: str | Sequence[str]) -> list[str]:
    """Return the headers that tell CDNs a page's tags. Raises SettingsError for one that no CDN reads."""
    kinds = [cdn] if isinstance(cdn, str) else list(listed("cdn", cdn))
    for kind in kinds:
        if kind not in CDN_HEADERS:
            known = f"{', '.join(CDN_HEADERS)}{did_you_mean(kind, CDN_HEADERS)}"
            raise SettingsError(f"cdn={kind!r}: one of {known}")
    return kinds


def cdn_headers(kinds: Sequence[str], tags: Sequence[str]) -> list[Header] | None:
    """Return the page's tags in the words of CDNs; None if they are too many for a header."""
    names = [quote(tag, safe=":._-~/@!$'()*+;=") for tag in tags]
    headers = [(kind.lower(), _joined(kind, names)) for kind in kinds if tags]
    return None if any(len(value) > CDN_LIMIT for _, value in headers) else headers


def _joined(kind: str, names: Sequence[str]) -> str:
    """Return Fastly's Surrogate-Key, Cloudflare's Cache-Tag and RFC 9875's Cache-Groups."""
    if kind == "Surrogate-Key":
        return " ".join(names)
    if kind == "Cache-Tag":
        return ",".join(names)
    return ", ".join(f'"{name}"' for name in names)


def _date(text: str) -> datetime:
    found = parsedate_to_datetime(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
