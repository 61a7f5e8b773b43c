"""Who is never banned, whatever a rule finds. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network

from stillroom.subject import SITE_PREFIX, V6_PREFIX

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
    "::ffff:0:0/96",
    "64:ff9b::/96",
    "fc00::/7",
    "fe80::/10",
)


class Spared:
    """Private ranges, the operator's allowlist, the trusted proxies."""

    def __init__(
        self, allowed: Iterable[str], proxies: Iterable[str], v6_prefix: int = V6_PREFIX
    ) -> None:
        # The limiter looks for a ban of the client and, for IPv6, of its site: any other width would do nothing.
        self._widths = {4: (32,), 6: (v6_prefix, SITE_PREFIX)}
        self._ranges: list[tuple[Network, str]] = [
            *((ip_network(text), f"{text} is private") for text in PRIVATE),
            *((ip_network(text), f"{text} is in STILLROOM_ABUSE_ALLOW") for text in allowed),
            *((ip_network(text), f"{text} is in STILLROOM_TRUSTED_PROXIES") for text in proxies),
        ]

    def why(self, subject: str) -> str:
        """Why this subject is never banned; empty if it may be.

        >>> Spared([], []).why("10.1.2.3"), Spared([], []).why("unknown")
        ('10.0.0.0/8 is private', 'it is neither an address nor an IPv6 prefix')
        """
        try:
            network = ip_network(subject)
        except ValueError:
            return "it is neither an address nor an IPv6 prefix"
        if network.prefixlen not in self._widths[network.version]:
            client, site = self._widths[6]
            return f"a ban is of an IPv4 address, or of IPv6 a client's /{client} or its site's /{site}"
        overlaps = [why for spared, why in self._ranges if _overlap(spared, network)]
        return overlaps[0] if overlaps else ""


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)
