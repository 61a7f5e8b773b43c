"""The networks of public proxies that have a name in the setting trusted_proxies. Pure.

Source: the lists that their operators publish. They change seldom; whoever must have the newest names the networks.
"""

from __future__ import annotations

from collections.abc import Iterable

CLOUDFLARE = (
    # www.cloudflare.com/ips-v4 and ips-v6, whose header is CF-Connecting-IP
    "103.21.244.0/22", "103.22.200.0/22", "103.31.4.0/22", "104.16.0.0/13", "104.24.0.0/14", "108.162.192.0/18",
    "131.0.72.0/22", "141.101.64.0/18", "162.158.0.0/15", "172.64.0.0/13", "173.245.48.0/20", "188.114.96.0/20",
    "190.93.240.0/20", "197.234.240.0/22", "198.41.128.0/17",
    "2400:cb00::/32", "2405:8100::/32", "2405:b500::/32", "2606:4700::/32", "2803:f800::/32", "2a06:98c0::/29",
    "2c0f:f248::/32",
)  # fmt: skip
EDGES = {"cloudflare": CLOUDFLARE}


def networks_of(names: Iterable[str]) -> tuple[str, ...]:
    """Return the networks, in the place of the names of public proxies.

    >>> networks_of(["10.0.0.0/8", "cloudflare"])[:2]
    ('10.0.0.0/8', '103.21.244.0/22')
    """
    return tuple([network for name in names for network in EDGES.get(name, (name,))])
