"""Name the clients and users that limits count and bans ban, as Redis gets to know them. Pure.

A client is its address; with IPv6 it is the network that one household has, since it may take a new address for
each request. All other names (users, API keys) are only stored as an HMAC.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

UNKNOWN = "unknown"  # the bucket that all share whose address can't be told
V6_PREFIX = 64
SITE_PREFIX = 48  # a provider's network for one site
# The allowed widths of a client's network. Bans are looked up in each, because processes may differ for a while.
BAN_PREFIXES = (64, 60, 56)
LOOKED_FOR = {4: (32,), 6: (*BAN_PREFIXES, SITE_PREFIX)}  # whose bans every check looks for
_ADDRESS_LIMIT = 128  # characters; no address with brackets, zone and port has more
_NAME_LIMIT = 1024
_MAPPED = IPv6Network("::ffff:0:0/96")
_NAT64 = IPv6Network("64:ff9b::/96")
# Not `is_private`, which also means the networks of documentation, and this very machine.
_PRIVATE = tuple(
    ip_network(text)
    for text in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"),
        *("fc00::/7", "fe80::/10"),
    )
)

Address = IPv4Address | IPv6Address


def parse_address(text: str) -> Address | None:
    """Return the address in what a server or a proxy wrote: with a port, brackets, quotes or a zone. None for junk.

    An IPv4 address that is wrapped in an IPv6 one (mapped, NAT64) is the IPv4 address. In a 6to4 address it is not:
    whoever routes 2002::/16 may take any, and would have others banned.
    """
    address = peer_address(text)
    return None if address is None else _unwrapped(address)


def peer_address(text: str) -> Address | None:
    """Return the address of a peer. Of wrapped addresses only mapped ones are unwrapped.

    A socket of both families writes IPv4 as mapped addresses. Whether to believe a proxy goes by this.
    """
    if len(text) > _ADDRESS_LIMIT:
        return None
    try:
        address = ip_address(_bare(text.strip().strip('"')))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def subject_of(address: str, v6_prefix: int = V6_PREFIX) -> str:
    """Return the subject of this address: `203.0.113.7`, `2001:db8:1:2::/64`, or `unknown`.

    >>> subject_of("[2001:db8:1:2:3::4]:443")
    '2001:db8:1:2::/64'
    """
    parsed = parse_address(address.partition("/")[0])
    if parsed is None:
        return UNKNOWN
    return str(parsed) if parsed.version == 4 else _network(parsed, v6_prefix)


def prefixes_of(
    address: str, prefixes: Iterable[int], v4_prefixes: Iterable[int] = ()
) -> list[str]:
    """Return the subjects of these widths that an address, or a client's network, is in, each once; of IPv4 the
    address, and its networks of the other widths.

    >>> prefixes_of("2001:db8:1:2::/64", (64, 56))
    ['2001:db8:1:2::/64', '2001:db8:1::/56']
    """
    parsed = parse_address(address.partition("/")[0])
    if isinstance(parsed, IPv6Address):
        return list(dict.fromkeys([_network(parsed, prefix) for prefix in prefixes]))
    if parsed is None:
        return [subject_of(address)]
    return [str(parsed), *[_network(parsed, prefix) for prefix in v4_prefixes]]


def width_of(subject: str) -> str:
    """Return a network's width as bans are looked for: `4/24`. Empty if every check looks for bans of that width.

    >>> width_of("203.0.113.0/24"), width_of("2001:db8::/48"), width_of("unknown")
    ('4/24', '', '')
    """
    if subject == UNKNOWN:
        return ""
    network = ip_network(subject)
    width, version = network.prefixlen, network.version
    return "" if width in LOOKED_FOR[version] else f"{version}/{width}"


def unwrapped_network(
    network: IPv4Network | IPv6Network, *, nat64: bool = True
) -> IPv4Network | IPv6Network:
    """Return the network of IPv4 that is wrapped in one of IPv6 (mapped, NAT64), as clients are; any other as it
    is.

    >>> unwrapped_network(ip_network("::ffff:203.0.113.0/120"))
    IPv4Network('203.0.113.0/24')
    """
    wrappings = (_MAPPED, _NAT64) if nat64 else (_MAPPED,)
    if not isinstance(network, IPv6Network) or not any(map(network.subnet_of, wrappings)):
        return network
    address = IPv4Address(int(network.network_address) & 0xFFFF_FFFF)
    return IPv4Network((address, network.prefixlen - _MAPPED.prefixlen))


def site_of(subject: str) -> str | None:
    """Return the /48 that an IPv6 subject is in; None for any other."""
    parsed = parse_address(subject.partition("/")[0]) if ":" in subject else None
    return _network(parsed, SITE_PREFIX) if isinstance(parsed, IPv6Address) else None


def is_private(subject: str) -> bool:
    """Return whether this is an address inside somebody's own network, and not this very machine."""
    parsed = parse_address(subject.partition("/")[0])
    return parsed is not None and any(parsed in network for network in _PRIVATE)


def is_loopback(subject: str) -> bool:
    """Return whether this is an address of this very machine."""
    parsed = parse_address(subject.partition("/")[0])
    return parsed is not None and (parsed.is_loopback or subject.startswith("::/"))


def is_nobody(text: str | None) -> bool:
    """Return whether this text names nobody: it is None, empty or blank."""
    return text is None or not unicodedata.normalize("NFKC", text[:_NAME_LIMIT]).strip()


def hidden(kind: str, text: str, pepper: bytes) -> str:
    """Return the name that Redis knows a user, or an API key, by: 22 characters of its HMAC.

    What looks or is typed the same is the same (NFKC, case, spaces around it).
    """
    folded = unicodedata.normalize("NFKC", text[:_NAME_LIMIT]).casefold()
    name = unicodedata.normalize("NFKC", folded).strip().encode("utf-8", "surrogatepass")
    message = b"stillroom subject\0%b\0%b" % (kind.encode(), name)
    digest = hmac.digest(pepper, message, hashlib.sha256)[:16]
    return urlsafe_b64encode(digest)[:22].decode()


def _bare(text: str) -> str:
    """Return the address without port, brackets and zone."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    return text.partition("%")[0]


def _unwrapped(address: Address) -> Address:
    if isinstance(address, IPv6Address) and address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _network(address: Address, prefix: int) -> str:
    kind = IPv4Network if address.version == 4 else IPv6Network
    return str(kind((address, prefix), strict=False))
