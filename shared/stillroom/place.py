"""Tell which database a Redis URL leads to, whatever its login: the same server has many spellings."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from stillroom.address import is_sentinel, read_sentinel

PORT = 6379
TCP = ("redis", "rediss")
SOCKET_FILE = ("unix", "redis+socket", "socket")
_BETWEEN_URLS = re.compile(r";(?=[a-z][a-z0-9+.-]*://)")


class Place(NamedTuple):
    """A database of a server: a host in small letters with its port; with 0 for it the path of a socket file, or
    the primary's name and the Sentinels who know it.
    """

    host: str
    port: int
    database: int


def each_url(text: str) -> list[str]:
    """Return the URLs that a broker's setting may have several of. A `;` in a password is between none.

    >>> each_url("redis://:a;b@host"), each_url("amqp://a;amqp://b")
    (['redis://:a;b@host'], ['amqp://a', 'amqp://b'])
    """
    return _BETWEEN_URLS.split(text)


def place_of(url: str | None) -> Place | None:
    """Return where a URL leads to; None for none, another broker's, several in one, and what can't be read.

    >>> place_of("redis://web:secret@Redis:6379"), place_of("rediss://redis/0?ssl_cert_reqs=none")
    (Place(host='redis', port=6379, database=0), Place(host='redis', port=6379, database=0))
    >>> place_of("unix:///run/redis.sock?db=2"), place_of("amqp://broker")
    (Place(host='/run/redis.sock', port=0, database=2), None)
    """
    if url is None or len(each_url(url)) > 1:
        return None
    try:
        if is_sentinel(url):
            sentinels, master, primary = read_sentinel(url)
            known_to = sorted(f"{host.lower()}:{port}" for host, port in sentinels)
            place = place_of(primary)
            return place and Place(" ".join([master, *known_to]), 0, place.database)
        parts = urlsplit(url)
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        if parts.scheme in SOCKET_FILE:
            number = options.get("db") or options.get("virtual_host") or "0"
            return Place(unquote(parts.path), 0, int(number.strip("/") or 0))
        if parts.scheme in TCP:
            number = options.get("db") or parts.path.strip("/") or "0"
            host = unquote(parts.hostname or "localhost").lower().rstrip(".")
            return Place(host, parts.port or PORT, int(number))
    except ValueError:
        return None
    return None


def is_same_place(one: str | None, other: str | None) -> bool | None:
    """Return whether two URLs lead to the same database, by what they say; None if only a resolver knows.

    >>> is_same_place("redis://web@redis:6379", "redis://producer:x@REDIS/0"), is_same_place("redis://a", "redis://b")
    (True, None)
    >>> is_same_place("redis://a/0", "redis://a/1"), is_same_place("redis://a", "redis://b:1")
    (False, False)
    """
    places = place_of(one), place_of(other)
    if places[0] is None or places[1] is None:
        return False
    if places[0] == places[1]:
        return True
    same_but_for_the_host = places[0][1:] == places[1][1:] and places[0].port != 0
    return None if same_but_for_the_host else False
