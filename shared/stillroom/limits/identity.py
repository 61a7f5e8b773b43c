"""Finds who a client is: the peer, or the address that a trusted proxy says it speaks for. Pure.

In X-Forwarded-For and Forwarded each proxy adds, on the right, whom it heard from. So the header is walked from the
right, as long as who wrote it is trusted; what stands further left is whatever somebody made up (RFC 7239, section
8.1). CF-Connecting-IP and X-Real-IP hold one address, which the proxy next to the app has written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_network
from itertools import islice

from stillroom.setting_types import UNIX
from stillroom.settings import Settings
from stillroom.subject import UNKNOWN, Address, peer_address, subject_of, unwrapped_network

HOPS = 64  # proxies in a row; nobody has so many
CROWD = 1_000  # requests
NEARLY_ALL = 0.9
CHAINS = ("x-forwarded-for", "forwarded")
# What servers write in the place of a peer's address where the connection came through a socket file: nothing
# (gunicorn, granian), and in this order waitress, Werkzeug, eventlet, uWSGI. No client has such an address.
SOCKET_FILES = frozenset(["", "localhost", "<local>", "unix", "0.0.0.0"])

Header = tuple[str, str] | tuple[bytes, bytes]
Headers = Iterable[Header] | Mapping[str, str]


class Clients:
    """Tells clients apart, as the settings say: trusted_proxies, proxy_header, limit_v6_prefix."""

    def __init__(self, settings: Settings) -> None:
        self._networks = [ip_network(text) for text in settings.proxy_networks]
        self._trusts_sockets = UNIX in settings.trusted_proxies
        self._header = settings.proxy_header
        self._is_chain = self._header in CHAINS
        self._prefix = settings.limit_v6_prefix

    def subject(self, peer: str | None, headers: Headers = ()) -> str:
        """Return the subject of a request: an IPv4 address, an IPv6 network, or `unknown` for all others."""
        peer = "" if peer is None or peer in SOCKET_FILES else peer
        if not self._is_believed(peer):
            return subject_of(peer, self._prefix)
        values = list(self._values(headers))
        found = self._walk(peer, values) if self._is_chain else _single(peer, values)
        return UNKNOWN if found is None else subject_of(found, self._prefix)

    def _walk(self, peer: str, values: Sequence[str]) -> str | None:
        """Return the first address from the right that is no trusted proxy, or None where the chain breaks."""
        nearest = peer
        for number, hop in enumerate(islice(self._hops(values), HOPS + 1)):
            address = peer_address(hop)
            if address is None or number == HOPS:
                return None
            nearest = str(address)
            if not self._trusts(address):
                break
        return nearest

    def _hops(self, values: Sequence[str]) -> Iterator[str]:
        """Yield the addresses from the right."""
        for value in reversed(values):
            if self._header == "forwarded":
                yield from forwarded_for(value)
            else:
                yield from reversed(value.rsplit(",", HOPS + 1))

    def _values(self, headers: Headers) -> Iterator[str]:
        for name, value in headers.items() if isinstance(headers, Mapping) else headers:
            if _text(name).lower() == self._header:
                yield _text(value)

    def _is_believed(self, peer: str) -> bool:
        if not peer:
            return self._trusts_sockets
        address = peer_address(peer) if self._networks else None
        return address is not None and self._trusts(address)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


class Networks:
    """Some networks, to look a subject up in."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._networks = [unwrapped_network(ip_network(text)) for text in texts]

    def has(self, subject: str) -> bool:
        """Return whether a subject is in one of the networks, or an IPv6 subject holds one of them."""
        if not self._networks or subject == UNKNOWN:
            return False
        network = ip_network(subject)
        return any(
            one.version == network.version and one.overlaps(network) for one in self._networks
        )


class Crowd:
    """Notices that nearly all requests come from one address: then it is a proxy, and nobody said so."""

    def __init__(self, size: int = CROWD) -> None:
        self._size = size  # requests
        self._suspect = ""
        self._began = self._its = 0

    def saw(self, client: str, total: int) -> bool:
        """Note one request of a client, the `total`th of all. True if nearly all of the last ones were its."""
        if total >= self._began + self._size or not self._suspect:
            self._suspect, self._began, self._its = client, total, 0
        self._its += client == self._suspect
        return self._its == int(NEARLY_ALL * self._size)


def forwarded_for(value: str) -> Iterator[str]:
    """Yield whom each element of a Forwarded header is for, from the right; empty where an element does not say.

    The text is read from the right too. What the nearest proxy wrote there is well formed, so a quoted string ends
    where it says; a quote that a client opened further left hides nothing.

    >>> list(forwarded_for('for="[2001:db8::1]:80";proto=https, host="a, b";for=192.0.2.1'))
    ['192.0.2.1', '[2001:db8::1]:80']
    """
    quoted, end = False, len(value)
    pairs: list[str] = []
    for at in range(len(value) - 1, -1, -1):
        sign = value[at]
        if sign == '"':
            quoted = not quoted or _is_escaped(value, at)
        elif not quoted and sign in ",;":
            pairs.append(value[at + 1 : end])
            end = at
            if sign == ",":
                yield _for_of(pairs)
                pairs = []
    yield "" if quoted else _for_of([*pairs, value[:end]])


def _is_escaped(text: str, at: int) -> bool:
    """Return whether an odd number of backslashes stands in front."""
    first = at
    while first > 0 and text[first - 1] == "\\":
        first -= 1
    return (at - first) % 2 == 1


def _for_of(pairs: Sequence[str]) -> str:
    """Return the `for` address of one element, or an empty text if it has none or two."""
    found = [
        value.strip().strip('"')
        for name, _, value in (pair.partition("=") for pair in pairs)
        if name.strip().lower() == "for"
    ]
    return found[0] if len(found) == 1 else ""


def _single(peer: str, values: Sequence[str]) -> str | None:
    """Return the address in a header that holds one, or None for several, of which a client sent one."""
    if not values:
        return peer
    return values[0] if len(values) == 1 and peer_address(values[0]) is not None else None


def _text(part: str | bytes) -> str:
    return part.decode("latin-1") if isinstance(part, bytes) else part
