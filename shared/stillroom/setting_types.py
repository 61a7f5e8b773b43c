"""Defines the types of settings, reads each from a text, and says what is wrong with one that can't be read."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from stillroom.address import SCHEMES, check_url
from stillroom.durations import meant_seconds
from stillroom.edges import EDGES
from stillroom.errors import did_you_mean
from stillroom.place import each_url
from stillroom.subject import unwrapped_network

USUAL_BROKERS = ("redis", "rediss", "redis+sentinel", "amqp", "amqps", "sqs")
UNIX = "unix"  # among the trusted proxies: whoever comes through a socket file
PEPPER_LEAST = 32  # characters
LONGEST = 366 * 86_400  # seconds
NETWORKS = IPv4Network, IPv6Network, IPv4Address, IPv6Address


def text_of_url(value: object) -> object:
    """Return the text of a URL as pydantic-settings gives it to an app: a RedisDsn, or a secret. Else the value."""
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    written = getattr(value, "unicode_string", None)
    return written() if callable(written) else value


def _broker_url(url: str) -> str:
    """Check a broker URL that is a Redis URL. Of other brokers kombu must know the scheme."""
    scheme, mark, _ = url.partition("://")
    if scheme == "sentinel":
        form = "redis+sentinel://host:26379,host:26379/<master>/<database>"
        raise ValueError(f"Sentinels are named as in REDIS_URL: {form}")
    if scheme in SCHEMES and len(each_url(url)) == 1:
        return check_url(url, of_broker=True)
    from kombu.transport import TRANSPORT_ALIASES  # slow to import: only for what is not Redis

    kind = scheme.partition("+")[0]
    if not mark or kind not in TRANSPORT_ALIASES:
        usual = ", ".join(f"{name}://" for name in USUAL_BROKERS)
        hint = did_you_mean(kind.lower(), USUAL_BROKERS)
        raise ValueError(f"a broker's URL starts with {usual} or another scheme of kombu's{hint}")
    return url


def _words(value: object) -> object:
    return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def _texts(value: object) -> object:
    """Return networks as texts, also where they are objects of the ipaddress module, or one of them."""
    given = (value,) if isinstance(value, NETWORKS) else _words(value)
    if isinstance(given, tuple | list | set | frozenset):
        return tuple([str(one) if isinstance(one, NETWORKS) else one for one in given])
    return given


def _networks(values: tuple[str, ...]) -> tuple[str, ...]:
    """Check the networks. An IPv4 network in IPv6 notation becomes that IPv4 network, as addresses do."""
    return tuple(map(_network, values))


def _network(text: str) -> str:
    try:
        network = ip_network(text)
    except ValueError as error:
        hint = f"; did you mean {meant}?" if (meant := _without_host_bits(text)) else ""
        raise ValueError(
            f"a network is written as 10.0.0.0/8 or 2001:db8::/32; {error}{hint}"
        ) from None
    plain = unwrapped_network(network, nat64=False)
    return text if plain is network else str(plain)


def _without_host_bits(text: str) -> str:
    """Return the network that an address with a prefix is in: 10.0.0.0/8 for 10.0.0.1/8. Empty if it is none."""
    with suppress(ValueError):
        return str(ip_network(text, strict=False))
    return ""


def _proxies(values: tuple[str, ...]) -> tuple[str, ...]:
    known = (*EDGES, UNIX)
    for text in values:
        if text.isalpha() and text not in known:
            raise ValueError(
                f"a network is written as 10.0.0.0/8 or 2001:db8::/32, or is one of {', '.join(known)}"
                f"{did_you_mean(text, known)}"
            )
    return tuple([text if text in known else _network(text) for text in values])


def _none_if_empty(value: object) -> object:
    """Return None for what is set to nothing, as `${CACHE_URL:-}` in a stack file does: it is not set."""
    return None if isinstance(value, str) and not value.strip() else value


def _in_small_letters(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _seconds(value: object) -> object:
    """Return a timedelta as seconds. Refuse True, which would be read as one, and text such as 5m."""
    if isinstance(value, bool) or (isinstance(value, str) and not _is_number(value)):
        hint = f"; did you mean {meant}?" if (meant := meant_seconds(value)) else ""
        raise ValueError(f"a number of seconds, or a timedelta{hint}")
    total_seconds = getattr(value, "total_seconds", None)
    return total_seconds() if total_seconds else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _peppers(value: object) -> object:
    given = value.get_secret_value() if isinstance(value, SecretStr) else value
    peppers = given.replace(",", " ").split() if isinstance(given, str) else given
    if isinstance(peppers, list | tuple):
        texts = [p.get_secret_value() if isinstance(p, SecretStr) else str(p) for p in peppers]
        if any(len(text) < PEPPER_LEAST for text in texts):
            raise ValueError(f"a pepper has at least {PEPPER_LEAST} characters")
        return tuple(SecretStr(text) for text in texts)
    return peppers


RedisUrl = Annotated[str, BeforeValidator(text_of_url), AfterValidator(check_url)]
BrokerUrl = Annotated[str, BeforeValidator(text_of_url), AfterValidator(_broker_url)]
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=LONGEST)]
# What Redis counts in whole milliseconds: it refuses a life of none.
SecondsKept = Annotated[float, BeforeValidator(_seconds), Field(ge=0.001, le=LONGEST)]
SecondsOrNone = Annotated[float, BeforeValidator(_seconds), Field(ge=0, le=LONGEST)]
Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(_peppers)]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Networks = Annotated[tuple[str, ...], BeforeValidator(_texts), AfterValidator(_networks)]
ProxyHeader = Annotated[
    Literal["x-forwarded-for", "forwarded", "cf-connecting-ip", "x-real-ip"],
    BeforeValidator(_in_small_letters),  # the name of a header has no case
]
PathOrNone = Annotated[Path | None, BeforeValidator(_none_if_empty)]
TextOrNone = Annotated[str | None, BeforeValidator(_none_if_empty)]
UrlOrNone = Annotated[RedisUrl | None, BeforeValidator(_none_if_empty)]
ReplicasOrNone = Annotated[
    Annotated[int, Field(ge=0, le=10)] | None, BeforeValidator(_none_if_empty)
]
BrokerOrNone = Annotated[BrokerUrl | None, BeforeValidator(_none_if_empty)]
Proxies = Annotated[tuple[str, ...], BeforeValidator(_texts), AfterValidator(_proxies)]
