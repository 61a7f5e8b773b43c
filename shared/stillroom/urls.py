"""Writes a Redis URL as logs may show it and as kombu reads it, and refuses one that leads to no cluster."""

from __future__ import annotations

import re
from urllib.parse import parse_qs, quote, unquote, urlsplit, urlunsplit

from stillroom.address import OPTIONS, SERVERS, TLS_OPTIONS, is_sentinel, read_sentinel
from stillroom.place import each_url


def redact(url: str) -> str:
    """Return the URL, or a broker's several, without passwords, for logs and errors.

    >>> redact("redis://app:secret@cache:6379/0")
    'redis://app:***@cache:6379/0'
    >>> redact("unix:///run/redis.sock?password=secret;redis://:other@b")
    'unix:///run/redis.sock?password=***;redis://:***@b'
    """
    return ";".join(map(_redact_one, each_url(url)))


def _redact_one(url: str) -> str:
    scheme, mark, rest = url.rpartition("://")
    before, at, after = rest.rpartition("@")
    user = before.partition(":")[0] + ":***" if ":" in before or not mark else before
    plain = f"{scheme}{mark}{user if at else ''}{at}{after}"
    return re.sub(r"(?s)(password=).*?(?=&\w+=|\Z)", r"\1***", plain)


def for_broker(url: str, password: str | None) -> str:
    """Return a Redis URL as kombu reads it, the password filled in where it has none.

    What it says of TLS is told apart from it: see `broker_tls` in dispatch.py. Of Sentinels kombu wants one URL
    each; the primary's name is among its options.
    """
    if len(several := each_url(url)) > 1:
        return ";".join(for_broker(one, password) for one in several)
    if is_sentinel(url):
        sentinels, _, primary = read_sentinel(url)
        direct = urlsplit(for_broker(primary, password))
        who, at, _ = direct.netloc.rpartition("@")
        hosts = [f"[{host}]" if ":" in host else host for host, _ in sentinels]
        return ";".join(
            f"sentinel://{who}{at}{host}:{port}{direct.path}"
            for host, (_, port) in zip(hosts, sentinels, strict=True)
        )
    parts = urlsplit(url)
    if parts.scheme not in SERVERS:
        return url
    query = parse_qs(parts.query)
    given = parts.username or "", parts.password or ""
    user, secret = (quote(unquote(text), safe="") for text in given)  # kombu reads `;` as an end
    user = user or quote(query.get("username", [""])[0], safe="")
    secret = secret or quote(query.get("password", [password or ""])[0], safe="")
    login = f"{user}:{secret}@" if secret else f"{user}@" if user else ""
    location = login + parts.netloc.rpartition("@")[2]
    if parts.scheme == "unix":  # kombu has another name for it, and for the database
        database = query.get("db", ["0"])[0]
        return f"redis+socket://{location}{parts.path}?virtual_host={database}"
    # kombu fails at these options of redis-py, which prefers the database in the option to that in the path.
    path = f"/{query['db'][0]}" if "db" in query else parts.path
    told = (*OPTIONS, *TLS_OPTIONS)
    rest = [one for one in parts.query.split("&") if one.partition("=")[0] not in told]
    return urlunsplit(parts._replace(netloc=location, path=path, query="&".join(rest)))


def check_node(url: str) -> None:
    """Raise ValueError for a URL that leads to no node of a cluster."""
    if is_sentinel(url):
        raise ValueError("a cluster fails over by itself: its URL names a node, no Sentinels")
    parts = urlsplit(url)
    database = parts.path.strip("/") or parse_qs(parts.query).get("db", ["0"])[0]
    if parts.scheme == "unix" or database != "0":
        raise ValueError("a cluster is reached by host and port, and has no database but 0")
