"""What is said when no connection can be made: what was tried, by which setting, and what to do.

Errors end up in logs, which more people read than settings. So they name the setting and not what it holds, but for
a default, which everybody knows. They never hold a password.
"""

from __future__ import annotations

from typing import NamedTuple

from stillroom.errors import RedisUnavailable
from stillroom.settings import Settings


class Source(NamedTuple):
    """Where the address of a server comes from, for a sentence."""

    setting: str  # its name in the environment
    is_set: bool
    default: str
    has_password: bool  # in the URL itself
    is_sentinel: bool


TRIED = {
    "name": "the host in {url} has no address",
    "refused": "nothing answers at the address in {url}",
    "timeout": "the address in {url} did not answer in time",
    "closed": "the connection to the address in {url} was closed",
    "tls": "no TLS with the server in {url}",
    "auth": "the server in {url} does not take the login",
    "select": "the server in {url} does not give the database that the URL asks for",
    "time": "the user in {url} may not run TIME, which every connection begins with",
    "readonly": "the server in {url} is a replica, and copies what another one has",
    "sentinel": "the Sentinels in {url} name no primary",
    "nomaster": "the Sentinels in {url} know no primary of the name in it",
}
TODO = {
    "name": "Correct the host, or the name server",
    "refused": "Start Redis there, or correct host and port",
    "timeout": "See whether it runs, and whether a firewall is in between",
    "tls": "See to its certificate, and to ssl_ca_certs and the other options in the URL",
    "auth": "Correct {password}",
    "select": "Name a database that there is, or allow the user SELECT",
    "time": "Give the user that command",
    "readonly": "Let the setting lead to the primary",
    "sentinel": "See which of them run",
    "nomaster": "Correct the name",
}


def source_of(settings: Settings, setting: str, url: str) -> Source:
    """Where this URL comes from. `setting`: the field that holds it, `redis_url` or `cache_url`."""
    return Source(
        setting="REDIS_URL" if setting == "redis_url" else f"STILLROOM_{setting.upper()}",
        is_set=setting in settings.model_fields_set,
        default=str(Settings.model_fields[setting].default),
        has_password=":" in url.partition("://")[2].rpartition("@")[0] or "password=" in url,
        is_sentinel="+sentinel://" in url,
    )


def explained(failure: RedisUnavailable, source: Source) -> RedisUnavailable:
    """The same failure with the setting that leads there and what to do, where that is known."""
    tried = TRIED.get(failure.reason)
    if tried is None or type(failure) is not RedisUnavailable:
        return failure
    words = f" ({failure.detail})" if failure.detail else ""
    todo = TODO.get(failure.reason, "").format(password=_password(source))
    if not source.is_set:
        todo = f"{source.setting} is not set, so it is {source.default}: set it to where Redis is"
    sentences = [f"{tried.format(url=source.setting)}{words}", todo]
    return RedisUnavailable(failure.reason, ". ".join(filter(None, sentences)))


def _password(source: Source) -> str:
    if source.has_password:
        return f"user and password in {source.setting}"
    own = "REDIS_PASSWORD, or the file that REDIS_PASSWORD_FILE names"
    if source.is_sentinel:
        return f"{own}; or, if it is the Sentinels that ask, STILLROOM_SENTINEL_PASSWORD"
    return own
