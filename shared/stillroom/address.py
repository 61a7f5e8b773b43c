"""Read from a URL where Redis is: a server, a socket file, or a primary that Sentinels know by its name.

    redis+sentinel://[user:password@]host:26379,host:26379/<master>/<database>

User, password, database and options are those of the primary. All Sentinels that there are should be named: a
process believes what most of the named ones say.
"""

from __future__ import annotations

import re
import ssl
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from stillroom.errors import did_you_mean
from stillroom.whole import number_in

SERVERS = ("redis", "rediss", "unix")
SENTINELS = ("redis+sentinel", "rediss+sentinel")
SCHEMES = (*SERVERS, *SENTINELS)
# The wire owns patience: an option of these kinds in a URL would silently overrule it.
OPTIONS_REFUSED = ("retry", "timeout", "max_connections", "decode_responses", "protocol")
# The options that may stand in a URL. Of the others redis-py refuses most at the first call, and the rest have no
# effect, at least not in asyncio.
OPTIONS = ("db", "username", "password", "client_name", "socket_keepalive")
TLS_OPTIONS = (
    *("ssl_ca_certs", "ssl_ca_path", "ssl_ca_data", "ssl_cert_reqs", "ssl_check_hostname"),
    *("ssl_certfile", "ssl_keyfile", "ssl_password", "ssl_ciphers", "ssl_min_version"),
    *("ssl_include_verify_flags", "ssl_exclude_verify_flags"),
)
CERT_REQS = ("none", "optional", "required")
BROKERS_CERT_REQS = (*CERT_REQS, "CERT_NONE", "CERT_OPTIONAL", "CERT_REQUIRED")
MIN_VERSIONS = ("771", "772")
SENTINEL_PORT = 26379
ODD_PASSWORD = "its password holds a # ? or /, which are written as %23 %3F %2F in a URL"
SENTINEL_FORM = "redis+sentinel://host:26379,host:26379/<master>/<database>"

_SENTINEL_URL = re.compile(
    r"(?P<scheme>rediss?)\+sentinel://(?:(?P<who>[^/?#]*)@)?(?P<hosts>[^@/?#]*)"
    r"(?P<path>/[^?#]*)?(?:\?(?P<options>[^#]*))?"
)
_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[^\[\]:,]+)(?::(?P<port>\d{1,5}))?")

Host = tuple[str, int]


class SentinelAddress(NamedTuple):
    """Hold what a Sentinel URL says."""

    sentinels: tuple[Host, ...]
    master: str  # the name that the Sentinels know the primary by
    primary: str  # the URL of the primary; only its host and port are not known yet


def is_sentinel(url: str) -> bool:
    """Return whether the URL names Sentinels."""
    return url.partition("://")[0] in SENTINELS


def read_sentinel(url: str) -> SentinelAddress:
    """Take a Sentinel URL apart. Raises ValueError, which says what is wrong and never the password."""
    match = _SENTINEL_URL.fullmatch(url)
    if match is None:
        raise ValueError(f"a Sentinel URL is written {SENTINEL_FORM}")
    hosts = tuple(map(_host, match["hosts"].split(",")))
    if len(set(hosts)) < len(hosts):
        raise ValueError("a Sentinel is named twice; name each of them once")
    master, _, database = (match["path"] or "/").removeprefix("/").partition("/")
    if not master:
        raise ValueError(f"the primary's name is missing: {SENTINEL_FORM}")
    options = match["options"] or ""
    if "db" in parse_qs(options):
        raise ValueError("the database is the last part of the path, behind the primary's name")
    who = f"{match['who']}@" if match["who"] else ""
    tail = f"/{_database(database)}" + (f"?{options}" if options else "")
    return SentinelAddress(hosts, master, f"{match['scheme']}://{who}primary{tail}")


def check_url(url: str, *, of_broker: bool = False) -> str:
    """Return the URL, unless Redis can't be there. Raises ValueError. `of_broker`: kombu has options of its own."""
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "://" not in url:
        listed = ", ".join(f"{known}://" for known in SCHEMES)
        meant = SENTINEL_FORM if "sentinel" in scheme else did_you_mean(scheme, SCHEMES)[2:]
        raise ValueError(
            f"a Redis URL starts with one of {listed}" + (f"; {meant}" if meant else "")
        )
    if is_sentinel(url):
        return _checked_sentinel(url, of_broker=of_broker)
    _check_server(url, scheme, of_broker=of_broker)
    return url


def _checked_sentinel(url: str, *, of_broker: bool) -> str:
    if "@" in re.sub("^[^/?#]*", "", url.partition("://")[2]):
        raise ValueError(ODD_PASSWORD)
    primary = read_sentinel(url).primary
    _check_server(primary, primary.partition("://")[0], of_broker=of_broker)
    return url


def _check_server(url: str, scheme: str, *, of_broker: bool) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port, parts.hostname
    except ValueError:
        raise ValueError(
            "it can't be read; # ? / [ ] in a password are written as %23 %3F %2F %5B %5D, and a port is a number "
            "up to 65,535"
        ) from None
    if "@" in parts.path + parts.query or parts.fragment:
        raise ValueError(ODD_PASSWORD)
    if not all("=" in one for one in parts.query.split("&") if one):
        raise ValueError("an option is written name=value, and & in a password as %26")
    if scheme != "unix":
        _database(parts.path.strip("/"))
    elif parts.hostname not in (None, "localhost") or not parts.path.strip("/"):
        raise ValueError(
            "the path of a socket file begins after three slashes: unix:///run/redis.sock"
        )
    options = parse_qs(parts.query)
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ValueError("ssl_keyfile is the key of a certificate: name that with ssl_certfile")
    for option, values in options.items():
        if any(word in option for word in OPTIONS_REFUSED):
            raise ValueError(f"the option {option!r} does not belong in a URL: it has its setting")
        if not of_broker:
            _check_option(option, values[-1], is_tls=scheme == "rediss")
        _check_tls(option, values[-1])


def _check_option(option: str, value: str, *, is_tls: bool) -> None:
    if option in TLS_OPTIONS and not is_tls:
        raise ValueError(f"the option {option!r} is for TLS: the URL starts with rediss then")
    known = (*OPTIONS, *TLS_OPTIONS) if is_tls else OPTIONS
    if option not in known:
        meant = did_you_mean(option, known, "%r") or f"; there are {', '.join(known)}"
        raise ValueError(f"a Redis URL has no option {option!r}{meant}")
    if option == "db":
        _database(value)
    if option == "ssl_cert_reqs" and value not in CERT_REQS:
        raise ValueError(f"ssl_cert_reqs={value!r}: none, optional or required")


def _check_tls(option: str, value: str) -> None:
    if option == "ssl_cert_reqs" and value not in BROKERS_CERT_REQS:
        raise ValueError(f"ssl_cert_reqs={value!r}: none, optional or required")
    if option == "ssl_min_version" and value not in MIN_VERSIONS:
        raise ValueError(f"ssl_min_version={value!r}: 771 for TLS 1.2, or 772 for TLS 1.3")
    if option.endswith("_verify_flags"):
        for flag in value.strip("[]").split(","):
            if flag.strip() not in ssl.VerifyFlags.__members__:
                hint = did_you_mean(flag.strip(), ssl.VerifyFlags.__members__)
                raise ValueError(f"{option}: {flag.strip()!r} is no flag of Python's ssl{hint}")


def _host(text: str) -> Host:
    match = _HOST.fullmatch(text)
    port = int(match["port"] or SENTINEL_PORT) if match else 0
    if match is None or not 0 < port < 65_536:
        raise ValueError(f"{text!r} is no host of a Sentinel; the form is {SENTINEL_FORM}")
    return match["name"].strip("[]"), port


def _database(text: str) -> int:
    if not text:
        return 0
    number = number_in(text)
    if number is None:
        raise ValueError(f"{text!r} is no database: databases are numbers, mostly 0 to 15")
    return number
