"""Who a client is: the peer, or whom a trusted proxy says it speaks for. Pure.

Each proxy adds, on the right, whom it heard from. So the header is walked from the right, as long as who wrote it
is trusted; what stands further left is whatever somebody made up (RFC 7239, section 8.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_network
from itertools import islice

from stillroom.settings import UNIX, Settings
from stillroom.subject import UNKNOWN, Address, parse_address, subject_of

HOPS = 64  # proxies in a row; nobody has so many
CROWD = 1_000  # requests
NEARLY_ALL = 0.9

Header = tuple[str, str] | tuple[bytes, bytes]


class Clients:
    """Tells clients apart, as the settings say: trusted_proxies, proxy_header, limit_v6_prefix."""

    def __init__(self, settings: Settings) -> None:
        trusted = settings.trusted_proxies
        self._networks = [ip_network(text) for text in trusted if text != UNIX]
        self._trusts_sockets = UNIX in trusted
        self._header = settings.proxy_header
        self._prefix = settings.limit_v6_prefix

    def subject(self, peer: str | None, headers: Iterable[Header] = ()) -> str:
        """The subject of a request: an IPv4 address, an IPv6 network, or `unknown`, which all others share."""
        if not self._is_believed(peer):
            return subject_of(peer or "", self._prefix)
        found = self._walk(peer or "", list(self._values(headers)))
        return UNKNOWN if found is None else subject_of(found, self._prefix)

    def _walk(self, peer: str, values: Sequence[str]) -> str | None:
        """The first address from the right that is no proxy of ours. None where the chain can't be followed."""
        nearest = peer
        for number, hop in enumerate(islice(self._hops(values), HOPS + 1)):
            address = parse_address(hop)
            if address is None or number == HOPS:
                return None
            nearest = str(address)
            if not self._trusts(address):
                break
        return nearest

    def _hops(self, values: Sequence[str]) -> Iterator[str]:
        """From the right. Commas inside quotes are not spared: a quote that a client opened must hide nothing."""
        for value in reversed(values):
            for hop in reversed(value.rsplit(",", HOPS + 1)):
                yield hop if self._header == "x-forwarded-for" else _for_of(hop)

    def _values(self, headers: Iterable[Header]) -> Iterator[str]:
        for name, value in headers:
            if _text(name).lower() == self._header:
                yield _text(value)

    def _is_believed(self, peer: str | None) -> bool:
        if not peer:
            return self._trusts_sockets
        address = parse_address(peer) if self._networks else None
        return address is not None and self._trusts(address)

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._networks)


class Crowd:
    """Notices that nearly all requests come from one private address: then it is a proxy, and nobody said so."""

    def __init__(self) -> None:
        self._suspect = ""
        self._began = self._its = 0

    def saw(self, client: str, total: int) -> bool:
        """One request of a private address, the `total`th of all. True if nearly all of the last 1,000 were its."""
        if total >= self._began + CROWD or not self._suspect:
            self._suspect, self._began, self._its = client, total, 0
        self._its += client == self._suspect
        return self._its == int(NEARLY_ALL * CROWD)


def _for_of(element: str) -> str:
    """The `for` of one element of Forwarded: `for="[2001:db8::1]:80";proto=https`. Empty if it has none."""
    for pair in element.split(";"):
        name, _, value = pair.partition("=")
        if name.strip().lower() == "for":
            return value.strip().strip('"')
    return ""


def _text(part: str | bytes) -> str:
    return part.decode("latin-1") if isinstance(part, bytes) else part
