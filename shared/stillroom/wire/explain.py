"""Explain why no connection can be made: what was tried, by which setting, and what to do.

Errors end up in logs, which more people read than settings. So they name the setting and not what it holds, but for
a default, which everybody knows. They never hold a password.
"""

from __future__ import annotations

from typing import NamedTuple

from stillroom.errors import RedisUnavailable
from stillroom.settings import Settings


class Source(NamedTuple):
    """Tell which setting the address of a server comes from. The explaining sentence is made of it."""

    setting: str  # its name in the environment
    is_set: bool
    default: str
    has_password: bool  # in the URL itself
    gives_one: bool  # there, or by REDIS_PASSWORD
    is_sentinel: bool
    is_tls: bool
    is_found: bool  # the address is a node's, and a cluster has told it


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
    "cluster": "the server in {url} is a node of a Redis Cluster",
    "old": "the server in {url} is older than Redis 6.2",
    "crossslot": "the server in {url} refuses keys of different slots in one call, as a Redis Cluster does",
    "moved": "the server in {url} is a node of a Redis Cluster, and sends this process to another node",
    "ask": "the server in {url} is a node of a Redis Cluster, and sends this process to another node",
    "nocluster": "the server in {url} is in no Redis Cluster, and a setting says that it is",
    "noscript": "the server in {url} does not keep the scripts that it is given",
    "unsupported": "the server in {url}, or a proxy before it, does not know a command",
    "noperm": "the user in {url} lacks a right",
    "sentinel": "the Sentinels in {url} name no primary",
    "nomaster": "the Sentinels in {url} know no primary of the name in it",
}
REMEDIES = {
    "name": "Correct the host, or the name server",
    "refused": "Start Redis there, or correct host and port",
    "timeout": "See whether it runs, whether a firewall is in between, and whether that port is for TLS (rediss://)",
    "closed": "See what its log says, and whether that port is for TLS (rediss://)",
    "tls": "See to the server's certificate, and in the URL to ssl_ca_certs, to ssl_certfile if it wants a "
    "certificate of its clients, and to the other options",
    "auth": "{correct} {password}",
    "select": "Name a database that there is, or allow the user SELECT",
    "time": "Give the user that command",
    "readonly": "Let the setting lead to the primary",
    "old": "Update it: Stillroom needs Redis 6.2 or newer, or Valkey",
    "nocluster": "Let it lead to a node of a cluster, or unset STILLROOM_CLUSTER and STILLROOM_STATE_CLUSTER",
    "noscript": "Let the setting lead to one server, past any proxy that spreads commands over several",
    "unsupported": "Let the setting lead to a Redis or Valkey itself, which knows EVALSHA and SCRIPT LOAD",
    "noperm": "Give this user the commands and keys of its role; `stillroom doctor` tries what they do",
    "sentinel": "See which of them run, and whom each of them names: `stillroom doctor` shows it",
    "nomaster": "Correct the name",
}
# Of a node whose address no setting holds.
TRIED_NODE = {
    "name": "the host of a node of the cluster in {url} has no address",
    "refused": "nothing answers at the address of a node of the cluster in {url}",
    "timeout": "a node of the cluster in {url} did not answer in time",
    "closed": "the connection to a node of the cluster in {url} was closed",
}
REMEDIES_NODE = {
    "name": "See to the name server, and to the host that the node announces",
    "refused": "Start that node: `stillroom health` shows which",
    "timeout": "See whether it runs, and whether a firewall is in between: `stillroom health` shows which",
    "closed": "See what its log says: `stillroom health` shows which",
}
# Of a primary, whose address Sentinels have told.
TRIED_NAMED = {
    "name": "the host that the Sentinels in {url} name as primary has no address",
    "refused": "nothing answers at the address that the Sentinels in {url} name as primary",
    "timeout": "the primary that the Sentinels in {url} name did not answer in time",
    "closed": "the primary that the Sentinels in {url} name closed the connection",
    "readonly": "the server that the Sentinels in {url} name as primary is a replica",
}
REACH_PRIMARY = (
    "See whether it runs, and whether this process reaches the address that they name: `stillroom doctor` shows "
    "it, and replica-announce-ip in the server's configuration sets another one"
)
REMEDIES_NAMED = {
    "name": REACH_PRIMARY,
    "refused": REACH_PRIMARY,
    "timeout": f"{REACH_PRIMARY}. See whether its port is for TLS (rediss+sentinel://), too",
    "closed": "See what its log says, and whether its port is for TLS (rediss+sentinel://)",
    "readonly": "Calls go on when they name the right one: `stillroom doctor` shows whom each of them names",
}
# A server that refuses a certificate says so once TLS is agreed on, and closes: what it said may be lost.
CLOSED_BY_TLS = (
    "See what its log says, whether that port is for TLS, and whether it wants a certificate of its clients: "
    "ssl_certfile and ssl_keyfile in the URL name it"
)
SENTINELS_CLOSE = "See which of them run, and whether those ports are for TLS (rediss+sentinel://)"
SENTINELS_CLOSE_BY_TLS = (
    "See which of them run, whether those ports are for TLS, and whether they want a certificate of their clients: "
    "ssl_certfile and ssl_keyfile in the URL name it"
)
# Advice where the server is in a cluster, by the setting that leads there.
ON_ONE_SERVER = (
    "Sessions, limits and orders need one server: let REDIS_URL lead to one that is in no cluster (Sentinels may "
    "guard it), or set STILLROOM_STATE_CLUSTER=1. The cache may be on a cluster: STILLROOM_CACHE_URL names one of "
    "its nodes, and STILLROOM_CLUSTER=1"
)
IN_CLUSTER = {
    "REDIS_URL": ON_ONE_SERVER,
    "STILLROOM_CACHE_URL": "Set STILLROOM_CLUSTER=1, or let the setting lead to a server that is in no cluster",
    "STILLROOM_BROKER_URL": "Celery can't use a cluster as its broker: let the setting lead to one server, or to "
    "RabbitMQ",
}
CLUSTERED = ("cluster", "crossslot", "moved", "ask")


def source_of(settings: Settings, setting: str, url: str, *, is_found: bool = False) -> Source:
    """Return where this URL comes from. `setting`: the field that holds it, `redis_url` or `cache_url`.

    `is_found`: its host and port are a node's that a cluster has told.
    """
    has_password = ":" in url.partition("://")[2].rpartition("@")[0] or "password=" in url
    return Source(
        setting="REDIS_URL" if setting == "redis_url" else f"STILLROOM_{setting.upper()}",
        is_set=setting in settings.model_fields_set,
        default=str(Settings.model_fields[setting].default),
        has_password=has_password,
        gives_one=has_password or settings.redis_password is not None,
        is_sentinel="+sentinel://" in url,
        is_tls=url.startswith("rediss"),
        is_found=is_found,
    )


def explained(failure: RedisUnavailable, source: Source) -> RedisUnavailable:
    """Return the failure with the setting that leads there and what to do, where that is known."""
    tried = TRIED.get(failure.reason)
    if tried is None or type(failure) is not RedisUnavailable:
        return failure
    words = f" ({failure.detail})" if failure.detail else ""
    correct = "Correct" if source.gives_one else "No password is given: set"
    remedy = REMEDIES.get(failure.reason, "").format(correct=correct, password=_password(source))
    if source.is_sentinel and failure.reason in TRIED_NAMED:
        tried, remedy = TRIED_NAMED[failure.reason], REMEDIES_NAMED[failure.reason]
    if failure.reason == "closed" and source.is_tls:
        remedy = CLOSED_BY_TLS
    if failure.reason == "sentinel" and "closed" in failure.detail:
        remedy = SENTINELS_CLOSE_BY_TLS if source.is_tls else SENTINELS_CLOSE
    if source.is_found and failure.reason in TRIED_NODE:
        tried, remedy = TRIED_NODE[failure.reason], REMEDIES_NODE[failure.reason]
    if failure.reason in CLUSTERED:
        remedy = IN_CLUSTER.get(source.setting, "")
    if not source.is_set:
        remedy = f"{source.setting} is not set, so it is {source.default}: set it to where Redis is"
    sentences = [f"{tried.format(url=source.setting)}{words}", remedy]
    return RedisUnavailable(failure.reason, ". ".join(filter(None, sentences)))


def _password(source: Source) -> str:
    own = "REDIS_PASSWORD, or the file that REDIS_PASSWORD_FILE names"
    if source.has_password:
        own = f"user and password in {source.setting}"
    if source.is_sentinel:
        own += (
            "; or, if it is the Sentinels that ask, STILLROOM_SENTINEL_USER and "
            "STILLROOM_SENTINEL_PASSWORD"
        )
    return own
