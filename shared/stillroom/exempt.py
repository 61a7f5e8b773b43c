"""Decide who is never banned, whatever a rule finds: private ranges, the allowlist, the trusted proxies. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from stillroom.subject import BAN_PREFIXES, V6_PREFIX, unwrapped_network

Network = IPv4Network | IPv6Network

# Behind one of these are the app's own machines, a proxy that stands for everybody, or a whole carrier's customers.
PRIVATE = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.168.0.0/16",
    "::/127",
    "fc00::/7",
    "fe80::/10",
)
# The networks that wrap IPv4 addresses. Each stands for all of IPv4, so it is neither banned nor exempt.
WRAPPINGS = ("::ffff:0:0/96", "64:ff9b::/96")
# Read once: each room has two of these lists.
_ALWAYS: list[tuple[Network, str]] = [
    (ip_network(text), f"{text} is private") for text in PRIVATE + WRAPPINGS
]


class Exempt:
    """The networks whose clients are never banned."""

    def __init__(
        self, allowed: Iterable[str], proxies: Iterable[str], v6_prefix: int = V6_PREFIX
    ) -> None:
        # The limiter knows a client of IPv6 by its network alone: a ban of less would do nothing.
        self._narrowest = max(v6_prefix, *BAN_PREFIXES)
        self._client_width = v6_prefix
        named = {"STILLROOM_ABUSE_ALLOW": allowed, "STILLROOM_TRUSTED_PROXIES": proxies}
        self._ranges = [
            *_ALWAYS,
            *(
                (unwrapped_network(ip_network(text)), f"{text} is in {setting}")
                for setting, texts in named.items()
                for text in texts
            ),
        ]

    def why(self, subject: str) -> str:
        """Return why this subject is never banned, or an empty text if it may be.

        >>> Exempt([], []).why("10.1.2.3"), Exempt([], []).why("unknown")
        ('10.0.0.0/8 is private', 'it is neither an address nor a network')
        """
        try:
            network = ip_network(subject)
        except ValueError:
            return "it is neither an address nor a network"
        if network.version == 6 and network.prefixlen > self._narrowest:
            width = self._client_width
            return f"a client of IPv6 is its /{width}; did you mean {_widened(network, width)}?"
        return self.range_of(network)

    def has(self, subject: str) -> bool:
        """Return whether this client is exempt. A client without an address is not."""
        try:
            return bool(self.range_of(ip_network(subject)))
        except ValueError:
            return False

    def range_of(self, network: Network) -> str:
        """Return the range that a network is in, or overlaps, and where it comes from; empty if there is none."""
        return next((why for exempt, why in self._ranges if _overlap(exempt, network)), "")


def _widened(network: Network, width: int) -> Network:
    return network.supernet(new_prefix=width)


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)
